"""Flags of GRPO in three groups, each read by one module: likelihood, surrogate, groups of completions."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from llada.diffusion.settings import ESTIMATORS, SIZE_LAWS
from llada.flags.declaration import flag, own_names
from llada.policies.config import PolicyConfig, ReferenceFlags

if TYPE_CHECKING:
    from modelling_final import LLaDAGenerationConfig  # imports torch

LIKELIHOODS = ("elbo", "trajectory", "diffu", "coupled")
MASK_PLANS = (*ESTIMATORS, "ratio", "block")
BASELINES = ("group_mean", "leave_one_out", "softmax")
SCALES = ("group", "batch", "none")
LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "sequence", "token", "sum")


@dataclass(kw_only=True)
class LikelihoodFlags:
    """The log-likelihood that is raised, and its terms (likelihood_terms.py, term_builder.py)."""

    likelihood: str = flag("elbo", "The likelihood that is raised.", choices=LIKELIHOODS)
    ratio_level: str = flag(
        "auto",
        help="What has a ratio of its own: the completion, each mask (or pair), each token, each step. auto: "
        "elbo completion, trajectory step, diffu and coupled token.",
        choices=["auto", "completion", "mask", "token", "step"],
    )
    num_masks: int = flag(2, "Masks per completion (K).", at_least=1, needs="likelihood=elbo|coupled")
    mask_plan: str = flag(
        "stratified",
        help="elbo: sizes spread evenly, drawn independently, complementary pairs (ESPO), Gauss-Legendre "
        "nodes (GDPO), one ratio that grows over the --num_iterations (UniGRPO), within a block (SPG), or as "
        "in LLaDA's published likelihood.",
        choices=MASK_PLANS,
        needs="likelihood=elbo",
    )
    mask_weights: str = flag(
        "bound",
        help="elbo: weigh masks so that their sum is the bound, or all alike.",
        choices=["bound", "none"],
        needs="likelihood=elbo",
    )
    redraw_masks: bool = flag(
        False,
        help="New masks for each of the --num_iterations; old, new and reference share them.",
        needs="likelihood=elbo|diffu|coupled",
    )
    group_masks: bool = flag(True, help="The completions of a prompt share their masks.")
    size_law: str = flag(
        "inv_sqrt",
        help="elbo: law of the mask sizes of stratified and iid; inv_sqrt has less noise.",
        choices=SIZE_LAWS,
        needs="likelihood=elbo",
    )
    eos: str = flag(
        "one",
        help="elbo, diffu, coupled: what follows the end token that was sampled: nothing; EOS that count, up "
        "to the end of the canvas, for models trained with --eos_padding; masks that do not count (tail); or "
        "what was sampled there, which counts (canvas; with --early_stop false).",
        choices=["one", "filled", "tail", "canvas"],
        needs="likelihood=elbo|diffu|coupled",
    )
    trajectory_steps: int = flag(
        0,
        help="trajectory: score so many random steps of a completion, weighted up; 0 = all.",
        at_least=0,
        needs="likelihood=trajectory",
    )
    trajectory_shrink: int = flag(
        1,
        help="trajectory: score so many neighbouring steps as one, from the first one's state.",
        at_least=1,
        needs="likelihood=trajectory",
    )
    order_term: bool = flag(
        True,
        help="trajectory: count which positions were decided, not only the tokens.",
        needs="likelihood=trajectory",
    )
    p_mask_prompt: float = flag(
        0.15,
        help="diffu: share of the prompt that is masked; --mask_plan block: of all before the block.",
        at_least=0, at_most=1, needs="likelihood=diffu or mask_plan=block")  # fmt: skip

    @property
    def level(self) -> str:
        """--ratio_level, as auto decides it."""
        own = {"elbo": "completion", "trajectory": "step"}.get(self.likelihood, "token")
        return own if self.ratio_level == "auto" else self.ratio_level

    def check_likelihood(self, settings: "LLaDAGenerationConfig") -> None:
        """ValueError for parts that do not go together. `settings`: of the sampler."""
        levels = {"elbo": ("completion", "mask", "token"), "trajectory": ("step", "token")}
        if self.level not in levels.get(self.likelihood, ("token",)):
            raise ValueError(f"--ratio_level {self.level}: --likelihood {self.likelihood} has no such terms")
        by_tokens = self.level == "token" or self.trajectory_shrink > 1
        if self.likelihood == "trajectory" and by_tokens and self.order_term:
            raise ValueError(
                "--ratio_level token, --trajectory_shrink: the order of decisions belongs to whole steps; "
                "give --order_term false"
            )
        blocks = -(-settings.gen_length // settings.block_of(settings.gen_length))
        if self.mask_plan == "block" and self.num_masks > blocks:
            raise ValueError(
                f"--mask_plan block: {self.num_masks} masks, each in another block, of which "
                f"--gen_length and --block_length make {blocks}"
            )
        if self.eos == "canvas" and settings.early_stop:
            raise ValueError("--eos canvas: an answer is sampled to its end only with --early_stop false")


@dataclass(kw_only=True)
class SurrogateFlags:
    """The loss of a term (grpo.py)."""

    surrogate: str = flag(
        "clip",
        help="PPO's clipped ratio; the log-likelihood itself, without ratio and clip (linear); or the "
        "squared distance of the log-ratio per token from --squared_target x advantage (GDSD).",
        choices=["clip", "linear", "squared"],
    )
    squared_target: float = flag(10.0, help="squared: psi.", above=0, needs="surrogate=squared")
    eubo_weight: float = flag(
        0.0,
        help="elbo, linear: advantages below 0 push down this share of an upper bound (SPG), and the rest of "
        "the lower one.",
        at_least=0, at_most=1, needs="surrogate=linear")  # fmt: skip
    eubo_beta: float = flag(1.5, help="Exponent of the upper bound.", above=0, needs="eubo_weight")
    beta: float = flag(0.0, help="Weight of the KL; 0: no reference is loaded.", at_least=0)
    kl_estimator: str = flag(
        "k2",
        help="Of d = log pi - log pi_ref: d; d^2 / 2, whose gradient on policy is that of the KL; or "
        "exp(-d) - 1 + d.",
        choices=["k1", "k2", "k3"],
        needs="beta",
    )
    kl_to: str = flag(
        "reference", help="The KL's other policy: the reference, or the one that sampled.",
        choices=["reference", "old"], needs="beta")  # fmt: skip
    epsilon: float = flag(
        0.2,
        help="Ratios count up to 1 + epsilon, and down to 1 - epsilon.",
        at_least=0,
        needs="surrogate=clip|squared",
    )
    epsilon_high: float | None = flag(
        None, help="The upper limit's own value; default epsilon.", at_least=0, needs="surrogate=clip|squared"
    )
    nll_weight: float = flag(
        0.0,
        help="Weight of -log pi per token of the completions whose first reward is at least 1, as "
        "--loss_type has it, among themselves (LightningRL).",
        at_least=0,
    )
    loss_type: str = flag(
        "grpo",
        help="Mean over completions (grpo), over all terms of the global batch (dapo, bnpo), or sum over "
        "terms / --gen_length (dr_grpo). By tokens, whatever a term is: mean over completions of the mean "
        "over tokens (sequence), mean over all tokens (token), mean over completions of the sum (sum).",
        choices=LOSS_TYPES,
    )
    count_zero_advantages: bool = flag(True, help="Completions without an advantage count in these means.")


@dataclass(kw_only=True)
class GroupFlags:
    """Groups of completions, and what each is worth (rollouts.py)."""

    num_generations: int = flag(8, "Completions per prompt (G).", at_least=2)
    rollout_batch_size: int = flag(256, "Sequences sampled together on a device.", at_least=1)
    num_iterations: int = flag(1, "Steps that learn from the same completions (mu).", at_least=1)
    multi_objective_aggregation: str = flag(
        "sum_then_normalize",
        help="Add the rewards, then compare them in their group as --advantages and --scale_rewards say; or "
        "make each a z-score in its group, and their weighted sum one in the batch.",
        choices=["sum_then_normalize", "normalize_then_sum"],
    )
    scale_rewards: str = flag(
        "none",
        help="Divide advantages by the standard deviation of the group, of the batch, or not.",
        choices=[*SCALES, "true", "false"],
        needs="multi_objective_aggregation=sum_then_normalize",
    )
    advantages: str = flag(
        "leave_one_out",
        help="What a reward is compared with in its group; softmax: softmax of the centred rewards less that "
        "of their negatives, times G (wd1).",
        choices=BASELINES,
        needs="multi_objective_aggregation=sum_then_normalize",
    )
    group_accuracy: list[float] = flag(
        [0.0, 1.0],
        help="Learn only from groups whose mean first reward is between these two.",
        at_least=0,
        at_most=1,
    )
    negative_weight: float = flag(
        1.0,
        help="Factor of advantages below 0. elbo pushes a bad answer down under masks that never led to it, "
        "which can harm a good model: then give less; 0 learns from what beat its group alone.",
        at_least=0,
    )
    max_dead_steps: int = flag(
        10,
        help="Stop after so many steps in a row in which no completion has a reward; 0 = never.",
        at_least=0,
    )
    log_completions: bool = flag(True, help="Write every completion to completions.jsonl.")

    def check_flags(self) -> None:
        """TRL's older values of --scale_rewards, and the order of --group_accuracy."""
        self.scale_rewards = {"true": "group", "false": "none"}.get(self.scale_rewards, self.scale_rewards)
        if len(self.group_accuracy) != 2 or self.group_accuracy[0] > self.group_accuracy[1]:
            raise ValueError(f"--group_accuracy {self.group_accuracy}: give two numbers, the lower first")


@dataclass(kw_only=True)
class GrpoConfig(GroupFlags, SurrogateFlags, LikelihoodFlags, ReferenceFlags, PolicyConfig):
    """A run of GRPO, but for the flags of the sampler and the rewards."""

    default_batch_size = 128

    ref_model_name_or_path: str | None = flag(None, needs="beta")
    # of the sampler's own steps there is one likelihood for every model
    objective: str = flag("masked_diffusion", needs="likelihood=elbo")

    def check_flags(self) -> None:
        """What has no form by blocks."""
        if self.objective == "block_diffusion" and (self.mask_plan == "block" or self.eubo_weight):
            what = "eubo_weight: SPG's bound" if self.eubo_weight else "mask_plan block: SPG's masks"
            raise ValueError(f"--{what} of a whole answer; it has no form with --objective block_diffusion")

    def agreed(self) -> dict[str, Any]:
        """With the flags of these groups: other terms, another loss, other advantages are another run."""
        free = ("rollout_batch_size", "max_dead_steps", "log_completions")
        groups = (LikelihoodFlags, SurrogateFlags, GroupFlags)
        names = [name for group in groups for name in own_names(group) if name not in free]
        return super().agreed() | {name: getattr(self, name) for name in names}
