"""Prints the bound on the negative log-likelihood by position in the context, models side by side.

Tells whether a model uses a context longer than the one it was trained on: run it before and after continued
pretraining, with the positions stretched and not. The bound is the training loss in its low-variance form:
every row gets exactly l of its n tokens masked, l spread evenly over rows and draws, weight n / l. All models
see the same masks, so differences between them are better known than the numbers themselves.

Run:
    python scripts/benchmarks/bench_context.py --data_path books.jsonl --max_length 8192 \\
        --model_name_or_path GSAI-ML/LLaDA-8B-Base GSAI-ML/LLaDA-8B-Base runs/pretrain_8k \\
        --rope_scaling none yarn none --rope_factor 1 2 1
"""

import json
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the measurement."""

    model_name_or_path: list[str] = flag(
        help="Checkpoints or runs; their tokenizers must agree.", reads="model"
    )
    data_path: str = flag(
        help="Held-out text as for pretraining, or rows made by prepare_corpus.py.", reads="path"
    )
    max_length: int = flag(8192, help="Tokens of a row.", at_least=1)
    num_rows: int = flag(64, help="Rows, from the start of the data.", at_least=1)
    num_parts: int = flag(8, help="Parts of equal length into which positions are grouped.", at_least=1)
    draws: int = flag(1, help="Masks per row.", at_least=1)
    batch_size: int = flag(1, help="Rows per forward.", at_least=1)
    rope_scaling: list[str] = flag(
        [], help="For each model how its positions are stretched (none, linear, ntk, yarn); default none."
    )
    rope_factor: list[float] = flag([], help="For each model by how much; default 1.", at_least=1)
    dtype: str = flag("float32", help="Of the weights.", choices=["float32", "bfloat16"])
    device: str | None = flag(None, help="cpu or cuda; default the GPU if there is one.")
    output: str | None = flag(None, help="JSON file for all numbers.", writes="file")
    seed: int = flag(0, help="Of the masks.", at_least=0)


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np
import torch
from tqdm import tqdm

from llada.data.prepared import load
from llada.data.rows import CorpusRows
from llada.diffusion.batches import Example, MaskedBatch
from llada.diffusion.stream import MaskedStream
from llada.models.checkpoints import RopeScaling, load_model
from llada.models.tokens import load_tokenizer, special_ids
from llada.run import Run, autocast

# N rows, L positions of a row, K parts of the context


def full_rows(config: Config) -> np.ndarray:
    """[N, L] the first full rows of the data."""
    tokenizer = load_tokenizer(config.model_name_or_path[0])
    alone = Run(rank=0, world_size=1, device=torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        kind = CorpusRows(config.max_length)
        rows = load([config.data_path], kind, tokenizer, prepared=Path(folder, "rows"), run=alone)
        rows = rows.with_format("numpy")
        full = []
        for row in rows:
            if len(row["input_ids"]) == config.max_length:
                full.append(np.array(row["input_ids"]))
            if len(full) == config.num_rows:
                return np.stack(full)
    raise ValueError(
        f"--data_path {config.data_path}: {len(full)} full rows of {config.max_length} tokens, --num_rows "
        f"asks for {config.num_rows}"
    )


def masks_of(rows: np.ndarray, config: Config, mask_id: int) -> list[MaskedBatch]:
    """The rows under --draws masks each, the same for every model."""

    def example_of(record_id: int, _epoch: int, _longest: int) -> Example:
        ids = rows[record_id % len(rows)]
        return Example(ids, np.ones(len(ids), dtype=bool), weight=1.0, num_units=float(len(ids)))

    stream = MaskedStream(
        example_of, np.full(len(rows) * config.draws, config.max_length), batch_size=config.batch_size,
        micro_batch_size=config.batch_size, seed=config.seed, run=Run(0, 1, torch.device("cpu")),
        mask_id=mask_id, pad_id=mask_id,
    )  # fmt: skip
    return list(stream.validation())


@torch.no_grad()
def bound_by_part(model: torch.nn.Module, batches: list[MaskedBatch], config: Config) -> np.ndarray:
    """[N x draws, K] nats per token of each row in each part of the context."""
    device, found = next(model.parameters()).device, []
    for batch in tqdm(batches, desc="rows", unit="batch", delay=5):
        moved = batch.to(device)
        with autocast(device, "float32"):
            nll = model(input_ids=moved.input_ids, rows=moved.rows, targets=moved.targets).nll.cpu()
        num_rows, length = batch.input_ids.shape
        size = length // config.num_parts
        part = (batch.rows // length) * config.num_parts + (batch.rows % length) // size
        sums = torch.zeros(num_rows * config.num_parts, dtype=torch.float64)
        sums.index_add_(0, part, (batch.weights * nll).double())
        found.append(sums.view(num_rows, -1).numpy() / size)
    return np.concatenate(found)


def main(argv: list[str] | None = None) -> None:
    """Measures every model and prints a line per part of the context."""
    config = parse(Config, argv, description=__doc__)
    models = config.model_name_or_path
    kinds = config.rope_scaling or ["none"] * len(models)
    factors = config.rope_factor or [1.0] * len(models)
    if not len(models) == len(kinds) == len(factors):
        raise ValueError(
            f"--rope_scaling and --rope_factor need one entry for each of the {len(models)} models, have "
            f"{len(kinds)} and {len(factors)}"
        )
    if config.max_length % config.num_parts:
        raise ValueError(
            f"--max_length {config.max_length} must be a multiple of --num_parts {config.num_parts}"
        )
    rows = full_rows(config)
    device = config.device or ("cuda" if torch.cuda.is_available() else "cpu")
    batches, bounds = [], []
    for path, kind, factor in zip(models, kinds, factors, strict=True):
        rope = RopeScaling(kind, factor, config.max_length)
        model = load_model(path, dtype=config.dtype, device=device, rope=rope).eval()
        ids = special_ids(model.config, load_tokenizer(path))
        if rows.max() >= model.config.embedding_size:
            raise ValueError(f"--model_name_or_path {path}: the rows hold tokens that it does not know")
        batches = batches or masks_of(rows, config, ids.mask)
        bounds.append(bound_by_part(model, batches, config))
    labels = [
        Path(path).name + ("" if kind == "none" else f" {kind} {factor:g}")
        for path, kind, factor in zip(models, kinds, factors, strict=True)
    ]
    print_table(labels, bounds, config)
    if config.output:
        report = {label: bound.tolist() for label, bound in zip(labels, bounds, strict=True)}
        Path(config.output).write_text(json.dumps(report), encoding="utf-8")


def print_table(labels: list[str], bounds: list[np.ndarray], config: Config) -> None:
    """Mean and standard error of each model by part, and of all positions."""
    width = max(16, *(len(label) + 2 for label in labels))
    print(f"{'positions':>15}" + "".join(f"{label:>{width}}" for label in labels))
    size = config.max_length // config.num_parts
    everything = partial(np.mean, axis=1, keepdims=True)
    columns = [np.concatenate([bound, everything(bound)], axis=1) for bound in bounds]
    names = [f"{i * size}-{(i + 1) * size}" for i in range(config.num_parts)] + ["all"]
    for i, name in enumerate(names):
        line = f"{name:>15}"
        for column in columns:
            error = column[:, i].std(ddof=1) / len(column) ** 0.5 if len(column) > 1 else float("nan")
            line += f"{f'{column[:, i].mean():.3f} ({error:.3f})':>{width}}"
        print(line, flush=True)


if __name__ == "__main__":
    run_main(main)
