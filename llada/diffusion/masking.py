"""The forward process: which tokens of a record are masked, and what they weigh in the loss.

Drawn on the CPU from a key and never from global state: a draw is a pure function of (seed, record id, epoch,
piece), so it is the same on any device, at any world size, for any split of the batch, and after a resume.

Shapes: L positions of one record, n of them maskable, l masked. Symbols as in LLaDA (arXiv 2502.09992):
x_0 clean, x_t noised, t the time, p_mask = (1 - eps) t + eps the probability that a token is masked.
"""

import hashlib
import math
from dataclasses import dataclass
from typing import Any

import numpy as np

EPS = 1e-3  # LLaDA GUIDELINES.md: keeps the weight 1 / p_mask finite


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A counter-based random generator that is a pure function of the seed and the key.

    `key`: what the draw belongs to, for example ("mask", record_id, epoch, draw). Strings name the purpose,
    so that two purposes never share a stream.
    """
    # a hash, not a sum: neighbouring keys must have unrelated streams
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


@dataclass(frozen=True)
class Stratum:
    """The part of (0, 1) that a time is drawn from: one of `number` equal parts, turned by `offset`."""

    index: int = 0
    number: int = 1
    offset: float = 0.0

    def time(self, u: float) -> float:
        """t in (0, 1) from one uniform number."""
        return (self.offset + (self.index + u) / self.number) % 1.0


def draw_noise(
    maskable: np.ndarray,
    weight: float,
    random: np.random.Generator,
    *,
    stratum: Stratum = Stratum(),
    t_range: tuple[float, float] = (0.0, 1.0),
    mask_count: str = "bernoulli",
) -> tuple[np.ndarray, float]:
    """(is_masked [L], what each masked token weighs in the loss) of one record; made nowhere else.

        -log p(x_0) <= E_{t ~ U(0,1)} E_{x_t} sum_{i masked} (1 / t) -log p(x_0^i | x_t)          (eq. 3)
                     = E_{l ~ U{1..n}} E_{x_l} sum_{i masked} (n / l) -log p(x_0^i | x_l)          (eq. 6)

    bernoulli   each maskable token is masked with p_mask = (1 - eps) t + eps and weighs w / p_mask
    exact       exactly l = ceil(t n) of them are, and weigh w n / l: the same expectation, less variance

    Args:
        maskable: [L] bool.
        weight: w of the record: 1 in pretraining, 1 / answer length in SFT.
        random: draws t first, then the mask.
        t_range: t is scaled into it, for a curriculum or for blocks; the bound needs all of (0, 1).

    Source: LLaDA eq. 3 and 6; GUIDELINES.md, forward_process.
    """
    low, high = t_range
    t = low + (high - low) * stratum.time(random.random())
    if mask_count == "exact":
        num_maskable = int(maskable.sum())
        num_masked = max(1, math.ceil(t * num_maskable))
        return exact_mask(maskable, num_masked, random), weight * num_maskable / num_masked
    p_mask = mask_probability(t)
    # not w / t: p_mask is what tokens were masked with, so the estimate stays unbiased at every t
    return bernoulli_mask(maskable, p_mask, random), weight / p_mask


def draw_block_noise(
    maskable: np.ndarray, weight: float, random: np.random.Generator, *, block_size: int, **law: Any
) -> tuple[np.ndarray, np.ndarray]:
    """(is_masked [L], weight of each token [L]): every block of `block_size` tokens by a time of its own.

        -log p(x_0) = - sum_k log p(block k | blocks before it), and each term is bounded as in `draw_noise`

    Blocks are counted from the record's first token, as attention counts them. `law`: of `draw_noise`.

    Source: BD3LM, arXiv 2503.09573, eq. 8.
    """
    is_masked, weights = np.zeros(len(maskable), dtype=bool), np.zeros(len(maskable))
    for start in range(0, len(maskable), block_size):
        block = slice(start, start + block_size)
        if maskable[block].any():
            is_masked[block], weights[block] = draw_noise(maskable[block], weight, random, **law)
    return is_masked, weights


def mask_probability(t: float, eps: float = EPS) -> float:
    """p_mask = (1 - eps) t + eps. Source: LLaDA GUIDELINES.md, forward_process."""
    return (1.0 - eps) * t + eps


def bernoulli_mask(maskable: np.ndarray, p_mask: float, random: np.random.Generator) -> np.ndarray:
    """is_masked [L]: each maskable token independently with probability p_mask; the others never."""
    # a number for every position, maskable or not: position i gets the same whatever stands around it
    return maskable & (random.random(maskable.shape[0]) < p_mask)


def exact_mask(maskable: np.ndarray, num_masked: int, random: np.random.Generator) -> np.ndarray:
    """is_masked [L]: exactly `num_masked` maskable tokens, uniformly among such sets; else ValueError."""
    candidates = np.flatnonzero(maskable)
    if not 0 <= num_masked <= len(candidates):
        raise ValueError(f"cannot mask {num_masked} of {len(candidates)} maskable tokens")
    is_masked = np.zeros(maskable.shape[0], dtype=bool)
    is_masked[random.choice(candidates, size=num_masked, replace=False)] = True
    return is_masked


def permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
    """The order of the records in one epoch: [num_records] int64, a pure function of (seed, epoch)."""
    return generator(seed, "order", epoch).permutation(num_records)
