"""A causal drafter as engines run it: a plain Llama, Qwen2 or Qwen3 that drafts G tokens in one forward.

    [text, mask x (G - 1)] -> the last G rows, each its most likely token

Its config.json names the mask as `pard_token`; its tokens are the verifier's. `engine_decode` needs nothing
of this suite: what it accepts is what a server will accept.

Source: PARD, arXiv 2504.18583, and how vLLM (`parallel_drafting`) and TensorRT-LLM load its models.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from llada.autoregressive.causal_lm import load_causal_lm, prompt_ids
from llada.data.prompts import read_prompts
from llada.models.building import load_for_inference
from llada.models.causal_layout import causal_form, convert
from llada.models.saving import Origin, save_model
from llada.models.tokens import end_ids
from llada.speculative.bridge import Bridge
from llada.speculative.decoder import SpeculativeDecoder, SpeculativeStats, ends_with
from llada.speculative.settings import SpeculativeSettings
from modelling_final import LLaDAModelLM

SERVE = """vLLM (vllm serve VERIFIER --speculative-config JSON, or LLM(VERIFIER, speculative_config=...)):
    {{"model": "{folder}", "num_speculative_tokens": {length},
     "method": "draft_model", "parallel_drafting": true}}
TensorRT-LLM:
    PARDDecodingConfig(speculative_model="{folder}", max_draft_len={length}, mask_token_id={mask_id})"""


def load_drafter(
    path: str,
    *,
    chat: bool,
    dtype: str = "auto",
    adapter_path: str | None = None,
    device: torch.device | str | None = None,
    **of_llada: Any,
) -> tuple[LLaDAModelLM, PreTrainedTokenizerBase]:
    """The drafter of a LLaDA checkpoint, or of a folder with a `pard_token`; arguments of `load_model`."""
    settings = {}
    if Path(path, "config.json").is_file():
        settings, _ = PreTrainedConfig.get_config_dict(path)
    if "pard_token" not in settings:
        return load_for_inference(
            path, chat=chat, dtype=dtype, adapter_path=adapter_path, device=device, **of_llada
        )
    for name, value in {"adapter_path": adapter_path, **of_llada}.items():
        if value is not None:
            raise ValueError(f"--{name} {value}: {path} is a drafter for engines, not a LLaDA checkpoint")
    source, tokenizer = load_causal_lm(path, flag="--drafter", dtype=dtype)
    return convert(source, tokenizer, block_size=1, mask_id=settings["pard_token"]).to(device), tokenizer


def write_drafter(model: LLaDAModelLM, verifier: str, folder: Path, *, origin: Origin) -> None:
    """Writes a causal drafter in the form of its verifier, with the verifier's tokenizer, or ValueError."""
    target, tokenizer = load_causal_lm(verifier, flag="--verifier")
    # vLLM compares the two numbers and refuses
    drafter, width = causal_form(model), target.config.get_text_config().vocab_size
    if drafter.config.vocab_size != width:
        raise ValueError(
            f"--verifier {verifier}: {width} outputs, the drafter has {drafter.config.vocab_size}; engines "
            "want one number. Convert the drafter from the verifier, or from a model of its family"
        )
    save_model(drafter, tokenizer, folder, origin=origin)


def try_drafter(
    folder: Path, verifier_path: str, prompts_file: str, *, chat: bool, limit: int, **lengths: int
) -> None:
    """Decodes prompts as engines do and as `SpeculativeDecoder` does; ValueError if they accept differently.

    `lengths`: draft_length and max_new_tokens.
    """
    verifier, tokenizer = load_causal_lm(verifier_path, flag="--verifier", dtype="float32")
    plain, _ = load_causal_lm(str(folder), flag="--output_dir", dtype="float32")
    drafter, own_tokenizer = load_drafter(str(folder), chat=False, dtype="float32")
    width = verifier.config.get_text_config().vocab_size
    bridge = Bridge("none", drafter.config, own_tokenizer, tokenizer, num_outputs=width)
    decoder = SpeculativeDecoder(drafter, verifier, bridge, SpeculativeSettings(**lengths))
    ends = end_ids(verifier, tokenizer, bridge.vocabulary.target.closing)
    engine, ours = SpeculativeStats(), SpeculativeStats()
    prompts, _ = read_prompts(prompts_file, own_tokenizer, chat=chat, limit=limit)
    for prompt in prompts:
        ids = prompt_ids(prompt.prompt, tokenizer)
        answer, stats = decoder.decode(ids, ids, record_id=prompt.index, is_done=ends_with(ends))
        wanted, expected = engine_decode(plain, verifier, ids, ends=ends, **lengths)
        ours += stats
        engine += expected
        if answer != wanted or stats.accepted != expected.accepted:
            raise ValueError(
                f"{prompt.where}: {folder} accepts {expected.accepted} by position as engines run it, and "
                f"{stats.accepted} in speculative_decode.py: it drafts tokens that no training ruled out"
            )
    print(f"{len(prompts)} prompts, {engine.tokens} tokens, {engine.rounds} forwards of the verifier")
    for name, stats in (("as engines run it", engine), ("speculative_decode.py", ours)):
        shares = " ".join(f"{k}:{a:.3f}" for k, a in enumerate(stats.acceptance_by_position, start=1))
        print(f"{name}: acceptance length {stats.acceptance_length:.3f}, by position {shares}")


@torch.no_grad()
def engine_decode(
    drafter: PreTrainedModel,
    verifier: PreTrainedModel,
    prompt: Sequence[int],
    *,
    draft_length: int,
    max_new_tokens: int,
    ends: Sequence[int],
) -> tuple[list[int], SpeculativeStats]:
    """The verifier's greedy answer with the drafts of a plain causal model, and what was accepted."""
    mask_id, answer, stats = drafter.config.pard_token, [], SpeculativeStats()
    while len(answer) < max_new_tokens and not (answer and answer[-1] in ends):
        text = [*prompt, *answer]
        # an engine stops drafting where the answer must end, and so does the decoder
        length = min(draft_length, max_new_tokens - len(answer) - 1)
        draft = []
        if length:
            # the last row of the text predicts the first token, so G tokens need G - 1 masks
            draft = _most_likely(drafter, text + [mask_id] * (length - 1), length)
        wanted = _most_likely(verifier, text + draft, length + 1)
        num = next((k for k, token in enumerate(draft) if token != wanted[k]), length)
        new = wanted[: num + 1]
        new = new[: next((k + 1 for k, token in enumerate(new) if token in ends), len(new))]
        answer += new
        stats.count_round(length, num, len(new))
    return answer, stats


def _most_likely(model: PreTrainedModel, tokens: list[int], num_rows: int) -> list[int]:
    logits = model(torch.tensor([tokens], device=model.device), use_cache=False).logits
    return logits[0, -num_rows:].argmax(-1).tolist()
