"""How the tokens of recorded routing depend on each other: counts of experts in blocks, and their variance."""

import numpy as np

from sim.kernels import kernel
from sim.streams import TOKEN, stream_key, uniforms
from sim.traffic import RecordedTraffic
from sim.traffic.split import load_of

BLOCKS = (16, 64, 256)
"""Numbers of tokens that variances are taken at."""
_LEAST_BLOCKS = 8
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


def run_starts(record: RecordedTraffic, n: int) -> np.ndarray:
    """First tokens of the blocks of n tokens that sequences are cut into, int64; 20,000 of them, evenly, where there are
    more.
    """
    lengths = np.diff(record.starts)
    per_sequence = lengths // n
    of_block = np.repeat(np.arange(len(lengths)), per_sequence)
    place = np.arange(len(of_block)) - np.repeat(np.cumsum(per_sequence) - per_sequence, per_sequence)
    first = record.starts[of_block] + n * place
    if len(first) > _MOST_BLOCKS:
        first = first[np.linspace(0, len(first) - 1, _MOST_BLOCKS).astype(np.int64)]
    return first


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
