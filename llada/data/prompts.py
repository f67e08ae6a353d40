"""Prompts for a model to answer: token ids, and the record with what a verifier needs."""

import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from llada.data.chat import render_prompt
from llada.data.flags import PromptFlags
from llada.data.messages import Text, to_prompt
from llada.data.records import read_records
from llada.run import Run, first_rank_first


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file."""

    index: int  # its number in the file, which keys its random draws
    token_ids: list[int]
    record: dict[str, Any]  # all fields, for rewards and for the output
    prompt: Text = ""  # a text, or messages where the chat template is used
    where: str = "--prompt"  # "file:line"

    @property
    def name(self) -> Any:
        """The record's own id, else its number."""
        return self.record.get("id", self.index)

    @property
    def shown(self) -> Any:
        """The prompt as the record gives it, for the output."""
        fields = ("prompt", "text", "question", "messages")
        return next((self.record[name] for name in fields if name in self.record), self.record)


def read_asked_prompts(
    flags: PromptFlags, tokenizer: PreTrainedTokenizerBase, **limits: Any
) -> tuple[list[Prompt], Counter]:
    """The prompts that these flags name, see `read_prompts`."""
    flags.check_source()
    return read_prompts(
        flags.prompts_file, tokenizer, text=flags.prompt, chat=flags.is_instruct, limit=flags.max_samples,
        **limits,
    )  # fmt: skip


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
    key: str | None = None,
) -> tuple[list[Prompt], Counter]:
    """The prompts of a file, and how many were dropped or truncated.

    Args:
        chat: through the chat template.
        text: the only prompt, in place of a file.
        context: tokens that prompt and answer may have together; None: any number.
        gen_length: tokens of the answer.
        long: what to do with longer ones: `error`, `drop`, or `truncate`, which keeps their end.
        limit: only the first so many records.
        key: field of the prompt; default those of data/README.md.

    Raises:
        ValueError: `file:line` and what is wrong with a record.
    """
    room = math.inf if context is None else context - gen_length
    if room < 1:
        raise ValueError(f"--gen_length {gen_length} leaves no room in a context of {context} tokens")
    records = [("--prompt", {"prompt": text})] if path is None else read_records(path, text_documents="line")
    prompts, counts = [], Counter()
    for index, (where, record) in enumerate(records):
        if limit is not None and index >= limit:
            break
        if key is not None:
            if key not in record:
                raise ValueError(f"{where}: no field {key!r}; fields are {sorted(record)}")
            record = {**record, "prompt": record[key]}
        prompt, token_ids = _encoded(record, where, tokenizer, chat=chat)
        if len(token_ids) > room:
            if long == "error":
                raise ValueError(
                    f"{where}: {len(token_ids)} prompt tokens where {room} fit beside --gen_length "
                    f"{gen_length}; see --long_prompts"
                )
            counts[f"long prompts, {long}"] += 1
            if long == "drop":
                continue
            token_ids = token_ids[-room:]
        prompts.append(Prompt(index, token_ids, record, prompt, where))
    if not prompts:
        raise ValueError(f"{path}: no prompt is left; {dict(counts)}")
    return prompts, counts


def _encoded(
    record: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> tuple[Text, list[int]]:
    """A record's prompt, and its token ids as training puts them in front of an answer."""
    if "text" in record:
        prompt: Any = record["text"]
    else:
        prompt = to_prompt(record, where)
        if not chat and len(prompt) > 1:
            raise ValueError(f"{where}: a conversation of {len(prompt)} messages needs --is_instruct")
        if not chat:
            prompt = prompt[0]["content"]
    try:
        token_ids = render_prompt(prompt, tokenizer, chat=chat)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    if not token_ids:
        raise ValueError(f"{where}: empty prompt")
    return prompt, token_ids


def prompt_file(path: str, folder: Path, run: Run) -> str:
    """`path` itself, or where the hub data set that it names, `owner/name` or `owner/name@config`, is kept.

    Raises:
        ValueError: neither a file nor a data set that the hub gives.
    """
    if Path(path).exists():
        return path
    name, _, config = path.partition("@")
    if name.count("/") != 1 or path.startswith((".", "/", "~")):
        raise ValueError(f"{path}: no such file or folder")
    file = folder / f"{name.replace('/', '--')}.jsonl"
    with first_rank_first(run):
        if run.is_main and not file.exists():
            try:
                rows = datasets.load_dataset(name, config or None, split="train")
            except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
                raise ValueError(f"{path}: no such file, and the hub did not give it: {error}") from error
            folder.mkdir(parents=True, exist_ok=True)
            rows.to_json(str(file))
    return str(file)
