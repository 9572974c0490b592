"""Kinds of tokens: a low-rank effect on the experts of single tokens, fitted to which experts tokens take together.

A token is of one of a few kinds, and each kind has its own popularity of experts: a mixture, fitted by expectation and
maximisation, in which the experts of a token of known kind are a conditional Poisson sample (see `sim.fit.together`). Kinds
are kept if they make the experts of other sequences likelier than loads alone do.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sim.fit.correlation import evenly
from sim.fit.together import fit_odds, others
from sim.kernels import kernel
from sim.streams import TOKEN, stream_key, uniforms
from sim.traffic import RecordedTraffic

KINDS = 8
"""With 8 the held-out ranks per token of gpt-oss are within 1.6 % at EP 4, and 5.8 % without; 16 gain another 0.3 % (decode)."""
LEAST_TOKENS = 32
"""Tokens per expert below which no kinds are fitted."""
_MOST_TOKENS = 20_000  # of a layer
_PRIOR = 20.0  # tokens with the layer's own popularity that are added to each kind
_ROUNDS, _INNER = 60, 4
_CLOSE = 1e-5  # of the mean log likelihood of a token


class Kinds(NamedTuple):
    """Kinds of the tokens of a layer."""

    shares: np.ndarray  # float64 [kinds], of the tokens
    picked: np.ndarray  # float64 [kinds, experts], probability that a token of a kind picks an expert; sums to top_k


def fit_kinds(
    record: RecordedTraffic, n_experts: int, map_layers: Callable[..., Iterable[Any]] = map
) -> list[Kinds] | None:
    """Kinds of the tokens of an ungrouped router, fitted to the even-numbered sequences.

    Parameters
    ----------
    record : RecordedTraffic
    n_experts : int
    map_layers : callable
        `map`, or that of a pool.

    Returns
    -------
    list of Kinds, or None
        Of each layer. None where there is nothing to fit: fewer than 32 tokens per expert in
        a half, one expert per token; or where kinds do not predict the odd-numbered sequences.
    """
    if record.topk_ids.shape[2] < 2:
        return None
    chosen = []
    for half in (0, 1):
        tokens = np.flatnonzero(np.repeat(np.arange(record.n_sequences) % 2 == half, np.diff(record.starts)))
        if len(tokens) < LEAST_TOKENS * n_experts:
            return None
        chosen.append(tokens[evenly(len(tokens), _MOST_TOKENS)])

    def fit_layer(layer: int) -> tuple[Kinds, float]:
        fitted, held = (record.topk_ids[layer, tokens] for tokens in chosen)
        return _fit_layer(fitted, held, n_experts, layer)

    found = list(map_layers(fit_layer, range(record.n_layers)))
    return [kinds for kinds, _ in found] if sum(gain for _, gain in found) > 0 else None


def _sizes(rows: int, top_k: int) -> np.ndarray:
    """Samples that all have top_k experts, for `fit_odds`."""
    return np.tile(np.eye(top_k + 1)[top_k], (rows, 1))


def _inside(p: np.ndarray, top_k: int) -> np.ndarray:
    """Probabilities above 0 and below 1, of sum top_k."""
    p = np.clip(p, 1e-6, 1 - 1e-3)
    for _ in range(5):
        p = np.minimum(p * (top_k / p.sum(axis=1, keepdims=True)), 1 - 1e-3)
    return p


def _expect(ids: np.ndarray, shares: np.ndarray, odds: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """Mean log likelihood of tokens; and by kind the tokens, and those that take each expert, float64 [kinds] and
    [kinds, experts], each token counting for the kinds that it may be of.
    """
    n, taken = np.zeros(len(shares)), np.zeros(odds.shape)
    constant = np.log(shares) - np.log(others(odds, ids.shape[1])[1][:, -1])
    return sum_kinds(ids, np.log(odds), constant, n, taken) / len(ids), n, taken


@kernel
def sum_kinds(ids, log_odds, constant, n, taken):
    """Log likelihood of tokens, int16 [tokens, top_k], and by kind the tokens and their experts: log_odds float64
    [kinds, experts], constant float64 [kinds], n float64 [kinds], taken float64 [kinds, experts], which are added to.
    """
    n_kinds, total = constant.size, 0.0
    weight = np.empty(n_kinds)
    for t in range(ids.shape[0]):
        most = -np.inf
        for kind in range(n_kinds):
            weight[kind] = constant[kind]
            for k in range(ids.shape[1]):
                weight[kind] += log_odds[kind, ids[t, k]]
            most = max(most, weight[kind])
        whole = 0.0
        for kind in range(n_kinds):
            weight[kind] = np.exp(weight[kind] - most)
            whole += weight[kind]
        total += most + np.log(whole)
        for kind in range(n_kinds):
            share = weight[kind] / whole
            n[kind] += share
            for k in range(ids.shape[1]):
                taken[kind, ids[t, k]] += share
    return total


def _fit_layer(ids: np.ndarray, held: np.ndarray, n_experts: int, layer: int) -> tuple[Kinds, float]:
    """Kinds of a layer, begun at the experts of random tokens; and by how much the log likelihood of a held-out token rises.

    ids, held int16 [tokens, top_k].
    """
    top_k = ids.shape[1]
    p = np.bincount(ids.ravel(), minlength=n_experts) / len(ids)
    u = uniforms(stream_key(0, "first kinds"), TOKEN, layer, (1, KINDS))[0]
    first = np.zeros((KINDS, n_experts))
    np.put_along_axis(first, ids[(u * len(ids)).astype(np.int64)].astype(np.int64), 1.0, axis=1)
    sizes, shares, last = _sizes(KINDS, top_k), np.full(KINDS, 1 / KINDS), -np.inf
    odds = fit_odds(_inside(0.5 * p + 0.5 * first, top_k), sizes)
    for _ in range(_ROUNDS):
        likelihood, n, taken = _expect(ids, shares, odds)
        if likelihood - last < _CLOSE:
            break
        last, picked = likelihood, _inside((taken + _PRIOR * p) / (n + _PRIOR)[:, None], top_k)
        shares = (n + _PRIOR) / (n + _PRIOR).sum()
        odds = fit_odds(picked, sizes, odds, _INNER)
    alone = fit_odds(_inside(p[None], top_k), _sizes(1, top_k))
    gain = _expect(held, shares, odds)[0] - _expect(held, np.ones(1), alone)[0]
    return Kinds(np.round(shares, 4), picked), gain
