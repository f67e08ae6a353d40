"""Autoregressive models of any kind, as transformers loads them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from llada.flags.declaration import first_line
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
        ValueError: nothing there that transformers can read, weights missing, or no causal model.
    """
    folder, source = Path(path), {"gguf_file": gguf_file} if gguf_file else {}
    if gguf_file is None:
        found = sorted(file.name for file in folder.glob("*.gguf"))
        if found and not (folder / "config.json").is_file():
            hint = f"add {gguf_flag or f'{flag}_gguf_file'} {found[0]}"
            raise ValueError(f"{flag} {path}: no config.json; {hint}")
        path = resolve_checkpoint(path, flag=flag)
    with named_refusal(flag, path):
        config = read_causal_config(path, **source)
        check(config)
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False, **source)
        model = read_causal_model(path, dtype=dtype, **source)
    return model.to(device).eval(), tokenizer


@contextmanager
def named_refusal(flag: str, path: str) -> Iterator[None]:
    """A failure to read a model, with the flag and the path in its message."""
    try:
        yield
    except Exception as error:  # of damaged files, whatever the libraries met there
        reason = first_line(error)
        raise ValueError(f"{flag} {path}: cannot be read as a causal language model: {reason}") from error


def read_causal_config(path: str, **source: str) -> PreTrainedConfig:
    """The configuration of a model of transformers, not of this suite."""
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, **source)
    if config.model_type == "llada":
        raise ValueError("a LLaDA model is not autoregressive and cannot take this part")
    return config


def read_causal_model(path: str, *, dtype: str, **source: str) -> PreTrainedModel:
    """The weights, all of them, of a model that sees only what comes before."""
    model, report = AutoModelForCausalLM.from_pretrained(
        path, dtype=DTYPES.get(dtype, dtype), trust_remote_code=False, output_loading_info=True, **source
    )
    if report["missing_keys"] or report["mismatched_keys"]:
        keys = sorted(map(str, [*report["missing_keys"], *report["mismatched_keys"]]))
        raise ValueError(f"{len(keys)} weights missing or misshapen: {keys[:3]}")
    if sees_later_tokens(model.eval()):
        raise ValueError("its attention is bidirectional: a token sees those after it")
    return model


@torch.no_grad()
def sees_later_tokens(model: PreTrainedModel) -> bool:
    """Whether another last token changes what is predicted before it.

    No configuration says so reliably. AutoModelForCausalLM loads a BERT too, whose loss would look excellent.
    """
    ids = torch.arange(1, 7, device=model.device).expand(2, -1).clone()
    ids[1, -1] = 0
    first, second = model(input_ids=ids, use_cache=False).logits.float()
    *before, own = (first - second).abs().amax(-1).tolist()
    return max(before) > 0.05 * own  # experts of other sizes may round otherwise, by some 0.01 in bfloat16


def describe_causal_lm(path: str, gguf_file: str | None) -> str:
    """A hash of such a model's weights and settings: other ones give other answers."""
    return describe_checkpoint(cached_file(path, gguf_file) if gguf_file else path)


def prompt_ids(prompt: str | Sequence[Message], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """A prompt in such a model's tokens: messages in its own chat format, a text with its own first token."""
    if isinstance(prompt, str):
        return tokenizer(prompt, verbose=False)["input_ids"]
    return encode_texts([render(fit_messages(prompt, tokenizer), tokenizer, header=True)], tokenizer)[0]
