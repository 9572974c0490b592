"""How much requests differ in the strength of their effect: some favour a few experts much, others hardly any."""

from collections.abc import Callable

import numpy as np

from sim.fit.correlation import count_runs, fitted_blocks
from sim.model import ModelSpec
from sim.placement import place
from sim.router import draw_trials
from sim.traffic import RecordedTraffic, SyntheticTraffic

EP_SIZES = (4, 8, 16, 32, 64)
"""EP sizes that fits are judged at, where a rank has 2 experts or more."""
_TRIALS = 2048  # of a layer
_TRIED, _STEP = (0.0, 0.15, 0.3, 0.45, 0.6, 0.75), 0.15
_LEAST_GAIN = 0.1  # of the distance: less may be chance


def fit_strength_sd(
    model: ModelSpec, data: RecordedTraffic, fit_at: Callable[[float], SyntheticTraffic], seed: int
) -> float:
    """Standard deviation, between requests, of the logarithm of their strength, to 2 digits.

    The more requests differ, the less there is of the usual request in a given correlation between tokens, and the more of a
    few extreme ones. So strengths are spread, at that correlation, until the busiest rank of a block, under linear placement,
    has as many tokens as measured: by the mean absolute difference of quantiles (the Wasserstein distance) over their mean,
    averaged over layers and EP sizes, ranks of one expert among them.

    Parameters
    ----------
    data : RecordedTraffic
        Of some layers.
    fit_at : callable
        Prefill fitted to these layers with this standard deviation.
    """
    n_tokens, first = fitted_blocks(data)
    if not len(first):
        return 0.0
    sizes = [*(size for size in EP_SIZES if 2 * size <= model.n_experts), model.n_experts]
    on_rank = [np.eye(size)[place("linear", model, size).rank_of_expert] for size in sizes]
    levels = (np.arange(len(first)) + 0.5) / len(first)

    def quantiles(counts: np.ndarray) -> np.ndarray:
        """Of the load of the busiest rank, in units of the mean load, float64 [sizes, blocks]."""
        loads = [(counts @ ranks).max(axis=1) * ranks.shape[1] for ranks in on_rank]
        return np.quantile(loads, levels, axis=1).T / (n_tokens * model.top_k)

    counts, measured = np.empty((len(first), model.n_experts), np.int32), []
    for layer in data.topk_ids:
        count_runs(layer, first, n_tokens, counts)
        measured.append(quantiles(counts))
    off: list[float] = []
    for sd in _TRIED:
        trials = range(data.n_layers * _TRIALS)
        drawn, _ = draw_trials(model, fit_at(sd), seed, trials, data.n_layers, np.array([n_tokens]))
        of_layers = drawn.reshape(_TRIALS, data.n_layers, -1).transpose(1, 0, 2)
        simulated = [quantiles(of_layer) for of_layer in of_layers]
        distance = np.abs(np.array(simulated) - measured).mean(axis=(0, 2)) / np.mean(measured, axis=(0, 2))
        off.append(float(distance.mean()))
        if off[-1] > min(off):
            break
    least = int(np.argmin(off))
    if off[least] > (1 - _LEAST_GAIN) * off[0]:
        return 0.0
    if least == len(off) - 1:
        return _TRIED[least]
    below, at, above = off[least - 1 : least + 2]  # a parabola through the three
    return round(_TRIED[least] + _STEP / 2 * (below - above) / (below - 2 * at + above), 2)
