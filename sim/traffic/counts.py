"""Load counts: how many tokens took each expert, by layer and perhaps by step."""

import hashlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from sim.errors import InputError, shown

MOST_COUNTS = 2**27
PHYSICAL_NAMES = ("physical_count", "global_physical_count")
MAP_NAMES = ("physical_to_logical_map", "last_physical_to_logical_map", "phy2log")


@dataclass(frozen=True, eq=False)
class LoadCounts:
    """Measured loads of experts.

    Attributes
    ----------
    name : str
        'file:' and the file's name.
    counts : int64 or float64 [steps, layers, experts]
        One step where the file has no steps.
    layer_ids : int64 [layers]
        Ids of the decoder layers, where the file or the model tells them, else 0, 1, ...
    digest : str
        Digest of the counts.
    n_steps : int, optional
        Steps of the file; None where it has none.
    notes : tuple of str
        What the file was recognised as, and what was left out.
    """

    name: str
    counts: np.ndarray = field(repr=False)
    layer_ids: np.ndarray = field(repr=False)
    digest: str
    n_steps: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def total(self) -> np.ndarray:
        """Counts over all steps, float64 [layers, experts]."""
        return self.counts.sum(axis=0, dtype=float)

    @property
    def expert_counts(self) -> np.ndarray:
        """Counts over all steps, int64 [layers, n_experts]; fractions are rounded once they are summed.

        Shares, which rounding would lose, become millionths of their layer's load.
        """
        summed = self.counts.sum(axis=0)
        if np.abs(np.rint(summed) - summed).max() > 0.005 * summed.mean():
            summed = 1e6 * summed / summed.sum(axis=1, keepdims=True)
        return np.rint(summed).astype(np.int64)

    @property
    def n_layers(self) -> int:
        """Layers that have any load."""
        return self.counts.shape[1]

    @property
    def n_experts(self) -> int:
        """Experts of a layer."""
        return self.counts.shape[2]

    @property
    def n_tokens(self) -> None:
        """Counts do not tell tokens."""

    @property
    def n_sequences(self) -> None:
        """Counts do not tell sequences."""


def build_counts(
    where: str, name: str, counts: np.ndarray, layer_ids: np.ndarray | None = None
) -> tuple[LoadCounts, int]:
    """Checked counts [layers, experts] or [steps, layers, experts], and how many layers without any were dropped.

    Raises
    ------
    InputError
        Shapes that are no table of counts, NaN, infinite or negative counts, axes that are exchanged, a map of experts;
        `where` begins the message.
    """
    if counts.dtype.kind not in "iuf" or counts.ndim not in (2, 3) or 0 in counts.shape:
        raise InputError(
            f"{where}: counts must be numbers [layers, experts] or [steps, layers, experts], not {list(counts.shape)}"
        )
    n_steps = None if counts.ndim == 2 else len(counts)
    counts = counts[None] if counts.ndim == 2 else counts
    if counts.size > MOST_COUNTS:
        raise InputError(f"{where}: {counts.size} counts are more than {MOST_COUNTS}; add up steps first")
    if not 2 <= counts.shape[2] <= 2**15 - 1:
        raise InputError(f"{where}: counts of {counts.shape[2]} experts; a layer has 2 to 32767")
    if counts.dtype.kind == "f":
        if not np.isfinite(counts).all():
            raise InputError(f"{where}: counts must be finite, found {'NaN' if np.isnan(counts).any() else 'infinity'}")
        if counts.dtype.itemsize < 8:
            counts = counts.astype(float)
    if counts.min() < 0:
        step, layer, expert = np.unravel_index(int(counts.argmin()), counts.shape)
        raise InputError(
            f"{where}: counts must not be negative, found {shown(counts.min().item())} (step {step}, layer {layer}, "
            f"expert {expert})"
        )
    if counts.max() > 2**53:
        raise InputError(f"{where}: counts above 2**53, found {shown(counts.max().item())}")
    numbers = np.arange(counts.shape[1]) if layer_ids is None else layer_ids
    used = counts.any(axis=(0, 2))
    if not used.any():
        raise InputError(f"{where}: every count is 0")
    _check_axes(counts.sum(axis=0, dtype=float)[used], where)
    counts = np.ascontiguousarray(counts[:, used] if counts.dtype.kind == "f" else counts[:, used].astype(np.int64))
    digest = hashlib.sha256(f"{counts.shape}{counts.dtype}".encode() + counts.tobytes()).hexdigest()[:32]
    return LoadCounts(name, counts, np.asarray(numbers)[used], digest, n_steps), int((~used).sum())


def logical_counts(name: str, counts: np.ndarray, table: np.ndarray | None, where: str) -> np.ndarray:
    """Counts [..., layers, slots] that stand under `name`, by logical expert: the copies of one are added up by the map
    [layers, slots] that stands beside them. Raises InputError where physical experts have no map, or none that fits.
    """
    if name == "logical_count" or (table is None and name not in PHYSICAL_NAMES):
        return counts
    if table is None:
        raise InputError(
            f"{where}: {name} counts physical experts, and no map stands beside it ({', '.join(MAP_NAMES)})"
        )
    if table.dtype.kind not in "iu" or table.shape != counts.shape[-2:] or table.min(initial=0) < 0:
        raise InputError(
            f"{where}: '{name}' has the shape {list(counts.shape)}, the map of physical experts beside it "
            f"{table.dtype} {list(table.shape)}: it must be [layers, slots] of experts from 0 on"
        )
    if table.max(initial=0) > 2**15 - 1:
        raise InputError(f"{where}: its map of physical experts has expert {table.max()}, above 32767")
    shape = (*counts.shape[:-1], int(table.max(initial=0)) + 1)
    if np.prod(shape, dtype=float) > MOST_COUNTS:
        raise InputError(f"{where} has more than {MOST_COUNTS} counts; add up steps first")
    found = np.zeros(shape, counts.dtype)
    at: Any = (..., np.arange(len(table))[:, None], table)
    np.add.at(found, at, counts)
    return found


def _check_axes(total: np.ndarray, where: str) -> None:
    """Refuse loads [layers, experts] that are [experts, layers], or a map: a run's layers all have the same sum."""
    n_layers, width = total.shape
    of_layer, of_expert = total.sum(axis=1), total.sum(axis=0)
    if n_layers > 1 and np.ptp(of_expert) < 1e-9 * of_expert.max() < np.ptp(of_layer) and np.ptp(total, axis=1).any():
        raise InputError(
            f"{where}: its columns all add up to {of_expert[0]:g}, its rows do not: are the axes exchanged? Loads are "
            "[layers, experts]: a row for each layer"
        )
    if width > 3 and (np.sort(total, axis=1) == np.arange(width)).all():
        raise InputError(
            f"{where}: each row has the numbers 0 to {width - 1}, each once: a map of experts, and no loads"
        )


def doubts_about(data: LoadCounts) -> list[str]:
    """What of loads is seldom meant, as notes: layers with different sums, shares, counters that only rise."""
    found, counts, of_layer = [], data.counts, data.total.sum(axis=1)
    if np.ptp(of_layer) > 1e-3 * of_layer.max() or (counts.dtype.kind == "i" and np.ptp(of_layer)):
        found.append(
            f"its layers' loads add up to {of_layer.min():.10g} to {of_layer.max():.10g}, where a router gives each as many: "
            "tokens dropped, steps left out, or numbers that mean something else"
        )
    part = counts[counts % 1 > 0] if counts.dtype.kind == "f" else counts[:0]
    if part.size:
        found.append(f"its loads are fractions, as {part[0]:.6g}: shares or means, of which only proportions count")
    if len(counts) > 1 and counts[1:].size >= 20 and never_falls(counts) and (counts[-1] > counts[0]).any():
        found.append("no count falls from one step to the next: of counters that add up give the last step alone")
    return found


def never_falls(series: list[np.ndarray] | np.ndarray) -> bool:
    """Whether no count is below the one before it, as in counters that add up."""
    return all((late >= early).all() for early, late in pairwise(series))
