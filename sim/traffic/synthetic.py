"""Traffic by law: layer popularity, request and group effects, Gumbel noise."""

from dataclasses import dataclass, field
from numbers import Real

import numpy as np
from scipy.special import ndtri

from sim.errors import InputError, shown, whole_number
from sim.streams import POPULARITY, REQUEST, uniforms
from sim.traffic.fitted import FittedLayers

X0 = -4.0
"""Offset of the logits before the sigmoid."""
POPULARITIES = ("none", "lognormal", "tilted", "fitted")

# The tilted law, fitted to DeepSeek-R1 on GPQA: see `_tilted`.
_STEEP_TILT, STEEP_SHARE = 1.485, 8 / 58
_TILT_MEAN, _TILT_SD = 0.566, 0.264
_SPREAD_MEAN, _SPREAD_SD, _SPREAD_RANGE = 0.58, 0.10, (0.40, 0.95)
STUDENT_DF = 6


@dataclass(frozen=True)
class SyntheticTraffic:
    """Traffic whose logits are mu[e] + request_sigma * B[request, e] + group_sigma * A[token, group] + Gumbel noise.

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
        Identical tokens that each step has besides its own, as idle data-parallel ranks run them: all take the experts of
        one token, which is drawn once for each layer draw.
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
        """Layers to draw from: those that were fitted; None, a law has no end of them."""
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
            requests = [self.layers.taste(normals, first_draw) for normals in requests]
        return mu[:, None, :] + self.request_sigma * np.stack(requests, axis=1)


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
