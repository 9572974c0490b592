"""Synthetic traffic: popularity of experts by layer, drawn or given as tables, request and group effects, Gumbel noise."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
from scipy.special import ndtri

from sim.errors import InputError, shown, whole_number
from sim.streams import POPULARITY, REQUEST, uniforms

X0 = -4.0
"""Offset of the logits before the sigmoid."""
POPULARITIES = ("none", "lognormal", "tilted", "fitted")

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
MOST_KINDS = 64
"""Kinds of tokens of a layer."""

FROM_ARRAYS = "popularity as an array goes through sim.synthetic_traffic(popularity=...)"
_LEAST_POPULARITY = 1e-9  # over the mean of the layer: a zero is never seen, and its logarithm is finite

# The tilted popularity, fitted to DeepSeek-R1 on GPQA: see `_tilted`.
_STEEP_TILT, STEEP_SHARE = 1.485, 8 / 58
_TILT_MEAN, _TILT_SD = 0.566, 0.264
_SPREAD_MEAN, _SPREAD_SD, _SPREAD_RANGE = 0.58, 0.10, (0.40, 0.95)
STUDENT_DF = 6


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
        if effects.shape != (*shares.shape, mu.shape[1]) or len(shares) != len(mu) or shares.shape[1] > MOST_KINDS:
            raise InputError(
                f"{where}kind_shares and kind_effects must have the layers and experts of mu, and at most {MOST_KINDS} kinds"
            )
        if shares.min() < 0 or np.abs(shares.sum(axis=1) - 1).max() > 0.01:
            raise InputError(f"{where}kind_shares must not be negative, and must sum to 1 in each layer")
        return cls(mu, sd, loadings, shares / shares.sum(axis=1, keepdims=True), effects)

    @cached_property
    def digest(self) -> str:
        """Digest of all tables."""
        tables = (self.mu, self.request_sd, self.request_loadings, self.kind_shares, self.kind_effects)
        known = [np.ascontiguousarray(table).tobytes() for table in tables if table is not None]
        return hashlib.sha256(b"".join(known)).hexdigest()[:32]

    def rows(self, first_draw: int, n_draws: int) -> np.ndarray:
        """The layers of consecutive draws, int64 [n_draws]."""
        return np.arange(first_draw, first_draw + n_draws) % len(self.mu)

    def request_effect(self, normals: np.ndarray, first_draw: int) -> np.ndarray:
        """What requests add to the logits, float64 [draws, n_experts], from normals [draws, n_experts + factors]."""
        rows, n_experts = self.rows(first_draw, len(normals)), self.mu.shape[1]
        shared = np.einsum("df,dfe->de", normals[:, n_experts:], self.request_loadings[rows])
        return self.request_sd[rows] * normals[:, :n_experts] + shared


@dataclass(frozen=True)
class SyntheticTraffic:
    """Traffic whose logits are mu[e] + request_sigma * B[request, e] + group_sigma * A[token, group] + Gumbel noise.

    Fitted layers may add C[kind, e], of the kind that a token draws for itself: what makes experts go together.

    Attributes
    ----------
    name, about, source, fitted_to : str
        Preset name, a line on what it stands for, where its figures come from, and the model that they were taken on.
    popularity : str
        How mu is drawn per layer: 'none' (0), 'lognormal' (normal with sd `sigma`), 'tilted' (falls with the index) or
        'fitted' (the rows of `layers` in turn).
    sigma, group_sigma, request_sigma : float
        Standard deviations of mu, of the group effect of a token and of the expert effect of a request.
    tokens_per_request : int
        Consecutive tokens that share a request; without a request effect every token is a request of its own (decode).
    dummy_tokens : int
        Padding tokens per step, as run by idle data-parallel ranks: all take the experts of one token, which is drawn once
        for each layer draw.
    layers : FittedLayers, optional
        Of fitted popularity; its tables also say what B is.
    """

    name: str
    about: str = ""
    source: str = ""
    fitted_to: str = ""
    popularity: str = "none"
    sigma: float = 0.0
    group_sigma: float = 0.0
    request_sigma: float = 0.0
    tokens_per_request: int = 1024
    dummy_tokens: int = 0
    layers: FittedLayers | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        where = f"workload {shown(self.name)}: "
        for name in ("name", "about", "source", "fitted_to"):
            value = getattr(self, name)
            if not isinstance(value, str) or (name == "name" and not value):
                raise InputError(f"{where}{name} must be a string, not {shown(value)}")
        if not isinstance(self.popularity, str):
            raise InputError(f"{where}popularity must be one of {', '.join(POPULARITIES)}; {FROM_ARRAYS}")
        if self.popularity not in POPULARITIES:
            raise InputError(
                f"{where}popularity must be one of {', '.join(POPULARITIES)}, not {shown(self.popularity)}"
            )
        if (self.popularity == "fitted") != isinstance(self.layers, FittedLayers):
            raise InputError(f"{where}popularity 'fitted' and a table mu [layers, n_experts] go together")
        for name in ("sigma", "group_sigma", "request_sigma"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 5:
                raise InputError(f"{where}{name} must be a number from 0 to 5, not {shown(value)}")
        whole_number(f"{where}tokens_per_request", self.tokens_per_request, 1, 2**31)
        whole_number(f"{where}dummy_tokens", self.dummy_tokens, 0, 2**24)

    @property
    def n_layers(self) -> int | None:
        """Layers to draw from: those of the tables; None where each draw has its own popularity."""
        return None if self.layers is None else len(self.layers.mu)

    @property
    def law(self) -> dict[str, str | float | int]:
        """Everything that changes the distribution, and nothing else."""
        law: dict[str, str | float | int] = {"popularity": self.popularity, "group_sigma": self.group_sigma, "x0": X0}
        if self.popularity == "lognormal":
            law["sigma"] = self.sigma
        if self.layers is not None:
            law["layers"] = self.layers.digest
        if self.request_sigma > 0:
            law |= {"request_sigma": self.request_sigma, "tokens_per_request": self.tokens_per_request}
        if self.dummy_tokens:
            law["dummy_tokens"] = self.dummy_tokens
        return law

    def draw_popularity(self, key: np.ndarray, first_draw: int, n_draws: int, n_experts: int) -> np.ndarray:
        """mu of consecutive layer draws, float64 [n_draws, n_experts]."""
        if self.layers is not None:
            return self.layers.mu[self.layers.rows(first_draw, n_draws)]
        if self.popularity == "none":
            return np.zeros((n_draws, n_experts))
        if self.popularity == "lognormal":
            return self.sigma * ndtri(uniforms(key, POPULARITY, 0, (n_draws, n_experts), first_draw))
        return _tilted(uniforms(key, POPULARITY, 0, (n_draws, 3 + 4 * n_experts), first_draw), n_experts)

    def draw_logits(
        self, key: np.ndarray, mu: np.ndarray, first_trial: int, n_tokens: int, first_draw: int
    ) -> np.ndarray:
        """Mean logits of the requests of consecutive trials (and draws), float64 [trials, requests, n_experts]; mu
        [trials, n_experts].
        """
        if self.request_sigma == 0:
            return mu[:, None, :]
        n_factors = 0 if self.layers is None else self.layers.request_loadings.shape[1]
        shape = (len(mu), mu.shape[1] + n_factors)
        requests = [
            ndtri(uniforms(key, REQUEST, request, shape, first_trial))
            for request in range(-(-n_tokens // self.tokens_per_request))
        ]
        if self.layers is not None:
            requests = [self.layers.request_effect(normals, first_draw) for normals in requests]
        return mu[:, None, :] + self.request_sigma * np.stack(requests, axis=1)

    def kinds(self, first_draw: int, n_draws: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Kinds of the tokens of consecutive draws: their cumulated chances in units of 2**-32, uint64 [draws, kinds], and what
        each adds to the logits, float64 [draws, kinds, n_experts]; None where there is but one kind.
        """
        if self.layers is None or self.layers.kind_shares is None or self.layers.kind_effects is None:
            return one_kind(n_draws), None
        rows = self.layers.rows(first_draw, n_draws)
        chances = np.round(np.cumsum(self.layers.kind_shares[rows], axis=1) * 2.0**32).astype(np.uint64)
        return chances, self.layers.kind_effects[rows]


def one_kind(n: int) -> np.ndarray:
    """The chances of kinds of n layers whose tokens are all of one, as `SyntheticTraffic.kinds` gives them."""
    return np.full((n, 1), 2**32, np.uint64)


def synthetic_traffic(
    popularity: Any = None,
    *,
    group_sigma: float = 0.0,
    request_sigma: float = 0.0,
    tokens_per_request: int = 1024,
    dummy_tokens: int = 0,
    name: str = "synthetic",
) -> SyntheticTraffic:
    """Traffic with given popularities of experts, as a workload for every function that takes one.

    Parameters
    ----------
    popularity : array [n_experts] or [layers, n_experts], optional
        Relative popularity of each expert, such as its share of the load: not negative, in any unit. The logit of an expert
        is the logarithm of its popularity over the layer's mean; without group and request effects, and in a router without
        groups, tokens are drawn in proportion to it, without replacement. One row is the popularity of every layer. Without
        it all experts are alike.
    group_sigma : float
        Standard deviation of what a token adds to all experts of a group, 0 to 5 (the presets have 0.4).
    request_sigma : float
        Standard deviation of what a request adds to each expert, 0 to 5.
    tokens_per_request : int
        Consecutive tokens that share a request.
    dummy_tokens : int
        Padding tokens per step, as run by idle data-parallel ranks.
    name : str
        Name of the workload in tables and figures.

    Returns
    -------
    SyntheticTraffic

    Raises
    ------
    InputError
        Popularity that is no table of numbers, is negative or not finite, or is 0 for all experts of a layer; an effect out
        of its range.

    Examples
    --------
    >>> hot = synthetic_traffic([8.0] + 63 * [1.0], name="one hot expert")
    >>> hot.n_layers, hot.layers.mu.shape
    (1, (1, 64))
    >>> float(round(hot.layers.mu[0, 0] - hot.layers.mu[0, 1], 3))  # the logarithm of 8
    2.079
    """
    effects: dict[str, Any] = {"group_sigma": group_sigma, "request_sigma": request_sigma}
    effects |= {"tokens_per_request": tokens_per_request, "dummy_tokens": dummy_tokens}
    if popularity is None:
        return SyntheticTraffic(name, **effects)
    if isinstance(popularity, str):
        raise InputError(
            f"popularity must be an array [n_experts] or [layers, n_experts], not {shown(popularity)}; load_workload takes names"
        )
    try:
        shares = np.asarray(popularity)
    except ValueError:
        raise InputError(
            "popularity must be an array [n_experts] or [layers, n_experts]: its rows differ in length"
        ) from None
    if shares.dtype.kind not in "fiu" or shares.ndim not in (1, 2) or 0 in shares.shape or shares.shape[-1] < 2:
        raise InputError(
            f"popularity must be numbers [n_experts] or [layers, n_experts], not {shares.dtype} {list(shares.shape)}"
        )
    shares = np.atleast_2d(shares).astype(float)
    if not np.isfinite(shares).all() or shares.min() < 0:
        raise InputError("popularity must be finite and not negative")
    if not shares.any(axis=1).all():
        raise InputError("popularity must not be 0 for all experts of a layer")
    mu = np.log(np.maximum(shares / shares.mean(axis=1, keepdims=True), _LEAST_POPULARITY))
    return SyntheticTraffic(name, popularity="fitted", layers=FittedLayers.of(mu, where="popularity: "), **effects)


def _tilted(u: np.ndarray, n_experts: int) -> np.ndarray:
    """mu = tilt * f + spread * t6 / sqrt(1.5), from uniforms u [draws, 3 + 4 * n_experts].

    f is the centred -ln(v + 0.3), v = (e + 1/2) / n_experts, over its OLS slope on v; the tilt is steep in 8 of 58
    layers and else normal, at least 0; the spread is normal, clipped; t6 is Student's t, of variance 1.5.
    """
    tilt, spread = tilt_and_spread(u[:, 0] < STEEP_SHARE, ndtri(u[:, 1]), ndtri(u[:, 2]))
    z, *chi = np.split(u[:, 3:], 4, axis=1)
    chi_square = -2.0 * np.log(chi[0] * chi[1] * chi[2])  # 6 degrees of freedom: three exponentials
    student = ndtri(z) / np.sqrt(chi_square / STUDENT_DF)
    return tilt[:, None] * tilt_profile(n_experts) + spread[:, None] * student / np.sqrt(1.5)


def tilt_and_spread(steep: np.ndarray, z_tilt: np.ndarray, z_spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tilt and spread of layers of tilted popularity: from whether the tilt is steep, and two standard normals."""
    tilt = np.where(steep, _STEEP_TILT, np.maximum(0.0, _TILT_MEAN + _TILT_SD * z_tilt))
    return tilt, np.clip(_SPREAD_MEAN + _SPREAD_SD * z_spread, *_SPREAD_RANGE)


def tilt_profile(n_experts: int) -> np.ndarray:
    """How a tilted popularity falls with the index of the expert, at a tilt of 1: float64 [n_experts], mean 0."""
    v = (np.arange(n_experts) + 0.5) / n_experts
    f = -np.log(v + 0.3)
    f -= f.mean()
    slope = np.dot(v - v.mean(), f) / np.dot(v - v.mean(), v - v.mean()) if n_experts > 1 else 1.0
    return f / abs(slope)


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
