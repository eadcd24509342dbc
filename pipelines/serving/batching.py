"""Passes of the networks for many requests at once: a batch costs far less than its rows alone.

What is asked while a pass runs is the next batch. Only an idle network waits, `WAIT_SECONDS` at
most, and only while there are other requests that may still ask.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import Executor
from dataclasses import dataclass

import torch
from torch import Tensor

import aegan
from aegan.operations import BATCH_SIZE, Network, run

WAIT_SECONDS = 0.005


@dataclass(frozen=True)
class _Call:
    network: Network
    inputs: Tensor
    outputs: asyncio.Future[Tensor]


class Batcher:
    """The networks of one model, one pass at a time in `worker`'s only thread.

    `expected` says how many requests are at work; `observe` hears of every pass.
    """

    def __init__(
        self,
        model: aegan.AEGAN,
        worker: Executor,
        *,
        expected: Callable[[], int],
        observe: Callable[[Network, int], None],
    ) -> None:
        self._model, self._worker = model, worker
        self._expected, self._observe = expected, observe
        self._calls: list[_Call] = []
        self._more = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    async def __call__(self, network: Network, inputs: Tensor) -> Tensor:
        """The outputs for at most BATCH_SIZE inputs."""
        loop = asyncio.get_running_loop()
        call = _Call(network, inputs, loop.create_future())
        self._calls.append(call)
        self._more.set()
        if self._task is None:
            self._task = loop.create_task(self._run())
        return await call.outputs

    async def _run(self) -> None:
        """Pass after pass, until nothing is asked."""
        loop = asyncio.get_running_loop()
        while self._calls:
            await self._wait_for_more()
            if batch := self._take():
                # In one way or another it answers every call.
                for call, outputs in await loop.run_in_executor(self._worker, self._pass, batch):
                    if call.outputs.done():  # nobody waits for it any more
                        continue
                    if isinstance(outputs, Exception):
                        call.outputs.set_exception(outputs)
                    else:
                        call.outputs.set_result(outputs)
        self._task = None

    async def _wait_for_more(self) -> None:
        loop = asyncio.get_running_loop()
        end = loop.time() + WAIT_SECONDS
        while len(self._calls) < self._expected() and self._rows() < BATCH_SIZE:
            self._more.clear()
            try:
                async with asyncio.timeout_at(end):
                    await self._more.wait()
            except TimeoutError:
                return

    def _rows(self) -> int:
        return sum(len(call.inputs) for call in self._calls)

    def _take(self) -> list[_Call]:
        """The oldest call and those after it that fit into one pass with it."""
        self._calls = [call for call in self._calls if not call.outputs.done()]
        batch: list[_Call] = []
        left: list[_Call] = []
        rows = 0
        for call in self._calls:
            fits = not batch or (
                call.network == batch[0].network and rows + len(call.inputs) <= BATCH_SIZE
            )
            (batch if fits else left).append(call)
            rows += len(call.inputs) * fits
        self._calls = left
        return batch

    def _pass(self, batch: list[_Call]) -> list[tuple[_Call, Tensor | Exception]]:
        """Outputs, or why there are none; what fails together is tried alone."""
        sizes = [len(call.inputs) for call in batch]
        network = batch[0].network
        try:
            outputs = run(self._model, network, torch.cat([call.inputs for call in batch]))
        except Exception as error:
            if len(batch) == 1:
                return [(batch[0], error)]
            return [result for call in batch for result in self._pass([call])]
        self._observe(network, sum(sizes))
        return list(zip(batch, outputs.split(sizes), strict=True))
