"""What watches a run: a loss that is not finite, and a loss that jumps."""

import math
from dataclasses import asdict, dataclass

import torch.distributed as dist

MAX_SKIPPED_IN_A_ROW = 10  # then it is not a batch that is broken, but the weights


def gather_records(record_ids: list[int]) -> list[int]:
    """The records of all ranks, sorted, each once; every rank must call it."""
    if dist.is_initialized():
        parts: list[list[int]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(parts, record_ids)
        record_ids = [record for part in parts for record in part]
    return sorted(set(record_ids))


@dataclass
class LossWatch:
    """Notices a loss far above those before it.

    Mean and variance are exponential averages over about 1 / (1 - decay) steps. A loss counts as a spike when
    it is more than `sigmas` standard deviations above the mean, once `warmup` losses are known; a spike moves
    the averages as any other loss does, so a run that settles higher stops complaining.

    Attributes:
        sigmas: 0 = never.
    """

    sigmas: float
    mean: float = 0.0
    variance: float = 0.0
    num_losses: int = 0
    decay: float = 0.98
    warmup: int = 50

    def note(self, loss: float) -> float | None:
        """The loss's distance above the mean in standard deviations if it is a spike, else None."""
        if not math.isfinite(loss):
            return None
        excess = loss - self.mean
        deviation = math.sqrt(self.variance)
        is_known = self.sigmas > 0 and self.num_losses >= self.warmup and deviation > 0
        distance = excess / deviation if is_known else 0.0
        # the plain average at first, so that the start value is forgotten at once
        share = max(1 - self.decay, 1 / (self.num_losses + 1))
        self.mean += share * excess
        self.variance = (1 - share) * (self.variance + share * excess**2)
        self.num_losses += 1
        return distance if is_known and distance > self.sigmas else None

    def state(self) -> dict[str, float]:
        """What a resumed run needs to go on watching."""
        state = asdict(self)
        return {name: state[name] for name in ("mean", "variance", "num_losses")}
