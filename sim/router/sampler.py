"""Routed tokens of Gumbel traffic, drawn without drawing every logit: the law of `route` at a small part of its cost.

A logit is log(w_e) + log(f_g) + Gumbel noise, so exp(-logit) is an exponential time of rate w_e * f_g: the experts of a
group arrive like a Poisson process of rate W_g * f_g whose marks have probability w_e / W_g (a repeated mark is
ignored), and the k largest logits are the k first arrivals. With a = exp(-x0) an expert that arrives at time t has the
sigmoid score 1 / (1 + a t). Per token the first two distinct arrivals of each group give the group scores; only the
kept groups go on, merged in order of time, until top_k experts have arrived. Ungrouped, times do not matter: top_k
distinct marks. (Exponential clocks for the Gumbel maximum: Yellott 1977; Efraimidis and Spirakis 2006.)

Every random word is addressed by (trial, token, index): a token's experts do not depend on how many tokens follow it,
nor on the batches that tokens are worked in. A batch takes its k-th experts together, so that loops run over tokens;
they are short and touch few arrays each, because only then does the compiler vectorise them.
"""

import numpy as np

from sim.kernels import kernel
from sim.router.batch import BATCH, LATE, gather, gather_group, new_batch
from sim.router.groups import keep_groups, score_groups
from sim.router.tables import SMALL, TINY, draw_mark, fill_layer, new_layer
from sim.streams import TOKEN, exponential, fill_words, word_at

_TRIES = 16  # repeated marks before the exact scan; each try is an independent draw, so stopping does not bias


@kernel
def _is_taken(e, chosen, k, i):
    """Whether e is one of the first k experts of token i."""
    taken = False
    for j in range(k):
        taken |= chosen[j, i] == e
    return taken


@kernel
def _untaken_weight(lo, size, weight, chosen, k, i):
    """Weight of the experts of a group that are not among the first k of token i; 0 only if there are none."""
    total, n_left = 0.0, 0
    for e in range(lo, lo + size):
        if not _is_taken(e, chosen, k, i):
            total += weight[e]
            n_left += 1
    return max(total, np.float64(TINY)) if n_left else 0.0


@kernel
def _scan_untaken(word, lo, size, weight, chosen, k, i):
    """Expert drawn among those of a group that token i has not taken, by inverting their cumulated weights."""
    target = (np.float64(word) + 0.5) * 2.0**-32 * _untaken_weight(lo, size, weight, chosen, k, i)
    last = -1  # the lowest expert that is left, should all their weights be 0
    for e in range(lo, lo + size):
        if not _is_taken(e, chosen, k, i) and (last < 0 or weight[e] > 0.0):
            last = e
            target -= weight[e]
            if target < 0.0:
                break
    return last


@kernel
def _redraw(n, start, trial, key, layer, batch, k):
    """Draw the k-th experts of the flagged tokens again until they repeat none; their words are made one by one."""
    alias, chosen, repeated, group = layer.alias, batch.chosen, batch.repeated, batch.group
    k0, k1 = key[0], key[1]
    size = alias.size // layer.group_weight.size
    first_word = batch.words.shape[0] + k * (_TRIES + 1)
    for i in range(n):
        if repeated[i]:
            tries, taken = 0, True
            while taken and tries < _TRIES:
                word = word_at(first_word + tries, start + i, trial, TOKEN, k0, k1)
                e = draw_mark(word, group[i], size, alias)
                taken = False
                for j in range(k):
                    taken |= chosen[j, i] == e
                tries += 1
            if taken:
                word = word_at(first_word + tries, start + i, trial, TOKEN, k0, k1)
                e = _scan_untaken(word, np.int64(group[i]) * size, size, layer.weight, chosen, k, i)
            chosen[k, i] = e


@kernel
def _draw_experts(n, word, start, trial, key, layer, batch, k):
    """The k-th experts of n tokens, each from batch.group: a mark, drawn again while it repeats an earlier one."""
    alias, chosen, group, repeated, mine = layer.alias, batch.chosen, batch.group, batch.repeated, batch.chosen[k]
    size = alias.size // layer.group_weight.size
    for i in range(n):
        mine[i] = draw_mark(word[i], group[i], size, alias)
    repeated[:n] = False
    for j in range(k):
        earlier = chosen[j]
        for i in range(n):
            repeated[i] |= earlier[i] == mine[i]
    _redraw(n, start, trial, key, layer, batch, k)


@kernel
def _find_next(n, batch):
    """The kept group whose arrival is next, of n tokens: its place, group, time and weight left."""
    place, group, now, before = batch.place, batch.group, batch.now, batch.before
    place[:n] = 0
    now[:n] = batch.next_time[0, :n]
    for j in range(1, batch.next_time.shape[0]):
        time = batch.next_time[j]
        for i in range(n):
            sooner = time[i] < now[i]
            now[i] = time[i] if sooner else now[i]
            place[i] = j if sooner else place[i]
    for j in range(batch.next_time.shape[0]):
        group_j, left_j = batch.kept[j], batch.left[j]
        for i in range(n):
            here = place[i] == j
            group[i] = group_j[i] if here else group[i]
            before[i] = left_j[i] if here else before[i]


@kernel
def _take_first_marks(n, batch, k):
    """Where the group's first arrival is next, its expert is the mark that gave the group score."""
    before, mark, chosen = batch.before, batch.mark_now, batch.chosen[k]
    gather_group(n, batch.mark, batch.group, mark)
    for i in range(n):
        chosen[i] = mark[i] if before[i] < 0 else chosen[i]


@kernel
def _take_weight(n, layer, batch, k):
    """Weight that is left in the groups that have just given the k-th experts of n tokens."""
    before, rest, others, weight, chosen = batch.before, batch.rest, batch.others, batch.weight, batch.chosen[k]
    gather(n, layer.others, chosen, others)
    gather(n, layer.weight, chosen, weight)
    n_small = 0
    for i in range(n):
        fewer = before[i] - weight[i]
        rest[i] = others[i] if before[i] < 0 else fewer
        n_small += rest[i] < SMALL * before[i]
    if n_small == 0:
        return
    size = layer.weight.size // layer.group_weight.size
    for i in range(n):
        if rest[i] < SMALL * before[i]:
            rest[i] = _untaken_weight(np.int64(batch.group[i]) * size, size, layer.weight, batch.chosen, k + 1, i)


@kernel
def _advance(n, word, batch):
    """Next arrival of the groups that have just given an expert."""
    before, rest, now, factor, second = batch.before, batch.rest, batch.now, batch.factor_now, batch.second
    gather_group(n, batch.factor, batch.group, factor)
    gather_group(n, batch.time_2, batch.group, second)
    for i in range(n):
        factor[i] = exponential(word[i]) / (rest[i] * factor[i])
    for i in range(n):
        later = min(now[i] + factor[i], LATE) if rest[i] > 0 else np.float32(np.inf)
        now[i] = second[i] if before[i] < 0 else later
    place = batch.place
    for j in range(batch.left.shape[0]):
        left_j, next_j = batch.left[j], batch.next_time[j]
        for i in range(n):
            here = place[i] == j
            left_j[i] = rest[i] if here else left_j[i]
            next_j[i] = now[i] if here else next_j[i]


@kernel
def _route_batch(n, start, trial, key, topk_group, group_sigma, score_law, layer, batch):
    """Experts of the n tokens from `start` on, into batch.chosen."""
    fill_words(key, TOKEN, trial, start, n, batch.words)
    top_k = batch.chosen.shape[0]
    if layer.group_weight.size == 1:
        for k in range(top_k):
            _draw_experts(n, batch.words[k], start, trial, key, layer, batch, k)
        return
    row = score_groups(n, layer, group_sigma, score_law, batch)
    keep_groups(n, topk_group, batch)
    for k in range(top_k):
        _find_next(n, batch)
        _draw_experts(n, batch.words[row + k], start, trial, key, layer, batch, k)
        _take_first_marks(n, batch, k)
        if k + 1 < top_k:
            _take_weight(n, layer, batch, k)
            _advance(n, batch.words[row + top_k + k], batch)


@kernel
def _count_experts(chosen, start, stop, counts):
    """Add the experts of tokens start .. stop - 1 of a batch to counts [n_experts]."""
    for k in range(chosen.shape[0]):
        for i in range(start, stop):
            counts[chosen[k, i]] += 1


@kernel
def _sample_trial(
    trial, key, mu, tokens_per_request, tokens, topk_group, group_sigma, score_law, layer, batch, counts, ids
):
    """One trial: mu [requests, n_experts]; counts int32 [len(tokens), n_experts]; ids int16 [n, top_k]."""
    chosen = batch.chosen
    running = np.zeros(mu.shape[1], np.int32)
    start, snapshot = np.int64(0), 0  # typed: a literal would compile everything below twice
    while start < tokens[-1]:
        request = start // tokens_per_request
        if start == request * tokens_per_request:
            fill_layer(mu[request], layer)
        n = min(BATCH, tokens[-1] - start, (request + 1) * tokens_per_request - start)
        _route_batch(n, start, trial, key, topk_group, group_sigma, score_law, layer, batch)
        done = 0
        while snapshot < tokens.size and tokens[snapshot] <= start + n:
            _count_experts(chosen, done, tokens[snapshot] - start, running)
            done = tokens[snapshot] - start
            counts[snapshot] = running
            snapshot += 1
        _count_experts(chosen, done, n, running)
        for i in range(start, min(start + n, ids.shape[0])):
            ids[i] = chosen[:, i - start]
        start += n


@kernel
def sample_trials(
    first_trial, key, mu, tokens_per_request, tokens, n_group, topk_group, group_sigma, score_law, counts, ids
):
    """Route the trials first_trial .. first_trial + len(mu) - 1.

    mu float64 [trials, requests, n_experts]; tokens int64, ascending; counts int32 [trials, len(tokens), n_experts],
    of the first tokens[j] tokens of each trial; ids int16 [trials, n, top_k], of its first n tokens, best first.
    """
    top_k = ids.shape[2]
    n_words = (n_group + n_group % 2) + 3 * n_group + 2 * top_k if n_group > 1 else top_k
    layer = new_layer(mu.shape[2], n_group)
    batch = new_batch((n_words + 3) // 4 * 4, n_group, topk_group, top_k)
    for t in range(mu.shape[0]):
        _sample_trial(
            first_trial + t,
            key,
            mu[t],
            tokens_per_request,
            tokens,
            topk_group,
            group_sigma,
            score_law,
            layer,
            batch,
            counts[t],
            ids[t],
        )
