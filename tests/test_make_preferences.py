"""Preference data: the right completion is chosen, nothing is asked twice, and records have their format."""

import json

import pytest

from conftest import load_script
from fake_judge import FakeServer, shown
from llada.data.records import read_records
from modelling_final import LLaDAModelLM

WORDS = ["iron", "rust", "river", "seven", "water"]


def prompts_file(folder):
    path = folder / "prompts.jsonl"
    records = [{"id": f"p{i}", "prompt": f"Say {word}.", "word": word} for i, word in enumerate(WORDS)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def reward_file(folder):
    """Pays by a hash of the text, and nothing for every fifth."""
    path = folder / "hashed.py"
    path.write_text(
        "import zlib\n"
        "def hashed(prompts, completions, word, **columns):\n"
        "    texts = [c if isinstance(c, str) else c[0]['content'] for c in completions]\n"
        "    codes = [zlib.crc32((w + t).encode()) % 5 for w, t in zip(word, texts)]\n"
        "    return [None if code == 4 else code / 3 for code in codes]\n"
    )
    return path


@pytest.fixture
def arguments(model_dir, tmp_path):
    return [
        "--model_name_or_path", str(model_dir), "--is_instruct",
        "--prompts_file", str(prompts_file(tmp_path)),
        "--gen_length", "8", "--num_generations", "6", "--pairs_per_prompt", "2",
        "--reward_funcs", f"{reward_file(tmp_path)}:hashed",
    ]  # fmt: skip


def read(folder, name):
    return [record for _, record in read_records(folder / name)]


def test_pairs_and_labels_follow_the_scores(arguments, tmp_path):
    main = load_script("rlhf/make_preferences.py").main
    out = tmp_path / "out"
    main([*arguments, "--output_dir", str(out), "--batch_size", "2"])
    paired, unpaired = read(out, "paired.jsonl"), read(out, "unpaired.jsonl")
    summary = json.loads((out / "results.json").read_text())
    scores = {(r["prompt"][0]["content"], r["completion"][0]["content"]): r["score"] for r in unpaired}
    assert len(scores) == len(unpaired)
    for record in paired:
        assert record["prompt"][-1]["role"] == "user"
        question = record["prompt"][0]["content"]
        for side in ("chosen", "rejected"):
            assert [message["role"] for message in record[side]] == ["assistant"]
            assert scores[question, record[side][0]["content"]] == record[f"score_{side}"]
        assert record["score_chosen"] > record["score_rejected"]
    assert all(record["label"] == (record["score"] >= 0.5) for record in unpaired)
    assert summary["pairs"] == len(paired) > 0
    assert summary["completions"] == 30 and summary["completions_without_score"] > 0
    assert summary["desirable"] + summary["undesirable"] == len(unpaired)


def test_a_killed_run_goes_on_and_batches_do_not_matter(arguments, tmp_path, monkeypatch):
    script = load_script("rlhf/make_preferences.py")
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    script.main([*arguments, "--output_dir", str(whole), "--batch_size", "5"])
    script.main([*arguments, "--output_dir", str(cut), "--max_samples", "2"])
    log = next((cut / "parts").glob("*.jsonl"))
    with open(log, "a", encoding="utf-8") as file:
        file.write('{"key": "half a li')
    asked = []
    generate = LLaDAModelLM.generate
    monkeypatch.setattr(
        LLaDAModelLM,
        "generate",
        lambda model, prompts, **rest: asked.extend(rest["record_ids"]) or generate(model, prompts, **rest),
    )
    script.main([*arguments, "--output_dir", str(cut), "--batch_size", "1"])
    assert sorted(asked) == [2, 3, 4]
    for name in ("paired.jsonl", "unpaired.jsonl", "results.json"):
        assert (cut / name).read_text() == (whole / name).read_text()
    script.main([*arguments, "--output_dir", str(cut), "--desirable_from", "0.9"])
    assert len(asked) == 3  # only compared anew
    assert all(record["label"] == (record["score"] >= 0.9) for record in read(cut, "unpaired.jsonl"))


def test_a_judge_labels_and_what_it_failed_at_is_left_out(arguments, tmp_path):
    def behave(body, number):
        question = body["messages"][1]["content"]
        if "Say iron." in question:
            return "I cannot say."
        return json.dumps({"scores": [{"id": i, "score": (len(text) % 10) / 10} for i, text in shown(body)]})

    server = FakeServer(behave)
    judge = ["--reward_funcs", "judge", "--judge_base_url", server.url, "--judge_model", "judge"]
    judge += ["--judge_retries", "0", "--judge_cache", str(tmp_path / "judge.sqlite")]
    main = load_script("rlhf/make_preferences.py").main
    main([*arguments, *judge, "--output_dir", str(tmp_path / "out")])
    unpaired = read(tmp_path / "out", "unpaired.jsonl")
    assert {record["id"].split("-")[0] for record in unpaired} == {"p1", "p2", "p3", "p4"}
    summary = json.loads((tmp_path / "out/results.json").read_text())
    assert summary["completions_without_score"] == 6
    assert summary["judge/failed"] == 0.2 and summary["judge/cached"] == summary["judge/retried"] == 0
    asked = len(server.bodies)
    main([*arguments, *judge, "--output_dir", str(tmp_path / "again")])
    assert len(server.bodies) == asked + 1  # the one that failed
    with pytest.raises(ValueError, match=r"--judge_rubric rubric\.txt"):
        main([*arguments, *judge, "--output_dir", str(tmp_path / "out"), "--judge_rubric", "rubric.txt"])
    server.shutdown()


def test_best_goes_with_worst_and_equal_texts_count_once():
    script = load_script("rlhf/make_preferences.py")
    config = script.Config(model_name_or_path="m", prompts_file="p", output_dir="o", pairs_per_prompt=9)
    texts, scores = ["a", "b", "c", "a", "d", "e"], [1.0, 0.0, 0.5, 1.0, None, 0.2]
    pairs = [(texts[a], texts[b]) for a, b in script.pairs_of(texts, scores, config, 0)]
    assert pairs == [("a", "b"), ("c", "e")]
    config.min_margin = 0.5
    assert len(script.pairs_of(texts, scores, config, 0)) == 1
    assert script.pairs_of(["a", "b"], [1.0, 1.0], config, 0) == []
    config.min_margin = 0.0  # of equally good ones any may be taken, and the key decides which
    chosen = {script.pairs_of(["a", "b", "c"], [1.0, 1.0, 0.0], config, key)[0][0] for key in range(20)}
    assert chosen == {0, 1}


def test_mistakes_are_named(arguments, tmp_path):
    main = load_script("rlhf/make_preferences.py").main
    out = ["--output_dir", str(tmp_path / "out")]
    with pytest.raises(ValueError, match="--num_generations 1"):
        main([*arguments, *out, "--num_generations", "1"])
    with pytest.raises(ValueError, match="--gen_length 256 leaves no room"):
        main([*arguments, *out, "--gen_length", "256"])
    with pytest.raises(ValueError, match=r"jsonl:1: .* where 6 fit"):
        main([*arguments, *out, "--gen_length", "250"])
    with pytest.raises(ValueError, match=r"--temperature 0\.0: must be"):
        main([*arguments, *out, "--temperature", "0"])
    with pytest.raises(ValueError, match="'task'"):
        main([*arguments, *out, "--reward_funcs", "reasoning_gym"])
