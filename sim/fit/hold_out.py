"""How well a fit predicts what it was not fitted to, held-out sequences or steps: imbalance, received tokens, fan-out."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np

from sim.fit.correlation import BLOCKS
from sim.fit.fitting import GROUP_SIGMA, FittedTraffic, fit_traffic
from sim.model import ModelSpec
from sim.placement import place
from sim.router import draw_trials
from sim.scoring import score_tokens
from sim.stats import student_quantile
from sim.streams import REPLAY, stream_key, uniforms
from sim.traffic import LoadCounts, RecordedTraffic, SyntheticTraffic
from sim.traffic.counts import build_counts

EP_SIZES = (4, 8, 16, 32, 64)
FIGURES = ("imbalance", "received", "ranks_per_token")
"""What is compared, each a mean over blocks and layers under linear placement: max / mean load of ranks; of the rank that
receives the most tokens, their share of the block's tokens; ranks that a token is sent to, which is also the mean share of a
rank times the ranks."""
_BLOCKS_PER_LAYER = 400
_JACKKNIFE = 8  # groups of sequences, of which one at a time is left out
_LEAST_SEQUENCES = 32
_LEAST_STEPS = 4
_MOST_STEPS = 32


class Quantile(NamedTuple):
    """A quantile of imbalance over blocks and layers."""

    real: float
    real_half: float  # half-width of its 95 % interval over sequences (jackknife)
    simulated: float


class Held(NamedTuple):
    """One comparison."""

    figure: str  # of FIGURES
    phase: str  # 'decode', 'prefill' or 'steps'
    tokens: int
    ep_size: int
    real: float
    real_half: float  # half-width of its 95 % interval over sequences (jackknife) or steps
    simulated: float
    simulated_half: float  # of its sampling; the fit's own error, of about the size of real_half, is not in it
    fitted: float  # of real blocks of the half that was fitted: how far the halves differ, which no fit can know
    p95: Quantile | None = None
    p99: Quantile | None = None  # None of steps


def hold_out(
    model: ModelSpec,
    data: RecordedTraffic | LoadCounts,
    *,
    seed: int = 0,
    group_sigma: float = GROUP_SIGMA,
    threads: int | None = None,
) -> tuple[FittedTraffic, list[Held]] | None:
    """Fit one half, predict the other: the even-numbered sequences and the odd ones, or the first and the last steps.

    Real decode blocks are tokens drawn from all of the other half, with equal chances; real prefill blocks are consecutive
    tokens of one sequence, with equal chances for each place where such a block lies. None where there is too little to
    hold out: fewer than 32 sequences, or 4 steps.
    """
    sizes = [size for size in EP_SIZES if 2 * size <= model.n_experts]
    fit_half = partial(fit_traffic, model, seed=seed, group_sigma=group_sigma, threads=threads)
    if isinstance(data, LoadCounts):
        return _hold_out_steps(model, data, sizes, seed, fit_half)
    n = len(data.starts) - 1
    if n < _LEAST_SEQUENCES:
        return None
    half = data.only_sequences(np.arange(0, n, 2))
    fit = fit_half(half)
    other = data.only_sequences(np.arange(1, n, 2))
    parts = [other.only_sequences(np.flatnonzero(np.arange(n // 2) % _JACKKNIFE != left)) for left in range(_JACKKNIFE)]
    rows = []
    for phase, workload in (("decode", fit.decode), ("prefill", fit.prefill)):
        for tokens in BLOCKS:
            if workload is None or (phase == "prefill" and not len(_places(other, tokens))):
                continue
            rows += _compare(model, workload, phase, tokens, sizes, [half, other, *parts], seed)
    return fit, rows


def _compare(
    model: ModelSpec, workload: SyntheticTraffic, phase: str, tokens: int, sizes: list[int],
    records: list[RecordedTraffic], seed: int,
) -> list[Held]:  # fmt: skip
    """Rows of one phase and block; records are the fitted half, the held-out half, and that less each jackknife group."""
    measured = [_figures(_real_blocks(record, phase, tokens, seed), model, sizes) for record in records]
    simulated = _figures(_simulated(model, workload, tokens, seed), model, sizes)
    rows = []
    for i, figure in enumerate(FIGURES):
        for j, size in enumerate(sizes):
            fitted, *real = (of_record[i, j] for of_record in measured)
            found = simulated[i, j].T  # [blocks, layers]
            error = student_quantile(len(found) - 1) * found.std(axis=0).mean() / np.sqrt(found.size)
            mean, half = _jackknife(np.array([x.mean() for x in real]))
            values = (mean, half, float(found.mean()), float(error), float(fitted.mean()))
            quantiles = [
                Quantile(*_jackknife(np.array([np.quantile(x, level) for x in real])), float(np.quantile(found, level)))
                for level in ((0.95, 0.99) if figure == "imbalance" else ())
            ]
            rows.append(Held(figure, phase, tokens, size, *values, *quantiles))
    return rows


def _jackknife(values: np.ndarray) -> tuple[float, float]:
    """The first value, and the half-width of its 95 % interval by the others, each without one of the groups."""
    left_out = values[1:]
    half = student_quantile(len(left_out) - 1) * np.sqrt((len(left_out) - 1) * left_out.var())
    return float(values[0]), float(half)


def _figures(ids: np.ndarray, model: ModelSpec, sizes: list[int]) -> np.ndarray:
    """FIGURES of blocks at EP sizes, float64 [figures, sizes, layers, blocks]: ids int16 [layers, blocks, tokens, top_k]."""
    found = np.empty((len(FIGURES), len(sizes), *ids.shape[:2]))
    for j, size in enumerate(sizes):
        placement = place("linear", model, size)
        for layer, blocks in enumerate(ids):
            score = score_tokens(placement, blocks)
            found[0, j, layer] = score.loads.max(axis=1) / score.loads.mean(axis=1)
            found[1, j, layer] = score.received_tokens.max(axis=1) / blocks.shape[1]
            found[2, j, layer] = score.ranks_per_token.mean(axis=1)
    return found


def _imbalance(counts: np.ndarray, model: ModelSpec, ep_size: int) -> np.ndarray:
    """Max / mean load of ranks under linear placement: counts [..., experts]."""
    ranks = place("linear", model, ep_size).rank_of_expert
    first = np.searchsorted(ranks, np.arange(ep_size))
    loads = np.add.reduceat(counts, first, axis=-1)
    return loads.max(axis=-1) / loads.mean(axis=-1)


def _places(record: RecordedTraffic, n_tokens: int) -> np.ndarray:
    """Every token of a record from which a block lies within its sequence."""
    ends = np.repeat(record.starts[1:], np.diff(record.starts))
    token = np.arange(len(ends))
    return token[token + n_tokens <= ends]


def _real_blocks(record: RecordedTraffic, phase: str, n_tokens: int, seed: int) -> np.ndarray:
    """Experts of the tokens of real blocks, int16 [layers, blocks, n_tokens, top_k]."""
    key = stream_key(seed, f"held-out {phase} {n_tokens} {record.digest}")
    places = _places(record, n_tokens) if phase == "prefill" else np.arange(record.starts[-1])
    if not len(places):  # a jackknife group without a place for such a block
        places = np.arange(record.n_tokens - n_tokens + 1)
    shape = (_BLOCKS_PER_LAYER, 1 if phase == "prefill" else n_tokens)
    of_layer = []
    for layer, ids in enumerate(record.topk_ids):
        chosen = places[(uniforms(key, REPLAY, layer, shape) * len(places)).astype(np.int64)]
        of_layer.append(ids[chosen + np.arange(n_tokens) if phase == "prefill" else chosen])
    return np.stack(of_layer)


def _simulated(model: ModelSpec, workload: SyntheticTraffic, n_tokens: int, seed: int) -> np.ndarray:
    """Experts of the tokens of simulated blocks of one request, int16 [layers, blocks, n_tokens, top_k]."""
    n_layers = workload.n_layers
    assert n_layers is not None
    blocks = [
        draw_trials(model, workload, seed, range(first, first + n_layers), n_layers, np.array([n_tokens]), n_tokens)[1]
        for first in range(0, n_layers * _BLOCKS_PER_LAYER, n_layers)
    ]
    return np.stack(blocks, axis=1)


def _hold_out_steps(
    model: ModelSpec, data: LoadCounts, sizes: list[int], seed: int, fit_half: Callable[[LoadCounts], FittedTraffic]
) -> tuple[FittedTraffic, list[Held]] | None:
    """The first half of the steps fitted, the second predicted, each step with as many tokens as it had."""
    counts = data.counts
    if len(counts) < _LEAST_STEPS:
        return None
    half = len(counts) // 2
    used = counts[:half].any(axis=(0, 2)) & counts[half:].any(axis=(0, 2))
    first, _ = build_counts(data.name, data.name, counts[:half, used], data.layer_ids[used])
    fit = fit_half(first)
    later = counts[half:][np.linspace(0, len(counts) - half - 1, min(len(counts) - half, _MOST_STEPS)).astype(np.int64)]
    later = later[:, used]
    later = later[(later.sum(axis=2) > 0).all(axis=1)]
    tokens = np.maximum(np.round(later.sum(axis=2, dtype=float).mean(axis=1) / model.top_k), 1).astype(np.int64)
    if not len(later) or tokens.max() > 2**20:
        return None
    steps, of_step = np.unique(tokens, return_inverse=True)
    n_layers = int(used.sum())
    drawn = np.stack([
        draw_trials(model, fit.decode, seed, range(first, first + n_layers), n_layers, steps)[0]
        for first in range(0, 8 * n_layers, n_layers)
    ])[:, :, of_step]  # fmt: skip
    rows = []
    for size in sizes:
        real = _imbalance(later, model, size).mean(axis=1)
        found = _imbalance(drawn, model, size).mean(axis=(1, 2))
        halves = [_half_width(x) for x in (real, found)]
        mean_tokens = int(np.round(tokens.mean()))
        fitted = float(_imbalance(first.counts, model, size).mean())
        means = float(real.mean()), halves[0], float(found.mean()), halves[1]
        rows.append(Held("imbalance", "steps", mean_tokens, size, *means, fitted))
    return fit, rows


def _half_width(of_step: np.ndarray) -> float:
    """Half-width of the 95 % Student interval of a mean over steps; infinite with one."""
    n = len(of_step)
    return student_quantile(n - 1) * of_step.std(ddof=1) / np.sqrt(n) if n > 1 else np.inf
