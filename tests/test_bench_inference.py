"""The sampler's benchmark: the reference arm is the published loop, promises are kept, floors are those by
hand."""

import json

import pytest
import torch

import published_sampler as oracle
from conftest import load_script
from llada.flags.yaml_files import read_yaml
from llada.models.building import ROOT
from modelling_final import LLaDAConfig
from peaked_llada import EOS, EOT, PROMPTS, answers, peaked_model
from reference_sampler import peer_samplers, reference_sampler
from sampler_arms import canvas_arm, our_arm, settings_of
from sampler_floor import Gpu, sampler_floor
from sampler_timing import Result, agreement

bench = load_script("scripts/benchmarks/bench_inference.py")
SHORT = {"gen_length": 16, "block_length": 8}


@pytest.fixture
def run(model_dir, tmp_path):
    """Runs the program on the tiny checkpoint and a few puzzles; returns the rows of its report."""
    puzzle = {"task": "mini_sudoku", "answer": "1", "metadata": {"solution": [[1]], "puzzle": [[0]]}}
    records = [{"prompt": "solve " + "1 2 3 " * n, **puzzle} for n in range(1, 6)]
    prompts, report = tmp_path / "prompts.jsonl", tmp_path / "report.json"
    prompts.write_text("".join(json.dumps(record) + "\n" for record in records))

    def call(*flags):
        model = ["--model_path", str(model_dir), "--prompts_file", str(prompts)]
        lengths = ["--gen_length", "16", "--block_length", "8", "--repeats", "2"]
        bench.main([*model, *lengths, "--output", str(report), "--overwrite", *flags])
        return json.loads(report.read_text())["rows"]

    return call


def test_times_and_accuracies(run, monkeypatch, capsys):
    monkeypatch.setattr(bench, "puzzle_solved", lambda text, record: 1.0)
    arms = ["reference", "exact", "exact+nostop", "dual+factor"]
    rows = run(
        "--arms",
        *arms,
        "--num_prompts",
        "4",
        "--num_scored",
        "5",
        "--batch_size",
        "1",
        "3",
        "--clock",
        "cpu",
        "--threads",
        "1",
    )
    timed, scored = rows[:8], rows[8:]
    assert [(row["batch"], row["arm"]) for row in timed] == [(b, arm) for b in (1, 3) for arm in arms]
    for row in timed:
        assert row["tokens/s"] > 0 and row["peak MiB"] >= 0 and row["accuracy"] == 1.0
        if row["arm"] != "dual+factor":
            assert row["equal texts"] == "4/4" and row["equal tokens"] == 1.0
    assert timed[0]["x reference"] == 1.0
    assert [(row["arm"], row["prompts"]) for row in scored] == [(arm, 5) for arm in arms[1:]]
    out = capsys.readouterr().out
    assert "commit" in out and "4 prompts of" in out and "x reference" in out


def test_an_exact_arm_with_another_text_ends_with_status_1(run, monkeypatch, capsys):
    def wrong(model, settings):
        sample = reference_sampler(model, settings)
        return lambda prompts: [[7, *answer[1:]] for answer in sample(prompts)]

    monkeypatch.setattr(bench, "reference_sampler", wrong)
    with pytest.raises(SystemExit, match="1"):
        run("--arms", "reference", "exact", "--num_prompts", "2", "--batch_size", "1")
    assert "FAILED: 1 arms" in capsys.readouterr().out


def test_batches_change_nothing(run, monkeypatch):
    rows = run("--invariance", "--num_prompts", "4", "--dtype", "float64", "--batch_size", "1", "3")
    assert [row["arm"] for row in rows] == bench.COMPARED
    columns = [f"3 {side}" for side in ("lists", "left", "right")]
    assert all(row[column] == 0 for row in rows for column in columns)
    monkeypatch.setattr(
        bench, "answers_by", lambda model, prompts, settings, size, side: [[size]] * len(prompts)
    )
    with pytest.raises(SystemExit, match="1"):
        run("--invariance", "--arms", "exact", "--num_prompts", "2")


@pytest.fixture(scope="module")
def model():
    """One that never predicts the mask token, as trained ones do not: the published loop could."""
    model = peaked_model().double()
    model.get_output_embeddings().weight[model.config.mask_token_id] = 0
    return model


def test_the_reference_arm_is_the_published_algorithm(model):
    settings = settings_of("exact", **SHORT, steps=6)
    got = reference_sampler(model, settings)(PROMPTS)
    for prompt, answer in zip(PROMPTS, got, strict=True):
        assert answer == oracle.sample(model, prompt, gen_length=16, block_length=8, steps=6)
    ours = model.generate(
        PROMPTS, return_dict_in_generate=True, generation_config=settings.changed(early_stop=False)
    )
    assert got == answers(ours, 16)


def test_reference_and_ours_count_the_same_tokens(model):
    settings = settings_of("exact", **SHORT)
    prompts = [bench.Prompt(i, prompt, {}) for i, prompt in enumerate(PROMPTS)]
    published = canvas_arm(model, reference_sampler(model, settings))(prompts)
    ours = our_arm(model, settings)(prompts)
    assert ours.tokens == published.tokens and not {EOS, EOT} & {t for row in ours.tokens for t in row}
    assert ours.num_decided < published.num_decided == 3 * 16  # it stops at the end of its answers


def test_arms_by_name():
    settings = settings_of("dual+refresh4+factor", **SHORT)
    assert (settings.cache, settings.cache_refresh_interval, settings.parallel_decoding) == (
        "dual",
        4,
        "factor",
    )
    with pytest.raises(ValueError, match="--arms dual\\+fast: no part 'fast'; known: reference, exact"):
        settings_of("dual+fast")


def test_agreement_counts_texts_and_tokens():
    assert agreement({0: [1, 2], 1: [3]}, {0: [1, 2], 1: [4, 3]}) == (1, 0.5)


def test_ratios_are_to_runs_that_stood_beside():
    base = Result(seconds=[2.0, 4.0], tokens={0: [1] * 8}, num_decided=8, num_calls=8, num_sequences=8)
    fast = Result(seconds=[1.0, 1.0], tokens={0: [1] * 8}, num_decided=8, num_calls=4, num_sequences=4)
    _, row = bench.summarize({"reference": base, "fast": fast})
    assert (row["x reference"], row["min"], row["max"]) == (3.0, 2.0, 4.0)
    assert row["tokens/s"] == 8.0 and row["ms/forward"] == 250.0 and row["forwards/token"] == 0.5


@pytest.mark.parametrize(
    ("lengths", "arm", "tokens_per_step", "is_pruned", "rate"),
    [  # tokens/s of LLaDA-8B in bfloat16 on an H100 SXM, from the roofline by hand
        ((128, 128), "exact", 1, False, 128),
        ((128, 128), "exact", 1, True, 140),
        ((128, 128), "dual", 1, True, 217),
        ((768, 256), "exact", 1, False, 31),
        ((768, 256), "exact", 1, True, 34),
        ((768, 256), "prefix", 1, True, 162),
        ((768, 256), "dual", 1, True, 184),
    ],
)
def test_floors_are_those_by_hand(lengths, arm, tokens_per_step, is_pruned, rate):
    config = LLaDAConfig(**read_yaml(ROOT / "configs/models/8b.yaml"))
    num_prompt, gen_length = lengths
    settings = settings_of(arm, gen_length=gen_length, block_length=32, steps=gen_length // tokens_per_step)
    seconds = sampler_floor(config, Gpu(), settings, num_prompt, is_pruned=is_pruned)
    assert gen_length / seconds == pytest.approx(rate, rel=0.03)


def test_random_weights_beside_their_floor(tmp_path):
    report = tmp_path / "report.json"
    flags = ["--block_length", "8", "--repeats", "1", "--tokens_per_step", "1", "2", "--output", str(report)]
    bench.main(["--shape", "micro-random", *flags])
    rows = json.loads(report.read_text())["rows"]
    assert [(row["arm"], row["tokens/step"]) for row in rows] == [
        (arm, k) for arm in ("reference", "exact", "dual") for k in (1, 2)
    ]
    assert all(row["G"] == 16 and 0 < row["% of floor"] < 100 for row in rows)


PUBLISHED = """
import torch
def generate(model, prompt, attention_mask=None, steps=128, gen_length=128, block_length=128, temperature=0.,
             mask_id=1):
    assert steps == 16 and block_length == 8 and attention_mask.shape == prompt.shape
    return torch.cat([prompt, torch.full((len(prompt), gen_length), 9)], dim=1)
"""
FAST = """
import torch
from model.modeling_llada import LLaDAModelLM
def generate(model, prompt, steps, gen_length, block_length, mask_id, threshold=None):
    assert isinstance(model, LLaDAModelLM)
    return torch.cat([prompt, torch.full((1, gen_length), 8 if threshold else 7)], dim=1), steps
generate_with_dual_cache = generate
"""


def test_peers_are_called_as_they_are_published(tmp_path):
    model, settings = peaked_model(), settings_of("exact", **SHORT)
    (tmp_path / "llada").mkdir()
    (tmp_path / "llada/generate.py").write_text(FAST)
    samplers = peer_samplers(str(tmp_path), model, settings)
    assert [sampler(PROMPTS[:2])[1][0] for sampler in samplers.values()] == [7, 8, 8]
    (tmp_path / "llada/generate.py").unlink()
    (tmp_path / "generate.py").write_text(PUBLISHED)
    (name, sampler), *_ = peer_samplers(str(tmp_path), model, settings).items()
    assert name == "peer-llada" and sampler(PROMPTS) == [[9] * 16] * 3
    (tmp_path / "generate.py").write_text("import no_such_module_anywhere")
    with pytest.raises(ValueError, match=r"cannot be imported here.*no_such_module"):
        peer_samplers(str(tmp_path), model, settings)
    (tmp_path / "generate.py").unlink()
    with pytest.raises(ValueError, match=r"found none of generate.py \(LLaDA\)"):
        peer_samplers(str(tmp_path), model, settings)


def test_a_peer_beside_the_floor(tmp_path):
    (tmp_path / "generate.py").write_text(PUBLISHED)
    flags = ["--peer_path", str(tmp_path), "--arms", "exact", "--repeats", "1", "--block_length", "8"]
    bench.main(["--shape", "micro-random", *flags, "--output", str(tmp_path / "report.json")])
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["arm"] for row in rows] == ["exact", "peer-llada"]
    assert rows[1]["floor tokens/s"] <= rows[0]["floor tokens/s"]  # it prunes nothing


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give --model_name_or_path and --prompts_file, or --shape"),
        (["--shape", "micro-random", "--repeats", "0"], "must be at least 1"),
        (["--shape", "micro-random", "--tokens_per_step", "0"], "--tokens_per_step"),
        (["--shape", "micro-random", "--arms", "fast"], "no part 'fast'"),
        (["--shape", "micro-random", "--tokens_per_step", "3"], "steps 5 cannot be shared out evenly"),
        (["--shape", "micro-random", "--clock", "cpu"], "it needs --threads 1"),
        (["--model_path", "m", "--prompts_file", "p", "--invariance", "--arms", "reference"], "leave ref"),
    ],
)  # fmt: skip
def test_bad_flags(flags, message, paths_unchecked):
    with pytest.raises(ValueError, match=message):
        bench.main([*flags, "--block_length", "8"])


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch sees no GPU here"):
        bench.main(["--shape", "8b-random", "--device", "cuda"])
