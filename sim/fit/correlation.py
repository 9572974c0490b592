"""How the tokens of recorded routing depend on each other: counts of experts in blocks, their variance, and how the
correlation of two tokens' experts decays with the distance between them.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.optimize import nnls

from sim.kernels import kernel
from sim.streams import TOKEN, stream_key, uniforms
from sim.traffic import RecordedTraffic
from sim.traffic.split import load_of
from sim.traffic.synthetic import same_passage

BLOCKS = (16, 64, 256)
"""Numbers of tokens that variances are taken at."""
LAGS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Distances in tokens that correlations are taken at."""
SIZES = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Tokens of the blocks whose correlation a decay is fitted to."""
LENGTHS = (2, 4, 8, 16, 32)
"""Mean lengths of contexts, in tokens, that a fitted decay is mixed of."""
PASSAGE_LENGTHS = (16, 32, 64, 128, 256)
"""Mean lengths of passages, of which a fit takes one."""
_LEAST_BLOCKS = 8
_BLOCK, _SHORT_BLOCK, _TO_FIT = 64, 16, 64  # tokens, and blocks that a layer's effect is fitted to
LEAST_SEQUENCES = 16
_LEAST_SIZES = 7  # up to 16 tokens
_MOST_PLACES = 2**17
_LEAST_CORRELATION = 1e-3
_MIXED_BLOCKS = 2000
_MOST_BLOCKS = 20_000


@kernel
def count_runs(layer, first, n, counts):
    """Experts of n consecutive tokens from each of `first` on: layer int16 [tokens, top_k]; first int64 [blocks]; counts
    int32 [blocks, experts].
    """
    counts[:] = 0
    for b in range(first.size):
        for t in range(first[b], first[b] + n):
            for k in range(layer.shape[1]):
                counts[b, layer[t, k]] += 1


@kernel
def count_both(layer, first, n, both):
    """Tokens of the runs of n from each of `first` on that take two experts (or one): both int64 [experts, experts]."""
    both[:] = 0
    for start in first:
        for t in range(start, start + n):
            for j in range(layer.shape[1]):
                for k in range(layer.shape[1]):
                    both[layer[t, j], layer[t, k]] += 1


@kernel
def count_tokens(layer, tokens, counts):
    """Experts of the tokens of each block: tokens int64 [blocks, n]; counts int32 [blocks, experts]."""
    counts[:] = 0
    for b in range(tokens.shape[0]):
        for i in range(tokens.shape[1]):
            for k in range(layer.shape[1]):
                counts[b, layer[tokens[b, i], k]] += 1


@kernel
def count_sequences(layer, starts, counts):
    """Experts of each sequence: starts int64 [sequences + 1]; counts int64 [sequences, experts]."""
    counts[:] = 0
    for s in range(starts.size - 1):
        for t in range(starts[s], starts[s + 1]):
            for k in range(layer.shape[1]):
                counts[s, layer[t, k]] += 1


def evenly(n: int, most: int) -> np.ndarray:
    """Numbers below n, int64: all, or `most` of them at even distances."""
    return np.linspace(0, n - 1, min(n, most)).astype(np.int64)


def run_starts(record: RecordedTraffic, n: int, apart: int | None = None, most: int | None = None) -> np.ndarray:
    """First tokens of runs of n tokens of a sequence, int64, each `apart` tokens after the one before (default n, which cuts
    sequences into blocks); `most` of them (default 20,000), evenly, where there are more.
    """
    lengths = np.diff(record.starts)
    place = np.arange(record.n_tokens) - np.repeat(record.starts[:-1], lengths)
    first = np.flatnonzero((place % (apart or n) == 0) & (place + n <= np.repeat(lengths, lengths)))
    return first[evenly(len(first), most or _MOST_BLOCKS)]


def fitted_blocks(record: RecordedTraffic) -> tuple[int, np.ndarray]:
    """Tokens of the blocks that a layer's request effect is fitted to, 64, or 16 where too few sequences are as long, and the
    first tokens of these blocks, int64: none where there are too few.
    """
    for n_tokens in (_BLOCK, _SHORT_BLOCK):
        first = run_starts(record, n_tokens)
        if len(first) >= _TO_FIT:
            return n_tokens, first
    return _SHORT_BLOCK, first[:0]


def sequence_counts(record: RecordedTraffic, n_experts: int) -> np.ndarray:
    """Load of each expert by layer and sequence, int64 [layers, sequences, n_experts]."""
    counts = np.empty((record.n_layers, len(record.starts) - 1, n_experts), np.int64)
    for layer, out in zip(record.topk_ids, counts, strict=True):
        count_sequences(layer, record.starts, out)
    return counts


def over_multinomial(counts: np.ndarray, n_tokens: int) -> float:
    """Variance of the experts' counts over blocks, counts [blocks, experts], over that of as many independent tokens: the
    sum over experts of the variance / the sum of n p (1 - p), p the mean share of tokens. 1 for independent tokens, and
    where every token takes the same experts.
    """
    p = counts.mean(axis=0) / n_tokens
    of_multinomial = (n_tokens * p * (1 - p)).sum()
    return float(counts.var(axis=0).sum() / of_multinomial) if of_multinomial > 0 else 1.0


def within_sequences(record: RecordedTraffic, n_tokens: int, n_experts: int) -> np.ndarray | None:
    """`over_multinomial` of each layer, float64 [layers], for blocks of consecutive tokens of one sequence; None where the
    sequences have fewer than 8 such blocks.
    """
    first = run_starts(record, n_tokens)
    if len(first) < _LEAST_BLOCKS:
        return None
    counts = np.empty((len(first), n_experts), np.int32)
    found = []
    for layer in record.topk_ids:
        count_runs(layer, first, n_tokens, counts)
        found.append(over_multinomial(counts, n_tokens))
    return np.array(found)


def across_sequences(record: RecordedTraffic, n_tokens: int, n_experts: int) -> np.ndarray | None:
    """The same for 2000 blocks of tokens that each come from another sequence, weighing sequences alike; None where there
    are fewer sequences than tokens.
    """
    n_sequences = len(record.starts) - 1
    if n_sequences < n_tokens:
        return None
    key = stream_key(0, "tokens across sequences")
    u = uniforms(key, TOKEN, 0, (_MIXED_BLOCKS, n_sequences))
    chosen = np.argpartition(u, n_tokens - 1, axis=1)[:, :n_tokens]
    place = uniforms(key, TOKEN, 1, (_MIXED_BLOCKS, n_tokens))
    lengths = np.diff(record.starts)[chosen]
    tokens = record.starts[chosen] + np.minimum((place * lengths).astype(np.int64), lengths - 1)
    counts = np.empty((_MIXED_BLOCKS, n_experts), np.int32)
    found = []
    for layer in record.topk_ids:
        count_tokens(layer, tokens, counts)
        found.append(over_multinomial(counts, n_tokens))
    return np.array(found)


@kernel
def count_alike(layer, first, lag, alike, counts):
    """Pairs of tokens `first` and first + lag: alike int64 [1] are the experts that both take, counts int64 [2, experts]
    the experts of the first and of the second ones; layer int16 [tokens, top_k]; first int64 [pairs].
    """
    alike[:], counts[:] = 0, 0
    for t in first:
        for k in range(layer.shape[1]):
            counts[0, layer[t, k]] += 1
            counts[1, layer[t + lag, k]] += 1
            for j in range(layer.shape[1]):
                alike[0] += layer[t, k] == layer[t + lag, j]


def lag_correlation(record: RecordedTraffic, n_experts: int) -> dict[int, np.ndarray]:
    """Correlation of the experts of two tokens of a sequence by the distance between them, float64 [layers] by lag.

    The sum over experts of the covariance of picks, over that of their variance; 0 for independent tokens. Of 131,072 pairs,
    evenly, where there are more. Lags are left out where fewer than 16 sequences are 1.25 times as long: other pairs would
    mostly be of the first tokens of sequences, which are like no others.
    """
    lengths, found = np.diff(record.starts), {}
    for lag in LAGS:
        if (lengths > 1.25 * lag).sum() < LEAST_SEQUENCES:
            break
        first = run_starts(record, lag + 1, 1, _MOST_PLACES)
        alike, counts = np.zeros(1, np.int64), np.zeros((2, n_experts), np.int64)
        found[lag] = np.zeros(record.n_layers)
        for i, layer in enumerate(record.topk_ids):
            count_alike(layer, first, lag, alike, counts)
            p = counts / len(first)
            variance = (p * (1 - p)).sum() / 2
            found[lag][i] = (alike[0] / len(first) - (p[0] * p[1]).sum()) / variance if variance > 0 else 0.0
    return found


def pick_covariance(record: RecordedTraffic, layer: int, n_tokens: int, n_experts: int) -> tuple[np.ndarray, float]:
    """Covariance of the experts of two tokens of a block of one sequence, float64 [experts, experts], and its squared error,
    summed over entries, from the difference between the even-numbered sequences and the odd ones.
    """
    first = run_starts(record, n_tokens)
    odd = (np.searchsorted(record.starts, first, side="right") - 1) % 2 == 1
    halves = []
    for part in (first[~odd], first[odd]):
        counts, both = np.empty((len(part), n_experts), np.int32), np.zeros((n_experts, n_experts), np.int64)
        count_runs(record.topk_ids[layer], part, n_tokens, counts)
        count_both(record.topk_ids[layer], part, n_tokens, both)
        p = counts.mean(axis=0) / n_tokens
        of_token = both / (len(part) * n_tokens) - np.outer(p, p)
        halves.append((np.cov(counts.T, bias=True) - n_tokens * of_token) / (n_tokens * (n_tokens - 1)))
    return (halves[0] + halves[1]) / 2, float(((halves[0] - halves[1]) ** 2).sum()) / 4


class Decay(NamedTuple):
    """How correlation falls with the lag: that of two tokens in one context, in one passage and in two, each as often as
    `same_passage(lag)` says.
    """

    near: np.ndarray  # float64 [layers], of two tokens in one context of a request
    passage: np.ndarray  # float64 [layers], in two contexts of one passage
    far: np.ndarray  # float64 [layers], in two passages
    tokens: tuple[float, ...]  # mean lengths of the contexts' stretches
    shares: tuple[float, ...]  # of the tokens in them
    passage_tokens: float

    def at(self, lag: Any) -> np.ndarray:
        """The correlation, float64 [layers, lags]."""
        passage, context = same_passage(lag, self.tokens, self.shares, self.passage_tokens)
        rows = np.outer(self.near - self.passage, context), np.outer(self.passage - self.far, passage)
        return rows[0] + rows[1] + self.far[:, None]


def block_correlation(record: RecordedTraffic, n_experts: int) -> dict[int, np.ndarray]:
    """Mean correlation of the experts of two tokens of a block, float64 [layers] by the tokens n of the block:
    (`over_multinomial` - 1) / (n - 1). Blocks begin at each place of a sequence where they fit, or at 20,000 of them; sizes
    that fewer than 16 sequences have are left out.
    """
    lengths, found = np.diff(record.starts), {}
    for n in SIZES:
        if (lengths >= n).sum() < LEAST_SEQUENCES:
            break
        first = run_starts(record, n, 1)
        counts, found[n] = np.empty((len(first), n_experts), np.int32), np.zeros(record.n_layers)
        for i, layer in enumerate(record.topk_ids):
            count_runs(layer, first, n, counts)
            found[n][i] = (over_multinomial(counts, n) - 1) / (n - 1)
    return found


def pairs_of_blocks(sizes: Sequence[int]) -> np.ndarray:
    """Share of the pairs of tokens of a block that have the lags 1, 2, ..., float64 [sizes, largest size - 1]."""
    lag = np.arange(1, max(sizes))
    return np.array([2 * np.maximum(n - lag, 0) / (n * (n - 1)) for n in sizes])


def fit_decay(
    pairs: np.ndarray, correlation: np.ndarray, lengths: Sequence[int] = LENGTHS,
    passages: Sequence[int] = PASSAGE_LENGTHS,
) -> Decay:  # fmt: skip
    """Decay by least squares of relative errors, none of its parts negative: the length of passages and the mix of `lengths`
    from the mean over layers, and of each layer what two tokens have in one context, one passage and two.

    Parameters
    ----------
    pairs : float64 [points, lags]
        Share of the pairs of tokens of each point that have the lags 1, 2, ...
    correlation : float64 [layers, points]
    """
    mean = np.maximum(correlation.mean(axis=0), _LEAST_CORRELATION)
    lags, one, best = np.arange(1, pairs.shape[1] + 1), np.ones(len(mean)), np.inf
    for passage in passages:
        of_length = [pairs @ same_passage(lags, (length,), (1.0,), passage)[1] for length in lengths]
        of_passage = pairs @ same_passage(lags, (1.0,), (1.0,), passage)[0]
        weights, off = nnls(np.stack([*of_length, of_passage, one], axis=1) / mean[:, None], one)
        if off < best:
            best, passage_tokens, found = off, float(passage), weights[: len(lengths)]
    if found.max() < 1e-6:
        found[-1] = 1.0  # nothing decays within a passage
    kept = found > 1e-3 * found.max()
    tokens = tuple(float(length) for length in np.array(lengths)[kept])
    shares = tuple(np.round(found[kept] / found[kept].sum(), 4).tolist())
    in_passage, in_context = (pairs @ same for same in same_passage(lags, tokens, shares, passage_tokens))
    table = np.stack([in_context, in_passage, one], axis=1) / mean[:, None]
    near, passage, far = np.array([nnls(table, row / mean)[0] for row in correlation]).T
    return Decay(near + passage + far, passage + far, far, tokens, shares, passage_tokens)


def decay_of(record: RecordedTraffic, n_experts: int) -> Decay | None:
    """Decay that fits the blocks of a record; None where fewer than 16 sequences have 16 tokens."""
    found = block_correlation(record, n_experts)
    if len(found) < _LEAST_SIZES:
        return None
    seen = [n for n in PASSAGE_LENGTHS if n <= max(found)]  # a longer one cannot be told from a whole request
    return fit_decay(pairs_of_blocks(list(found)), np.stack(list(found.values()), axis=1), passages=seen)


def same_group(record: RecordedTraffic, n_group: int, n_experts: int) -> np.ndarray:
    """How much more often than by popularity two experts of a token are of one group, float64 [layers].

    Share of a token's pairs of experts that are of one group, over the chance that two different experts, picked in
    proportion to their loads, are.
    """
    load = load_of(record, n_experts)
    p = load / load.sum(axis=1, keepdims=True)
    of_group = p.reshape(len(p), n_group, -1)
    square = (p**2).sum(axis=1)
    by_chance = ((of_group.sum(axis=2) ** 2).sum(axis=1) - square) / (1 - square)
    size, k = n_experts // n_group, record.topk_ids.shape[2]
    pairs = [(i, j) for i in range(k) for j in range(i)]
    groups = record.topk_ids // size
    together = sum((groups[:, :, i] == groups[:, :, j]).mean(axis=1) for i, j in pairs)
    return together / len(pairs) / by_chance
