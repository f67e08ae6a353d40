"""What holds for every stage of llada/training/stages.py: a new stage is tried here by its entry alone."""

import os
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import flag_reads
from conftest import ROOT, load_script
from llada.inference import eval_args
from llada.training.metrics import read_metrics
from llada.training.stages import STAGES
from processes import finish, kill_after, run_ranks, start

TRAINED = {name: stage for name, stage in STAGES.items() if stage.trains}
RUNS = [
    pytest.param(name, flags, id=", ".join(filter(None, [name, variant])))
    for name, stage in TRAINED.items()
    for variant, flags in {"": (), **stage.variants}.items()
]
# Beside these, for many ranks: which decoding runs as many forwards on each of them, who has no prompt, ...
MORE = {
    "pretraining": {"tied": ("--config_name", "tied.yaml")},
    "sft": {"packed": ("--packing",)},
    "grpo": {
        "lora, kl": ("--lora_r", "2", "--beta", "0.1"),
        "factor": ("--parallel_decoding", "factor"),
        "remdm": ("--remdm", "cap"),
        "few prompts": ("--eval_limit", "1", "--beta", "0.1"),
    },
}
VARIANTS = {name: {"": (), **stage.variants, **MORE.get(name, {})} for name, stage in TRAINED.items()}
CASES = [
    pytest.param(name, variant, id=", ".join(filter(None, [name, variant])))
    for name, variants in VARIANTS.items()
    for variant in variants
]
VARIANTS["sft"]["reduced in bfloat16"] = ("--reduce_dtype", "bfloat16")  # for sharded ranks alone: no case
# Debug configs that start from scratch do so at this size: what is tried here does not depend on it.
TINY = "{d_model: 16, n_layers: 2, n_heads: 2, n_kv_heads: 2, mlp_hidden_size: 24, rope_theta: 1e4}"
# Of metrics.jsonl; all others are results, but that a reward of 0 may have either sign.
CLOCKS = (
    "time",
    "tokens_per_second",
    "tflops_per_second",
    "mfu",
    "peak_memory_gb",
    "num_tokens",
    "eval_accuracies",
)


@pytest.fixture(scope="session")
def workplace(tmp_path_factory, worker_id_or_none) -> Path:
    """A folder like the repository's, in which debug configs run; shared by all workers of a test run."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if worker_id_or_none else base) / "debug"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            for name in ("data", "configs", "eval"):
                (folder / name).symlink_to(ROOT / name)
            (folder / "size.yaml").write_text(TINY)
            (folder / "tied.yaml").write_text(TINY.replace("}", ", weight_tying: true}"))
    return folder


@pytest.fixture(scope="session")
def worker_id_or_none() -> str | None:
    """The name of this xdist worker."""
    return os.environ.get("PYTEST_XDIST_WORKER")


@pytest.fixture
def made(workplace, monkeypatch):
    """made(name): the output of a stage's debug config, made now if it is not there yet."""
    monkeypatch.chdir(workplace)

    def make(name: str) -> Path:
        stage = STAGES[name]
        if not stage.debug_output.exists():
            for before in stage.after:
                make(before)
            script = load_script(stage.script)
            with flag_reads.watch(eval_args if name == "eval" else script, workplace / f"{name}.unread"):
                script.main(["--config", stage.debug_config, *size_of(name)])
        return stage.debug_output

    def make_alone(name: str) -> Path:
        with FileLock(f"{workplace}.lock"):
            return make(name)

    return make_alone


@pytest.fixture
def inputs(made):
    """inputs(name): makes what the debug config of a stage reads."""
    return lambda name: [made(before) for before in STAGES[name].after]


def size_of(name: str) -> list[str]:
    is_new = "config_name" in (ROOT / STAGES[name].debug_config).read_text()
    return ["--config_name", "size.yaml"] if is_new else []


def flags_of(name: str, folder: Path, *more: object) -> list[str]:
    return [
        "--config",
        STAGES[name].debug_config,
        *size_of(name),
        "--output_dir",
        str(folder),
        *map(str, more),
    ]


def results(folder: Path) -> list[dict[str, float]]:
    """The logged numbers that are not a matter of speed."""
    return [
        {k: v for k, v in entry.items() if k not in CLOCKS and not k.startswith("share_")}
        for entry in read_metrics(folder / "metrics.jsonl")
    ]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "final").glob("*model.safetensors")
    return load_file(file)


@pytest.mark.parametrize("name", STAGES)
def test_the_debug_config_runs(name, made):
    assert made(name).exists()
    header = (ROOT / STAGES[name].debug_config).read_text().split("\n\n")[0]
    assert f"python {STAGES[name].script} --config {STAGES[name].debug_config}" in header
    for before in STAGES[name].after:
        assert f"python {STAGES[before].script} --config {STAGES[before].debug_config}" in header


@pytest.mark.parametrize("name", STAGES)
def test_every_flag_is_read_or_could_not_be_given(name, made, workplace):
    made(name)
    assert (workplace / f"{name}.unread").read_text() == "[]"


@pytest.mark.parametrize("name", TRAINED)
def test_a_dry_run_writes_nothing(name, inputs, tmp_path, monkeypatch, capsys):
    inputs(name)
    before = sorted(Path.cwd().rglob("*"))
    flags = flags_of(name, tmp_path / "run", "--dry_run", "--batch_size", 512)
    for world_size in (1, 64):  # without MASTER_ADDR: nobody is met
        monkeypatch.setenv("WORLD_SIZE", str(world_size))
        load_script(STAGES[name].script).main([*flags, "--gpu_memory_gb", "80"])
        said = capsys.readouterr().out
        assert "nothing was written" in said and "; fits into 80.0 GB" in said
    with pytest.raises(ValueError, match=r"--micro_batch_size \d+: a rank needs .* GB and has 0\.5"):
        load_script(STAGES[name].script).main([*flags, "--gpu_memory_gb", "0.5"])
    assert not (tmp_path / "run").exists() and sorted(Path.cwd().rglob("*")) == before


@pytest.mark.parametrize(("name", "variant"), RUNS)
def test_killed_and_resumed_equals_uninterrupted(name, variant, inputs, tmp_path):
    inputs(name)
    script, whole, killed = STAGES[name].script, tmp_path / "whole", tmp_path / "killed"
    more = [*variant, "--max_steps", 16, "--save_interval", 3, "--log_interval", 1]
    load_script(script).main(flags_of(name, whole, *more))
    log = tmp_path / "log"
    kill_after(start(script, flags_of(name, killed, *more), log), killed, 8)
    assert (killed / "latest").exists()
    finish(start(script, flags_of(name, killed, *more), log), log)
    assert results(killed) == results(whole)
    assert [entry["step"] for entry in results(killed) if "loss" in entry] == list(range(1, 17))
    one, other = weights(whole), weights(killed)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    for file in whole.glob("completions.jsonl"):
        assert (killed / file.name).read_bytes() == file.read_bytes()


@pytest.fixture
def ranks_run(inputs, workplace):
    """ranks_run(name, variant, num_ranks, shard, dtype): two steps of a stage, made once; its folder."""

    def run(name: str, variant: str, num_ranks: int, shard: str, dtype: str) -> Path:
        inputs(name)
        folder = workplace / f"ranks/{name} {variant}/{num_ranks} {shard} {dtype}"
        # a large epsilon: Adam's first steps would blow up rounding in gradients that are nearly zero
        more = ["--max_steps", 2, "--log_interval", 1, "--adam_epsilon", 1e-2, "--dtype", dtype]
        more += ["--batch_size", 32] if name == "grpo" else []  # as many prompts as four ranks
        more += ["--micro_batch_size", 1] if num_ranks > 1 else []
        more += ["--shard", shard] if name != "teacher" else []  # a teacher is trained whole
        if (name, dtype) == ("kto", "bfloat16"):  # its reference values are those of a precision
            more += ["--train_data_path", "bref_bfloat16.jsonl", "--eval_data_path", "bref_bfloat16.jsonl"]
        with FileLock(f"{workplace}.ranks.lock"):  # two tests at once would share the cores
            if (name, dtype) == ("kto", "bfloat16") and not Path("bref_bfloat16.jsonl").exists():
                changed = ["--dtype", dtype, "--output_file", "bref_bfloat16.jsonl"]
                flags = ["--config", STAGES["precompute_bref"].debug_config, *changed]
                load_script(STAGES["precompute_bref"].script).main(flags)
            if not (folder / "DONE").exists():
                folder.mkdir(parents=True, exist_ok=True)
                flags = flags_of(name, folder, *more, *VARIANTS[name][variant])
                nodes = 2 if shard == "hybrid" else 1
                run_ranks(num_ranks, STAGES[name].script, flags, folder, num_nodes=nodes)
        return folder

    return run


def compare(folder: Path, expected: Path, *, tolerance: float) -> None:
    """Losses are equal to the tolerance, all other results and the weights to 1e-4."""
    for ours, theirs in zip(results(folder), results(expected), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        losses = [{k: v for k, v in entry.items() if k.endswith("loss")} for entry in (ours, theirs)]
        assert losses[0] == pytest.approx(losses[1], rel=tolerance, abs=tolerance)
    ours, theirs = weights(folder), weights(expected)
    assert ours.keys() == theirs.keys()
    for key in theirs:
        torch.testing.assert_close(ours[key], theirs[key], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "variant"), CASES)
def test_two_ranks_equal_one_process(name, variant, ranks_run):
    one = ranks_run(name, variant, 1, "none", "float32")
    for shard in ("none", "full") if variant == "" else ("full",):
        if name != "teacher" or shard == "none":
            compare(ranks_run(name, variant, 2, shard, "float32"), one, tolerance=1e-6)


@pytest.mark.parametrize(("name", "variant"), [("sft", ""), ("grpo", "lora, kl")])
def test_sharding_rounds_no_more_than_bfloat16_does(name, variant, ranks_run):
    replicated = ranks_run(name, variant, 2, "none", "bfloat16")
    compare(ranks_run(name, variant, 2, "full", "bfloat16"), replicated, tolerance=1e-4)


def test_gradients_are_reduced_in_the_precision_asked_for(ranks_run):
    exact = results(ranks_run("sft", "", 2, "full", "float32"))
    rounded = results(ranks_run("sft", "reduced in bfloat16", 2, "full", "float32"))
    first, second = (next(entry for entry in run if "grad_norm" in entry) for run in (exact, rounded))
    assert first["loss"] == second["loss"]
    assert 0 < abs(first["grad_norm"] - second["grad_norm"]) < 1e-2 * first["grad_norm"]


@pytest.mark.ranks4
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("name", "variant", "shard"),
    [
        pytest.param(*case.values, shard, id=f"{case.id}, {shard}")
        for case in CASES
        for shard in ("none", "full", "hybrid")
        if case.values[0] != "teacher" or shard == "none"
    ],
)
def test_four_ranks(name, variant, shard, dtype, ranks_run):
    found = ranks_run(name, variant, 4, shard, dtype)
    if dtype == "float32":
        compare(found, ranks_run(name, variant, 1, "none", dtype), tolerance=1e-6)
    else:
        compare(found, ranks_run(name, variant, 4, "none", dtype), tolerance=1e-4)
