"""Flags that DPO, KTO and GRPO share: the policy, its reference, the estimator of likelihoods."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from llada.data.flags import AnswerFlags, PairFlags
from llada.diffusion.settings import ESTIMATORS, SIZE_LAWS
from llada.flags.declaration import flag
from llada.models.flags import MaskTokenFlag
from llada.training.config import BlockFlags, LoraFlags, PrefetchFlags, ScaleFlags, TrainConfig

if TYPE_CHECKING:
    from llada.run import Run  # imports torch


@dataclass(kw_only=True)
class ReferenceFlags:
    """Flags of the stages whose loss compares the policy with a reference."""

    ref_model_name_or_path: str | None = flag(
        None,
        help="Checkpoint of the reference; default the policy as it starts (with fresh LoRA adapters these "
        "are switched off, otherwise a second copy is loaded).",
        reads="model",
    )


@dataclass(kw_only=True)
class PolicyConfig(BlockFlags, LoraFlags, ScaleFlags, TrainConfig, MaskTokenFlag):
    """A run that trains a policy."""

    default_batch_size = 8

    model_name_or_path: str = flag(help="Checkpoint that the policy starts from.", reads="model")
    sft_adapter_path: str | None = flag(
        None, "LoRA adapter on it; training continues this adapter.", reads="model"
    )
    num_masks: int = flag(8, "Masks per answer and step (K).", at_least=1, fixed=True)
    learning_rate: float = 1e-6
    max_samples: int | None = flag(None, "Only the first so many training records.", at_least=1)
    batch_size: int | None = flag(None, "Records per optimizer step, over all ranks; default 8.")
    micro_batch_size: int | None = flag(
        None, "Records per forward on a device, rest accumulated; default --batch_size / ranks."
    )

    def settle(self, run: "Run") -> None:
        """Fills what depends on the device."""
        self.settle_dtype(run.device.type)


@dataclass(kw_only=True)
class PairConfig(PairFlags, AnswerFlags, PrefetchFlags, PolicyConfig):
    """A run on pairs of answers; see llada/policies/pairs.py."""

    train_data_path: list[str] = flag(help="Files of preference pairs.", reads="path")
    eval_data_path: list[str] | None = flag(
        None, "Pairs for validation: loss, accuracy and margin.", reads="path"
    )

    mask_plan: str = flag(
        "stratified",
        "How masks are drawn: sizes spread evenly, independently (VRPO), or in complementary pairs.",
        choices=ESTIMATORS[:3],
        fixed=True,
    )
    size_law: str = flag(
        "auto",
        "Law of the mask sizes: uniform, or small ones more often (inv_sqrt), with less noise, which is the "
        "default of --mask_plan stratified.",
        choices=["auto", *SIZE_LAWS],
        fixed=True,
    )

    def check_flags(self) -> None:
        """The default of --size_law."""
        if self.size_law == "auto":
            self.size_law = "inv_sqrt" if self.mask_plan == "stratified" else "uniform"

    def agreed(self) -> dict[str, Any]:
        """With the flags that a stage declares itself: they are its loss."""
        shared = {field.name for field in fields(PairConfig)}
        own = [field.name for field in fields(self) if field.name not in shared]
        return super().agreed() | {name: getattr(self, name) for name in own}
