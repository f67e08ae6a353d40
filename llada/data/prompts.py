"""Prompts for a model to answer: token ids, and the record with what a verifier needs."""

import math
import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from llada.data.chat import notes_of, render_prompt
from llada.data.fields import Reader, as_turns
from llada.data.flags import PromptFlags
from llada.data.messages import Text
from llada.data.reading import Record, describe_losses, read
from llada.run import Run, first_rank_first


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file."""

    index: int  # its number in the file, which keys its random draws
    token_ids: list[int]
    record: dict[str, Any]  # all fields, for rewards and for the output
    prompt: Text = ""  # a text, or messages where the chat template is used
    shown: Text = ""  # the same as the record has it, for the output
    where: str = "--prompt"  # "file:line"

    @property
    def name(self) -> Any:
        """The record's own id, else its number."""
        return self.record.get("id", self.index)


def read_asked_prompts(flags: PromptFlags, tokenizer: PreTrainedTokenizerBase, **limits: Any) -> list[Prompt]:
    """The prompts that these flags name, see `read_prompts`; rank 0 prints what did not come through."""
    prompts, counts = read_prompts(
        flags.prompts_file, tokenizer, text=flags.prompt, chat=flags.is_instruct, limit=flags.max_samples,
        reader=flags.reader(), parse_special=flags.parse_special_tokens, **limits,
    )  # fmt: skip
    if counts and int(os.environ.get("RANK", "0")) == 0:
        print(f"{len(prompts)} prompts{describe_losses(counts, len(prompts) + counts.total())}", flush=True)
    return prompts


def read_prompts(
    path: str | None,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool,
    text: str | None = None,
    context: int | None = None,
    gen_length: int = 0,
    long: str = "error",
    limit: int | None = None,
    reader: Reader | None = None,
    parse_special: bool = False,
) -> tuple[list[Prompt], Counter]:
    """The prompts of a file, and what was dropped, truncated or skipped, counted in words.

    Args:
        text: the only prompt, in place of a file.
        context: tokens that prompt and answer may have together; None: any number.
        long: what to do with longer ones: `error`, `drop`, or `truncate`, which keeps their end.
        limit: only the first so many records.
    """
    reader = reader or Reader()
    room = math.inf if context is None else context - gen_length
    if room < 1:
        raise ValueError(f"--gen_length {gen_length} leaves no room in a context of {context} tokens")
    counts: Counter = Counter()

    def encode(record: Record) -> Prompt:
        asked = record.prompt()
        prompt = as_turns(asked, "user") if chat else asked
        if not chat and not isinstance(prompt, str):
            if len(prompt) > 1:
                raise record.error(f"a conversation of {len(prompt)} messages needs --is_instruct")
            prompt = prompt[0]["content"]
        try:
            token_ids = render_prompt(prompt, tokenizer, chat=chat, parse_special=parse_special)
        except ValueError as error:
            raise record.error(str(error)) from error
        if not token_ids:
            raise record.error("empty prompt")
        record.notes += notes_of(prompt, tokenizer, parse_special=parse_special)
        return Prompt(0, token_ids, {}, prompt, asked, record.where)

    if path is None:
        given = {"prompt": text}
        found = iter([("--prompt", given, encode(Record(given, "--prompt")))])
    else:
        found = read(path, reader, encode, counts, text_documents="line")
    prompts = []
    for index, (where, record, prompt) in enumerate(found):
        if limit is not None and index >= limit:
            break
        prompt = replace(prompt, index=index, record=record)
        if len(prompt.token_ids) > room:
            if long == "error":
                raise ValueError(
                    f"{where}: {len(prompt.token_ids)} prompt tokens where {room} fit beside --gen_length "
                    f"{gen_length}; see --long_prompts"
                )
            counts[f"long prompts, {long}"] += 1
            if long == "drop":
                continue
            prompt = replace(prompt, token_ids=prompt.token_ids[-room:])
        prompts.append(prompt)
    if not prompts:
        raise ValueError(f"{path}: no prompt is left; {dict(counts)}")
    return prompts, counts


def prompt_file(path: str, folder: Path, run: Run) -> str:
    """`path` itself, or where the hub data set that it names is kept: `owner/name` or `owner/name@config`."""
    if Path(path).exists():
        return path
    name, _, config = path.partition("@")
    if name.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"{path}: no such file or folder")
    file = folder / f"{name.replace('/', '--')}.jsonl"
    with first_rank_first(run):
        if run.is_main and not file.exists():
            import datasets  # only here: prompts of other kinds do without

            try:
                rows = datasets.load_dataset(name, config or None, split="train")
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise ValueError(f"{path}: no such file, and the hub did not give it: {error}") from error
            folder.mkdir(parents=True, exist_ok=True)
            rows.to_json(str(file))
    return str(file)
