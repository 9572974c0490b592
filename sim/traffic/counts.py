"""Load counts: how many tokens took each expert, by layer and perhaps by step."""

import hashlib
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from sim.errors import InputError, shown
from sim.traffic.arrays import MOST_COUNTS
from sim.traffic.recorded import MOST_LAYERS

MOST_TOP_K = 32  # columns: no router takes more experts
COUNT_NAMES = (
    "logical_count", "counts", "count", "load", "loads", "expert_load", "expert_loads", "expert_counts", "token_counts",
    "tokens_per_expert", "num_tokens_per_expert", "logical_load", "expert_usage", "activation_counts", "activation_count",
    "expert_count", "expert_frequency", "expert_hotness", "moe_load", "logical_expert_load", "logical_expert_counts",
)  # fmt: skip
"""Names that arrays of counts go by; `logical_count` is that of SGLang's expert distribution recorder."""
PHYSICAL_NAMES = (
    "physical_count", "global_physical_count", "physical_load", "expert_load_window", "expert_load_view", "expert_load_pass",
    "window_expert_load", "latest_expert_load",
)  # fmt: skip
"""The same of physical experts; those with `expert_load` are of vLLM's EPLB state."""
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
    n_tokens = n_sequences = None  # counts do not tell them

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


def build_counts(
    where: str, name: str, counts: np.ndarray, layer_ids: np.ndarray | None = None
) -> tuple[LoadCounts, int]:
    """Checked counts [layers, experts] or [steps, layers, experts], and how many layers without any were dropped.

    Raises InputError for shapes that are no table of counts, NaN, infinite or negative counts, axes that are exchanged, a map of
    experts; `where` begins the message.
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
        logits = ": a router's logits?" if counts.dtype.kind == "f" and counts.min() % 1 else ""
        raise InputError(
            f"{where}: counts must not be negative, found {shown(counts.min().item())} (step {step}, layer {layer}, "
            f"expert {expert}){logits}"
        )
    if counts.max() >= 2**53:
        raise InputError(f"{where}: counts above 2**53, found {shown(counts.max().item())}")
    if counts.shape[1] > MOST_LAYERS:
        raise InputError(
            f"{where} has {counts.shape[1]} layers (rows, or the second axis of three): are the axes exchanged, or is each row "
            "of a token? Loads are [layers, experts] or [steps, layers, experts]"
        )
    sums = counts.sum(axis=2)
    if len(counts) > 1 and counts.dtype.kind == "f" and sums.any() and (np.abs(sums[sums != 0] - 1) < 0.01).all():
        raise InputError(
            f"{where}: each of its {counts.shape[0]} x {counts.shape[1]} rows adds up to 1: probabilities or weights of tokens, "
            "or shares, and no loads; of shares give one table [layers, experts]"
        )
    numbers = np.arange(counts.shape[1]) if layer_ids is None else np.asarray(layer_ids)
    if numbers.min() < 0 or len(np.unique(numbers)) < len(numbers):
        raise InputError(f"{where}: layers must be numbered from 0 on, each by a number of its own")
    if (np.diff(numbers) < 0).any():
        counts, numbers = counts[:, np.argsort(numbers)], np.sort(numbers)
    used = counts.any(axis=(0, 2))
    if not used.any():
        raise InputError(f"{where}: every count is 0")
    _check_axes(counts.sum(axis=0, dtype=float)[used], where)
    counts = np.ascontiguousarray(counts[:, used] if counts.dtype.kind == "f" else counts[:, used].astype(np.int64))
    digest = hashlib.sha256(f"{counts.shape}{counts.dtype}".encode() + counts.tobytes()).hexdigest()[:32]
    return LoadCounts(name, counts, numbers[used], digest, n_steps), int((~used).sum())


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
    steps = np.arange(len(counts)) if counts.ndim == 3 else np.zeros(1, int)
    found, _, _ = tabulate([(steps[:, None, None], np.arange(len(table))[:, None], table, counts)], where)
    return found if counts.ndim == 3 else found[0]


Entry = tuple[Any, Any, Any, np.ndarray]
"""Numbers of step, layer and expert, and the counts there: whole numbers that broadcast to the shape of the counts."""


def tabulate(entries: list[Entry], where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts [steps, layers, experts] of entries, and the numbers of the steps and layers that occur.

    What is counted for the same step, layer and expert adds up: copies of an expert, ranks, files. Raises InputError for an
    expert above 32767, too many counts, or a negative one, which a sum might hide.
    """
    steps, layers = (np.unique(np.concatenate([np.ravel(entry[axis]) for entry in entries])) for axis in (0, 1))
    last = max(int(np.max(entry[2], initial=0)) for entry in entries)
    if last > 2**15 - 1:
        raise InputError(f"{where}: expert {last} is above 32767")
    shape = (len(steps), len(layers), last + 1)
    if np.prod(shape, dtype=float) > MOST_COUNTS:
        raise InputError(f"{where} has more than {MOST_COUNTS} counts; add up steps first")
    total = np.zeros(shape, float if any(entry[3].dtype.kind == "f" for entry in entries) else np.int64)
    for step, layer, expert, counts in entries:
        if counts.min(initial=0) < 0:
            raise InputError(f"{where}: counts must not be negative, found {shown(counts.min().item())}")
        row = np.searchsorted(steps, step) * len(layers) + np.searchsorted(layers, layer)
        place, counts = np.broadcast_arrays(row * (last + 1) + expert, counts)
        np.add.at(total.reshape(-1), place.ravel(), counts.ravel())
    return total, steps, layers


def are_counts(sample: np.ndarray) -> bool:
    """Whether the first rows of an array are counts [steps, layers, experts], and not ids [tokens, layers, top_k]."""
    if sample.dtype.kind == "f" and not (sample.any() and (np.isfinite(sample) & (np.floor(sample) == sample)).all()):
        return True
    if sample.size == 0 or sample.shape[2] == 1:
        return False
    if sample.shape[2] > MOST_TOP_K:
        return True
    alike = (sample == sample[..., :1]).all(axis=2)  # padding, of ids
    ordered = np.sort(sample, axis=2)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2) & (sample >= 0).all(axis=2)
    if ((repeated | (ordered[..., -1] > 2**15 - 1)) & ~alike).any():
        return True
    sums = sample.sum(axis=2, dtype=np.int64)
    largest = sums.max(axis=1, keepdims=True)
    return sample.shape[1] > 1 and bool(((sums == largest) | (sums == 0)).all() and (largest > 0).any())


def of_experts(counts: np.ndarray, n_experts: int, top_k: int, is_open: bool) -> tuple[np.ndarray, list[str]]:
    """Counts [..., experts] with a column for each of a model's experts, where that is what they mean; and notes.

    Experts may be numbered from 1; shared experts that an engine fused in stand behind the others, with each token's load;
    of an open table the last experts may have no load.
    """
    if counts.ndim < 2 or counts.dtype.kind not in "iuf":
        return counts, []
    n_more = counts.shape[-1] - n_experts
    if n_more == 1 and not counts[..., 0].any():
        return counts[..., 1:], [f"expert 0 has no load: its experts are numbered from 1, to {n_experts}"]
    if n_more > 0:
        routed, shared = np.split(counts, [n_experts], axis=-1)
        if shared.any() and (shared * top_k == routed.sum(axis=-1, keepdims=True)).all():
            return routed, [f"experts from {n_experts} on, which each token takes, are left out: shared, and fused in"]
    if n_more < 0 and is_open:
        counts = np.concatenate([counts, np.zeros((*counts.shape[:-1], -n_more), counts.dtype)], axis=-1)
    return counts, []


def _check_axes(total: np.ndarray, where: str) -> None:
    """Refuse loads [layers, experts] that are [experts, layers], or a map: a run's layers all have the same sum."""
    width = total.shape[1]
    of_layer, of_expert = total.sum(axis=1), total.sum(axis=0)
    used = total[:, of_expert > 0]  # where axes are exchanged, a dense layer is a column of zeros
    of_expert = of_expert[of_expert > 0]
    is_level = min(used.shape) > 1 and np.ptp(of_expert) < 1e-9 * of_expert[0] < np.ptp(of_layer)
    if is_level and np.ptp(used, axis=1).any():
        raise InputError(
            f"{where}: its columns all add up to {of_expert[0]:g}, its rows do not: are the axes exchanged? Loads are "
            "[layers, experts]: a row for each layer"
        )
    ordered = np.sort(total, axis=1)  # of a map: each expert has a slot, and a few have several
    steps = np.diff(ordered, axis=1)
    last = ordered[0, -1]
    has_all = not ordered[:, 0].any() and (ordered[:, -1] == last).all() and set(np.unique(steps)) <= {0, 1}
    if has_all and 2 * last > width > 3:
        raise InputError(f"{where}: each row has all numbers from 0 to {last:g}: a map of experts, and no loads")
    is_even = has_all and (ordered == ordered[0]).all() and not np.ptp(np.bincount(ordered[0].astype(int)))
    if is_even and last > 1 and total.size >= 16:  # which a few tokens come to by chance
        raise InputError(f"{where}: each row has 0 to {last:g}, each as often: ranks of experts, and no loads")


def doubts_about(data: LoadCounts) -> list[str]:
    """What of loads is seldom meant, as notes: layers with different sums, shares, counters that only rise."""
    found, counts, of_layer = [], data.counts, data.total.sum(axis=1)
    last = data.total[:, -1]
    of_each = of_layer / last if last.all() else np.full(len(last), np.inf)  # a shared expert has one of a token's few
    if len(last) > 1 and 2 * of_each[0] <= data.n_experts and of_each[0] % 1 == 0 == np.ptp(of_each):
        found.append(
            f"expert {data.n_experts - 1} has one in {of_each[0]:g} of the loads of every layer: a shared expert? Or a sum?"
        )
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


@dataclass
class CountTable:
    """Counts as a file holds them, before they are checked."""

    counts: np.ndarray  # [layers, experts] or [steps, layers, experts]
    form: str  # what it was recognised as
    layer_ids: np.ndarray | None = None  # int64 [layers], the file's own, where it has any
    steps: np.ndarray | None = None  # [steps], the file's own numbers: what files of several ranks are added up by
    is_open: bool = False  # whether the largest expert that occurs tells the number of experts: there may be more
    notes: list[str] = field(default_factory=list)  # what was left out


def add_tables(tables: list[CountTable], where: str, what: str = "files") -> CountTable:
    """The sum of the tables of several files (one for each rank), or of the ranks of one, by step, layer and expert. Raises
    InputError where they differ in their experts, or in their layers where they do not number them.
    """
    first = tables[0]
    if len(tables) == 1:
        return first
    used = [set(np.flatnonzero(t.counts.any(axis=tuple(range(t.counts.ndim - 1)))).tolist()) for t in tables]
    apart = len(set().union(*used)) == sum(map(len, used))  # each rank has counts of its own experts alone
    entries, n_steps = [], 0
    for table in tables:
        counts = table.counts if table.counts.ndim == 3 else table.counts[None]
        if (table.counts.ndim, table.layer_ids is None) != (first.counts.ndim, first.layer_ids is None):
            raise InputError(f"{where}: its files are tables of different forms: {first.form}, and {table.form}")
        if counts.shape[2] != first.counts.shape[-1] and not (apart or (table.is_open and first.is_open)):
            raise InputError(
                f"{where}: its files have counts of {first.counts.shape[-1]} and of {counts.shape[2]} experts: mixed models "
                "in one folder?"
            )
        own = slice(int(table.steps is not None), 1 + int(table.layer_ids is None))  # axes without numbers
        if counts.shape[own] != (1, *first.counts.shape)[-3:][own]:
            raise InputError(
                f"{where}: its files have the shapes {list(first.counts.shape)} and {list(table.counts.shape)}, and do not "
                "number their steps or layers"
            )
        steps = np.arange(len(counts)) if table.steps is None else table.steps
        layers = np.arange(counts.shape[1]) if table.layer_ids is None else table.layer_ids
        entries.append((steps[:, None, None], layers[:, None], np.arange(counts.shape[2]), counts))
        n_steps += len(steps)
    total, steps, layers = tabulate(entries, where)
    found = CountTable(total, first.form, is_open=any(table.is_open for table in tables))
    found.layer_ids = None if first.layer_ids is None else layers
    if first.counts.ndim == 2:
        found.counts = total[0]
    else:
        found.steps = steps
    found.notes += dict.fromkeys(note for table in tables for note in table.notes)
    if found.steps is not None and n_steps == len(steps):
        found.notes.append(f"the steps of {len(tables)} tables follow each other")
    else:
        found.notes += [f"{len(tables)} {what} are added up", *_doubts_about_sum(tables, what)]
        n_lacking = sum(len(set(table.steps)) < len(steps) for table in tables if table.steps is not None)
        found.notes += [f"{n_lacking} of them lack some of the {len(steps)} steps"] if n_lacking else []
    return found


def _doubts_about_sum(tables: list[CountTable], what: str) -> list[str]:
    """What is seldom meant to be added up, as notes: equal parts, counters that only rise, ranks with experts of their own.

    Ranks that have all experts, of their own tokens, have as many loads in each layer; ranks that number their own experts
    from 0 have that only together, and different experts mix.
    """
    found, parts = [], [table.counts for table in tables]
    n_equal = len(parts) - len({part.tobytes() for part in parts})
    if n_equal:
        found.append(
            f"{n_equal} of them have the same counts as another: of ranks that see the same tokens give one file"
        )
    if len({part.shape for part in parts}) > 1:
        return found
    if not n_equal and what == "files" and parts[0].size >= 20 and never_falls(parts):
        found.append("no count falls from one file to the next: of counters that add up give the last file alone")
    loads = np.stack([part.reshape(-1, *part.shape[-2:]).sum(axis=0) for part in parts])  # [ranks, layers, experts]
    used, of_layer = np.asarray(loads.any(axis=1)), loads.sum(axis=2)
    only_together = np.ptp(of_layer, axis=1).all() and not np.ptp(of_layer.sum(axis=0))
    if loads.dtype.kind in "iu" and (used == used[:1]).all() and only_together:
        found.append(
            f"only its {what} together have as many loads in each layer: if each numbers its own experts from 0, put them side "
            "by side, a column for each expert"
        )
    return found
