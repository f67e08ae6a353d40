"""The least time that a GPU needs for the sampler's forwards."""

from dataclasses import dataclass

from modelling_final import LLaDAConfig, LLaDAGenerationConfig


@dataclass(frozen=True)
class Gpu:
    """Rates of a GPU in 16-bit numbers; by default those of an H100 SXM."""

    peak_tflops: float = 989.4  # dense bfloat16
    bandwidth: float = 3.35  # TB/s


def forward_floor(
    config: LLaDAConfig, gpu: Gpu, *, num_rows: int, num_keys: int, num_wanted: int, batch_size: int = 1
) -> float:
    """Seconds that a forward takes at half of the GPU's peak rate or at all of its bandwidth, the longer.

    Args:
        num_rows: rows that go in, of each sequence.
        num_keys: keys that they attend to.
        num_wanted: rows for which the last layer's queries and MLP, and the head, are computed.
    """
    width = config.n_kv_heads * config.head_dim
    keys_and_values = 2 * config.d_model * width  # weights of a layer
    others = 2 * config.d_model**2 + 3 * config.d_model * config.mlp_hidden_size
    head, num_layers = config.d_model * config.embedding_size, config.n_layers
    attention = 2 * config.d_model * num_keys  # multiplications of a row in a layer: scores, and values
    each_row = num_layers * keys_and_values + (num_layers - 1) * (others + attention)
    flops = 2 * batch_size * (num_rows * each_row + num_wanted * (others + attention + head))
    numbers_read = num_layers * (keys_and_values + others) + head
    if num_rows < num_keys:  # then there is a cache to read
        numbers_read += batch_size * num_layers * num_keys * 2 * width
    return max(flops / (0.5e12 * gpu.peak_tflops), 2 * numbers_read / (1e12 * gpu.bandwidth))


def sampler_floor(
    config: LLaDAConfig,
    gpu: Gpu,
    settings: LLaDAGenerationConfig,
    num_prompt: int,
    *,
    batch_size: int = 1,
    is_pruned: bool = True,
) -> float:
    """Seconds below which the sampler cannot decide its answers, every step of every block.

    Args:
        num_prompt: prompt tokens.
        is_pruned: the last layer and the head are computed for the block's rows only.
    """
    gen_length = settings.gen_length
    num_keys, width = num_prompt + gen_length, settings.block_of(gen_length)
    total = 0.0
    for start in range(num_prompt, num_keys, width):
        for step in range(settings.steps_per_block(gen_length)):
            num_rows = num_keys
            if step > 0 and settings.cache != "none":
                num_rows = width if settings.cache == "dual" else num_keys - start
            total += forward_floor(
                config,
                gpu,
                num_rows=num_rows,
                num_keys=num_keys,
                num_wanted=width if is_pruned else num_rows,
                batch_size=batch_size,
            )
    return total
