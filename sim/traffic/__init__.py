"""What recorded routing and measured loads look like, traffic by law fitted to them, and placements that go stale on them."""

from sim.traffic.decay import decay, decay_against
from sim.traffic.fit import Fit, fit_text, fit_traffic
from sim.traffic.holdout import hold_out
from sim.traffic.windows import Halves, Windows, cut_file, cut_windows

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
