"""Batches for one rank, read ahead by a thread, with a state of a few integers."""

import queue
import threading
import time
from collections.abc import Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from spikescale.errors import UserError

if TYPE_CHECKING:
    from spikescale.data_pipeline.blend import Blend
    from spikescale.data_pipeline.stream import TokenStream

READ_AHEAD = 2  # optimizer steps


class Loader(Iterator[list[torch.Tensor]]):
    """Iterates over optimizer steps, giving each rank its micro-batches.

    The global batch of a step is `batch_size` consecutive samples of the stream. Rank r of W takes
    the r-th of W equal parts, so that the ranks' parts, put together in rank order, are the same
    batch for every W.

    Args:
        stream: the order of samples.
        batch_size: samples a step over all ranks.
        rank, world_size: of the data-parallel group.
        micro_batch_size: samples a forward pass; None takes the rank's part at once.

    Raises UserError when the batch does not divide.
    """

    def __init__(
        self,
        stream: "TokenStream | Blend",
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        micro_batch_size: int | None = None,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise UserError(f"batch_size {batch_size} does not divide over {world_size} ranks")
        self._share = batch_size // world_size
        micro_batch_size = micro_batch_size or self._share
        if micro_batch_size < 1 or self._share % micro_batch_size:
            raise UserError(
                f"batch_size {batch_size} over {world_size} ranks gives {self._share} samples a rank, "
                f"which micro_batch_size {micro_batch_size} does not divide"
            )
        if not 0 <= rank < world_size:
            raise UserError(f"rank {rank} is outside a world of {world_size}")
        self.stream = stream
        self.batch_size = batch_size
        self.micro_batch_size = micro_batch_size
        self.wait_seconds = 0.0
        self._rank = rank
        self._samples = 0  # of the stream, over all ranks, that the consumer has received
        self._queue: queue.Queue[Any] = queue.Queue(maxsize=READ_AHEAD)
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[torch.Tensor]:
        """This rank's part of the next step: tensors (micro_batch_size, T + 1), int64."""
        if self._thread is None:
            self._start()
        began = time.perf_counter()
        rows = self._queue.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(rows, BaseException):
            self.close()
            raise rows
        self._samples += self.batch_size
        return list(rows.split(self.micro_batch_size))

    def ready(self, seconds: float) -> bool:
        """Whether the next step can be had, or it is known why not; waits so long at most."""
        if self._thread is None:
            self._start()
        began = time.perf_counter()
        with self._queue.not_empty:
            there = self._queue.not_empty.wait_for(lambda: len(self._queue.queue) > 0, timeout=seconds)
        self.wait_seconds += time.perf_counter() - began
        return there

    @property
    def samples(self) -> int:
        """Samples of the stream, over all ranks, that were received."""
        return self._samples

    def state_dict(self, behind: int = 0) -> dict[str, Any]:
        """The position, counting only what was received, and what the position refers to.

        behind: steps that were received and are to be received again.
        """
        samples = self._samples - behind * self.batch_size
        return {"samples": samples, **self.stream.position(samples)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position, with any number of ranks. Raises UserError when data or order differ."""
        self.close()
        self.stream.restore(state)
        self._samples = int(state["samples"])

    def sources(self, first: int) -> np.ndarray | None:
        """Of a mixture, the source of each of this rank's samples in a step; int64.

        first: the step's first sample.
        """
        return self.stream.sources(first + self._rank * self._share, self._share)

    def close(self) -> None:
        """Stop reading ahead. Iterating again continues at the same position."""
        self._stop.set()
        thread = self._thread
        if thread is not None:
            self.stream.interrupt(True)
            while thread.is_alive():
                # The reader may be waiting for room.
                try:
                    self._queue.get_nowait()
                except queue.Empty:
                    thread.join(timeout=0.01)
            self.stream.interrupt(False)
        self._thread = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        # Each reader has its own queue and flag, so that nothing of an earlier one can slip in.
        self._queue, self._stop = queue.Queue(maxsize=READ_AHEAD), threading.Event()
        self._thread = threading.Thread(
            target=self._read, args=(self._samples, self._queue, self._stop), name="token-loader", daemon=True
        )
        self._thread.start()

    def _read(self, position: int, output: "queue.Queue[Any]", stop: threading.Event) -> None:
        item: Any
        while not stop.is_set():
            try:
                item = self.stream.rows(position + self._rank * self._share, self._share)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            while not stop.is_set():
                try:
                    output.put(item, timeout=0.1)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            position += self.batch_size
