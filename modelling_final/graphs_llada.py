"""Forwards recorded as CUDA graphs, and replayed.

On a short sequence the host takes longer to launch a forward's kernels than the GPU to run them; a recording
is launched as one. It holds for inputs of the shapes it was made with, and for the cache it was made with.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cache_llada import WindowCache

Inputs = dict[str, Tensor]
DEVICE = "cuda"  # what AMD's GPUs are called, too


def record(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Records what `run` does on the GPU: a function that does it again, and the tensor of its result."""
    # as in PyTorch, "CUDA semantics", CUDA graphs
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # libraries set up their workspaces, which must not be recorded
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class Recorder:
    """A model's forwards; from the second one of the same shapes on, it replays a recording."""

    def __init__(self, model: nn.Module) -> None:
        if model.device.type != DEVICE:
            raise ValueError(f"cuda_graphs needs a model on a GPU; this one is on {model.device}")
        self.model = model
        self.cache: WindowCache | None = None
        self.recordings: dict[tuple, tuple[Inputs, Callable[[], None], Tensor] | None] = {}

    def __call__(self, inputs: Inputs, cache: WindowCache | None) -> Tensor:
        """Logits [B, R, E], the caller's until the next call; the cache has its window set."""
        if cache is not self.cache:  # recordings write into the keys and values that they were made with
            self.recordings, self.cache = {}, cache
        window = None if cache is None else cache.window
        # a recording overwrites the window that it was made with, and does not append
        key = (window, *((name, value.shape) for name, value in inputs.items()))
        if key not in self.recordings:  # a shape that does not come again is not worth a recording
            self.recordings[key] = None
            return self._forward(inputs)
        if self.recordings[key] is None:
            buffers = {name: value.clone() for name, value in inputs.items()}
            self.recordings[key] = (buffers, *record(lambda: self._forward(buffers)))
        buffers, replay, logits = self.recordings[key]
        for name, value in inputs.items():
            buffers[name].copy_(value)
        replay()
        return logits

    def _forward(self, inputs: Inputs) -> Tensor:
        return self.model(**inputs, past_key_values=self.cache).logits
