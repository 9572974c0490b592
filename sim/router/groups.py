"""Group scores of a batch of tokens, and the groups that are kept. Loops are short and touch few arrays each, because
only then does the compiler vectorise them.
"""

import numpy as np

from sim.kernels import kernel
from sim.router.batch import LATE, gather
from sim.router.tables import draw_mark
from sim.streams import exp32, exponential, normal_pair


@kernel
def _fill_factors(words, n, sigma, out):
    """Group effects exp(sigma * normal) of two groups: words uint32 [2, n], out float32 [2, n]."""
    word_0, word_1, out_0, out_1 = words[0], words[1], out[0], out[1]
    for i in range(n):
        z_0, z_1 = normal_pair(word_0[i], word_1[i])
        out_0[i] = exp32(sigma * z_0)
        out_1[i] = exp32(sigma * z_1)


@kernel
def _fill_times(words, n, rate, factor, mark, others, time_1, time_2):
    """First two distinct arrivals of one group: words uint32 [2, n]."""
    word_1, word_2 = words[0], words[1]
    gather(n, others, mark, time_2)
    for i in range(n):
        time_1[i] = exponential(word_1[i]) / (rate * factor[i])
    for i in range(n):
        rest = time_2[i]
        t = min(time_1[i] + exponential(word_2[i]) / (rest * factor[i]), LATE)
        time_2[i] = t if rest > 0 else np.float32(np.inf)


@kernel
def _fill_scores(time_1, time_2, n, score_law, out):
    """Group scores: an arrival at t scores 1 / (b + a t); `score_law` (b, a, both) sums the first, or the first two."""
    b, a, one = np.float32(score_law[0]), np.float32(score_law[1]), np.float32(1)
    if score_law[2] > 0:
        for i in range(n):
            out[i] = one / (b + a * time_1[i]) + one / (b + a * time_2[i])
    else:
        for i in range(n):
            out[i] = one / (b + a * time_1[i])


@kernel
def score_groups(n, layer, group_sigma, score_law, batch):
    """Group effects, first arrivals and group scores of n tokens; returns the number of words used per token."""
    words, alias = batch.words, layer.alias
    n_group = layer.group_weight.size
    size = alias.size // n_group
    row = 0
    for g in range(0, n_group, 2):
        _fill_factors(words[row : row + 2], n, np.float32(group_sigma), batch.factor[g : g + 2])
        row += 2
    for g in range(n_group):
        mark, word = batch.mark[g], words[row]
        for i in range(n):
            mark[i] = draw_mark(word[i], g, size, alias)
        time_1, time_2 = batch.time_1[g], batch.time_2[g]
        rate = layer.group_weight[g]
        _fill_times(words[row + 1 : row + 3], n, rate, batch.factor[g], mark, layer.others, time_1, time_2)
        _fill_scores(time_1, time_2, n, score_law, batch.score[g])
        row += 3
    return row


@kernel
def keep_groups(n, topk_group, batch):
    """The topk_group best groups of n tokens, ties to the lowest, with their first arrivals."""
    n_group = batch.score.shape[0]
    for g in range(n_group):
        rank, mine = batch.rank[g], batch.score[g]
        rank[:n] = 0
        for h in range(n_group):
            theirs = batch.score[h]
            if h < g:
                for i in range(n):
                    rank[i] += np.int32(theirs[i] >= mine[i])
            elif h > g:
                for i in range(n):
                    rank[i] += np.int32(theirs[i] > mine[i])
    kept, rank = batch.kept, batch.rank
    for i in range(n):
        place = 0
        for g in range(n_group):
            kept[place, i] = g
            place += rank[g, i] < topk_group
    batch.left[:, :n] = -1
    for j in range(topk_group):
        next_time, group, time_1 = batch.next_time[j], kept[j], batch.time_1
        for i in range(n):
            next_time[i] = time_1[np.uint32(group[i]), i]
