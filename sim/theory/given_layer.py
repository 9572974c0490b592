"""Probabilities of events given one layer: the complete U-statistic over steps of its routed tokens, rank by rank."""

import numpy as np

from sim.kernels import kernel

LONGEST = 64  # tokens of a step for which steps are drawn without replacement; longer ones are taken as they come


@kernel
def _fill_binomial(n, p, out):
    """Binomial probabilities of 0 .. out.size - 1 in n trials; returns the range beyond which they are below 1e-18."""
    largest = min(n, out.size - 1)
    mode = min(np.int64((n + 1) * p), largest)
    out[:] = 0.0
    out[mode] = 1.0
    odds = p / (1 - p)
    for i in range(mode + 1, largest + 1):
        out[i] = out[i - 1] * odds * (n - i + 1) / i
    for i in range(mode - 1, -1, -1):
        out[i] = out[i + 1] * (i + 1) / ((n - i) * odds)
    low, high = 0, largest
    while out[low] < 1e-18:
        low += 1
    while out[high] < 1e-18:
        high -= 1
    return low, high


@kernel
def fill_sum_law(counts, tokens, law, here, there):
    """Law of the sum of `tokens` draws without replacement from counts[j] tokens of j experts each.

    Each class gives a binomial number of tokens, and the numbers add up to `tokens`: classes from the largest j on, the
    state being how many tokens and experts came so far. law float64 [largest sum + 1]; here and there float64
    [tokens + 1, largest sum + 1], scratch.
    """
    n_tokens = counts.sum()
    p = tokens / n_tokens
    law[:] = 0.0
    if n_tokens == tokens:
        total = 0
        for j in range(counts.size):
            total += j * counts[j]
        law[total] = 1.0
        return
    ways, others = np.empty(tokens + 1), np.empty(tokens + 1)
    top = counts.size - 1
    while top > 1 and counts[top] == 0:
        top -= 1
    used, previous = 0, top
    here[0, 0] = 1.0
    for j in range(top, 1, -1):
        if counts[j] == 0:
            continue
        low, high = _fill_binomial(counts[j], p, ways)
        more = min(used + high, tokens)
        for n in range(more + 1):
            there[n, j * n : top * n + 1] = 0.0
        for n in range(used + 1):
            lo, hi = previous * n, top * n + 1
            for i in range(low, min(high, tokens - n) + 1):
                weight = ways[i]
                source, sink = here[n, lo:hi], there[n + i, lo + j * i : hi + j * i]
                for s in range(source.size):
                    sink[s] += weight * source[s]
        used, previous = more, j
        here, there = there, here
    low, high = _fill_binomial(counts[1], p, ways)
    _fill_binomial(counts[0], p, others)
    for n in range(used + 1):
        lo, hi = previous * n, top * n + 1
        for i in range(low, min(high, tokens - n) + 1):
            weight = ways[i] * others[tokens - n - i]
            if weight > 0.0:
                source, sink = here[n, lo:hi], law[lo + i : hi + i]
                for s in range(source.size):
                    sink[s] += weight * source[s]
    total = law.sum()
    for s in range(law.size):
        law[s] /= total


@kernel
def score_layers(ids, rank, target, n_ranks, tokens, events, idle, alone, step, shared):
    """What the tokens of each layer say of its target rank.

    ids int16 [layers, tokens of a layer, top_k]; events int64 [events]: A is a load of at least this, or `idle`: at most
    that, where an event m >= 0 of idle ranks asks for A with load 0 and N >= m; alone, step and shared float64 [layers,
    events], as `_Layers` says.
    """
    n_layers, n_tokens, top_k = ids.shape
    largest = tokens * top_k
    counts = np.empty(top_k + 1, np.int64)
    law = np.empty(largest + 1)
    short = tokens <= LONGEST
    here = np.empty((tokens + 1 if short else 1, largest + 1))
    there = np.empty_like(here)
    loads = np.empty(n_ranks, np.int64)
    n_steps = n_tokens // tokens
    for i in range(n_layers):
        counts[:] = 0
        for t in range(n_tokens):
            mine = 0
            for k in range(top_k):
                mine += rank[ids[i, t, k]] == target[i]
            counts[mine] += 1
        if short:
            fill_sum_law(counts, tokens, law, here, there)
            for s in range(largest - 1, -1, -1):
                law[s] += law[s + 1]
        for s in range(n_steps):
            loads[:] = 0
            for t in range(s * tokens, (s + 1) * tokens):
                for k in range(top_k):
                    loads[rank[ids[i, t, k]]] += 1
            mine = loads[target[i]]
            for v in range(events.size):
                if idle:
                    # a negative event -c asks for a load of at most c - 1, of this rank alone
                    hit = mine == 0 if events[v] > 0 else mine < -events[v]
                else:
                    hit = mine >= events[v]
                if hit:
                    others = 0
                    for r in range(n_ranks):
                        others += loads[r] == 0 if idle else loads[r] >= events[v]
                    step[i, v] += 1.0 / n_steps
                    if not idle or others >= events[v]:
                        shared[i, v] += 1.0 / (max(others, 1) * n_steps)
        for v in range(events.size):
            if not short or (idle and events[v] > 1):
                alone[i, v] = step[i, v]
            elif idle:
                alone[i, v] = max(1.0 - law[1 if events[v] > 0 else -events[v]], 0.0)
            else:
                alone[i, v] = law[events[v]] if events[v] <= largest else 0.0
