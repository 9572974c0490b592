"""How much requests differ in the strength of their effect: some favour a few experts much, others hardly any."""

from collections.abc import Callable

import numpy as np

from sim.fit.correlation import count_runs, fitted_blocks
from sim.model import ModelSpec
from sim.router import draw_trials
from sim.traffic import RecordedTraffic, SyntheticTraffic

_TRIALS = 1024  # of a layer
_TRIED = (0.0, 0.2, 0.4, 0.7)
_LEAST = 0.05  # less is not told from none


def fit_strength_sd(
    model: ModelSpec, data: RecordedTraffic, fit_at: Callable[[float], SyntheticTraffic], seed: int
) -> float:
    """Standard deviation, between requests, of the logarithm of their strength, to 2 digits.

    The more requests differ, the less there is of the usual request in a given correlation between tokens. So strengths are
    spread, at that correlation, until the busiest expert of a block has as many tokens in the mean as measured.

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
    counts = np.empty((len(first), model.n_experts), np.int32)
    measured = []
    for layer in data.topk_ids:
        count_runs(layer, first, n_tokens, counts)
        measured.append(counts.max(axis=1).mean())
    wanted, n_layers = np.mean(measured), len(measured)
    low = at_low = 0.0
    for high in _TRIED:
        trials = range(n_layers * _TRIALS)
        counts, _ = draw_trials(model, fit_at(high), seed, trials, n_layers, np.array([n_tokens]))
        at_high = counts.max(axis=2).mean()
        if at_high <= wanted:
            found = low + (at_low - wanted) / (at_low - at_high) * (high - low) if high > 0 else 0.0
            return round(float(found), 2) if found >= _LEAST else 0.0
        low, at_low = high, at_high
    return low
