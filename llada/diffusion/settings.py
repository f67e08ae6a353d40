"""Settings and names of the method. Nothing slow is imported: flags take their choices from here."""

from dataclasses import dataclass

ESTIMATORS = ("stratified", "iid", "complementary", "reference", "gauss")
SIZE_LAWS = ("uniform", "inv_sqrt")
EXACT_TOKENS = 7  # 2^7 - 1 = 127 forwards: no more than the 128 draws of the published evaluations
LIKELIHOODS = ("elbo", "l2r", "policy")
DPO_LOSSES = ("sigmoid", "hinge", "ipo", "sft")
Z0_MODES = ("zero", "global_mean", "loo_mean", "ema", "kl_mismatched")


@dataclass(frozen=True)
class MaskSettings:
    """How many masks an answer gets, and by which law: for evaluation, DPO, KTO and GRPO alike.

    Attributes:
        num_masks: N. Enumeration decides N itself; it is used by `stratified` when T <= exact_tokens or when
            all 2^T - 1 masks fit in N.
        estimator: `stratified` spreads the mask sizes evenly and lets each token be masked equally often;
            `iid` draws every size and mask on its own (VRPO, ELBO-KTO); `complementary` draws pairs M, not M
            (ESPO); `reference` is LLaDA's published get_log_likelihood, whose sizes are biased; `gauss` has
            one mask at each Gauss-Legendre node of t (GDPO): little noise, some bias.
        size_law: `uniform`, or `inv_sqrt`: sizes drawn with probability proportional to l^-1/2, which lowers
            the variance of gradients; for `iid` and `stratified`.
        exact_tokens: longest answer whose masks are always enumerated; 0 to enumerate only what fits.
        reference_batch: the published code's batch size, on which its bias depends.

    Raises:
        ValueError: an unknown name, or a law that does not go with the estimator.
    """

    num_masks: int = 128
    estimator: str = "stratified"
    size_law: str = "uniform"
    exact_tokens: int = EXACT_TOKENS
    reference_batch: int = 8

    def __post_init__(self) -> None:
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator {self.estimator!r} is not one of {', '.join(ESTIMATORS)}")
        has_law = self.estimator in ("iid", "stratified")
        if self.size_law not in SIZE_LAWS or (self.size_law != "uniform" and not has_law):
            raise ValueError(
                f"size_law {self.size_law!r}: 'uniform', or 'inv_sqrt' with the iid or stratified estimator"
            )


@dataclass(frozen=True)
class LikelihoodSettings:
    """What is computed of an answer, and how.

    Attributes:
        kind: `elbo`, `l2r` or `policy`.
        masks: for `elbo`.
        seed: masks are a pure function of (seed, key of the request), in any order, batch and world size.
        batch_size: sequences per forward; None: 32, on a CPU as many as make some 768 tokens.
        cfg_scale: classifier-free guidance w: logits l_u + (1 + w)(l_c - l_u), the context masked in l_u;
            twice the cost.
    """

    kind: str = "elbo"
    masks: MaskSettings = MaskSettings()
    seed: int = 0
    batch_size: int | None = None
    cfg_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in LIKELIHOODS:
            raise ValueError(f"likelihood {self.kind!r} is not one of {', '.join(LIKELIHOODS)}")
