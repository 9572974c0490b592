"""Where tokens want to go: traffic drawn from a law, or recorded."""

from sim.traffic.counts import LoadCounts
from sim.traffic.fitted import FittedLayers
from sim.traffic.loads import LoadTable, load_table
from sim.traffic.presets import load_workload, workload_names
from sim.traffic.read import Traffic, read_traffic
from sim.traffic.recorded import RecordedTraffic
from sim.traffic.synthetic import SyntheticTraffic

Workload = SyntheticTraffic | RecordedTraffic

__all__ = [
    "FittedLayers",
    "LoadCounts",
    "LoadTable",
    "RecordedTraffic",
    "SyntheticTraffic",
    "Traffic",
    "Workload",
    "load_table",
    "load_workload",
    "read_traffic",
    "workload_names",
]
