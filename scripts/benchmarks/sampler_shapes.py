"""The sampler on models of random weights: their shapes, and their times beside the hardware's floor.

P prompt tokens, G answer tokens. Random weights are sure of nothing and never end an answer, so every block
is decided, and the number of tokens per step is set.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from llada.data.prompts import Prompt
from llada.flags.yaml_files import read_yaml
from llada.models.building import ROOT
from llada.models.checkpoints import DTYPES
from modelling_final import LLaDAConfig, LLaDAGenerationConfig, LLaDAModelLM
from reference_sampler import peer_samplers, reference_sampler
from sampler_arms import Arm, canvas_arm, our_arm, settings_of
from sampler_floor import Gpu, sampler_floor
from sampler_timing import Calls, Result, time_arm


@dataclass(frozen=True)
class Shape:
    """A model of random weights (a size in configs/models, or fields) and the (P, G) to time it at."""

    model: str | dict[str, int]
    vocab_size: int
    lengths: tuple[tuple[int, int], ...]
    dtype: str


_MICRO = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 48}
SHAPES = {
    "8b-random": Shape("8b", LLaDAConfig().embedding_size, ((128, 128), (768, 256)), "bfloat16"),
    "micro-random": Shape(_MICRO, 200, ((8, 16),), "float32"),
}


def random_model(shape: Shape, device: str, seed: int) -> LLaDAModelLM:
    """A model of random weights, made on the device in its own precision."""
    fields, last = shape.model, shape.vocab_size - 1
    if isinstance(fields, str):
        fields = read_yaml(ROOT / f"configs/models/{fields}.yaml")
    config = LLaDAConfig(
        **fields, vocab_size=shape.vocab_size, embedding_size=shape.vocab_size, mask_token_id=last,
        eos_token_id=last - 1, pad_token_id=last - 1,
    )  # fmt: skip
    with torch.device(device), torch.random.fork_rng():
        torch.manual_seed(seed)
        return LLaDAModelLM._from_config(config, dtype=DTYPES[shape.dtype]).eval()


def time_lengths(
    model: LLaDAModelLM,
    calls: Calls,
    num_prompt: int,
    gen_length: int,
    *,
    names: Sequence[str],
    tokens_per_step: Sequence[int],
    block_length: int,
    batch_size: int,
    repeats: int,
    gpu: Gpu,
    seed: int,
    peer_path: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The rows of the table for one (P, G); the arms take turns. Peers decide one token a step.

    Raises:
        ValueError: an unknown arm, or a number of tokens per step that does not divide the blocks evenly.
    """
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.eos_token_id, (batch_size, num_prompt), generator=source).tolist()
    prompts = [Prompt(i, prompt, {}) for i, prompt in enumerate(ids)]
    common = {"gen_length": gen_length, "block_length": min(block_length, gen_length)}
    arms: dict[tuple[str, int], Arm] = {}
    settings: dict[tuple[str, int], LLaDAGenerationConfig] = {}
    for name in names:
        for k in tokens_per_step:
            settings[name, k] = settings_of(
                "exact" if name == "reference" else name, **common, early_stop=False,
                steps=gen_length // k, seed=seed,
            )  # fmt: skip
            sampler = reference_sampler(model, settings[name, k]) if name == "reference" else None
            arms[name, k] = canvas_arm(model, sampler) if sampler else our_arm(model, settings[name, k])
    for path in peer_path:
        for name, sampler in peer_samplers(path, model, settings_of("exact", **common)).items():
            arms[name, 1] = canvas_arm(model, sampler)
            settings[name, 1] = settings_of("dual" if "dual" in name else "exact", **common)
    for arm in arms.values():
        arm(prompts)  # warms up
    results = {pair: Result() for pair in arms}
    for _ in range(repeats):
        for pair, arm in arms.items():
            time_arm(arm, [prompts], results[pair], calls, model.device)
            rate = batch_size * gen_length / results[pair].seconds[-1]
            print(f"  {num_prompt}/{gen_length} {pair[0]} x{pair[1]}: {rate:.1f} tokens/s", flush=True)

    rows, num_tokens = [], batch_size * gen_length
    for (name, k), result in results.items():
        seconds, num_calls = statistics.median(result.seconds), max(1, result.num_calls)
        floor = sampler_floor(
            model.config, gpu, settings[name, k], num_prompt, batch_size=batch_size,
            is_pruned=name in names and name != "reference",
        )  # fmt: skip
        rows.append(
            {
                "P": num_prompt, "G": gen_length, "batch": batch_size, "arm": name, "tokens/step": k,
                "tokens/s": num_tokens / seconds, "min": num_tokens / max(result.seconds),
                "max": num_tokens / min(result.seconds), "ms/forward": 1000 * seconds / num_calls,
                "peak MiB": result.memory, "floor tokens/s": num_tokens / floor,
                "% of floor": 100 * floor / seconds,
            }
        )  # fmt: skip
    return rows
