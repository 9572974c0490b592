"""Arguments of the cost functions: models and GPUs by name, numbers as float arrays."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sim.cost.gpu import DTYPES, Gpu, load_gpu
from sim.errors import InputError, shown
from sim.model import ModelSpec

NETWORK_GB_PER_S = 50.0
"""Taken for a GPU whose network differs by cluster: 400 Gb/s for each GPU, as in DeepEP's measurements."""


def with_network(gpu: Gpu | str | Path, network_gb_per_s: float | None) -> Gpu:
    """The GPU with a network: the one given, its own, or NETWORK_GB_PER_S where it has none."""
    gpu = load_gpu(gpu)
    wanted = network_gb_per_s or gpu.scale_out_gb_per_s or NETWORK_GB_PER_S
    return dataclasses.replace(gpu, scale_out_gb_per_s=wanted)


def dtype_of(model: ModelSpec, gpus: Sequence[Gpu], dtype: str | None = None) -> str:
    """The type that times are for: the one given, else the one that the model's experts are stored in; where that is none of
    DTYPES, or a GPU does not compute in it, fp8, or bf16 if need be.

    Raises
    ------
    InputError
        A GPU does not compute in the one given.

    Examples
    --------
    >>> from sim.model import load_model
    >>> [dtype_of(load_model("gpt-oss-20b"), [load_gpu(gpu)]) for gpu in ("b200", "h200")]
    ['fp4', 'fp8']
    """
    if dtype is not None:
        for gpu in gpus:
            gpu.peak_tflops(dtype)
        return dtype
    stored = next((known for known in DTYPES if known in model.routed_dtype), "fp8")
    return next(known for known in (stored, "fp8", "bf16") if all(getattr(gpu, f"{known}_tflops") for gpu in gpus))


def as_numbers(option: str, values: ArrayLike, least: float, most: float = 1e15, *, whole: bool = False) -> np.ndarray:
    """Values as a float array, or an error that names the first one out of range, or that is not `whole`."""
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{option} {shown(values)}: must be numbers") from None
    wrong = ~((numbers >= least) & (numbers <= most))  # so that NaN is wrong
    if wrong.any():
        raise InputError(f"{option} {numbers[wrong].flat[0]:g}: must be from {least:g} to {most:g}")
    wrong = whole & (numbers % 1 != 0)
    if wrong.any():
        raise InputError(f"{option} {numbers[wrong].flat[0]:g}: must be a whole number")
    return numbers


def together(**arrays: np.ndarray) -> list[np.ndarray]:
    """The arrays broadcast to one shape, or an error that names the shapes."""
    try:
        return list(np.broadcast_arrays(*arrays.values()))
    except ValueError:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise InputError(f"shapes do not broadcast: {shapes}") from None


def expert_width(model: ModelSpec) -> int:
    """Width of what goes into and comes out of a routed expert; InputError where it is unknown."""
    return _sizes(model)[0]


def expert_parameters(model: ModelSpec) -> int:
    """Parameters of one routed expert; InputError where a size is unknown."""
    width, inner, matrices = _sizes(model, "moe_intermediate_size", "expert_matrices")
    return matrices * width * inner


def _sizes(model: ModelSpec, *more: str) -> list[int]:
    """The width of experts, and further sizes."""
    sizes = {
        "hidden_size": model.expert_hidden_size or model.hidden_size,
        **{name: getattr(model, name) for name in more},
    }
    if missing := [name for name, size in sizes.items() if not size]:
        unread = f" (not verified: {'; '.join(model.unverified)})" if model.unverified else ""
        raise InputError(f"model {model.name}: times need sizes that are not known: {', '.join(missing)}{unread}")
    return list(sizes.values())
