"""The sampler's settings as flags, for every script that generates."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from llada.flags.declaration import flag
from modelling_final.sampler_settings_llada import SamplerSettings

if TYPE_CHECKING:
    from modelling_final import LLaDAGenerationConfig


@dataclass(kw_only=True)
class SamplerFlags(SamplerSettings):
    """One flag for each of the sampler's settings; a script's Config inherits them."""

    method: str | None = flag(
        None,
        help="fixed_length: one block. semi_autoregressive_padding: blocks in a canvas of full length. "
        "semi_autoregressive_origin: the canvas grows. Default: padding with --block_length, else fixed.",
        choices=SamplerSettings.__dataclass_fields__["method"].metadata["choices"],
    )


def sampler_settings(flags: SamplerFlags) -> "LLaDAGenerationConfig":
    """The sampler's settings among a script's flags, checked."""
    from modelling_final import LLaDAGenerationConfig  # loads torch, which the flags themselves do without

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
