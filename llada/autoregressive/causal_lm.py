"""Autoregressive models of any kind, as transformers loads them."""

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from llada.data.chat import encode_texts, render_template
from llada.data.messages import Message
from llada.models.checkpoints import DTYPES, describe_checkpoint


def load_causal_lm(
    path: str,
    *,
    flag: str,
    gguf_file: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An autoregressive model, in eval mode, and its tokenizer.

    Args:
        path: folder or hub name.
        flag: the flag that named it, for errors.
        gguf_file: name of a GGUF file in the folder, dequantised (to float32 where dtype is auto).

    Raises:
        ValueError: nothing there that transformers can read, weights missing, or a LLaDA model.
    """
    folder, source = Path(path), {"gguf_file": gguf_file} if gguf_file else {}
    if gguf_file is None and folder.is_dir() and not (folder / "config.json").is_file():
        found = sorted(file.name for file in folder.glob("*.gguf"))
        hint = f"add {flag}_gguf_file {found[0]}" if found else "a checkpoint folder has one"
        raise ValueError(f"{flag} {path}: no config.json; {hint}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **source)
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES.get(dtype, dtype), output_loading_info=True, **source
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"{flag} {path}: transformers cannot read a causal language model ({reason})"
        ) from error
    if model.config.model_type == "llada":
        raise ValueError(f"{flag} {path}: a LLaDA model is not autoregressive and cannot take this part")
    if report["missing_keys"] or report["mismatched_keys"]:
        keys = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(f"{flag} {path}: {len(keys)} weights missing or misshapen: {keys[:3]}")
    return model.to(device).eval(), tokenizer


def describe_causal_lm(path: str, gguf_file: str | None) -> str:
    """A hash of such a model's weights and settings: other ones give other answers."""
    return describe_checkpoint(cached_file(path, gguf_file) if gguf_file else path)


def prompt_ids(prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt in such a model's tokens: messages in its own chat format, a text with its own first token."""
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False)["input_ids"]
    return encode_texts([render_template(prompt, tokenizer, header=True)], tokenizer)[0]
