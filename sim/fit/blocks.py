"""Counts of experts in blocks of recorded tokens."""

import numpy as np

from sim.kernels import kernel
from sim.traffic import RecordedTraffic

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


def load_of(record: RecordedTraffic, n_experts: int) -> np.ndarray:
    """Load of each expert, int64 [layers, n_experts]."""
    return np.stack([np.bincount(layer.ravel(), minlength=n_experts) for layer in record.topk_ids])


def only_sequences(record: RecordedTraffic, chosen: np.ndarray) -> RecordedTraffic:
    """The record of some of its sequences; chosen int64, ascending."""
    starts, lengths = record.starts[chosen], np.diff(record.starts)[chosen]
    tokens = np.concatenate([np.arange(first, first + n) for first, n in zip(starts, lengths, strict=True)])
    return RecordedTraffic(
        record.name, record.phase, np.ascontiguousarray(record.topk_ids[:, tokens]),
        np.concatenate([[0], np.cumsum(lengths)]), f"{record.digest} {len(chosen)} sequences", source=record.source,
    )  # fmt: skip
