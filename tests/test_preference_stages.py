"""DPO and ELBO-KTO as they are run: exact starts, splits that do not matter, resumes, and what is refused."""

import json
import math
import os
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from conftest import ROOT, load_script
from llada.policies.kto_reference import mask_sizes
from llada.policies.pairs import PairBounds
from llada.training.metrics import read_metrics
from processes import finish, kill_after, run_ranks, start

DPO, KTO, BREF = "rlhf/train_dpo.py", "rlhf/train_elbo_kto.py", "rlhf/precompute_bref.py"
SAMPLES = ROOT / "data/samples"


def run(script, *flags):
    load_script(script).main([str(flag) for flag in flags])


def dpo_flags(model_dir, folder, *more):
    return [
        "--model_name_or_path", model_dir, "--train_data_path", SAMPLES / "preference.jsonl",
        "--apply_chat_template", "--output_dir", folder, "--max_length", 256, "--batch_size", 4,
        "--micro_batch_size", 2, "--learning_rate", 3e-3, "--num_masks", 2, "--log_interval", 1, *more,
    ]  # fmt: skip


def kto_flags(model_dir, bref, folder, *more):
    return [
        "--model_name_or_path", model_dir, "--train_data_path", bref, "--output_dir", folder,
        "--batch_size", 4, "--micro_batch_size", 2, "--learning_rate", 3e-3, "--num_masks", 4,
        "--logging_steps", 1, "--warmup_ratio", 0, *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def bref(model_dir, tmp_path_factory):
    """The sample answers with B_ref for K = 1, 2, 4."""
    file = tmp_path_factory.mktemp("bref") / "train.jsonl"
    run(BREF, "--model_path", model_dir, "--dataset", SAMPLES / "kto.jsonl", "--k_vals", "1,2,4",
        "--output_file", file, "--max_length", 256, "--batch_size", 2)  # fmt: skip
    return file


def records_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def write(file, records):
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return file


def curve(folder, name="loss"):
    return [entry[name] for entry in read_metrics(folder / "metrics.jsonl") if name in entry]


def weights(folder, name="model"):
    return load_file(folder / "final" / f"{name}.safetensors")


def assert_same_weights(one, other, *, rtol=0.0, atol=0.0):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize(
    "extra",
    [[], ["--use_lora", "--lora_r", "2"], ["--lora_r", "2", "--lora_dropout", "0.3", "--loss_type", "ipo"]],
    ids=["copy", "adapters off", "dropout"],
)
def test_dpo_starts_at_its_reference_exactly(model_dir, tmp_path, extra):
    run(DPO, *dpo_flags(model_dir, tmp_path, "--max_steps", 3,
                        "--eval_data_path", SAMPLES / "preference.jsonl", *extra))  # fmt: skip
    first, *_, last = (entry for entry in read_metrics(tmp_path / "metrics.jsonl") if "eval_loss" in entry)
    at_reference = 25.0 if "ipo" in extra else 0.6931471805599453
    assert first["eval_loss"] == pytest.approx(at_reference, rel=1e-15)
    assert first["eval_rewards/margins"] == first["eval_rewards/chosen"] == 0.0
    # the step before the first update sees the reference itself, too
    assert curve(tmp_path, "rewards/margins")[0] == 0.0
    assert curve(tmp_path)[0] == pytest.approx(at_reference, rel=1e-15)
    assert last["eval_loss"] < first["eval_loss"] and last["eval_rewards/margins"] > 0
    names = {name for entry in read_metrics(tmp_path / "metrics.jsonl") for name in entry}
    assert {f"rewards/{part}" for part in ("chosen", "rejected", "accuracies", "margins")} <= names
    assert {"logps/chosen", "logps/rejected", "elbo/std"} <= names


def test_references_given_loaded_and_computed_before_are_one(model_dir, tmp_path):
    extra = ["--max_steps", 3, "--beta", 0.3]
    run(DPO, *dpo_flags(model_dir, tmp_path / "copy", *extra))
    run(DPO, *dpo_flags(model_dir, tmp_path / "named", *extra, "--ref_model_name_or_path", model_dir))
    assert_same_weights(weights(tmp_path / "copy"), weights(tmp_path / "named"))
    # with one epoch's masks for all, what was computed before is what is computed on the way
    run(DPO, *dpo_flags(model_dir, tmp_path / "before", *extra, "--precompute_ref_log_probs"))
    assert curve(tmp_path / "before", "rewards/margins")[0] == pytest.approx(0.0, abs=1e-4)
    assert curve(tmp_path / "before")[:2] == pytest.approx(curve(tmp_path / "copy")[:2], rel=1e-4)


def test_an_adapter_that_training_starts_from_is_in_the_reference(model_dir, tmp_path):
    run(DPO, *dpo_flags(model_dir, tmp_path / "first", "--max_steps", 3, "--lora_r", 2))
    again = dpo_flags(model_dir, tmp_path / "second", "--max_steps", 1, "--sft_adapter", tmp_path / "first")
    run(DPO, *again)
    assert curve(tmp_path / "second", "rewards/margins") == [0.0]


@pytest.mark.parametrize("stage", ["dpo", "kto", "kto ema"])
def test_neither_micro_batches_nor_draws_at_once_matter(stage, model_dir, bref, tmp_path):
    folders = []
    for micro in (1, 4):
        folder = tmp_path / str(micro)
        extra = ["--max_steps", 4, "--micro_batch_size", micro]
        if stage == "dpo":
            run(DPO, *dpo_flags(model_dir, folder, *extra))
        else:
            mode = "ema" if stage == "kto ema" else "global_mean"
            run(KTO, *kto_flags(model_dir, bref, folder, *extra, "--z0_mode", mode))
        folders.append(folder)
    assert curve(folders[0]) == pytest.approx(curve(folders[1]), rel=1e-4)
    assert_same_weights(*map(weights, folders), rtol=1e-3, atol=1e-4)


def test_bref_records(bref):
    records = records_of(bref)
    assert [record["index"] for record in records] == list(range(8))
    for record, raw in zip(records, records_of(SAMPLES / "kto.jsonl"), strict=True):
        assert {name: record[name] for name in raw} == raw
        assert set(record["B_ref"]) == {"1", "2", "4"} and all(b < 0 for b in record["B_ref"].values())
        assert record["l_values"] == mask_sizes(int(record["seed"]), record["completion_length"], 4)
        assert isinstance(record["seed"], str) and record["labels"] == int(record["label"])
        assert record["text_length"] == record["prompt_length"] + record["completion_length"]
        assert len(record["masked_idx_sums"]) == len(record["mask_hashes"]) == 4


def test_bref_goes_on_after_a_kill_and_does_not_depend_on_the_processes(model_dir, bref, tmp_path):
    flags = ["--model_path", model_dir, "--dataset", SAMPLES / "kto.jsonl", "--k_vals", "1,2,4",
             "--max_length", 256, "--batch_size", 2]  # fmt: skip
    file = tmp_path / "two.jsonl"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, ROOT / BREF, *map(str, flags), "--output_file", file, "--num_gpus", "2"]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=200)
    assert file.read_bytes() == bref.read_bytes()

    script, file, scored = load_script(BREF), tmp_path / "killed.jsonl", []
    whole = script.bounds_of

    def bounds_of(*arguments):
        scored.append(1)
        if len(scored) == 3:
            raise KeyboardInterrupt
        return whole(*arguments)

    script.bounds_of = bounds_of
    try:
        with pytest.raises(KeyboardInterrupt):
            run(BREF, *flags, "--output_file", file)
        assert not file.exists()
        run(BREF, *flags, "--output_file", file)
    finally:
        script.bounds_of = whole
    assert len(scored) == 3 + 2  # two batches were kept
    assert file.read_bytes() == bref.read_bytes()
    assert not (tmp_path / "killed.jsonl.parts").exists()


@pytest.mark.parametrize("mode", ["zero", "global_mean", "loo_mean", "ema", "kl_mismatched"])
def test_kto_starts_at_half_of_lambda(mode, model_dir, bref, tmp_path):
    extra = [
        "--max_steps",
        3,
        "--batch_size",
        8,
        "--z0_mode",
        mode,
        "--desirable_weight",
        1,
        "--undesirable_weight",
        3,
    ]
    run(KTO, *kto_flags(model_dir, bref, tmp_path, *extra, "--eval_data_path", bref))
    assert curve(tmp_path)[0] == pytest.approx((4 * 0.5 + 4 * 1.5) / 8, rel=1e-5)
    first, *_, last = curve(tmp_path, "eval_loss")
    assert last < first
    names = {name for entry in read_metrics(tmp_path / "metrics.jsonl") for name in entry}
    assert {"abs_beta_r/mean", "abs_beta_s/mean", "abs_r_hat_z0/mean", "resp_len/mean", "kl"} <= names
    assert {"abs_beta_s/frac>6", "abs_beta_s/frac>8", "rewards/chosen", "logps/rejected"} <= names


def test_kto_ratios_are_zero_to_the_last_bit_in_equal_batches(model_dir, tmp_path):
    flags = ["--model_path", model_dir, "--dataset", SAMPLES / "kto.jsonl", "--k_vals", "1,4",
             "--max_length", 256, "--batch_size", 1]  # fmt: skip
    run(BREF, *flags, "--output_file", tmp_path / "b.jsonl")
    for num_draws in (1, 4):
        extra = ["--max_steps", 1, "--micro_batch_size", 1, "--num_masks", num_draws]
        run(KTO, *kto_flags(model_dir, tmp_path / "b.jsonl", tmp_path / str(num_draws), *extra))
        assert curve(tmp_path / str(num_draws), "abs_beta_r/mean") == [0.0]
        assert curve(tmp_path / str(num_draws)) == [0.5]


BLOCKS = ["--objective", "block_diffusion", "--block_size", 4]


@pytest.fixture(scope="module")
def bref_by_blocks(model_dir, tmp_path_factory):
    """The sample answers with B_ref by blocks of 4, for K = 4."""
    file = tmp_path_factory.mktemp("blocks") / "train.jsonl"
    run(BREF, "--model_path", model_dir, "--dataset", SAMPLES / "kto.jsonl", "--k_vals", 4,
        "--max_length", 256, "--output_file", file, *BLOCKS)  # fmt: skip
    return file


def test_by_blocks_policy_and_reference_start_as_one(model_dir, bref_by_blocks, tmp_path):
    one = ["--max_steps", 1, *BLOCKS]
    run(KTO, *kto_flags(model_dir, bref_by_blocks, tmp_path / "kto", *one, "--micro_batch_size", 1))
    assert curve(tmp_path / "kto", "abs_beta_r/mean") == [0.0] and curve(tmp_path / "kto") == [0.5]
    for more in ([], ["--precompute_ref_log_probs"], ["--ref_model_name_or_path", model_dir]):
        folder = tmp_path / f"dpo{len(more)}{more}"
        run(DPO, *dpo_flags(model_dir, folder, *one, *more))
        assert curve(folder) == [pytest.approx(math.log(2), abs=1e-6)]
        saved = json.loads((folder / "final/config.json").read_text())
        assert (saved["attention_pattern"], saved["attention_block_size"]) == ("block_causal", 4)


def test_kto_by_blocks_on_two_ranks_equals_one_process(model_dir, bref_by_blocks, tmp_path):
    more = [*BLOCKS, "--max_steps", 2, "--adam_epsilon", 1e-2, "--z0_mode", "kl_mismatched"]
    run(KTO, *kto_flags(model_dir, bref_by_blocks, tmp_path / "one", *more))
    two = kto_flags(model_dir, bref_by_blocks, tmp_path / "two", *more, "--shard", "full")
    run_ranks(2, KTO, two, tmp_path)
    assert curve(tmp_path / "two") == pytest.approx(curve(tmp_path / "one"), rel=1e-5)
    assert_same_weights(weights(tmp_path / "one"), weights(tmp_path / "two"), rtol=1e-4, atol=1e-5)


def test_kto_by_blocks_killed_and_resumed_equals_uninterrupted(model_dir, bref_by_blocks, tmp_path):
    more = [*BLOCKS, "--max_steps", 8, "--save_interval", 2, "--z0_mode", "ema"]
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    run(KTO, *kto_flags(model_dir, bref_by_blocks, whole, *more))
    flags = kto_flags(model_dir, bref_by_blocks, killed, *more)
    kill_after(start(KTO, flags, log), killed, 4)
    assert (killed / "latest").exists()
    finish(start(KTO, flags, log), log)
    assert curve(killed) == curve(whole) and len(curve(whole)) == 8
    assert_same_weights(weights(whole), weights(killed), rtol=0, atol=0)


def test_reference_values_of_another_objective_are_refused(model_dir, bref, bref_by_blocks, tmp_path):
    def refuses(message, file, *more):
        with pytest.raises(ValueError, match=message):
            run(KTO, *kto_flags(model_dir, file, tmp_path / "x", "--max_steps", 1, *more))

    refuses("block_diffusion: .* has B_ref of whole answers, not of blocks of 4; make it with", bref, *BLOCKS)
    refuses("masked_diffusion: .* has B_ref of blocks of 4, not of whole answers", bref_by_blocks)
    refuses("has B_ref of blocks of 4, not of blocks of 8", bref_by_blocks, *BLOCKS[:3], 8)


def test_shares_of_the_records(model_dir, bref, tmp_path, capsys):
    run(KTO, *kto_flags(model_dir, bref, tmp_path / "a", "--max_steps", 1, "--n_D", 0.5, "--n_U", 0.01))
    assert "used: 2 desirable, 1 undesirable" in capsys.readouterr().out
    run(KTO, *kto_flags(model_dir, bref, tmp_path / "b", "--max_steps", 1, "--n_U", 0.0))
    assert "used: 4 desirable, 0 undesirable" in capsys.readouterr().out


def test_training_leaves_out_what_the_reference_left_out(model_dir, bref, tmp_path, capsys):
    lengths = sorted(record["text_length"] for record in records_of(bref))
    file = tmp_path / "short.jsonl"
    run(BREF, "--model_path", model_dir, "--dataset", SAMPLES / "kto.jsonl", "--k_vals", 4, "--long", "drop",
        "--output_file", file, "--max_length", lengths[-1] - 1)  # fmt: skip
    kept = sum(length < lengths[-1] for length in lengths)
    assert 0 < kept < len(lengths)
    run(KTO, *kto_flags(model_dir, file, tmp_path / "run", "--max_steps", 1))
    assert f"{kept} records, used: " in capsys.readouterr().out


def test_published_records_are_accepted(model_dir, bref, tmp_path):
    # the published program's records: no hashes, no fingerprint, EOS padding, 4096 tokens
    file = tmp_path / "ours.jsonl"
    run(BREF, "--model_path", model_dir, "--dataset", SAMPLES / "kto.jsonl", "--k_vals", "2", "--eos",
        "padded", "--max_length", 256, "--output_file", file)  # fmt: skip
    made = records_of(file)
    assert all(record["completion_length"] < other["completion_length"]
               for record, other in zip(made, records_of(bref), strict=True))  # fmt: skip
    extra = ["--num_masks", 2, "--max_steps", 1]
    run(KTO, *kto_flags(model_dir, file, tmp_path / "padded", *extra))
    assert curve(tmp_path / "padded", "abs_beta_r/mean")[0] < 1e-5
    published = [
        {name: value for name, value in record.items() if name not in ("mask_hashes", "fingerprint")}
        for record in made[:2]
    ]
    # rows of 4096 tokens are slow here: the fill is the same but for its length
    script = load_script(KTO)
    settings = sys.modules["llada.policies.kto_reference"].PUBLISHED
    assert settings == {"eos": "padded", "max_length": 4096, "parse_special_tokens": True}
    settings["max_length"] = 256
    try:
        extra += ["--batch_size", 2]
        script.main([str(f) for f in kto_flags(
            model_dir, write(tmp_path / "p.jsonl", published), tmp_path / "published", *extra)])  # fmt: skip
    finally:
        settings["max_length"] = 4096
    assert curve(tmp_path / "published", "abs_beta_r/mean")[0] < 1e-5


def test_what_kto_refuses(model_dir, bref, tmp_path):
    records = records_of(bref)

    def refuses(message, *extra, file=bref):
        with pytest.raises(ValueError, match=message):
            run(KTO, *kto_flags(model_dir, file, tmp_path / "x", "--max_steps", 1, *extra))

    refuses("--z0_mode global_mean with a batch of one record: z0 would be the record's own r",
            "--batch_size", 1, "--micro_batch_size", 1)  # fmt: skip
    refuses("--num_masks 3: .*train.jsonl:1 has B_ref for K = 1, 2, 4", "--num_masks", 3)
    refuses("--max_length 128: .* has B_ref for max_length 256", "--max_length", 128)
    refuses("--eos none: .* has B_ref for eos 'one'", "--eos", "none")
    refuses("dtype was 'float32', is 'bfloat16'", "--dtype", "bfloat16")
    refuses("--n_D 0.0 --n_U 0.0: no record is left", "--n_D", 0, "--n_U", 0)
    changed = [{**records[0], "mask_hashes": records[1]["mask_hashes"]}, *records[1:]]
    refuses(r"c.jsonl:1: masked_idx_sums or mask_hashes differ", file=write(tmp_path / "c.jsonl", changed))
    other = [*records[:-1], {**records[-1], "fingerprint": {**records[0]["fingerprint"], "model": "0"}}]
    refuses(r"o.jsonl:8: B_ref was made differently", file=write(tmp_path / "o.jsonl", other))
    refuses("no 'seed'; make the file with", file=SAMPLES / "kto.jsonl")


def test_another_model_is_refused_unless_it_is_named_as_the_reference(model_dir, bref, tmp_path):
    run(KTO, *kto_flags(model_dir, bref, tmp_path / "first", "--max_steps", 1))
    flags = kto_flags(tmp_path / "first", bref, tmp_path / "second", "--max_steps", 1)
    with pytest.raises(ValueError, match=r"model was '.*', is '"):
        run(KTO, *flags)
    run(KTO, *flags, "--ref_model_name_or_path", model_dir)


def test_what_precompute_refuses(model_dir, tmp_path):
    flags = ["--model_path", model_dir, "--dataset", SAMPLES / "kto.jsonl", "--output_file", tmp_path / "o"]
    with pytest.raises(ValueError, match="--num_masks: invalid int value: 'x'"):
        run(BREF, *flags, "--k_vals", "1,x")
    with pytest.raises(ValueError, match="--mask_token <none>: the model's mask token has id"):
        run(BREF, *flags, "--k_vals", "1", "--mask_token", "<none>")
    with pytest.raises(ValueError, match=r"--mask_token_id 3: .* has 316 in config\.json"):
        run(BREF, *flags, "--k_vals", "1", "--mask_id", "3")
    # a tokenizer with more tokens than the embedding has rows; weights that are not numbers
    larger = AutoTokenizer.from_pretrained(model_dir)
    larger.add_tokens([f"<{n}>" for n in range(1000)])
    larger.save_pretrained(tmp_path / "larger")
    with pytest.raises(ValueError, match="the model's embedding only"):
        run(BREF, *flags, "--k_vals", "1", "--tokenizer_name", tmp_path / "larger")
    broken = shutil.copytree(model_dir, tmp_path / "broken") / "model.safetensors"
    tensors = load_file(broken)
    next(iter(tensors.values())).fill_(torch.nan)
    save_file(tensors, broken, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"B_ref of answer \d is not finite: its weights hold nan"):
        run(BREF, *flags, "--k_vals", "1", "--model_path", broken.parent)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_eight_draws_take_the_memory_of_one():
    # large blocks go straight back to the system, so that the peak of one step is not hidden by the last one
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }
    program = [sys.executable, str(ROOT / "tests/preference_memory.py")]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for stage, peaks in json.loads(done.stdout.splitlines()[-1]).items():
        assert peaks["1"] > 30 * 2**20, stage  # activations, not small change
        assert peaks["8"] <= 1.15 * peaks["1"], stage


def test_dry_runs(model_dir, bref, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # ranks that are described and not there: none is waited for
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    held_out = ["--eval_data_path", SAMPLES / "preference.jsonl"]
    run(DPO, *dpo_flags(model_dir, tmp_path / "x", "--dry_run", *held_out))
    run(KTO, *kto_flags(model_dir, bref, tmp_path / "x", "--dry_run", "--eval_data_path", bref))
    assert capsys.readouterr().out.count("8 rows") == 4
    assert not (tmp_path / "x").exists()
    with pytest.raises(ValueError, match=r"no/such\.jsonl"):
        run(DPO, *dpo_flags(model_dir, tmp_path / "x", "--dry_run", "--eval_data_path", "no/such.jsonl"))


def test_a_new_pair_wise_stage_is_its_flags_its_formula_and_a_call(model_dir, tmp_path):
    page = (ROOT / "docs/preference_optimization.md").read_text()
    source = page.split("```python\n")[1].split("```")[0]
    assert len(source.splitlines()) <= 80
    file = tmp_path / "train_simpo.py"
    file.write_text(source)
    script = str(file)
    options = ["--max_steps", 3, "--beta", 2.0, "--gamma", 0.5, "--save_interval", 2]
    held_out = ["--eval_data_path", SAMPLES / "preference.jsonl"]
    run(script, *dpo_flags(model_dir, tmp_path / "run", *options, *held_out))
    simpo = load_script(script)
    policy = torch.tensor([[-20.0, -33.0]], dtype=torch.float64)
    pairs = PairBounds(policy, torch.full_like(policy, torch.nan), torch.tensor([[4, 10]]))
    config = simpo.Config(model_name_or_path="x", output_dir="x", train_data_path=["x"], beta=2.0, gamma=0.5)
    losses, rewards = simpo.simpo(config, pairs)
    assert losses.tolist() == pytest.approx([math.log1p(math.exp(-(-10.0 + 6.6 - 0.5)))], rel=1e-12)
    assert rewards.tolist() == [[-10.0, pytest.approx(-6.6)]]
    first, *_, last = curve(tmp_path / "run", "eval_loss")
    assert last < first and (tmp_path / "run/step-2").is_dir()
    with pytest.raises(ValueError, match=r"--gamma was 0\.5, "):
        run(script, *dpo_flags(model_dir, tmp_path / "run", *options, "--gamma", 1.0))
