"""Proposals of importance sampling over layers: popularity on cells of its quantile, tilted densities, draws from them."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.special import ndtr, ndtri, stdtrit

from sim.kernels import kernel
from sim.traffic import SyntheticTraffic
from sim.traffic.synthetic import STUDENT_DF, tilt_and_spread, tilt_profile

_CELL = 0.3  # of a standard normal, to 6
_SHIFTS, _SCALES = np.arange(-1.2, 2.0, 0.15), np.arange(0.35, 0.8, 0.08)  # that proposals of tilted layers tell apart


def sigma_of(workload: SyntheticTraffic) -> float:
    """Standard deviation of log-normal popularity; a request effect that all tokens of a step share adds to it."""
    own = workload.sigma if workload.popularity == "lognormal" else 0.0
    return float(np.hypot(own, workload.request_sigma))


@dataclass(frozen=True)
class Popularity:
    """mu of a layer as shift[e] + scale * quantile(normal of e): the shift and scale of a layer, and the quantile."""

    workload: SyntheticTraffic
    n_experts: int

    @property
    def tilted(self) -> bool:
        """Whether layers draw a tilt and a spread of their own."""
        return self.workload.popularity == "tilted"

    @property
    def rows(self) -> tuple[np.ndarray, np.ndarray]:
        """Shift and scale, [rows], of the kinds of experts that a proposal tells apart."""
        if not self.tilted:
            return np.zeros(1), np.full(1, sigma_of(self.workload))
        shift, scale = np.meshgrid(_SHIFTS, _SCALES)
        return shift.ravel(), scale.ravel()

    def row_of(self, shift: np.ndarray, scale: np.ndarray) -> np.ndarray:
        """The row nearest to each expert, int16 [layers, n_experts]."""
        rows = np.zeros((len(shift), self.n_experts), np.int16)
        if self.tilted:
            rows += np.abs(scale[:, None] - _SCALES).argmin(axis=1)[:, None].astype(np.int16) * len(_SHIFTS)
            steps = np.rint((shift - _SHIFTS[0]) / (_SHIFTS[1] - _SHIFTS[0]))
            rows += np.clip(steps, 0, len(_SHIFTS) - 1).astype(np.int16)
        return rows

    def of_layers(self, steep: np.ndarray, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shifts [layers, rows] and scales [layers], of what is drawn once per layer: steep bool, z float64 [layers, 2]."""
        if not self.tilted:
            return np.zeros((len(steep), 1)), np.full(len(steep), sigma_of(self.workload))
        tilt, spread = tilt_and_spread(steep, z[:, 0], z[:, 1])
        return tilt[:, None] * tilt_profile(self.n_experts), spread / np.sqrt(1.5)

    def quantile(self, tail: np.ndarray) -> np.ndarray:
        """Quantile at probability `tail` up to 1/2, at 1 - |tail| where it is negative."""
        below = np.abs(tail)
        q = stdtrit(STUDENT_DF, below) if self.tilted else ndtri(below)
        return np.where(tail > 0, q, -q)


class Cells(NamedTuple):
    """Cells of a standard normal on which proposals are constant, from low to high."""

    first: np.ndarray  # signed tail (see `Popularity.quantile`) at the lower end
    width: np.ndarray  # probability
    node: np.ndarray  # quantile at the middle


def cells_of(popularity: Popularity) -> Cells:
    """Cells of equal width on the normal's axis, symmetric about 0."""
    below = np.append(0.0, ndtr(np.arange(-6, 1e-9, _CELL)))  # lower ends and 0
    width = np.diff(below)
    node = popularity.quantile(below[:-1] + width / 2)
    return Cells(
        np.concatenate([below[:-1], -below[:0:-1]]),
        np.concatenate([width, width[::-1]]),
        np.concatenate([node, -node[::-1]]),
    )


@kernel
def fill_density(taken, growth, tokens, width, density):
    """(1 + p (e**theta - 1))**tokens in each cell, over its mean: taken float64 [rows, cells], growth float64 [levels, 3],
    expm1 of theta; density float64 [levels, 3, rows, cells].
    """
    for m in range(growth.shape[0]):
        for a in range(growth.shape[1]):
            for r in range(taken.shape[0]):
                total = 0.0
                for c in range(width.size):
                    density[m, a, r, c] = np.exp(tokens * np.log1p(taken[r, c] * growth[m, a]))
                    total += density[m, a, r, c] * width[c]
                for c in range(width.size):
                    density[m, a, r, c] /= total


@kernel
def draw_experts(u, level, kind, row, mass, first, width, cell, tail):
    """Draw the popularity of each expert from the proposal of its layer's level.

    u float64 [layers, 2 * n_experts]; kind int8 and row int16 [layers, n_experts]; mass [levels, 3, rows, cells], cumulated
    probabilities; cell int16 and tail float64 [layers, n_experts], its cell and its signed tail probability.
    """
    n_experts, n_cells = kind.shape[1], width.size
    for i in range(level.size):
        for e in range(n_experts):
            own = mass[level[i], kind[i, e], row[i, e]]
            c = min(np.searchsorted(own, u[i, e] * own[n_cells - 1], side="right"), n_cells - 1)
            cell[i, e] = c
            tail[i, e] = first[c] + u[i, n_experts + e] * width[c]


@kernel
def add_logs(table, kind, row, cell, out):
    """Add the sum over experts of table[level, kind, row, cell]: out float64 [layers, levels]."""
    for i in range(cell.shape[0]):
        for e in range(cell.shape[1]):
            for m in range(table.shape[0]):
                out[i, m] += table[m, kind[i, e], row[i, e], cell[i, e]]
