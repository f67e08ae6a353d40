"""Times one training step against the published step and a peer's: same weights, same batch, one process.

Arms:
    published   LLaDA GUIDELINES.md: logits of every position, cross-entropy of the masked ones / p_mask, and
                AdamW as torch makes it by default.
    dllm        what dllm's MDLMTrainer computes: cross-entropy at every position over logits [B, V, L].
    dllm-real   that trainer itself, when its checkout is given with --peer_path.
    ours        LM head and cross-entropy at the masked rows, chunk by chunk, fused AdamW (and --compile).
    ours-X      with --ablations: ours without X.

A step is forward, backward, clipping and AdamW with learning rate 0: all of its work is done, and the weights
stay what they are. Losses and gradients are compared first; then the arms take turns, --repeats times, and
ratios are of steps that stood beside one another. MFU counts the FLOPs that the loss needs and divides by the
rate of a large matrix product in the same run. --memory gives what head and loss add to the peak of a trunk
without them, and the peak of the whole step: allocated bytes on a GPU; on a CPU resident bytes, each arm in a
process of its own.

Run:
    python scripts/benchmarks/bench_step.py --shape cpu --threads 2 --ablations --memory
    python scripts/benchmarks/bench_step.py --shape cpu-v126k --threads 2 --repeats 5
    bash scripts/benchmarks/gpu.sh   # the 1B and 8B-LoRA shapes on a GPU
"""

import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    shape: str = flag("cpu", help="Model and batch.", choices=["cpu", "cpu-v126k", "1b", "8b-lora", "micro"])
    batch_size: int | None = flag(None, help="Sequences per step; default the shape's.", at_least=1)
    length: int | None = flag(None, help="Tokens per sequence; default the shape's.", at_least=1)
    lora_r: int | None = flag(
        None, help="LoRA rank on all linear layers, 0 = none; default the shape's.", at_least=0
    )
    device: str = flag("cpu", help="cpu or cuda.")
    dtype: str = flag("float32", help="Of the matrix products in ours.", choices=["float32", "bfloat16"])
    reference_dtype: str | None = flag(
        None, help="The same in published and dllm; default --dtype.", choices=["float32", "bfloat16"]
    )
    compile: bool = flag(False, help="torch.compile per block, in ours.")
    gradient_checkpointing: bool = flag(False, help="Recompute blocks in the backward, in all arms.")
    ablations: bool = flag(False, help="Also time ours without one feature at a time.")
    memory: bool = flag(False, help="Also measure peak memory.")
    mask_ratio: list[float] = flag(
        [0.5, 1.0], help="Masked shares of the tokens, measured one by one.", above=0, at_most=1
    )
    repeats: int = flag(7, help="Timed steps per arm.", at_least=1)
    clock: str = flag(
        "wall",
        help="Time on the wall, or CPU seconds of this process: what else a shared machine does is then no "
        "part of a step.",
        choices=["wall", "cpu"],
    )
    threads: int | None = flag(None, help="CPU threads; default torch's choice.", at_least=1)
    peer_path: str | None = flag(None, help="A checkout of dllm, to time its own trainer too.", reads="path")
    output: str | None = flag(None, help="JSON file for all numbers.", writes="file")
    seed: int = flag(0, help="Of weights, tokens and masks.", at_least=0)
    memory_of: str | None = flag(None, help="Only print this arm's peak memory; --memory runs this.")

    def resolve(self) -> "StepShape":
        """Checks the flags and gives the shape they ask for."""
        if not self.mask_ratio or not all(0 < ratio <= 1 for ratio in self.mask_ratio):
            raise ValueError(f"--mask_ratio {self.mask_ratio}: every ratio must be in (0, 1]")
        if self.repeats < 1:
            raise ValueError(f"--repeats {self.repeats}: must be at least 1")
        if self.device.startswith("cuda") and self.clock == "cpu":
            raise ValueError(f"--clock cpu does not see what --device {self.device} does; use wall")
        if self.device.startswith("cuda") and not torch.cuda.is_available():
            raise ValueError(f"--device {self.device}: torch sees no GPU here; use --device cpu")
        self.reference_dtype = self.reference_dtype or self.dtype
        wishes = {name: getattr(self, name) for name in ("batch_size", "length", "lora_r")}
        return replace(SHAPES[self.shape], **{name: n for name, n in wishes.items() if n is not None})


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import torch

from llada.training.cost import count_parameters, flops_per_token
from reference_losses import (
    NoisedBatch,
    all_rows_loss,
    dllm_loss,
    our_loss,
    peer_loss,
    published_loss,
    unchunked_loss,
)
from step_shapes import SHAPES, StepShape, bare, build_model
from step_timing import Arm, StepBench, compare, matmul_rate, time_arms, trunk_loss


def make_bench(config: Config, shape: StepShape) -> StepBench:
    """The weights that the flags ask for."""
    model = build_model(
        shape, dtype=config.dtype, device=config.device, seed=config.seed,
        gradient_checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    return StepBench(model, shape, clock=config.clock, with_compiled=config.compile)


def make_arms(config: Config, mask_id: int) -> list[Arm]:
    """The arms that the flags ask for; the others are compared with the first."""
    reference = config.reference_dtype or config.dtype
    arms = [Arm("published", published_loss, reference), Arm("dllm", dllm_loss, reference)]
    if config.peer_path:
        arms.append(Arm("dllm-real", peer_loss(config.peer_path, mask_id), reference))
    ours = Arm("ours", our_loss, config.dtype, fused=True, compiled=config.compile)
    arms.append(ours)
    if config.ablations:
        arms.append(replace(ours, name="ours-rows", loss=all_rows_loss))
        arms.append(replace(ours, name="ours-chunks", loss=unchunked_loss))
        arms.append(replace(ours, name="ours-fused", fused=False))
        if config.dtype != "float32":
            arms.append(replace(ours, name="ours-bfloat16", dtype="float32"))
        if config.compile:
            arms.append(replace(ours, name="ours-compile", compiled=False))
    return arms


def memory_above_trunk(
    bench: StepBench, arms: list[Arm], batch: NoisedBatch, flags: list[str]
) -> dict[str, dict[str, float]]:
    """Bytes per arm: `loss`, by which head and loss raise the trunk's peak, and `step`, the whole peak."""
    peaks = {}
    for arm in arms:
        peaks[arm.name] = bench.peaks(arm, batch) if bench.on_gpu else _peaks_in_new_process(arm.name, flags)
    trunk = peaks["trunk"]["loss"]
    return {name: {"loss": peak["loss"] - trunk, "step": peak["step"]} for name, peak in peaks.items()}


def _peaks_in_new_process(arm: str, flags: list[str]) -> dict[str, float]:
    # Freed blocks from 64 kB up go back to the system, else the peak depends on the allocator's habits.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *flags, "--memory_of", arm]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {arm} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def spread(values: list[float]) -> list[float]:
    """[median, lowest, highest]."""
    return [statistics.median(values), min(values), max(values)]


def summarize(seconds: dict[str, list[float]], *, tokens: int, flops: float, rates: dict[str, float]) -> dict:
    """Per arm: seconds, tokens per second, MFU, and how many times faster than published and dllm."""
    rows = {}
    for name, values in seconds.items():
        middle = statistics.median(values)
        row = {"seconds": spread(values), "tokens_per_second": tokens / middle}
        row["mfu"] = flops / middle / rates[name]
        for other in ("published", "dllm"):
            if other in seconds:
                row[f"x_{other}"] = spread([b / a for a, b in zip(values, seconds[other], strict=True)])
        rows[name] = row
    return rows


def print_table(rows: dict[str, dict], memory: dict[str, dict[str, float]]) -> None:
    """One line per arm."""
    print(
        f"{'arm':13} {'s per step':>24} {'tokens/s':>9} {'MFU':>6} {'x published':>17} {'x dllm':>17}", end=""
    )
    print(" head+loss MB   peak MB" if memory else "")
    for name, row in rows.items():
        print(f"{name:13} {'{:8.4f} ({:.4f}-{:.4f})'.format(*row['seconds']):>24}", end="")
        print(f" {row['tokens_per_second']:9.0f} {row['mfu']:6.1%}", end="")
        for other in ("x_published", "x_dllm"):
            print(f" {'{:.2f} ({:.2f}-{:.2f})'.format(*row[other]) if other in row else '':>17}", end="")
        if name in memory:
            print(f" {memory[name]['loss'] / 1e6:12.0f} {memory[name]['step'] / 1e6:9.0f}", end="")
        print(flush=True)


def measure(
    bench: StepBench, arms: list[Arm], config: Config, *, mask_ratio: float, flags: list[str]
) -> dict:
    """Everything at one mask ratio, printed and returned."""
    batch = bench.batch(mask_ratio, config.seed)
    print(f"\nmask ratio {mask_ratio}", flush=True)
    errors = compare(bench, arms, batch)
    for arm in arms:
        error = errors.get(arm.name, {"out of memory": float("nan")})
        print(
            f"  {arm.name:13}", "  ".join(f"{key} {value:.1e}" for key, value in error.items()) or "reference"
        )
    arms = [arm for arm in arms if arm.name in errors]
    seconds = time_arms(bench, arms, batch, config.repeats)
    num_tokens = batch.x_0.numel()
    flops = num_tokens * flops_per_token(
        bare(bench.model).config, count_parameters(bench.model), length=bench.shape.length,
        masked_share=batch.rows.numel() / num_tokens,
    )  # fmt: skip
    rates = {dtype: matmul_rate(bench, dtype) for dtype in sorted({arm.dtype for arm in arms}, reverse=True)}
    print("  matrix product: " + ", ".join(f"{x / 1e12:.3f} TFLOP/s {dtype}" for dtype, x in rates.items()))
    by_arm = {arm.name: rates[arm.dtype] for arm in arms}
    rows = summarize(seconds, tokens=num_tokens, flops=flops, rates=by_arm)
    memory = {}
    if config.memory:
        trunk = Arm("trunk", trunk_loss, config.dtype, fused=True)
        memory = memory_above_trunk(bench, [trunk, *arms], batch, [*flags, "--mask_ratio", str(mask_ratio)])
    print_table(rows, memory)
    return {
        "errors": errors,
        "seconds": seconds,
        "flops": flops,
        "rates": rates,
        "arms": rows,
        "memory": memory,
    }


def main(argv: list[str] | None = None) -> None:
    """Compares and measures the arms, and prints a table per mask ratio."""
    flags = sys.argv[1:] if argv is None else argv
    config = parse(Config, flags, description=__doc__)
    shape = config.resolve()
    if config.threads:
        torch.set_num_threads(config.threads)
    bench = make_bench(config, shape)
    arms = make_arms(config, shape.vocab_size - 1)
    if config.memory_of:
        arms.append(Arm("trunk", trunk_loss, config.dtype, fused=True))
        arm = next(arm for arm in arms if arm.name == config.memory_of)
        print(json.dumps(bench.peaks(arm, bench.batch(config.mask_ratio[0], config.seed))))
        return
    machine = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if bench.on_gpu else config.device,
        "threads": torch.get_num_threads(),
        "clock": config.clock,
        "load": os.getloadavg()[0],
    }
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results: dict[str, object] = {"config": asdict(config), "machine": machine}
    for mask_ratio in config.mask_ratio:
        results[str(mask_ratio)] = measure(bench, arms, config, mask_ratio=mask_ratio, flags=flags)
    if config.output:
        Path(config.output).write_text(json.dumps(results, indent=1), encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
