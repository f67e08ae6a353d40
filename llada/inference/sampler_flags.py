"""The sampler's settings as flags, for every script that generates."""

from dataclasses import asdict, dataclass

from llada.flags import flag
from modelling_final import LLaDAGenerationConfig


@dataclass(kw_only=True)
class SamplerFlags:
    """One flag per setting of modelling_final/generation_config_llada.py; a script's Config inherits them."""

    # These give the published tokens.
    method: str | None = flag(
        None,
        help="fixed_length: one block. semi_autoregressive_padding: blocks in a canvas of full length. "
        "semi_autoregressive_origin: the canvas grows. Default: padding with --block_length, else fixed.",
        choices=["fixed_length", "semi_autoregressive_padding", "semi_autoregressive_origin"],
    )
    gen_length: int = flag(128, help="Answer length in tokens.")
    block_length: int | None = flag(None, help="Tokens per block; default 32 for the two block methods.")
    steps: int | None = flag(None, help="Denoising steps over the whole answer; default gen_length.")
    temperature: float = flag(0.0, help="0: the most likely token; else sampling.")
    cfg_scale: float = flag(0.0, help="Classifier-free guidance; 0: none.")
    remasking: str = flag("low_confidence", help="Order of decisions.", choices=["low_confidence", "random"])
    logits_eos_inf: bool = flag(False, help="Never produce EOS.")
    confidence_eos_eot_inf: bool = flag(False, help="Decide EOS and EoT last.")
    early_stop: bool = flag(True, help="Stop when all before an EOS is decided; the same text.")
    repetition_penalty: float = flag(1.0, help="Above 1: tokens that were there become less likely.")
    seed: int = flag(0, help="Of every random draw.")
    cuda_graphs: bool = flag(False, help="On a GPU, record forwards and replay them; the same mathematics.")

    # Approximate: these change the tokens.
    parallel_decoding: str = flag(
        "none",
        help="How many tokens a step decides follows from confidence.",
        choices=["none", "threshold", "factor", "entropy", "klass"],
    )
    threshold: float = flag(0.9, help="Confidence for threshold and klass.")
    factor: float = flag(1.0, help="f in (n + 1)(1 - c) < f for factor.")
    entropy_bound: float = flag(0.1, help="Nats for entropy.")
    klass_kl: float = flag(0.01, help="Nats that count as unchanged for klass.")
    klass_steps: int = flag(2, help="Unchanged steps for klass.")
    cache: str = flag(
        "none", help="Reuse keys and values within a block.", choices=["none", "prefix", "dual"]
    )
    cache_refresh_interval: int = flag(0, help="Recompute them every so many steps; 0: once a block.")
    remdm: str = flag(
        "none", help="Decided tokens may be masked again.", choices=["none", "cap", "rescale", "conf"]
    )
    remdm_eta: float = flag(0.04, help="Strength of cap and rescale.")


def sampler_settings(flags: SamplerFlags) -> LLaDAGenerationConfig:
    """The sampler's settings among a script's flags, checked."""
    known = LLaDAGenerationConfig().to_dict()
    values = {name: value for name, value in asdict(flags).items() if name in known}
    method, block_length = flags.method, flags.block_length
    if method is None:
        method = "semi_autoregressive_padding" if block_length else "fixed_length"
    if method != "fixed_length" and block_length is None:
        block_length = min(32, flags.gen_length)
    settings = LLaDAGenerationConfig(**values | {"method": method, "block_length": block_length})
    settings.steps_per_block(flags.gen_length)
    return settings
