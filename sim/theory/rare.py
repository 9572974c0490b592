"""Tails without a floor for synthetic traffic with drawn popularity: importance sampling over layers.

P(max load >= c) over all layers is a sum over ranks: with A the event that rank r reaches c and N the number of ranks that
do, it is the sum over r of E[1_A / N]. Three ideas make it cheap to estimate at 1e-8:

- **Given a layer's popularity**, P(A) for all c at once is a complete U-statistic: M tokens are routed, and a step is T of
  them without replacement, by a hypergeometric dynamic programme over the tokens' numbers of experts on the rank. It is
  unbiased, which a convolution of the sampled law of single tokens is not. What the union takes off, E[1_A (1 - 1/N)], is
  small and comes from disjoint steps of the same tokens.
- **Layers come from a tilted proposal**, independent per expert given the target rank: the density of the popularity mu
  times (1 + p(mu) (e**theta - 1))**T, p = 1 - exp(-tau e**mu), which is the moment generating function of the expert's
  tokens in a step, were they independent. It covers both one very hot expert and all of a rank's a little hot. One theta
  for the rank's own experts, one for others of its groups, one for the rest. The density is constant on cells of the
  popularity's quantile, so that weights are exact.
- **theta comes from multilevel cross-entropy** (Rubinstein and Kroese 2004): each level aims at the rarest load that the
  levels before it see with enough layers. The pilot is discarded. The final layers are spread over all levels, the nominal
  one included, with the weights of the balance heuristic (Veach and Guibas 1995), and the variance is stratified by level.

Idle ranks are the same with loads from above: A is the event that the rank has no pair.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from fractions import Fraction
from math import ceil
from typing import NamedTuple

import numpy as np
from scipy.special import logsumexp, ndtri, stdtrit

from sim.model import ModelSpec
from sim.router import route_layers
from sim.streams import POPULARITY, stream_key, uniforms
from sim.theory.given_layer import LONGEST, score_layers
from sim.theory.proposal import Cells, Popularity, add_logs, cells_of, draw_experts, fill_density, sigma_of
from sim.traffic import SyntheticTraffic
from sim.traffic.synthetic import STEEP_SHARE

LAYERS = 8_000
"""Layers of the final sample, at the least."""
FLOOR = 1e-12
"""The lowest floor: below it the rounding of the dynamic programme is no longer negligible."""
_PILOT, _MOST_LEVELS = 300, 14
_ELITE = 50.0  # effective layers that a level is fitted to
_TOKENS = 512  # tokens of a layer, and at least `_STEPS` steps
_STEPS = 4
_CHUNK = 32  # layers
_HEAVIEST = 0.05  # share of an estimate that one layer may carry
_WIDEST = 0.5  # of the interval on the log scale, half
_COMMON = 0.5  # probability above which sampling sees as much
_NOMINAL = 0.2  # weight of the nominal shares of ranks and tilts in a proposal
_STEEPEST = 4.0  # largest |theta|
_OWN, _NEAR, _FAR = 0, 1, 2


class RareRow(NamedTuple):
    """An estimated probability over all layers, with its 95 % interval."""

    metric: str  # 'imbalance', 'idle_ranks' or 'one_rank'
    threshold: float
    probability: float
    low: float
    high: float


class RareTail(NamedTuple):
    """Rows that the method vouches for, and why others are missing: (metric, threshold, reason)."""

    rows: list[RareRow]
    refused: list[tuple[str, float, str]]


def no_rare_events_because(workload: SyntheticTraffic, tokens: int) -> str | None:
    """Why steps of so many tokens have no rare-event estimates; None if they have."""
    if workload.popularity == "fitted":
        return "a fitted workload has no other layers than its own"
    if workload.dummy_tokens:
        return "dummy tokens are identical, not independent"
    if workload.request_sigma and tokens > workload.tokens_per_request:
        return "the tokens of a step belong to several requests"
    if workload.request_sigma and workload.popularity == "tilted":
        return "request effects under a tilted popularity are not tilted together"
    if sigma_of(workload) == 0 and workload.popularity != "tilted":
        return "popularity is not drawn: exact rows and bounds hold for all layers"
    return None


def rare_tail(
    model: ModelSpec,
    workload: SyntheticTraffic,
    rank_of_expert: np.ndarray,
    tokens: int,
    *,
    imbalance: Sequence[float] = (),
    idle_ranks: Sequence[int] = (),
    one_rank: bool = False,
    floor: float = 1e-8,
    n_layers: int = LAYERS,
    seed: int = 0,
    n_threads: int = 1,
) -> RareTail:
    """Probabilities over all layers that a step is so bad, by importance sampling, down to a floor.

    Parameters
    ----------
    model : ModelSpec
    workload : SyntheticTraffic
        With a drawn popularity, log-normal or tilted; see `no_rare_events_because`.
    rank_of_expert : int [n_experts]
        A placement without replicas, the same for all layers.
    tokens : int
        Tokens of a step.
    imbalance : sequence of float
        Thresholds of max load over mean load.
    idle_ranks : sequence of int
        Thresholds of the number of idle ranks.
    one_rank : bool
        Whether to estimate that all of a step's load falls on one rank.
    floor : float
        Rows of smaller probabilities are left out.
    n_layers : int
        Layers of the final sample of each kind of event.
    seed, n_threads : int
        The rows do not depend on the number of threads.

    Returns
    -------
    RareTail
        Rows of probabilities from `floor` to 1/2, and reasons for those that the method cannot vouch for.

    Raises
    ------
    ValueError
        The workload has no rare-event estimates (`no_rare_events_because`), or the floor is below FLOOR.
    """
    reason = no_rare_events_because(workload, tokens)
    if reason is not None or not FLOOR <= floor < 1:
        raise ValueError(reason or f"floor must be from {FLOOR} to 1, not {floor}")
    rank = np.ascontiguousarray(rank_of_expert, np.int64)
    problem = _Problem(model, workload, rank, tokens, seed, n_threads)
    found = RareTail([], [])
    whole = tokens * model.top_k
    mean = Fraction(whole, problem.n_ranks)
    upper = [("imbalance", float(x), ceil(Fraction(str(x)) * mean)) for x in imbalance]
    upper += [("one_rank", 1.0, whole)] if one_rank else []
    upper = [event for event in upper if event[2] <= problem.largest]
    if upper:
        _estimate(problem, upper, floor, n_layers, found)
    lower = [("idle_ranks", float(m), int(m)) for m in idle_ranks if 1 <= m < problem.n_ranks]
    if lower:
        _estimate(replace(problem, idle=True), lower, floor, n_layers, found)
    return found


@dataclass(frozen=True)
class _Problem:
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
        def let(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        n_experts = self.model.n_experts
        let("popularity", Popularity(self.workload, n_experts))
        let("cells", cells_of(self.popularity))
        let("n_ranks", int(self.rank.max()) + 1)
        let("largest", self.tokens * min(self.model.top_k, int(np.bincount(self.rank).max())))
        let("group", np.arange(n_experts) // (n_experts // self.model.n_group))
        held = np.zeros((self.n_ranks, self.model.n_group), np.int64)
        np.add.at(held, (self.rank, self.group), 1)
        let("near", held > 0)
        alike = np.arange(self.n_ranks)
        if not self.popularity.tilted:
            alike = np.unique(np.sort(held, axis=1), axis=0, return_inverse=True)[1].ravel()
        let("alike", alike)
        shift, scale = self.popularity.rows
        weight = np.exp(shift[:, None] + scale[:, None] * self.cells.node)
        let("taken", -np.expm1(-self._rate() * weight))

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
        steps = max(_STEPS, _TOKENS // self.tokens)
        return steps * self.tokens


@dataclass(frozen=True)
class _Levels:
    """Proposals, level 0 being the popularity itself."""

    theta: np.ndarray  # float64 [levels, 3], of own, near and far experts
    target: np.ndarray  # float64 [levels, ranks], probability of each target rank
    steep: np.ndarray  # float64 [levels], of tilted popularity: probability of a steep tilt
    centre: np.ndarray  # float64 [levels, 2], of its two normals
    sd: np.ndarray  # float64 [levels, 2]

    @classmethod
    def nominal(cls, n_ranks: int) -> "_Levels":
        return cls(
            np.zeros((1, 3)),
            np.full((1, n_ranks), 1 / n_ranks),
            np.full(1, STEEP_SHARE),
            np.zeros((1, 2)),
            np.ones((1, 2)),
        )

    def __len__(self) -> int:
        return len(self.theta)

    def with_level(self, other: "_Levels") -> "_Levels":
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("theta", "target", "steep", "centre", "sd"))
        return _Levels(*(np.concatenate(pair) for pair in pairs))


class _Layers(NamedTuple):
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


def _sample(problem: _Problem, levels: _Levels, level: np.ndarray, events: np.ndarray, what: str) -> _Layers:
    """Sample layers of given levels and score them; events int64, as `score_layers` takes them."""
    mass = np.cumsum(problem.density(levels.theta) * problem.cells.width, axis=-1)
    chunks = [slice(i, min(i + _CHUNK, len(level))) for i in range(0, len(level), _CHUNK)]

    def sample(chunk: slice) -> _Layers:
        return _sample_chunk(problem, levels, mass, level[chunk], events, what, chunk.start)

    with ThreadPoolExecutor(problem.n_threads) as pool:
        parts = list(pool.map(sample, chunks))
    layers = _Layers(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return _weighed(problem, levels, layers)


def _sample_chunk(
    problem: _Problem, levels: _Levels, mass: np.ndarray, level: np.ndarray, events: np.ndarray, what: str, first: int
) -> _Layers:
    n, n_experts = len(level), problem.model.n_experts
    stream = f"rare|{problem.idle}|{problem.tokens}|{what}"
    u = uniforms(stream_key(problem.seed, stream), POPULARITY, 0, (n, 4 + 2 * n_experts), first)
    target = (u[:, :1] > np.cumsum(levels.target[level], axis=1)).sum(axis=1)
    target = np.minimum(target, problem.n_ranks - 1)
    steep = u[:, 1] < levels.steep[level]
    z = levels.centre[level] + levels.sd[level] * ndtri(u[:, 2:4])
    shift, scale = problem.popularity.of_layers(steep, z)
    row = problem.popularity.row_of(shift, scale)
    cell, tail = np.empty((n, n_experts), np.int16), np.empty((n, n_experts))
    draw_experts(
        u[:, 4:], level, _kinds(problem, target), row, mass, problem.cells.first, problem.cells.width, cell, tail
    )
    mu = shift + scale[:, None] * problem.popularity.quantile(tail)
    ids = route_layers(problem.model, problem.workload, problem.seed, stream, mu, first, problem.n_tokens)
    alone, step, shared = np.zeros((3, n, len(events)))
    score_layers(ids, problem.rank, target, problem.n_ranks, problem.tokens, events, problem.idle, alone, step, shared)
    return _Layers(level, target, steep, z, row, cell, np.empty((n, 0)), alone, step, shared)


def _kinds(problem: _Problem, target: np.ndarray) -> np.ndarray:
    """Whether each expert is the target rank's own, of its groups, or far: int8 [layers, n_experts]."""
    near = problem.near[target][:, problem.group]
    own = problem.rank == target[:, None]
    return np.where(own, _OWN, np.where(near, _NEAR, _FAR)).astype(np.int8)


def _pilot_events(problem: _Problem) -> np.ndarray:
    """Loads that levels may aim at, from common to rare."""
    mean = problem.tokens * problem.model.top_k / problem.n_ranks
    if problem.idle:
        return np.unique(-np.geomspace(1, max(mean, 1), 64).round().astype(np.int64))
    return np.unique(np.linspace(mean, problem.largest, 257).round().astype(np.int64))


def _find_levels(problem: _Problem, floor: float, last: int) -> tuple[_Levels, int]:
    """Proposals by multilevel cross-entropy, until the estimate of the aim falls to the floor; `last` is the last load asked
    for. Also the load from which on all is below the floor, as far as the pilot shows.
    """
    events = _pilot_events(problem)
    levels = _Levels.nominal(problem.n_ranks)
    pilot: list[_Layers] = []
    aim, below = -1, problem.largest + 1
    while len(levels) < _MOST_LEVELS:
        level = np.full(_PILOT, len(levels) - 1)
        pilot.append(_sample(problem, levels, level, events, f"pilot {len(levels)}"))
        layers = _pooled(problem, levels, pilot)
        weight = np.exp(layers.log_weight(np.full(len(levels), _PILOT)))
        worth = weight[:, None] * np.maximum(layers.alone, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            effective = worth.sum(axis=0) ** 2 / (worth**2).sum(axis=0)
        seen = np.flatnonzero(effective >= _ELITE)
        if not len(seen) or seen[-1] <= aim:
            break
        aim = int(seen[-1])
        levels = levels.with_level(_fit_level(problem, layers, worth[:, aim]))
        if problem.n_ranks * worth[:, aim].mean() < floor / 2:
            below = int(events[aim])
            break
        if aim == len(events) - 1 or (not problem.idle and events[aim] >= last):
            break
    return levels, below


def _pooled(problem: _Problem, levels: _Levels, pilot: list[_Layers]) -> _Layers:
    """All pilot layers together, weighed by the proposals of all levels."""
    pilot[:] = [_weighed(problem, levels, part) for part in pilot]
    return _Layers(*(np.concatenate(arrays) for arrays in zip(*pilot, strict=True)))


def _weighed(problem: _Problem, levels: _Levels, layers: _Layers) -> _Layers:
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
    add_logs(table, _kinds(problem, layers.target), layers.row, layers.cell, log_ratio)
    return layers._replace(log_ratio=np.concatenate([layers.log_ratio, log_ratio], axis=1))


def _fit_level(problem: _Problem, layers: _Layers, worth: np.ndarray) -> _Levels:
    """The proposal of largest likelihood on layers weighted by worth; shares and normals lean to the nominal ones."""
    share = worth / worth.sum()
    steep, z, target = layers.steep, layers.z, layers.target
    kind = _kinds(problem, target)
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
    return _Levels(
        theta[None],
        (of_class / size)[problem.alike][None],
        np.array([(1 - _NOMINAL) * (share @ steep) + _NOMINAL * STEEP_SHARE]),
        centre[None],
        np.clip(sd, 0.5, 1.5)[None],
    )


def _slope(problem: _Problem, theta: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Slope in theta of the log likelihood of experts `seen` [3, rows, cells], float64 [3]."""
    growth, p = np.expm1(theta)[:, None, None], problem.taken
    slope = problem.tokens * p * np.exp(theta)[:, None, None] / (1 + p * growth)
    mean = (problem.density(theta[None])[0] * problem.cells.width * slope).sum(axis=2, keepdims=True)
    return (seen * (slope - mean)).sum(axis=(1, 2))


def _estimate(
    problem: _Problem, wanted: list[tuple[str, float, int]], floor: float, n_layers: int, found: RareTail
) -> None:
    """Add the rows (or refusals) of some events, (metric, threshold, load or idle ranks), to `found`."""
    aims = sorted({aim for _, _, aim in wanted})
    levels, below = _find_levels(problem, floor, aims[-1])
    counts = np.full(len(levels), n_layers // len(levels)) + (np.arange(len(levels)) < n_layers % len(levels))
    layers = _sample(problem, levels, np.repeat(np.arange(len(levels)), counts), np.array(aims), "final")
    weight = problem.n_ranks * np.exp(layers.log_weight(counts))
    first = layers.shared if problem.tokens > LONGEST else layers.alone - (layers.step - layers.shared)
    for metric, threshold, aim in wanted:
        i = aims.index(aim)
        estimate = _estimate_of(weight * first[:, i], layers.level, counts)
        if estimate.probability >= _COMMON or estimate.high < floor or (not problem.idle and aim > below):
            continue
        reason = estimate.refusal
        if reason is not None:
            found.refused.append((metric, threshold, reason))
        elif estimate.probability >= floor:
            found.rows.append(RareRow(metric, threshold, *estimate[:3]))


class _Estimate(NamedTuple):
    """A mean over levels with its interval."""

    probability: float
    low: float
    high: float
    heaviest: float  # largest share of one layer

    @property
    def refusal(self) -> str | None:
        """Why the estimate cannot be vouched for; None if it can."""
        if not self.probability > 0:
            return "no sampled layer comes near it"
        if self.heaviest > _HEAVIEST:
            return f"one layer carries {self.heaviest:.0%} of the estimate"
        if np.log(self.high / self.probability) > _WIDEST:
            return "its interval is too wide"
        return None


def _moments(value: np.ndarray, level: np.ndarray, counts: np.ndarray) -> tuple[float, float, float]:
    """Mean over all layers, its variance stratified by level, and the variance's degrees of freedom."""
    n = counts.sum()
    mean = np.bincount(level, value, len(counts)) / counts
    away = value - mean[level]
    square, fourth = (np.bincount(level, away**k, len(counts)) / counts for k in (2, 4))
    square *= counts / (counts - 1)
    variance = float((counts * square).sum() / n**2)
    of_variance = float((counts * np.maximum(fourth - square**2, 0)).sum() / n**4)
    return float(value.sum() / n), variance, 2 * variance**2 / of_variance if of_variance > 0 else np.inf


def _estimate_of(value: np.ndarray, level: np.ndarray, counts: np.ndarray) -> _Estimate:
    """Mean with a 95 % Student interval on the log scale: weights are skew, and so is their mean."""
    mean, variance, degrees = _moments(value, level, counts)
    if mean <= 0:
        return _Estimate(0.0, 0.0, 1.0, 1.0)
    half = -stdtrit(np.clip(degrees, 2, 1e9), 0.025) * np.sqrt(variance) / mean
    return _Estimate(mean, mean * np.exp(-half), min(mean * np.exp(half), 1.0), float(value.max() / value.sum()))
