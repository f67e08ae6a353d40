"""What each order of decisions samples, when the model is exactly right.

The "model" is the exact posterior of a Markov chain (8 states, 32 tokens): every masked token's distribution
given all visible ones. So whatever a sampler gets wrong is its own doing. Two numbers over --num_samples
answers for each order, temperature and rule for many tokens at once, with 95 % bootstrap intervals:

    TV of pairs   total variation between the pairs of neighbours in the answers and those of the chain; "the
                  chain itself" is what as many true samples give, the floor of the estimate
    nats/token    -log p of the answers under the chain: below its entropy, what comes out is too likely

Run:
    python scripts/benchmarks/bench_orders.py --num_samples 2000 --output runs/bench/orders.json
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of this script."""

    chain: str = flag(
        "random",
        help="random: any transition may be likely; sticky: a state most likely stays what it is.",
        choices=["random", "sticky"],
    )
    num_samples: int = flag(2000, help="Answers per arm.", at_least=1)
    batch_size: int = flag(500, help="Answers sampled together.", at_least=1)
    num_bootstrap: int = flag(1000, help="Bootstrap repetitions.", at_least=1)
    seed: int = flag(0, help="Of the chain, the draws and the bootstrap.", at_least=0)
    output: str | None = flag(None, help="JSON file of all numbers.", writes="file")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np
import torch
from torch import Tensor, nn

from llada.diffusion.masking import generator
from modelling_final import LLaDAGenerationConfig
from modelling_final.generation_llada import generate
from modelling_final.orders_llada import ORDERS

STATES, LENGTH, ENTROPY = (
    8,
    32,
    1.193,
)  # nats a token: a chain about as predictable as text is to a small model
BOS, MASK = STATES, STATES + 1


class Chain:
    """A stationary Markov chain of `ENTROPY` nats a token."""

    def __init__(self, kind: str, seed: int) -> None:
        noise = (
            np.eye(STATES) if kind == "sticky" else generator(seed, "chain").standard_normal((STATES, STATES))
        )
        low, high = 0.0, 20.0  # a sharper softmax has less entropy
        for _ in range(60):
            middle = (low + high) / 2
            self.transition = self._softmax(noise * middle)
            self.start = self._stationary()
            low, high = (middle, high) if self.entropy() > ENTROPY else (low, middle)
        self.pairs = self.start[:, None] * self.transition

    @staticmethod
    def _softmax(logits: np.ndarray) -> np.ndarray:
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        return p / p.sum(axis=1, keepdims=True)

    def _stationary(self) -> np.ndarray:
        values, vectors = np.linalg.eig(self.transition.T)
        found = np.real(vectors[:, np.argmax(np.real(values))])
        return found / found.sum()

    def entropy(self) -> float:
        """Nats per token of a sequence of LENGTH tokens."""
        first = -(self.start * np.log(self.start)).sum()
        others = -(self.start[:, None] * self.transition * np.log(self.transition)).sum()
        return (first + (LENGTH - 1) * others) / LENGTH

    def nats(self, sequences: np.ndarray) -> np.ndarray:
        """[N] -log p per token of [N, LENGTH] sequences."""
        logs = np.log(self.start)[sequences[:, 0]]
        logs = logs + np.log(self.transition)[sequences[:, :-1], sequences[:, 1:]].sum(axis=1)
        return -logs / LENGTH

    def sample(self, number: int, random: np.random.Generator) -> np.ndarray:
        """[number, LENGTH] true sequences."""
        rows = [random.choice(STATES, size=number, p=self.start)]
        for _ in range(LENGTH - 1):
            u = random.random(number)
            rows.append((self.transition[rows[-1]].cumsum(axis=1) < u[:, None]).sum(axis=1))
        return np.stack(rows, axis=1)


class Posterior(nn.Module):
    """The chain's exact posterior behind a BOS, with the interface of LLaDAModelLM."""

    def __init__(self, chain: Chain) -> None:
        super().__init__()
        self.register_buffer("transition", torch.from_numpy(chain.transition))
        self.register_buffer("start", torch.from_numpy(chain.start))
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(
            mask_token_id=MASK, eos_token_id=None, eot_token_id=None, pad_token_id=None, end_ids=[],
            max_sequence_length=LENGTH + 1, attention_pattern="full", attention_block_size=None,
        )  # fmt: skip
        self.generation_config = LLaDAGenerationConfig()

    def forward(self, input_ids: Tensor, query_positions: Tensor, **_: Any) -> SimpleNamespace:
        """Log-probabilities [B, R, V] of the asked columns, by forward and backward messages."""
        tokens = input_ids[:, 1:]
        evidence = torch.nn.functional.one_hot(tokens.clamp_max(STATES - 1), STATES).double()
        evidence[tokens == MASK] = 1.0
        ahead, back = [self.start * evidence[:, 0]], [torch.ones_like(evidence[:, 0])]
        for i in range(1, tokens.shape[1]):
            ahead.append(self._normal(ahead[-1] @ self.transition) * evidence[:, i])
            back.append(self._normal((back[-1] * evidence[:, -i]) @ self.transition.T))
        p = self._normal(torch.stack(ahead, dim=1) * torch.stack(back[::-1], dim=1))
        logits = torch.full((*tokens.shape, MASK + 1), -torch.inf, dtype=torch.float64)
        logits[..., :STATES] = p.log()
        wanted = (query_positions - 1)[..., None].expand(-1, -1, MASK + 1)
        return SimpleNamespace(logits=logits.gather(1, wanted))

    @staticmethod
    def _normal(values: Tensor) -> Tensor:
        return values / values.sum(dim=-1, keepdim=True)


def arms() -> dict[str, dict[str, Any]]:
    """Name -> settings of the sampler."""
    found: dict[str, dict[str, Any]] = {
        f"{order}, one token a step": {"remasking": order, "temperature": 1.0} for order in ORDERS
    }
    for order in ("low_confidence", "max_probability"):
        found[f"{order}, temperature 0.5"] = {"remasking": order, "temperature": 0.5}
        for rule, value in (("threshold", {"threshold": 0.9}), ("factor", {"factor": 0.5})):
            found[f"{order}, {rule} {next(iter(value.values()))}"] = {
                "remasking": order, "temperature": 1.0, "parallel_decoding": rule, **value,
            }  # fmt: skip
    found["random, four tokens a step"] = {"remasking": "random", "temperature": 1.0, "steps": LENGTH // 4}
    return found


def sample(model: Posterior, config: Config, settings: dict[str, Any]) -> tuple[np.ndarray, float]:
    """[num_samples, LENGTH] answers, and tokens decided per forward."""
    answers, rates = [], []
    for start in range(0, config.num_samples, config.batch_size):
        ids = range(start, min(start + config.batch_size, config.num_samples))
        output = generate(
            model, [[BOS]] * len(ids), record_ids=list(ids), seed=config.seed, gen_length=LENGTH,
            block_length=LENGTH, **settings,
        )  # fmt: skip
        answers += output.completions
        rates.append(output.tokens_per_forward)
    return np.array(answers), float(np.mean(rates))


def measure(chain: Chain, answers: np.ndarray, config: Config) -> dict[str, Any]:
    """Both numbers of some answers with their intervals."""
    cells = answers[:, :-1] * STATES + answers[:, 1:]
    counts = np.stack([np.bincount(row, minlength=STATES**2) for row in cells])  # [N, pairs]
    nats = chain.nats(answers)
    random = generator(config.seed, "bootstrap")

    def both(rows: np.ndarray | slice) -> tuple[float, float]:
        shares = counts[rows].sum(axis=0) / counts[rows].sum()
        return abs(shares - chain.pairs.ravel()).sum() / 2, nats[rows].mean()

    draws = [both(random.integers(len(answers), size=len(answers))) for _ in range(config.num_bootstrap)]
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    tv, mean = both(slice(None))
    return {"tv": tv, "tv_interval": [low[0], high[0]], "nats": mean, "nats_interval": [low[1], high[1]]}


def main(argv: list[str] | None = None) -> None:
    """Prints the table, an arm as it ends."""
    config = parse(Config, argv, description=__doc__)
    chain = Chain(config.chain, config.seed)
    model = Posterior(chain)
    print(f"entropy of the chain: {chain.entropy():.4f} nats/token; {config.num_samples} answers an arm")
    print(f"{'arm':42s} {'TV of pairs':24s} {'nats/token':26s} tokens/forward")
    results: dict[str, Any] = {"config": asdict(config), "entropy": chain.entropy()}
    true = chain.sample(config.num_samples, generator(config.seed, "true"))
    for name, settings in {"the chain itself": None, **arms()}.items():
        answers, rate = (true, 1.0) if settings is None else sample(model, config, settings)
        found = measure(chain, answers, config) | {"tokens_per_forward": rate}
        results[name] = found
        intervals = ["[{:.4f}, {:.4f}]".format(*found[f"{key}_interval"]) for key in ("tv", "nats")]
        print(f"{name:42s} {found['tv']:.4f} {intervals[0]}  {found['nats']:.4f} {intervals[1]}  {rate:.2f}",
              flush=True)  # fmt: skip
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    run_main(main)
