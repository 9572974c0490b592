"""Tails without a floor for synthetic traffic with drawn popularity: importance sampling over layers.

P(max load >= c) over all layers is a sum over ranks: with A the event that rank r reaches c and N the number of ranks that
do, it is the sum over r of E[1_A / N]. Three ideas make it cheap to estimate at 1e-8:

- **Given a layer's popularity**, P(A) for all c at once is a complete U-statistic: M tokens are routed, and a step is T of
  them without replacement, by a hypergeometric dynamic programme over the tokens' numbers of experts on the rank. It is
  unbiased, which a convolution of the sampled law of single tokens is not. What the union takes off, E[1_A (1 - 1/N)], is
  small and comes from disjoint steps of the same tokens.
- **Layers come from a tilted proposal** (`sim.theory.proposals`), independent per expert given the target rank. It covers both
  one very hot expert and all of a rank's a little hot.
- **theta comes from multilevel cross-entropy** (Rubinstein and Kroese 2004): each level aims at the rarest load that the
  levels before it see with enough layers. The pilot is discarded. The final layers are spread over all levels, the nominal
  one included, with the weights of the balance heuristic (Veach and Guibas 1995), and the variance is stratified by level.

Idle ranks are the same with loads from above: A is the event that the rank has no pair.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from math import ceil
from typing import NamedTuple

import numpy as np
from scipy.special import ndtri, stdtrit

from sim.kernels import kernel
from sim.model import ModelSpec
from sim.router import route_layers
from sim.streams import POPULARITY, stream_key, uniforms
from sim.theory.proposals import Layers, Levels, Problem, draw_experts, fit_level, kinds, sigma_of, weighed
from sim.traffic import SyntheticTraffic

LAYERS, LEAST_LAYERS, MOST_TOKENS = 20_000, 4_000, 2**24
"""Layers of the final sample, by default: the first number, fewer where their tokens would be too many, at least the second."""
FLOOR = 1e-12
"""The lowest floor: below it the rounding of the dynamic programme is no longer negligible."""
_PILOT, _MOST_LEVELS = 300, 14
_ELITE = 50.0  # effective layers that a level is fitted to
_LONGEST = 64  # tokens of a step for which steps are drawn without replacement; longer ones are taken as they come
_CHUNK = 32  # layers
_HEAVIEST = 0.05  # share of an estimate that one layer may carry
_WIDEST = 0.5  # of the interval on the log scale, half
_COMMON = 0.5  # probability above which sampling sees as much


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
    if workload.n_contexts > 1:
        return "the tokens of a step belong to several contexts of a request"
    if workload.request_sigma and workload.strength_sd:
        return "the requests of layers differ in strength"
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
    n_layers: int | None = None,
    seed: int = 0,
    n_threads: int = 1,
) -> RareTail:
    """Probabilities over all layers that a step is so bad, by importance sampling: from `floor` to 1/2, and the reasons for those
    that the method cannot vouch for. They do not depend on the number of threads.

    The placement, rank_of_expert int [n_experts], has no replicas and is the same for all layers. `imbalance` are thresholds of
    max load over mean load, `idle_ranks` of their number; `one_rank`: all of a step's load on one. `n_layers` are those of the
    final sample of each kind of event (default: 20,000, fewer for steps of more than 800 tokens).

    Raises ValueError where the workload has no such estimates (`no_rare_events_because`), or the floor is below FLOOR.
    """
    reason = no_rare_events_because(workload, tokens)
    if reason is not None or not FLOOR <= floor < 1:
        raise ValueError(reason or f"floor must be from {FLOOR} to 1, not {floor}")
    rank = np.ascontiguousarray(rank_of_expert, np.int64)
    problem = Problem(model, workload, rank, tokens, seed, n_threads)
    found = RareTail([], [])
    whole = tokens * model.top_k
    mean = Fraction(whole, problem.n_ranks)
    upper = [("imbalance", float(x), ceil(Fraction(str(x)) * mean)) for x in imbalance]
    upper += [("one_rank", 1.0, whole)] if one_rank else []
    upper = [event for event in upper if event[2] <= problem.largest]
    if n_layers is None:
        n_layers = int(np.clip(MOST_TOKENS // problem.n_tokens, LEAST_LAYERS, LAYERS))
    if upper:
        _estimate(problem, upper, floor, n_layers, found)
    lower = [("idle_ranks", float(m), int(m)) for m in idle_ranks if 1 <= m < problem.n_ranks]
    if lower:
        _estimate(replace(problem, idle=True), lower, floor, n_layers, found)
    return found


def _sample(problem: Problem, levels: Levels, level: np.ndarray, events: np.ndarray, what: str) -> Layers:
    """Sample layers of given levels and score them; events int64, as `score_layers` takes them."""
    mass = np.cumsum(problem.density(levels.theta) * problem.cells.width, axis=-1)
    chunks = [slice(i, min(i + _CHUNK, len(level))) for i in range(0, len(level), _CHUNK)]

    def sample(chunk: slice) -> Layers:
        return _sample_chunk(problem, levels, mass, level[chunk], events, what, chunk.start)

    with ThreadPoolExecutor(problem.n_threads) as pool:
        parts = list(pool.map(sample, chunks))
    layers = Layers(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return weighed(problem, levels, layers)


def _sample_chunk(
    problem: Problem, levels: Levels, mass: np.ndarray, level: np.ndarray, events: np.ndarray, what: str, first: int
) -> Layers:
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
        u[:, 4:], level, kinds(problem, target), row, mass, problem.cells.first, problem.cells.width, cell, tail
    )
    mu = shift + scale[:, None] * problem.popularity.quantile(tail)
    ids = route_layers(problem.model, problem.workload, problem.seed, stream, mu, first, problem.n_tokens)
    alone, step, shared = np.zeros((3, n, len(events)))
    score_layers(ids, problem.rank, target, problem.n_ranks, problem.tokens, events, problem.idle, alone, step, shared)
    return Layers(level, target, steep, z, row, cell, np.empty((n, 0)), alone, step, shared)


@kernel
def _fill_binomial(n, p, out):
    """Binomial probabilities of 0 .. out.size - 1 in n trials; returns the range beyond which they are below 1e-18."""
    largest = min(n, out.size - 1)
    mode = min(np.int64((n + 1) * p), largest)
    out[:] = 0.0
    out[mode] = 1.0
    odds = p / (1 - p)
    for i in range(mode + 1, largest + 1):
        out[i] = out[i - 1] * odds * (n - i + 1) / i
    for i in range(mode - 1, -1, -1):
        out[i] = out[i + 1] * (i + 1) / ((n - i) * odds)
    low, high = 0, largest
    while out[low] < 1e-18:
        low += 1
    while out[high] < 1e-18:
        high -= 1
    return low, high


@kernel
def fill_sum_law(counts, tokens, law, here, there):
    """Law of the sum of `tokens` draws without replacement from counts[j] tokens of j experts each.

    Each class gives a binomial number of tokens, and the numbers add up to `tokens`: classes from the largest j on, the
    state being how many tokens and experts came so far. law float64 [largest sum + 1]; here and there float64
    [tokens + 1, largest sum + 1], scratch.
    """
    n_tokens = counts.sum()
    p = tokens / n_tokens
    law[:] = 0.0
    if n_tokens == tokens:
        total = 0
        for j in range(counts.size):
            total += j * counts[j]
        law[total] = 1.0
        return
    ways, others = np.empty(tokens + 1), np.empty(tokens + 1)
    top = counts.size - 1
    while top > 1 and counts[top] == 0:
        top -= 1
    used, previous = 0, top
    here[0, 0] = 1.0
    for j in range(top, 1, -1):
        if counts[j] == 0:
            continue
        low, high = _fill_binomial(counts[j], p, ways)
        more = min(used + high, tokens)
        for n in range(more + 1):
            there[n, j * n : top * n + 1] = 0.0
        for n in range(used + 1):
            lo, hi = previous * n, top * n + 1
            for i in range(low, min(high, tokens - n) + 1):
                weight = ways[i]
                source, sink = here[n, lo:hi], there[n + i, lo + j * i : hi + j * i]
                for s in range(source.size):
                    sink[s] += weight * source[s]
        used, previous = more, j
        here, there = there, here
    low, high = _fill_binomial(counts[1], p, ways)
    _fill_binomial(counts[0], p, others)
    for n in range(used + 1):
        lo, hi = previous * n, top * n + 1
        for i in range(low, min(high, tokens - n) + 1):
            weight = ways[i] * others[tokens - n - i]
            if weight > 0.0:
                source, sink = here[n, lo:hi], law[lo + i : hi + i]
                for s in range(source.size):
                    sink[s] += weight * source[s]
    total = law.sum()
    for s in range(law.size):
        law[s] /= total


@kernel
def score_layers(ids, rank, target, n_ranks, tokens, events, idle, alone, step, shared):
    """What the tokens of each layer say of its target rank.

    ids int16 [layers, tokens of a layer, top_k]; events int64 [events]: A is a load of at least this, or `idle`: at most
    that, where an event m >= 0 of idle ranks asks for A with load 0 and N >= m; alone, step and shared float64 [layers,
    events], as `Layers` says.
    """
    n_layers, n_tokens, top_k = ids.shape
    largest = tokens * top_k
    counts = np.empty(top_k + 1, np.int64)
    law = np.empty(largest + 1)
    short = tokens <= _LONGEST
    here = np.empty((tokens + 1 if short else 1, largest + 1))
    there = np.empty_like(here)
    loads = np.empty(n_ranks, np.int64)
    n_steps = n_tokens // tokens
    for i in range(n_layers):
        counts[:] = 0
        for t in range(n_tokens):
            mine = 0
            for k in range(top_k):
                mine += rank[ids[i, t, k]] == target[i]
            counts[mine] += 1
        if short:
            fill_sum_law(counts, tokens, law, here, there)
            for s in range(largest - 1, -1, -1):
                law[s] += law[s + 1]
        for s in range(n_steps):
            loads[:] = 0
            for t in range(s * tokens, (s + 1) * tokens):
                for k in range(top_k):
                    loads[rank[ids[i, t, k]]] += 1
            mine = loads[target[i]]
            for v in range(events.size):
                if idle:
                    # a negative event -c asks for a load of at most c - 1, of this rank alone
                    hit = mine == 0 if events[v] > 0 else mine < -events[v]
                else:
                    hit = mine >= events[v]
                if hit:
                    others = 0
                    for r in range(n_ranks):
                        others += loads[r] == 0 if idle else loads[r] >= events[v]
                    step[i, v] += 1.0 / n_steps
                    if not idle or others >= events[v]:
                        shared[i, v] += 1.0 / (max(others, 1) * n_steps)
        for v in range(events.size):
            if not short or (idle and events[v] > 1):
                alone[i, v] = step[i, v]
            elif idle:
                alone[i, v] = max(1.0 - law[1 if events[v] > 0 else -events[v]], 0.0)
            else:
                alone[i, v] = law[events[v]] if events[v] <= largest else 0.0


def _pilot_events(problem: Problem) -> np.ndarray:
    """Loads that levels may aim at, from common to rare."""
    mean = problem.tokens * problem.model.top_k / problem.n_ranks
    if problem.idle:
        return np.unique(-np.geomspace(1, max(mean, 1), 64).round().astype(np.int64))
    return np.unique(np.linspace(mean, problem.largest, 257).round().astype(np.int64))


def _find_levels(problem: Problem, floor: float, last: int) -> tuple[Levels, int]:
    """Proposals by multilevel cross-entropy, until the estimate of the aim falls to the floor; `last` is the last load asked
    for. Also the load from which on all is below the floor, as far as the pilot shows.
    """
    events = _pilot_events(problem)
    levels = Levels.nominal(problem.n_ranks)
    pilot: list[Layers] = []
    aim, below = -1, problem.largest + 1
    while len(levels) < _MOST_LEVELS:
        level = np.full(_PILOT, len(levels) - 1)
        pilot.append(_sample(problem, levels, level, events, f"pilot {len(levels)}"))
        pilot = [weighed(problem, levels, part) for part in pilot]
        layers = Layers(*(np.concatenate(arrays) for arrays in zip(*pilot, strict=True)))
        weight = np.exp(layers.log_weight(np.full(len(levels), _PILOT)))
        worth = weight[:, None] * np.maximum(layers.alone, 0)
        with np.errstate(invalid="ignore", divide="ignore"):
            effective = worth.sum(axis=0) ** 2 / (worth**2).sum(axis=0)
        seen = np.flatnonzero(effective >= _ELITE)
        if not len(seen) or seen[-1] <= aim:
            break
        aim = int(seen[-1])
        levels = levels.with_level(fit_level(problem, layers, worth[:, aim]))
        if problem.n_ranks * worth[:, aim].mean() < floor / 2:
            below = int(events[aim])
            break
        if aim == len(events) - 1 or (not problem.idle and events[aim] >= last):
            break
    return levels, below


def _estimate(
    problem: Problem, wanted: list[tuple[str, float, int]], floor: float, n_layers: int, found: RareTail
) -> None:
    """Add the rows (or refusals) of some events, (metric, threshold, load or idle ranks), to `found`."""
    aims = sorted({aim for _, _, aim in wanted})
    levels, below = _find_levels(problem, floor, aims[-1])
    counts = np.full(len(levels), n_layers // len(levels)) + (np.arange(len(levels)) < n_layers % len(levels))
    layers = _sample(problem, levels, np.repeat(np.arange(len(levels)), counts), np.array(aims), "final")
    weight = problem.n_ranks * np.exp(layers.log_weight(counts))
    first = layers.shared if problem.tokens > _LONGEST else layers.alone - (layers.step - layers.shared)
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
