"""What a CUDA device reaches at best: a copy, and one large dense matrix product."""

from collections.abc import Callable
from typing import Any

from sim.measure.experts import Timing

_COPIED_BYTES = 2 << 30
_SIDE = 8192
Timed = Callable[[Callable[[], Any], int], Timing]


def copy_tb_per_s(timed: Timed) -> float:
    """Bandwidth of a copy inside the device's memory, bytes read and written."""
    import torch

    source = torch.ones(_COPIED_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * _COPIED_BYTES / timed(lambda: target.copy_(source), 1).time_us / 1e6


def dense_tflops(timed: Timed, dtype: str) -> float:
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

    product()
    return 2 * _SIDE**3 / timed(product, 1).time_us / 1e6
