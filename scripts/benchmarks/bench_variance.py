"""Measures how much the loss estimate varies with the masks drawn, under each way to draw them.

A small byte-level model is trained on the data for a few hundred steps. Then one fixed batch of records that
it has not seen is noised and scored --draws times under each scheme, and the variance of the loss is compared
with that of LLaDA's recipe (iid times, Bernoulli masks). Ranges are 90 % bootstrap intervals over the draws.
The gradient's noise, its mean squared distance from its mean, is measured on fewer draws.

Schemes (--t_sampling and --mask_count of every training stage):
    iid                  t iid, each token masked with probability p_mask, weight 1 / p_mask
    stratified t         one t in each of B equal parts of (0, 1)
    exact count          exactly ceil(t n) of n tokens masked, weight n / ceil(t n)
    stratified + exact   both

Run:
    python scripts/benchmarks/bench_variance.py --data wikitext/valid.txt --threads 2 --output variance.json
    python scripts/benchmarks/bench_variance.py --data data/samples/pretrain.jsonl --length 32 \\
        --num_records 16
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the measurement."""

    data: list[str] = flag(help="Text: files or folders, as for pretraining.", reads="path")
    length: int = flag(128, help="Bytes per record.", at_least=1)
    num_records: int = flag(32, help="Records of the fixed batch, and of a training batch.", at_least=1)
    train_steps: int = flag(300, help="Steps of training before the measurement.", at_least=1)
    learning_rate: float = flag(1e-3, help="Constant learning rate of the training.", above=0)
    d_model: int = flag(128, help="Width of the model.", at_least=1)
    n_layers: int = flag(4, help="Blocks of the model.", at_least=1)
    draws: int = flag(400, help="Draws of the loss per scheme.", at_least=1)
    gradient_draws: int = flag(96, help="Draws of the gradient per scheme; 0 = none.", at_least=0)
    resamples: int = flag(2000, help="Bootstrap resamples.", at_least=1)
    threads: int | None = flag(None, help="CPU threads; default torch's choice.", at_least=1)
    output: str | None = flag(None, help="JSON file for all numbers.", writes="file")
    seed: int = flag(0, help="Of weights, batches and masks.", at_least=0)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np
import torch

from llada.data.records import read_records
from llada.diffusion.batches import Example
from llada.diffusion.losses import masked_diffusion_loss
from llada.diffusion.masking import generator
from llada.diffusion.stream import MaskedStream
from llada.run import Run
from modelling_final import LLaDAConfig, LLaDAModelLM

# B records of a batch, L bytes of a record, N draws, P parameters

SCHEMES = {
    "iid": ("iid", "bernoulli"),
    "stratified t": ("stratified", "bernoulli"),
    "exact count": ("iid", "exact"),
    "stratified + exact": ("stratified", "exact"),
}
MASK_ID, EOS_ID, VOCAB_SIZE = 256, 257, 320  # bytes first; this model is ours and never saved


def read_bytes(paths: list[str], length: int) -> np.ndarray:
    """All texts one after the other, cut into records: [num_records, L] byte values."""
    texts = [record["text"] for path in paths for _, record in read_records(path)]
    joined = np.frombuffer("\n".join(texts).encode(), dtype=np.uint8).astype(np.int64)
    return joined[: len(joined) // length * length].reshape(-1, length)


def make_stream(records: np.ndarray, config: Config, *, t_sampling: str, mask_count: str) -> MaskedStream:
    """Batches over the records; with no more of them than a batch holds, every step is the same batch
    under new masks."""

    def example_of(record_id: int, _epoch: int, _longest: int) -> Example:
        ids = records[record_id]
        return Example(ids, np.ones(len(ids), dtype=bool), weight=1.0, num_units=float(len(ids)))

    return MaskedStream(
        example_of,
        np.full(len(records), config.length),
        batch_size=config.num_records,
        micro_batch_size=config.num_records,
        seed=config.seed,
        run=Run(rank=0, world_size=1, device=torch.device("cpu")),
        mask_id=MASK_ID,
        pad_id=EOS_ID,
        t_sampling=t_sampling,
        mask_count=mask_count,
    )


def make_model(config: Config) -> LLaDAModelLM:
    """The model with random weights."""
    shape = LLaDAConfig(
        d_model=config.d_model, n_layers=config.n_layers, n_heads=4, n_kv_heads=4,
        mlp_hidden_size=3 * config.d_model, max_sequence_length=config.length, vocab_size=VOCAB_SIZE,
        embedding_size=VOCAB_SIZE, mask_token_id=MASK_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return LLaDAModelLM(shape)


def train(model: LLaDAModelLM, records: np.ndarray, config: Config) -> float:
    """Trains by LLaDA's recipe; the mean loss of the last tenth of the steps, in nats per byte."""
    stream = make_stream(records, config, t_sampling="iid", mask_count="bernoulli")
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, fused=True)
    losses = []
    for step in range(config.train_steps):
        (batch,) = stream(step)
        loss = masked_diffusion_loss(model, batch, batch.num_units)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-max(1, len(losses) // 10) :])) if losses else float("nan")


@torch.no_grad()
def draw_losses(model: LLaDAModelLM, stream: MaskedStream, draws: int) -> tuple[np.ndarray, np.ndarray]:
    """[N] losses in nats per byte, and [N] masked shares of the tokens."""
    losses, shares = np.empty(draws), np.empty(draws)
    for n in range(draws):
        (batch,) = stream(n)
        losses[n] = float(masked_diffusion_loss(model, batch, batch.num_units))
        shares[n] = batch.rows.numel() / batch.input_ids.numel()
    return losses, shares


def draw_gradients(model: LLaDAModelLM, stream: MaskedStream, draws: int) -> np.ndarray:
    """[N] squared distances of the gradient from the mean of all draws, times N / (N - 1): their mean is the
    trace of its covariance."""
    gradients = []
    for n in range(draws):
        (batch,) = stream(n)
        model.zero_grad()
        masked_diffusion_loss(model, batch, batch.num_units).backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    model.zero_grad()
    stacked = torch.stack(gradients)  # [N, P]
    return (stacked - stacked.mean(0)).square().sum(1).double().numpy() * draws / (draws - 1)


def relative(
    values: np.ndarray, base: np.ndarray, of: Callable[..., np.ndarray], random: np.random.Generator, n: int
) -> list[float]:
    """[of(values) / of(base), 5 % and 95 % of its n bootstrap resamples].

    Against itself only the numerator is resampled, which shows how well the base is known.
    """

    def resampled(x: np.ndarray) -> np.ndarray:
        return of(x[random.integers(0, len(x), (n, len(x)))], axis=-1)

    ratios = resampled(values) / (of(base) if values is base else resampled(base))
    return [float(of(values) / of(base)), *map(float, np.quantile(ratios, [0.05, 0.95]))]


def main(argv: list[str] | None = None) -> None:
    """Trains, draws, and prints one line per scheme."""
    config = parse(Config, argv, description=__doc__)
    if config.draws < 2 or config.gradient_draws == 1:
        raise ValueError("--draws and --gradient_draws must be at least 2 (or --gradient_draws 0)")
    if config.threads:
        torch.set_num_threads(config.threads)
    records = read_bytes(config.data, config.length)
    if len(records) < 2 * config.num_records:
        raise ValueError(
            f"--data {config.data}: {len(records)} records of {config.length} bytes; at least "
            f"{2 * config.num_records} are needed, half of them to train on"
        )
    held_out, seen = records[-config.num_records :], records[: -config.num_records]
    model = make_model(config)
    started = time.perf_counter()
    train_loss = train(model, seen, config)
    print(
        f"torch {torch.__version__}, threads {torch.get_num_threads()}; {model.num_parameters() / 1e6:.2f} M "
        f"parameters, {config.train_steps} steps of {config.num_records} x {config.length} bytes over "
        f"{len(seen)} records in {time.perf_counter() - started:.0f} s: {train_loss:.3f} nats per byte"
    )
    results = measure(model, held_out, config)
    if config.output:
        report = {"config": asdict(config), "train_loss": train_loss, "schemes": results}
        Path(config.output).write_text(json.dumps(report, indent=1), encoding="utf-8")


def measure(model: LLaDAModelLM, held_out: np.ndarray, config: Config) -> dict[str, dict[str, object]]:
    """Draws under every scheme; prints and returns the table."""
    losses: dict[str, np.ndarray] = {}
    noise: dict[str, np.ndarray] = {}
    results = {}
    print(
        f"{'scheme':20} {'mean loss (s.e.)':>18} {'variance / iid (90 %)':>23} {'masked share':>15}", end=""
    )
    print(f" {'gradient noise / iid (90 %)':>29}")
    for name, (t_sampling, mask_count) in SCHEMES.items():
        stream = make_stream(held_out, config, t_sampling=t_sampling, mask_count=mask_count)
        losses[name], shares = draw_losses(model, stream, config.draws)
        random = generator(config.seed, "bootstrap", name)
        row: dict[str, object] = {
            "mean": losses[name].mean(),
            "standard_error": losses[name].std(ddof=1) / config.draws**0.5,
            "variance": relative(losses[name], losses["iid"], np.var, random, config.resamples),
            "masked_share": [shares.mean(), shares.std(ddof=1)],
            "losses": losses[name].tolist(),
        }
        line = f"{name:20} {row['mean']:9.4f} ({row['standard_error']:.4f}) "
        line += "{:8.2f} ({:.2f}-{:.2f})".format(*row["variance"]).rjust(24)
        line += "{:6.3f} +- {:.3f}".format(*row["masked_share"]).rjust(17)
        if config.gradient_draws:
            noise[name] = draw_gradients(model, stream, config.gradient_draws)
            row["gradient_noise"] = relative(noise[name], noise["iid"], np.mean, random, config.resamples)
            row["median_gradient_noise"] = np.median(noise[name]) / np.median(noise["iid"])
            line += "{:8.2f} ({:.2f}-{:.2f})".format(*row["gradient_noise"]).rjust(25)
        print(line, flush=True)
        results[name] = row
    return results


if __name__ == "__main__":
    run_main(main)
