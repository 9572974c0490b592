"""Layers of drawn popularity from tilted proposals, with exact weights.

A proposal multiplies the density of each expert's popularity mu by (1 + p(mu) (e**theta - 1))**T, p = 1 - exp(-tau e**mu): the
moment generating function of the expert's tokens in a step of T, were they independent. theta depends on whether the
expert is the target rank's own, of one of its groups, or far. Densities are constant on cells of the popularity's quantile, and
the kinds of experts that they tell apart are few, so that tables hold them and weights are exact. What a layer draws once,
its tilt, spread and target rank, has proposals of its own.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, ndtr, ndtri, stdtrit

from sim.kernels import kernel
from sim.model import ModelSpec
from sim.traffic import SyntheticTraffic
from sim.traffic.synthetic import STEEP_SHARE, STUDENT_DF, tilt_and_spread, tilt_profile

_CELL = 0.3  # of a standard normal, to 6
_NOMINAL = 0.2  # weight of the nominal shares of ranks and tilts in a proposal
_STEEPEST = 4.0  # largest |theta|
_SHIFTS, _SCALES = np.arange(-1.2, 2.0, 0.15), np.arange(0.35, 0.8, 0.08)  # that proposals of tilted layers tell apart
_OWN, _NEAR, _FAR = 0, 1, 2
_TOKENS = 512  # tokens of a layer, in whole steps


@dataclass(frozen=True)
class Popularity:
    """mu of a layer as shift[e] + scale * quantile(normal of e): the shift and scale of a layer, and the quantile."""

    workload: SyntheticTraffic
    n_experts: int

    @property
    def tilted(self) -> bool:
        """Whether layers have a tilt and a spread of their own."""
        return self.workload.popularity == "tilted"

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Shift and scale, [rows], of the kinds of experts that a proposal tells apart."""
        if not self.tilted:
            return np.zeros(1), np.full(1, sigma_of(self.workload))
        shift, scale = np.meshgrid(_SHIFTS, _SCALES)
        return shift.ravel(), scale.ravel()

    def row_of(self, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The row nearest to each expert, int16 [layers, n_experts]."""
        rows = np.zeros((len(shift), self.n_experts), np.int16)
        if self.tilted:
            rows += np.abs(scale[:, None] - _SCALES).argmin(axis=1)[:, None].astype(np.int16) * len(_SHIFTS)
            steps = np.rint((shift - _SHIFTS[0]) / (_SHIFTS[1] - _SHIFTS[0]))
            rows += np.clip(steps, 0, len(_SHIFTS) - 1).astype(np.int16)
        return rows

    def of_layers(self, steep: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shifts [layers, rows] and scales [layers], of what is drawn once per layer: steep bool, z float64 [layers, 2]."""
        if not self.tilted:
            return np.zeros((len(steep), 1)), np.full(len(steep), sigma_of(self.workload))
        tilt, spread = tilt_and_spread(steep, z[:, 0], z[:, 1])
        return tilt[:, None] * tilt_profile(self.n_experts), spread / np.sqrt(1.5)

    def quantile(self, tail: np.ndarray) -> np.ndarray:
        """Quantile at probability `tail` up to 1/2, at 1 - |tail| where it is negative."""
        below = np.abs(tail)
        q = stdtrit(STUDENT_DF, below) if self.tilted else ndtri(below)
        return np.where(tail > 0, q, -q)


class Cells(NamedTuple):
    """Cells of a standard normal on which proposals are constant, from low to high."""

    first: np.ndarray  # signed tail (see `Popularity.quantile`) at the lower end
    width: np.ndarray  # probability
    node: np.ndarray  # quantile at the middle


def _cells(popularity: Popularity) -> Cells:
    below = np.append(0.0, ndtr(np.arange(-6, 1e-9, _CELL)))  # lower ends and 0
    width = np.diff(below)
    node = popularity.quantile(below[:-1] + width / 2)
    return Cells(
        np.concatenate([below[:-1], -below[:0:-1]]),
        np.concatenate([width, width[::-1]]),
        np.concatenate([node, -node[::-1]]),
    )


@dataclass(eq=False)
class Problem:
    """A placed layer and steps of some tokens."""

    model: ModelSpec
    workload: SyntheticTraffic
    rank: np.ndarray
    tokens: int
    seed: int
    n_threads: int
    idle: bool = False
    popularity: Popularity = field(init=False)
    cells: Cells = field(init=False)
    n_ranks: int = field(init=False)
    largest: int = field(init=False)  # load that a rank can reach
    group: np.ndarray = field(init=False)  # of each expert
    near: np.ndarray = field(init=False)  # bool [ranks, groups], groups of which a rank holds experts
    alike: np.ndarray = field(init=False)  # int [ranks], ranks of one number are exchangeable
    taken: np.ndarray = field(init=False)  # float64 [rows, cells], p(mu)

    def __post_init__(self) -> None:
        n_experts = self.model.n_experts
        self.popularity = Popularity(self.workload, n_experts)
        self.cells = _cells(self.popularity)
        self.n_ranks = int(self.rank.max()) + 1
        self.largest = self.tokens * min(self.model.top_k, int(np.bincount(self.rank).max()))
        self.group = np.arange(n_experts) // (n_experts // self.model.n_group)
        held = np.zeros((self.n_ranks, self.model.n_group), np.int64)
        np.add.at(held, (self.rank, self.group), 1)
        self.near = held > 0
        self.alike = np.arange(self.n_ranks)
        if not self.popularity.tilted:
            self.alike = np.unique(np.sort(held, axis=1), axis=0, return_inverse=True)[1].ravel()
        shift, scale = self.popularity.rows
        weight = np.exp(shift[:, None] + scale[:, None] * self.cells.node)
        self.taken = -np.expm1(-self._rate() * weight)

    def _rate(self) -> float:
        """tau with which experts of average layers take top_k places together."""
        shift, scale = self.popularity.of_layers(np.zeros(1, bool), np.zeros((1, 2)))
        weight = np.exp(shift[0][:, None] + scale[0] * self.cells.node)
        low, high = 0.0, 1e6
        for _ in range(80):
            tau = np.sqrt(max(low, 1e-9) * high)
            taken = (-np.expm1(-tau * weight) * self.cells.width).sum(axis=1).mean() * self.model.n_experts
            low, high = (tau, high) if taken < self.model.top_k else (low, tau)
        return float(tau)

    def density(self, theta: np.ndarray) -> np.ndarray:
        """Proposals over popularity, by level: float64 [levels, 3, rows, cells]."""
        density = np.empty((*theta.shape, *self.taken.shape))
        fill_density(self.taken, np.expm1(theta), self.tokens, self.cells.width, density)
        return density

    @property
    def n_tokens(self) -> int:
        """Tokens routed in a layer, whole steps."""
        return max(_TOKENS // self.tokens, 1) * self.tokens


@dataclass(frozen=True)
class Levels:
    """Proposals, level 0 being the popularity itself."""

    theta: np.ndarray  # float64 [levels, 3], of own, near and far experts
    target: np.ndarray  # float64 [levels, ranks], probability of each target rank
    steep: np.ndarray  # float64 [levels], of tilted popularity: probability of a steep tilt
    centre: np.ndarray  # float64 [levels, 2], of its two normals
    sd: np.ndarray  # float64 [levels, 2]

    @classmethod
    def nominal(cls, n_ranks: int) -> "Levels":
        """Level 0 alone."""
        return cls(
            np.zeros((1, 3)),
            np.full((1, n_ranks), 1 / n_ranks),
            np.full(1, STEEP_SHARE),
            np.zeros((1, 2)),
            np.ones((1, 2)),
        )

    def __len__(self) -> int:
        return len(self.theta)

    def with_level(self, other: "Levels") -> "Levels":
        """These, and further ones."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("theta", "target", "steep", "centre", "sd"))
        return Levels(*(np.concatenate(pair) for pair in pairs))


class Layers(NamedTuple):
    """Sampled layers."""

    level: np.ndarray  # int [n]
    target: np.ndarray  # int [n], rank
    steep: np.ndarray  # bool [n]
    z: np.ndarray  # float64 [n, 2]
    row: np.ndarray  # int16 [n, n_experts]
    cell: np.ndarray  # int16 [n, n_experts]
    log_ratio: np.ndarray  # float64 [n, levels], log of proposal over popularity
    alone: np.ndarray  # float64 [n, events], U-statistic of the target rank
    step: np.ndarray  # float64 [n, events], share of disjoint steps with the event
    shared: np.ndarray  # float64 [n, events], mean of 1_A / N over disjoint steps

    def log_weight(self, counts: np.ndarray) -> np.ndarray:
        """log of popularity over the mixture of levels of which `counts` layers each were drawn."""
        with np.errstate(divide="ignore"):
            return -logsumexp(self.log_ratio + np.log(counts / counts.sum()), axis=1)


def sigma_of(workload: SyntheticTraffic) -> float:
    """Standard deviation of log-normal popularity; a request effect that all tokens of a step share adds to it."""
    own = workload.sigma if workload.popularity == "lognormal" else 0.0
    return float(np.hypot(own, workload.request_sigma))


def kinds(problem: Problem, target: np.ndarray) -> np.ndarray:
    """Whether each expert is the target rank's own, of its groups, or far: int8 [layers, n_experts]."""
    near = problem.near[target][:, problem.group]
    own = problem.rank == target[:, None]
    return np.where(own, _OWN, np.where(near, _NEAR, _FAR)).astype(np.int8)


@kernel
def fill_density(taken, growth, tokens, width, density):
    """(1 + p (e**theta - 1))**tokens in each cell, over its mean: taken float64 [rows, cells], growth float64 [levels, 3],
    expm1 of theta; density float64 [levels, 3, rows, cells].
    """
    for m in range(growth.shape[0]):
        for a in range(growth.shape[1]):
            for r in range(taken.shape[0]):
                total = 0.0
                for c in range(width.size):
                    density[m, a, r, c] = np.exp(tokens * np.log1p(taken[r, c] * growth[m, a]))
                    total += density[m, a, r, c] * width[c]
                for c in range(width.size):
                    density[m, a, r, c] /= total


@kernel
def draw_experts(u, level, kind, row, mass, first, width, cell, tail):
    """Draw the popularity of each expert from the proposal of its layer's level.

    u float64 [layers, 2 * n_experts]; kind int8 and row int16 [layers, n_experts]; mass [levels, 3, rows, cells], cumulated
    probabilities; cell int16 and tail float64 [layers, n_experts], its cell and its signed tail probability.
    """
    n_experts, n_cells = kind.shape[1], width.size
    for i in range(level.size):
        for e in range(n_experts):
            own = mass[level[i], kind[i, e], row[i, e]]
            c = min(np.searchsorted(own, u[i, e] * own[n_cells - 1], side="right"), n_cells - 1)
            cell[i, e] = c
            tail[i, e] = first[c] + u[i, n_experts + e] * width[c]


@kernel
def add_logs(table, kind, row, cell, out):
    """Add the sum over experts of table[level, kind, row, cell]: out float64 [layers, levels]."""
    for i in range(cell.shape[0]):
        for e in range(cell.shape[1]):
            for m in range(table.shape[0]):
                out[i, m] += table[m, kind[i, e], row[i, e], cell[i, e]]


def weighed(problem: Problem, levels: Levels, layers: Layers) -> Layers:
    """The layers with the log ratios of the levels that were not known when they were drawn."""
    known = layers.log_ratio.shape[1]
    if known == len(levels):
        return layers
    theta, steep, centre, sd = (a[known:] for a in (levels.theta, levels.steep, levels.centre, levels.sd))
    log_ratio = np.log(levels.target[known:].T[layers.target] * problem.n_ranks)
    if problem.popularity.tilted:
        odds = np.log(steep / STEEP_SHARE), np.log((1 - steep) / (1 - STEEP_SHARE))
        log_ratio += np.where(layers.steep[:, None], *odds)
        z = layers.z[:, None, :]
        log_ratio += (0.5 * z**2 - 0.5 * ((z - centre) / sd) ** 2 - np.log(sd)).sum(axis=2)
    with np.errstate(divide="ignore"):
        table = np.log(problem.density(theta))
    add_logs(table, kinds(problem, layers.target), layers.row, layers.cell, log_ratio)
    return layers._replace(log_ratio=np.concatenate([layers.log_ratio, log_ratio], axis=1))


def fit_level(problem: Problem, layers: Layers, worth: np.ndarray) -> Levels:
    """The proposal of largest likelihood on layers weighted by worth; shares and normals lean to the nominal ones."""
    share = worth / worth.sum()
    steep, z, target = layers.steep, layers.z, layers.target
    kind = kinds(problem, target)
    seen = np.zeros((3, *problem.taken.shape))
    np.add.at(seen, (kind, layers.row, layers.cell), share[:, None])
    low = np.full(3, -_STEEPEST)
    high = np.full(3, min(_STEEPEST, 300 / problem.tokens))
    for _ in range(24):
        theta = (low + high) / 2
        slope = _slope(problem, theta, seen)
        low, high = np.where(slope > 0, theta, low), np.where(slope > 0, high, theta)
    theta = np.where(seen.any(axis=(1, 2)), (low + high) / 2, 0.0)
    size = np.bincount(problem.alike).astype(float)
    of_class = np.bincount(problem.alike[target], share, len(size))
    of_class = (1 - _NOMINAL) * of_class + _NOMINAL * size / size.sum()
    centre = share @ z
    sd = np.sqrt(share @ (z - centre) ** 2)
    return Levels(
        theta[None],
        (of_class / size)[problem.alike][None],
        np.array([(1 - _NOMINAL) * (share @ steep) + _NOMINAL * STEEP_SHARE]),
        centre[None],
        np.clip(sd, 0.5, 1.5)[None],
    )


def _slope(problem: Problem, theta: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Slope in theta of the log likelihood of experts `seen` [3, rows, cells], float64 [3]."""
    growth, p = np.expm1(theta)[:, None, None], problem.taken
    slope = problem.tokens * p * np.exp(theta)[:, None, None] / (1 + p * growth)
    mean = (problem.density(theta[None])[0] * problem.cells.width * slope).sum(axis=2, keepdims=True)
    return (seen * (slope - mean)).sum(axis=(1, 2))
