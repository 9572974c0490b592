"""Grouped top-k, the exact upstream rule (vLLM 0.33 `grouped_topk`, SGLang 0.5 `biased_grouped_topk_impl`,
transformers 5.23 `DeepseekV3TopkRouter`).
"""

from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from sim.errors import InputError
from sim.kernels import kernel
from sim.model import ModelSpec, load_model
from sim.model.spec import ROUTED_SCORINGS


def route(logits: ArrayLike, model: ModelSpec | str | Path, bias: ArrayLike | None = None) -> np.ndarray:
    """Experts that the model's router picks for each token.

    score = softmax or sigmoid of the logits; choice = score + bias; a group scores its largest choice ('max') or the sum
    of its two largest ('top2_sum'); outside the topk_group best groups choices are -inf; the top_k largest choices win.
    Ties go to the lowest index at both stages, as in the GPU kernels (torch on CPU does otherwise).

    Parameters
    ----------
    logits : float32 [tokens, n_experts]
    model : ModelSpec, str or Path
    bias : float32 [n_experts], optional
        Correction bias; it moves the choice only. None is no bias (all zeros).

    Returns
    -------
    int16 [tokens, top_k], best first.

    Raises
    ------
    InputError (a ValueError)
        A scoring other than softmax and sigmoid, wrong shapes, NaN or +inf. (A router that upstream gets silently wrong,
        such as top_k beyond the kept groups, cannot be described: ModelSpec refuses it.)
    """
    model = load_model(model)
    if model.scoring not in ROUTED_SCORINGS:
        raise InputError(
            f"route does not know the scoring '{model.scoring}' of {model.name}; it knows softmax, sigmoid"
        )
    logits = _as_float32("logits", logits)
    if logits.ndim != 2 or logits.shape[1] != model.n_experts:
        raise InputError(f"logits must have shape [tokens, {model.n_experts}], not {list(logits.shape)}")
    bias = np.zeros(model.n_experts, np.float32) if bias is None else _as_float32("bias", bias)
    if bias.shape != (model.n_experts,):
        raise InputError(f"bias must have shape [{model.n_experts}], not {list(bias.shape)}")
    if np.isnan(logits).any() or np.isposinf(logits).any() or not np.isfinite(bias).all():
        raise InputError("logits must not hold NaN or +inf, nor bias NaN or an infinity")
    if model.scoring == "softmax" and np.isneginf(logits).all(axis=1).any():
        raise InputError("softmax needs a logit above -inf in every row")
    ids = np.empty((len(logits), model.top_k), np.int16)
    is_sigmoid, two = model.scoring == "sigmoid", model.group_score == "top2_sum"
    _route_tokens(logits, bias, is_sigmoid, two, model.n_group, model.topk_group, ids)
    return ids


def _as_float32(name: str, values: ArrayLike) -> np.ndarray:
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0, object)
    if array.dtype.kind not in "fiub":
        raise InputError(f"{name} must be an array of numbers")
    with np.errstate(over="ignore"):  # what float32 cannot hold becomes an infinity, and is refused as one
        return np.ascontiguousarray(array, np.float32)


@kernel
def _score(logits, is_sigmoid, out):
    """Scores of one token, float32 as upstream."""
    one = np.float32(1)
    if is_sigmoid:
        for e in range(logits.size):
            out[e] = one / (one + np.exp(-logits[e]))
        return
    largest, total = logits.max(), np.float32(0)
    for e in range(logits.size):
        out[e] = np.exp(logits[e] - largest)
        total += out[e]
    for e in range(logits.size):
        out[e] /= total


@kernel
def _insert(value, index, values, indices):
    """Put `value` into the descending list `values` where it is larger than an entry, after its equals."""
    n = values.size
    if value <= values[n - 1]:
        return
    place = n - 1
    while place > 0 and values[place - 1] < value:
        values[place], indices[place] = values[place - 1], indices[place - 1]
        place -= 1
    values[place], indices[place] = value, index


@kernel
def _route_tokens(logits, bias, is_sigmoid, two, n_group, topk_group, ids):
    n_experts, top_k = logits.shape[1], ids.shape[1]
    size = n_experts // n_group
    choice = np.empty(n_experts, np.float32)
    group_values, groups = np.empty(topk_group, np.float32), np.empty(topk_group, np.int64)
    values, experts = np.empty(top_k, np.float32), np.empty(top_k, np.int64)
    for t in range(logits.shape[0]):
        _score(logits[t], is_sigmoid, choice)
        choice += bias
        group_values[:] = -np.inf
        for g in range(n_group):
            first = second = np.float32(-np.inf)
            for e in range(g * size, (g + 1) * size):
                if choice[e] > first:
                    first, second = choice[e], first
                elif choice[e] > second:
                    second = choice[e]
            _insert(first + second if two and n_group > 1 else first, g, group_values, groups)
        groups.sort()  # experts are visited in ascending order, so that ties go to the lowest
        values[:] = -np.inf
        for place in range(topk_group):
            for e in range(groups[place] * size, (groups[place] + 1) * size):
                _insert(choice[e], e, values, experts)
        for k in range(top_k):
            ids[t, k] = experts[k]
