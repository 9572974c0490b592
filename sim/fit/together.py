"""Experts that go together: pairs that a token takes, and experts of successive layers, beyond what their loads give.

Top-k without replacement makes experts of a token avoid each other, so the product of two shares is no reference. Given how
many experts a token takes of a group (all top_k of an ungrouped router), those of a group that have no more to do with each
other than their loads demand are a conditional Poisson sample: P(set) is in proportion to the product of its experts' odds
(Chen, Dempster and Liu 1994). The odds are such that every expert has its measured load, so shares of pairs are exact, without
random numbers, and hold all that popularity and the router's groups give. Between layers the reference is the product: a
token's experts there are drawn apart.

Lifts are taken from one half of the sequences and averaged over the other, so noise does not look like co-selection.
"""

import numpy as np
import pandas as pd

from sim.errors import InputError
from sim.fit.correlation import LEAST_SEQUENCES, evenly
from sim.kernels import kernel
from sim.model import ModelSpec
from sim.stats import half_width, ratio_parts
from sim.streams import PERMUTATION, stream_key, uniforms
from sim.traffic import RecordedTraffic

FEW = 0.05
"""Share of the pairs of experts that are called few."""
_PARTS = 16  # of the sequences, that intervals are taken over: the even ones are of one half, the odd ones of the other
_MOST_TOKENS = 2**18  # of a record with more, some sequences are looked at
_PRIOR = 1.0  # tokens that are added to a pair as seen and as expected: a pair that is hardly seen has no lift
_MOST_LOG_ODDS = 20.0
_ROUNDS, _CLOSE = 50, 1e-5


def others(odds: np.ndarray, top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """Elementary symmetric polynomials of degrees 0 .. top_k - 1 of all odds but each one's, and of 0 .. top_k of all.

    odds float64 [rows, n]; returns float64 [rows, n, top_k] and [rows, top_k + 1].
    """
    n_rows, n = odds.shape
    rest, whole = np.empty((n_rows, n, top_k)), np.empty((n_rows, top_k + 1))
    fill_polynomials(np.ascontiguousarray(odds), rest, whole)
    return rest, whole


@kernel
def fill_polynomials(odds, rest, whole):
    """`others`: odds float64 [rows, n]; rest float64 [rows, n, top_k]; whole float64 [rows, top_k + 1]."""
    n, top_k = rest.shape[1:]
    after, before = np.empty((n + 1, top_k + 1)), np.empty(top_k + 1)
    for row in range(odds.shape[0]):
        after[n], before[:] = 0.0, 0.0
        after[n, 0] = before[0] = 1.0
        for e in range(n - 1, -1, -1):
            after[e, 0] = 1.0
            for j in range(1, top_k + 1):
                after[e, j] = after[e + 1, j] + odds[row, e] * after[e + 1, j - 1]
        for e in range(n):
            for j in range(top_k):
                total = 0.0
                for i in range(j + 1):
                    total += before[i] * after[e + 1, j - i]
                rest[row, e, j] = total
            for j in range(top_k, 0, -1):
                before[j] += odds[row, e] * before[j - 1]
        whole[row] = after[0]


def fit_odds(p: np.ndarray, sizes: np.ndarray, odds: np.ndarray | None = None, rounds: int = _ROUNDS) -> np.ndarray:
    """Odds of conditional Poisson samples in which each expert has probability p.

    Parameters
    ----------
    p : float64 [rows, n]
        Above 0 and below 1.
    sizes : float64 [rows, top_k + 1]
        Probability that a sample has 0 .. top_k experts; their mean is the sum of p.
    odds : float64 [rows, n], optional
        Where to begin.

    Returns
    -------
    float64 [rows, n], of geometric mean 1
    """
    top_k, wanted = sizes.shape[1] - 1, np.log(p / (1 - p))
    log_odds = wanted if odds is None else np.log(odds)
    for _ in range(rounds):
        log_odds = np.clip(log_odds - log_odds.mean(axis=1, keepdims=True), -_MOST_LOG_ODDS, _MOST_LOG_ODDS)
        rest, whole = others(np.exp(log_odds), top_k)
        found = np.exp(log_odds) * np.einsum("rnj,rj->rn", rest, _over(sizes, whole)[:, 1:])
        found = np.clip(found, 1e-12, 1 - 1e-12)
        log_odds = log_odds + wanted - np.log(found / (1 - found))
        if np.abs(found / p - 1).max() < _CLOSE:
            break
    return np.exp(log_odds - log_odds.mean(axis=1, keepdims=True))


def _over(sizes: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """sizes / whole, 0 where there are no samples of a size."""
    return np.divide(sizes, whole, out=np.zeros_like(sizes), where=(sizes > 0) & (whole > 0))


def expected_pairs(ids: np.ndarray, n_experts: int, n_group: int = 1) -> np.ndarray:
    """Share of tokens that would take both of two experts, were it for their loads and the router's groups alone.

    Parameters
    ----------
    ids : int [tokens, top_k]
        Experts of the tokens of a layer.

    Returns
    -------
    float64 [n_experts, n_experts], symmetric; 0 on the diagonal

    Examples
    --------
    Of three experts that are alike, two at a time, each pair is one of three:

    >>> expected_pairs(np.array([[0, 1], [1, 2], [2, 0]]), 3).round(3)
    array([[0.   , 0.333, 0.333],
           [0.333, 0.   , 0.333],
           [0.333, 0.333, 0.   ]])
    """
    (n_tokens, top_k), size = ids.shape, n_experts // n_group
    taken = np.stack([(ids // size == g).sum(axis=1) for g in range(n_group)])  # of each group, by each token
    counts = np.bincount(ids.ravel(), minlength=n_experts)
    half = 0.5 / n_tokens
    p = np.clip(counts / n_tokens, half, 1 - half).reshape(n_group, size)
    sizes = np.stack([np.bincount(of_group, minlength=top_k + 1) for of_group in taken]) / n_tokens
    p *= ((sizes @ np.arange(top_k + 1)) / p.sum(axis=1))[:, None]
    odds = fit_odds(np.clip(p, half / 2, 1 - half / 2), sizes)
    rest, whole = others(odds, top_k)
    each = (
        odds[:, :, None] * rest * _over(np.ones_like(whole), whole)[:, None, 1:]
    )  # given that the group gives 1 .. top_k
    pairs = np.zeros((n_group, size, n_group, size))
    for g in range(n_group):
        if top_k > 1:
            without = np.where(np.eye(size, dtype=bool), 0.0, odds[g])  # a row for each first expert
            of_two = odds[g][:, None] * odds[g] * (others(without, top_k - 1)[0] @ _over(sizes, whole)[g, 2:])
            pairs[g, :, g] = np.where(np.eye(size, dtype=bool), 0.0, of_two)
        for h in range(g):
            both = np.bincount(taken[g] * (top_k + 1) + taken[h], minlength=(top_k + 1) ** 2) / n_tokens
            pairs[g, :, h] = each[g] @ both.reshape(top_k + 1, -1)[1:, 1:] @ each[h].T
            pairs[h, :, g] = pairs[g, :, h].T
    return pairs.reshape(n_experts, n_experts)


@kernel
def count_pairs(first, second, part, counts):
    """Tokens that take expert i of `first` and j of `second`, int16 [tokens, top_k] each: counts int32 [parts, i, j]."""
    counts[:] = 0
    for t in range(part.size):
        for i in range(first.shape[1]):
            for j in range(second.shape[1]):
                counts[part[t], first[t, i], second[t, j]] += 1


def co_selection(record: RecordedTraffic, model: ModelSpec | None = None) -> pd.DataFrame:
    """How much more often experts go together than their loads, and the router's groups, would have it.

    The lift of two experts is the share of tokens that take both, over that of a top-k choice with the same loads in which
    they have no more to do with each other (`expected_pairs`); 1 is independence. A mean lift is that over the pairs of
    experts that tokens take, the lifts being those of the other half of the sequences.

    Parameters
    ----------
    record : RecordedTraffic
        Of at least 16 sequences.
    model : ModelSpec, optional
        Tells the groups and the number of experts.

    Returns
    -------
    DataFrame
        A row for each layer, and one of all (`layer` is 'all'):

        layer
        pair_lift
            Mean lift of two experts that a token takes; nan of top-1 routing.
        excess
            Share of the pairs of experts that are above what was expected of them.
        excess_in_few
            Share of the excess that the 5 % of the pairs have that lead it in the other half.
        next_lift
            Mean lift of an expert of this layer and one of the layer before (nan of the first), which are expected as often
            as the product of their shares.
        next_lift_shuffled
            The same with the tokens of each sequence shuffled in one of the layers: what the sequences' subjects give.

        Lifts have 95 % intervals (`_low`, `_high`) over 16 parts of the sequences.

    Raises
    ------
    InputError
        There are fewer than 16 sequences.

    Source
    ------
    S. X. Chen, A. P. Dempster, J. S. Liu, Weighted finite population sampling to maximize entropy, Biometrika 81 (1994).
    """
    if record.n_sequences < LEAST_SEQUENCES:
        raise InputError(f"{record.name} has {record.n_sequences} sequences; co-selection takes {LEAST_SEQUENCES}")
    if (every := record.n_tokens // _MOST_TOKENS) > 1:
        n = max(record.n_sequences // every, LEAST_SEQUENCES)
        record = record.only_sequences(evenly(record.n_sequences, n))
    n_experts = model.n_experts if model else record.n_experts
    n_group = model.n_group if model and model.is_grouped else 1
    part = np.repeat(np.arange(record.n_sequences) % _PARTS, np.diff(record.starts))
    u = uniforms(stream_key(0, "tokens within sequences"), PERMUTATION, 0, (record.n_tokens, 1))[:, 0]
    shuffled = np.argsort(
        np.repeat(np.arange(record.n_sequences), np.diff(record.starts)) + u
    )  # each within its sequence
    counts = np.empty((_PARTS, n_experts, n_experts), np.int32)
    n_tokens = np.bincount(part, minlength=_PARTS)
    names = ("pair_lift", "excess", "excess_in_few", "next_lift", "next_lift_shuffled")
    sums = np.full((len(names), record.n_layers, 3, _PARTS), np.nan)
    for layer, ids in enumerate(record.topk_ids):
        if ids.shape[1] > 1:
            count_pairs(ids, ids, part, counts)
            counts *= ~np.eye(n_experts, dtype=bool)
            expected = np.stack([expected_pairs(ids[part % 2 == half], n_experts, n_group) for half in (0, 1)])
            sums[:3, layer] = _sums(counts, n_tokens, expected)
        if layer > 0:
            before = record.topk_ids[layer - 1]
            for row, of_before in ((3, before), (4, before[shuffled])):
                count_pairs(of_before, ids, part, counts)
                of_half = [counts[half::2].sum(axis=0) for half in (0, 1)]
                expected = np.stack([np.outer(n.sum(axis=1), n.sum(axis=0)) / n.sum() for n in of_half])
                expected /= np.array([n_tokens[half::2].sum() for half in (0, 1)])[:, None, None]
                sums[row, layer] = _sums(counts, n_tokens, expected)[0]
    rows: list[dict[str, str | float]] = []
    for layers in [*([i] for i in range(record.n_layers)), list(range(record.n_layers))]:
        last = len(rows) == record.n_layers
        found: dict[str, str | float] = {"layer": "all" if last else int(record.layer_ids[layers[0]])}
        for name, of_name in zip(names, sums, strict=True):
            top, bottom, change = np.nansum(of_name[layers], axis=0)
            found[name] = value = top.sum() / bottom.sum() if bottom.any() else np.nan
            if "lift" in name:
                half = half_width(ratio_parts(change, bottom)[1]) if bottom.any() else np.nan
                found |= {f"{name}_low": value - half, f"{name}_high": value + half}
        rows.append(found)
    return pd.DataFrame(rows)


def _sums(counts: np.ndarray, n_tokens: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """Of the mean lift, the excess and its share in few pairs: numerators, denominators, and by how much each part of the
    sequences moves the numerator; float64 [3, 3, parts].

    A mean lift is a sum of p**2 / expected over pairs of experts, and what is expected follows the loads p. So a part moves it
    by twice the lifts of its pairs, less the mean lifts of their experts.

    counts int32 [parts, n, n], tokens that take both; n_tokens int64 [parts]; expected float64 [2, n, n], shares by each half
    of the parts, even and odd.
    """
    sums = np.zeros((3, 3, _PARTS))
    for half in (0, 1):
        mine, n = counts[half::2].sum(axis=0), n_tokens[half::2].sum()
        lift = (mine + _PRIOR) / (n * expected[half] + _PRIOR)
        of_row, of_column = ((mine * lift).sum(axis=i) / np.maximum(mine.sum(axis=i), 1) for i in (1, 0))
        moves = 2 * lift - of_row[:, None] - of_column
        beyond = (mine - n * expected[half]).ravel()
        leading = np.argsort(-beyond)[: max(int(FEW * (beyond.size - len(mine))), 1)]
        for other in range(1 - half, _PARTS, 2):
            theirs = counts[other]
            excess = (theirs - n_tokens[other] * expected[1 - half]).ravel()
            above = excess[beyond > 0].sum()
            sums[0, :, other] = (theirs * lift).sum(), theirs.sum(), (theirs * moves).sum()
            sums[1, :2, other], sums[2, :2, other] = (above, theirs.sum()), (excess[leading].sum(), above)
    return sums
