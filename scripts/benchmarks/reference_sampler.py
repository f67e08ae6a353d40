"""The published sampling loop, written out plainly, and peers' samplers on our model.

B prompts, P prompt columns, G answer columns, L = P + G, E head outputs.

A sampler here takes B prompts as lists of token ids and returns B answers of G token ids.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import torch
from torch import Tensor

from modelling_final import LLaDAGenerationConfig, LLaDAModelLM

Sampler = Callable[[list[list[int]]], list[list[int]]]


def gumbel_noised(logits: Tensor, temperature: float) -> Tensor:
    """exp(l) / (-log u)^T in float64, whose argmax is a draw from softmax(l / T); the logits at T = 0."""
    if temperature == 0:
        return logits
    logits = logits.double()
    return logits.exp() / (-torch.rand_like(logits).log()) ** temperature


def reference_sampler(model: LLaDAModelLM, settings: LLaDAGenerationConfig) -> Sampler:
    """The published sampler: low-confidence remasking, blocks in a canvas of full length.

    The whole canvas goes through the model at every step, logits and confidences are formed at every position
    in the model's own precision, and every block is decided to its end. Of equal confidences the first
    position wins, where the published topk leaves it open.

    Source: LLaDA generate.py, generate.
    """
    mask_id, gen_length = model.config.mask_token_id, settings.gen_length
    block_length, num_steps = settings.block_of(gen_length), settings.steps_per_block(gen_length)
    base, more = divmod(block_length, num_steps)

    @torch.no_grad()
    def sample(prompts: list[list[int]]) -> list[list[int]]:
        x, keep = left_padded(prompts, model)  # [B, P]
        num_prompt = x.shape[1]
        x = torch.nn.functional.pad(x, (0, gen_length), value=mask_id)  # [B, L]
        keep = torch.nn.functional.pad(keep, (0, gen_length), value=1)
        keep = None if keep.all() else keep  # as published without padding: attention then needs no mask
        for end in range(num_prompt + block_length, x.shape[1] + 1, block_length):
            for step in range(num_steps):
                is_masked = x == mask_id
                logits = model(x, attention_mask=keep).logits  # [B, L, E]
                tokens = gumbel_noised(logits, settings.temperature).argmax(dim=-1)
                confidence = logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0]
                confidence[:, end:] = -torch.inf
                confidence = confidence.masked_fill(~is_masked, -torch.inf)
                order = confidence.argsort(dim=1, descending=True, stable=True)
                picks = order[:, : base + (step < more)]
                x.scatter_(1, picks, tokens.gather(1, picks))
        return x[:, num_prompt:].tolist()

    return sample


def left_padded(prompts: list[list[int]], model: LLaDAModelLM) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, [B, P] each, on the model's device."""
    num_prompt = max(map(len, prompts))
    x = torch.full((len(prompts), num_prompt), model.config.pad_token_id)
    keep = torch.zeros_like(x)
    for row, prompt in enumerate(prompts):
        x[row, num_prompt - len(prompt) :] = torch.tensor(prompt)
        keep[row, num_prompt - len(prompt) :] = 1
    return x.to(model.device), keep.to(model.device)


def peer_samplers(path: str, model: LLaDAModelLM, settings: LLaDAGenerationConfig) -> dict[str, Sampler]:
    """Name -> sampler of a checkout: LLaDA's generate.py, Fast-dLLM's, or dllm's. Temperature 0 only.

    Raises:
        ValueError: no known sampler lies there, or it cannot be imported in this environment.
    """
    folder = Path(path)
    try:
        if (folder / "dllm/core/samplers/mdlm.py").is_file():
            return {"peer-dllm": _dllm(folder, model, settings)}
        if (folder / "llada/generate.py").is_file():
            return _fast_dllm(folder / "llada/generate.py", model, settings)
        if (folder / "generate.py").is_file():
            return {"peer-llada": _published(folder / "generate.py", model, settings)}
    except ImportError as error:
        raise ValueError(f"--peer_path {path}: cannot be imported here: {error}") from error
    wanted = "generate.py (LLaDA), llada/generate.py (Fast-dLLM), dllm/core/samplers/mdlm.py (dllm)"
    raise ValueError(f"--peer_path {path}: found none of {wanted}")


def _module(file: Path, name: str) -> ModuleType:
    """A file as a module; where it imports the peer's own model class, it gets ours."""
    stub = ModuleType("model.modeling_llada")
    stub.LLaDAModelLM = LLaDAModelLM
    spec = importlib.util.spec_from_file_location(name, file)
    module = importlib.util.module_from_spec(spec)
    with mock.patch.dict(sys.modules, {"model": ModuleType("model"), "model.modeling_llada": stub}):
        spec.loader.exec_module(module)
    return module


def _shared(model: LLaDAModelLM, settings: LLaDAGenerationConfig) -> dict[str, int]:
    """The arguments that LLaDA's and Fast-dLLM's functions have in common."""
    length = settings.gen_length
    return {
        "gen_length": length, "block_length": settings.block_of(length), "steps": settings.steps or length,
        "mask_id": model.config.mask_token_id,
    }  # fmt: skip


def _published(file: Path, model: LLaDAModelLM, settings: LLaDAGenerationConfig) -> Sampler:
    generate = _module(file, "peer_llada_generate").generate

    def sample(prompts: list[list[int]]) -> list[list[int]]:
        x, keep = left_padded(prompts, model)
        output = generate(model, x, attention_mask=keep, **_shared(model, settings))
        return output[:, x.shape[1] :].tolist()

    return sample


def _fast_dllm(file: Path, model: LLaDAModelLM, settings: LLaDAGenerationConfig) -> dict[str, Sampler]:
    """Without and with its dual cache, a prompt at a time; its prefix cache needs its own model class."""
    module = _module(file, "peer_fast_dllm_generate")

    def sampler(generate: Callable[..., tuple[Tensor, int]], threshold: float | None) -> Sampler:
        def sample(prompts: list[list[int]]) -> list[list[int]]:
            answers = []
            for prompt in prompts:
                x = torch.tensor([prompt], device=model.device)
                output, _ = generate(model, x, threshold=threshold, **_shared(model, settings))
                answers.append(output[0, len(prompt) :].tolist())
            return answers

        return sample

    return {
        "peer-fast-dllm": sampler(module.generate, None),
        "peer-fast-dllm-threshold": sampler(module.generate, settings.threshold),
        "peer-fast-dllm-dual+threshold": sampler(module.generate_with_dual_cache, settings.threshold),
    }


def _dllm(folder: Path, model: LLaDAModelLM, settings: LLaDAGenerationConfig) -> Sampler:
    sys.path.insert(0, str(folder))
    try:
        module = importlib.import_module("dllm.core.samplers.mdlm")
    finally:
        sys.path.remove(str(folder))
    config, length = model.config, settings.gen_length
    ids = {name: getattr(config, name) for name in ("mask_token_id", "eos_token_id", "pad_token_id")}
    tokenizer = SimpleNamespace(
        bos_token_id=config.eos_token_id, **ids
    )  # bos stands in for empty prompts only
    sampler = module.MDLMSampler(model=model, tokenizer=tokenizer)

    def sample(prompts: list[list[int]]) -> list[list[int]]:
        output = sampler.sample(
            prompts, max_new_tokens=length, steps=settings.steps or length,
            block_size=settings.block_of(length), temperature=0.0, return_dict=False,
        )  # fmt: skip
        return [row[len(p) : len(p) + length].tolist() for row, p in zip(output, prompts, strict=True)]

    return sample
