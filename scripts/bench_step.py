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
    python scripts/bench_step.py --shape cpu --threads 2 --ablations --memory
    python scripts/bench_step.py --shape cpu-v126k --threads 2 --repeats 5
    bash scripts/bench_gpu_step.sh   # the 1B and 8B-LoRA shapes on a GPU
"""

import copy
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from llada.bench.reference_losses import (
    Loss,
    NoisedBatch,
    all_rows_loss,
    dllm_loss,
    noise,
    our_loss,
    peer_loss,
    published_loss,
    unchunked_loss,
)
from llada.config import flag, parse, read_yaml
from llada.footprint import count_parameters, flops_per_token
from llada.masking import generator
from llada.model import DTYPES, ROOT, attach_lora
from llada.runtime import autocast
from modelling_final import LLaDAConfig, LLaDAModelLM

# B sequences, L positions, M masked positions, V head outputs


@dataclass(frozen=True)
class Shape:
    """A model and a batch: fields of LLaDAConfig (or a size in configs/models), V, B, L and the LoRA rank."""

    model: dict[str, int] | str
    vocab_size: int
    batch_size: int
    length: int
    lora_r: int = 0


_SMALL = {"d_model": 384, "n_layers": 6, "n_heads": 6, "n_kv_heads": 6, "mlp_hidden_size": 1024}
_MICRO = {"d_model": 32, "n_layers": 2, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 48}
_LLADA_VOCABULARY = LLaDAConfig().embedding_size
SHAPES = {
    "cpu": Shape(_SMALL, vocab_size=32_000, batch_size=8, length=256),
    "cpu-v126k": Shape(_SMALL, vocab_size=_LLADA_VOCABULARY, batch_size=8, length=256),
    "1b": Shape("1b", vocab_size=_LLADA_VOCABULARY, batch_size=1, length=4096),
    "8b-lora": Shape("8b", vocab_size=_LLADA_VOCABULARY, batch_size=1, length=2048, lora_r=16),
    "micro": Shape(_MICRO, vocab_size=200, batch_size=4, length=24),
}
_PRECISIONS = ["float32", "bfloat16"]
_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}  # of loss and gradient, relative


@dataclass(kw_only=True)
class Config:
    """Flags of the benchmark."""

    shape: str = flag("cpu", help="Model and batch.", choices=list(SHAPES))
    batch_size: int | None = flag(None, help="Sequences per step; default the shape's.")
    length: int | None = flag(None, help="Tokens per sequence; default the shape's.")
    lora_r: int | None = flag(None, help="LoRA rank on all linear layers, 0 = none; default the shape's.")
    device: str = flag("cpu", help="cpu or cuda.")
    dtype: str = flag("float32", help="Of the matrix products in ours.", choices=_PRECISIONS)
    reference_dtype: str | None = flag(
        None, help="The same in published and dllm; default --dtype.", choices=_PRECISIONS
    )
    compile: bool = flag(False, help="torch.compile per block, in ours.")
    gradient_checkpointing: bool = flag(False, help="Recompute blocks in the backward, in all arms.")
    ablations: bool = flag(False, help="Also time ours without one feature at a time.")
    memory: bool = flag(False, help="Also measure peak memory.")
    mask_ratio: list[float] = flag([0.5, 1.0], help="Masked shares of the tokens, measured one by one.")
    repeats: int = flag(7, help="Timed steps per arm.")
    clock: str = flag(
        "wall",
        help="Time on the wall, or CPU seconds of this process: what else a shared machine does is then no "
        "part of a step.",
        choices=["wall", "cpu"],
    )
    threads: int | None = flag(None, help="CPU threads; default torch's choice.")
    peer_path: str | None = flag(None, help="A checkout of dllm, to time its own trainer too.")
    output: str | None = flag(None, help="JSON file for all numbers.")
    seed: int = flag(0, help="Of weights, tokens and masks.")
    memory_of: str | None = flag(None, help="Only print this arm's peak memory; --memory runs this.")

    def resolve(self) -> Shape:
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


def build_model(config: Config, shape: Shape) -> torch.nn.Module:
    """The model with random weights on the device: float32, or in --dtype under adapters."""
    fields, last = shape.model, shape.vocab_size - 1
    if isinstance(fields, str):
        fields = read_yaml(ROOT / f"configs/models/{fields}.yaml")
    model_config = LLaDAConfig(
        **fields, vocab_size=shape.vocab_size, embedding_size=shape.vocab_size, mask_token_id=last,
        eos_token_id=last - 1, pad_token_id=last - 1, max_sequence_length=shape.length,
    )  # fmt: skip
    dtype = DTYPES[config.dtype] if shape.lora_r else torch.float32
    with torch.device(config.device), torch.random.fork_rng():
        torch.manual_seed(config.seed)
        model = LLaDAModelLM._from_config(model_config, dtype=dtype)
    if shape.lora_r:
        model = attach_lora(
            model, rank=shape.lora_r, alpha=2.0 * shape.lora_r, dropout=0.0, seed=config.seed,
            target_modules=["all-linear"],
        ).to(config.device)  # fmt: skip
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # zero at first, and then lora_A has no gradient to compare
                torch.nn.init.constant_(parameter, 0.01)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def bare(model: torch.nn.Module) -> LLaDAModelLM:
    """The model inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") else model


def trunk_loss(model: torch.nn.Module, batch: NoisedBatch) -> Tensor:
    """No head and no cross-entropy: what memory is compared with."""
    return bare(model).model(input_ids=batch.x_t).last_hidden_state.float().square().mean()


@dataclass(frozen=True)
class Arm:
    """One way to compute the step."""

    name: str
    loss: Loss
    dtype: str
    fused: bool = False
    compiled: bool = False


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


class Bench:
    """One set of weights and of AdamW moments, which every arm uses."""

    def __init__(self, config: Config, shape: Shape) -> None:
        self.shape = shape
        self.now = time.perf_counter if config.clock == "wall" else time.process_time
        self.on_gpu = config.device.startswith("cuda")
        self.device = torch.device(config.device)
        self.model = self._compiled = build_model(config, shape)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if config.compile:
            # the same Parameters in other modules, so that the rest stays eager
            self._compiled = copy.deepcopy(self.model, {id(p): p for p in self.model.parameters()})
            for block in bare(self._compiled).model.transformer.blocks:
                block.compile()
        self._optimizers = {}
        moments = [(torch.zeros_like(p), torch.zeros_like(p)) for p in self.parameters]
        for kind, fused in ((False, None), (True, True)):
            optimizer = torch.optim.AdamW(self.parameters, lr=0.0, fused=fused)
            for parameter, (first, second) in zip(self.parameters, moments, strict=True):
                step = torch.ones((), device=self.device if fused else "cpu")  # where each wants its counter
                optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
            self._optimizers[kind] = optimizer

    def batch(self, mask_ratio: float, seed: int) -> NoisedBatch:
        """Random tokens, the share `mask_ratio` of them masked."""
        random, mask_id = generator(seed, "bench"), self.shape.vocab_size - 1
        x_0 = torch.from_numpy(random.integers(0, mask_id, (self.shape.batch_size, self.shape.length)))
        return noise(x_0, mask_id, mask_ratio, random).to(self.device)

    def forward_backward(self, arm: Arm, batch: NoisedBatch) -> Tensor:
        """The loss; the parameters have their gradients afterwards."""
        for parameter in self.parameters:
            parameter.grad = None
        with autocast(self.device, arm.dtype):
            loss = arm.loss(self._compiled if arm.compiled else self.model, batch)
        loss.backward()
        return loss.detach()

    def update(self, arm: Arm) -> None:
        """Clipping and AdamW."""
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self._optimizers[arm.fused].step()

    def seconds(self, arm: Arm, batch: NoisedBatch) -> float:
        """Time of one whole step by --clock, the GPU's work included."""
        self.wait()
        start = self.now()
        self.forward_backward(arm, batch)
        self.update(arm)
        self.wait()
        return self.now() - start

    def peaks(self, arm: Arm, batch: NoisedBatch) -> dict[str, float]:
        """Peak bytes after forward and backward, and after the whole step.

        On a CPU this is the peak of the process since it started, so only its first call means anything.
        """
        self.free()
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        found = {}
        for name, part in (("loss", self.forward_backward), ("step", lambda arm, _: self.update(arm))):
            part(arm, batch)
            found[name] = torch.cuda.max_memory_allocated() if self.on_gpu else peak_resident()
        return found

    def wait(self) -> None:
        """Until the GPU has done what it was given."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def free(self) -> None:
        """Drops gradients, and what a failed step left behind."""
        for parameter in self.parameters:
            parameter.grad = None
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()


def peak_resident() -> float:
    """Peak resident bytes of this process.

    Not ru_maxrss: that of a new process starts at what its parent had.
    """
    (line,) = (s for s in Path("/proc/self/status").read_text().splitlines() if s.startswith("VmHWM:"))
    return 1024 * float(line.split()[1])


def compare(bench: Bench, arms: list[Arm], batch: NoisedBatch) -> dict[str, dict[str, float]]:
    """Warms every arm up with a step, and gives its relative errors of loss and gradient against the first.

    `worst_tensor` is the largest error of a single parameter, among those whose gradient counts (above 1e-4
    of the whole). An arm that does not fit into the GPU's memory is missing from what is returned.

    Raises:
        RuntimeError: loss or gradient are off by more than 1e-5, or 0.1 with bfloat16 products.
    """
    errors: dict[str, dict[str, float]] = {}
    first, expected, expected_grads = None, 0.0, []
    for arm in arms:
        try:
            bench.seconds(arm, batch)
            loss = float(bench.forward_backward(arm, batch))
        except torch.OutOfMemoryError:
            bench.free()
            continue
        grads = [p.grad for p in bench.parameters]
        if first is None:
            first, expected, expected_grads, errors[arm.name] = arm, loss, grads, {}
            continue
        off = torch.stack([(g - e).norm() for g, e in zip(grads, expected_grads, strict=True)])
        size = torch.stack([e.norm() for e in expected_grads])
        counts = size > 1e-4 * size.norm()
        error = {
            "loss": abs(loss - expected) / abs(expected),
            "gradient": float(off.norm() / size.norm()),
            "worst_tensor": float((off[counts] / size[counts]).max()),
        }
        tolerance = max(_TOLERANCE[arm.dtype], _TOLERANCE[first.dtype])
        if arm.name == "dllm-real":
            tolerance = max(tolerance, 1e-4)  # it adds 1e-6 to t before it divides
        if not max(error["loss"], error["gradient"]) <= tolerance:
            raise RuntimeError(f"{arm.name} does not compute what {first.name} does: relative errors {error}")
        errors[arm.name] = error
    bench.free()
    return errors


def time_arms(bench: Bench, arms: list[Arm], batch: NoisedBatch, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of every arm; the arms take turns."""
    rounds = [[bench.seconds(arm, batch) for arm in arms] for _ in range(repeats)]
    bench.free()
    return dict(zip([arm.name for arm in arms], map(list, zip(*rounds, strict=True)), strict=True))


def matmul_rate(bench: Bench, dtype: str) -> float:
    """FLOP/s of a large square matrix product, the best of several: what the machine can do."""
    size = 8192 if bench.on_gpu else 2048
    a, b = (torch.randn(size, size, device=bench.device, dtype=DTYPES[dtype]) for _ in range(2))
    best = float("inf")
    for _ in range(20 if bench.on_gpu else 6):
        bench.wait()
        start = bench.now()
        a @ b
        bench.wait()
        best = min(best, bench.now() - start)
    return 2 * size**3 / best


def memory_above_trunk(
    bench: Bench, arms: list[Arm], batch: NoisedBatch, flags: list[str]
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


def measure(bench: Bench, arms: list[Arm], config: Config, *, mask_ratio: float, flags: list[str]) -> dict:
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
    rates = {dtype: matmul_rate(bench, dtype) for dtype in _PRECISIONS if any(a.dtype == dtype for a in arms)}
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
    bench = Bench(config, shape)
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
    main()
