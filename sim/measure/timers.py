"""Time of work on a device, by replays of a captured CUDA graph or a processor's clock; and what a CUDA device reaches at best:
a copy, and one large dense matrix product.
"""

import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np

from sim.errors import InputError

_REPLAY_US = 3_000  # replays are timed for about so long: steps differ by more than replays do
_FEWEST, _MOST = 3, 15
_COPIED_BYTES = 2 << 30
_SIDE = 8192  # of the matrices whose product is timed
Work = Callable[[], Any]


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
        """Times of replays, one right after the other, so that the device never waits for the next: of so many, or as many as its
        own clock asks for (not for work that waits for others). `work` has run once already: kernels must be loaded before.
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


Timer = ProcessorTimer | GraphTimer


def cuda_torch() -> Any:
    """PyTorch on a machine with a CUDA device. Raises InputError where it is not installed, or sees no device."""
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


def copy_tb_per_s(timer: Timer) -> float:
    """Bandwidth of a copy inside the device's memory, bytes read and written."""
    import torch

    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / _median_us(timer, lambda: target.copy_(source)) / 1e6


def dense_tflops(timer: Timer, dtype: str) -> float:
    """TFLOPS of a product of two random square matrices."""
    import torch

    a, b = (torch.randn((_SIDE, _SIDE), device="cuda").to(torch.bfloat16) for _ in range(2))
    one = torch.ones((), device="cuda")
    a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)

    def product() -> Any:
        if dtype == "bf16":
            return torch.mm(a, b.t())
        scales = {"scale_a": one, "scale_b": one}
        return torch._scaled_mm(a8, b8.t(), **scales, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * _SIDE**3 / _median_us(timer, product) / 1e6


def _median_us(timer: Timer, work: Work) -> float:
    work()
    return float(np.median(timer.times_us(work)))
