"""From autoregressive to full diffusion: what the size of blocks costs and gains, on one text.

The same small model is trained on the characters of a text with every block size of --block_sizes and with
several seeds, for equally many characters: 1 is autoregressive (all masked, shifted logits: its loss is the
negative log-likelihood itself), 0 is full masked diffusion; between them stands block diffusion. Reported for
each, with the standard error over seeds:

    nats/char   held-out loss: of block size 1 exact, of the others the bound under masks that never change
    chars/s     of sampling, one token a forward, with the cache of finished blocks; 0 has none

Run:
    python scripts/benchmarks/bench_blocks.py --text input.txt --output runs/bench/blocks.json
"""

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of this script."""

    text: str = flag(help="A file of text; its last tenth is held out.", reads="path")
    block_sizes: list[int] = flag([1, 4, 16, 0], help="Tokens of a block; 0: full diffusion.", at_least=0)
    seeds: list[int] = flag([0, 1, 2], help="Of weights, order and masks.", at_least=0)
    length: int = flag(128, help="Characters of a record.", at_least=2)
    d_model: int = flag(96, help="Width of the model.", at_least=8)
    n_layers: int = flag(3, help="Its blocks.", at_least=1)
    batch_size: int = flag(32, help="Records a step.", at_least=1)
    max_steps: int = flag(1000, help="Steps of training.", at_least=1)
    learning_rate: float = flag(2e-3, help="Peak, behind 5 % of warm-up; it falls linearly to 0.", above=0)
    eval_limit: int = flag(400, help="Held-out records.", at_least=1)
    num_sampled: int = flag(128, help="Characters sampled for chars/s.", at_least=1)
    device: str = flag("cpu", help="cpu or cuda.")
    output: str | None = flag(None, help="JSON file of all numbers.", writes="file")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np
import torch

from llada.diffusion.batches import Example
from llada.diffusion.losses import masked_diffusion_loss
from llada.diffusion.stream import MaskedStream
from llada.run import Run
from modelling_final import LLaDAConfig, LLaDAModelLM
from modelling_final.generation_llada import generate


def new_model(config: Config, num_characters: int, block_size: int, seed: int) -> LLaDAModelLM:
    """Small, random, with one more token for the mask; by blocks, or looking at all (0)."""
    torch.manual_seed(seed)
    return LLaDAModelLM(
        LLaDAConfig(
            d_model=config.d_model, n_layers=config.n_layers, n_heads=4, n_kv_heads=4,
            mlp_hidden_size=3 * config.d_model, vocab_size=num_characters + 1,
            embedding_size=num_characters + 1, mask_token_id=num_characters, eos_token_id=None,
            pad_token_id=num_characters, max_sequence_length=2 * config.length, rope_theta=1e4,
            attention_pattern="block_causal" if block_size else "full",
            attention_block_size=block_size or None, logit_shift=block_size == 1,
        )
    ).to(config.device)  # fmt: skip


def new_stream(config: Config, text: np.ndarray, mask_id: int, block_size: int, seed: int) -> MaskedStream:
    """Records of the text one behind the other, every character maskable."""
    records = text[: len(text) // config.length * config.length].reshape(-1, config.length)

    def example_of(record_id: int, *_: int) -> Example:
        return Example(records[record_id], np.ones(config.length, dtype=bool), 1.0, config.length)

    return MaskedStream(
        example_of, np.full(len(records), config.length), config.batch_size, config.batch_size, seed,
        Run(rank=0, world_size=1, device=torch.device(config.device)), mask_id, mask_id,
        block_size=block_size or None, t_range=(1.0, 1.0) if block_size == 1 else (0.0, 1.0),
    )  # fmt: skip


def train(config: Config, model: LLaDAModelLM, stream: MaskedStream) -> None:
    """Plain AdamW; the loop of the suite would write states and logs that nobody reads here."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, betas=(0.9, 0.95))
    model.train()
    for step in range(config.max_steps):
        warm = min(1.0, (step + 1) / (0.05 * config.max_steps))
        rate = config.learning_rate * warm * (1 - step / config.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        (batch,) = stream(step)
        masked_diffusion_loss(model, batch.to(model.device), batch.num_units).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@torch.no_grad()
def held_out(config: Config, model: LLaDAModelLM, stream: MaskedStream) -> float:
    """Nats per character."""
    total = units = 0.0
    for batch in stream.validation(config.eval_limit):
        total += float(masked_diffusion_loss(model, batch.to(model.device), 1.0))
        units += batch.num_units
    return total / units


def characters_per_second(config: Config, model: LLaDAModelLM, block_size: int) -> float:
    """Of one answer, one character a forward, the fastest of three."""
    blocks = {"block_length": block_size, "cache": "blocks"} if block_size else {}
    seconds = []
    for _ in range(3):
        begun = time.perf_counter()
        generate(model, [[0]], gen_length=config.num_sampled, temperature=1.0, **blocks)
        seconds.append(time.perf_counter() - begun)
    return config.num_sampled / min(seconds)


def main(argv: list[str] | None = None) -> None:
    """Trains and measures every block size with every seed."""
    config = parse(Config, argv, description=__doc__)
    text = Path(config.text).read_text(encoding="utf-8")
    characters = sorted(set(text))
    codes = np.array([characters.index(character) for character in text])
    border = len(codes) * 9 // 10
    found = {}
    print("block size   nats/char             chars/s", flush=True)
    for block_size in config.block_sizes:
        losses, speeds = [], []
        for seed in config.seeds:
            model = new_model(config, len(characters), block_size, seed)
            settings = (len(characters), block_size, seed)
            train(config, model, new_stream(config, codes[:border], *settings))
            losses.append(held_out(config, model, new_stream(config, codes[border:], *settings)))
            speeds.append(characters_per_second(config, model, block_size))
        error = stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else float("nan")
        found[block_size] = {"nats_per_char": losses, "standard_error": error, "chars_per_s": speeds}
        name = {0: "full", 1: "1 (AR)"}.get(block_size, str(block_size))
        print(f"{name:>10}   {mean(losses):.4f} +- {error:.4f}     {mean(speeds):7.1f}", flush=True)
    if config.output is not None:
        Path(config.output).parent.mkdir(parents=True, exist_ok=True)
        Path(config.output).write_text(json.dumps({"flags": asdict(config), "found": found}, indent=1))


if __name__ == "__main__":
    run_main(main)
