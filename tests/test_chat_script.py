"""inference/chat.py: a conversation through an input stream, and the view of an answer being decided."""

import io
import json
import re
import sys

import pytest

from conftest import load_script
from llada.data.chat import render_prompt
from llada.inference import denoising_view
from llada.inference.denoising_view import DenoisingView, clean, spell, wrap
from llada.models.tokens import load_tokenizer

QUICK = ["--gen_length", "8", "--steps", "4", "--block_length", "4", "--device", "cpu"]


class Input(io.StringIO):
    """Lines as typed; the line ^C is the key of that name."""

    def readline(self, *args):
        line = super().readline(*args)
        if line == "^C\n":
            raise KeyboardInterrupt
        return line


@pytest.fixture
def chat(model_dir, capsys):
    """Types lines into the script; returns what it printed."""

    def call(*lines, flags=()):
        main = load_script("inference/chat.py").main
        main(["--model_path", str(model_dir), *QUICK, *flags], Input("".join(f"{line}\n" for line in lines)))
        return capsys.readouterr().out

    return call


@pytest.fixture
def prompts(monkeypatch):
    """Records the messages of every prompt that the script renders."""
    script = load_script("inference/chat.py")
    seen = []

    def render(messages, tokenizer, *, chat):
        seen.append([dict(message) for message in messages])
        return render_prompt(messages, tokenizer, chat=chat)

    monkeypatch.setattr(script, "render_prompt", render)
    return seen


def test_the_history_is_part_of_the_next_prompt(chat, prompts):
    out = chat("hello", "", "again", "//help")
    assert len(re.findall(r"\(\d+ tokens, \d+ steps, [\d.]+ s", out)) == 3
    assert [[message["role"] for message in seen] for seen in prompts] == [
        ["user"], ["user", "assistant", "user"], ["user", "assistant"] * 2 + ["user"],
    ]  # fmt: skip
    assert prompts[2][0]["content"] == "hello" and prompts[2][4]["content"] == "/help"


def test_a_message_of_several_lines(chat, prompts):
    chat("Sudoku:\\", "1 2\\", "3 4")
    assert prompts[0][0]["content"] == "Sudoku:\n1 2\n3 4"


def test_undo_reset_and_quit(chat, prompts):
    out = chat("one", "/undo", "/undo", "two", "/reset", "three", "/quit", "four")
    assert [seen[-1]["content"] for seen in prompts] == ["one", "two", "three"]
    assert [len(seen) for seen in prompts] == [1, 1, 1]
    assert "forgotten; 0 messages remain" in out and "error: there is nothing to forget" in out


def test_settings_change_and_bad_ones_do_not(chat):
    out = chat(
        "/set gen_length 12 steps 6", "/set gen_length 10", "/set cache=dual parallel_decoding=factor",
        "/set tempereture 1", "/set temperature hot", "/set early_stop maybe", "/set steps none seed 3",
        "/set seed", "/set", "/nothing", "/reset now", "/settings", "hi",
    )  # fmt: skip
    assert "gen_length = 12, steps = 6" in out
    assert "error: gen_length 10 is not a multiple of block_length 4" in out
    assert "error: no setting 'tempereture'" in out
    assert "error: temperature must be a number, got 'hot'" in out
    assert "error: early_stop must be on or off, got 'maybe'" in out
    assert "error: no command /nothing" in out and "error: it is: /reset" in out
    assert out.count("error: it is: /set NAME VALUE ...") == 2
    settings = dict(re.findall(r"^(\w+) +(\S+)$", out, re.MULTILINE))
    assert settings["gen_length"] == "12" and settings["seed"] == "3" and settings["cache"] == "dual"
    assert settings["steps"] == "None" and re.search(r"\(\d+ tokens, .*approximate", out)


def test_a_block_length_asks_for_blocks(chat):
    fixed = "/set method fixed_length"
    out = chat(fixed, "/set block_length 4", f"{fixed} block_length 2")
    assert "block_length = 4, method = semi_autoregressive_padding" in out
    assert "method = fixed_length, block_length = 2" in out


def test_save_and_load(chat, prompts, tmp_path):
    file = tmp_path / "talk.jsonl"
    out = chat("hello", f"/save {file}", "more", f"/save {file}", f"/load {tmp_path / 'missing.jsonl'}")
    messages = json.loads(file.read_text())["messages"]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert "error: " in out and "missing.jsonl" in out
    messages[1]["content"] = messages[3]["content"] = "well"  # what a random model says may be empty
    file.write_text(json.dumps({"messages": messages}) + "\n")
    prompts.clear()
    out = chat("and now?", f"/save {file}", flags=["--load", str(file)])
    assert prompts[0][:4] == messages and prompts[0][4]["content"] == "and now?"
    assert f"error: {file} exists; choose another name" in out


def test_the_oldest_turns_leave_a_full_context(chat, prompts):
    long = "x y z " * 20
    out = chat("first " + long, "second " + long, "third " + long, "x" * 3000, flags=["--system", "be brief"])
    asked = [seen for seen in prompts if seen[-1]["content"].startswith("third")]
    assert [message["role"] for message in asked[0]][:2] == ["system", "user"] and len(asked) > 1
    assert asked[-1][0]["content"] == "be brief" and not asked[-1][1]["content"].startswith("first")
    assert re.search(r"\(the oldest [24] messages no longer fit the context and are left out\)", out)
    assert "error: this message takes" in out


def test_ctrl_c_stops_the_answer_and_not_the_program(chat, prompts, monkeypatch):
    script = load_script("inference/chat.py")
    generate, calls = script.LLaDAModelLM.generate, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return generate(self, *args, **kwargs)

    monkeypatch.setattr(script.LLaDAModelLM, "generate", interrupted)
    out = chat("one", "^C", "two")
    assert "(stopped; the message is forgotten)" in out and "steps" in out
    assert [message["content"] for message in prompts[-1]] == ["two"]


def test_a_mask_token_in_a_message_is_an_error_not_the_end(chat):
    out = chat("a <|mdm_mask|>", "b")
    assert "error: prompt: the text contains the mask token" in out and out.count("steps") == 1


def test_watch_without_a_terminal_prints_a_line_a_step(chat):
    out = chat("hi", "/watch", "ho", flags=["--watch", "--no_early_stop"])
    lines = re.findall(r"^ +\d+ .*$", out, re.MULTILINE)
    assert len(lines) == 4 and "·" in lines[0] and "·" not in lines[-1]
    assert "\x1b" not in out


def test_watch_on_a_terminal_draws_over_itself(chat, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(denoising_view, "SECONDS_PER_FRAME", -1)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    out = chat("hi", flags=["--watch", "--no_early_stop"])
    assert out.count("\r\x1b[J") >= 4 and "\x1b[2m·" in out and "\x1b[31m" in out
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in chat("hi", flags=["--watch"])


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer(str(tokenizer_dir))


def entry(positions, token_ids, confidences, remasked=()):
    return {
        "positions": positions, "token_ids": token_ids, "confidences": confidences, "remasked": list(remasked)
    }  # fmt: skip


def test_cells_are_coloured_by_confidence_while_new(tokenizer, capsys):
    a, b, c = (tokenizer.convert_tokens_to_ids(letter) for letter in "abc")
    view = DenoisingView(tokenizer, 4, {tokenizer.eos_token_id}, is_live=False)
    view(entry([0, 2], [a, b], [0.2, 0.5]))
    assert view.cells() == [("a", "red"), ("·", "dim"), ("b", "yellow"), ("·", "dim")]
    view(entry([1, 3], [c, tokenizer.eos_token_id], [0.9, 0.1], remasked=[0]))
    assert view.cells() == [("·", "dim"), ("c", "green"), ("b", "plain"), ("∎", "dim")]
    assert capsys.readouterr().out == "   1 a·b·\n   2 ·cb∎\n"


def test_a_character_of_several_tokens_stays_whole(tokenizer):
    ids = tokenizer("né 漢", add_special_tokens=False)["input_ids"]
    assert "".join(spell(tokenizer, ids)) == "né 漢"
    assert spell(tokenizer, ids)[-1].endswith("漢")


def test_lines_are_as_wide_as_the_terminal():
    assert wrap([("ab\n\ncdef", "plain"), ("漢g", "plain")], 4) == ["ab", "", "cdef", "漢g"]
    assert wrap([("abc", "red")], 2) == ["\x1b[31mab\x1b[0m", "\x1b[31mc\x1b[0m"]


def test_an_answer_cannot_steer_the_terminal():
    assert clean("a\x1b[2Jb\tc\n") == "a\ufffd[2Jb\tc\n"
