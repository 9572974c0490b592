"""Rows of tail.csv that sampling cannot give: exact answers, and bounds without a floor.

Tokens must be independent given the layer: synthetic traffic without request effects. Under uniform traffic the rows hold
as they stand. Where popularity is drawn, the far tail belongs to layers that nobody drew; the rows are then conditional
on the first layer draws of the sweep, and say so. Of fitted traffic the layers are all there are: where all of them
are taken, nothing is left out.

Where experts differ in popularity no closed form is known for the load of a rank by one token, so its distribution is counted
from tokens that the sweep does not use. It is bounded in stochastic order, through its probabilities of at least j experts:
sums of tokens are then bounded too, however many. All these bounds hold together with 95 % confidence.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TypeAlias

import numpy as np
import pandas as pd
from scipy.special import ndtr

from sim.kernels import kernel
from sim.progress import track
from sim.router import draw_trials
from sim.stats import CONFIDENCE
from sim.sweeps.grid import Events, events_of
from sim.sweeps.plan import Plan
from sim.sweeps.steps import Group, place_pairs
from sim.sweeps.tables import KEYS, cell_keys, certain_events, impossible_events
from sim.sweeps.tally import Tally
from sim.theory import TINY, TailsOfSums, UniformLayer, UniformRouter, fill_layer_bounds, join_layer_bounds
from sim.traffic import SyntheticTraffic
from sim.traffic.synthetic import X0

_NEAR_1 = (1.01, 1.02, 1.03, 1.04, 1.05, 1.06, 1.08, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.5, 1.6, 1.75)
_COARSE, _FINE = (1, 1.25, 1.5, 1.75), (1, 1.125, 1.25, 1.375, 1.5, 1.625, 1.75, 1.875)
LADDER, FINE_LADDER = ((*_NEAR_1, *(x * 2.0**i for i in range(1, 14) for x in between)) for between in (_COARSE, _FINE))
"""Imbalance thresholds of bounds, besides those of the sweep; the fine one where rows cost little."""
_DEEPEST = 1e-12  # below this, only the sweep's own thresholds

_NEAR_TINY = 1e6 * TINY
_BATCH_TOKENS = 2**13
_TALLIED = 2**10  # tokens whose loads are counted together
_TABULATED = 128  # tokens of a step up to which all thresholds of a distribution are worked out at once
_EARLIER = np.uint16(2**15)
_MOST_BATCHES = 16  # per layer
_LEAST_BATCHES, _TRIALS_PER_BATCH = 4, 625  # a larger sweep has more precise ones
_COMMON = 0.5  # probability, by the normal approximation
_HOT = 8  # ranks of a layer whose pairs are looked at
_FIRST_TRIAL = 3072 * 2**20  # beyond any trial of a sweep; trial t runs layer t % 2**20

Source: TypeAlias = "UniformLayer | DrawnLayers"
Row = tuple[str, float, float, float]  # metric, threshold, lower and upper bound


def no_bounds_because(plan: Plan) -> str | None:
    """Why a sweep stays with sampling; None if it does not."""
    if not isinstance(plan.workload, SyntheticTraffic):
        return (
            "a recorded step takes its tokens from different sequences, without replacement: they are not independent"
        )
    if plan.workload.request_sigma > 0:
        return "the tokens of a request are not independent"
    if plan.workload.dummy_tokens > 0:
        return "dummy tokens are identical, not independent"
    if plan.bound_layers == 0:
        return "--bound-layers is 0 (the default where bounds would take longer than the sampling)"
    return None


def replicas_have_no_bounds(plan: Plan) -> str | None:
    """Which placements stay with sampling where others do not, and why; None if there are none."""
    names = dict.fromkeys(name for (name, _), has in zip(plan.grid.pairs, plan.has_replicas, strict=True) if has)
    if not names or no_bounds_because(plan):
        return None
    return f"{', '.join(names)}: the copy that a token goes to depends on the others, so tokens are not independent"


def build_bounds(plan: Plan, tally: Tally, n_threads: int) -> tuple[pd.DataFrame, list[str]]:
    """Rows of tail.csv with method 'exact' (both bounds agree) or 'bound' (probability and high are the upper bound).

    A bound that cannot be computed is left out, with a note: what was sampled must not be lost for it.

    Returns
    -------
    (rows, notes)
    """
    if no_bounds_because(plan):
        return pd.DataFrame(), []
    grid, n_layers = plan.grid, min(plan.bound_layers, plan.draws or plan.trials)
    assert isinstance(plan.workload, SyntheticTraffic)
    layouts = [(layout, ep_size) for layout, (_, ep_size) in zip(grid.layouts, grid.pairs, strict=True)]
    plain = [p for p in range(len(layouts)) if not plan.has_replicas[p]]
    first = {layouts[p]: p for p in reversed(plain)}  # equal placements have equal rows
    try:
        sources = _sources(plan, list(first.values()), n_layers, n_threads)
    except Exception as error:
        return pd.DataFrame(), [f"no bounds past sampling: {_reason(error)}"]
    largest_first = sorted(sources, key=lambda p: -grid.pairs[p][1])  # no thread is left with a large one at the end
    sizes = [grid.pairs[p][1] * len(grid.steps) for p in largest_first]
    with ThreadPoolExecutor(n_threads) as pool:
        rows_of = pool.map(lambda p: _try_rows(plan, p, sources[p]), largest_first)
        try:
            found = dict(zip(largest_first, track(rows_of, sizes), strict=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    keys, rows_out = cell_keys(grid, tally), []
    all_layers = plan.workload.popularity == "none" or plan.workload.n_layers == n_layers
    for cell, (pair, step) in enumerate(grid.cells):
        source = first.get(layouts[pair])
        rows = None if source is None else found.get(source)
        if source is None or rows is None or isinstance(rows, str):
            continue
        conditional = isinstance(sources[source], DrawnLayers) and (plan.placements[pair] is None or not all_layers)
        given = f"{n_layers} drawn layers" if conditional else ""
        for metric, threshold, low, high in rows[step]:
            low = low if high > _NEAR_TINY else 0.0
            method = "exact" if low == high else "bound"
            rows_out.append((*keys[cell], metric, threshold, high, low, high, method, given))
    notes = [
        "no bounds past sampling for {} at EP {}: {}".format(*grid.pairs[p], reason)
        for p, reason in found.items()
        if isinstance(reason, str)
    ]
    columns = [*KEYS, "metric", "threshold", "probability", "low", "high", "method", "given"]
    return pd.DataFrame(rows_out, columns=columns).assign(effective_blocks=np.nan), notes


def _sources(plan: Plan, pairs: list[int], n_layers: int, n_threads: int) -> dict[int, Source]:
    """Where the bounds of pairs come from, of those that have any."""
    assert isinstance(plan.workload, SyntheticTraffic)
    router = _uniform_router(plan, plan.workload)
    sources: dict[int, Source] = {}
    for p in pairs:
        placement = plan.placements[p]
        if router is not None and placement is not None and placement.n_rows == 1:
            sources[p] = UniformLayer(router, placement.expert_ranks[0])
    # Random and fitted placements of uniform traffic are as many layouts as layers: they are left to sampling.
    drawn = [p for p in pairs if router is None or plan.placements[p] is not None]
    drawn = [p for p in drawn if p not in sources]
    return sources | dict(zip(drawn, sample_token_loads(plan, drawn, n_layers, n_threads), strict=True))


def _try_rows(plan: Plan, pair: int, source: Source) -> dict[int, list[Row]] | str:
    """Rows of each step of a pair, or why there are none."""
    try:
        return _rows_of_pair(plan, pair, source)
    except Exception as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    return f"they could not be computed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"


def _uniform_router(plan: Plan, workload: SyntheticTraffic) -> UniformRouter | None:
    """The router under uniform traffic; None where experts or tokens are not alike."""
    model = plan.model
    if workload.popularity != "none" or (model.is_grouped and workload.group_sigma > 0):
        return None
    return UniformRouter.of(model, X0)


def _rows_of_pair(plan: Plan, pair: int, source: Source) -> dict[int, list[Row]]:
    """Rows of each step of a pair."""
    grid, events = plan.grid, events_of(plan.grid)
    known = impossible_events(grid, events) | certain_events(grid, events)
    rows: dict[int, list[Row]] = {}
    for cell in range(len(grid.cells)):
        if grid.cells[cell][0] == pair:
            rows[grid.cells[cell][1]] = [
                *_imbalance_rows(plan, cell, source),
                *_other_rows(events, known, int(grid.tokens_of_cell[cell]), cell, source),
            ]
    if isinstance(source, DrawnLayers):
        source.forget_sums()
    return rows


def _imbalance_rows(plan: Plan, cell: int, source: Source) -> Iterator[Row]:
    grid = plan.grid
    tokens, mean = int(grid.tokens_of_cell[cell]), grid.mean_load(cell)
    bounds = {1: (1.0, 1.0)}  # of small steps many thresholds ask for the same load
    last = 1.0
    for x in sorted({*grid.thresholds, *(FINE_LADDER if isinstance(source, UniformLayer) else LADDER)}):
        if x > grid.ep_size_of_cell[cell] or (last < _DEEPEST and x not in grid.thresholds):
            continue
        least = math.ceil(Fraction(str(x)) * mean)
        if least not in bounds:
            bounds[least] = source.max_load(tokens, least)
        low, last = bounds[least]
        if last < 1:
            yield "imbalance", x, low, last


def _other_rows(events: Events, known: np.ndarray, tokens: int, cell: int, source: Source) -> Iterator[Row]:
    for i in (events.cell == cell).nonzero()[0]:
        name, least = events.name[i], int(events.least[i])
        if name == "imbalance" or known[i]:
            continue
        if name == "received":
            bounds: tuple[float, float] | None = source.received(tokens, least)
        else:
            bounds = source.one_rank(tokens) if name == "one_rank" else source.idle_ranks(tokens, least)
        if bounds is not None and (bounds[1] < 1 or bounds[0] == bounds[1]):
            yield name, events.threshold[i], *bounds


@dataclass(frozen=True, eq=False)
class DrawnLayers:
    """Loads by one token under a pair (placement, EP size) on some layer draws: P(a token has j = 0 .. top_k experts there),
    float64 [layers, n, top_k + 1]. Probabilities of a step are means over the layers, each between bounds.
    """

    upper: np.ndarray  # of each rank, not below the true one in stochastic order
    lower: np.ndarray  # of each rank, not above
    hot_lower: np.ndarray  # of the ranks with the largest mean loads
    pair_upper: np.ndarray  # of each two of these together

    def max_load(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(max load >= least): (lower bound, upper bound); (0, 1) where it is common, which sampling sees better."""
        mean, variance = self._moments
        common = ndtr((n_tokens * mean - least) / np.sqrt(n_tokens * variance)).sum(axis=1)
        if np.minimum(common, 1.0).mean() > _COMMON:
            return 0.0, 1.0
        out = np.empty((len(self.upper), 2))
        if n_tokens <= _TABULATED:
            laws, places = (self.upper, self.hot_lower, self.pair_upper), (least, least, 2 * least)
            known = zip(laws, self._sums, places, strict=True)
            join_layer_bounds(*(of.at(n_tokens, x).reshape(p.shape[:2]) for p, of, x in known), out)
        else:
            fill_layer_bounds(self.upper, self.hot_lower, self.pair_upper, n_tokens, least, out)
        low, high = out.mean(axis=0)
        return float(low), float(high)

    @cached_property
    def _sums(self) -> list[TailsOfSums]:
        """Of the ranks, the hot ranks and their pairs."""
        laws = (self.upper, self.hot_lower, self.pair_upper)
        return [TailsOfSums(p.reshape(-1, p.shape[2])) for p in laws]

    def forget_sums(self) -> None:
        """Free the laws of sums, tens of MB for each pair."""
        vars(self).pop("_sums", None)

    def received(self, n_tokens: int, least: int) -> tuple[float, float]:
        """P(a rank receives at least `least` of the tokens): binomial on each rank. The lower bound is that of one rank."""
        upper, lower = 1 - self.upper[..., 0], 1 - self.lower[..., 0]
        common = ndtr((n_tokens * upper - least) / np.sqrt(n_tokens * np.maximum(upper * (1 - upper), 1e-12))).sum(
            axis=1
        )
        if np.minimum(common, 1.0).mean() > _COMMON:
            return 0.0, 1.0
        busiest = lower.max(axis=1, keepdims=True)
        laws = [np.stack([1 - p, p], axis=2) for p in (upper, busiest)]
        out = np.empty((len(upper), 2))
        fill_layer_bounds(laws[0], laws[1], np.empty((len(upper), 0, 2)), n_tokens, least, out)
        low, high = out.mean(axis=0)
        return float(low), float(high)

    @cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of each rank's load by one token, [layers, ranks]."""
        j = np.arange(self.upper.shape[2])
        mean = self.upper @ j
        return mean, np.maximum(self.upper @ j**2 - mean**2, 1e-12)

    def one_rank(self, n_tokens: int) -> tuple[float, float]:
        """P(all of a step's load on one rank)."""
        low, high = ((p[..., -1] ** n_tokens).sum(axis=1).mean() for p in (self.lower, self.upper))
        return float(low), min(float(high), 1.0)

    def idle_ranks(self, n_tokens: int, least: int) -> tuple[float, float] | None:
        """P(at least one idle rank); None for more than one, about which single ranks do not tell."""
        if least > 1:
            return None
        low, high = (self.upper[..., 0] ** n_tokens).max(axis=1), (self.lower[..., 0] ** n_tokens).sum(axis=1)
        return float(low.mean()), float(np.minimum(high, 1.0).mean())


def sample_token_loads(plan: Plan, pairs: list[int], n_layers: int, n_threads: int) -> list[DrawnLayers]:
    """Of some pairs of the grid, without replicas, on layer draws 0 .. n_layers - 1."""
    if not pairs:
        return []
    [group] = place_pairs(plan, range(n_layers), pairs)
    n_batches = min(max(plan.trials // _TRIALS_PER_BATCH, _LEAST_BATCHES), _MOST_BATCHES)
    n_tokens = n_batches * _BATCH_TOKENS
    with ThreadPoolExecutor(n_threads) as pool:
        layers = list(pool.map(lambda i: _count(plan, group, i, n_batches), range(n_layers)))
        of_pairs = zip(*layers, strict=True)
        return list(pool.map(lambda of_layer: _bounded_loads(of_layer, n_tokens), of_pairs))


def _bounded_loads(layers: tuple[tuple[np.ndarray, np.ndarray, np.ndarray], ...], n_tokens: int) -> DrawnLayers:
    single, hot, together = (np.stack(arrays) for arrays in zip(*layers, strict=True))
    n_bounds = 2 * len(layers) * (single.shape[2] - 1) * (single.shape[1] + together.shape[1])
    log_odds = np.log(n_bounds / (1 - CONFIDENCE))
    upper, lower = (_bounded(single, n_tokens, log_odds, up) for up in (True, False))
    hot_lower = np.take_along_axis(lower, hot[:, :, None], axis=1)
    return DrawnLayers(upper, lower, hot_lower, _bounded(together, n_tokens, log_odds, True))


def _count(plan: Plan, group: Group, layer: int, n_batches: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of each pair: tokens with j experts on each rank; the hottest ranks; tokens with j experts on two of these."""
    counts, _ = _tokens(plan, layer, _MOST_BATCHES)
    found = []
    ranks = group.layouts.ranks[group.rows[layer]]
    for p, rank in zip(group.pairs, ranks, strict=True):
        ep_size = plan.grid.pairs[p][1]
        hot = np.sort(np.argsort(-np.bincount(rank, counts[0, 0], ep_size), kind="stable")[:_HOT])
        width = plan.grid.top_k + 1
        found.append(
            (np.zeros((ep_size, width), np.int64), hot, np.zeros((len(hot) * (len(hot) - 1) // 2, width), np.int64))
        )
    for batch in range(n_batches):
        _, ids = _tokens(plan, layer, batch)
        for rank, (single, hot, together) in zip(ranks, found, strict=True):
            _tally_loads(ids[0], rank, hot, single, together)
    return found


def _tokens(plan: Plan, layer: int, batch: int) -> tuple[np.ndarray, np.ndarray]:
    trial = _FIRST_TRIAL + batch * 2**20 + layer
    tokens = np.array([_BATCH_TOKENS])
    return draw_trials(plan.model, plan.workload, plan.seed, range(trial, trial + 1), 2**20, tokens, _BATCH_TOKENS)


@kernel
def _tally_loads(ids, rank, hot, single, together):
    """Add tokens ids int16 [tokens, top_k] to single int64 [ranks, top_k + 1] and together int64 [pairs, top_k + 1], of
    which only loads from 1 on are of use. Tokens come last and numbers are narrow, so that loops over tokens vectorise.
    """
    top_k = ids.shape[1]
    ranks, of_rank = np.empty((top_k, _TALLIED), np.uint16), np.empty(_TALLIED, np.uint16)
    of_hot, most = np.empty((hot.size, _TALLIED), np.uint16), np.empty(hot.size, np.int64)
    for start in range(0, ids.shape[0], _TALLIED):
        n = min(_TALLIED, ids.shape[0] - start)
        for i in range(n):
            for k in range(top_k):
                ranks[k, i] = rank[np.uint16(ids[start + i, k])]
        for k in range(top_k):
            _count_same(n, ranks, k, of_rank)
            for i in range(n):
                single[ranks[k, i], of_rank[i]] += 1
        for a in range(hot.size):
            _count_equal(n, ranks, np.uint16(hot[a]), of_hot[a])
            most[a] = of_hot[a, :n].max()
        pair = 0
        for a in range(hot.size):
            for b in range(a + 1, hot.size):
                for load in range(1, min(most[a] + most[b], top_k) + 1):
                    together[pair, load] += _count_sums(n, of_hot[a], of_hot[b], np.uint16(load))
                pair += 1


@kernel
def _count_same(n, ranks, k, out):
    """Experts of each token on the rank of its k-th one; 0 where an earlier one is there, which is counted for both."""
    mine = ranks[k]
    out[:n] = 0
    for j in range(ranks.shape[0]):
        theirs = ranks[j]
        if j < k:
            for i in range(n):
                out[i] = _EARLIER if theirs[i] == mine[i] else out[i]
        else:
            for i in range(n):
                out[i] = out[i] + np.uint16(theirs[i] == mine[i])
    for i in range(n):
        out[i] = out[i] if out[i] < _EARLIER else np.uint16(0)


@kernel
def _count_equal(n, ranks, rank, out):
    """Experts of each token on a rank."""
    out[:n] = 0
    for k in range(ranks.shape[0]):
        of_expert = ranks[k]
        for i in range(n):
            out[i] = out[i] + np.uint16(of_expert[i] == rank)


@kernel
def _count_sums(n, a, b, load):
    """Tokens whose loads on two ranks add up to `load`."""
    found = np.uint16(0)
    for i in range(n):
        found = np.uint16(found + np.uint16(np.uint16(a[i] + b[i]) == load))
    return np.int64(found)


def _bounded(counts: np.ndarray, n_tokens: int, log_odds: float, up: bool) -> np.ndarray:
    """Probabilities above (below) those that were counted, in stochastic order: P(at least j) moved to its bound."""
    at_least = np.cumsum(counts[..., :0:-1], axis=-1)[..., ::-1]
    bound = np.empty(at_least.shape)
    _fill_bounds(at_least.reshape(-1), n_tokens, log_odds, up, bound.reshape(-1))
    bound = np.concatenate([np.ones((*bound.shape[:-1], 1)), bound, np.zeros((*bound.shape[:-1], 1))], axis=-1)
    return bound[..., :-1] - bound[..., 1:]


@kernel
def _fill_bounds(hits, n, log_odds, up, out):
    """Chernoff's bound of a probability seen in `hits` of n tokens, wrong with probability exp(-log_odds) at most."""
    known = np.full(n + 1, -1.0)  # few numbers of hits are met once
    for i in range(hits.size):
        if known[hits[i]] >= 0.0:
            out[i] = known[hits[i]]
            continue
        p = hits[i] / n
        variance = p if up else 1 - p
        reach = np.sqrt(2 * variance * log_odds / n) + 2 * log_odds / n  # not less than the bound is away
        inside, outside = p, min(p + reach, 1.0) if up else max(p - reach, 0.0)
        for _ in range(24 if inside != outside else 0):
            q = 0.5 * (inside + outside)
            gap = 0.0
            if p > 0.0:
                gap += p * np.log(p / q)
            if p < 1.0:
                gap += (1 - p) * np.log((1 - p) / (1 - q))
            if n * gap > log_odds:
                outside = q
            else:
                inside = q
        out[i] = known[hits[i]] = outside
