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

        stratified     spreads the mask sizes evenly, masks each token equally often, enumerates short answers
        iid            draws every size and mask on its own (VRPO, ELBO-KTO)
        complementary  draws pairs M, not M (ESPO)
        reference      LLaDA's published get_log_likelihood, whose sizes are biased
        gauss          one mask at each Gauss-Legendre node of t (GDPO): little noise, some bias

    ValueError: an unknown name, or a law that does not go with the estimator.
    """

    num_masks: int = 128  # N; enumeration decides N itself
    estimator: str = "stratified"
    size_law: str = "uniform"  # or inv_sqrt: sizes l with probability ~ l^-1/2, gradients of less variance
    # longest answer whose masks are always enumerated; 0: only what fits in N
    exact_tokens: int = EXACT_TOKENS
    reference_batch: int = 8  # the published code's batch size, on which its bias depends

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
    """What is computed of an answer, and how."""

    kind: str = "elbo"  # elbo, l2r or policy
    masks: MaskSettings = MaskSettings()  # for elbo
    seed: int = 0  # masks follow from it and the request's key, in any order, batch and world size
    batch_size: int | None = None  # sequences per forward; None: 32, on a CPU as many as make some 768 tokens
    # classifier-free guidance w: logits l_u + (1 + w)(l_c - l_u), the context masked in l_u; twice the cost
    cfg_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in LIKELIHOODS:
            raise ValueError(f"likelihood {self.kind!r} is not one of {', '.join(LIKELIHOODS)}")
