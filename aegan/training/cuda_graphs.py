"""CUDA graphs: the kernels of a step recorded once and launched as one, without Python between."""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

WARM_UP_CALLS = 3  # libraries choose kernels, optimisers make their state

Function = Callable[..., dict[str, Tensor]]


class Graphed:
    """A function of tensors (fixed shapes) to named tensors, replayed after a few plain calls.

    Whatever else it reads or writes must stay where it is in memory. Random numbers follow
    `torch.manual_seed` as they do without a graph.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.calls = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.inputs: list[Tensor] = []
        self.outputs: dict[str, Tensor] = {}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        stream, caller = _recording_stream(), torch.cuda.current_stream()
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            outputs = self._call(*inputs)
        caller.wait_stream(stream)
        return outputs

    def _call(self, *inputs: Tensor) -> dict[str, Tensor]:
        self.calls += 1
        if self.calls <= WARM_UP_CALLS:
            return self.function(*inputs)
        if self.graph is None:
            self.inputs = [tensor.clone() for tensor in inputs]
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=_recording_stream()):
                self.outputs = self.function(*self.inputs)
        for static, tensor in zip(self.inputs, inputs, strict=True):
            static.copy_(tensor)
        self.graph.replay()
        return {name: tensor.clone() for name, tensor in self.outputs.items()}


@functools.cache
def _recording_stream() -> torch.cuda.Stream:
    """One for all graphs and their warm-up: the default stream cannot be recorded."""
    return torch.cuda.Stream()
