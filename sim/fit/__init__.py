"""What is learned from traffic: its description, synthetic traffic fitted to it, hold-out, and placements that go stale."""

from sim.fit.fitting import FittedTraffic, fit_text, fit_traffic
from sim.fit.hold_out import hold_out
from sim.fit.staleness import decay, decay_against
from sim.fit.together import co_selection

__all__ = [
    "FittedTraffic",
    "co_selection",
    "decay",
    "decay_against",
    "fit_text",
    "fit_traffic",
    "hold_out",
]
