"""How unevenly experts are used: statistics of loads, float or int [..., experts]; the last axis is of experts.

A load of 0 everywhere has no skew and is not allowed.
"""

import numpy as np

TOP_SHARE = 0.125
"""Share of the experts whose load `top_share` takes by default."""


def shares(load: np.ndarray) -> np.ndarray:
    """Load over the sum of loads, float64 [..., experts]."""
    return load / load.sum(axis=-1, keepdims=True, dtype=float)


def variation(load: np.ndarray) -> np.ndarray:
    """Coefficient of variation: standard deviation over experts / mean; 0 for balance."""
    return (load / load.mean(axis=-1, keepdims=True)).std(axis=-1)


def max_over_mean(load: np.ndarray) -> np.ndarray:
    """Largest load of an expert / mean."""
    return load.max(axis=-1) / load.mean(axis=-1)


def gini(load: np.ndarray) -> np.ndarray:
    """Gini coefficient: half the mean absolute difference of two experts / mean; 0 for balance, 1 - 1/experts at most."""
    n = load.shape[-1]
    ordered = np.sort(load, axis=-1)
    weight = 2 * np.arange(1, n + 1) - n - 1
    return (ordered * weight).sum(axis=-1) / (n * ordered.sum(axis=-1, dtype=float))


def top_share(load: np.ndarray, share: float = TOP_SHARE) -> np.ndarray:
    """Share of the load that the most used `share` of the experts (rounded up to whole experts) takes."""
    n_top = int(np.ceil(share * load.shape[-1] - 1e-9))
    return np.sort(load, axis=-1)[..., load.shape[-1] - n_top :].sum(axis=-1) / load.sum(axis=-1, dtype=float)


def group_shares(load: np.ndarray, n_group: int) -> np.ndarray:
    """Load of each expert group over the mean of groups, float64 [..., n_group]; 1 for balance."""
    of_group = load.reshape(*load.shape[:-1], n_group, -1).sum(axis=-1, dtype=float)
    return of_group / of_group.mean(axis=-1, keepdims=True)


def index_tilt(load: np.ndarray) -> np.ndarray:
    """Slope of the least-squares line of load / mean on (index + 1/2) / experts: -1 falls from 1.5 to 0.5, 0 is level."""
    n = load.shape[-1]
    v = (np.arange(n) + 0.5) / n
    v -= v.mean()
    return (load / load.mean(axis=-1, keepdims=True)) @ v / (v @ v)


def distance(load: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Total variation distance of the shares of two loads: the share of the load that would have to move, 0 to 1."""
    return np.abs(shares(load) - shares(other)).sum(axis=-1) / 2


def alikeness(load: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Correlation over experts of the shares of two loads; nan where one of them is level."""
    a, b = (shares(x) - 1 / x.shape[-1] for x in (load, other))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=-1) / np.sqrt((a * a).sum(axis=-1) * (b * b).sum(axis=-1))
