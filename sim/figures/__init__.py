"""One function per figure: tables in, a matplotlib Figure out. A figure never samples, and computes no statistics."""

import inspect
from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure

from sim.errors import InputError, unknown
from sim.figures.balance import against_baseline, fan_out_trade, imbalance_by_tokens, load_by_rank
from sim.figures.style import Sweep, save, save_as
from sim.figures.worst_case import exceedance, idle_ranks, unlucky_steps, worst_case_by_ep

_DRAWN: tuple[Callable[..., Figure | None], ...] = (
    *(against_baseline, exceedance, worst_case_by_ep, idle_ranks),
    *(unlucky_steps, imbalance_by_tokens, load_by_rank, fan_out_trade),
)
FIGURES = {draw.__name__: draw for draw in _DRAWN}
"""Figures of a sweep by name. One that would show nothing of this sweep is None."""


def draw(name: str, result: Sweep, **options: Any) -> Figure | None:
    """Draw a figure of a sweep by its name; None where it would show nothing. Raises InputError where there is no such figure, or
    it has no such option.
    """
    if name not in FIGURES:
        raise unknown("figure", name, FIGURES)
    known = list(inspect.signature(FIGURES[name]).parameters)[1:]
    for option in options:
        if option not in known:
            raise InputError(
                f"figure '{name}' has no option '{option}'" + (f"; it has {', '.join(known)}" if known else "")
            )
    return FIGURES[name](result, **options)


__all__ = ["FIGURES", "draw", "save", "save_as"]
