"""Times training steps over documents of differing length: packed rows against padded ones, same records.

Arms, all with the same records, masks and weights in a step, and so with the same loss:
    fixed     every record in a row of --max_length tokens
    batch     micro-batches in the order drawn, padded to their longest record
    sorted    what this suite does without --packing: the global batch sorted by length, then micro-batches
    packed    --packing: rows of --max_length tokens, attention inside each document
    dense     the same rows with a dense document mask instead of one attention call per document

A micro-batch holds at most --tokens_at_once tokens, padding included, in every arm. Arms take turns, and
ratios are of steps that stood beside one another; tokens are real ones, padding excluded. Seconds are CPU
seconds of this process on a CPU, wall time on a GPU.

Run:
    python pretraining/prepare_corpus.py --input wikitext2/valid.txt --tokenizer runs/tokenizer \\
        --rows documents --max_length 2048 --output_dir runs/wikitext2
    python scripts/benchmarks/bench_packing.py --train_data_path runs/wikitext2/train \\
        --tokenizer_name runs/tokenizer
"""

import json
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main

ARMS = ("fixed", "batch", "sorted", "packed", "dense")


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    train_data_path: str = flag(help="Folder made by prepare_corpus.py --rows documents.", reads="path")
    tokenizer_name: str = flag(help="Its tokenizer.", reads="model")
    config_name: str = flag("6m", help="Size of the model, as for pretraining.", reads="size")
    max_length: int = flag(2048, help="Tokens of a packed row.", at_least=1)
    batch_size: int = flag(64, help="Documents per step.", at_least=1)
    tokens_at_once: int = flag(8192, help="Tokens of a micro-batch, padding included.", at_least=1)
    arms: list[str] = flag(list(ARMS), help="What to time, of " + ", ".join(ARMS) + ".")
    dtype: str = flag("float32", help="Of the matrix products.", choices=["float32", "bfloat16"])
    device: str | None = flag(None, help="cpu or cuda; default the GPU if there is one.")
    threads: int | None = flag(None, help="CPU threads; default torch's choice.", at_least=1)
    repeats: int = flag(5, help="Steps per arm, each over other records.", at_least=1)
    seed: int = flag(0, help="Of weights, records and masks.", at_least=0)
    output: str | None = flag(None, help="JSON file for all numbers.", writes="file")


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import numpy as np
import torch

from llada.data.shards import load_rows, row_lengths
from llada.diffusion.batches import Example, MaskedBatch, collate
from llada.diffusion.losses import masked_diffusion_loss
from llada.diffusion.stream import MaskedStream
from llada.models.building import new_model
from llada.models.tokens import load_tokenizer
from llada.run import Run, autocast, start_run
from modelling_final import LLaDAModelLM
from modelling_final.documents_llada import same_document


class Arms:
    """The micro-batches of a step, as each arm cuts them."""

    def __init__(self, config: Config, run: Run, mask_id: int, pad_id: int) -> None:
        rows = load_rows(config.train_data_path).with_format("numpy")
        self._config, self._ids = config, {"mask_id": mask_id, "pad_id": pad_id}

        def example_of(record_id: int, _epoch: int, _longest: int) -> Example:
            ids = rows[record_id]["input_ids"]
            return Example(ids, np.ones(len(ids), dtype=bool), weight=1.0, num_units=float(len(ids)))

        lengths = row_lengths(rows)
        if lengths.max() > config.max_length:
            raise ValueError(f"--max_length {config.max_length}: the longest row has {lengths.max()} tokens")
        self.stream = MaskedStream(
            example_of, lengths, batch_size=config.batch_size, micro_batch_size=1, seed=config.seed, run=run,
            **self._ids,
        )  # fmt: skip

    def batches(self, arm: str, step: int) -> list[MaskedBatch]:
        """The micro-batches of one step."""
        if arm in ("packed", "dense"):
            num_rows = max(1, self._config.tokens_at_once // self._config.max_length)
            packed = replace(self.stream, row_length=self._config.max_length, micro_batch_size=num_rows)
            return packed(step)
        records = self.stream.records_of(step)
        longest = max(int(self.stream.lengths[record_id]) for record_id, _ in records)
        items = [
            self.stream.noise(*record, longest=longest, step=step, place=place)[0]
            for place, record in enumerate(records)
        ]
        if arm == "sorted":
            items.sort(key=lambda item: len(item.example.input_ids))
        groups, current, width = [], [], 0
        for item in items:
            size = self._config.max_length if arm == "fixed" else len(item.example.input_ids)
            width = max(width, size)
            if current and width * (len(current) + 1) > self._config.tokens_at_once:
                groups.append(current)
                current, width = [], size
            current.append(item)
        batches = [collate([[item] for item in group], **self._ids) for group in [*groups, current]]
        return [self._widen(batch) for batch in batches] if arm == "fixed" else batches

    def _widen(self, batch: MaskedBatch) -> MaskedBatch:
        """The batch padded on to --max_length."""
        num_rows, length = batch.input_ids.shape
        more = self._config.max_length - length
        attended = torch.ones(num_rows, length, dtype=torch.long)
        attended = attended if batch.attention_mask is None else batch.attention_mask
        return replace(
            batch,
            input_ids=torch.nn.functional.pad(batch.input_ids, (0, more), value=self._ids["pad_id"]),
            attention_mask=torch.nn.functional.pad(attended, (0, more)),
            rows=batch.rows // length * self._config.max_length + batch.rows % length,
        )


def dense_loss(model: LLaDAModelLM, batch: MaskedBatch, total_units: float) -> torch.Tensor:
    """The loss of a packed batch with one boolean [L, L] mask for each row."""
    shape = batch.input_ids.shape
    sees = same_document(batch.document_borders, *shape)
    rows = torch.arange(shape[0], device=batch.rows.device)[:, None, None]
    columns = torch.arange(shape[1], device=batch.rows.device)
    mask = sees(rows, rows, columns[None, :, None], columns[None, None, :])[:, None]
    return model(
        **{name: value for name, value in batch.inputs.items() if name != "document_borders"},
        attention_bias=mask,
        weights=batch.weights / total_units,
    ).loss


def step_of(
    model: LLaDAModelLM,
    batches: list[MaskedBatch],
    optimizer: torch.optim.Optimizer,
    arm: str,
    config: Config,
) -> tuple[float, float]:
    """(loss, seconds) of one whole step; the learning rate is 0, so the weights stay."""
    device = next(model.parameters()).device
    loss_of = dense_loss if arm == "dense" else masked_diffusion_loss
    count, loss = sum(batch.num_units for batch in batches), 0.0
    # On a CPU the seconds of this process: what else the machine does is no part of the step.
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = clock()
    for batch in batches:
        with autocast(device, config.dtype):
            part = loss_of(model, batch.to(device), count)
        part.backward()
        loss += part.detach()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    value = float(loss)  # waits for a GPU
    return value, clock() - started


def main(argv: list[str] | None = None) -> None:
    """Times the arms and prints a line for each."""
    config = parse(Config, argv, description=__doc__)
    if unknown := set(config.arms) - set(ARMS):
        raise ValueError(f"--arms {sorted(unknown)}: choose from {', '.join(ARMS)}")
    if config.threads:
        torch.set_num_threads(config.threads)
    run = start_run(config.device)
    tokenizer = load_tokenizer(config.tokenizer_name)
    model = new_model(config.config_name, tokenizer, seed=config.seed, max_length=config.max_length)
    model = model.to(run.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    arms = Arms(config, run, model.config.mask_token_id, model.config.pad_token_id)
    lengths = arms.stream.lengths
    print(
        f"torch {torch.__version__}, {run.device}, threads {torch.get_num_threads()}; {len(lengths)} rows "
        f"of {lengths.mean():.0f} tokens (median {np.median(lengths):.0f}, longest {lengths.max()})"
    )
    rows: dict[str, list[dict[str, float]]] = {arm: [] for arm in config.arms}
    for step in range(-1, config.repeats):  # the first warms up
        for arm in config.arms:
            batches = arms.batches(arm, max(step, 0))
            loss, seconds = step_of(model, batches, optimizer, arm, config)
            tokens = sum(batch.num_tokens for batch in batches)
            width = sum(batch.input_ids.numel() for batch in batches)
            if step >= 0:
                found = {"loss": loss, "tokens_per_second": tokens / seconds, "padding": 1 - tokens / width}
                rows[arm].append(found)
    print(f"{'arm':8} {'tokens/s':>9} {'padding':>8} {'packed is faster by':>24} {'loss off by':>12}")
    for arm, steps in rows.items():
        line = f"{arm:8} {statistics.median(row['tokens_per_second'] for row in steps):9.0f}"
        line += f" {statistics.mean(row['padding'] for row in steps):8.1%}"
        if "packed" in rows:
            pairs = list(zip(steps, rows["packed"], strict=True))
            ratios = [b["tokens_per_second"] / a["tokens_per_second"] for a, b in pairs]
            off = max(abs(a["loss"] - b["loss"]) / b["loss"] for a, b in pairs)
            spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"
            line += f" {spread:>24} {off:12.1e}"
        print(line, flush=True)
    if config.output:
        Path(config.output).write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
