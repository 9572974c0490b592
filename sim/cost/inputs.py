"""Arguments of the cost functions: models and GPUs by name, numbers as float arrays."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sim.cost.gpu import Gpu, load_gpu
from sim.errors import InputError, shown
from sim.model import ModelSpec


def as_gpu(gpu: Gpu | str | Path) -> Gpu:
    """The GPU itself, or the one of that name."""
    return gpu if isinstance(gpu, Gpu) else load_gpu(gpu)


def as_numbers(option: str, values: ArrayLike, least: float, most: float = 1e15) -> np.ndarray:
    """Values as a float array, or an error that names the first one out of range."""
    try:
        numbers = np.asarray(values, dtype=float)
    except (TypeError, ValueError, OverflowError):
        raise InputError(f"{option} {shown(values)}: must be numbers") from None
    wrong = ~((numbers >= least) & (numbers <= most))  # so that NaN is wrong
    if wrong.any():
        raise InputError(f"{option} {numbers[wrong].flat[0]:g}: must be from {least:g} to {most:g}")
    return numbers


def as_whole_numbers(option: str, values: ArrayLike, least: float, most: float) -> np.ndarray:
    """Like `as_numbers`, for counts of things."""
    numbers = as_numbers(option, values, least, most)
    wrong = numbers % 1 != 0
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
    width = model.expert_hidden_size or model.hidden_size
    if not width:
        raise _unknown_sizes(model, ["hidden_size"])
    return width


def expert_parameters(model: ModelSpec) -> int:
    """Parameters of one routed expert; InputError where a size is unknown."""
    needed = ("moe_intermediate_size", "expert_matrices")
    missing = [field for field in needed if not getattr(model, field)]
    if not model.expert_hidden_size and not model.hidden_size:
        missing.insert(0, "hidden_size")
    if missing:
        raise _unknown_sizes(model, missing)
    return model.expert_matrices * expert_width(model) * model.moe_intermediate_size


def _unknown_sizes(model: ModelSpec, missing: list[str]) -> InputError:
    more = f" (not verified: {'; '.join(model.unverified)})" if model.unverified else ""
    return InputError(f"model {model.name}: times need sizes that are not known: {', '.join(missing)}{more}")
