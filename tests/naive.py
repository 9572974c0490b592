"""Slow, plain references for every kernel."""

import math

import numpy as np

from sim.streams import LOG1P


def philox(counter, key, rounds):
    """Philox4x32 in Python integers, after Salmon et al. 2011."""
    c, k = list(counter), list(key)
    for _ in range(rounds):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def best(values, n):
    """Indices of the n largest values, best first, lowest index on ties."""
    return sorted(range(len(values)), key=lambda i: (-values[i], i))[:n]


def choose(choice, n_group, topk_group, top_k, group_score):
    """Experts of one token from its choice scores."""
    size = len(choice) // n_group
    groups = [list(choice[g * size : (g + 1) * size]) for g in range(n_group)]
    if group_score == "max":
        scores = [max(group) for group in groups]
    else:
        scores = [sum(sorted(group, reverse=True)[:2], np.float32(0)) for group in groups]
    kept = set(best(scores, topk_group)) if n_group > 1 else {0}
    masked = [value if e // size in kept else -math.inf for e, value in enumerate(choice)]
    return best(masked, top_k)


def route(logits, n_group, topk_group, top_k, scoring, group_score, bias=None):
    """Grouped top-k of float32 logits [tokens, experts], one token at a time."""
    ids = []
    for row in np.asarray(logits, np.float32):
        if scoring == "sigmoid":
            score = np.float32(1) / (np.float32(1) + np.exp(-row))
        else:
            weights = np.exp(row - row.max())
            score = weights / weights.sum()
        choice = score if bias is None else score + bias
        ids.append(choose(choice, n_group, topk_group, top_k, group_score))
    return np.array(ids)


def linear(n_experts, ep_size):
    """vLLM 0.33, as FIELD states it."""
    q, m = divmod(n_experts, ep_size)
    return [e // (q + 1) if e < m * (q + 1) else m + (e - m * (q + 1)) // q for e in range(n_experts)]


def scores(counts, rank_of_expert, ep_size):
    """(max load, idle ranks, distinct experts on the busiest rank, most distinct experts) of one block."""
    loads, distinct = [0] * ep_size, [0] * ep_size
    for e, count in enumerate(counts):
        loads[rank_of_expert[e]] += count
        distinct[rank_of_expert[e]] += count > 0
    return max(loads), loads.count(0), distinct[loads.index(max(loads))], max(distinct)


def draw_logits(rng, mu, n_tokens, n_group, group_sigma):
    """Fully drawn logits of Gumbel traffic, float64 [tokens, experts]."""
    size = len(mu) // n_group
    effect = np.repeat(group_sigma * rng.standard_normal((n_tokens, n_group)), size, axis=1)
    return mu + effect + rng.gumbel(size=(n_tokens, len(mu)))


def contexts_of(words, tokens_per_request, tokens, shares, n_contexts, of_passage=None, passage_tokens=None):
    """Context of each token, from the words of each: the first two say whether and of which kind a stretch begins, the third
    its context, the fourth whether a passage of so many contexts begins.
    """
    found, kind, context = [], None, None
    of_segment = np.array(shares) / np.array(tokens)
    for i, (leave, which, where, move) in enumerate(words):
        first = i % tokens_per_request == 0
        leaves = first or leave < round(2**32 / tokens[kind])
        if leaves:
            law = np.cumsum(np.array(shares) / sum(shares) if first else of_segment / of_segment.sum())
            kind = min(k for k in range(len(tokens)) if k == len(tokens) - 1 or which < round(law[k] * 2**32))
        if first or (of_passage and move < round(2**32 / passage_tokens)):
            context = where * n_contexts >> 32
        elif leaves:
            size = of_passage or n_contexts
            context = context // size * size + (where * size >> 32)
        found.append(context)
    return found


def pack(loads, n_packs):
    """EPLB's balanced packing, in float32: (pack, place in it) of each item."""
    if len(loads) == n_packs:
        return [(i, 0) for i in range(n_packs)]
    total, held, where = [np.float32(0)] * n_packs, [0] * n_packs, {}
    for i in best(loads, len(loads)):
        p = min((p for p in range(n_packs) if held[p] < len(loads) // n_packs), key=total.__getitem__)
        where[i] = p, held[p]
        total[p] += loads[i]
        held[p] += 1
    return [where[i] for i in range(len(loads))]


def eplb(loads, n_slots, n_group, n_nodes, ep_size):
    """DeepSeek's EPLB, as FIELD states it, in float32: the expert of each slot."""
    loads = np.asarray(loads, np.float32)
    if n_group % n_nodes:
        n_group = n_nodes = 1
    size, per_node, phy2log = len(loads) // n_group, n_group // n_nodes, []
    nodes = [[None] * per_node for _ in range(n_nodes)]
    for group, (node, place) in enumerate(
        pack([loads[g * size : (g + 1) * size].sum() for g in range(n_group)], n_nodes)
    ):
        nodes[node][place] = group
    for groups in nodes:
        here = [g * size + i for g in groups for i in range(size)]
        copies, slots = dict.fromkeys(here, 1), list(here)
        while len(slots) < n_slots // n_nodes:
            hot = max(here, key=lambda e: loads[e] / np.float32(copies[e]))
            copies[hot] += 1
            slots.append(hot)
        ranks = [{} for _ in range(ep_size // n_nodes)]
        for slot, (rank, place) in zip(
            slots, pack([loads[e] / np.float32(copies[e]) for e in slots], len(ranks)), strict=True
        ):
            ranks[rank][place] = slot
        phy2log += [rank[place] for rank in ranks for place in sorted(rank)]
    return phy2log


def imbalance(loads, phy2log, ep_size):
    """Max / mean rank load under a map with equal slots on each rank, an expert's load split evenly over its copies."""
    per_rank = len(phy2log) // ep_size
    ranks = [
        sum(loads[e] / phy2log.count(e) for e in phy2log[r * per_rank : (r + 1) * per_rank]) for r in range(ep_size)
    ]
    return max(ranks) / (sum(ranks) / ep_size)


def slot_counts(ids, phy2log, n_experts, choice):
    """Pairs of each slot: ids of one step, [tokens][top_k]."""
    copies = [[s for s, expert in enumerate(phy2log) if expert == e] for e in range(n_experts)]
    counts = [0] * len(phy2log)
    if choice == "even":
        for e in range(n_experts):
            n = sum(e in row for row in ids)
            for i in range(n):
                counts[copies[e][i % len(copies[e])]] += 1
        return counts
    for index, row in enumerate(ids):
        for e in row:
            counts[copies[e][index * 2654435769 % 2**32 % len(copies[e])]] += 1
    return counts


def latest_time(time, e, n_group, topk_group, top_k, score_law):
    """The latest arrival at which expert e is still picked, given the arrivals of all others: by bisection on the router."""
    b, a, both = score_law

    def picked(own):
        arrivals = list(time)
        arrivals[e] = own
        scores = [1 / (b + a * t) for t in arrivals]
        return e in choose(scores, n_group, topk_group, top_k, "top2_sum" if both else "max")

    if picked(1e12):
        return math.inf
    low, high = 0.0, 1e12
    if not picked(1e-15):
        return 0.0
    low = 1e-15
    for _ in range(200):
        middle = math.sqrt(low * high)
        low, high = (middle, high) if picked(middle) else (low, middle)
    return low


def picked_experts(weight, arrivals, n_group, topk_group, top_k, score_law):
    """Probability that each expert is picked, given the others' arrivals, one token: float64 [experts]."""
    latest = [latest_time(arrivals, e, n_group, topk_group, top_k, score_law) for e in range(len(weight))]
    return 1 - np.exp(-np.array(weight) * np.array(latest))


def received(ids, phy2log, rank_of_slot, n_ranks, ranks_per_node):
    """Of one step [tokens][top_k]: tokens that each rank and each node receives, and those that each token is sent to.

    Copies: that of vLLM's hash of the token's index.
    """
    copies = {e: [s for s, expert in enumerate(phy2log) if expert == e] for e in set(phy2log)}
    n_nodes = -(-n_ranks // ranks_per_node)
    of_rank, of_node, ranks_per_token, nodes_per_token = [0] * n_ranks, [0] * n_nodes, [], []
    for index, row in enumerate(ids):
        slots = [copies[e][index * 2654435769 % 2**32 % len(copies[e])] for e in row]
        ranks = {rank_of_slot[s] for s in slots}
        nodes = {rank // ranks_per_node for rank in ranks}
        for rank in ranks:
            of_rank[rank] += 1
        for node in nodes:
            of_node[node] += 1
        ranks_per_token.append(len(ranks))
        nodes_per_token.append(len(nodes))
    return of_rank, of_node, ranks_per_token, nodes_per_token


def score(counts, phy2log, rank_of_slot, n_ranks):
    """Loads and distinct physical experts of each rank: counts of one block, split evenly over the copies."""
    copies = {e: [s for s, expert in enumerate(phy2log) if expert == e] for e in range(len(counts))}
    loads, distinct = [0] * n_ranks, [0] * n_ranks
    for e, count in enumerate(counts):
        for i, s in enumerate(copies[e]):
            pairs = count // len(copies[e]) + (i < count % len(copies[e]))
            loads[rank_of_slot[s]] += pairs
            distinct[rank_of_slot[s]] += pairs > 0
    return loads, distinct


def fma(a, b, c):
    """a * b + c in float32: the product is exact in float64, whose own rounding is seen once in some 2**29 sums."""
    return np.float32(np.float64(np.float32(a)) * np.float64(np.float32(b)) + np.float64(np.float32(c)))


def horner(coefficients, x):
    """Polynomial by multiply-adds, the highest coefficient first."""
    value = np.float32(coefficients[0])
    for c in coefficients[1:]:
        value = fma(value, x, c)
    return value


def exponential(word):
    """Exponential of a word, operation by operation as the kernel does it."""
    half = int(word) >> 1
    small = half < 2**29
    u = fma(np.float32(half if small else 2**31 - 1 - half), np.float32(2.0**-31), np.float32(2.0**-32))
    if small:
        f, exponent = -u, np.float32(0)
    else:
        e = math.floor(math.log2(float(u) / 0.75))
        f, exponent = np.float32(np.float32(float(u) / 2.0**e) - np.float32(1)), np.float32(e)
    return np.float32(-fma(exponent, np.float32(np.log(2)), np.float32(horner(LOG1P[::-1], f) * f)))


def exp32(x):
    """exp of a float32, operation by operation as the kernel does it."""
    k = np.floor(fma(x, np.float32(1 / np.log(2)), np.float32(0.5)))
    r = fma(-k, np.float32(-2.12194440e-4), fma(-k, np.float32(0.693359375), x))
    return np.float32(horner([1 / math.factorial(n) for n in range(7, -1, -1)], r) * np.float32(2.0 ** int(k)))


def normal_pair(word_radius, word_angle):
    """Two normals, operation by operation as the kernel does it."""
    radius = np.sqrt(np.float32(np.float32(2) * exponential(word_radius)))
    quadrant = ((int(word_angle) + 2**29) % 2**32) >> 30
    signed = (int(word_angle) - (quadrant << 30) + 2**31) % 2**32 - 2**31
    angle = np.float32(np.float32(signed) * np.float32(2 * np.pi * 2.0**-32))
    q = np.float32(angle * angle)
    sine = fma(np.float32(angle * q), horner([1 / 362880, -1 / 5040, 1 / 120, -1 / 6], q), angle)
    cosine = horner([1 / 40320, -1 / 720, 1 / 24, -1 / 2, 1], q)
    first, second = [(cosine, sine), (-sine, cosine), (-cosine, -sine), (sine, -cosine)][quadrant]
    return np.float32(radius * first), np.float32(radius * second)


def moments(values, n_trials):
    """Sums over draws of Y, Y squared and n * Y, of rows of whole numbers Y."""
    columns = list(zip(*values, strict=True))
    total, square = [sum(y) for y in columns], [sum(v * v for v in y) for y in columns]
    return total, square, [sum(n * v for n, v in zip(n_trials, y, strict=True)) for y in columns]
