"""Talk to a LLaDA checkpoint in the terminal, with the conversation kept.

A line is a message; a backslash at its end continues it on the next line. Lines that start with a slash are
commands (/help lists them; // sends a message that starts with a slash). Ctrl-C stops an answer, Ctrl-D ends
the program. When the conversation outgrows the model's context, its oldest turns are left out of the prompt.

--watch shows the answer while it is decided: a dim dot is a mask, and the tokens of the latest step are red
below confidence 0.3, yellow below 0.7, else green; where the output is no terminal, every step is a line.

Run:
    python inference/chat.py --model_name_or_path runs/quickstart/sft --gen_length 64 --watch
    python inference/chat.py --model_name_or_path models/LLaDA-8B-Instruct --dtype bfloat16 \\
        --gen_length 256 --block_length 32 --parallel_decoding factor --cache dual --watch
"""

import json
import os
import sys
import time
from collections.abc import Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TextIO

from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.inference.sampler_flags import ModelFlags, SamplerFlags, sampler_settings


@dataclass(kw_only=True)
class Config(ModelFlags, SamplerFlags):
    """Chat."""

    system: str | None = flag(None, "System message at the start of the conversation.")
    load: str | None = flag(None, "File whose first conversation is continued.", reads="path")
    watch: bool = flag(False, "Show answers while they are decided.")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

from transformers import PreTrainedTokenizerBase

from llada.data.chat import drops_system, render_prompt
from llada.data.messages import Message
from llada.data.reading import to_messages
from llada.data.records import read_records
from llada.inference.denoising_view import DenoisingView, clean
from llada.models.building import load_for_inference
from llada.run import start_run
from modelling_final import LLaDAGenerationConfig, LLaDAModelLM

COMMANDS = {
    "/help": "these commands",
    "/settings": "the sampler's settings",
    "/set NAME VALUE ...": "change settings, for example: /set gen_length 128 block_length 32",
    "/watch": "show answers while they are decided, or stop showing them",
    "/undo": "forget the last message and its answer",
    "/reset": "forget the whole conversation",
    "/save FILE": "write the conversation, as a JSONL record that SFT takes",
    "/load FILE": "go on with the first conversation of a file",
    "/quit": "leave (or Ctrl-D)",
}

SETTINGS = [field.name for field in fields(SamplerFlags)]


def fit_prompt(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, room: int
) -> tuple[list[int], int]:
    """The prompt's token ids, and how many of the oldest messages had to be left out to fit `room` tokens.

    A system message stays. What is left out ends before a user's message.
    """
    num_fixed = 1 if messages[0]["role"] == "system" else 0
    # an answer without its question would be read as the user's words
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for first in users:
        start = num_fixed if first == users[0] else first
        token_ids = render_prompt([*messages[:num_fixed], *messages[start:]], tokenizer, chat=True)
        if len(token_ids) <= room:
            return token_ids, start - num_fixed
    raise ValueError(
        f"this message takes {len(token_ids)} tokens, and the context has room for {max(0, room)} beside the "
        "answer; shorten it, or /set gen_length lower"
    )


def read_value(name: str, text: str) -> Any:
    """A setting's value from its text; the type is that of the default."""
    default = getattr(LLaDAGenerationConfig(), name)
    if isinstance(default, bool):
        if text.lower() not in ("true", "false", "on", "off"):
            raise ValueError(f"{name} must be on or off, got {text!r}")
        return text.lower() in ("true", "on")
    if isinstance(default, str):
        return text
    if default is None and text.lower() == "none":
        return None
    kind = float if isinstance(default, float) else int
    try:
        return kind(text)
    except ValueError as error:
        raise ValueError(f"{name} must be a number, got {text!r}") from error


class Chat:
    """A conversation with a model, and the settings of its answers."""

    def __init__(
        self,
        model: LLaDAModelLM,
        tokenizer: PreTrainedTokenizerBase,
        settings: LLaDAGenerationConfig,
        *,
        system: str | None = None,
        watch: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.settings, self.watch = model, tokenizer, settings, watch
        self.start: list[Message] = [] if system is None else [{"role": "system", "content": system}]
        self.messages = list(self.start)
        self.num_left_out = self.num_answers = 0
        self.saved: set[Path] = set()
        is_terminal = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        self.is_live = is_terminal and os.environ.get("TERM") != "dumb"

    def say(self, text: str) -> None:
        """A notice of the program, not of the model."""
        print(f"\x1b[2m{text}\x1b[0m" if self.is_live else text, flush=True)

    def answer(self, text: str) -> None:
        """Answers a message; if that fails or is interrupted, the message is forgotten."""
        before = list(self.messages)
        self.messages.append({"role": "user", "content": text})
        try:
            self.messages.append({"role": "assistant", "content": self._generate()})
        except (KeyboardInterrupt, ValueError) as error:
            self.messages = before
            is_error = isinstance(error, ValueError)
            self.say(f"error: {error}" if is_error else "\n(stopped; the message is forgotten)")

    def _generate(self) -> str:
        settings = self.settings
        room = self.model.config.max_sequence_length - settings.gen_length
        prompt, num_left_out = fit_prompt(self.messages, self.tokenizer, room)
        if num_left_out > self.num_left_out:
            self.say(f"(the oldest {num_left_out} messages no longer fit the context and are left out)")
        self.num_left_out = num_left_out
        ends, started = set(self.model.config.end_ids), time.monotonic()
        view = None
        if self.watch:
            view = DenoisingView(self.tokenizer, settings.gen_length, ends, is_live=self.is_live)
        with closing(view) if view else nullcontext():
            output = self.model.generate(
                [prompt],
                generation_config=settings,
                return_dict_in_generate=True,
                record_ids=[self.num_answers],
                on_step=view,
            )
        self.num_answers += 1  # the same question asked again at a temperature above 0 is another draw
        seconds = time.monotonic() - started
        (completion,) = output.completions
        reply = self.tokenizer.decode(completion, skip_special_tokens=True)
        print(clean(reply), flush=True)
        notes = [f"{len(completion)} tokens", f"{int(output.steps[0])} steps", f"{seconds:.1f} s"]
        if output.is_approximate:
            notes.append("approximate")
        if len(completion) == settings.gen_length:
            notes.append("cut at gen_length")
        self.say(f"({', '.join(notes)})")
        return reply

    def command(self, line: str) -> bool:
        """Runs a slash command; False when it was /quit."""
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        known = {command.split()[0]: command for command in COMMANDS}
        try:
            if name not in known:
                raise ValueError(f"no command {name}; /help lists them")
            if bool(rest) != (" " in known[name]):
                raise ValueError(f"it is: {known[name]}")
            if name == "/quit":
                return False
            # a command is the method of its name
            getattr(self, "_" + name[1:])(*([rest] if rest else []))
        except ValueError as error:
            self.say(f"error: {error}")
        return True

    def _help(self) -> None:
        self.say("\n".join(f"{command:22s}{text}" for command, text in COMMANDS.items()))

    def _settings(self) -> None:
        self.say("\n".join(f"{name:24s}{getattr(self.settings, name)}" for name in SETTINGS))
        if self.settings.is_approximate:
            self.say("approximate: other tokens than the published sampler's are possible")

    def _set(self, rest: str) -> None:
        words = rest.replace("=", " ").split()
        if len(words) % 2:
            raise ValueError("it is: /set NAME VALUE ...")
        changes = {}
        for name, text in zip(words[::2], words[1::2], strict=True):
            if name not in SETTINGS:
                raise ValueError(f"no setting {name!r}; /settings lists them")
            changes[name] = read_value(name, text)
        if changes.get("block_length") and "method" not in changes and self.settings.method == "fixed_length":
            changes["method"] = "semi_autoregressive_padding"  # as the flag --block_length does
        settings = self.settings.changed(**changes)
        settings.steps_per_block(settings.gen_length)
        self.settings = settings
        self.say(", ".join(f"{name} = {value}" for name, value in changes.items()))

    def _watch(self) -> None:
        self.watch = not self.watch
        self.say("answers are shown while they are decided" if self.watch else "answers are shown when done")

    def _undo(self) -> None:
        users = [i for i, message in enumerate(self.messages) if message["role"] == "user"]
        if not users:
            raise ValueError("there is nothing to forget")
        self.messages = self.messages[: users[-1]]
        self.num_left_out = 0
        self.say(f"forgotten; {len(self.messages)} messages remain")

    def _reset(self) -> None:
        self.messages, self.num_left_out = list(self.start), 0
        self.say("forgotten")

    def _save(self, rest: str) -> None:
        path = Path(rest).expanduser()
        # only what this conversation has written is overwritten
        if path.exists() and path not in self.saved:
            raise ValueError(f"{path} exists; choose another name")
        try:
            path.write_text(json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}") from error
        self.saved.add(path)
        self.say(f"{len(self.messages)} messages -> {path}")

    def _load(self, rest: str) -> None:
        try:
            where, record = next(iter(read_records(str(Path(rest).expanduser()))))
        except OSError as error:
            raise ValueError(f"{rest}: {error.strerror}") from error
        messages = to_messages(record, where)
        if messages[-1]["role"] != "assistant":
            raise ValueError(f"{where}: the conversation must end with an answer")
        self.messages, self.num_left_out = messages, 0
        self.say(f"{len(messages)} messages from {where}")


def read_message(stream: TextIO) -> str | None:
    """The next message or command, backslash lines joined; None at the end of input."""
    is_typed = stream is sys.stdin and stream.isatty()
    lines: list[str] = []
    while True:
        try:  # input() alone gives a typing user line editing
            line = input("... " if lines else ">>> ") + "\n" if is_typed else stream.readline()
        except EOFError:
            line = ""
        if not line:
            return "\n".join(lines) or None
        line = line.rstrip("\r\n")
        lines.append(line.removesuffix("\\"))
        if not line.endswith("\\"):
            return "\n".join(lines)


def main(argv: list[str] | None = None, stream: TextIO | None = None) -> None:
    """Reads messages from `stream` (default: standard input) until its end or /quit."""
    config = parse(Config, argv, description=__doc__)
    settings = sampler_settings(config)
    run = start_run(config.device)
    model, tokenizer = load_for_inference(**config.to_load(), chat=True, device=run.device)
    if config.system is not None and drops_system(tokenizer):
        raise ValueError("--system: this model's chat template leaves system messages out")
    chat = Chat(model, tokenizer, settings, system=config.system, watch=config.watch)
    if config.load is not None:
        chat.command(f"/load {config.load}")
    if stream is None:
        stream = sys.stdin
        if stream.isatty():
            import readline  # noqa: F401 - gives input() line editing; elsewhere it may print escape codes
    chat.say("/help lists the commands")
    while True:
        try:
            text = read_message(stream)
        except KeyboardInterrupt:
            print()
            continue
        if text is None:
            break
        if text.startswith("/") and not text.startswith("//"):
            if not chat.command(text.strip()):
                break
        elif text.strip():
            chat.answer(text[1:] if text.startswith("//") else text)


if __name__ == "__main__":
    run_main(main)
