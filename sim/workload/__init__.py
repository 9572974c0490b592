"""Where tokens want to go: traffic drawn from a law, or recorded."""

from sim.workload.counts import LoadCounts
from sim.workload.fitted import FittedLayers
from sim.workload.gumbel import GumbelTraffic
from sim.workload.load import load_workload, workload_names
from sim.workload.loads import LoadTable, load_table
from sim.workload.read import Traffic, read_traffic
from sim.workload.recorded import RecordedTraffic

Workload = GumbelTraffic | RecordedTraffic

__all__ = [
    "FittedLayers",
    "GumbelTraffic",
    "LoadCounts",
    "LoadTable",
    "RecordedTraffic",
    "Traffic",
    "Workload",
    "load_table",
    "load_workload",
    "read_traffic",
    "workload_names",
]
