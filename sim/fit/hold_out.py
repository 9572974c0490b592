"""How well a fit predicts what it was not fitted to, held-out sequences or steps: imbalance, received tokens, fan-out.

Two halves are fitted, and each predicts the other. The interval of an error holds what both halves owe to chance: the measured
one by itself, and the predicted one because a fit follows the half that it is of. Chance is measured by leaving out one
group of sequences at a time (delete-a-group jackknife). Means take the standard error that it gives. The jackknife fails for
quantiles, but not for the share of the blocks that are above one: that share's standard error says how many independent
blocks the dependent ones are worth, and the quantiles at the ends of the interval of such a share bound the
quantile (Woodruff 1952): of its logit (Francisco and Fuller 1991) or exact (Korn and Graubard 1998), whichever is wider. The
one is short where few sequences have the large blocks, the other where blocks move together. Errors, ratios of two such
estimates, have the interval of Zou and Donner (2008).

In the mean of both errors the difference of the halves cancels: what is left is the model's own.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from scipy.special import expit, logit

from sim.fit.correlation import BLOCKS, LEAST_SEQUENCES, evenly, run_starts
from sim.fit.fitting import GROUP_SIGMA, FittedTraffic, fit_traffic, without_shared_prefix
from sim.fit.staleness import imbalances
from sim.fit.strength import EP_SIZES
from sim.kernels import kernel, usable_processors
from sim.model import ModelSpec
from sim.placement import Placement, place
from sim.progress import phase as progress_phase
from sim.progress import track
from sim.router import draw_trials
from sim.stats import half_width, quantile_shares, ratio_interval, student_quantile
from sim.streams import REPLAY, stream_key, uniforms
from sim.traffic import LoadCounts, RecordedTraffic, SyntheticTraffic
from sim.traffic.counts import build_counts

MOST_LAYERS = 24
"""Layers that are held out by default: their mean is known well by then, and a fit takes seconds for each."""
FIGURES = ("imbalance", "received", "ranks_per_token")
"""What is compared: max / mean load of ranks; of the rank that receives the most tokens, their share of
the block's tokens; ranks that a token is sent to, which is also the mean share of a rank times the ranks."""
STATISTICS = {"mean": None, "p95": 0.95, "p99": 0.99}
"""Of what is compared over blocks and layers; quantiles of imbalance alone."""
_ALL_BLOCKS = 9600  # of all layers
_GROUPS = 10  # of sequences, of which one at a time is left out
_LEAST_STEPS = 4
_MOST_STEPS = 32


class Estimate(NamedTuple):
    """A value with its 95 % interval; a bound is nan where there is too little for one."""

    value: float
    low: float
    high: float


class Held(NamedTuple):
    """One comparison."""

    figure: str  # of FIGURES
    statistic: str  # of STATISTICS
    phase: str  # 'decode', 'prefill' or 'steps'
    tokens: int
    ep_size: int
    real: Estimate  # of the held-out half
    simulated: Estimate  # by the fit to the other half, with the chance that this half owes to its sequences
    error: Estimate  # simulated / real - 1, with the chance of both halves
    halves: float  # real of the fitted half / real of the held-out one - 1, which no fit can know
    both_ways: Estimate  # the error of both predictions together, over layers: of the model itself


class _Figures(NamedTuple):
    """A figure of blocks, and which blocks are left where each group of sequences is left out."""

    values: np.ndarray  # float64 [1 + groups, layers, blocks], of all sequences and without each group
    kept: np.ndarray | None  # bool [1 + groups, layers, blocks]; None: all


def hold_out(
    model: ModelSpec,
    data: RecordedTraffic | LoadCounts,
    *,
    seed: int = 0,
    group_sigma: float = GROUP_SIGMA,
    threads: int | None = None,
    most_layers: int | None = MOST_LAYERS,
    placement: str = "linear",
) -> tuple[FittedTraffic, list[Held]] | None:
    """Fit each half and predict the other: the even-numbered sequences and the odd ones, or the first and the last steps.

    Of many layers `most_layers` are taken, at even distances; None takes all. `placement` is one that needs no loads.

    Real decode blocks are tokens drawn from all of a half, with equal chances; real prefill blocks are consecutive tokens of
    one sequence, with equal chances for each place where such a block lies. Rows are of the second half, predicted from the
    first, whose fit is returned. None where there is too little to hold out: fewer than 32 different sequences, or 4 steps.
    """
    sizes = [size for size in EP_SIZES if 2 * size <= model.n_experts] or [model.n_experts]
    placements = [place(placement, model, size, seed=seed) for size in sizes]
    fit_half = partial(fit_traffic, model, seed=seed, group_sigma=group_sigma, threads=threads)
    if isinstance(data, LoadCounts):
        return _hold_out_steps(model, data, placements, seed, fit_half, most_layers)
    chosen = evenly(data.n_layers, most_layers or data.n_layers)
    data = replace(data, topk_ids=data.topk_ids[chosen], layer_ids=data.layer_ids[chosen])
    n = data.n_sequences
    long = [part for part in pairwise(data.starts) if part[1] - part[0] >= BLOCKS[0]]  # short ones may be alike
    n_equal = len(long) - len({data.topk_ids[:, start:stop].tobytes() for start, stop in long})
    if n - n_equal < 2 * LEAST_SEQUENCES:
        return None
    data, _ = without_shared_prefix(data)
    halves = [data.only_sequences(np.arange(first, n, 2)) for first in (0, 1)]
    parts = {"one half": 1.0, "other half": 1.0, "predictions": 0.5}
    fits = _fit_both(halves, fit_half, parts)
    cells = [
        (name, tokens, workloads)
        for name, workloads in (("decode", [fit.decode for fit in fits]), ("prefill", [fit.prefill for fit in fits]))
        for tokens in BLOCKS
        if name == "decode"
        or (None not in workloads and all((np.diff(half.starts) >= tokens).sum() >= LEAST_SEQUENCES for half in halves))
    ]
    with ThreadPoolExecutor(threads or usable_processors()) as pool, progress_phase("predictions", parts):
        found = pool.map(lambda cell: _compare(model, halves, placements, seed, *cell), cells)
        rows = list(track(found, [1.0] * len(cells), [f"{name} of {tokens} tokens" for name, tokens, _ in cells]))
    return fits[0], [row for of_cell in rows for row in of_cell]


def _fit_both(
    halves: Sequence[Any], fit_half: Callable[[Any], FittedTraffic], parts: dict[str, float]
) -> list[FittedTraffic]:
    """Fits of two halves, with their progress: the first two of the parts."""
    fits = []
    for name, half in zip(parts, halves, strict=False):
        with progress_phase(name, parts):
            fits.append(fit_half(half))
    return fits


def _compare(
    model: ModelSpec, halves: list[RecordedTraffic], placements: list[Placement], seed: int, phase: str, n_tokens: int,
    workloads: list[SyntheticTraffic],
) -> list[Held]:  # fmt: skip
    """Rows of one phase and block, of the second half as the fit to the first has it."""
    rank_of = np.stack([placement.rank_of_expert for placement in placements]).astype(np.int64)
    real = [_real_figures(half, phase, n_tokens, rank_of, seed) for half in halves]
    found = [_score(_simulated(model, workload, n_tokens, seed), rank_of) for workload in workloads]
    rows = []
    for i, figure in enumerate(FIGURES):
        for j, placement in enumerate(placements):
            of_halves = [_Figures(values[:, i, j], kept) for values, kept in real]
            of_fits = [values[i, j] for values in found]  # [layers, blocks]
            of_layers = [sum(x.mean(axis=1) for x in part) for part in (of_fits, [x.values[0] for x in of_halves])]
            for name, level in STATISTICS.items():
                if level is None:
                    ratio = Estimate(*ratio_interval(*of_layers))
                    measured = [_mean(x) for x in of_halves]
                    predicted = [_predicted_mean(x, of_half) for x, of_half in zip(of_fits, measured, strict=True)]
                elif figure == "imbalance":
                    blocks = [_effective_blocks(x, level) for x in of_halves]
                    measured = [_quantile(x.values[0], level, n) for x, n in zip(of_halves, blocks, strict=True)]
                    predicted = [_quantile(x, level, n) for x, n in zip(of_fits, blocks, strict=True)]
                    both = sum(x.value for x in predicted) / sum(x.value for x in measured)
                    ratio = Estimate(both, np.nan, np.nan)
                else:
                    continue
                rows.append(_row(figure, name, phase, n_tokens, placement.ep_size, measured, predicted, ratio))
    return rows


def _row(
    figure: str, statistic: str, phase: str, n_tokens: int, ep_size: int, measured: list[Estimate],
    predicted: list[Estimate], both_ways: Estimate,
) -> Held:  # fmt: skip
    """A row from what is measured in the two halves, and predicted by the fits to them; both_ways: simulated / real."""
    (one, other), by_one = measured, predicted[0]
    return Held(
        figure, statistic, phase, n_tokens, ep_size, other, by_one, relative(by_one, other), one.value / other.value - 1,
        Estimate(*(x - 1 for x in both_ways)),
    )  # fmt: skip


def relative(top: Estimate, bottom: Estimate) -> Estimate:
    """Ratio of two independent positive estimates, less 1: the interval of Zou and Donner, on logarithms."""
    with np.errstate(invalid="ignore", divide="ignore"):
        (t, t_low, t_high), (b, b_low, b_high) = np.log(np.maximum(top, 1e-12)), np.log(np.maximum(bottom, 1e-12))
    low, high = t - b - np.hypot(t - t_low, b_high - b), t - b + np.hypot(t_high - t, b - b_low)
    return Estimate(*(float(np.expm1(x)) for x in (t - b, low, high)))


def _shares(figures: _Figures, at_least: float | None = None) -> np.ndarray:
    """Mean over layers and blocks, of all sequences and without each group, float64 [1 + groups]; of the figure, or of its
    being at least so large.
    """
    values = figures.values if at_least is None else (figures.values >= at_least).astype(float)
    if figures.kept is None:
        return values.mean(axis=(1, 2))
    return (values * figures.kept).sum(axis=(1, 2)) / figures.kept.sum(axis=(1, 2))


def _jackknife(means: np.ndarray) -> float:
    """Standard error of the first of some means by the others, each without one of the groups."""
    left_out = means[1:]
    return float(np.sqrt((len(left_out) - 1) * left_out.var()))


def _mean(figures: _Figures) -> Estimate:
    means = _shares(figures)
    half = student_quantile(len(means) - 2) * _jackknife(means)
    return Estimate(float(means[0]), float(means[0] - half), float(means[0] + half))


def _predicted_mean(blocks: np.ndarray, of_half: Estimate) -> Estimate:
    """A mean over simulated blocks [layers, blocks], as uncertain as that of the half which was fitted, and by its sampling."""
    sampling = student_quantile(blocks.size - 1) * blocks.std(axis=1).mean() / np.sqrt(blocks.size)
    mean = float(blocks.mean())
    half = float(np.hypot(mean * (of_half.high / of_half.value - 1), sampling))
    return Estimate(mean, mean - half, mean + half)


def _effective_blocks(figures: _Figures, level: float) -> float:
    """Independent blocks that are worth as much as the blocks of some sequences, for a quantile."""
    shares = _shares(figures, np.quantile(figures.values[0], level, method="inverted_cdf"))
    p, error = shares[0], _jackknife(shares)
    if error == 0 or p == 1:
        return len(shares) - 1.0
    return float(np.clip(p * (1 - p) / error**2, 1, figures.values[0].size))


def _quantile(values: np.ndarray, level: float, effective_blocks: float) -> Estimate:
    """Quantile of blocks that are worth so many independent ones."""
    half = student_quantile(_GROUPS - 1) / np.sqrt(effective_blocks * level * (1 - level))
    low, high = expit(logit(level) + np.array([-half, half]))
    fewer = effective_blocks * (student_quantile(values.size - 1) / student_quantile(_GROUPS - 1)) ** 2
    least, most = quantile_shares(level, max(np.floor(fewer), 1.0))
    shares = level, np.fmin(low, least), np.fmax(high, most)
    return Estimate(*(float(x) for x in np.quantile(values, shares, method="inverted_cdf")))


def _n_blocks(n_layers: int) -> int:
    """Blocks of each layer."""
    return -(-_ALL_BLOCKS // n_layers)


def _real_figures(
    record: RecordedTraffic, phase: str, n_tokens: int, rank_of: np.ndarray, seed: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """FIGURES of real blocks, float64 [1 + groups, figures, sizes, layers, blocks], of all sequences and without each group; and
    which blocks are left then (None: all).
    """
    key = stream_key(seed, f"held-out {phase} {n_tokens} {record.digest}")
    n_blocks, lengths, token = _n_blocks(record.n_layers), np.diff(record.starts), np.arange(record.n_tokens)
    if phase == "prefill":
        long_enough = lengths >= n_tokens
        group = np.repeat((np.cumsum(long_enough) - 1) % _GROUPS, lengths)
        places = run_starts(record, n_tokens, 1, record.n_tokens)
        u = uniforms(key, REPLAY, 0, (record.n_layers, n_blocks))
        first = places[(u * len(places)).astype(np.int64)]
        ids = [layer[at[:, None] + np.arange(n_tokens)] for layer, at in zip(record.topk_ids, first, strict=True)]
        found = np.broadcast_to(_score(np.stack(ids), rank_of), (_GROUPS + 1, *_shape(rank_of, first)))
        return found, group[first] != np.arange(-1, _GROUPS)[:, None, None]
    group = np.repeat(np.arange(record.n_sequences) % _GROUPS, lengths)
    rest = [token[group != left] for left in range(_GROUPS)]
    found = np.empty((_GROUPS + 1, *_shape(rank_of, np.empty((record.n_layers, n_blocks)))))
    for i, layer in enumerate(record.topk_ids):
        u, other = uniforms(key, REPLAY, i, (2, n_blocks * n_tokens)).reshape(2, n_blocks, n_tokens)
        chosen = (u * record.n_tokens).astype(np.int64)
        fill_figures(layer[chosen], rank_of, found[0, :, :, i])
        for left, tokens in enumerate(rest):  # only tokens of the group change, so that noise does not
            moved = np.where(group[chosen] == left, tokens[(other * len(tokens)).astype(np.int64)], chosen)
            fill_figures(layer[moved], rank_of, found[1 + left, :, :, i])
    return found, None


def _shape(rank_of: np.ndarray, blocks: np.ndarray) -> tuple[int, ...]:
    return len(FIGURES), len(rank_of), *blocks.shape


def _score(ids: np.ndarray, rank_of: np.ndarray) -> np.ndarray:
    """FIGURES of blocks at EP sizes, float64 [figures, sizes, layers, blocks]: ids int16 [layers, blocks, tokens, top_k]."""
    found = np.empty((len(FIGURES), len(rank_of), *ids.shape[:2]))
    for layer, blocks in enumerate(ids):
        fill_figures(blocks, rank_of, found[:, :, layer])
    return found


@kernel
def fill_figures(ids, rank_of, figures):
    """FIGURES of blocks of tokens: ids int16 [blocks, tokens, top_k]; rank_of int64 [sizes, experts]; figures float64
    [figures, sizes, blocks]. As `score_tokens` has them, of many small blocks.
    """
    n_blocks, n_tokens, top_k = ids.shape
    n_ranks = rank_of.max() + 1
    loads, received, last = np.empty(n_ranks, np.int64), np.empty(n_ranks, np.int64), np.empty(n_ranks, np.int64)
    for j in range(rank_of.shape[0]):
        of_expert = rank_of[j]
        ranks = of_expert.max() + 1
        for b in range(n_blocks):
            loads[:], received[:], last[:] = 0, 0, -1
            for t in range(n_tokens):
                for k in range(top_k):
                    r = of_expert[ids[b, t, k]]
                    loads[r] += 1
                    if last[r] != t:
                        last[r] = t
                        received[r] += 1
            figures[0, j, b] = loads.max() * ranks / (n_tokens * top_k)
            figures[1, j, b] = received.max() / n_tokens
            figures[2, j, b] = received.sum() / n_tokens


def _simulated(model: ModelSpec, workload: SyntheticTraffic, n_tokens: int, seed: int) -> np.ndarray:
    """Experts of the tokens of simulated blocks of one request, int16 [layers, blocks, n_tokens, top_k]."""
    n_layers = workload.n_layers
    assert n_layers is not None
    n = n_layers * _n_blocks(n_layers)  # trials take the fitted layers in turn
    n_of_request = max(workload.tokens_per_request, n_tokens)  # a block is one request's, also where most are shorter
    workload = replace(workload, tokens_per_request=n_of_request)
    ids = draw_trials(model, workload, seed, range(n), n_layers, np.array([n_tokens]), n_tokens)[1]
    return ids.reshape(-1, n_layers, n_tokens, model.top_k).transpose(1, 0, 2, 3)


def _hold_out_steps(
    model: ModelSpec,
    data: LoadCounts,
    placements: list[Placement],
    seed: int,
    fit_half: Callable[[LoadCounts], FittedTraffic],
    most_layers: int | None,
) -> tuple[FittedTraffic, list[Held]] | None:
    """Each half of the steps predicted from the other, each step with as many tokens as it had."""
    counts = data.counts
    if len(counts) < _LEAST_STEPS:
        return None
    middle = len(counts) // 2
    used = np.flatnonzero(counts[:middle].any(axis=(0, 2)) & counts[middle:].any(axis=(0, 2)))
    used = used[evenly(len(used), most_layers or len(used))]
    parts = [part[:, used] for part in (counts[:middle], counts[middle:])]
    halves = [build_counts(data.name, data.name, part, data.layer_ids[used])[0] for part in parts]
    fits = _fit_both(halves, fit_half, {"one half": 1.0, "other half": 1.0})
    real, tokens = [], []
    for part in parts:
        part = part[(part.sum(axis=2) > 0).all(axis=1)]
        chosen = part[evenly(len(part), _MOST_STEPS)]
        real.append(chosen)
        mean = chosen.sum(axis=2, dtype=float).mean(axis=1)
        tokens.append(np.maximum(np.round(mean / model.top_k), 1).astype(np.int64))
    if min(map(len, real)) == 0 or max(x.max() for x in tokens) > 2**20:
        return None
    n_layers, drawn = len(used), []
    for fit, of_other in zip(fits, reversed(tokens), strict=True):
        steps, of_step = np.unique(of_other, return_inverse=True)
        drawn.append(draw_trials(model, fit.decode, seed, range(8 * n_layers), n_layers, steps)[0][:, of_step])
    rows = []
    for placement in placements:
        size = placement.ep_size
        of_steps = [imbalances(placement, part.astype(float), size) for part in real]  # [steps, layers]
        of_fits = [
            imbalances(placement, x.reshape(8, n_layers, -1, model.n_experts).swapaxes(1, 2).astype(float), size).mean(
                axis=0
            )
            for x in drawn
        ]  # of the other half's steps
        of_layers = [x[0].mean(axis=0) + x[1].mean(axis=0) for x in (of_fits, of_steps)]
        measured = [_mean_of_steps(x.mean(axis=1)) for x in of_steps]
        predicted = [_predicted_mean(x, of_half) for x, of_half in zip(of_fits, measured, strict=True)]
        ratio = Estimate(*ratio_interval(*of_layers))
        rows.append(
            _row("imbalance", "mean", "steps", round(float(tokens[1].mean())), size, measured, predicted, ratio)
        )
    return fits[0], rows


def _mean_of_steps(values: np.ndarray) -> Estimate:
    """Mean over steps with its Student interval; without bounds with one."""
    mean = float(values.mean())
    half = half_width((values - mean) / len(values))
    return Estimate(mean, mean - half, mean + half)
