"""Tables of fitted layers: popularity, request effects and kinds of tokens, of each layer."""

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from sim.errors import InputError

MOST_LOGIT = 50.0
"""Largest absolute value of a table's numbers."""
_MOST_NUMBERS = 2**22
_EXPERTS = ("layers", "n_experts")
_TABLES = {
    "mu": _EXPERTS, "request_sd": _EXPERTS, "request_loadings": ("layers", "factors", "n_experts"),
    "kind_shares": ("layers", "kinds"), "kind_effects": ("layers", "kinds", "n_experts"),
}  # fmt: skip
TABLE_NAMES = tuple(_TABLES)
"""The tables of fitted traffic: keys of its TOML file."""
MOST_TOKEN_KINDS = 64
"""Kinds of tokens of a layer."""


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
    kind_shares, kind_effects : float64 [layers, kinds], [layers, kinds, n_experts], or None
        Share of each kind in the tokens, and what a kind adds to the logits: experts that go together have it of one kind.
    """

    mu: np.ndarray
    request_sd: np.ndarray
    request_loadings: np.ndarray
    kind_shares: np.ndarray | None = None
    kind_effects: np.ndarray | None = None

    @classmethod
    def of(
        cls, mu: Any, request_sd: Any = None, request_loadings: Any = None, where: str = "", kind_shares: Any = None,
        kind_effects: Any = None,
    ) -> "FittedLayers":  # fmt: skip
        """Checked tables; without `request_sd` it is 1, without `request_loadings` there are none, nor kinds of tokens
        without theirs.

        Raises
        ------
        InputError
            Tables that are not numbers, differ in width, or hold NaN or more than 50 in absolute value.
        """
        mu = _table(where, "mu", mu)
        sd = np.ones(mu.shape) if request_sd is None else _table(where, "request_sd", request_sd)
        shape = (len(mu), 0, mu.shape[1])
        loadings = np.zeros(shape) if request_loadings is None else _table(where, "request_loadings", request_loadings)
        if sd.shape != mu.shape or (loadings.shape[0], loadings.shape[2]) != mu.shape:
            raise InputError(f"{where}request_sd and request_loadings must have the layers and experts of mu")
        if sd.min() < 0:
            raise InputError(f"{where}request_sd must not be negative, found {sd.min():g}")
        if kind_shares is None and kind_effects is None:
            return cls(mu, sd, loadings)
        if kind_shares is None or kind_effects is None:
            raise InputError(f"{where}kind_shares and kind_effects go together")
        shares, effects = _table(where, "kind_shares", kind_shares), _table(where, "kind_effects", kind_effects)
        if (
            effects.shape != (*shares.shape, mu.shape[1])
            or len(shares) != len(mu)
            or shares.shape[1] > MOST_TOKEN_KINDS
        ):
            raise InputError(
                f"{where}kind_shares and kind_effects must have the layers and experts of mu, at most {MOST_TOKEN_KINDS} kinds"
            )
        if shares.min() < 0 or np.abs(shares.sum(axis=1) - 1).max() > 0.01:
            raise InputError(f"{where}kind_shares must not be negative, and must sum to 1 in each layer")
        return cls(mu, sd, loadings, shares, effects)

    @cached_property
    def digest(self) -> str:
        """Digest of all tables."""
        tables = (self.mu, self.request_sd, self.request_loadings, self.kind_shares, self.kind_effects)
        known = [np.ascontiguousarray(table).tobytes() for table in tables if table is not None]
        return hashlib.sha256(b"".join(known)).hexdigest()[:32]

    @cached_property
    def request_variance(self) -> np.ndarray:
        """Variance of what a request adds, mean over experts, float64 [layers]."""
        return (self.request_sd**2 + (self.request_loadings**2).sum(axis=1)).mean(axis=1)

    def request_effect(self, normals: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """What requests add to the logits, float64 [..., draws, n_experts], from normals [..., draws, n_experts + factors]."""
        rows, n_experts = draws % len(self.mu), self.mu.shape[1]
        shared = np.einsum("...df,dfe->...de", normals[..., n_experts:], self.request_loadings[rows])
        return self.request_sd[rows] * normals[..., :n_experts] + shared


def _table(where: str, name: str, values: Any) -> np.ndarray:
    """A table of numbers by its name, float64."""
    n_axes, shape = len(_TABLES[name]), f"[{', '.join(_TABLES[name])}]"
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
