"""Loads of experts that were counted on traffic: what a load balancer is fitted on."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from sim.model import ModelSpec
from sim.traffic.counts import LoadCounts
from sim.traffic.read import read_traffic
from sim.traffic.recorded import RecordedTraffic


class LoadTable(NamedTuple):
    """Loads of experts by layer."""

    name: str
    loads: np.ndarray  # float64 [layers, n_experts]
    digest: str  # of what was read


def load_table(source: Path | str | RecordedTraffic | LoadCounts, model: ModelSpec) -> LoadTable:
    """Loads by layer of recorded routing or of load counts, or of a file that holds either.

    Raises InputError where the file is neither, or is of another model.
    """
    if isinstance(source, Path | str):
        source = read_traffic(source, model).data
    if isinstance(source, LoadCounts):
        return LoadTable(source.name, source.total, source.digest)
    source.check_model(model.n_experts, model.top_k, model.name)
    return LoadTable(source.name, source.expert_counts(model.n_experts), source.digest)
