"""One function per figure: a SweepResult in, a matplotlib Figure out. A figure never samples."""

from collections.abc import Callable

from matplotlib.figure import Figure

from sim.figures.balance import fan_out_trade, imbalance_by_tokens, load_by_rank
from sim.figures.style import save
from sim.figures.worst_case import exceedance, idle_ranks, unlucky_steps, worst_case_by_ep
from sim.results import SweepResult

FIGURES: dict[str, Callable[[SweepResult], Figure]] = {
    "exceedance": exceedance,
    "worst_case_by_ep": worst_case_by_ep,
    "idle_ranks": idle_ranks,
    "unlucky_steps": unlucky_steps,
    "imbalance_by_tokens": imbalance_by_tokens,
    "load_by_rank": load_by_rank,
    "fan_out_trade": fan_out_trade,
}
"""Figures of a sweep by name."""

__all__ = ["FIGURES", "save"]
