"""Prompts for a model to answer: token ids, and the record with what a verifier needs."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
from transformers import PreTrainedTokenizerBase

from llada.data.chat import render_prompt
from llada.data.messages import to_prompt
from llada.data.records import read_records
from llada.run import Run, first_rank_first


@dataclass(frozen=True)
class Prompt:
    """One prompt of a file."""

    index: int  # its number in the file, which keys its random draws
    prompt: str | list[dict[str, str]]  # a text, or messages where the chat template is used
    token_ids: list[int]
    record: dict[str, Any]  # all fields, for rewards and for the output


def prompt_of(
    record: dict[str, Any], where: str, tokenizer: PreTrainedTokenizerBase, *, chat: bool
) -> tuple[str | list[dict[str, str]], list[int]]:
    """A record's prompt, and its token ids as training puts them in front of an answer.

    Raises:
        ValueError: `where` and what is wrong: no prompt, a conversation without `chat`, an empty prompt.
    """
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


def read_prompts(
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat: bool,
    room: int,
    long: str = "error",
    limit: int | None = None,
    key: str | None = None,
) -> tuple[list[Prompt], Counter]:
    """The prompts of a file, and how many were dropped.

    Args:
        chat: through the chat template.
        room: tokens that a prompt may have: the context, less the answer.
        long: what to do with longer ones: `error`, or `drop`.
        limit: only the first so many records.
        key: field of the prompt; default those of data/README.md.

    Raises:
        ValueError: `file:line` and what is wrong with a record.
    """
    prompts, counts = [], Counter()
    if room < 1:
        raise ValueError("--gen_length leaves no room for a prompt in the model's context")
    for index, (where, record) in enumerate(read_records(path, text_documents="line")):
        if limit is not None and index >= limit:
            break
        if key is not None:
            if key not in record:
                raise ValueError(f"{where}: no field {key!r}; fields are {sorted(record)}")
            record = {**record, "prompt": record[key]}
        prompt, token_ids = prompt_of(record, where, tokenizer, chat=chat)
        if len(token_ids) > room:
            if long == "error":
                raise ValueError(
                    f"{where}: {len(token_ids)} prompt tokens, where {room} fit beside --gen_length; "
                    "see --long_prompts"
                )
            counts["long prompts, dropped"] += 1
            continue
        prompts.append(Prompt(index, prompt, token_ids, record))
    if not prompts:
        raise ValueError(f"{path}: no prompt fits in {room} tokens")
    return prompts, counts


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
