"""Alignment: what each rule masks and scores, the loss written out, memory, training, resume, two ranks."""

import json
import subprocess
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import BertConfig, BertLMHeadModel

from conftest import ROOT, load_script
from llada.autoregressive.teacher_rows import Distributions, TeacherAnswer, TeacherTable, as_columns, count
from llada.autoregressive.teacher_stream import AlignmentStream, Windows
from llada.data.shards import load_rows, row_lengths, write_shards
from llada.diffusion.distillation_losses import RowObjective
from llada.diffusion.masking import Stratum, mask_probability
from llada.flags.parser import parse
from llada.models.checkpoints import load_model
from llada.models.saving import save_model
from llada.models.tokens import load_tokenizer, special_ids
from llada.run import Run
from llada.training.metrics import read_metrics
from test_precompute_teacher import save_teacher

precompute = load_script("alignment/precompute_teacher.py")
train_kl = load_script("alignment/train_kl.py")
train_teacher = load_script("alignment/train_teacher.py")
SAMPLES = ROOT / "data/samples"
ALONE = Run(rank=0, world_size=1, device=torch.device("cpu"))


@pytest.fixture(scope="module")
def rows_dir(tokenizer_dir, tmp_path_factory):
    """Teacher rows of the sample conversations, under train/ and validation/."""
    folder = tmp_path_factory.mktemp("aligned")
    teacher = save_teacher(folder / "ar", load_tokenizer(str(tokenizer_dir), chat=True))
    sample = str(SAMPLES / "sft.jsonl")
    precompute.main([
        "--input", sample, "--validation_input", sample, "--tokenizer", str(tokenizer_dir),
        "--teacher", str(teacher), "--output_dir", str(folder), "--top_k", "8", "--max_length", "256",
    ])  # fmt: skip
    return folder


def flags(folder, model_dir, rows_dir, *more):
    return [
        "--model_name_or_path", str(model_dir), "--train_data_path", str(rows_dir / "train"),
        "--output_dir", str(folder), "--max_length", "256", "--max_steps", "4", "--batch_size", "4",
        "--learning_rate", "1e-2", "--warmup_steps", "0", "--log_interval", "1", "--window_length", "4",
        *more,
    ]  # fmt: skip


def make_stream(rows, model_dir, rule, *, window_length=4, decay=float("inf"), batch_size=4):
    config = parse(
        train_kl.Config,
        ["--model_name_or_path", str(model_dir), "--train_data_path", str(model_dir), "--output_dir", "x",
         "--batch_size", str(batch_size), "--micro_batch_size", str(batch_size)],
    )  # fmt: skip
    tokenizer = load_tokenizer(str(model_dir))
    ids = special_ids(load_model(str(model_dir)).config, tokenizer)
    stream = AlignmentStream.over(rows, config, ALONE, ids, rule=rule, windows=Windows(window_length, decay))
    return stream, ids


def scored_of(batch):
    """[(position, index of the scored row)] of each sequence of the batch."""
    width = batch.input_ids.shape[1]
    found = [[] for _ in batch.record_ids]
    for m, row in enumerate(batch.rows.tolist()):
        found[row // width].append((row % width, m))
    return found


@pytest.mark.parametrize("rule", ["masked", "answer", "windows"])
def test_prompts_and_padding_are_never_masked_or_scored(rule, rows_dir, model_dir):
    rows = load_rows(rows_dir / "train")
    stream, ids = make_stream(rows, model_dir, rule)
    for step in range(6):
        (batch,) = stream(step)
        width = batch.input_ids.shape[1]
        for b, record_id in enumerate(batch.record_ids):
            row = rows[record_id]
            clean, in_answer = np.array(row["input_ids"]), np.array(row["in_answer"])
            given = batch.input_ids[b].numpy()
            if batch.attention_mask is not None:
                given = given[: int(batch.attention_mask[b].sum())]
            changed = given[: len(clean)] != clean[: len(given)]
            assert (given[: len(clean)][changed] == ids.mask).all()
            assert not (changed & ~in_answer[: len(changed)]).any()
            places = [p for p, _ in scored_of(batch)[b]]
            assert all(p < len(clean) and in_answer[p] for p in places)
            if rule == "masked":
                assert places == np.flatnonzero(changed).tolist()
            if rule == "answer":
                assert places == np.flatnonzero(in_answer).tolist()
        assert batch.targets.tolist() == [
            rows[batch.record_ids[row // width]]["input_ids"][row % width] for row in batch.rows.tolist()
        ]


def test_windows_are_what_a_drafter_sees(rows_dir, model_dir):
    rows = load_rows(rows_dir / "train")
    stream, ids = make_stream(rows, model_dir, "windows", window_length=4, decay=2.0)
    starts = {}
    for step in range(40):
        (batch,) = stream(step)
        lengths = batch.attention_mask.sum(1) if batch.attention_mask is not None else None
        for b, record_id in enumerate(batch.record_ids):
            length = batch.input_ids.shape[1] if lengths is None else int(lengths[b])
            given = batch.input_ids[b, :length]
            clean = torch.tensor(rows[record_id]["input_ids"])
            is_masked = given == ids.mask
            first = length - 4
            # [prompt, answer[:s], four masks], also where the answer has fewer tokens left
            assert is_masked.nonzero()[:, 0].tolist() == list(range(first, length))
            assert torch.equal(given[:first], clean[:first])
            scored = scored_of(batch)[b]
            assert [p for p, _ in scored] == list(range(first, min(length, len(clean))))
            index = [m for _, m in scored]
            assert batch.places[index].tolist() == list(range(1, len(index) + 1))
            weights = np.exp(-np.arange(4) / 2.0)
            np.testing.assert_allclose(
                batch.weights[index], (weights / weights.sum())[: len(index)], rtol=1e-5
            )
            starts.setdefault(record_id, set()).add(first)
        assert batch.num_units == 4
    assert all(len(found) > 3 for found in starts.values())  # another window in every epoch


def causal_model(model_dir):
    """The tiny model in the form of a parallel drafter."""
    model = load_model(str(model_dir)).eval()
    model.config.attention_pattern, model.config.attention_block_size = "block_causal", 1
    model.config.logit_shift = True
    return model


def all_windows(rows_dir, model_dir, keep_rate, keep_min=0.2, **options):
    rows = load_rows(rows_dir / "train")
    stream, ids = make_stream(rows, model_dir, "windows", **options)
    stream.windows = Windows(4, 2.0, keep_rate, keep_min)
    return rows, stream, ids


def test_windows_that_share_a_text_are_windows_of_their_own(rows_dir, model_dir):
    rows, stream, ids = all_windows(rows_dir, model_dir, 1.0)
    model, objective = causal_model(model_dir), RowObjective(0.3, 0.7)
    alignment = train_kl.Alignment(objective, torch.tensor([ids.mask]), True, 4)
    shared = stream(0)[0]
    parts = alignment.loss(model, shared, shared.num_units)
    single, expected, places = make_stream(rows, model_dir, "windows", batch_size=1)[0], 0.0, []
    single.windows = Windows(4, 2.0)
    for record_id in shared.record_ids:
        example = single.example_of(record_id, 0, 0)
        num = int(example.maskable.sum())
        for start in range(num):
            item = single.hide(example, record_id, Fixed(), Stratum(start, num))
            batch = single._collate([[item]])
            found = alignment.loss(model, batch, len(shared.record_ids) * num)
            expected += float(found.value)
            places += batch.places.tolist()
    assert shared.places.tolist() == places
    assert float(parts.value) == pytest.approx(expected, rel=1e-5)


class Fixed:
    """A random generator whose every number is 0."""

    def random(self):
        return 0.0


def test_a_falling_share_keeps_later_masks_and_stands_for_all(rows_dir, model_dir):
    _, stream, _ = all_windows(rows_dir, model_dir, 0.5, 0.25)
    whole = all_windows(rows_dir, model_dir, 1.0)[1]
    kept, summed, num = np.zeros(4), np.zeros(4), np.zeros(4)
    for step in range(60):
        batch, other = stream(step)[0], whole(step)[0]
        assert batch.record_ids == other.record_ids and batch.num_tokens < other.num_tokens
        for k in range(4):
            kept[k] += int((batch.places == k + 1).sum())
            num[k] += int((other.places == k + 1).sum())
            summed[k] += float(batch.weights[batch.places == k + 1].sum() / 4)
    np.testing.assert_allclose(kept / num, [1, 0.5, 0.25, 0.25], rtol=0.06)
    in_full = np.exp(-np.arange(4) / 2.0)
    # later places are missing where the answer ends, in both alike
    expected = sum(
        np.array([float(b.weights[b.places == k].sum()) for k in range(1, 5)]) / 4
        for b in (whole(step)[0] for step in range(60))
    )
    np.testing.assert_allclose(summed, expected, rtol=0.1)
    assert (np.diff(expected) < 0).all() and expected[0] == pytest.approx(60 * in_full[0] / in_full.sum())


def test_a_causal_drafter_trains_at_the_reduced_cost(model_dir, rows_dir, tmp_path):
    drafter = tmp_path / "drafter"
    save_model(causal_model(model_dir), load_tokenizer(str(model_dir), chat=True), drafter)
    more = ["--eval_data_path", str(rows_dir / "validation"), "--keep_rate", "0.7", "--max_steps", "12"]
    train_kl.main(flags(tmp_path / "run", drafter, rows_dir, *more))
    results = json.loads((tmp_path / "run/results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"] - 0.5
    assert results["eval_tau"] > results["eval_tau_before"]  # on whole windows
    assert all("tau" not in line for line in read_metrics(tmp_path / "run/metrics.jsonl"))
    with pytest.raises(ValueError, match="--keep_rate: attention_pattern full sees the text behind"):
        train_kl.main(flags(tmp_path / "no", model_dir, rows_dir, "--keep_rate", "0.7"))


@pytest.mark.parametrize("rule", ["masked", "answer"])
def test_weights_of_the_predecessors_rules(rule, rows_dir, model_dir):
    rows = load_rows(rows_dir / "train").select(range(4))
    stream, _ = make_stream(rows, model_dir, rule)
    table = TeacherTable(rows)
    (batch,) = stream(0)
    for record_id, scored in zip(batch.record_ids, scored_of(batch), strict=True):
        num_answer, num_known = sum(rows[record_id]["in_answer"]), len(table.positions(record_id))
        index = [m for _, m in scored]
        weights, teacher_weights = batch.weights[index], batch.teacher_weights[index]
        if rule == "masked":  # 1 / p, and a mean over the answer
            p = 1 / (weights[0] * num_answer)
            assert mask_probability(0.0) <= p <= 1
        else:
            assert (weights == 1).all()
        torch.testing.assert_close(weights, weights[:1].expand_as(weights))
        torch.testing.assert_close(teacher_weights, weights * num_answer / num_known)
    expected = 4.0 if rule == "masked" else float(sum(map(sum, rows["in_answer"])))
    assert batch.num_units == expected


@pytest.mark.parametrize("rule", ["masked", "answer", "windows"])
@pytest.mark.parametrize("kind", ["ce", "kl", "hybrid"])
def test_loss_is_the_one_written_out(rule, kind, rows_dir, model_dir):
    rows = load_rows(rows_dir / "train").select(range(4))
    stream, ids = make_stream(rows, model_dir, rule)
    (batch,) = stream(3)
    model = load_model(str(model_dir)).eval()
    objective = {
        "ce": RowObjective(1, 0),
        "kl": RowObjective(0, 1, 2.0, True),
        "hybrid": RowObjective(0.3, 0.7),
    }[kind]
    alignment = train_kl.Alignment(objective, torch.tensor([ids.mask]), False, 4 if rule == "windows" else 0)
    parts = alignment.loss(model, batch, batch.num_units)
    table, width, expected = TeacherTable(rows), batch.input_ids.shape[1], 0.0
    with torch.no_grad():
        logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.flatten(0, 1)
    logits[:, ids.mask] = -torch.inf
    for m, row in enumerate(batch.rows.tolist()):
        log_q = logits[row].double().log_softmax(-1)
        expected += objective.alpha * float(batch.weights[m]) * -float(log_q[batch.targets[m]])
        record_id, position = batch.record_ids[row // width], row % width
        known = table.positions(record_id).tolist()
        if position not in known:
            continue
        found = table.distributions(record_id).take(np.array([known.index(position)]))
        chosen = torch.from_numpy(found.ids[0]).long()
        p = torch.cat([torch.from_numpy(found.log_probs[0]), torch.from_numpy(found.log_rest)]).double().exp()
        q = log_q.exp()[chosen]
        q = torch.cat([q, (1 - q.sum())[None]])
        p, q = ((x ** (1 / objective.temperature)) for x in (p, q))
        p, q = p / p.sum(), q / q.sum()
        scale = objective.temperature**2 if objective.times_t2 else 1.0
        kl = float((p * (p / q).log()).sum())
        expected += objective.beta * float(batch.teacher_weights[m]) * scale * kl
    assert float(parts.value) == pytest.approx(expected / batch.num_units, rel=1e-4)
    (part,) = parts.parts
    part().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert ("tau" in parts.sums) == (rule == "windows")


def encode_one(items):
    found = [answer for _, answer in items]
    return as_columns(found), count(found)


def test_a_long_dense_teacher_stays_on_disk(model_dir, tmp_path):
    num_positions = 4096
    tokenizer = load_tokenizer(str(model_dir))
    size = len(tokenizer)
    random = np.random.default_rng(0)
    log_probs = np.log(random.dirichlet(np.ones(size), num_positions)).astype(np.float32)
    rest = np.full(num_positions, -np.inf, dtype=np.float32)
    answer = TeacherAnswer(
        [5], [7] * num_positions, np.arange(num_positions), Distributions(None, log_probs, rest)
    )
    rows = write_shards([("f:1", answer)], encode_one, tmp_path, fingerprint={}, shard_size=1)
    stream, ids = make_stream(rows, model_dir, "answer", batch_size=1)
    model = load_model(str(model_dir)).train()
    model.config.max_sequence_length = num_positions + 1
    alignment = train_kl.Alignment(RowObjective(0, 1), torch.tensor([ids.mask]), False, 0)
    del answer, log_probs
    tracemalloc.start()  # counts numpy's memory, where the distributions are
    (batch,) = stream(0)
    parts = alignment.loss(model, batch, batch.num_units)
    parts.parts[0]().backward()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(batch.rows) == num_positions and parts.value.isfinite()
    assert peak < 0.2 * num_positions * size * 4


def test_alignment_raises_the_predicted_length(model_dir, rows_dir, tmp_path):
    options = ("--eval_data_path", str(rows_dir / "validation"), "--eval_limit", "8", "--max_steps", "30")
    found = {}
    for loss_type in ("auto", "lk", "ce"):
        folder = tmp_path / loss_type
        train_kl.main(flags(folder, model_dir, rows_dir, "--loss_type", loss_type, *options))
        found[loss_type] = json.loads((folder / "results.json").read_text())
        assert found[loss_type]["eval_loss"] < found[loss_type]["eval_loss_before"]
    # a random teacher prefers other tokens than those that stand there: only its own losses come nearer
    assert found["lk"]["eval_tau"] > found["lk"]["eval_tau_before"] + 0.02
    assert found["lk"]["eval_tau"] > found["ce"]["eval_tau"]
    logged = [entry for entry in read_metrics(tmp_path / "lk/metrics.jsonl") if "loss" in entry]
    assert {"tau", "tau_greedy", *(f"acceptance/{k}" for k in range(1, 5))} <= set(logged[-1])
    assert 1 <= logged[-1]["tau"] <= 5


@pytest.mark.parametrize("rule", ["masked", "answer"])
def test_other_rules_are_validated_on_windows_too(rule, model_dir, rows_dir, tmp_path):
    train_kl.main(
        flags(tmp_path, model_dir, rows_dir, "--positions", rule, "--loss_type", "hybrid", "--eval_data_path",
              str(rows_dir / "validation"), "--eval_limit", "4", "--max_steps", "10")
    )  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"] and results["eval_tau"] >= 1


def final_weights(folder, name="model.safetensors"):
    return load_file(folder / "final" / name)


@pytest.mark.parametrize("weights", ["streak", "decay"])
def test_a_resumed_run_is_bitwise_the_same(weights, model_dir, rows_dir, tmp_path):
    options = ("--window_weights", weights, "--loss_type", "lk", "--save_interval", "2")
    train_kl.main(flags(tmp_path / "whole", model_dir, rows_dir, *options))
    train_kl.main(flags(tmp_path / "cut", model_dir, rows_dir, *options))
    for name in ("final", "step-4", "DONE", "results.json"):
        path = tmp_path / "cut" / name
        subprocess.run(["rm", "-r", str(path)], check=True)
    (tmp_path / "cut/latest").write_text("step-2")
    train_kl.main(flags(tmp_path / "cut", model_dir, rows_dir, *options))
    whole, cut = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    with pytest.raises(ValueError, match="window_weights"):
        (tmp_path / "cut/DONE").unlink()
        train_kl.main(flags(tmp_path / "cut", model_dir, rows_dir, *options, "--window_weights", "uniform"))


def test_conversations_without_a_teacher(model_dir, tmp_path):
    options = [
        "--data_path",
        str(SAMPLES / "sft.jsonl"),
        "--model_name",
        str(model_dir),
        "--max_length",
        "256",
    ]
    train_kl.main([*options, "--output_dir", str(tmp_path / "a"), "--max_steps", "2", "--loss_type", "auto"])
    assert (tmp_path / "a/final/model.safetensors").is_file()
    with pytest.raises(
        ValueError, match=r"--loss_type kl needs a teacher, and --train_data_path .* has none"
    ):
        train_kl.main([*options, "--output_dir", str(tmp_path / "b"), "--loss_type", "kl"])


def test_rows_of_another_tokenizer_are_refused(rows_dir, model_dir, tmp_path):
    tokenizer = load_tokenizer(str(model_dir))
    tokenizer.bos_token = tokenizer.eos_token
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"was made for tokenizer .*, this model's is .*precompute_teacher"):
        train_kl.main(
            flags(tmp_path / "run", model_dir, rows_dir, "--tokenizer_name", str(tmp_path / "other"))
        )
    with pytest.raises(ValueError, match="has rows of up to 256 tokens, --max_length is 64"):
        train_kl.main(flags(tmp_path / "run", model_dir, rows_dir, "--max_length", "64"))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--temperature", "0"), "--temperature 0.0: must be above 0"),
        (("--alpha", "-1"), "--alpha -1.0: must be at least 0"),
        (("--loss_type", "hybrid", "--alpha", "0", "--beta", "0"), "has no loss"),
        (("--window_length", "0"), "--window_length 0: must be at least 1"),
    ],
)
def test_wrong_flags(more, message, model_dir, rows_dir, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_kl.main(flags(tmp_path, model_dir, rows_dir, *more))


def test_accumulation_is_micro_batches_of_a_step(model_dir, rows_dir, tmp_path):
    train_kl.main(
        flags(tmp_path / "a", model_dir, rows_dir, "--batch_size", "4", "--gradient_accumulation_steps", "2")
    )
    train_kl.main(flags(tmp_path / "b", model_dir, rows_dir, "--batch_size", "4", "--micro_batch_size", "2"))
    first, second = final_weights(tmp_path / "a"), final_weights(tmp_path / "b")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_small_teacher_learns_and_can_be_asked(model_dir, tokenizer_dir, tmp_path):
    size = tmp_path / "size.yaml"
    size.write_text(
        "{d_model: 16, n_layers: 1, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 24, rope_theta: 1e4}"
    )
    options = ["--tokenizer_name", str(tokenizer_dir), "--train_data_path", str(SAMPLES / "sft.jsonl"),
               "--eval_data_path", str(SAMPLES / "sft.jsonl"), "--max_length", "256", "--batch_size", "4",
               "--learning_rate", "1e-2"]  # fmt: skip
    train_teacher.main(
        [*options, "--config_name", str(size), "--output_dir", str(tmp_path / "ar"), "--max_steps", "30"]
    )
    results = json.loads((tmp_path / "ar/results.json").read_text())
    assert results["eval_loss"] < results["eval_loss_before"] - 1
    more = ["--model_name_or_path", str(tmp_path / "ar"), "--max_steps", "1"]
    train_teacher.main([*options, *more, "--output_dir", str(tmp_path / "b")])
    again = json.loads((tmp_path / "b/results.json").read_text())
    assert again["eval_loss_before"] == pytest.approx(results["eval_loss"], rel=1e-5)
    precompute.main(["--input", str(SAMPLES / "sft.jsonl"), "--tokenizer", str(model_dir), "--teacher",
                     str(tmp_path / "ar/final"), "--output_dir", str(tmp_path / "rows")])  # fmt: skip
    assert row_lengths(load_rows(tmp_path / "rows")).min() > 0
    with pytest.raises(ValueError, match="give either --config_name"):
        train_teacher.main([*options, "--output_dir", str(tmp_path / "c")])
    with pytest.raises(ValueError, match=r"unknown argument .--use_lora"):
        train_teacher.main(
            [*options, "--config_name", "1m", "--output_dir", str(tmp_path / "c"), "--use_lora"]
        )
    bert = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.5)
    BertLMHeadModel(bert).save_pretrained(tmp_path / "bert")
    more = ["--model_name_or_path", str(tmp_path / "bert"), "--max_steps", "1"]
    with pytest.raises(ValueError, match=r"bert: cannot be read .* its attention is bidirectional"):
        train_teacher.main([*options, *more, "--output_dir", str(tmp_path / "c")])
