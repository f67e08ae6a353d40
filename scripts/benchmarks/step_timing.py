"""Ways to compute one training step, compared and timed on the same weights, moments and batch.

B sequences, L positions, M masked positions, V head outputs.
"""

import copy
import gc
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from llada.diffusion.masking import generator
from llada.models.checkpoints import DTYPES
from llada.run import autocast
from llada.training.monitor import peak_resident
from reference_losses import Loss, NoisedBatch, noise
from step_shapes import StepShape, bare

_TOLERANCE = {"float32": 1e-5, "bfloat16": 0.1}  # of loss and gradient, relative


@dataclass(frozen=True)
class Arm:
    """One way to compute the step."""

    name: str
    loss: Loss
    dtype: str
    fused: bool = False
    compiled: bool = False


def trunk_loss(model: torch.nn.Module, batch: NoisedBatch) -> Tensor:
    """No head and no cross-entropy: what memory is compared with."""
    return bare(model).model(input_ids=batch.x_t).last_hidden_state.float().square().mean()


class StepBench:
    """One set of weights and of AdamW moments, which every arm uses.

    Attributes:
        model: on its device, in training mode.
        now: the clock: seconds of the wall, or of this process.
    """

    def __init__(self, model: torch.nn.Module, shape: StepShape, *, clock: str, with_compiled: bool) -> None:
        self.shape = shape
        self.now = time.perf_counter if clock == "wall" else time.process_time
        self.model = self._compiled = model
        self.device = next(model.parameters()).device
        self.on_gpu = self.device.type == "cuda"
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        if with_compiled:
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


def compare(bench: StepBench, arms: list[Arm], batch: NoisedBatch) -> dict[str, dict[str, float]]:
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


def time_arms(bench: StepBench, arms: list[Arm], batch: NoisedBatch, repeats: int) -> dict[str, list[float]]:
    """Seconds per step of every arm; the arms take turns."""
    rounds = [[_told(arm.name, bench.seconds(arm, batch)) for arm in arms] for _ in range(repeats)]
    bench.free()
    return dict(zip([arm.name for arm in arms], map(list, zip(*rounds, strict=True)), strict=True))


def _told(name: str, seconds: float) -> float:
    print(f"  {name:13} {seconds:.4f} s", flush=True)  # what there is if the machine is taken away
    return seconds


def matmul_rate(bench: StepBench, dtype: str) -> float:
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
