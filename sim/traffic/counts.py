"""Load counts: how many tokens took each expert, by layer and perhaps by step."""

import hashlib
from dataclasses import dataclass, field

import numpy as np

from sim.errors import InputError, shown

MOST_COUNTS = 2**27


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
        """Counts over all steps, int64 [layers, n_experts]; fractions are rounded once they are summed."""
        summed = self.counts.sum(axis=0)
        return summed if summed.dtype.kind == "i" else np.rint(summed).astype(np.int64)

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
        Shapes that are no table of counts, NaN, infinite or negative counts; `where` begins the message.
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
    counts = np.ascontiguousarray(counts[:, used] if counts.dtype.kind == "f" else counts[:, used].astype(np.int64))
    digest = hashlib.sha256(f"{counts.shape}{counts.dtype}".encode() + counts.tobytes()).hexdigest()[:32]
    return LoadCounts(name, counts, np.asarray(numbers)[used], digest, n_steps), int((~used).sum())
