"""The layers of a fitted workload: popularity of every expert, and what requests prefer, as tables."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sim.errors import InputError

MOST_LOGIT = 50.0
"""Largest absolute value of a table's numbers."""
_MOST_NUMBERS = 2**22
KEYS = ("mu", "request_sd", "request_loadings")


@dataclass(frozen=True, eq=False)
class FittedLayers:
    """Tables of layers; layer draw d takes layer d % layers.

    Attributes
    ----------
    mu : float64 [layers, n_experts]
        Mean logits.
    request_sd : float64 [layers, n_experts]
        Standard deviation of what a request adds to one expert alone, in units of the traffic's request_sigma.
    request_loadings : float64 [layers, factors, n_experts]
        What a request adds to all experts together (its subject): one standard normal per factor, in the same units.
    """

    mu: np.ndarray
    request_sd: np.ndarray
    request_loadings: np.ndarray

    @classmethod
    def of(cls, mu: Any, request_sd: Any = None, request_loadings: Any = None, where: str = "") -> "FittedLayers":
        """Checked tables; without `request_sd` it is 1, without `request_loadings` there are none.

        Raises
        ------
        InputError
            Tables that are not numbers, differ in width, or hold NaN or more than 50 in absolute value.
        """
        mu = _table(where, "mu", mu, 2)
        sd = np.ones(mu.shape) if request_sd is None else _table(where, "request_sd", request_sd, 2)
        shape = (len(mu), 0, mu.shape[1])
        loadings = np.zeros(shape) if request_loadings is None else _table(where, KEYS[2], request_loadings, 3)
        if sd.shape != mu.shape or (loadings.shape[0], loadings.shape[2]) != mu.shape:
            raise InputError(f"{where}request_sd and request_loadings must have the layers and experts of mu")
        if sd.min() < 0:
            raise InputError(f"{where}request_sd must not be negative, found {sd.min():g}")
        return cls(mu, sd, loadings)

    @cached_property
    def digest(self) -> str:
        """Digest of all tables."""
        tables = (self.mu, self.request_sd, self.request_loadings)
        return hashlib.sha256(b"".join(np.ascontiguousarray(table).tobytes() for table in tables)).hexdigest()[:32]

    def rows(self, first_draw: int, n_draws: int) -> np.ndarray:
        """The layers of consecutive draws, int64 [n_draws]."""
        return np.arange(first_draw, first_draw + n_draws) % len(self.mu)

    def taste(self, normals: np.ndarray, first_draw: int) -> np.ndarray:
        """What requests add to the logits, float64 [draws, n_experts], from normals [draws, n_experts + factors]."""
        rows, n_experts = self.rows(first_draw, len(normals)), self.mu.shape[1]
        shared = np.einsum("df,dfe->de", normals[:, n_experts:], self.request_loadings[rows])
        return self.request_sd[rows] * normals[:, :n_experts] + shared


def _table(where: str, name: str, values: Any, n_axes: int) -> np.ndarray:
    """A table of numbers, float64, with `n_axes` axes."""
    axes = ["layers", "factors", "n_experts"] if n_axes == 3 else ["layers", "n_experts"]
    shape = f"[{', '.join(axes)}]"
    try:
        array = np.asarray(values)
    except ValueError:
        raise InputError(f"{where}{name} must be a table {shape} of numbers whose rows are equally long") from None
    if array.dtype.kind not in "fiu" or array.ndim != n_axes or 0 in array.shape:
        raise InputError(f"{where}{name} must be a table {shape} of numbers whose rows are equally long")
    if array.size > _MOST_NUMBERS or array.shape[-1] > 2**15 - 1:
        raise InputError(f"{where}{name} is too large: {' x '.join(map(str, array.shape))} numbers")
    if not (np.abs(array) <= MOST_LOGIT).all():  # NaN too
        raise InputError(f"{where}{name} must hold numbers from -{MOST_LOGIT:g} to {MOST_LOGIT:g} only")
    return array.astype(float)
