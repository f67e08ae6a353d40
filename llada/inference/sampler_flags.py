"""The sampler's settings as flags, for every script that generates."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, ClassVar

from llada.flags.declaration import flag
from llada.models.flags import MaskTokenFlag
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
    )
    seed: int = flag(42, at_least=0)
    fills_blocks: ClassVar[bool] = False  # an evaluation rounds lengths up to whole blocks, and cuts answers

    def check_flags(self) -> None:
        """What excludes what, and lengths that divide."""
        if self.method == "fixed_length" and self.block_length is not None:
            raise ValueError(f"--block_length {self.block_length}: has no effect with --method fixed_length")
        values = {field.name: getattr(self, field.name) for field in fields(SamplerSettings)} | self.blocks()
        settings = SamplerSettings(**{name: value for name, value in values.items() if value is not None})
        settings.check()
        if self.gen_length is not None and not self.fills_blocks:
            settings.steps_per_block(self.gen_length)

    def blocks(self) -> dict[str, Any]:
        """The method and the block length, which decide each other's default."""
        method, block_length = self.method, self.block_length
        if method is None:
            method = "semi_autoregressive_padding" if block_length else "fixed_length"
        if method != "fixed_length" and block_length is None and self.gen_length is not None:
            block_length = min(32, self.gen_length)
        return {"method": method, "block_length": block_length}


@dataclass(kw_only=True)
class LoadFlags:
    """How a model is loaded."""

    adapter_path: str | None = flag(None, "LoRA adapter to put on the model.", reads="model")
    dtype: str = flag(
        "auto",
        "Of the weights; auto: as saved.",
        choices=["auto", "float32", "bfloat16", "float16", "float64"],
    )
    attn_implementation: str | None = flag(None, "Attention kernel by transformers' name.")


@dataclass(kw_only=True)
class ModelFlags(LoadFlags, MaskTokenFlag):
    """The model that answers."""

    model_name_or_path: str = flag(
        help="Checkpoint or run folder, LoRA adapter folder, or hub name.", reads="model"
    )
    device: str | None = flag(None, "cpu, cuda, ...; default the GPU of this process, else the CPU.")

    def to_load(self) -> dict[str, Any]:
        """What `load_for_inference` takes from the flags, but for the device."""
        return {
            "path": self.model_name_or_path,
            **{name: getattr(self, name) for name in ("adapter_path", "dtype", "attn_implementation")},
            "mask_token_id": self.mask_token_id,
        }


def sampler_settings(flags: SamplerFlags) -> "LLaDAGenerationConfig":
    """The sampler's settings among a script's flags, checked."""
    from modelling_final import LLaDAGenerationConfig  # loads torch, which the flags themselves do without

    names = [name for name in LLaDAGenerationConfig().to_dict() if hasattr(flags, name)]
    return LLaDAGenerationConfig(**{name: getattr(flags, name) for name in names} | flags.blocks())
