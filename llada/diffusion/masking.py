"""The forward process: which tokens are masked, drawn on the CPU from a key and never from global state.

A draw is a pure function of (seed, record id, epoch, draw), so it is the same on any device, at any world
size,
for any split of the batch, and after a resume.

Shapes: L positions of one record. Symbols as in LLaDA (arXiv 2502.09992): x_0 clean, x_t noised, t the time,
p_mask = (1 - eps) t + eps the probability that a token is masked.
"""

import hashlib

import numpy as np

EPS = 1e-3  # LLaDA GUIDELINES.md: keeps the weight 1 / p_mask finite


def generator(seed: int, *key: int | str) -> np.random.Generator:
    """A counter-based random generator that is a pure function of the seed and the key.

    Args:
        seed: the run's --seed.
        key: what the draw belongs to, for example ("mask", record_id, epoch, draw). Strings name the purpose,
            so that two purposes never share a stream.
    """
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype=np.uint64)))


def mask_probability(t: float, eps: float = EPS) -> float:
    """p_mask = (1 - eps) t + eps. Source: LLaDA GUIDELINES.md, forward_process."""
    return (1.0 - eps) * t + eps


def bernoulli_mask(maskable: np.ndarray, p_mask: float, random: np.random.Generator) -> np.ndarray:
    """is_masked [L]: each maskable token independently with probability p_mask; the others never.

    One uniform number is drawn for every position, maskable or not, so position i gets the same number
    whatever stands around it.
    """
    return maskable & (random.random(maskable.shape[0]) < p_mask)


def exact_mask(maskable: np.ndarray, num_masked: int, random: np.random.Generator) -> np.ndarray:
    """is_masked [L] with exactly `num_masked` of the maskable tokens, uniformly among such sets.

    Raises:
        ValueError: if there are fewer than `num_masked` maskable tokens.
    """
    candidates = np.flatnonzero(maskable)
    if not 0 <= num_masked <= len(candidates):
        raise ValueError(f"cannot mask {num_masked} of {len(candidates)} maskable tokens")
    is_masked = np.zeros(maskable.shape[0], dtype=bool)
    is_masked[random.choice(candidates, size=num_masked, replace=False)] = True
    return is_masked


def permutation(seed: int, epoch: int, num_records: int) -> np.ndarray:
    """The order of the records in one epoch: [num_records] int64, a pure function of (seed, epoch)."""
    return generator(seed, "order", epoch).permutation(num_records)
