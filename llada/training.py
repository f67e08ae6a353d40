"""The one training loop. A stage gives it a model, a stream of batches and a loss; it knows nothing else of
the stage.

One step: take this rank's micro-batches -> sum their counts over all ranks -> forward and backward of each
with that
global count -> clip -> check -> AdamW -> log, validate, save.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from llada import checkpoint
from llada.blocks import wrap_blocks
from llada.config import write_yaml
from llada.context import NO_SCALING, RopeScaling
from llada.guards import MAX_SKIPPED_IN_A_ROW, LossWatch, gather_records
from llada.model import attach_lora, load_model, save_model
from llada.progress import Progress
from llada.runtime import Metrics, Run, autocast, sum_over_ranks
from llada.sharding import full_state_dict, gradient_sync, parallelize, whole
from llada.train_config import RESUME_MUST_AGREE, TrainConfig, learning_rate


class Batch(Protocol):
    """What the loop needs of a micro-batch."""

    count: float
    record_ids: list[int]

    @property
    def num_tokens(self) -> int: ...

    def to(self, device: torch.device) -> "Batch": ...


Stream = Callable[[int], list[Batch]]
"""step -> this rank's micro-batches."""


@dataclass
class LossParts:
    """A micro-batch's share of a loss whose gradient comes in several forward and backward passes.

    Attributes:
        value: the share of the loss itself, to be logged; without a graph.
        parts: each is called once, in order, and gives a scalar; the gradients of all together are the
            gradient of `value`. Every rank must have as many.
        means: name -> (sum, count), to be logged: all sums of a step, over micro-batches and ranks, divided
            by all counts. Every micro-batch must name the same ones.
    """

    value: torch.Tensor
    parts: Sequence[Callable[[], torch.Tensor]]
    means: Mapping[str, tuple[float, float]] = field(default_factory=dict)


Loss = Callable[[torch.nn.Module, Batch, float], torch.Tensor | LossParts]
"""(model, micro-batch, count of the global batch) -> this micro-batch's share of the loss."""


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


def load_trainable(path: str, config: TrainConfig, *, rope: RopeScaling = NO_SCALING) -> torch.nn.Module:
    """The model to train, from a checkpoint: all its weights in float32, or LoRA adapters on weights in
    --dtype."""
    dtype = config.dtype if config.use_lora else "float32"
    options = {"attn_implementation": config.attn_implementation, "merge_adapter": False}
    model = load_model(path, dtype=dtype, rope=rope, **options)
    return prepare_trainable(model, config)


def prepare_trainable(model: torch.nn.Module, config: TrainConfig) -> torch.nn.Module:
    """Puts on what the flags ask for: adapters, activation checkpointing, compiled blocks, training mode."""
    if config.use_lora and not hasattr(model, "peft_config"):
        model = attach_lora(
            model,
            rank=config.lora_r,
            alpha=config.lora_alpha,
            dropout=config.lora_dropout,
            target_modules=config.lora_target_modules,
            seed=config.seed,
        )
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
    trainer = _Trainer(parallel, optimizer, config, run, loss, state)

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
            count, tokens, flops, stop, written = sum_over_ranks(
                [
                    sum(batch.count for batch in batches),
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
            values = trainer.step(step, batches, count)
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
        checkpoint.write_atomically(output_dir / "results.json", text)
        (output_dir / "DONE").touch()


class _Trainer:
    """The arithmetic of one step."""

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        config: TrainConfig,
        run: Run,
        loss: Loss,
        state: Progress,
    ) -> None:
        self._config, self._run, self._loss, self._optimizer = config, run, loss, optimizer
        self._state, self._num_skipped_in_a_row = state, 0
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._model = model
        # Sharded weights are gathered in the right precision already.
        self._dtype = config.dtype if config.shard == "none" else "float32"

    def step(self, step: int, batches: list[Batch], count: float) -> dict[str, float]:
        """Forward, backward and update for one global batch whose counts sum to `count` over all ranks."""
        rate = learning_rate(step, self._config)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        losses: list[torch.Tensor] = []
        sums: dict[str, tuple[float, float]] = {}
        for i, batch in enumerate(batches):
            loss, means = self._forward_backward(batch, count, last=i == len(batches) - 1)
            losses.append(loss)
            for name, (total, number) in means.items():
                before = sums.get(name, (0.0, 0.0))
                sums[name] = (before[0] + total, before[1] + number)
        max_norm = self._config.max_grad_norm or math.inf
        grad_norm = whole(torch.nn.utils.clip_grad_norm_(self._parameters, max_norm))
        flat = [number for pair in sums.values() for number in pair]
        loss_value, *flat = sum_over_ranks([float(sum(losses)), *flat])
        self._state.phases.mark("forward_backward")
        if math.isfinite(loss_value) and math.isfinite(grad_norm):
            self._optimizer.step()
            self._num_skipped_in_a_row = 0
        else:
            self._skip_or_stop(step, batches, losses, f"loss {loss_value}, gradient norm {grad_norm}")
        self._optimizer.zero_grad(set_to_none=True)
        self._state.phases.mark("optimizer")
        means = {
            name: total / number
            for name, total, number in zip(sums, flat[::2], flat[1::2], strict=True)
            if number
        }
        return {"loss": loss_value, "grad_norm": grad_norm, "learning_rate": rate} | means

    def _forward_backward(
        self, batch: Batch, count: float, *, last: bool
    ) -> tuple[torch.Tensor, Mapping[str, tuple[float, float]]]:
        """The micro-batch's share of the loss, its gradients added, and its sums to log."""
        # Gradients are averaged over ranks; the loss is already divided by the global count.
        always = self._config.reduce_always
        with gradient_sync(self._model, last=last or always):
            with autocast(self._run.device, self._dtype):
                loss = self._loss(self._model, batch.to(self._run.device), count)
            if isinstance(loss, torch.Tensor):
                (loss * self._run.world_size).backward()
                return loss.detach(), {}
        for k, part in enumerate(loss.parts):
            with gradient_sync(self._model, last=always or (last and k == len(loss.parts) - 1)):
                with autocast(self._run.device, self._dtype):
                    value = part()
                (value * self._run.world_size).backward()
        return loss.value, loss.means

    def _skip_or_stop(self, step: int, batches: list[Batch], losses: list[torch.Tensor], found: str) -> None:
        """What --on_nonfinite asks for. Loss and norm are those of all ranks, so all of them come here."""
        broken = [batch for batch, loss in zip(batches, losses, strict=True) if not loss.isfinite()]
        suspects = gather_records([record for batch in broken for record in batch.record_ids])
        if not suspects:  # the losses are finite, a gradient is not
            suspects = gather_records([record for batch in batches for record in batch.record_ids])
        message = f"step {step}: {found}; nothing was updated; records: {suspects}"
        self._num_skipped_in_a_row += 1
        if self._config.on_nonfinite == "stop" or self._num_skipped_in_a_row == MAX_SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{message}. Lower --learning_rate, look at the records, or leave such steps out with "
                f"--on_nonfinite skip (at most {MAX_SKIPPED_IN_A_ROW} in a row)"
            )
        self._state.note_skipped()
        if self._run.is_main:
            print(f"{message}; skipped ({self._state.results['num_skipped_steps']} so far)", flush=True)


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
