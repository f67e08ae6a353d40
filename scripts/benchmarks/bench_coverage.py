"""Measures how far estimates of the any-order bound are from the truth, and whether printed errors say so.

Answers are drawn from a Markov chain, whose conditionals under any mask are known exactly, and so is the
bound: it is log p(answer). Each answer is estimated under each estimator and number of masks, with masks of
its own. Coverage is the share of answers whose truth lies within so many printed standard errors of the
estimate; nominal is 68 % for 1 and 95 % for 1.96.

Run:
    python scripts/benchmarks/bench_coverage.py
    python scripts/benchmarks/bench_coverage.py --num_answers 200 --num_masks 8 --estimators complementary
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from llada.diffusion.settings import ESTIMATORS
from llada.flags.declaration import flag
from llada.flags.parser import check_command_line, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the measurement."""

    num_answers: int = flag(1000, help="Answers of each estimator and number of masks.", at_least=1)
    min_length: int = flag(8, help="Tokens of the shortest answer.", at_least=1)
    max_length: int = flag(30, help="Tokens of the longest.", at_least=1, at_most=40)
    num_states: int = flag(48, help="States of the chain.", at_least=2)
    num_masks: list[int] = flag([8, 16, 32, 64, 128], help="Masks per answer.", at_least=2)
    estimators: list[str] = flag(list(ESTIMATORS), help="Of these.", choices=ESTIMATORS)
    seed: int = flag(0, help="Of the chain, the answers and the masks.", at_least=0)
    output: str | None = flag(None, help="JSON file for all numbers.", writes="file")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np

from llada.diffusion.bound_estimator import estimate, plan_masks
from llada.diffusion.masking import generator
from llada.diffusion.settings import MaskSettings


class MarkovChain:
    """Any-order conditionals of a Markov chain, exact. Order-consistent, so the bound is log p(answer).

    Neighbours tell most about a token, as in text.
    """

    def __init__(self, num_states: int = 48, concentration: float = 0.1, seed: int = 0) -> None:
        random = generator(seed, "chain")
        chain = random.dirichlet(np.full(num_states, concentration), size=num_states) + 1e-5
        self.chain = chain / chain.sum(axis=1, keepdims=True)
        self.powers = [np.eye(num_states)]
        for _ in range(40):
            self.powers.append(self.powers[-1] @ self.chain)

    def draw(self, num_tokens: int, random: np.random.Generator) -> list[int]:
        """A context token and an answer."""
        tokens = [int(random.integers(len(self.chain)))]
        for _ in range(num_tokens):
            tokens.append(int(random.choice(len(self.chain), p=self.chain[tokens[-1]])))
        return tokens

    def log_likelihood(self, tokens: list[int]) -> float:
        """log p(answer | context), in nats."""
        return float(np.log(self.chain[tokens[:-1], tokens[1:]]).sum())

    def log_probs(self, tokens: list[int], masks: np.ndarray) -> np.ndarray:
        """[N, T]: log p(y_i | context, what mask n leaves visible)."""
        values = np.zeros(masks.shape)
        for row, mask in zip(values, masks, strict=True):
            visible = [0, *(np.flatnonzero(~mask) + 1)]
            for i in np.flatnonzero(mask) + 1:
                left = max(j for j in visible if j < i)
                p = self.powers[i - left][tokens[left]]
                right = [j for j in visible if j > i]
                if right:
                    p = p * self.powers[right[0] - i][:, tokens[right[0]]]
                row[i - 1] = math.log(p[tokens[i]] / p.sum())
        return values


@dataclass(frozen=True)
class Found:
    """What one estimator gives with so many masks; errors in nats, coverage as a share."""

    estimator: str
    num_masks: int
    rms_error: float
    bias: float
    mean_printed_error: float
    covered_1: float
    covered_196: float


def measure(config: Config, chain: MarkovChain, estimator: str, num_masks: int) -> Found:
    """The errors of `--num_answers` estimates, and how the printed ones compare."""
    errors, printed = np.empty((2, config.num_answers))
    settings = MaskSettings(num_masks, estimator, exact_tokens=0)
    for n in range(config.num_answers):
        random = generator(config.seed, "answer", n)
        tokens = chain.draw(int(random.integers(config.min_length, config.max_length + 1)), random)
        plan = plan_masks(len(tokens) - 1, generator(config.seed, estimator, num_masks, n), settings)
        value, printed[n] = estimate(plan, chain.log_probs(tokens, plan.masks))
        errors[n] = value - chain.log_likelihood(tokens)
    return Found(
        estimator,
        num_masks,
        rms_error=float(np.sqrt((errors**2).mean())),
        bias=float(errors.mean()),
        mean_printed_error=float(printed.mean()),
        covered_1=float((abs(errors) <= printed).mean()),
        covered_196=float((abs(errors) <= 1.96 * printed).mean()),
    )


def main(argv: list[str] | None = None) -> None:
    """Prints the table, and writes it to --output."""
    config = parse(Config, argv, description=__doc__)
    chain = MarkovChain(config.num_states, seed=config.seed)
    print("| estimator | masks | rms error | bias | printed error | within 1 | within 1.96 |")
    print("|---|---|---|---|---|---|---|")
    found = []
    for estimator in config.estimators:
        for num_masks in config.num_masks:
            row = measure(config, chain, estimator, num_masks)
            found.append(asdict(row))
            print(
                f"| {estimator} | {num_masks} | {row.rms_error:.2f} | {row.bias:+.2f} "
                f"| {row.mean_printed_error:.2f} | {row.covered_1:.0%} | {row.covered_196:.1%} |",
                flush=True,
            )
    if config.output is not None:
        Path(config.output).write_text(json.dumps({"settings": asdict(config), "found": found}, indent=1))


if __name__ == "__main__":
    run_main(main)
