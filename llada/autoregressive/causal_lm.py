"""Autoregressive models of any kind, as transformers loads them."""

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from llada.data.messages import Message
from llada.data.template import encode_texts, fit_messages, render
from llada.models.checkpoints import DTYPES, describe_checkpoint, resolve_checkpoint


def load_causal_lm(
    path: str,
    *,
    flag: str,
    gguf_file: str | None = None,
    gguf_flag: str | None = None,
    dtype: str = "auto",
    device: torch.device | str = "cpu",
    check: Callable[[PreTrainedConfig], None] = lambda _: None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """An autoregressive model, in eval mode, and its tokenizer.

    Args:
        path: folder (a run's too) or hub name.
        flag: the flag that named it, for errors; `gguf_flag` that of the GGUF file, default FLAG_gguf_file.
        gguf_file: name of a GGUF file in the folder, dequantised (to float32 where dtype is auto).
        check: raises ValueError for a configuration that cannot be used, before weights are read.

    Raises:
        ValueError: nothing there that transformers can read, weights missing, or a LLaDA model.
    """
    folder, source = Path(path), {"gguf_file": gguf_file} if gguf_file else {}
    if gguf_file is None:
        found = sorted(file.name for file in folder.glob("*.gguf"))
        if found and not (folder / "config.json").is_file():
            hint = f"add {gguf_flag or f'{flag}_gguf_file'} {found[0]}"
            raise ValueError(f"{flag} {path}: no config.json; {hint}")
        path = resolve_checkpoint(path, flag=flag)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False, **source)
        if config.model_type == "llada":
            raise ValueError("a LLaDA model is not autoregressive and cannot take this part")
        check(config)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **source)
        model, report = AutoModelForCausalLM.from_pretrained(
            path, dtype=DTYPES.get(dtype, dtype), trust_remote_code=False, output_loading_info=True, **source
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{flag} {path}: cannot be read as a causal language model: {reason}") from error
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
    return encode_texts([render(fit_messages(prompt, tokenizer), tokenizer, header=True)], tokenizer)[0]
