"""Load counts: how many tokens took each expert, by layer and perhaps by step; .npz, .npy, CSV and SGLang's .pt."""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError, shown
from sim.traffic.arrays import reading

COUNT_NAMES = ("logical_count", "counts", "load", "loads", "expert_load", "expert_counts")
"""Names that arrays of counts go by; `logical_count` is that of SGLang's expert distribution recorder."""
MOST_COUNTS = 2**27
_KEYS = ("step", "layer")  # columns of a CSV file that are no expert
_MAX_LINE = 1 << 20
_MAX_PT_BYTES = 4 << 30


@dataclass(frozen=True, eq=False)
class LoadCounts:
    """Measured loads of experts.

    Attributes
    ----------
    name : str
        'file:' and the file's name.
    counts : int64 or float64 [steps, layers, experts]
        One step where the file has no steps.
    layers : int64 [layers]
        The file's numbers of the layers that are left.
    digest : str
        Digest of the counts.
    """

    name: str
    counts: np.ndarray = field(repr=False)
    layers: np.ndarray = field(repr=False)
    digest: str

    @property
    def total(self) -> np.ndarray:
        """Counts over all steps, float64 [layers, experts]."""
        return self.counts.sum(axis=0, dtype=float)


def build_counts(where: str, name: str, counts: np.ndarray, layers: np.ndarray | None = None) -> tuple[LoadCounts, int]:
    """Checked counts [layers, experts] or [steps, layers, experts], and how many layers without any were dropped.

    Raises
    ------
    InputError
        Shapes that are no table of counts, NaN, infinite or negative counts; `where` begins the message.
    """
    if counts.dtype.kind not in "iuf" or counts.ndim not in (2, 3) or 0 in counts.shape:
        raise InputError(
            f"{where}: counts must be numbers [layers, experts] or [steps, layers, experts], not {list(counts.shape)}"
        )
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
    numbers = np.arange(counts.shape[1]) if layers is None else layers
    used = counts.any(axis=(0, 2))
    if not used.any():
        raise InputError(f"{where}: every count is 0")
    counts = np.ascontiguousarray(counts[:, used] if counts.dtype.kind == "f" else counts[:, used].astype(np.int64))
    digest = hashlib.sha256(f"{counts.shape}{counts.dtype}".encode() + counts.tobytes()).hexdigest()[:32]
    return LoadCounts(name, counts, numbers[used], digest), int((~used).sum())


def read_csv(path: Path, where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Counts of a CSV file, and its layer numbers: a row per layer, a column per expert.

    A first line of names may mark a column `layer` and a column `step`; without names every column is an expert. Read
    line by line.
    """
    rows: list[np.ndarray] = []
    header: list[str] | None = None
    width = n_numbers = 0
    with reading(where, "CSV"), path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), ""), 1):
            if len(line) >= _MAX_LINE:
                raise InputError(f"{where}, line {number}: longer than {_MAX_LINE >> 20} MiB")
            cells = [cell.strip() for cell in line.replace(";", ",").replace("\t", ",").rstrip("\r\n").split(",")]
            if not any(cells) or cells[0].startswith("#"):
                continue
            try:
                values = np.array(cells, dtype=float)
            except ValueError:
                if rows or header is not None:
                    bad = next(cell for cell in cells if not _is_number(cell))
                    raise InputError(f"{where}, line {number}: '{shown(bad)}' is not a number") from None
                header, width = _header(cells, f"{where}, line {number}"), len(cells)
                continue
            width = width or len(values)
            if len(values) != width:
                raise InputError(f"{where}, line {number}: {len(values)} columns where the first line has {width}")
            rows.append(values)
            n_numbers += len(values)
            if n_numbers > MOST_COUNTS:
                raise InputError(f"{where} has more than {MOST_COUNTS} counts; add up steps first")
    if not rows:
        raise InputError(f"{where} has no rows of counts")
    return _by_step(np.array(rows), header or [], where)


def _header(cells: list[str], here: str) -> list[str]:
    """Names of columns; a row of counts with a slip in it, or a column without a name, is none."""
    names = [cell.lower() for cell in cells]
    experts = [name for name in names if name not in _KEYS]
    if "" in experts or len({_is_number(name) for name in experts}) > 1:
        raise InputError(
            f"{here}: neither counts nor a name for each column ('layer', 'step', and all others an expert): "
            + shown(",".join(cells))
        )
    if "step" in names and "layer" not in names:
        raise InputError(f"{here}: a column 'step' needs a column 'layer' beside it")
    return names


def _by_step(table: np.ndarray, header: list[str], where: str) -> tuple[np.ndarray, np.ndarray | None]:
    """Counts [layers, experts] or [steps, layers, experts] of a table whose `header` may name keys, and layer numbers."""
    keys = {key: header.index(key) for key in _KEYS if key in header}
    counts = np.delete(table, list(keys.values()), axis=1)
    if (counts == np.floor(counts)).all():  # False for NaN
        counts = counts.astype(np.int64) if np.abs(counts).max(initial=0) < 2**53 else counts
    if "layer" not in keys:
        return counts, None
    of_row = table[:, keys["layer"]]
    if not ((of_row >= 0) & (of_row < 2**31) & (of_row % 1 == 0)).all():
        raise InputError(f"{where}: layers must be whole numbers from 0 on")
    if "step" in keys and not np.isfinite(table[:, keys["step"]]).all():
        raise InputError(f"{where}: steps must be numbers")
    layers = np.unique(of_row)
    steps = np.unique(table[:, keys["step"]]) if "step" in keys else np.zeros(1)
    if len(table) != len(steps) * len(layers):
        raise InputError(
            f"{where}: {len(table)} rows are not one for each of {len(layers)} layers in {len(steps)} steps"
        )
    order = np.lexsort((of_row, table[:, keys["step"]] if "step" in keys else np.zeros(len(table))))
    if (of_row[order].reshape(len(steps), -1) != layers).any():
        raise InputError(f"{where}: a layer stands twice in a step")
    return counts[order].reshape(len(steps), len(layers), -1), layers.astype(np.int64)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def read_pt(path: Path, where: str) -> dict[str, np.ndarray]:
    """Arrays of a torch file of tensors (SGLang recorder: `logical_count` int32 [steps, layers, experts]), unpickled with
    no code allowed. Needs the extra epsim[torch].
    """
    with reading(where, ".pt"):
        if path.stat().st_size > _MAX_PT_BYTES:
            raise InputError(f"{where} is larger than {_MAX_PT_BYTES >> 30} GiB")
    try:
        import torch
    except ImportError:
        raise InputError(
            f"{where}: reading .pt files needs torch, which is not installed: pip install 'epsim[torch]' (or save the "
            "counts as .npy)"
        ) from None
    try:
        with reading(where, ".pt"):
            held: Any = torch.load(path, map_location="cpu", weights_only=True)
    except InputError as error:
        if "UnpicklingError" in str(error):
            raise InputError(f"{where} is damaged, or holds more than tensors: it is not unpickled") from None
        raise
    held = held if isinstance(held, dict) else {"": held}
    arrays = {str(key): value.numpy() for key, value in held.items() if isinstance(value, torch.Tensor)}
    if not arrays:
        raise InputError(f"{where} holds no tensor")
    return arrays
