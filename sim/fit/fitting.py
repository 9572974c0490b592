"""Synthetic traffic fitted to measured loads of a model's layers and, where tokens are known, to the effect of requests."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from sim.errors import InputError
from sim.fit.correlation import (
    LEAST_SEQUENCES,
    Decay,
    decay_of,
    evenly,
    fitted_blocks,
    pick_covariance,
    sequence_counts,
)
from sim.fit.effects import RequestEffect, match_covariance
from sim.fit.kinds import Kinds, fit_kinds
from sim.fit.popularity import LayerFit, fit_layer
from sim.fit.strength import fit_strength_sd
from sim.kernels import usable_processors
from sim.model import ModelSpec
from sim.progress import phase, track
from sim.traffic import FittedLayers, LoadCounts, RecordedTraffic, SyntheticTraffic
from sim.traffic.split import load_of

GROUP_SIGMA = 0.4
"""Group effect of grouped routers, which loads do not identify: that of the presets, fitted to DeepSeek-R1."""
FACTORS = 8
"""Factors that experts share in a request's effect."""
_SEQUENCE = 64  # lag of two tokens of a sequence whose correlation is that of its shares
_OF_REQUESTS = (
    *("about", "request_sigma", "tokens_per_request"),
    *("local_share", "context_tokens", "context_shares", "passage_share", "passage_tokens", "strength_sd"),
)
_MOST_SEQUENCES = 20_000
_LAYERS_OF_STRENGTH, _OF_STRENGTH = 4, 4096  # and requests that they are fitted on, while strengths are tried
_LEAST_CORRELATION = 1e-3
_LEAST_LOCAL = 0.001  # so that effects are of one strength, as they are fitted, also where nothing decays
_MOST_SIGMA = 5.0
_WANTED_RMS = 0.01
_ALIKE = 0.9  # of the experts of a token, where all sequences have it: batches differ in the last digits


@dataclass(frozen=True, eq=False)
class FittedTraffic:
    """A fitted workload.

    Attributes
    ----------
    decode : SyntheticTraffic
        Every token a request of its own.
    prefill : SyntheticTraffic or None
        The tokens of a request share its effect; None where sequences do not show one.
    rms : float64 [phases, layers]
        Root mean square of fitted / measured share of experts - 1, weighted by their shares, on other random numbers than
        those of the fit.
    seconds : float64 [layers]
        Time of each layer's fit and check on its thread.
    notes : list of str
    """

    decode: SyntheticTraffic
    prefill: SyntheticTraffic | None
    rms: np.ndarray
    seconds: np.ndarray
    notes: list[str]


def fit_traffic(
    model: ModelSpec,
    data: RecordedTraffic | LoadCounts,
    *,
    seed: int = 0,
    group_sigma: float = GROUP_SIGMA,
    threads: int | None = None,
) -> FittedTraffic:
    """Fit traffic to the measured loads of each layer, and to the correlation within sequences where tokens are known.

    Popularity is such that the router picks each expert as often as measured (see `fit_layer`). The request effect varies as
    the experts do that sequences favour; with several experts a token, the picks of two tokens of a sequence covary as
    measured (`match_covariance`). Requests differ in strength as blocks do (`fit_strength_sd`). Strength, local share and the
    lengths of contexts are such that the correlation within blocks of 2 to 256 tokens is the measured one (`fit_decay`).
    Tokens are of several kinds where these predict which experts other sequences take together (`fit_kinds`). Routers with
    groups have no kinds, and requests of one strength: others made held-out means better and p99 worse.

    Parameters
    ----------
    model : ModelSpec
        The router; the data must be of it (`read_traffic` checks).
    data : RecordedTraffic or LoadCounts
    seed : int
    group_sigma : float
        Of a grouped router.
    threads : int
        By default all processors. The fit does not depend on it.

    Raises
    ------
    InputError
        Loads that no router of this model gives.
    """
    n_shared = 0
    if isinstance(data, RecordedTraffic):
        data, n_shared = without_shared_prefix(data)
    load = load_of(data, model.n_experts)
    wanted, notes = wanted_shares(load, model, data.name)
    if n_shared:
        notes.append(
            f"all sequences begin with the same {n_shared} tokens, which are left out: prefix caching computes them once"
        )
    group_sigma = group_sigma if model.is_grouped else 0.0
    n_layers = len(load)
    kinds: list[Kinds] | None = None
    layers = [1.0] * n_layers, [f"{i} of {n_layers}" for i in range(1, n_layers + 1)]
    ungrouped = data if isinstance(data, RecordedTraffic) and not model.is_grouped else None
    of_strength = 0.0 if ungrouped is None else 3 * min(_LAYERS_OF_STRENGTH / n_layers, 1.0)
    parts = {"correlation": 0.2, "kinds": 0.3, "strength": of_strength, "layers": 1.0}  # of the time, about
    with phase("correlation", parts):
        effect_of, decay = _request_effects(model, data, wanted, group_sigma, notes)

    about = f"fitted to {data.name}, digest {data.digest}"
    common: dict[str, Any] = {"name": Path(data.name.removeprefix("file:")).stem, "fitted_to": model.name}
    common |= {"source": about, "popularity": "fitted", "group_sigma": group_sigma}

    def fit_one(layer: int, strength_sd: float, n_requests: int | None = None) -> LayerFit:
        effect = None if effect_of is None else effect_of(layer)._replace(strength_sd=strength_sd)
        of_tokens = None if kinds is None else kinds[layer]
        return fit_layer(
            model, layer, wanted[layer], effect, of_tokens, seed=seed, group_sigma=group_sigma, n_requests=n_requests
        )

    with ThreadPoolExecutor(threads or usable_processors()) as pool:
        if ungrouped is not None:
            with phase("kinds", parts):
                kinds = fit_kinds(ungrouped, model.n_experts, lambda of, numbers: track(pool.map(of, numbers), *layers))
        strength_sd = 0.0
        if ungrouped is not None and decay is not None:
            some = evenly(n_layers, _LAYERS_OF_STRENGTH)
            traffic_of = partial(_prefill, data=ungrouped, decay=decay, common=common)
            with phase("strength", parts):
                strength_sd = fit_strength_sd(
                    model,
                    replace(ungrouped, topk_ids=ungrouped.topk_ids[some]),
                    lambda sd: traffic_of(list(pool.map(fit_one, some, repeat(sd), repeat(_OF_STRENGTH)))),
                    seed,
                )
        with phase("layers", parts):
            found = list(track(pool.map(fit_one, range(n_layers), repeat(strength_sd)), *layers))
    rms = np.array([layer.rms for layer in found]).T
    for name, of_phase, why in zip(("decode", "prefill"), rms, ("", ", for want of random requests"), strict=False):
        if (n_bad := int((of_phase > _WANTED_RMS).sum())) > 0:
            off = f"to worse than {_WANTED_RMS:.0%} (rms of shares {of_phase.max():.1%}{why})"
            notes.append(f"{name}: {n_bad} of {n_layers} layers are fitted {off}")
    of_decode = SyntheticTraffic(
        about="decode: tokens independent given the layer", **common,
        layers=FittedLayers.of(np.round([layer.decode.mu for layer in found], 4), **_kind_tables(found)),
    )  # fmt: skip
    of_prefill = None
    if decay is not None and isinstance(data, RecordedTraffic):
        of_prefill = _prefill(found, data, decay, common)
    return FittedTraffic(of_decode, of_prefill, rms, np.array([layer.seconds for layer in found]), notes)


def _kind_tables(found: list[LayerFit]) -> dict[str, Any]:
    """Kinds of tokens of fitted layers, as `FittedLayers.of` takes them."""
    if found[0].kind_shares is None:
        return {}
    return {
        "kind_shares": [layer.kind_shares for layer in found],
        "kind_effects": [layer.kind_effects for layer in found],
    }


def _prefill(found: list[LayerFit], data: RecordedTraffic, decay: Decay, common: dict[str, Any]) -> SyntheticTraffic:
    """Traffic of fitted layers whose tokens share the effect of their request."""
    prefill = [(layer.prefill, layer.effect) for layer in found if layer.prefill and layer.effect]
    request_sigma = float(np.sqrt(np.mean([popularity.strength**2 for popularity, _ in prefill])))
    request_sigma = min(request_sigma, _MOST_SIGMA)  # the tables hold what is beyond
    tables = FittedLayers.of(
        np.round([popularity.mu for popularity, _ in prefill], 4),
        np.round([popularity.strength / request_sigma * effect.sd for popularity, effect in prefill], 4),
        np.round([popularity.strength / request_sigma * effect.loadings for popularity, effect in prefill], 4),
        **_kind_tables(found),
    )
    return SyntheticTraffic(
        about="prefill: the tokens of a request share its effect", **common,
        request_sigma=round(request_sigma, 4), tokens_per_request=round(float(np.diff(data.starts).mean())),
        local_share=tuple(max(round(layer.local_share, 4), _LEAST_LOCAL) for layer in found), context_tokens=decay.tokens,
        context_shares=decay.shares, passage_share=tuple(round(layer.passage_share, 4) for layer in found),
        passage_tokens=decay.passage_tokens, strength_sd=prefill[0][1].strength_sd, layers=tables,
    )  # fmt: skip


def without_shared_prefix(data: RecordedTraffic) -> tuple[RecordedTraffic, int]:
    """A record without the tokens that all its sequences begin with, such as a common prompt, and how many these are.

    They are the same tokens over and over, which an engine with prefix caching computes once; as experts that sequences
    favour they would be taken for an effect of requests, which differ.
    """
    lengths, n = np.diff(data.starts), 0
    while n < lengths.min() - 1:
        ids = np.sort(data.topk_ids[:, data.starts[:-1] + n], axis=2)
        if data.n_sequences < 2 or (ids == np.median(ids, axis=1, keepdims=True)).mean() < _ALIKE:
            break
        n += 1
    if n == 0:
        return data, 0
    kept = np.arange(data.n_tokens) - np.repeat(data.starts[:-1], lengths) >= n
    starts = np.concatenate([[0], np.cumsum(lengths - n)])
    return replace(data, topk_ids=np.ascontiguousarray(data.topk_ids[:, kept]), starts=starts), n


def wanted_shares(load: np.ndarray, model: ModelSpec, name: str) -> tuple[np.ndarray, list[str]]:
    """Share of tokens that pick each expert, float64 [layers, experts], of sum top_k; and remarks.

    Experts without load are taken at half a count, and no expert is picked by more than all tokens but half a one.
    """
    if model.top_k >= model.n_experts:
        raise InputError(
            f"model {model.name}: every token takes all {model.n_experts} experts; there is nothing to fit"
        )
    tokens = load.sum(axis=1, keepdims=True, dtype=float) / model.top_k
    half = (
        np.minimum(0.5, tokens / 100) if load.max() > 1 else 1e-6 * tokens
    )  # shares instead of counts have no half count
    unused = int((load == 0).sum())
    notes = [f"{unused} experts without any load are taken at half a count"] if unused else []
    too_many = (load > tokens * (1 + 1e-6)).any(axis=1)
    if too_many.any():
        layer = int(too_many.argmax())
        raise InputError(
            f"workload {name}: layer {layer} has an expert with more than 1/{model.top_k} of the load, which top-{model.top_k} "
            "routing cannot give: another model?"
        )
    p = np.maximum(load, half) / tokens
    for _ in range(100):
        p = np.minimum(p * (model.top_k / p.sum(axis=1, keepdims=True)), 1 - half / tokens)
    return p, notes


def _request_effects(
    model: ModelSpec, data: RecordedTraffic | LoadCounts, p: np.ndarray, group_sigma: float, notes: list[str]
) -> tuple[Callable[[int], RequestEffect] | None, Decay | None]:
    """How to find the request effect of a layer, and its decay; None where the data do not show any."""
    if isinstance(data, LoadCounts):
        notes.append("loads do not show requests: the workload has no prefill phase")
        return None, None
    lengths, decay = np.diff(data.starts), decay_of(data, model.n_experts)
    if decay is None:
        notes.append(
            f"fewer than {LEAST_SEQUENCES} sequences, or too short ones, show no request effect: no prefill phase"
        )
        return None, None
    correlations = np.maximum([decay.near, decay.passage, decay.far], _LEAST_CORRELATION)
    of_sequence = np.maximum(decay.at([_SEQUENCE])[:, 0], _LEAST_CORRELATION)
    chosen = evenly(len(lengths), _MOST_SEQUENCES)
    counts = sequence_counts(data, model.n_experts)[:, chosen]
    block, first = fitted_blocks(data)

    @cache
    def effect(layer: int) -> RequestEffect:
        covariance = _logit_covariance(counts[layer], lengths[chosen], float(of_sequence[layer]))
        # With one expert a token shares already are the logits, and matching predicts no better in twice the time.
        if model.top_k > 1 and len(first):
            measured = pick_covariance(data, layer, block, model.n_experts)
            covariance = match_covariance(model, group_sigma, p[layer], *measured, covariance)
        return _factors(covariance, *map(float, correlations[:, layer]))

    return effect, decay


def _logit_covariance(counts: np.ndarray, lengths: np.ndarray, correlation: float) -> np.ndarray:
    """Covariance of the logits of requests, of mean variance 1, counts int64 [sequences, experts].

    A sequence's shares are drawn towards the layer's as by a beta prior with the correlation, and turned into logits by
    ln(-ln(1 - p)).
    """
    weight = lengths / lengths.sum()
    prior = (1 - correlation) / correlation
    p = counts.sum(axis=0) / lengths.sum()
    share = (counts + prior * p) / (lengths[:, None] + prior)
    logit = np.log(-np.log1p(-np.clip(share, 1e-9, 0.999)))
    logit -= weight @ logit
    covariance = (weight[:, None] * logit).T @ logit
    return covariance / max(float(np.trace(covariance)) / len(p), 1e-12)


def _factors(covariance: np.ndarray, near: float, passage: float, far: float) -> RequestEffect:
    """Request effect by principal factors: those with the largest variances are kept, and what they leave of each expert's
    variance is its own.
    """
    variance, factor = np.linalg.eigh(covariance)
    loadings = (factor[:, -FACTORS:] * np.sqrt(np.maximum(variance[-FACTORS:], 0))).T
    loadings *= np.where(loadings.sum(axis=1, keepdims=True) < 0, -1.0, 1.0)  # the sign is free: the same everywhere
    own = np.sqrt(np.maximum(np.diag(covariance) - (loadings**2).sum(axis=0), 0))
    return RequestEffect(own, loadings, near, passage, far)


def fit_text(fit: FittedTraffic) -> str:
    """A fitted workload as the text of a TOML file that `load_workload` reads."""
    decode, prefill = fit.decode, fit.prefill
    assert decode.layers is not None
    head = {"about": decode.about, "source": decode.source, "fitted_to": decode.fitted_to, "popularity": "fitted"}
    text = tomli_w.dumps(head | {"group_sigma": decode.group_sigma}) + _table("mu", decode.layers.mu)
    if decode.layers.kind_shares is not None:
        text += "# Kinds of tokens, which make experts go together.\n" + _kinds(decode.layers)
    if prefill is not None and prefill.layers is not None:
        of_requests = {key: getattr(prefill, key) for key in _OF_REQUESTS}
        text += "\n[prefill]  # --phase prefill: what differs where the tokens of a request follow each other\n"
        text += tomli_w.dumps(of_requests)
        text += "".join(_table(key, getattr(prefill.layers, key)) for key in ("mu", "request_sd", "request_loadings"))
        text += _kinds(prefill.layers)
    return text


def _kinds(layers: FittedLayers) -> str:
    names = ("kind_shares", "kind_effects")
    return "".join(_table(name, getattr(layers, name)) for name in names if getattr(layers, name) is not None)


def _table(name: str, values: np.ndarray) -> str:
    """A table with a row to a line, where tomli_w would take a line for each number."""
    rows = "".join(f"  {np.round(row, 4).tolist()},\n" for row in values)
    return f"{name} = [\n{rows}]\n"
