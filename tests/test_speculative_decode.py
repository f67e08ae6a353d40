"""inference/speculative_decode.py: answers equal to plain decoding, a report, and helpful errors."""

import json

import pytest

from conftest import ROOT, load_script
from llada.models.tokens import load_tokenizer
from speculation import make_verifier

QUICK = ["--max_new_tokens", "10", "--draft_length", "3", "--dtype", "float64"]


@pytest.fixture(scope="module")
def verifier_dir(tmp_path_factory, tokenizer_dir):
    """A tiny Llama with the drafter's tokenizer."""
    folder = tmp_path_factory.mktemp("verifier")
    tokenizer = load_tokenizer(str(tokenizer_dir))
    make_verifier(len(tokenizer), eos_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory):
    """A tiny Llama with a tokenizer of its own."""
    folder = tmp_path_factory.mktemp("other")
    text = (ROOT / "README.md").read_text()
    tokenizer = load_script("scripts/train_tokenizer.py").train_tokenizer([text], vocab_size=340)
    make_verifier(len(tokenizer), eos_id=tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(model_dir, verifier_dir, tmp_path):
    """Runs the script; returns the records and the report that it wrote."""

    def call(*flags, verifier=verifier_dir, output="out.jsonl"):
        target = [
            "--output_path",
            str(tmp_path / str(output)),
            "--report_path",
            str(tmp_path / f"report_{output}.json"),
        ]
        models = ["--drafter", str(model_dir), "--verifier", str(verifier)]
        main = load_script("inference/speculative_decode.py").main
        main([*models, *(target if output else []), *QUICK, *flags])
        if output is None:
            return None
        lines = (tmp_path / output).read_text().splitlines()
        return [json.loads(line) for line in lines], json.loads(
            (tmp_path / f"report_{output}.json").read_text()
        )

    return call


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    records = [
        {"id": "a", "prompt": "What is the capital of France?"},
        {"question": "2 + 3 = ?", "answer": "5"},
        {"id": 7, "messages": [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]},
    ]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(file)


@pytest.mark.parametrize(
    "flags",
    [
        [],
        ["--draft", "confidence"],
        ["--temperature", "1", "--acceptance", "match"],
        ["--temperature", "1", "--top_p", "0.9"],
    ],
)
def test_answers_and_report(run, prompts, capsys, flags):
    records, report = run("--prompts_file", prompts, "--is_instruct", *flags)
    assert [record["id"] for record in records] == ["a", 1, 7]
    assert report["prompts"] == 3 and report["tokens"] == sum(r["statistics"]["tokens"] for r in records)
    assert report["acceptance_length"] == pytest.approx(report["tokens"] / report["verifier_forwards"])
    assert report["speed_up"] > 0
    shown = capsys.readouterr().out
    assert "acceptance length" in shown and "tokens/s" in shown
    if report["acceptance"] == "match":
        assert report["equal"] == 3 and all(record["is_equal"] for record in records)
        assert "equal to plain decoding: 3 of 3" in shown


@pytest.mark.parametrize("bridge", ["vocabulary", "text"])
def test_across_tokenizers(run, prompts, other_dir, bridge, capsys):
    _, report = run("--prompts_file", prompts, "--is_instruct", "--bridge", bridge, verifier=other_dir)
    assert report["equal"] == 3
    assert "of the drafter's tokens are also the verifier's" in capsys.readouterr().out


def test_one_prompt_goes_to_the_terminal(run, capsys):
    run("--prompt", "The capital of France", "--no_compare", output=None)
    shown = capsys.readouterr().out
    assert "acceptance length" in shown and "plain" not in shown


def test_a_killed_run_goes_on_where_it_stopped(run, prompts, monkeypatch):
    flags = ["--prompts_file", prompts, "--is_instruct", "--temperature", "1"]
    whole = [record["completion"] for record in run(*flags)[0]]
    script = load_script("inference/speculative_decode.py")
    answer, seen = script.answer, []

    def dies(decoder, item, *args, **kwargs):
        if len(seen) == 2:
            raise KeyboardInterrupt
        seen.append(item.index)
        return answer(decoder, item, *args, **kwargs)

    monkeypatch.setattr(script, "answer", dies)
    with pytest.raises(KeyboardInterrupt):
        run(*flags, output="killed.jsonl")
    monkeypatch.setattr(
        script, "answer", lambda d, item, *a, **k: (seen.append(item.index), answer(d, item, *a, **k))[1]
    )
    records, report = run(*flags, output="killed.jsonl")
    assert seen == [0, 1, 2] and report["prompts"] == 3
    assert [record["completion"] for record in records] == whole


def test_a_difference_that_rounding_does_not_explain_is_an_error(run, prompts, monkeypatch, capsys):
    from llada.speculative.decoder import SpeculativeDecoder

    decode = SpeculativeDecoder.decode

    def broken(self, *args, **kwargs):
        tokens, stats = decode(self, *args, **kwargs)
        return [*tokens[:-1], (tokens[-1] + 1) % 300], stats

    monkeypatch.setattr(SpeculativeDecoder, "decode", broken)
    with pytest.raises(AssertionError, match="by more than rounding"):
        run("--prompts_file", prompts, "--is_instruct")
    assert (
        "equal to plain decoding: 0 of 3; part at a tie within rounding: 0; wrong: 3"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "either --prompt TEXT or --prompts_file"),
        (["--prompts_file", __file__], "--prompts_file needs --output_path"),
        (["--prompt", "a", "--draft_length", "0"], "--draft_length 0: must be at least 1"),
        (["--prompt", "a", "--acceptance", "token"], "temperature 0 leaves nothing to draw"),
        (["--prompt", "x " * 200], "--prompt: a prompt of"),
        (["--prompt", "a", "--max_new_tokens", "500"], "exceed the verifier's context of 128 tokens"),
        (["--prompt", "a", "--verifier", "no/where/at_all"], "--verifier no/where/at_all: no checkpoint"),
        (["--prompt", "a", "--verifier_gguf_file", "x.gguf"], "cannot be read"),
    ],
)  # fmt: skip
def test_bad_flags(run, flags, message):
    with pytest.raises(ValueError) as error:
        run(*flags, output=None)
    assert message in str(error.value)


def test_wrong_verifiers(run, other_dir, model_dir, tmp_path):
    with pytest.raises(ValueError, match="--bridge none: the drafter and the verifier have different"):
        run("--prompt", "a", verifier=other_dir, output=None)
    with pytest.raises(ValueError, match="a LLaDA model is not autoregressive"):
        run("--prompt", "a", verifier=model_dir, output=None)
    with pytest.raises(ValueError, match=r"--verifier .*: no checkpoint there \(looked for config.json"):
        run("--prompt", "a", verifier=tmp_path, output=None)
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"no config.json; add --verifier_gguf_file model.gguf"):
        run("--prompt", "a", verifier=tmp_path, output=None)
