"""Routed tokens of synthetic traffic, drawn without drawing every logit: the law of `route` at a small part of its cost.

A logit is log(w_e) + log(f_g) + Gumbel noise, so exp(-logit) is an exponential time of rate w_e f_g, and the k largest
logits are the k first to arrive (Yellott 1977; Efraimidis and Spirakis 2006). With a = exp(-x0) an expert that arrives at
time t has the sigmoid score 1 / (1 + a t).

Ungrouped, times do not matter: experts are drawn one after another, each with probability w_e / (w of those left), by drawing
again what repeats. Grouped, a token goes through these steps; W is the weight of a group.

1. Each group gives its first two distinct arrivals: the first at Exp(W f), expert e with probability w_e / W; the second
   after Exp((W - w_e) f), from the others. They make the group score; the topk_group best groups are kept.
2. The token starts with these two experts of each kept group. From its second arrival on, let a kept group send arrivals
   WITH replacement: a Poisson process of rate W f, each arrival expert e with probability w_e / W, whoever came before.
3. Take the earliest arrival over the kept groups. If it is later than the latest expert that the token has, stop. If it is
   an expert that the token has, pass over it; else it takes the latest one's place. Go on with the group's next arrival.

This is exact. Given a group's first two arrivals at t1 < t2, each other expert of it arrives at t2 + Exp(w_e f), by lack of
memory, independently of all else (and of the group scores, which are made of these two). The process of step 2 is the
superposition of independent Poisson processes, one for each expert, of rates w_e f (its marks thin it back into them); the
first point of expert e after t2 lies at t2 + Exp(w_e f). So the first points of the experts other than the two have the law
that is wanted, and later points, and all points of the two, are repeats, to be passed over. An arrival is a repeat exactly
if the token has its expert: a token loses an expert only to an earlier arrival, after which the latest it has is earlier than
the lost one, so that a repeat of it comes after the stop. When the earliest arrival to come is later than the latest expert,
no later one can change anything, and the token has its top_k first. About 1.5 arrivals are needed for a token of
DeepSeek-V3: most tokens end in the rounds that a batch goes through together, the others are finished one by one.

Where one expert has nearly all weight of a group, repeats go on and on. After a fixed number of them each expert that is left
draws its own time from then on, which is exact by lack of memory, since that moment does not depend on what comes after it.
Room is for max(top_k, 2 topk_group) experts; places that no expert has are later than any, and extra ones are dropped in
the end.

A token of an ungrouped router may be of one of several kinds, each with a popularity of its own: it draws its kind, and then
its experts from the tables of that kind.

Every random word is addressed by (trial, token, index): a token's experts do not depend on how many tokens follow it, nor on
the batches that tokens are worked in. Every operation rounds alike on every machine (see `sim.streams`), so rows do.
"""

import numpy as np

from sim.kernels import kernel, part
from sim.router.batch import (
    begin_places,
    draw_distinct,
    draw_kinds,
    drop_kinds,
    expert_row,
    finish,
    keep_groups,
    run_round,
    score_groups,
    sort_experts,
)
from sim.router.one_token import ROUNDS
from sim.router.tables import fill_layer, layer_of, new_tables
from sim.router.workspace import BATCH, GROUP_SIZE, new_workspace, whole
from sim.streams import TOKEN, fill_block

_SPAN = 16 * BATCH  # tokens that are sorted by context at a time
_ROOM = 2**24  # rows of words that each context of a request has, at most: a step has no more tokens


@part
def _fill_words(key, trial, start, n, n_group, rows, groups, words):
    """Words of n tokens: a Philox block for each group, the others one after another."""
    of_groups = n_group + n_group % 2 if n_group > 1 else 0
    for g in range(of_groups):
        fill_block(key, TOKEN, trial, g, start, n, rows, groups + g * GROUP_SIZE, BATCH)
    for j in range((rows.size - words) // (4 * BATCH)):
        fill_block(key, TOKEN, trial, of_groups + j, start, n, rows, words + 4 * j * BATCH, BATCH)


@kernel(inline="always")
def _route_batch(n, start, trial, key, topk, n_sorted, chances, layer, work):
    """Experts of the n tokens from `start` on, the first n_sorted of them best first."""
    rows, words = work.rows, work.words
    _fill_words(key, trial, start, n, topk.n_group, rows, work.groups, words)
    if topk.n_group == 1:
        if chances.size > 1:
            draw_kinds(n, words + topk.top_k * BATCH, chances, work)
        for k in range(topk.top_k):
            draw_distinct(n, start, trial, key, words + k * BATCH, topk.size, layer, work, k)
        if chances.size > 1:
            drop_kinds(n, topk.top_k, topk.size, work)
        return
    score_groups(n, topk, layer, work)
    keep_groups(n, topk.topk_group, topk.n_group, work)
    begin_places(n, start, trial, key, topk, words, layer, work)
    for r in range(ROUNDS):
        run_round(n, words + (2 * topk.topk_group + 2 * r) * BATCH, topk, layer.alias, work)
    finish(n, start, trial, key, topk, layer, work)
    sort_experts(n if 2 * work.n_places > topk.top_k else n_sorted, work)


@part
def _count_experts(rows, places, top_k, start, stop, counts):
    """Add the experts of tokens start .. stop - 1 of a batch to counts [n_experts]."""
    for k in range(top_k):
        row = expert_row(places, k)
        for i in range(start, stop):
            counts[np.uint64(whole(rows, row, i))] += 1


@part
def _sort_contexts(contexts, start, stop, first, order):
    """Tokens start .. stop - 1 by context, those of one as they lie: order int64, of context c from first[c] to
    first[c + 1]; contexts uint8 [tokens], or [0] where there is but one.
    """
    first[:] = 0
    if contexts.size == 0:
        first[1] = stop - start
        for i in range(stop - start):
            order[i] = start + i
        return
    for i in range(start, stop):
        first[contexts[i] + 1] += 1
    for c in range(first.size - 1):
        first[c + 1] += first[c]
    for i in range(stop - 1, start - 1, -1):
        c = contexts[i] + 1
        first[c] -= 1
        order[first[c]] = i
    for c in range(first.size - 1):  # each has come down to where the one before it ends
        first[c] = first[c + 1]
    first[-1] = stop - start


@kernel(inline="always")
def _sample_trial(trial, key, topk, mu, contexts, tokens_per_request, tokens, chances, tables, work, counts, ids):
    """One trial: mu [requests * contexts, kinds * n_experts]; contexts uint8 [tokens], or [0] where a request has but one;
    counts int32 [len(tokens), n_experts]; ids int16 [n, top_k].

    The tokens of a context are worked together; the m-th token that a context of a request has takes the words of row
    (request * contexts + context) * room + m, whatever follows it.
    """
    rows, places, top_k, n_contexts = work.rows, work.places, ids.shape[1], tables.weight.shape[0]
    n_seen, room = np.zeros(n_contexts, np.int64), min(tokens_per_request, _ROOM)
    first, order = np.empty(n_contexts + 1, np.int64), np.empty(_SPAN, np.int64)
    counts[:] = 0
    start, step = np.int64(0), 0  # typed: a literal would compile what it is given to twice
    while start < tokens[-1]:
        request = start // tokens_per_request
        if start == request * tokens_per_request:
            n_seen[:] = 0
        stop = min(tokens[step if n_contexts > 1 else -1], (request + 1) * tokens_per_request, start + _SPAN)
        _sort_contexts(contexts, start, stop, first, order)
        for c in range(n_contexts):
            layer = layer_of(tables, c)
            if n_seen[c] == 0 and first[c] < first[c + 1]:
                fill_layer(mu[request * n_contexts + c], layer)
            for at in range(first[c], first[c + 1], BATCH):
                n, n_ids = min(BATCH, first[c + 1] - at), 0
                while n_ids < n and order[at + n_ids] < ids.shape[0]:
                    n_ids += 1
                row = (request * n_contexts + c) * room + n_seen[c]
                _route_batch(n, row, trial, key, topk, n_ids, chances, layer, work)
                done = 0
                while start + at + n > tokens[step]:  # tokens of one context lie in order
                    _count_experts(rows, places, top_k, done, tokens[step] - start - at, counts[step])
                    done = tokens[step] - start - at
                    step += 1
                _count_experts(rows, places, top_k, done, n, counts[step])
                for i in range(n_ids):
                    of_token = ids[order[at + i]]
                    for k in range(top_k):
                        of_token[k] = whole(rows, expert_row(places, k), i)
                n_seen[c] += n
        start = stop
        step += start == tokens[step]
    for step in range(1, tokens.size):  # so far each has what the one before it lacks
        for e in range(counts.shape[1]):
            counts[step, e] += counts[step - 1, e]


@kernel
def sample_trials(trials, key, topk, mu, contexts, tokens_per_request, tokens, chances, counts, ids):
    """Route trials, by their numbers int64 [trials], with a GroupedTopk.

    mu float64 [trials, requests * contexts, kinds * n_experts]; contexts uint8 [trials, tokens], of each token, or [trials, 0]
    where a request has but one; tokens int64, ascending; chances uint64 [trials, kinds], cumulated, of a token's kind in units
    of 2**-32 (grouped routers have one kind); counts int32 [trials, len(tokens), n_experts], of the first tokens[j] tokens of
    each trial; ids int16 [trials, n, top_k], of its first n tokens, best first.
    """
    n_group, topk_group, n_kinds = topk.n_group, topk.topk_group, chances.shape[1]
    n_requests = (tokens[-1] - 1) // tokens_per_request + 1
    n_contexts = mu.shape[1] // n_requests if contexts.shape[1] else 1
    tables = new_tables(n_contexts, mu.shape[2], n_group * n_kinds)
    n_words = 2 * topk_group + 2 * ROUNDS if n_group > 1 else topk.top_k + (n_kinds > 1)
    work = new_workspace(n_group, topk_group, topk.top_k, n_words)
    for t in range(mu.shape[0]):
        _sample_trial(
            trials[t], key, topk, mu[t], contexts[t], tokens_per_request, tokens, chances[t], tables, work, counts[t],
            ids[t],
        )  # fmt: skip
