"""Parts of traffic: what load-aware placements are fitted on, and what is scored; never the same tokens.

Sequences of a record and steps of load counts are kept whole. A single table of counts is split at random.
"""

import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from sim.errors import InputError, whole_number
from sim.streams import stream_key
from sim.traffic.counts import LoadCounts, build_counts
from sim.traffic.recorded import RecordedTraffic

MOST_WINDOWS = 100
_MOST_PAIRS = 10**9  # of a layer, for numpy's hypergeometric draw
_RANDOM_SPLITS = 16  # of one table of counts: a placement that is off its traffic differs much from one to the next
MeasuredTraffic = RecordedTraffic | LoadCounts
"""Traffic that was measured: recorded tokens, or load counts."""


def load_of(data: MeasuredTraffic, n_experts: int) -> np.ndarray:
    """Load of each expert over all tokens or steps, [layers, n_experts]: int64 of tokens, float64 of counts."""
    if isinstance(data, LoadCounts):
        return data.total
    return data.count_experts(n_experts)


def cut_in_order(data: MeasuredTraffic, n_experts: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Loads of the first and the second half of a file's sequences or steps, float64 [layers, n_experts] each; None of one."""
    items = sequences_or_steps(data, n_experts, all_steps=True)
    n = len(items.weights)
    if n < 2:
        return None
    first, second = (items.load(part).astype(float) for part in (np.arange(n // 2), np.arange(n // 2, n)))
    return first, second


def halves_of_counts(data: LoadCounts, seed: int) -> tuple[tuple[LoadCounts, LoadCounts], tuple[str, str]]:
    """Two halves of load counts, and what each is in words: by the order of the steps, or of one table at random. Raises
    InputError where a layer has no load in a half, and for one table of counts that are no whole numbers, or 1e9 and more in a
    layer.
    """
    if len(data.counts) > 1:
        middle = len(data.counts) // 2
        names = ("the first half of the steps", "the second half of the steps")
        parts = (data.counts[:middle], data.counts[middle:])
    else:
        names = ("half of the counted pairs at random", "the other half")
        halves = cut_file(data, data.counts.shape[2], seed=seed)
        parts = (halves.fitted[:1], halves.scored[:1])
    return (_whole_layers(data, parts[0], names[0]), _whole_layers(data, parts[1], names[1])), names


def _whole_layers(data: LoadCounts, counts: np.ndarray, what: str) -> LoadCounts:
    part, n_empty = build_counts(f"{data.name}, {what}", f"{data.name} [{what}]", counts, data.layer_ids)
    if n_empty:
        raise InputError(
            f"{data.name}: {n_empty} layers have no load in {what}; give other traffic to fit on, --fit-on"
        )
    return part


class Halves(NamedTuple):
    """Loads of traffic that is cut in two disjoint parts, one or more times."""

    name: str  # of the traffic
    digest: str
    fitted: np.ndarray  # float64 [cuts, layers, n_experts]
    scored: np.ndarray
    about: str  # what the halves are, in words


class Windows(NamedTuple):
    """Windows of a file, in the order of the file."""

    halves: Halves  # of each window
    middle: np.ndarray  # float64 [windows], tokens or steps of the file that lie before the middle of the window
    unit: str  # of `middle`, 'tokens' or 'steps'


class Items(NamedTuple):
    """What is kept whole: the sequences or the steps of a file."""

    name: str  # 'sequences' or 'steps'
    weights: np.ndarray  # tokens or load of each, float64
    load: Callable[[np.ndarray], np.ndarray]  # of some of them, [layers, n_experts]


def cut_windows(data: MeasuredTraffic, n_experts: int, n_windows: int) -> Windows:
    """Cut traffic of a model with `n_experts` into 2 to 100 windows of about equal load, and each into its even and its odd
    sequences (or steps). These are kept whole; steps without any load are left out.

    Raises InputError where there are fewer than two of them per window, or a layer has no load in a half.
    """
    whole_number("`n_windows`", n_windows, 2, MOST_WINDOWS)
    items = sequences_or_steps(data, n_experts)
    n_items = len(items.weights)
    if items.name == "steps" and n_items == 1:
        raise InputError(
            f"{data.name} is one table of counts, which is one window: give --against FILE2, or counts by step"
        )
    if n_items < 2 * n_windows:
        raise InputError(
            f"{data.name} has {n_items} {items.name} with load; `n_windows` {n_windows} takes at least {2 * n_windows}: in each "
            "window one to fit on and one to score"
        )
    bounds = _bounds(items.weights, n_windows)
    before = _before(np.ones(n_items) if items.name == "steps" else items.weights)[bounds]
    parts = [np.arange(first, last) for first, last in itertools.pairwise(bounds)]
    unit = "steps" if items.name == "steps" else "tokens"
    return Windows(
        _even_and_odd(data, items, parts, "a window; take fewer `n_windows`"), (before[:-1] + before[1:]) / 2, unit
    )


def cut_file(data: MeasuredTraffic, n_experts: int, *, seed: int = 0) -> Halves:
    """Cut a whole file into its even and its odd sequences (or steps).

    The (token, expert) pairs of one table of counts are split at random, 16 times: such halves are more alike than those
    of other sequences would be.

    Raises InputError where there is one sequence, a layer has no load in a half, or counts to be split at random are no whole
    numbers, or 1e9 and more in a layer.
    """
    items = sequences_or_steps(data, n_experts)
    if len(items.weights) > 1:
        return _even_and_odd(data, items, [np.arange(len(items.weights))], "the file")
    if isinstance(data, RecordedTraffic):
        raise InputError(f"{data.name} has one sequence: none is left to score what is fitted on it")
    table = data.total
    if (table != np.floor(table)).any() or table.sum(axis=1).max() >= _MOST_PAIRS:
        raise InputError(
            f"{data.name} is one table of counts, which is split at random: its counts must be whole numbers, less "
            "than 1e9 in a layer"
        )
    random = np.random.default_rng(stream_key(seed, f"halves {data.digest}"))
    split = [split_at_random(table.astype(np.int64), random) for _ in range(_RANDOM_SPLITS)]
    fitted, scored = (np.stack(half) for half in zip(*split, strict=True))
    return _checked(
        data, fitted, scored, f"its counts split at random, mean of {_RANDOM_SPLITS} times (seed {seed})", "the file"
    )


def split_at_random(counts: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split the (token, expert) pairs of each layer, int64 [layers, experts], less than 1e9 in a layer, into halves of equal size
    at random (multivariate hypergeometric); of an odd number the second has one more.
    """
    first = np.stack([random.multivariate_hypergeometric(row, row.sum() // 2) for row in counts])
    return first, counts - first


def sequences_or_steps(data: MeasuredTraffic, n_experts: int, *, all_steps: bool = False) -> Items:
    """What a file is cut by; steps without any load are left out, or kept with `all_steps`."""
    if isinstance(data, RecordedTraffic):
        lengths = np.diff(data.starts).astype(float)
        return Items("sequences", lengths, lambda i: load_of(data.only_sequences(i), n_experts))
    load_of_step = data.counts.sum(axis=(1, 2), dtype=float)
    steps = np.arange(len(load_of_step)) if all_steps else np.flatnonzero(load_of_step)
    return Items("steps", load_of_step[steps], lambda i: data.counts[steps[i]].sum(axis=0))


def _before(weights: np.ndarray) -> np.ndarray:
    """Sum of the weights before each item, and of all."""
    return np.concatenate([[0.0], np.cumsum(weights)])


def _bounds(weights: np.ndarray, n_windows: int) -> np.ndarray:
    """First item of each window, and the number of items: nearest to equal weights with two items or more in each."""
    before = _before(weights)
    middle = (before[:-1] + before[1:]) / 2
    bounds = [0]
    for window in range(1, n_windows):
        nearest = int(np.searchsorted(middle, before[-1] * window / n_windows))
        bounds.append(min(max(nearest, bounds[-1] + 2), len(weights) - 2 * (n_windows - window)))
    return np.array([*bounds, len(weights)])


def _even_and_odd(data: MeasuredTraffic, items: Items, parts: list[np.ndarray], of: str) -> Halves:
    even, odd = (np.stack([items.load(part[first::2]) for part in parts]) for first in (0, 1))
    return _checked(data, even, odd, f"even and odd {items.name}", of)


def _checked(data: MeasuredTraffic, fitted: np.ndarray, scored: np.ndarray, about: str, of: str) -> Halves:
    """Halves whose layers all have load; `of` ends the message where one has none."""
    empty = np.argwhere(~(fitted.any(axis=2) & scored.any(axis=2)))
    if len(empty):
        layer = int(empty[0, 1])
        number = data.layer_ids[layer]
        raise InputError(f"{data.name}: layer {number} has no load in a half of {of}")
    return Halves(data.name, data.digest, fitted.astype(float), scored.astype(float), about)
