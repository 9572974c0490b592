"""What comes in: synthetic traffic, recorded routing and load counts, and the readers of every form they come in."""

from sim.traffic.counts import LoadCounts
from sim.traffic.fitted import FittedLayers
from sim.traffic.presets import load_workload, workload_names
from sim.traffic.read import read_traffic
from sim.traffic.recorded import STEP_PHASES, RecordedTraffic
from sim.traffic.synthetic import SyntheticTraffic, synthetic_traffic

Workload = SyntheticTraffic | RecordedTraffic

__all__ = [
    "STEP_PHASES",
    "FittedLayers",
    "LoadCounts",
    "RecordedTraffic",
    "SyntheticTraffic",
    "Workload",
    "load_workload",
    "read_traffic",
    "synthetic_traffic",
    "workload_names",
]
