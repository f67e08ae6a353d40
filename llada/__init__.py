"""Masked diffusion language models, from Python in three lines:

import llada
model, tokenizer = llada.load("runs/quickstart/sft")
print(llada.generate(model, tokenizer, "What is 3 + 4?", gen_length=64))
"""

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # torch is loaded by whoever asks for a model, not by `import llada`
    from transformers import PreTrainedTokenizerBase

    from llada.data.messages import Message
    from modelling_final import LLaDAModelLM


def load(
    path: str, *, dtype: str = "auto", device: str | None = None, adapter_path: str | None = None
) -> tuple["LLaDAModelLM", "PreTrainedTokenizerBase"]:
    """A model that answers and its tokenizer.

    Args:
        path: a checkpoint or run folder, a LoRA adapter folder, or a hub name.
        dtype: of the weights; auto: as they are stored.
        device: default the CPU.

    Raises:
        ValueError: no such checkpoint, or one that is not a LLaDA model.
    """
    from llada.models.building import load_for_inference

    return load_for_inference(path, chat=False, dtype=dtype, device=device, adapter_path=adapter_path)


def generate(
    model: "LLaDAModelLM",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: "str | Sequence[str | Sequence[Message]]",
    *,
    chat: bool | None = None,
    **settings: Any,
) -> str | list[str]:
    """The text of the answer to a prompt, or of the answers to a list of prompts (texts or messages).

    Args:
        chat: through the chat template; default: where the tokenizer has one.
        settings: the sampler's, for example gen_length, block_length, temperature; see docs/generation.md.
    """
    is_one = isinstance(prompts, str)
    token_ids = [_token_ids(prompt, tokenizer, chat) for prompt in ([prompts] if is_one else prompts)]
    output = model.generate(token_ids, return_dict_in_generate=True, **settings)
    texts = tokenizer.batch_decode(output.completions, skip_special_tokens=True)
    return texts[0] if is_one else texts


def stream(
    model: "LLaDAModelLM",
    tokenizer: "PreTrainedTokenizerBase",
    prompt: "str | Sequence[Message]",
    *,
    chat: bool | None = None,
    **settings: Any,
) -> Iterator[str]:
    """The answer's text piece by piece, as its blocks are finished; arguments as for `generate`."""
    from llada.serving.engine import Row

    config = model.generation_config.changed(**settings)
    block_length = config.block_of(config.gen_length)
    row = Row([None] * config.gen_length, frozenset(model.config.end_ids))
    pieces: SimpleQueue[list[int] | BaseException | None] = SimpleQueue()

    def note(entry: dict[str, Any]) -> None:
        row.note(entry)
        pieces.put(row.beginning(block_length))

    def run() -> None:
        try:
            output = model.generate(
                [_token_ids(prompt, tokenizer, chat)],
                generation_config=config,
                return_dict_in_generate=True,
                on_step=note,
            )
            pieces.put(output.completions[0])
            pieces.put(None)
        except BaseException as error:  # raised again where the text is read
            pieces.put(error)

    Thread(target=run, daemon=True).start()
    sent = ""
    while (piece := pieces.get()) is not None:
        if isinstance(piece, BaseException):
            raise piece
        text = tokenizer.decode(piece, skip_special_tokens=True).rstrip("\ufffd")
        if len(text) > len(sent):
            yield text[len(sent) :]
            sent = text


def _token_ids(
    prompt: "str | Sequence[Message]", tokenizer: "PreTrainedTokenizerBase", chat: bool | None
) -> list[int]:
    from llada.data.chat import render_prompt

    return render_prompt(
        prompt, tokenizer, chat=tokenizer.chat_template is not None if chat is None else chat
    )
