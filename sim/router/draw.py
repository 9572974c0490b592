"""Routed tokens of any workload: the one way from traffic to expert counts."""

import json
from dataclasses import replace
from typing import Any

import numpy as np

from sim.errors import InputError
from sim.model import ModelSpec, load_model
from sim.model.spec import ROUTED_SCORINGS
from sim.router.sampler import sample_trials
from sim.router.tables import GroupedTopk
from sim.streams import stream_key
from sim.traffic import RecordedTraffic, SyntheticTraffic, Workload
from sim.traffic.synthetic import X0, one_kind

_ONE_REQUEST = 2**62  # tokens per request where requests have no effect
_HELD_LOGITS = 2**22  # of the requests of some trials, at a time


def routing_law(model: ModelSpec, workload: Workload) -> dict[str, object]:
    """Everything that changes the law of the experts that tokens take, and nothing else."""
    law: dict[str, object] = {"n_experts": model.n_experts, "top_k": model.top_k, "traffic": workload.law}
    if model.is_grouped and not isinstance(workload, RecordedTraffic):
        law |= {"n_group": model.n_group, "topk_group": model.topk_group}
        law |= {"scoring": model.scoring, "group_score": model.group_score}
    return law


def check_pair(model: ModelSpec, workload: Workload) -> None:
    """Refuse a model and a workload that do not go together: a record or a fitted table of another model, kinds of tokens or an
    unknown scoring with a grouped router. Raises InputError.
    """
    if isinstance(workload, RecordedTraffic):
        workload.check_model(model.n_experts, model.top_k, model.name)
        return
    if workload.layers is not None and workload.layers.mu.shape[1] != model.n_experts:
        raise InputError(
            f"workload {workload.name} is fitted to {workload.layers.mu.shape[1]} experts, model {model.name} has "
            f"{model.n_experts}"
        )
    if workload.layers is not None and workload.layers.kind_shares is not None and model.is_grouped:
        raise InputError(
            f"workload {workload.name} has kinds of tokens, which routers with groups (model {model.name}) do not take"
        )
    if model.is_grouped and model.scoring not in ROUTED_SCORINGS:
        raise InputError(
            f"model {model.name}: grouped routing with scoring '{model.scoring}' is not known; known: softmax, sigmoid"
        )


def model_for(workload: Workload, model: ModelSpec) -> ModelSpec:
    """The model where the workload goes with it, else the one that the workload is fitted to. Raises InputError without one."""
    try:
        check_pair(model, workload)
    except InputError:
        if isinstance(workload, RecordedTraffic) or workload.layers is None or not workload.fitted_to:
            raise
        return load_model(workload.fitted_to)
    return model


def score_law(model: ModelSpec) -> np.ndarray:
    """(b, a, both): an expert that arrives at time t has the score 1 / (b + a t), up to a factor that a token shares."""
    sigmoid = model.scoring == "sigmoid"
    return np.array([1.0 if sigmoid else 0.0, np.exp(-X0) if sigmoid else 1.0, model.group_score == "top2_sum"])


def grouped_topk(model: ModelSpec, workload: SyntheticTraffic) -> GroupedTopk:
    """The rule of a model under the group effects of a workload."""
    law = tuple(score_law(model).astype(np.float32))
    return GroupedTopk(
        model.n_group, model.group_size, model.topk_group, model.top_k, np.float32(workload.group_sigma), law
    )


def draw_trials(
    model: ModelSpec, workload: Workload, seed: int, trials: Any, n_draws: int, tokens: np.ndarray, n_ids: int = 1
) -> tuple[np.ndarray, np.ndarray]:
    """Route the tokens of trials; trial t belongs to layer draw t % n_draws.

    A trial is a stream of tokens, and its step of T tokens is the first T of them, whatever other steps are asked for.
    The correction bias is taken as zero: its work, evening out the load in training, is in the popularity already.

    `trials` are their numbers, a range or int64; tokens int64 [steps], ascending, are those of a step. Returned are the tokens
    that take each expert, dummy tokens among them, int32 [trials, steps, n_experts], and the experts of the first tokens, int16
    [trials, n_ids, top_k] (of recorded prefill at most one).
    """
    key, trials = token_key(model, workload, seed), np.asarray(trials, np.int64)
    counts = np.empty((len(trials), len(tokens), model.n_experts), np.int32)
    ids = np.empty((len(trials), n_ids, model.top_k), np.int16)
    if isinstance(workload, RecordedTraffic):
        workload.sample(key, trials, tokens, counts, ids)
        return counts, ids
    draws, row = np.unique(trials % n_draws, return_inverse=True)
    mu = workload.draw_popularity(key, draws, model.n_experts)
    _route(model, workload, key, mu[row], trials, draws[row], tokens, counts, ids)
    if workload.dummy_tokens:
        dummy = _draw_other_tokens(model, workload, seed, "dummy", mu, draws, 1)
        counts += workload.dummy_tokens * dummy[row]
    return counts, ids


def draw_loads(model: ModelSpec, workload: SyntheticTraffic, seed: int, draws: range, n_tokens: int) -> np.ndarray:
    """Loads that a balancer may be fitted on: how many of n_tokens other tokens, from the layers of some draws, take each expert,
    float64 [draws, n_experts].

    The popularity is that of the draw, the tokens (and their requests) come from a stream that no trial uses.
    """
    key, numbers = token_key(model, workload, seed), np.asarray(draws, np.int64)
    mu = workload.draw_popularity(key, numbers, model.n_experts)
    return _draw_other_tokens(model, workload, seed, "fit", mu, numbers, n_tokens)[:, 0].astype(float)


def token_key(model: ModelSpec, workload: Workload, seed: int) -> np.ndarray:
    """Key of the stream of trials."""
    return stream_key(seed, _token_law(model, workload))


def _token_law(model: ModelSpec, workload: Workload) -> str:
    """What the streams of a step's own tokens are keyed by: the same with dummy tokens and without."""
    own = workload if isinstance(workload, RecordedTraffic) else replace(workload, dummy_tokens=0)
    return json.dumps(routing_law(model, own), sort_keys=True)


def _draw_other_tokens(
    model: ModelSpec, workload: SyntheticTraffic, seed: int, what: str, mu: np.ndarray, draws: np.ndarray, n_tokens: int
) -> np.ndarray:
    """Counts of tokens that no trial uses, of the layers of draws int64 [draws], int32 [draws, 1, n_experts]."""
    key = stream_key(seed, f"{_token_law(model, workload)}|{what}")
    counts = np.empty((len(mu), 1, model.n_experts), np.int32)
    ids = np.empty((len(mu), 1, model.top_k), np.int16)
    _route(model, workload, key, mu, draws, draws, np.array([n_tokens]), counts, ids)
    return counts


def _route(
    model: ModelSpec,
    workload: SyntheticTraffic,
    key: np.ndarray,
    mu: np.ndarray,
    trials: np.ndarray,
    draws: np.ndarray,
    tokens: np.ndarray,
    counts: np.ndarray,
    ids: np.ndarray,
) -> None:
    """Route the tokens of trials int64 [trials] of the draws given, of popularity mu float64 [trials, n_experts]."""
    per_request = workload.tokens_per_request if workload.request_sigma else _ONE_REQUEST
    chances, effects = workload.kinds(draws)
    of_request = workload.n_contexts * chances.shape[1] * model.n_experts
    size = max(1, _HELD_LOGITS // (-(-int(tokens[-1]) // per_request) * of_request))
    for i in range(0, len(mu), size):
        part = slice(i, i + size)
        logits = workload.draw_logits(key, mu[part], trials[part], draws[part], int(tokens[-1]))
        if effects is not None:
            logits = (logits[:, :, None, :] + effects[part, None]).reshape(*logits.shape[:2], -1)
        contexts = workload.draw_contexts(key, trials[part], int(tokens[-1]))
        sample_trials(
            trials[part], key, grouped_topk(model, workload), np.ascontiguousarray(logits), contexts, per_request, tokens,
            chances[part], counts[part], ids[part],
        )  # fmt: skip


def route_layers(
    model: ModelSpec, workload: SyntheticTraffic, seed: int, what: str, mu: np.ndarray, first: int, n_tokens: int
) -> np.ndarray:
    """Route tokens through layers of given popularity mu float64 [layers, n_experts], request effects included, by the group
    effects and the noise of a workload: int16 [layers, n_tokens, top_k].

    `what` names the stream (tokens of different names, and those of trials, are independent), `first` is the number of the first
    layer in it.
    """
    counts = np.empty((len(mu), 1, model.n_experts), np.int32)
    ids = np.empty((len(mu), n_tokens, model.top_k), np.int16)
    sample_trials(
        first + np.arange(len(mu)), stream_key(seed, what), grouped_topk(model, workload),
        np.ascontiguousarray(mu)[:, None, :], np.empty((len(mu), 0), np.uint8), _ONE_REQUEST, np.array([n_tokens]),
        one_kind(len(mu)), counts, ids,
    )  # fmt: skip
    return ids
