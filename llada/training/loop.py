"""The one training loop. A stage gives it a model, a stream of batches and a loss.

One step: take this rank's micro-batches -> sum their units over all ranks -> forward and backward of each
with that global number -> clip -> check -> AdamW (llada.training.step) -> log, validate, save.
"""

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch.profiler import profile
from transformers import PreTrainedTokenizerBase

from llada.flags.recipes import RecipeFlags
from llada.flags.yaml_files import write_yaml
from llada.models.building import adopt_adapter, build_model
from llada.models.hub import check_hub, push
from llada.models.saving import Origin, save_model
from llada.models.tokens import SpecialIds, special_ids
from llada.resumable import write_atomically
from llada.run import (
    STEP_SECONDS,
    Run,
    at,
    end_run,
    keep_freed_memory,
    naming_ranks,
    start_run,
    sum_over_ranks,
)
from llada.training import checkpoint
from llada.training.config import TrainConfig
from llada.training.metrics import Metrics
from llada.training.monitor import EarlyStop, LossWatch, Progress, expert_load, gather_records
from llada.training.parallel import full_state_dict, parallelize, use_float8, wrap_blocks
from llada.training.profiling import memory_snapshot, profiled
from llada.training.signals import StopSignal, exit_status, give_signals_back, leave_marker_on_signals
from llada.training.step import Batch, Loss, Trainer, learning_rate

Stream = Callable[[int], list[Batch]]
"""step -> this rank's micro-batches."""

Validate = Callable[[torch.nn.Module], float | Mapping[str, float]]
"""The held-out loss of the model, or several numbers with `eval_loss` among them."""


class Stateful(Protocol):
    """What changes from step to step and is saved with the state, as JSON."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


def start_training(config: TrainConfig) -> Run:
    """This process among its peers, from now on prepared for a signal; --dtype auto is decided."""
    # Ranks compile at their own pace.
    run = start_run(config.device, step_seconds=600.0 if config.compile else STEP_SECONDS)
    config.settle_dtype(run.device.type)
    torch.set_float32_matmul_precision("high")  # TF32 for what stays float32 on a GPU
    if run.is_main:
        check_hub(config)
        if isinstance(config, RecipeFlags):
            config.tell_recipe(config.output_dir)
    leave_marker_on_signals(config.output_dir, is_main=run.is_main)
    return run


def end_training() -> None:
    """Undoes `start_training`."""
    give_signals_back()
    end_run()


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


class Load(Protocol):
    """What a stage trains, and the special tokens of its stream; `device`: as for `build_model`."""

    def __call__(
        self, config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | str
    ) -> tuple[torch.nn.Module, SpecialIds]: ...


def load_with_ids(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, device: torch.device | str
) -> tuple[torch.nn.Module, SpecialIds]:
    """The model that the flags describe, and its special tokens, with which the tokenizer must agree."""
    adopt_adapter(config)
    model = prepare_trainable(build_model(config, device=device), config)
    return model, special_ids(model.config, tokenizer)


def prepare_trainable(model: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """Puts on float8 products, activation checkpointing, compiled blocks and training mode."""
    if config.float8:
        use_float8(model, is_run=not config.dry_run)
    wrap_blocks(model, activation_checkpointing=config.activation_checkpointing, compile=config.compile)
    return model.train()


def fit(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    config: TrainConfig,
    run: Run,
    *,
    stream: Stream,
    loss: Loss,
    validate: Validate | None,
    data: str,
    flops_of: Callable[[Batch], float] = lambda _: 0.0,
    early_stop: EarlyStop | None = None,
    kept: Stateful | None = None,
) -> None:
    """Trains until --max_steps, an early stop, or a signal; saves, resumes and logs on the way.

    Args:
        model: built on `run.build_device`; trained in place.
        loss: a micro-batch's share of the loss.
        validate: called before, during and after training; None = no held-out data.
        data: describes the training data, which a resumed run must share with the first one.
        flops_of: useful FLOPs of a micro-batch, for MFU.
        early_stop: looks at each held-out loss.
        kept: what `loss` keeps from one step to the next.

    Writes `final/` (a plain checkpoint), `results.json` and `DONE` at the end; `PREEMPTED` when stopped.
    FloatingPointError: a loss or gradient that is not finite, with --on_nonfinite stop or ten times in a row;
    names the step and the records. ValueError: another run writes to the same folder, or the saved state does
    not belong to this run.
    """
    assert not config.dry_run, "a dry run never trains"
    config.settle_dtype(run.device.type)
    folder = Path(config.output_dir)
    with checkpoint.folder_lock(folder) if run.is_main else nullcontext():
        parts = {"loss_watch": LossWatch(config.spike_sigmas), "early_stop": early_stop, "kept": kept}
        session = _Session(model, tokenizer, config, run, loss, validate, data, parts)
        step = session.progress.step
        batches = _batches(stream, step, config.max_steps, config.num_workers)
        with (
            StopSignal() as signal,
            naming_ranks(),
            memory_snapshot(folder, run),
            profiled(folder, run, config.profile) as profiler,
        ):
            session.train(batches, flops_of, signal, profiler)
        session.end(signal.number)


class _Totals(NamedTuple):
    """Sums over all ranks of one step's micro-batches."""

    num_units: float
    num_tokens: float
    flops: float
    num_signalled: float  # ranks that were asked to stop
    num_written: float  # ranks whose part of the save under way is on disk


class _Session:
    """A run under way: what it trains, what it has seen, and where it saves and logs."""

    def __init__(
        self,
        model: torch.nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        config: TrainConfig,
        run: Run,
        loss: Loss,
        validate: Validate | None,
        data: str,
        parts: dict[str, Stateful | None],
    ) -> None:
        self._model, self._tokenizer, self._config, self._run = model, tokenizer, config, run
        self._folder, self._validate = Path(config.output_dir), validate
        self._watch, self._early_stop = parts["loss_watch"], parts["early_stop"]
        if run.device.type == "cpu":
            keep_freed_memory()
        at("loaded the model")
        # The model itself is saved and validated; the wrapper only synchronises what is trained.
        wrapped = parallelize(
            model,
            run,
            shard=config.shard,
            dtype=config.dtype,
            cpu_offload=config.cpu_offload,
            reduce_dtype=config.reduce_dtype,
        )
        self._optimizer = make_optimizer(model, config)
        self._meta = config.agreed() | {"train_data_path": data}
        self.progress = Progress(run.device, run.world_size, config.dtype)
        parts = {"results": self.progress, **parts}
        self._parts = {name: part for name, part in parts.items() if part is not None}
        self._saver = checkpoint.Saver(self._folder, run, keep=config.save_total_limit)
        self._saved_step = self._resume()
        if run.is_main:
            (self._folder / "PREEMPTED").unlink(missing_ok=True)
            if not self.is_finished:
                (self._folder / "DONE").unlink(missing_ok=True)
            write_yaml(config, self._folder / "config.yaml")
        self._metrics = Metrics(
            self._folder if run.is_main else None,
            dataclasses.asdict(config),
            total_steps=config.max_steps,
            first_step=self.progress.step,
            report_to=config.report_to,
        )
        self._trainer = Trainer(wrapped, self._optimizer, config, run, loss, self.progress)

    def _resume(self) -> int | None:
        """Continues from a saved state if there is one; the step that --output_dir holds a state of."""
        state = checkpoint.find_resume(self._folder, self._config.resume_from_checkpoint)
        if state is None:
            return None
        saved = checkpoint.check_meta(state, self._meta)
        at("resuming")
        self._saver.load(state, self._model, self._optimizer)
        self.progress.step = saved["step"]
        for name in self._parts.keys() & saved.keys():
            self._parts[name].load_state_dict(saved[name])
        before, now = saved["max_steps"], self._config.max_steps
        if before != now and self._run.is_main:
            rate = learning_rate(self.progress.step, self._config)
            schedule = f"under the schedule of --max_steps {now}, at learning rate {rate:.4g}"
            print(f"a finished run of {before} steps goes on to {now}, {schedule}", flush=True)
        return self.progress.step if state.parent == self._folder else None

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to train."""
        has_stopped = self._early_stop is not None and self._early_stop.is_reached
        return has_stopped or self.progress.step >= self._config.max_steps

    def train(
        self,
        steps: Iterator[list[Batch]],
        flops_of: Callable[[Batch], float],
        signal: StopSignal,
        profiler: profile | None,
    ) -> None:
        """Steps until the run is finished or any rank has been signalled; saves the state it ends with."""
        if self.progress.step == 0:
            self._note_validation()
        self.progress.phases.mark("before")
        while not self.is_finished:
            at(f"step {self.progress.step + 1}")
            batches = next(steps)
            self.progress.phases.mark("data")
            total = _Totals(
                *sum_over_ranks(
                    [
                        sum(batch.num_units for batch in batches),
                        sum(batch.num_tokens for batch in batches),
                        sum(flops_of(batch) for batch in batches),
                        signal.number > 0,
                        self._saver.is_written,
                    ]
                )
            )
            if total.num_written == self._run.world_size:
                self._saver.finish()
            # all ranks break at the same step: the sum is theirs
            if total.num_signalled:
                break
            self._step(batches, total)
            self._validate_and_save_when_due()
            self.progress.phases.mark("between steps")
            if profiler is not None:
                profiler.step()
        self._save()
        self._saver.finish()
        self._metrics.close()

    def _step(self, batches: list[Batch], total: _Totals) -> None:
        values = self._trainer.step(self.progress.step, batches, total.num_units)
        self.progress.note_step(total.num_tokens, total.flops)
        step = self.progress.step
        if (distance := self._watch.note(values["loss"])) is not None:
            records = gather_records([record for batch in batches for record in batch.record_ids])
            spike = {"loss": values["loss"], "loss_spike": distance, "records": records}
            self._metrics.log_spike(step, spike)
        self._metrics.advance(step)
        if step % self._config.log_interval == 0 or step == self._config.max_steps:
            self._metrics.log(step, values | expert_load(self._model) | self.progress.rates())
            if self._run.world_size > 1:
                self._metrics.log_ranks(step, self.progress.of_ranks)

    def _validate_and_save_when_due(self) -> None:
        step, config = self.progress.step, self._config
        is_last = step == config.max_steps
        if is_last or (config.eval_interval and step % config.eval_interval == 0):
            self._note_validation()
        # a finished run saves anyway, at its end
        if config.save_interval and step % config.save_interval == 0 and not self.is_finished:
            self._save()

    def _note_validation(self) -> None:
        if self._validate is None:
            return
        at(f"validation after step {self.progress.step}")
        found = self._validate(self._model)
        values = found if isinstance(found, Mapping) else {"eval_loss": found}
        self.progress.note_validation(values)
        self._metrics.log(self.progress.step, values)
        if self._early_stop is not None:
            self._early_stop.note(values["eval_loss"])
        if self._config.save_best and values["eval_loss"] <= self.progress.results["best_eval_loss"]:
            self._export("best")

    def _save(self) -> None:
        if self.progress.step == self._saved_step:
            return
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        meta = {**self._meta, **parts, "world_size": self._run.world_size}
        self._saved_step = self.progress.step
        at(f"saving step {self._saved_step}")
        self._saver.start(self._saved_step, self._model, self._optimizer, meta)

    def _export(self, name: str) -> None:
        weights = full_state_dict(self._model)
        if self._run.is_main:
            origin = Origin.of(self._config, self.progress.state_dict())
            folder = self._folder / name
            save_model(self._model, self._tokenizer, folder, state_dict=weights, origin=origin)

    def end(self, signal: int) -> None:
        """Writes what a finished run leaves, or ends the process that a signal has stopped."""
        if self.is_finished:
            self._export("final")
            if self._run.is_main:
                push(self._folder / "final", self._config, name=self._folder.resolve().name)
                text = json.dumps(self.progress.state_dict(), indent=1)
                write_atomically(self._folder / "results.json", text)
                write_atomically(self._folder / "DONE", self._config.given)
            return
        if self._run.is_main:
            (self._folder / "PREEMPTED").touch()
            done = f"stopped by a signal after {self.progress.step} steps, state saved"
            print(f"{done}; the same command continues", flush=True)
        if status := exit_status(signal):
            raise SystemExit(status)


def _batches(stream: Stream, first: int, last: int, num_ahead: int) -> Iterator[list[Batch]]:
    """Each step's micro-batches; those of the next steps are prepared in a thread meanwhile."""
    steps = iter(range(first, last))
    if num_ahead == 0:
        yield from map(stream, steps)
        return
    with ThreadPoolExecutor(max_workers=1) as pool:
        ahead = deque(pool.submit(stream, step) for step in islice(steps, num_ahead))
        while ahead:
            batches = ahead.popleft().result()
            ahead.extend(pool.submit(stream, step) for step in islice(steps, 1))
            yield batches
