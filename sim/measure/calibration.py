"""What a CUDA device reaches at best: a copy, and one large dense matrix product."""

from typing import Any

import numpy as np

from sim.measure.timers import Timer, Work

_COPIED_BYTES = 2 << 30
_SIDE = 8192


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
