"""Direct preference optimisation of a masked diffusion language model (DPO, as VRPO estimates it).

Each answer's log-likelihood is the any-order bound, estimated from --num_masks masks that policy and
reference share; the average over masks is inside the sigmoid. Gradients take the memory of one mask, however
many there are.

Run:
    python rlhf/train_dpo.py --model_name_or_path runs/sft --train_data_path pairs.jsonl \\
        --output_dir runs/dpo --beta 0.2 --learning_rate 5e-7 --batch_size 64 \\
        --loss_type sigmoid sft --loss_weights 1.0 0.05

    # LoRA on 8 GPUs: the reference is the same model with its adapters switched off
    torchrun --nproc_per_node 8 rlhf/train_dpo.py --model_name_or_path GSAI-ML/LLaDA-8B-Instruct \\
        --train_data_path pairs.jsonl --output_dir runs/dpo --use_lora --beta 0.2 --learning_rate 5e-5 \\
        --batch_size 64 --micro_batch_size 2

Records: prompt, chosen, rejected, as texts or messages (data/README.md). The same command continues an
interrupted run. How to choose the masks and the loss: docs/preference_optimization.md.
"""

from dataclasses import dataclass
from functools import partial

from llada.diffusion.settings import DPO_LOSSES
from llada.flags.parser import check_command_line, flag, parse, run_main
from llada.flags.recipes import RecipeFlags
from llada.policies.config import PairConfig, ReferenceFlags
from llada.training.config import finished_before


@dataclass(kw_only=True)
class Config(ReferenceFlags, RecipeFlags, PairConfig):
    """DPO."""

    stage = "rlhf/train_dpo.py"

    beta: float = flag(0.1, "Strength of the tie to the reference.", above=0)
    loss_type: list[str] = flag(
        ["sigmoid"],
        "Terms of the loss; sft is the chosen answer's own loss.",
        choices=DPO_LOSSES,
    )
    loss_weights: list[float] | None = flag(None, "Weight of each --loss_type; default 1.", at_least=0)
    label_smoothing: float = flag(
        0.0,
        "Probability that a preference is the wrong way round.",
        at_least=0,
        below=0.5,
        needs="loss_type=sigmoid",
    )
    rpo_alpha: float = flag(0.0, "Adds the sft term with this weight.", at_least=0)
    precompute_ref_log_probs: bool = flag(
        False, "Score the data under the reference once, under masks that all epochs share, and drop it."
    )

    def terms(self) -> tuple[list[str], list[float]]:
        """Losses and weights, --rpo_alpha's included."""
        names, weights = self.loss_type, self.loss_weights or [1.0] * len(self.loss_type)
        return ([*names, "sft"], [*weights, self.rpo_alpha]) if self.rpo_alpha else (names, weights)

    def check_flags(self) -> None:
        """One weight a loss."""
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(
                f"--loss_weights {self.loss_weights}: give one for each of --loss_type {self.loss_type}"
            )


if __name__ == "__main__":
    check_command_line(Config, __doc__, answer=finished_before)

from torch import Tensor

from llada.diffusion.preference_losses import dpo_losses
from llada.policies.pairs import PairBounds, train_on_pairs


def dpo(config: Config, pairs: PairBounds) -> tuple[Tensor, Tensor]:
    """([P] losses, [P, 2] rewards beta (B - B_ref))."""
    loss_types, loss_weights = config.terms()
    losses = dpo_losses(
        *pairs,
        beta=config.beta,
        loss_types=loss_types,
        loss_weights=loss_weights,
        label_smoothing=config.label_smoothing,
    )
    return losses, config.beta * (pairs.policy - pairs.reference)


def main(argv: list[str] | None = None) -> None:
    """Runs DPO with the given flags."""
    config = parse(Config, argv, description=__doc__)
    reference = "stored" if config.precompute_ref_log_probs else "live"
    train_on_pairs(config, partial(dpo, config), reference=reference)


if __name__ == "__main__":
    run_main(main)
