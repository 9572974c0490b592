"""Time of work on a device: replays of a captured CUDA graph, or a processor's clock."""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from sim.errors import InputError

_REPLAY_US = 3_000  # replays are timed for about so long: steps differ by more than replays do
_FEWEST, _MOST = 3, 15
Work = Callable[[], Any]


class Timer(Protocol):
    """Takes the time of work that may be done again and again."""

    def times_us(self, work: Work, times: int | None = None) -> list[float]:
        """Times of repetitions: of so many, or as many as its own clock asks for (not for work that waits for others)."""


class ProcessorTimer:
    """Repetitions by the clock, three by default."""

    def times_us(self, work: Work, times: int | None = None) -> list[float]:
        """Times of the repetitions."""
        found = []
        for _ in range(times or 3):
            start = time.perf_counter()
            work()
            found.append((time.perf_counter() - start) * 1e6)
        return found


class GraphTimer:
    """Replays of a captured CUDA graph between events: no launch of a kernel is in them."""

    def __init__(self) -> None:
        self._torch = torch = cuda_torch()
        self._stream = torch.cuda.Stream()  # of the current device
        torch.zeros(1, device="cuda")  # loads the kernel, which a capture must not
        self.renew_pool()

    def renew_pool(self) -> None:
        """Give back all memory that captures and the allocator hold for the next: a pool only grows, in pieces that fit none
        of the sizes to come, and a capture that finds no memory does not ask the allocator's cache for it.
        """
        self._keeper: Any = None
        self._torch.cuda.synchronize()
        self._torch.cuda.empty_cache()
        self._pool = self._torch.cuda.graph_pool_handle()
        self._keeper = self._capture(lambda: self._torch.zeros(1, device="cuda"))  # keeps the memory of the pool

    def times_us(self, work: Work, times: int | None = None) -> list[float]:
        """Times of replays, one right after the other, so that the device never waits for the next; `work` has run once
        already, since kernels must be loaded before they are captured.
        """
        graph = self._capture(work)
        with self._torch.cuda.stream(self._stream):
            if times is None:
                probe_us = self._replay(graph, 1)[0]
                times = int(np.clip(_REPLAY_US / max(probe_us, 1.0), _FEWEST, _MOST))
            return self._replay(graph, times)

    def _capture(self, work: Work) -> Any:
        """A graph of the work. By the plain calls: the context manager empties the allocator's cache each time."""
        cuda = self._torch.cuda
        graph = cuda.CUDAGraph()
        cuda.synchronize()
        with cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")  # NCCL's own threads may go on
            try:
                work()
            finally:
                graph.capture_end()
        cuda.synchronize()
        return graph

    def _replay(self, graph: Any, times: int) -> list[float]:
        """Times of replays after one that warms up."""
        events = [self._torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
        graph.replay()
        events[0].record()
        for event in events[1:]:
            graph.replay()
            event.record()
        self._torch.cuda.synchronize()
        return [1e3 * a.elapsed_time(b) for a, b in pairwise(events)]


def cuda_torch() -> Any:
    """PyTorch on a machine with a CUDA device.

    Raises
    ------
    InputError
        PyTorch is not installed, or sees no device.
    """
    instead = "(--device cpu runs the same path at toy sizes)"
    try:
        import torch
    except ImportError:
        raise InputError(
            f"--device cuda needs PyTorch, which is not installed: pip install 'epsim[gpu]' {instead}"
        ) from None
    if not torch.cuda.is_available():
        raise InputError(f"--device cuda: PyTorch {torch.__version__} sees no CUDA device on this machine {instead}")
    return torch
