"""Kinds of tokens: a low-rank effect on the experts of single tokens, fitted to which experts tokens take together.

A token is of one of a few kinds, and each kind has its own popularity of experts: a mixture, fitted by expectation and
maximisation, in which the experts of a token of known kind are a conditional Poisson sample (see `sim.fit.together`). Kinds
are kept if they make the experts of other sequences likelier than loads alone do.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np

from sim.fit.together import fit_odds, others
from sim.streams import TOKEN, stream_key, uniforms
from sim.traffic import RecordedTraffic

KINDS = 8
"""With 8 the held-out ranks per token of gpt-oss are within 1.6 % at EP 4, and 5.8 % without; 16 gain another 0.3 %."""
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
        chosen.append(tokens[np.linspace(0, len(tokens) - 1, min(len(tokens), _MOST_TOKENS)).astype(np.int64)])

    def fit_layer(layer: int) -> tuple[Kinds, float]:
        fitted, held = (_indicators(record.topk_ids[layer, tokens], n_experts) for tokens in chosen)
        return _fit_layer(fitted, held, record.topk_ids.shape[2], layer)

    found = list(map_layers(fit_layer, range(record.n_layers)))
    return [kinds for kinds, _ in found] if sum(gain for _, gain in found) > 0 else None


def _indicators(ids: np.ndarray, n_experts: int) -> np.ndarray:
    """Whether each token takes each expert, float32 [tokens, n_experts]."""
    taken = np.zeros((len(ids), n_experts), np.float32)
    np.put_along_axis(taken, ids.astype(np.int64), 1.0, axis=1)
    return taken


def _sizes(rows: int, top_k: int) -> np.ndarray:
    """Samples that all have top_k experts, for `fit_odds`."""
    return np.tile(np.eye(top_k + 1)[top_k], (rows, 1))


def _inside(p: np.ndarray, top_k: int) -> np.ndarray:
    """Probabilities above 0 and below 1, of sum top_k."""
    p = np.clip(p, 1e-6, 1 - 1e-3)
    for _ in range(5):
        p = np.minimum(p * (top_k / p.sum(axis=1, keepdims=True)), 1 - 1e-3)
    return p


def _likelihood(taken: np.ndarray, shares: np.ndarray, odds: np.ndarray, top_k: int) -> tuple[float, np.ndarray]:
    """Mean log likelihood of tokens, and the probability of each kind given a token's experts, float32 [tokens, kinds]."""
    constant = np.log(shares) - np.log(others(odds, top_k)[1][:, top_k])
    of_kind = taken @ np.log(odds).T.astype(np.float32) + constant.astype(np.float32)
    most = of_kind.max(axis=1, keepdims=True)
    weight = np.exp(of_kind - most)
    total = weight.sum(axis=1, keepdims=True)
    return float((most + np.log(total)).mean(dtype=float)), weight / total


def _fit_layer(taken: np.ndarray, held: np.ndarray, top_k: int, layer: int) -> tuple[Kinds, float]:
    """Kinds of a layer, begun at the experts of random tokens; and by how much the log likelihood of a held-out token rises."""
    p = taken.mean(axis=0, dtype=float)
    u = uniforms(stream_key(0, "first kinds"), TOKEN, layer, (1, KINDS))[0]
    first = taken[(u * len(taken)).astype(np.int64)]
    sizes, shares, last = _sizes(KINDS, top_k), np.full(KINDS, 1 / KINDS), -np.inf
    odds = fit_odds(_inside(0.5 * p + 0.5 * first, top_k), sizes)
    for _ in range(_ROUNDS):
        likelihood, of_kind = _likelihood(taken, shares, odds, top_k)
        if likelihood - last < _CLOSE:
            break
        last = likelihood
        n = of_kind.sum(axis=0, dtype=float) + _PRIOR
        shares = n / n.sum()
        odds = fit_odds(_inside((of_kind.T @ taken + _PRIOR * p) / n[:, None], top_k), sizes, odds, _INNER)
    alone = fit_odds(_inside(p[None], top_k), _sizes(1, top_k))
    gain = _likelihood(held, shares, odds, top_k)[0] - _likelihood(held, np.ones(1), alone, top_k)[0]
    picked = _inside((of_kind.T @ taken + _PRIOR * p) / (of_kind.sum(axis=0, dtype=float) + _PRIOR)[:, None], top_k)
    return Kinds(np.round(shares, 4), picked), gain
