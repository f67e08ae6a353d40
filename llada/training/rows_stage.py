"""What stages that learn from rows of tokens share: data in, a stream and its held-out bound, the loop."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from llada.data.prepared import load as load_rows
from llada.data.rows import Rows
from llada.data.shards import row_lengths
from llada.diffusion.batches import MaskedBatch
from llada.diffusion.losses import LossParts, masked_diffusion_loss
from llada.diffusion.stream import ExampleOf, MaskedStream
from llada.models.building import run_tokenizer
from llada.models.tokens import SpecialIds
from llada.run import Run, Sums, add_sums, autocast, means_over_ranks
from llada.training import dry_run
from llada.training.config import TrainConfig
from llada.training.cost import flops_counter
from llada.training.loop import Load, end_training, fit, load_with_ids, start_training

Loss = Callable[[torch.nn.Module, MaskedBatch, float], torch.Tensor]


def train_on_rows(
    config: TrainConfig,
    kind: Rows,
    example_of: Callable[[Dataset, SpecialIds, bool], ExampleOf],
    *,
    weights: Sequence[float] | None = None,
    load: Load = load_with_ids,
    stream_type: type[MaskedStream] = MaskedStream,
    loss: Loss = masked_diffusion_loss,
    **stream_settings: Any,
) -> None:
    """Trains on --train_data_path, validates on --eval_data_path; with --dry_run only says what it would do.

    Args:
        kind: what is made of records.
        example_of: (rows, special tokens, whether they are trained on) -> what the stream asks for.
        weights: share of each data set.
        stream_settings: of `stream_type`, beside those of every stage; for training only.
    """
    paths = config.train_data_path
    paths = [paths] if isinstance(paths, str) else paths
    chat = kind.kind == "conversations"
    if config.dry_run:
        dry_run.report(
            config, partial(dry_run.data_rows, kind=kind), train=paths, held_out=config.eval_data_path,
            weights=weights, chat=chat, load=load,
        )  # fmt: skip
        return
    run = start_training(config)
    tokenizer = run_tokenizer(config, chat=chat)

    def rows_of(paths: Sequence[str], name: str, **options: Any) -> Dataset:
        folder = Path(config.output_dir, "data", name)  # for raw records that have to be tokenised
        return load_rows(
            paths, kind, tokenizer, prepared=folder, run=run, run_folder=config.output_dir, **options
        ).with_format("numpy")

    # Data before the model: they fail in seconds where a checkpoint takes minutes.
    rows = rows_of(paths, "train", weights=weights, seed=config.seed)
    held_out = None if config.eval_data_path is None else rows_of([config.eval_data_path], "validation")
    config.resolve(run, len(rows))
    model, ids = load(config, tokenizer, device=run.build_device)
    common = config.stream(run, ids.mask, ids.pad)
    stream = stream_type(example_of(rows, ids, True), row_lengths(rows), **common, **stream_settings)
    validate = None
    if held_out is not None:
        masks = stream_type(example_of(held_out, ids, False), row_lengths(held_out), **common)
        validate = partial(validation_loss, stream=masks, config=config, run=run, loss=loss)
    fit(
        model, tokenizer, config, run, stream=stream, loss=loss, validate=validate,
        data=f"{len(rows)} rows, {stream.lengths.sum()} tokens", flops_of=flops_counter(model),
    )  # fmt: skip
    end_training()


def validation_loss(model: torch.nn.Module, *, loss: Loss = masked_diffusion_loss, **means: Any) -> float:
    """The training loss over held-out records, in its own unit; arguments as for `validation_means`."""
    return validation_means(model, loss=loss, **means)["eval_loss"]


@torch.no_grad()
def validation_means(
    model: torch.nn.Module,
    *,
    stream: Any,
    config: TrainConfig,
    run: Run,
    loss: Callable[[torch.nn.Module, Any, float], torch.Tensor | LossParts],
) -> dict[str, float]:
    """{"eval_loss", and an "eval_..." mean of each of the loss's `sums`} under masks that never change.

    `stream.validation` gives this rank's share of the held-out batches; every rank gets the result.
    """
    was_training = model.training
    model.eval()
    sums: Sums = {"loss": (0.0, 0.0)}
    for batch in stream.validation(config.eval_limit):
        with autocast(run.device, config.dtype):
            # 1 unit: a sum over the records of all batches, divided below by the units of all ranks
            found = loss(model, batch.to(run.device), 1.0)
        parts = found if isinstance(found, LossParts) else LossParts(found, ())
        add_sums(sums, {"loss": (float(parts.value), batch.num_units), **parts.sums})
    model.train(was_training)
    return {f"eval_{name}": value for name, value in means_over_ranks(sums).items()}
