"""Loads of experts that were counted on traffic: what a load balancer is fitted on."""

from pathlib import Path

import numpy as np

from sim.model import ModelSpec
from sim.workload.counts import LoadCounts
from sim.workload.read import read_traffic


def load_table(path: Path, model: ModelSpec) -> tuple[np.ndarray, str]:
    """Loads by layer, float64 [layers, n_experts], of recorded routing or of load counts, and the digest of what was read.

    Raises InputError where the file is neither, or is of another model.
    """
    data = read_traffic(path, model).data
    if isinstance(data, LoadCounts):
        return data.total, data.digest
    data.check_model(model.n_experts, model.top_k, model.name)
    return data.expert_counts(model.n_experts), data.digest
