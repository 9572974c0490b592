"""What recorded routing and measured loads look like, traffic by law fitted to them, and placements that go stale on them."""

from sim.fit.fit import Fit, fit_text, fit_traffic
from sim.fit.hold_out import hold_out
from sim.fit.staleness import decay, decay_against
from sim.fit.windows import Halves, Windows, cut_file, cut_windows

__all__ = [
    "Fit",
    "Halves",
    "Windows",
    "cut_file",
    "cut_windows",
    "decay",
    "decay_against",
    "fit_text",
    "fit_traffic",
    "hold_out",
]
