"""Grouped GEMMs, activations and packings that PyTorch offers, by name, for a backend to choose from. Imports torch when called.

A GEMM takes rows [rows, K] with a scale for each row (None in BF16), weights [experts, N, K] with a scale for each output
column (None in BF16), and where each expert's rows end, int32 [experts] on the device; it gives BF16 [rows, N].
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from sim.files import first_line
from sim.measure.experts import BackendError, Say

Tensor = Any
Gemm = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Activation = Callable[[Tensor, str], tuple[Tensor, Tensor]]
WeightedSum = Callable[[Tensor, Tensor, Tensor], Tensor]
Pack = Callable[[Tensor], Tensor]


class Rounded(NamedTuple):
    """Values of a type, and in FP8 the scale of each row (along the last axis)."""

    values: Tensor
    scale: Tensor  # or None

    def at(self, where: int | slice) -> "Rounded":
        """Some of the values along the first axis, with their scales."""
        return Rounded(self.values[where], None if self.scale is None else self.scale[where])


def first_right(
    what: str,
    choices: list[tuple[str, Any]],
    error: Callable[[Any], float],
    tolerance: float = float("inf"),
    say: Say = lambda _: None,
) -> tuple[str, Any]:
    """The first of the named kernels that runs with an error within the tolerance; says why others are passed over. Raises
    BackendError where none does.
    """
    why = ""
    for name, kernel in choices:
        try:
            found = error(kernel)
        except Exception as reason:  # a kernel that the library lacks, or Triton without a compiler: the next may work
            why = first_line(reason)
        else:
            if found <= tolerance:
                return name, kernel
            why = f"relative error {found:.2g}"  # NaN too
        say(f"{name} is passed over: {why}")
    raise BackendError(f"no {what} comes out right; {why}")


def gemms(dtype: str, device_type: str) -> list[tuple[str, Gemm]]:
    """What may compute a type's GEMMs on a device, the one to prefer first."""
    if device_type == "cpu":  # arithmetic only, for tests
        return [("torch, a loop of float32 matmuls", _loop)]
    if dtype == "bf16":
        return [("torch.nn.functional.grouped_mm", _grouped_mm), ("torch._grouped_mm", _grouped_mm_private)]
    return [
        ("torch._scaled_grouped_mm rowwise", _scaled_private),
        ("torch.nn.functional.scaled_grouped_mm rowwise", _scaled),
    ]


def _grouped_mm(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor) -> Tensor:
    import torch

    return torch.nn.functional.grouped_mm(x, w.transpose(1, 2), offs=ends, out_dtype=torch.bfloat16)


def _grouped_mm_private(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor) -> Tensor:
    import torch

    return torch._grouped_mm(x, w.transpose(1, 2), offs=ends, out_dtype=torch.bfloat16)


def _scaled_private(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor) -> Tensor:
    import torch

    return torch._scaled_grouped_mm(
        x, w.transpose(1, 2), x_scale, w_scale, offs=ends, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _scaled(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor) -> Tensor:
    import torch
    from torch.nn.functional import ScalingType, scaled_grouped_mm

    rowwise = ScalingType.RowWise
    return scaled_grouped_mm(
        x, w.transpose(1, 2), x_scale, rowwise, w_scale, rowwise,
        offs=ends, output_dtype=torch.bfloat16, use_fast_accum=True,
    )  # fmt: skip


def _loop(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, ends: Tensor) -> Tensor:
    import torch

    return reference_gemm(Rounded(x, x_scale), Rounded(w, w_scale), ends).to(torch.bfloat16)


def reference_gemm(x: Rounded, w: Rounded, ends: Tensor) -> Tensor:
    """The GEMM in float32, expert by expert, on dequantised inputs."""
    import torch

    out = torch.zeros((x.values.shape[0], w.values.shape[1]), dtype=torch.float32, device=x.values.device)
    first = 0
    for expert, end in enumerate(ends.tolist()):
        rows = slice(first, first := end)
        out[rows] = dequantise(x.at(rows)) @ dequantise(w.at(expert)).T
    return out


def dequantise(rounded: Rounded) -> Tensor:
    """Float32 values."""
    values = rounded.values.float()
    return values if rounded.scale is None else values * rounded.scale[..., None]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    """By Frobenius norms."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def quantise(values: Tensor, dtype: str) -> Rounded:
    """Values rounded to a type: BF16, or E4M3 with a scale for each row."""
    import torch

    if dtype == "bf16":
        return Rounded(values.to(torch.bfloat16), None)
    values = values.float()
    scale = (values.abs().amax(dim=-1) / 448.0).clamp(min=1e-12)
    return Rounded((values / scale[..., None]).clamp(-448.0, 448.0).to(torch.float8_e4m3fn), scale)


def activations(device_type: str) -> list[tuple[str, Activation]]:
    """SiLU(gate) * up of BF16 rows [rows, 2 * inner], rounded to a type; the one to prefer first."""
    fused = [] if device_type == "cpu" else [("triton silu_mul", _fused("silu_mul"))]
    return [*fused, ("torch silu * up", plain_activation)]


def _fused(name: str) -> Callable[..., Any]:
    """A Triton kernel's function, imported when it is called: Triton may not be there."""
    return lambda *tensors: getattr(import_module("sim.measure.fused"), name)(*tensors)


def packings(device_type: str) -> list[tuple[str, Pack]]:
    """BF16 rows [rows, width] as they are sent in FP8: E4M3, then the row's scale in the next 4 of 16 bytes, all of it int64
    [rows, width / 8 + 2], so that one message carries both; the first is to prefer. `width` must be a multiple of 16.
    """
    fused = [] if device_type == "cpu" else [("triton pack", _fused("pack"))]
    return [*fused, ("torch pack", plain_pack)]


def plain_pack(x: Tensor) -> Tensor:
    """The packing by PyTorch's own operators."""
    import torch

    values, scale = quantise(x, "fp8")
    rows, width = x.shape
    packed = torch.zeros((rows, width + 16), dtype=torch.uint8, device=x.device)
    packed[:, :width] = values.view(torch.uint8)
    packed[:, width : width + 4] = scale[:, None].view(torch.uint8)
    return packed.view(torch.int64)


def unpack(packed: Tensor, rows: Tensor) -> Rounded:
    """The given rows of what `packings` give."""
    import torch

    words = packed.shape[1] - 2
    values = packed[:, :words].index_select(0, rows).view(torch.float8_e4m3fn)
    return Rounded(values, packed.view(torch.float32)[:, 2 * words].index_select(0, rows))


def weighted_sums(device_type: str) -> list[tuple[str, WeightedSum]]:
    """Weighted sums of rows y [n, width], of rows int32 [sums, N] (-1: none) and weights [sums, N]; the first is to prefer."""
    fused = [] if device_type == "cpu" else [("triton weighted_sum", _fused("weighted_sum"))]
    return [*fused, ("torch weighted sum", plain_weighted_sum)]


def plain_weighted_sum(y: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum by PyTorch's own operators."""
    if not len(y):
        return y.new_zeros((len(rows), y.shape[1]))
    weights = weights * (rows >= 0)
    return (y[rows.clamp(min=0)].float() * weights[..., None]).sum(dim=1).to(y.dtype)


def plain_activation(gate_up: Tensor, dtype: str) -> tuple[Tensor, Tensor]:
    """The activation by PyTorch's own operators, several kernels."""
    import torch

    gate, up = gate_up.chunk(2, dim=-1)
    if dtype == "bf16":
        return torch.nn.functional.silu(gate) * up, None
    return quantise(torch.nn.functional.silu(gate.float()) * up.float(), dtype)
