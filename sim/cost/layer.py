"""Time of a layer, and the balancedness that serving engines log over layers."""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sim.cost.expert import expert_time_us
from sim.cost.gpu import Gpu
from sim.cost.inputs import as_numbers
from sim.errors import InputError
from sim.model import ModelSpec


def layer_time_us(
    model: ModelSpec | str | Path,
    gpu: Gpu | str | Path,
    *,
    pairs: ArrayLike,
    distinct_experts: ArrayLike,
    exchange_us: ArrayLike = 0.0,
    dtype: str | None = None,
    local_experts: ArrayLike | None = None,
) -> np.ndarray:
    """Time of one MoE layer's routed experts: the slowest rank's computation and the exchange, in microseconds.

    Attention, shared experts and whatever overlaps are left out; a step is the sum over its layers.

    Parameters
    ----------
    pairs, distinct_experts, local_experts : float array [..., ranks]
        As in `expert_time_us`, for every rank.
    exchange_us : float array [...]
        Dispatch and combine, from `exchange_time_us`.

    Returns
    -------
    float array [...]
    """
    experts_us = expert_time_us(
        model, gpu, pairs=pairs, distinct_experts=distinct_experts, dtype=dtype, local_experts=local_experts
    )
    if np.ndim(experts_us) == 0 or np.shape(experts_us)[-1] == 0:
        raise InputError(f"pairs {np.shape(experts_us)}: the last axis must be the ranks, at least one")
    return np.max(experts_us, axis=-1) + as_numbers("exchange_us", exchange_us, 0)


def balancedness_vllm(loads: ArrayLike) -> float:
    """Balancedness as vLLM logs it: the sum over layers of mean loads over the sum of largest loads; 0 without load.

    Parameters
    ----------
    loads : array [layers, ranks]

    Examples
    --------
    >>> balancedness_vllm([[10, 10, 10, 10], [40, 0, 0, 0]])
    0.4
    """
    layers = _layers(loads)
    return float(vllm_over_layers(layers.mean(axis=1), layers.max(axis=1)))


def balancedness_sglang(loads: ArrayLike) -> float:
    """Balancedness as SGLang logs it: the mean over layers of (mean load + 1e-5) / (largest load + 1e-5).

    Parameters
    ----------
    loads : array [layers, ranks]

    Examples
    --------
    >>> round(balancedness_sglang([[10, 10, 10, 10], [40, 0, 0, 0]]), 3)
    0.625
    """
    layers = _layers(loads)
    return float(sglang_over_layers(layers.mean(axis=1), layers.max(axis=1)))


def vllm_over_layers(mean_load: ArrayLike, max_load: np.ndarray) -> np.ndarray:
    """vLLM's balancedness of steps, from loads [..., layers]."""
    largest = max_load.sum(axis=-1)
    total = np.broadcast_to(mean_load, max_load.shape).sum(axis=-1)
    return np.divide(total, largest, out=np.zeros(np.shape(largest)), where=largest > 0)


def sglang_over_layers(mean_load: ArrayLike, max_load: np.ndarray) -> np.ndarray:
    """SGLang's balancedness of steps, from loads [..., layers]."""
    return np.mean((np.asarray(mean_load) + 1e-5) / (max_load + 1e-5), axis=-1)


def _layers(loads: ArrayLike) -> np.ndarray:
    layers = as_numbers("loads", loads, 0)
    if layers.ndim != 2 or not layers.size:
        raise InputError(f"loads {layers.shape}: must have the shape [layers, ranks], at least one of each")
    return layers
