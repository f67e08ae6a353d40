"""The loop: global normalisation, exact resume, schedules, and what stops it."""

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from llada.diffusion.batches import Example
from llada.diffusion.losses import masked_diffusion_loss
from llada.diffusion.stream import MaskedStream
from llada.models.building import attach_lora
from llada.run import Run
from llada.training.config import RowsConfig, finished_before
from llada.training.loop import fit, make_optimizer, prepare_trainable
from llada.training.metrics import read_metrics
from llada.training.parallel import use_float8
from llada.training.step import learning_rate
from modelling_final import LLaDAConfig, LLaDAModelLM

CPU = Run(rank=0, world_size=1, device=torch.device("cpu"))
V, MASK, EOS = 24, 23, 22
LENGTHS = np.random.default_rng(0).integers(3, 12, size=40)


class NoTokenizer:
    """Stands where only saving would use a tokenizer."""

    def save_pretrained(self, folder):
        Path(folder, "tokenizer.json").write_text("{}")

    mask_token_id = chat_template = None

    def __len__(self):
        return 0

    def get_vocab(self):
        return {}


def tiny_model(seed=0, **changes):
    torch.manual_seed(seed)
    fields = dict(
        d_model=16, n_layers=2, n_heads=2, n_kv_heads=2, mlp_hidden_size=24, vocab_size=V, embedding_size=V,
        mask_token_id=MASK, eos_token_id=EOS, pad_token_id=EOS, max_sequence_length=64, rope_theta=1e4,
    )  # fmt: skip
    return LLaDAModelLM(LLaDAConfig(**{**fields, **changes}))


def example_of(record_id, epoch, longest):
    tokens = np.random.default_rng(record_id).integers(0, MASK - 1, size=LENGTHS[record_id])
    maskable = np.arange(len(tokens)) >= 2
    return Example(tokens, maskable, weight=1.0 / max(1, maskable.sum()), num_units=1.0)


def make_stream(config, run=CPU):
    return MaskedStream(
        example_of, LENGTHS, batch_size=config.batch_size, micro_batch_size=config.micro_batch_size,
        seed=config.seed, run=run, mask_id=MASK, pad_id=EOS,
    )  # fmt: skip


def make_config(folder, **changes):
    fields = dict(output_dir=str(folder), max_steps=6, batch_size=8, micro_batch_size=4, learning_rate=1e-2,
                  log_interval=1, report_to="none")  # fmt: skip
    return RowsConfig(**{**fields, **changes})


def train(folder, *, model=None, **changes):
    config = make_config(folder, **changes)
    model = prepare_trainable(model or tiny_model(), config)
    fit(
        model, NoTokenizer(), config, CPU, stream=make_stream(config), loss=masked_diffusion_loss,
        validate=None, data="",
    )  # fmt: skip
    return model


def weights_of(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradient_of_one_step(micro_batch_size):
    config = make_config("unused", micro_batch_size=micro_batch_size)
    model = tiny_model()
    batches = make_stream(config)(0)
    count = sum(batch.num_units for batch in batches)
    loss = 0.0
    for batch in batches:
        part = masked_diffusion_loss(model, batch, count)
        part.backward()
        loss += float(part.detach())
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("micro_batch_size", [1, 2, 4])
def test_accumulation_gives_the_loss_and_gradient_of_the_whole_batch(micro_batch_size):
    whole_loss, whole = gradient_of_one_step(8)
    loss, split = gradient_of_one_step(micro_batch_size)
    assert loss == pytest.approx(whole_loss, rel=1e-6)
    for name in whole:
        torch.testing.assert_close(split[name], whole[name], rtol=1e-4, atol=1e-6)


def test_nothing_masked_gives_zero_loss_zero_gradient_and_a_backward():
    model = tiny_model()
    empty = torch.empty(0, dtype=torch.long)
    loss = model(
        input_ids=torch.zeros(2, 4, dtype=torch.long), rows=empty, targets=empty, weights=torch.empty(0)
    ).loss
    loss.backward()
    assert float(loss) == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(tmp_path):
    whole = train(tmp_path / "whole")
    train(tmp_path / "cut", save_interval=2)
    states = tmp_path / "cut"
    for name in ("final", "step-6"):
        shutil.rmtree(states / name)
    (states / "latest").write_text("step-4")
    resumed = train(states, model=tiny_model(seed=99), save_interval=2)
    for name, value in weights_of(whole).items():
        assert torch.equal(value, weights_of(resumed)[name]), name
    losses = [
        {entry["step"]: entry["loss"] for entry in read_metrics(folder / "metrics.jsonl")}
        for folder in (tmp_path / "whole", states)
    ]
    assert losses[0] == losses[1]


def test_lora_trains_and_resumes_only_the_adapters(tmp_path):
    base = weights_of(tiny_model())
    model = attach_lora(tiny_model(), rank=2, alpha=4.0, dropout=0.0, target_modules=["all-linear"], seed=42)
    model = train(tmp_path, model=model, save_interval=3, use_lora=True, lora_r=2, lora_alpha=4.0)
    after = {
        name.replace(".base_layer", ""): value for name, value in weights_of(model.get_base_model()).items()
    }
    assert set(base) <= set(after)
    assert all(torch.equal(after[name], base[name]) for name in base)
    assert not [
        name for name, _ in model.named_parameters() if "lora" in name and "transformer.ff_out" in name
    ]
    assert (tmp_path / "final" / "adapter_model.safetensors").is_file()
    saved = FileSystemReader(tmp_path / "step-6").read_metadata().state_dict_metadata
    assert saved and all("lora_" in name or "param_groups" in name for name in saved)


def test_finished_run_is_not_repeated_and_results_are_written(tmp_path):
    first = weights_of(train(tmp_path))
    again = weights_of(train(tmp_path, model=tiny_model(seed=5)))
    assert all(torch.equal(first[name], again[name]) for name in first)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["steps"] == 6
    assert (tmp_path / "DONE").exists()


def test_a_finished_run_goes_on_to_more_steps(tmp_path, capsys):
    train(tmp_path, max_steps=3)
    longer = weights_of(train(tmp_path, max_steps=6, model=tiny_model(seed=5)))
    assert "a finished run of 3 steps goes on to 6, under the schedule of --max_steps 6" in (
        capsys.readouterr().out
    )
    # the first three steps of six under the schedule of three, then the last three under that of six
    config = make_config(tmp_path, max_steps=6)
    rates = [e["learning_rate"] for e in read_metrics(tmp_path / "metrics.jsonl") if "loss" in e]
    assert rates[3:] == [learning_rate(step, config) for step in (3, 4, 5)]
    assert rates[:3] == [learning_rate(step, make_config(tmp_path, max_steps=3)) for step in (0, 1, 2)]
    assert json.loads((tmp_path / "results.json").read_text())["steps"] == 6
    again = weights_of(train(tmp_path, max_steps=6, model=tiny_model(seed=7)))
    assert all(torch.equal(longer[name], again[name]) for name in longer)
    with pytest.raises(ValueError, match="--max_steps was 6, now 5"):
        train(tmp_path, max_steps=5)
    (tmp_path / "latest").write_text("step-3")
    train(tmp_path, max_steps=4)


def test_a_finished_command_is_known_without_a_model(tmp_path):
    config = make_config(tmp_path)
    assert finished_before(config) is None
    train(tmp_path)
    assert "has finished before" in finished_before(make_config(tmp_path))
    for changes in ({"max_steps": 9}, {"dry_run": True}, {"log_interval": 3}):
        assert finished_before(make_config(tmp_path, **changes)) is None


def test_resume_refuses_another_run(tmp_path):
    train(tmp_path)
    with pytest.raises(ValueError, match=r"--learning_rate was 0\.01, now 0\.5"):
        train(tmp_path, learning_rate=0.5)


def test_resume_from_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no saved state there"):
        train(tmp_path / "new", resume_from_checkpoint=str(tmp_path))


def test_truncated_state_is_refused_and_left_alone(tmp_path):
    train(tmp_path, save_interval=2)
    shard = next((tmp_path / "step-6").glob("*.distcp"))
    shard.write_bytes(shard.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"step-6: cannot be loaded"):
        train(tmp_path)
    assert (tmp_path / "latest").read_text() == "step-6"


@pytest.mark.parametrize(("limit", "kept"), [(2, [5, 6]), (-1, [1, 2, 3, 4, 5, 6])])
def test_retention_keeps_the_newest_or_all(limit, kept, tmp_path):
    train(tmp_path, save_interval=1, save_total_limit=limit)
    assert sorted(path.name for path in tmp_path.glob("step-*")) == [f"step-{step}" for step in kept]


def test_non_finite_loss_stops_and_names_the_records(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.model.transformer.ln_f.weight[0] = math.nan
    with pytest.raises(FloatingPointError, match=r"step 0: loss nan.*records: \[\d+"):
        train(tmp_path, model=model)


def test_schedules():
    config = make_config("x", max_steps=100, warmup_steps=10, learning_rate=1.0, min_learning_rate=0.1)
    assert learning_rate(0, config) == pytest.approx(0.1)
    assert learning_rate(9, config) == pytest.approx(1.0)
    for kind, middle in (("linear", 0.55), ("cosine", 0.55), ("constant", 1.0), ("wsd", 1.0)):
        config.lr_scheduler_type = kind
        assert learning_rate(55, config) == pytest.approx(middle)
    config.lr_scheduler_type = "wsd"
    assert learning_rate(95, config) == pytest.approx(0.55)
    config.lr_scheduler_type = "cosine"
    assert learning_rate(100, config) == pytest.approx(0.1)


def test_vectors_are_not_decayed():
    decayed, kept = make_optimizer(tiny_model(), make_config("x", weight_decay=0.3)).param_groups
    assert decayed["weight_decay"] == 0.3 and all(p.ndim == 2 for p in decayed["params"])
    assert kept["weight_decay"] == 0.0 and all(p.ndim == 1 for p in kept["params"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"batch_size": 6, "micro_batch_size": 4},
            r"--batch_size 6 must be a multiple of --micro_batch_size 4 x 1",
        ),
    ],
)
def test_impossible_numbers_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        make_config("x", **changes).resolve(CPU, 40)


def test_epochs_become_steps():
    config = make_config("x", max_steps=-1, num_train_epochs=3.0)
    config.resolve(CPU, 40)
    assert config.max_steps == 15


def test_float8_says_what_is_missing_and_takes_the_blocks_alone(monkeypatch, tmp_path):
    config = make_config(tmp_path, float8=True)
    monkeypatch.setitem(sys.modules, "torchao.float8", None)
    with pytest.raises(ValueError, match="--float8: pip install torchao"):
        prepare_trainable(tiny_model(), config)
    converted = []

    def convert(blocks, *, module_filter_fn):
        linear = [(name, part) for name, part in blocks.named_modules() if isinstance(part, torch.nn.Linear)]
        converted.extend(name for name, part in linear if module_filter_fn(part, name))

    torchao = SimpleNamespace(convert_to_float8_training=convert)
    monkeypatch.setitem(sys.modules, "torchao", torchao)
    monkeypatch.setitem(sys.modules, "torchao.float8", torchao)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match=r"--float8: needs a GPU of compute capability 8\.9"):
        prepare_trainable(tiny_model(), config)
    config.dry_run = True  # counts for the machine that has one
    prepare_trainable(tiny_model(), config)
    assert "0.q_proj" in converted and "0.ff_proj" not in converted  # 24 wide


@pytest.mark.gpu  # with torchao, which products on a CPU obey too
def test_float8_errs_by_the_rounding_of_its_formats_alone():
    wide = {"d_model": 64, "mlp_hidden_size": 96, "n_heads": 4, "n_kv_heads": 4}
    exact, float8 = tiny_model(**wide), tiny_model(**wide)
    use_float8(float8, is_run=False)
    random = torch.Generator().manual_seed(0)
    x, upstream = (torch.randn(4, 32, width, generator=random) for width in (64, 96))
    found = []
    for model in (exact, float8):
        product, inputs = model.model.transformer.blocks[0].ff_proj, x.clone().requires_grad_()
        output = product(inputs)
        output.backward(upstream)
        found.append((output.detach(), inputs.grad, product.weight.grad))
    # e4m3 rounds a factor by 2.6 %, e5m2 a gradient by 5.3 %; a product errs by both of its two
    for right, ours, error in zip(*found, (0.037, 0.059, 0.059), strict=True):
        assert float((ours - right).norm() / right.norm()) == pytest.approx(error, rel=0.2)
    ids = torch.randint(0, MASK, (4, 32), generator=random)
    for model in (exact, float8):
        model.zero_grad()
        torch.nn.functional.cross_entropy(model(ids).logits.flatten(0, 1), ids.flatten()).backward()
    right, ours = (torch.cat([p.grad.flatten() for p in model.parameters()]) for model in (exact, float8))
    assert float(torch.cosine_similarity(right, ours, dim=0)) > 0.98
