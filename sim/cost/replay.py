"""Whole steps from recorded traffic: all layers of the same tokens, step after step, beside layers that are independent.

Recorded layers share their tokens, which draws do not. Three ways to fill the slots of a batch:

continuous
    Continuous batching: sequences at random phases; each gives its next token to every step, and a new sequence takes the place
    of a finished one.
together
    A benchmark that starts all requests at once: all sequences at their first tokens, else the same.
independent
    As continuous, but each layer sees a batch of its own, and each step new ones: what independent layers give.
"""

from typing import Any

import numpy as np
import pandas as pd

from sim.errors import InputError, whole_number
from sim.kernels import kernel
from sim.placement import Placement
from sim.scoring import score
from sim.traffic import RecordedTraffic

MODES = ("continuous", "together", "independent")
_MOST_IDS = 2**31  # of all steps: layers x tokens x steps


def replay_counts(
    record: RecordedTraffic, n_experts: int, tokens: int, n_steps: int, mode: str, seed: int = 0
) -> np.ndarray:
    """Tokens of each expert in each layer of consecutive steps.

    Parameters
    ----------
    record : RecordedTraffic
    tokens : int
        Of a step: sequences in flight, each with a token; a sequence may be in flight several times where there are few.
    mode : str
        One of MODES.

    Returns
    -------
    int32 [steps, layers, n_experts]
    """
    whole_number("`tokens`", tokens, 1, 2**24)
    whole_number("`most_steps`", n_steps, 1, 10**6)
    if mode not in MODES:
        raise InputError(f"`mode` must be one of {', '.join(MODES)}, not '{mode}'")
    if record.n_layers * tokens * n_steps > _MOST_IDS:
        raise InputError(f"{n_steps} steps of {tokens} tokens through {record.n_layers} layers are too many to replay")
    rng = np.random.default_rng([seed, MODES.index(mode)])
    lengths = np.diff(record.starts)
    counts = np.zeros((n_steps, record.n_layers, n_experts), np.int32)
    if mode == "independent":
        for step in range(n_steps):
            of_layer = rng.choice(len(lengths), (record.n_layers, tokens), p=lengths / lengths.sum())
            at = record.starts[of_layer] + rng.integers(lengths[of_layer])
            _count(record.topk_ids, at, counts[step])
        return counts
    # In flight at a random time: a sequence as often as it is long, at any of its tokens.
    share = lengths / lengths.sum() if mode == "continuous" else None
    sequence = rng.choice(len(lengths), tokens, p=share)
    place = rng.integers(lengths[sequence]) if mode == "continuous" else np.zeros(tokens, np.int64)
    for step in range(n_steps):
        at = np.broadcast_to(record.starts[sequence] + place, (record.n_layers, tokens))
        _count(record.topk_ids, np.ascontiguousarray(at), counts[step])
        place = place + 1
        over = place >= lengths[sequence]
        sequence = np.where(over, rng.integers(len(lengths), size=tokens), sequence)
        place = np.where(over, 0, place)
    return counts


@kernel
def _count(topk_ids, at, counts):
    """Add tokens `at` int64 [layers, tokens] of each layer to counts int32 [layers, n_experts]."""
    for layer in range(at.shape[0]):
        for i in range(at.shape[1]):
            for k in range(topk_ids.shape[2]):
                counts[layer, topk_ids[layer, at[layer, i], k]] += 1


def compare_modes(
    record: RecordedTraffic, placements: list[Placement], tokens: int, n_steps: int, seed: int = 0
) -> pd.DataFrame:
    """Distribution over steps of the mean over layers and of the worst layer, for each placement and mode.

    Returns
    -------
    DataFrame
        A row per placement and mode: `layers_mean` and `layers_sd` of a step's mean imbalance over layers (what a step's time
        sees), `worst_mean` and `worst_p99` of its worst layer, `autocorrelation` of consecutive steps' means (nan where there
        is no variation), and `variance_ratio`, the variance of a step's mean over that of independent layers.
    """
    rows: list[dict[str, Any]] = []
    for mode in MODES:
        counts = replay_counts(record, placements[0].n_experts, tokens, n_steps, mode, seed)
        for placement in placements:
            imbalance = score(placement, counts).imbalance
            of_step, worst = imbalance.mean(axis=1), imbalance.max(axis=1)
            row = {"placement": placement.strategy, "ep_size": placement.ep_size, "tokens": tokens, "steps": n_steps}
            row |= {
                "mode": mode,
                "layers_mean": of_step.mean(),
                "layers_sd": of_step.std(ddof=1) if n_steps > 1 else np.nan,
            }
            row |= {"worst_mean": worst.mean(), "worst_p99": np.quantile(worst, 0.99, method="inverted_cdf")}
            rows.append(row | {"autocorrelation": _lag_1(of_step)})
    table = pd.DataFrame(rows)
    keys = ["placement", "ep_size"]
    alone = table[table["mode"] == "independent"].set_index(keys).layers_sd
    of_row = [alone[key] for key in zip(table.placement, table.ep_size, strict=True)]
    return table.assign(variance_ratio=(table.layers_sd / np.array(of_row)) ** 2)


def _lag_1(values: np.ndarray) -> float:
    """Correlation of consecutive values."""
    centred = values - values.mean()
    square = float(centred @ centred)
    return float(centred[1:] @ centred[:-1]) / square if square > 0 else np.nan
