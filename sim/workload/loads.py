"""Loads of experts that were counted on traffic: what a load balancer is fitted on."""

from pathlib import Path

import numpy as np

from sim.model import ModelSpec
from sim.workload.recorded import read_recorded


def load_table(path: Path, model: ModelSpec) -> tuple[np.ndarray, str]:
    """Loads by layer, float64 [layers, n_experts], of a record of routing, and the digest of what they were counted on.

    Raises InputError where the file is not one, or is of another model.
    """
    record = read_recorded(path)
    record.check_model(model.n_experts, model.top_k, model.name)
    return record.expert_counts(model.n_experts), record.digest
