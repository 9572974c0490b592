"""Triton kernels, fused as serving engines fuse them: SiLU(gate) * up, for FP8 with its rowwise quantisation; the quantisation
of rows that are sent; and the weighted sum of a token's experts.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _silu_mul(gate_up, out, scale, inner, BLOCK: tl.constexpr, QUANTISE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < inner
    gate = tl.load(gate_up + row * 2 * inner + i, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * 2 * inner + inner + i, mask=inside, other=0.0).to(tl.float32)
    value = gate / (1.0 + tl.exp(-gate)) * up
    if QUANTISE:
        unit = tl.maximum(tl.max(tl.abs(value), axis=0) / 448.0, 1e-12)
        tl.store(scale + row, unit)
        value = tl.minimum(tl.maximum(value / unit, -448.0), 448.0)
    tl.store(out + row * inner + i, value.to(out.dtype.element_ty), mask=inside)


def silu_mul(gate_up: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Activation of BF16 rows [rows, 2 * inner]: values [rows, inner] in `dtype`, and in FP8 a scale for each row."""
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    quantise = dtype == "fp8"
    out = gate_up.new_empty((rows, inner), dtype=torch.float8_e4m3fn if quantise else torch.bfloat16)
    scale = gate_up.new_empty(rows, dtype=torch.float32)
    if rows:
        _silu_mul[(rows,)](gate_up, out, scale, inner, BLOCK=triton.next_power_of_2(inner), QUANTISE=quantise)
    return out, scale if quantise else None


@triton.jit
def _pack(x, values, scales, width, PADDING: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    inside = i < width
    value = tl.load(x + row * width + i, mask=inside, other=0.0).to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(value), axis=0) / 448.0, 1e-12)
    tl.store(scales + row * ((width + PADDING) // 4) + width // 4, unit)
    value = tl.minimum(tl.maximum(value / unit, -448.0), 448.0)
    tl.store(values + row * (width + PADDING) + i, value.to(values.dtype.element_ty), mask=inside)


def pack(x: torch.Tensor) -> torch.Tensor:
    """BF16 rows [rows, width] in E4M3, each with its scale behind it: int64 [rows, width / 8 + 2]."""
    rows, width = x.shape
    out = x.new_empty((rows, width + 16), dtype=torch.uint8)
    if rows:
        block = triton.next_power_of_2(width)
        _pack[(rows,)](x, out.view(torch.float8_e4m3fn), out.view(torch.float32), width, PADDING=16, BLOCK=block)
    return out.view(torch.int64)


@triton.jit
def _weighted_sum(y, rows, weights, out, width, N: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for n in tl.static_range(N):
        row = tl.load(rows + i * N + n).to(tl.int64)
        weight = tl.load(weights + i * N + n)
        value = tl.load(y + row * width + column, mask=(column < width) & (row >= 0), other=0.0)
        total += weight * value.to(tl.float32)
    tl.store(out + i * width + column, total.to(out.dtype.element_ty), mask=column < width)


def weighted_sum(y: torch.Tensor, rows: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted sums of rows of BF16 y [n, width]: of the rows int32 [sums, N] (-1: none) with float32 weights [sums, N]."""
    n_sums, width = rows.shape[0], y.shape[1]
    out = y.new_empty((n_sums, width))
    if n_sums:
        block = min(1024, triton.next_power_of_2(width))
        grid = (n_sums, triton.cdiv(width, block))
        _weighted_sum[grid](y, rows, weights, out, width, N=rows.shape[1], BLOCK=block)
    return out
