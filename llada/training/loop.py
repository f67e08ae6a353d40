"""The one training loop. A stage gives it a model, a stream of batches and a loss; it knows nothing else of
the stage.

One step: take this rank's micro-batches -> sum their units over all ranks -> forward and backward of each
with that global number -> clip -> check -> AdamW (llada.training.step) -> log, validate, save.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from llada.diffusion.losses import LossParts
from llada.flags import write_yaml
from llada.models import build_model, save_model
from llada.resumable import write_atomically
from llada.run import Metrics, Run, sum_over_ranks
from llada.training import checkpoint
from llada.training.config import RESUME_MUST_AGREE, TrainConfig
from llada.training.monitor import LossWatch, Progress, gather_records
from llada.training.parallel import full_state_dict, parallelize, wrap_blocks
from llada.training.step import Batch, Loss, Trainer

__all__ = [
    "Batch", "Loss", "LossParts", "Stream", "fit", "load_trainable", "make_optimizer", "prepare_trainable",
]  # fmt: skip

Stream = Callable[[int], list[Batch]]
"""step -> this rank's micro-batches."""


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Fused AdamW over the trainable parameters; norms and other vectors are not decayed."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def load_trainable(config: TrainConfig, *, has_values: bool = True) -> torch.nn.Module:
    """The model that the flags describe, ready to train; on the meta device without `has_values`."""
    return prepare_trainable(build_model(config, has_values=has_values), config)


def prepare_trainable(model: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """Puts on activation checkpointing, compiled blocks and training mode."""
    wrap_blocks(model, activation_checkpointing=config.recompute, compile=config.compile)
    return model.train()


@checkpoint.one_run_per_folder
def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    run: Run,
    *,
    stream: Stream,
    loss: Loss,
    validate: Callable[[torch.nn.Module], float | Mapping[str, float]] | None,
    fingerprint: dict[str, object],
    prefetch: bool = True,
    flops_of: Callable[[Batch], float] = lambda _: 0.0,
    carried: dict[str, float] | None = None,
) -> None:
    """Trains until --max_steps, or until a signal asks to stop; saves, resumes and logs on the way.

    Args:
        model: on any device; trained in place.
        stream: this rank's micro-batches of a step.
        loss: a micro-batch's share of the loss.
        validate: the held-out loss of the model, or several numbers with `eval_loss` among them; or None.
        fingerprint: what, besides the common flags, a resumed run must share with the first one.
        prefetch: prepare batches in the background; not for streams that need the current weights.
        flops_of: useful FLOPs of a micro-batch, for MFU.
        carried: numbers that `loss` and `validate` keep from one step to the next, saved and restored in
            place with the state. `stop`, once it is not 0 after a validation, ends the run there.

    Writes `final/` (a plain checkpoint), `results.json` and `DONE` at the end; `PREEMPTED` when stopped.

    Raises:
        FloatingPointError: a loss or gradient that is not finite, with --on_nonfinite stop or ten times in
            a row; names the step and the records.
        ValueError: another run writes to the same folder, or the saved state does not belong to this run.
    """
    output_dir = Path(config.output_dir)
    if run.is_main:
        output_dir.mkdir(parents=True, exist_ok=True)
        (output_dir / "PREEMPTED").unlink(missing_ok=True)
    parallel = parallelize(model, run, shard=config.shard, dtype=config.dtype, cpu_offload=config.cpu_offload)
    optimizer = make_optimizer(model, config)
    meta = {name: getattr(config, name) for name in RESUME_MUST_AGREE} | fingerprint
    first_step, results, watched = 0, {}, {}
    resume_from = checkpoint.find_resume(output_dir, config.resume_from_checkpoint)
    if resume_from is not None:
        checkpoint.check_meta(resume_from, meta)
        first_step = checkpoint.load_state(resume_from, model, optimizer)
        saved = checkpoint.read_meta(resume_from)
        results, watched = saved["results"], saved.get("loss_watch", {})
        if carried is not None:
            carried.update(saved.get("carried", {}))
    if run.is_main:
        write_yaml(config, output_dir / "config.yaml")
    metrics = Metrics(run, output_dir, report_to=config.report_to, config=dataclasses.asdict(config),
                      total_steps=config.max_steps, first_step=first_step)  # fmt: skip
    state = Progress(results, run.device, run.world_size)
    watch = LossWatch(config.spike_sigmas, **watched)
    trainer = Trainer(parallel, optimizer, config, run, loss, state)

    saver = checkpoint.Saver(output_dir, run, keep=config.save_total_limit)

    def save(step: int) -> None:
        saver.start(step, model, optimizer, meta | {
            "results": state.as_results(step), "loss_watch": watch.state(), "carried": dict(carried or {}),
            "world_size": run.world_size,
        })  # fmt: skip

    def validate_at(step: int) -> None:
        if validate is None:
            return
        found = validate(model)
        values = found if isinstance(found, Mapping) else {"eval_loss": found}
        state.note_validation(values)
        metrics.log(step, values)
        if config.save_best and values["eval_loss"] <= state.results["best_eval_loss"]:
            export(output_dir / "best")

    def export(folder: Path) -> None:
        weights = full_state_dict(model)
        if run.is_main:
            save_model(model, tokenizer, folder, state_dict=weights)

    with checkpoint.StopSignal() as signal:
        if first_step == 0:
            validate_at(0)
        state.phases.mark("before")
        last_step = first_step if carried and carried.get("stop") else config.max_steps
        for step, batches in _steps(stream, first_step, last_step, prefetch and config.num_workers > 0):
            state.phases.mark("data")
            num_units, tokens, flops, stop, written = sum_over_ranks(
                [
                    sum(batch.num_units for batch in batches),
                    sum(batch.num_tokens for batch in batches),
                    sum(flops_of(batch) for batch in batches),
                    signal.received,
                    saver.is_written,
                ]
            )
            if written == run.world_size:
                saver.finish()
            if stop:
                save(step)
                saver.finish()
                metrics.close()
                if run.is_main:
                    (output_dir / "PREEMPTED").touch()
                    print(f"stopped by a signal after {step} steps; the same command continues", flush=True)
                return
            values = trainer.step(step, batches, num_units)
            state.note_step(tokens, flops)
            done = step + 1
            if (distance := watch.note(values["loss"])) is not None:
                records = gather_records([record for batch in batches for record in batch.record_ids])
                metrics.log_spike(done, {"loss": values["loss"], "loss_spike": distance, "records": records})
            metrics.advance(done)
            if done % config.log_interval == 0 or done == config.max_steps:
                metrics.log(done, values | state.rates())
            last = done == config.max_steps
            if config.eval_interval and done % config.eval_interval == 0 and not last:
                validate_at(done)
                if carried and carried.get("stop"):
                    last_step = done
                    break
            if config.save_interval and done % config.save_interval == 0 and not last:
                save(done)
            state.phases.mark("between steps")
        if first_step < last_step:
            if last_step == config.max_steps:
                validate_at(last_step)
            save(last_step)
            saver.finish()
    metrics.close()
    export(output_dir / "final")
    if run.is_main:
        text = json.dumps(state.as_results(last_step), indent=1)
        write_atomically(output_dir / "results.json", text)
        (output_dir / "DONE").touch()


def _steps(stream: Stream, first: int, last: int, prefetch: bool) -> Iterator[tuple[int, list[Batch]]]:
    """(step, micro-batches) with the next step's batches prepared in a thread while this one is computed."""
    if not prefetch:
        for step in range(first, last):
            yield step, stream(step)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead: Future | None = pool.submit(stream, first) if first < last else None
        for step in range(first, last):
            batches = ahead.result()
            ahead = pool.submit(stream, step + 1) if step + 1 < last else None
            yield step, batches
