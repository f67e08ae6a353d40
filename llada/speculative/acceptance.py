"""Which drafted tokens stay, such that the output has exactly the verifier's distribution.

K chains drafted for the same place, G tokens of a chain (chains may differ in length), V vocabulary of the
verifier, n tokens accepted.

p_k is the verifier's distribution after x_<k with everything applied to it (temperature, top-p, ...); q_k the
one that token k of a draft was really drawn from. `by_token` and `by_block` need q_k to depend on nothing to
the right of k: true for drafts from one forward and for drafts made left to right, not for drafts in order of
confidence. `by_match` needs nothing of the draft.

Randomness comes in as a `Draws`; tests hand in one that walks through all outcomes.
"""

import hashlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from llada.diffusion.masking import generator

# What is certain costs no random number. Rounding must not decide what is: every later draw would be another.
SURE = 1 - 1e-9


class Draws(Protocol):
    """Where random decisions come from."""

    def accept(self, probability: float) -> bool:
        """True with this probability."""

    def choose(self, weights: Tensor) -> list[int]:
        """For each row of weights [R, V] an index drawn in proportion to it, independent of all else."""

    def choose_at(self, positions: Sequence[int], weights: Tensor) -> list[int]:
        """The same for rows that belong to output positions; calls for one position may share their noise."""


class KeyedDraws:
    """Draws that are a pure function of the seed, the record and the purpose."""

    def __init__(self, seed: int, record_id: int, purpose: str) -> None:
        self._stream = generator(seed, "speculative", record_id, purpose)
        digest = hashlib.blake2b(repr((seed, "positions", record_id)).encode(), digest_size=8).digest()
        self._key = int.from_bytes(digest, "little", signed=True)

    def accept(self, probability: float) -> bool:
        return bool(self._stream.random() < probability)

    def choose(self, weights: Tensor) -> list[int]:
        uniforms = torch.from_numpy(self._stream.random((len(weights), 1))).to(weights.device)
        cumulative = weights.double().cumsum(dim=-1)
        total = cumulative[:, -1:].contiguous()
        chosen = torch.searchsorted(cumulative, uniforms * total, right=True)
        last = torch.searchsorted(cumulative, total)  # nothing beyond it has any weight
        return torch.minimum(chosen, last)[:, 0].tolist()

    def choose_at(self, positions: Sequence[int], weights: Tensor) -> list[int]:
        # argmax_v w_v / E_v with noise of (seed, record, position, token) alone: a drafter and a verifier
        # with the same key tend to the same token, and what the verifier chooses does not depend on the
        # drafter at all. Source: Gumbel-max with common random numbers, Daliri et al., arXiv 2408.07978.
        return self.noisy(positions, weights).argmax(dim=-1).tolist()

    def noisy(self, positions: Sequence[int], weights: Tensor) -> Tensor:
        """w_v / E_v [R, V] float64, the largest of which is chosen."""
        rows = torch.tensor(positions, dtype=torch.long, device=weights.device)
        columns = torch.arange(weights.shape[-1], device=weights.device)
        bits = _mix(_mix(self._key + rows * _STEP)[:, None] + columns * _STEP)
        uniforms = ((bits >> 11) & (2**53 - 1)).double() * 2.0**-53 + 2.0**-54  # in (0, 1)
        return weights.double() / -uniforms.log()


class GreedyDraws:
    """Temperature 0: always the largest weight (scores will do as weights)."""

    def accept(self, probability: float) -> bool:
        raise AssertionError("temperature 0 accepts by match, which asks for no coin")

    def choose(self, weights: Tensor) -> list[int]:
        return weights.argmax(dim=-1).tolist()

    def choose_at(self, positions: Sequence[int], weights: Tensor) -> list[int]:
        return self.choose(weights)


# splitmix64 (Steele et al. 2014), as signed 64-bit numbers, whose products wrap around on every device
_STEP, _FIRST, _SECOND = -0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15


def _mix(z: Tensor) -> Tensor:
    z = (z ^ ((z >> 30) & (2**34 - 1))) * _FIRST  # torch shifts signed numbers: the mask takes the sign away
    z = (z ^ ((z >> 27) & (2**37 - 1))) * _SECOND
    return z ^ ((z >> 31) & (2**33 - 1))


class Accepted(NamedTuple):
    """The first `num` tokens of chain `chain` stay, and `token` comes after them."""

    chain: int
    num: int
    token: int


def by_match(chains: list[list[int]], p: Tensor, draws: Draws, position: int) -> Accepted:
    """The verifier draws y_k ~ p_k by itself; drafted tokens stay as long as some chain has just these.

    The output is the verifier's own draw, whatever the chains are and however they were made.

    Args:
        p: [K, at least G + 1, V] weights after each prefix of each chain.
        position: number of the first drafted token in the output, the key of its noise.
    """
    drawn: dict[int, list[int]] = {}
    # the verifier's draw is one for all chains: it never depends on which of them it is compared with
    alive, num = list(range(len(chains))), 0
    while True:
        lead = alive[0]
        if lead not in drawn:
            rows = p[lead, num : len(chains[lead]) + 1]
            drawn[lead] = [-1] * num + draws.choose_at(
                range(position + num, position + num + len(rows)), rows
            )
        token = drawn[lead][num]
        matching = [j for j in alive if len(chains[j]) > num and chains[j][num] == token]
        if not matching:
            return Accepted(lead, num, token)
        alive, num = matching, num + 1


def by_token(chains: list[list[int]], q: Tensor, p: Tensor, draws: Draws) -> Accepted:
    """Speculative sampling token by token, with K chains that try in turn at each position.

        r_1 = p_k;   accept x_j with probability min(1, r_j(x_j) / q_k(x_j)),
        else r_{j+1} = norm((r_j - q_k)_+);   if all chains fail, the token is drawn from the last r.

    Args:
        chains: K lists of token ids, chain j's k-th token drawn from q[j, k].
        q: [K, at least G, V] probabilities.
        p: [K, at least G + 1, V] probabilities after each prefix of each chain.

    Source: K = 1: Leviathan et al., arXiv 2211.17192. K > 1: SpecInfer, arXiv 2305.09781, algorithm 2.
    """
    ratios = _ratios(chains, q, p)
    alive, num = list(range(len(chains))), 0
    while len(chains[alive[0]]) > num:  # equal prefixes have equal lengths: length goes by q, not by luck
        lead, accepted, residual = alive[0], None, None
        # chains that share the tokens accepted so far have the same q_k and independent k-th tokens: these
        # try
        for chain in alive:
            token = chains[chain][num]
            if residual is None:
                probability = ratios[lead][num]
            else:
                probability = float(residual[token] / q[lead, num, token])
            if probability >= SURE or draws.accept(probability):
                accepted = token
                break
            before = p[lead, num] if residual is None else residual
            residual = _residual(before, q[lead, num])
        if accepted is None:
            return Accepted(lead, num, draws.choose(residual[None])[0])
        alive, num = [j for j in alive if chains[j][num] == accepted], num + 1
    return Accepted(alive[0], num, draws.choose(p[alive[0], num][None])[0])


def by_block(chain: list[int], q: Tensor, p: Tensor, draws: Draws) -> Accepted:
    """Speculative sampling of a whole draft at once, which accepts at least as many tokens on average.

        P_0 = 1,  P_i = min(1, P_{i-1} p_i(x_i) / q_i(x_i))
        s_i = sum_v (P_i p_{i+1}(v) - q_{i+1}(v))_+
        h_i = s_i / (s_i + 1 - P_i),  h_G = P_G
        n = the largest i with u_i <= h_i (h_0 = 1); then a token from norm((P_n p_{n+1} - q_{n+1})_+), or
        from p_{G+1} if n = G

    `chain`: G token ids, the k-th drawn from q[k]; [at least G, V] q and [at least G + 1, V] p:
    probabilities.

    Source: Sun et al., Block verification accelerates speculative decoding, arXiv 2403.10444.
    """
    length = len(chain)
    joint = [1.0]  # P_0 ... P_G
    for ratio in _ratios([chain], q[None], p[None])[0]:
        joint.append(min(1.0, joint[-1] * ratio))
    scale = torch.tensor(joint[:length], dtype=p.dtype, device=p.device)
    surplus = (scale[:, None] * p[:length] - q[:length]).clamp_min(0).sum(dim=-1).tolist()  # s_0 ... s_{G-1}
    for num in range(length, 0, -1):
        if num == length:
            probability = joint[num]
        elif (missing := surplus[num] + 1 - joint[num]) > 0:
            probability = surplus[num] / missing
        else:  # p = q from here on, and everything after this was accepted but for rounding
            probability = 1.0
        if probability >= SURE or draws.accept(probability):
            break
    else:
        num = 0
    weights = p[num] if num == length else _residual(joint[num] * p[num], q[num])
    return Accepted(0, num, draws.choose(weights[None])[0])


def _ratios(chains: list[list[int]], q: Tensor, p: Tensor) -> list[list[float]]:
    """p_k(x_k) / q_k(x_k) of every drafted token, in one transfer from the device."""
    longest = max(map(len, chains))
    if longest == 0:
        return [[] for _ in chains]
    padded = torch.tensor([[*c, *[0] * (longest - len(c))] for c in chains], device=p.device)[..., None]
    ratios = p[:, :longest].gather(-1, padded) / q[:, :longest].gather(-1, padded)
    return [row[: len(chain)] for row, chain in zip(ratios[..., 0].tolist(), chains, strict=True)]


def _residual(p: Tensor, q: Tensor) -> Tensor:
    """norm((p - q)_+) [V]; `p` itself where rounding alone has led to a rejection and nothing is left."""
    left = (p - q).clamp_min(0)
    total = left.sum()
    return torch.where(total > 0, left / total, p / p.sum())
