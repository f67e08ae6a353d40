"""Packing changes where records stand and nothing else: same noise, loss, gradients, curves, on any ranks."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import ROOT, load_script
from llada.diffusion.batches import Example, deal, pack
from llada.diffusion.losses import masked_diffusion_loss
from llada.diffusion.stream import Curriculum, MaskedStream
from llada.run import Run
from llada.training.config import RowsConfig
from llada.training.rows_stage import validation_loss
from processes import run_ranks
from test_stages import SAMPLES, final_weights, losses, pretrain_flags, sft_flags
from test_training import EOS, MASK, tiny_model

LENGTHS = np.random.default_rng(0).integers(2, 20, size=60)
ROW = 32
CPU = Run(rank=0, world_size=1, device=torch.device("cpu"))


def example_of(record_id, epoch, longest):
    tokens = np.random.default_rng(record_id).integers(0, MASK - 1, size=LENGTHS[record_id])
    maskable = np.arange(len(tokens)) >= 1
    return Example(tokens, maskable, weight=1.0 / maskable.sum(), num_units=float(len(tokens)))


def make_stream(**changes):
    fields = dict(
        example_of=example_of, lengths=LENGTHS, batch_size=24, micro_batch_size=24, seed=3, run=CPU,
        mask_id=MASK, pad_id=EOS,
    )  # fmt: skip
    return MaskedStream(**{**fields, **changes})


def on_ranks(world_size, **changes):
    return [
        batch
        for rank in range(world_size)
        for batch in make_stream(run=Run(rank, world_size, torch.device("cpu")), **changes)(1)
    ]


def loss_and_gradient(batches):
    model = tiny_model()
    count = sum(batch.num_units for batch in batches)
    total = 0.0
    for batch in batches:
        part = masked_diffusion_loss(model, batch, count)
        part.backward()
        total += float(part.detach())
    return total, torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def contents(batches):
    """Sorted (target, weight) of everything scored, and what was read."""
    scored = sorted(
        pair for batch in batches for pair in zip(batch.targets.tolist(), batch.weights.tolist(), strict=True)
    )
    return scored, sum(b.num_tokens for b in batches), sum(b.num_pairs for b in batches)


def test_rows_hold_every_record_once_and_no_more_than_fits():
    rows = pack(LENGTHS, ROW)
    assert sorted(record for row in rows for record in row) == list(range(60))
    sizes = [sum(LENGTHS[row]) for row in rows]
    assert max(sizes) <= ROW and sizes == sorted(sizes, reverse=True)
    assert len(rows) <= -(-LENGTHS.sum() // ROW) + 1
    with pytest.raises(ValueError, match="a record of 19 tokens does not fit into rows of 18"):
        pack([3, 19], 18)


@pytest.mark.parametrize("num_rows", [0, 1, 5, 8, 9])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_get_equally_many_micro_batches(num_rows, world_size):
    rows = [[i] for i in range(num_rows)]
    parts = [deal(rows, Run(rank, world_size, torch.device("cpu")), 2) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    dealt = [row for part in parts for micro_batch in part for row in micro_batch]
    assert sorted(dealt) == rows and all(len(m) <= 2 for part in parts for m in part)


OPTIONS = [{}, {"t_sampling": "stratified", "mask_count": "exact"}]


@pytest.mark.parametrize("options", OPTIONS, ids=["iid", "low variance"])
@pytest.mark.parametrize(("world_size", "micro_batch_size"), [(1, 100), (1, 2), (2, 2), (3, 1)])
def test_packed_loss_and_gradient_are_those_of_padded_rows(options, world_size, micro_batch_size):
    padded = make_stream(**options)(1)
    packed = on_ranks(world_size, micro_batch_size=micro_batch_size, row_length=ROW, **options)
    assert contents(packed) == contents(padded)
    assert sum(b.input_ids.shape[0] for b in packed) < 24 / 2
    expected, found = loss_and_gradient(padded), loss_and_gradient(packed)
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert (found[1] - expected[1]).norm() < 1e-5 * expected[1].norm()


def test_records_that_are_filled_up_are_packed_at_their_full_length():
    def filled(record_id, epoch, longest):
        example = example_of(record_id, epoch, longest)
        pad = longest - len(example.input_ids)
        return Example(
            np.pad(example.input_ids, (0, pad), constant_values=EOS), np.ones(longest, bool), 1 / longest, 1.0
        )

    padded = make_stream(example_of=filled)(1)
    packed = make_stream(example_of=filled, row_length=ROW, fills_rows=True)(1)
    assert contents(packed) == contents(padded)
    assert max(b.input_ids.shape[1] for b in packed) <= 64


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_is_the_same(world_size):
    model = tiny_model()
    config = RowsConfig(output_dir="unused", dtype="float32")
    expected = validation_loss(model, stream=make_stream(), config=config, run=CPU)
    batches = [
        list(make_stream(run=Run(r, world_size, torch.device("cpu")), row_length=ROW, micro_batch_size=2)
             .validation(50)) for r in range(world_size)
    ]  # fmt: skip
    assert len({len(part) for part in batches}) == 1
    reference = list(make_stream().validation(50))
    for flat in ([b for part in batches for b in part if b.num_units], reference):
        assert sum(b.num_tokens for b in flat) == LENGTHS[:50].sum()
    assert contents([b for part in batches for b in part])[0] == contents(reference)[0]
    found = validation_loss(model, stream=make_stream(row_length=ROW), config=config, run=CPU)
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_length_curriculum_cuts_records_into_documents_with_their_own_noise():
    curriculum = Curriculum(start_length=4, full_length=16, length_steps=4)
    assert [curriculum.length(step) for step in (0, 1, 2, 3, 4)] == [4, 4, 8, 8, None]
    cut, whole = (make_stream(curriculum=c, micro_batch_size=8) for c in (curriculum, Curriculum()))
    early, plain = cut(1), whole(1)
    assert contents(early)[1] == contents(plain)[1]  # no token is lost
    assert contents(early)[2] == sum(
        min(4, n - start) ** 2 for record, _ in whole.records_of(1) for n in [LENGTHS[record]]
        for start in range(0, n, 4)
    )  # fmt: skip
    assert sum(b.num_units for b in early) == pytest.approx(sum(b.num_units for b in plain))
    assert loss_and_gradient(early)[0] == pytest.approx(loss_and_gradient(plain)[0], rel=0.6)
    late = cut(4), whole(4)
    assert contents(late[0]) == contents(late[1])
    # packed or not, the pieces are the same
    packed = make_stream(curriculum=curriculum, row_length=ROW)(1)
    assert contents(packed) == contents(early)


def test_a_masking_curriculum_bounds_the_times():
    curriculum = Curriculum(start_mask_ratio=0.2, mask_steps=10)
    assert [curriculum.largest_t(step) for step in (0, 5, 10, 99)] == pytest.approx([0.2, 0.6, 1.0, 1.0])
    (batch,) = make_stream(curriculum=curriculum)(0)
    # weights are 1 / p_mask of records of weight 1 / n: none can be below 1 / (0.2 n)
    assert len(batch.rows) < 0.35 * batch.num_tokens
    for bad in ({"start_mask_ratio": 0.0}, {"length_steps": 3}):
        with pytest.raises(ValueError, match="--start_"):
            Curriculum(**bad)


LARGE_EPSILON = ("--adam_epsilon", "1e-2")  # see test_stages: rounding in gradients that are nearly zero


@pytest.mark.parametrize("extra", [(), ("--use_lora", "--lora_r", "2", "--eos_padding")], ids=["sft", "lora"])
def test_packed_sft_ends_where_padded_sft_does(extra, model_dir, tmp_path):
    main = load_script("sft_training/train_sft.py").main
    flags = [*LARGE_EPSILON, *extra, "--batch_size", "6"]
    main(sft_flags(tmp_path / "padded", model_dir, *flags))
    main(sft_flags(tmp_path / "packed", model_dir, *flags, "--packing", "--micro_batch_size", "2"))
    assert losses(tmp_path / "packed") == pytest.approx(losses(tmp_path / "padded"), rel=1e-5)
    name = "adapter_model.safetensors" if extra else "model.safetensors"
    padded, packed = (load_file(tmp_path / run / "final" / name) for run in ("padded", "packed"))
    for key in padded:
        torch.testing.assert_close(packed[key], padded[key], rtol=1e-4, atol=1e-5)
    results = [json.loads((tmp_path / run / "results.json").read_text()) for run in ("padded", "packed")]
    assert results[1]["eval_loss"] == pytest.approx(results[0]["eval_loss"], rel=1e-5)
    assert results[1]["num_tokens"] == results[0]["num_tokens"]


def test_packed_pretraining_resumes_exactly_and_on_two_ranks(tokenizer_dir, tmp_path):
    main = load_script("pretraining/pretrain.py").main
    flags = [
        "--packing", "--max_length", "128", "--save_interval", "2", "--log_interval", "1",
        "--batch_size", "6", "--micro_batch_size", "1", *LARGE_EPSILON,
    ]  # fmt: skip

    def folder(name, *more):
        return pretrain_flags(tmp_path / name, tokenizer_dir, tmp_path, *flags, *more)

    main(folder("whole"))
    main(folder("cut"))
    for path in ("final", "DONE", "step-4"):
        target = tmp_path / "cut" / path
        target.rename(tmp_path / f"old-{path}")
    (tmp_path / "cut/latest").write_text("step-2")
    main(folder("cut"))
    whole, cut = final_weights(tmp_path / "whole"), final_weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    manifest = json.loads((tmp_path / "whole/data/train/manifest.json").read_text())
    num_documents = len((SAMPLES / "pretrain.jsonl").read_text().splitlines())
    assert manifest["fingerprint"]["rows"] == "documents" and manifest["statistics"]["rows"] >= num_documents

    run_ranks(2, "pretraining/pretrain.py", folder("two", "--shard", "full"), tmp_path)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_rows_of_documents_are_prepared_by_the_script_too(tokenizer_dir, tmp_path):
    load_script("pretraining/prepare_corpus.py").main([
        "--input", str(ROOT / "data/samples/pretrain.jsonl"), "--tokenizer", str(tokenizer_dir),
        "--max_length", "16", "--rows", "documents", "--output_dir", str(tmp_path),
    ])  # fmt: skip
    from llada.data.shards import load_rows
    from llada.models.tokens import load_tokenizer

    eos = load_tokenizer(str(tokenizer_dir)).eos_token_id
    rows = [row["input_ids"] for row in load_rows(tmp_path / "train")]
    texts = (SAMPLES / "pretrain.jsonl").read_text().splitlines()
    assert max(map(len, rows)) == 16
    assert all(eos not in row[:-1] for row in rows)  # one document a row
    assert sum(row[-1] == eos for row in rows) == len(texts)
