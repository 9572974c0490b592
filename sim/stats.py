"""Intervals and exceedance curves from integer counts.

The unit of replication is an independent layer draw. A draw d gives n_d blocks (n_d = 1 where every step has a fresh
layer); its sum of a quantity is Y_d. Sums over draws of Y_d, Y_d**2 and n_d * Y_d are all that intervals need.
"""

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import bdtrik, betaincinv, gammaincinv, ndtri, stdtrit

CELL = ["placement", "ep_size", "tokens"]
"""Columns that name a cell in every table of a sweep."""
CONFIDENCE = 0.95
_TAIL = (1 - CONFIDENCE) / 2
_MANY_HITS = 100  # beyond them a count is near enough to a normal one


def student_quantile(degrees: Any) -> Any:
    """Half-width of a 95 % Student interval in standard errors, for the degrees of freedom given, at least 1."""
    distinct, place = np.unique(np.maximum(degrees, 1), return_inverse=True)  # few, and a quantile is dear
    return np.take(-stdtrit(distinct, _TAIL), place)


class Moments(NamedTuple):
    """Sums over draws, arrays of one shape: of Y_d, of Y_d squared, and of n_d * Y_d."""

    total: np.ndarray
    square: np.ndarray
    weighted: np.ndarray


class Design(NamedTuple):
    """How blocks come from draws: numbers, or arrays that broadcast against moments."""

    blocks: Any  # sum of n_d
    draws: Any
    blocks_square: Any  # sum of n_d squared

    @classmethod
    def of(cls, trials: int, draws: int) -> "Design":
        """`trials` blocks, evenly from `draws` draws."""
        q, m = divmod(trials, draws)
        return cls(trials, draws, m * (q + 1) ** 2 + (draws - m) * q**2)


def moments_of_draws(values: np.ndarray, draw: np.ndarray) -> tuple[Moments, Design]:
    """Moments of single blocks and their design: `values` [blocks], `draw` int64 [blocks], the draw of each."""
    blocks = np.bincount(draw)
    total = np.bincount(draw, weights=values)[blocks > 0]
    blocks = blocks[blocks > 0]
    moments = Moments(total.sum(), (total**2).sum(), (total * blocks).sum())
    return moments, Design(blocks.sum(), len(blocks), (blocks**2).sum())


def _variance_of_mean(moments: Moments, design: Design) -> np.ndarray:
    """Variance of the mean of all blocks, from the variation between draws (ratio estimator); nan with one draw."""
    draws, blocks = np.asarray(design.draws, float), np.asarray(design.blocks, float)
    mean = moments.total / blocks
    square = moments.square - 2 * mean * moments.weighted + mean**2 * design.blocks_square
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.maximum(square, 0) * (draws / (draws - 1)) / blocks**2 * np.where(draws > 1, 1.0, np.nan)


def mean_interval(moments: Moments, design: Design) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over blocks with its 95 % Student interval over draws: (mean, low, high)."""
    mean = moments.total / design.blocks
    half = student_quantile(design.draws - 1) * np.sqrt(_variance_of_mean(moments, design))
    return mean, mean - half, mean + half


def bounded_mean_interval(
    moments: Moments, design: Design, least: np.ndarray, most: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over blocks of a whole number from `least` to `most`, with a 95 % interval that holds for rare outcomes.

    Where nearly every block is at one end of the range, the mean's distance from it comes from few draws, and Student's
    interval misses the truth (14 % of the time for 5 outcomes). The distance is then taken for a sum of counts of different
    weights, with the interval of Fay and Feuer (1997): a gamma distribution with its mean and variance, at the upper end
    with those of one outcome more. That outcome is as large as those seen, by their squares, and larger by as much as they
    differ from 1; of outcomes that all are 1 it is Garwood's interval (1936) of a count. Student's is left from 100 outcomes
    on. Where all blocks are equal, another value has at most the probability of what was never seen in as many draws.
    """
    mean, low, high = mean_interval(moments, design)
    variance = _variance_of_mean(moments, design)
    blocks, draws = np.asarray(design.blocks, float), np.asarray(design.draws, float)
    widened = variance * (student_quantile(draws - 1) / ndtri(1 - _TAIL)) ** 2  # as much as Student's interval
    below, above = mean - least, most - mean
    for is_rare, end, away, side in ((below <= above, least, below, 1), (below > above, most, above, -1)):
        with np.errstate(divide="ignore", invalid="ignore"):
            size = variance / away * blocks  # of an outcome, as seen
            more = np.maximum(2 * size - 1, 2) / blocks
            inner = _gamma_quantile(away, widened, _TAIL)
            outer = _gamma_quantile(away + more, widened + more**2, 1 - _TAIL)
            is_rare = is_rare & (widened > 0) & (away**2 < _MANY_HITS * widened)
        near, far = (low, high) if side > 0 else (high, low)
        near, far = np.where(is_rare, end + side * inner, near), np.where(is_rare, end + side * outer, far)
        low, high = (near, far) if side > 0 else (far, near)
    unseen = probability_interval(np.zeros_like(draws), draws)[1]
    constant = (variance == 0) | (below == 0) | (above == 0)
    low, high = np.where(constant, mean - below * unseen, low), np.where(constant, mean + above * unseen, high)
    return mean, np.maximum(low, least), np.minimum(high, most)


def _gamma_quantile(mean: np.ndarray, variance: np.ndarray, p: float) -> np.ndarray:
    """Quantile of the gamma distribution of this mean and variance."""
    return gammaincinv(mean**2 / variance, p) * variance / mean


def effective_blocks(moments: Moments, design: Design) -> np.ndarray:
    """Independent blocks that are worth as much as the clustered ones, for the probability of an event.

    `moments` count the event. The design effect is the between-draw variance over the binomial one, corrected for its
    own degrees of freedom (Korn and Graubard 1998). Where the event never or always happened nothing shows how it
    clusters, and a draw counts once.
    """
    draws, all_blocks = np.asarray(design.draws, float), np.asarray(design.blocks, float)
    p = moments.total / all_blocks
    variance = _variance_of_mean(moments, design)
    with np.errstate(divide="ignore", invalid="ignore"):
        blocks = p * (1 - p) / variance
    degrees = (student_quantile(all_blocks - 1) / student_quantile(draws - 1)) ** 2
    known = (p > 0) & (p < 1) & (variance > 0)
    clustered = np.where(known, np.clip(blocks * degrees, 1, all_blocks), draws)
    return np.where(draws == all_blocks, all_blocks, clustered)


def probability_interval(p: np.ndarray, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % Clopper-Pearson interval of a probability seen as `p` in `blocks` effective blocks: (low, high)."""
    hits = p * blocks
    with np.errstate(invalid="ignore"):
        low = np.where(p > 0, betaincinv(hits, blocks - hits + 1, _TAIL), 0.0)
        high = np.where(p < 1, betaincinv(hits + 1, blocks - hits, 1 - _TAIL), 1.0)
    return low, high


class Histogram(NamedTuple):
    """Counts of the distinct values of an integer quantity."""

    values: np.ndarray  # int64, ascending
    counts: np.ndarray  # int64

    def quantile(self, q: np.ndarray | float) -> np.ndarray:
        """Smallest value with a share of at least q at or below it."""
        cumulated = np.cumsum(self.counts)
        rank = np.ceil(np.asarray(q) * cumulated[-1] - 1e-9)
        return self.values[np.minimum(np.searchsorted(cumulated, np.maximum(rank, 1)), len(self.values) - 1)]

    def exceedance(self) -> tuple[np.ndarray, np.ndarray]:
        """Distinct values and how many are at least each."""
        return self.values, np.cumsum(self.counts[::-1])[::-1]


def ratio_interval(top: np.ndarray, bottom: np.ndarray) -> tuple[float, float, float]:
    """Ratio of two sums over draws with its 95 % Student interval, paired: (ratio, low, high).

    `top` and `bottom` are float64 [draws], the sums of each draw; nan bounds with one draw.
    """
    ratio, parts = ratio_parts(top, bottom)
    half = half_width(parts)
    return ratio, ratio - half, ratio + half


def ratio_parts(top: np.ndarray, bottom: np.ndarray) -> tuple[float, np.ndarray]:
    """Ratio of two sums over draws, and what each draw adds to its error (linearised), float64 [draws]."""
    total = float(np.sum(bottom))
    ratio = float(np.sum(top)) / total
    return ratio, (top - ratio * bottom) / total


def half_width(parts: np.ndarray) -> float:
    """Half-width of the 95 % Student interval of a sum over draws whose error has these parts; nan with one draw."""
    draws = len(parts)
    if draws < 2:
        return np.nan
    return float(student_quantile(draws - 1) * np.sqrt(draws / (draws - 1) * float(np.sum(parts**2))))


def clustered_quantile(values: np.ndarray, draw: np.ndarray, q: float) -> tuple[float, float, float]:
    """Quantile of all blocks with its order-statistic interval, blocks of one draw being worth less than as many.

    `values` float64 [blocks], `draw` int64 [blocks], the draw of each.
    """
    distinct, counts = np.unique(values, return_counts=True)
    at = Histogram(distinct, counts).quantile(q)
    blocks = effective_blocks(*moments_of_draws(values > at, draw))
    return quantile_interval(Histogram(distinct, counts), q, float(np.floor(blocks)))


def quantile_interval(histogram: Histogram, q: float, blocks: float) -> tuple[float, float, float]:
    """Quantile with its 95 % order-statistic interval, at the ranks that a binomial count of `blocks` takes.

    Returns (value, low, high); a bound is nan where so few blocks cannot give one: an upper bound of the 99th
    percentile needs 368 of them.
    """
    cumulated, edges = np.concatenate([[0], histogram.counts.cumsum()]), np.array([0, len(histogram.values)])
    value, low, high = quantile_intervals(histogram.values, cumulated, edges[:1], edges[1:], q, np.array([blocks]))
    return float(value[0]), float(low[0]), float(high[0])


def quantile_intervals(
    values: np.ndarray, cumulated: np.ndarray, first: np.ndarray, last: np.ndarray, q: float, blocks: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """`quantile_interval` of many histograms at once, float64 [histograms] each: they lie in `values` from `first` to `last`, and
    `cumulated` int64 [values + 1] are the counts of all values before each.
    """
    distinct, place = np.unique(blocks, return_inverse=True)  # few, and a quantile of a binomial is dear
    shares = np.array([(q, *quantile_shares(q, n)) for n in distinct.tolist()])[place]
    total = (cumulated[last] - cumulated[first])[:, None]
    known = ~np.isnan(shares)
    rank = np.maximum(np.ceil(np.where(known, shares, 0) * total - 1e-9), 1).astype(np.int64)
    at = np.minimum(np.searchsorted(cumulated[1:], cumulated[first][:, None] + rank), last[:, None] - 1)
    value, low, high = np.where(known, values[at], np.nan).T
    return value, low, high


@lru_cache(maxsize=1024)  # cells often have the same number of blocks
def quantile_shares(q: float, blocks: float) -> tuple[float, float]:
    """Shares of the values at whose quantiles `quantile_interval` has its bounds; nan where so few blocks cannot give one."""
    first, last = np.ceil(bdtrik(np.array([_TAIL, 1 - _TAIL]), blocks, q) - 1e-9)  # the binomial's quantiles
    return first / blocks if first >= 1 else np.nan, (last + 1) / blocks if last + 1 <= blocks else np.nan


def best_rows(tail: pd.DataFrame) -> pd.DataFrame:
    """Of each cell, metric and threshold the row of the tail with the narrowest interval in ratio, of those that hold for
    all layers; of equally wide ones that with the lowest upper bound.
    """
    rows = tail[tail.given == ""]
    width = np.where(rows.low > 0, rows.high / rows.low.where(rows.low > 0, 1.0), np.where(rows.high > 0, np.inf, 1.0))
    order = rows.assign(width=width).sort_values(["width", "high"], kind="stable")
    return order.drop_duplicates([*CELL, "metric", "threshold"]).sort_index().drop(columns="width")
