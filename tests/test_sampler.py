"""The fast sampler has the law of `route` on fully drawn logits.

Every statistical test has a fixed seed. A family of z-scores is held against the bound that all of them together exceed
with probability 1e-4 if the laws are equal (Bonferroni).
"""

import itertools

import numpy as np
import pytest
from naive import draw_logits as ref_logits
from scipy.stats import chi2, norm

from sim import ModelSpec, load_model, route
from sim.router.draw import draw_trials, grouped_topk
from sim.router.one_token import Address, expert_of, new_token, route_token, sort_token
from sim.router.sampler import sample_trials
from sim.router.tables import fill_layer, layer_of, new_tables
from sim.streams import stream_key
from sim.theory import spread_over_groups
from sim.traffic import SyntheticTraffic
from sim.traffic.synthetic import X0, one_kind

FALSE_ALARM = 1e-4


def z_bound(n_scores):
    return norm.isf(FALSE_ALARM / (2 * n_scores))


def sample(mu, model, group_sigma=0.0, n_tokens=200_000, seed=0, tokens=None, contexts=None, per_request=2**62):
    """Expert ids of the sampler's tokens in one layer: int16 [n_tokens, top_k], and the counts; mu [n_experts], or
    [requests * contexts, n_experts] with the contexts of the tokens.
    """
    tokens = np.array([n_tokens] if tokens is None else tokens)
    logits = np.atleast_2d(np.ascontiguousarray(mu, float))[None]
    counts = np.empty((1, len(tokens), logits.shape[2]), np.int32)
    ids = np.empty((1, tokens[-1], model.top_k), np.int16)
    key, contexts = stream_key(seed, "test"), np.empty((1, 0), np.uint8) if contexts is None else contexts[None]
    topk, kinds = grouped_topk(model, SyntheticTraffic("s", group_sigma=group_sigma)), one_kind(1)
    sample_trials(np.arange(len(logits)), key, topk, logits, contexts, per_request, tokens, kinds, counts, ids)
    return ids[0], counts[0]


def full(mu, model, group_sigma, n_tokens, seed):
    """Expert ids by `route` on fully drawn logits."""
    logits = ref_logits(np.random.default_rng(seed), mu, n_tokens, model.n_group, group_sigma)
    return route(logits + (X0 if model.scoring == "sigmoid" else 0.0), model)


def features(ids, n_experts, n_group):
    """Per token: which experts, how many in each group, and the number of ranks reached of 8 (linear and round robin)."""
    hot = np.zeros((len(ids), n_experts))
    np.put_along_axis(hot, ids.astype(int), 1, axis=1)
    groups = hot.reshape(len(ids), n_group, -1).sum(axis=2)
    ranks = hot.reshape(len(ids), 8, -1).sum(axis=2)
    dealt = hot.reshape(len(ids), -1, 8).sum(axis=1)
    per_rank = np.stack([x.var(axis=1) for x in (ranks, dealt)] + [(x > 0).sum(axis=1) for x in (ranks, dealt)], axis=1)
    return np.concatenate([hot, groups, groups**2, per_rank], axis=1)


def z_scores(a, b):
    """Difference of the means of two samples of features in standard errors (0 where neither varies)."""
    se = np.sqrt(a.var(axis=0) / len(a) + b.var(axis=0) / len(b))
    difference = a.mean(axis=0) - b.mean(axis=0)
    return np.divide(difference, se, out=np.where(difference == 0, 0.0, np.inf), where=se > 0)


MODELS = {
    "v3": load_model("deepseek-v3"),
    "v2": load_model("deepseek-v2"),
    "ungrouped": ModelSpec("u", 64, 6, 1, 1, "softmax", "max"),
    "softmax-top2": ModelSpec("s", 32, 4, 4, 2, "softmax", "top2_sum"),
    "odd groups": ModelSpec("o", 24, 4, 3, 2, "sigmoid", "top2_sum"),
    "exact fit": ModelSpec("e", 32, 8, 8, 2, "sigmoid", "top2_sum"),
    "groups of one": ModelSpec("g", 16, 3, 16, 5, "sigmoid", "max"),
    "all groups": ModelSpec("a", 32, 5, 4, 4, "sigmoid", "top2_sum"),
}


def one_by_one(mu, model, group_sigma, n_tokens, first=0):
    """Expert ids of tokens, each alone, by the words of the rows from `first` on: int16 [n_tokens, top_k]."""
    layer, (k0, k1) = layer_of(new_tables(1, model.n_experts, model.n_group), 0), stream_key(0, "test")
    fill_layer(mu, layer)
    own = new_token(model.n_group, model.topk_group, model.top_k)
    topk = grouped_topk(model, SyntheticTraffic("s", group_sigma=group_sigma))
    found = np.empty((n_tokens, model.top_k), np.int16)
    for token in range(n_tokens):
        route_token(Address(np.uint64(first + token), np.uint64(0), k0, k1), topk, layer, own)
        if model.is_grouped:
            sort_token(int(own.n_slots), own)
        found[token] = [expert_of(own, k) for k in range(model.top_k)]
    return found


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sigma", "group_sigma"), [(0.8, 0.4), (4.0, 0.0)])
def test_tokens_are_those_of_the_one_by_one_form_bit_for_bit(name, sigma, group_sigma):
    """Sharp layers end in the exact scans after many repeats."""
    model, n_tokens = MODELS[name], 600  # two batches and a part of one
    mu = np.random.default_rng(4).normal(0, sigma, model.n_experts)
    found = one_by_one(mu, model, group_sigma, n_tokens)
    np.testing.assert_array_equal(found, sample(mu, model, group_sigma, n_tokens)[0])


def test_alias_tables_hold_the_shares_of_their_weights():
    mu = np.random.default_rng(5).normal(0, 2, 60)
    for n_group in (1, 4, 60):
        layer = layer_of(new_tables(1, 60, n_group), 0)
        fill_layer(mu, layer)
        size = 60 // n_group
        keep, other = (layer.alias >> np.uint64(32)) / 2.0**32, (layer.alias & np.uint64(2**32 - 1)).astype(int)
        share = (keep + np.bincount(other, 1 - keep, 60)) / size
        weight = np.exp(mu).reshape(n_group, size)
        np.testing.assert_allclose(share.reshape(n_group, size), weight / weight.sum(axis=1, keepdims=True), atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("sigma", "group_sigma"), [(0.65, 0.4), (2.0, 1.0)])
def test_same_law_as_route_on_fully_drawn_logits(name, sigma, group_sigma):
    model, n = MODELS[name], 30_000
    mu = sigma * np.random.default_rng(11).standard_normal(model.n_experts)
    comp = features(sample(mu, model, group_sigma, n)[0], model.n_experts, model.n_group)
    ref = features(full(mu, model, group_sigma, n, seed=12), model.n_experts, model.n_group)
    z = np.abs(z_scores(comp, ref))
    assert z.max() < z_bound(z.size), f"feature {z.argmax()}: z = {z.max():.1f}"


@pytest.mark.parametrize("n_group", [1, 4])
def test_a_share_near_one_and_weights_of_zero_are_drawn_exactly(n_group):
    """One expert with nearly all weight of its group sends the sampler through its exact scans."""
    mu = np.zeros(16)
    mu[[0, 5, 9, 14]] = 16.0
    mu[[3, 7]] = -np.inf
    model = ModelSpec("peaked", 16, 3, n_group, min(2, n_group), "softmax", "max")
    n = 40_000
    ids = sample(mu, model, 0.0, n)[0]
    assert not np.isin(ids, [3, 7]).any()
    ref = full(np.where(np.isinf(mu), -80, mu), model, 0.0, n, 7)
    z = np.abs(z_scores(features(ids, 16, n_group), features(ref, 16, n_group)))
    assert z.max() < z_bound(z.size)


@pytest.mark.parametrize("n_group", [1, 2])
def test_experts_of_weight_zero_are_taken_when_nothing_else_is_left(n_group):
    mu = np.full(8, -np.inf)
    mu[[1, 6]] = 0.0
    ids = sample(mu, ModelSpec("few", 8, 4, n_group, n_group, "softmax", "max"), 0.0, 1000)[0]
    assert (np.sort(ids, axis=1)[:, 1:] > np.sort(ids, axis=1)[:, :-1]).all()
    assert (np.isin(ids, [1, 6]).sum(axis=1) == 2).all()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_take_top_k_distinct_experts_of_few_enough_groups(name):
    model = MODELS[name]
    ids, counts = sample(np.random.default_rng(1).normal(size=model.n_experts), model, 0.4, 3000)
    assert (np.diff(np.sort(ids, axis=1), axis=1) > 0).all()
    assert ids.min() >= 0
    assert ids.max() < model.n_experts
    if model.is_grouped:
        assert max(len(set(row)) for row in (ids // model.group_size).tolist()) <= model.topk_group
    np.testing.assert_array_equal(counts[0], np.bincount(ids.ravel(), minlength=model.n_experts))


def test_a_step_is_the_prefix_of_its_trial_whatever_else_is_asked():
    model = load_model("deepseek-v3")
    mu = np.random.default_rng(3).normal(size=256)
    ids, _ = sample(mu, model, 0.4, 2000)
    for tokens in ([1], [7, 511, 512, 513], [1, 2, 1500]):
        shorter, counts = sample(mu, model, 0.4, tokens=tokens)
        np.testing.assert_array_equal(shorter, ids[: tokens[-1]])
        for step, count in zip(tokens, counts, strict=True):
            np.testing.assert_array_equal(count, np.bincount(ids[:step].ravel(), minlength=256))


def test_tokens_of_a_request_share_its_taste():
    """Variance of an expert's count over multinomial: about 1 for decode, above it within one request."""
    model = load_model("deepseek-v3")
    over = {}
    for name, request_sigma in (("decode", 0.0), ("prefill", 1.0)):
        traffic = SyntheticTraffic(name, request_sigma=request_sigma, tokens_per_request=64)
        counts, _ = draw_trials(model, traffic, 0, range(1500), 1500, np.array([64]))
        share = counts[:, 0].mean(axis=0) / 64
        over[name] = (counts[:, 0].var(axis=0) / (64 * share * (1 - share))).mean()
    assert abs(over["decode"] - 1) < 0.02
    assert over["prefill"] > 2


def test_requests_change_where_they_should():
    """With one token per request, and with requests longer than the trial, prefix and length agree with the definition."""
    model = load_model("olmoe-1b-7b")
    short = SyntheticTraffic("short", request_sigma=1.0, tokens_per_request=100)
    counts, _ = draw_trials(model, short, 0, range(40), 40, np.array([100, 200, 250]))
    longer, _ = draw_trials(model, short, 0, range(40), 40, np.array([50, 100, 200]))
    np.testing.assert_array_equal(counts[:, 0], longer[:, 1])
    np.testing.assert_array_equal(counts[:, 1], longer[:, 2])
    assert (counts.sum(axis=2) == 8 * np.array([100, 200, 250])).all()


@pytest.mark.parametrize("name", ["v3", "v2", "ungrouped", "softmax-top2", "exact fit"])
def test_a_token_has_the_experts_of_its_context_bit_for_bit(name):
    """Two requests of 150 tokens in 8 contexts: the m-th token of a context has the m-th row of that context's words, which are
    its own; so it has the law of a token of one context.
    """
    model, rng = MODELS[name], np.random.default_rng(6)
    mu, contexts = rng.normal(0, 1, (16, model.n_experts)), rng.integers(0, 8, 300).astype(np.uint8)
    comp, counts = sample(mu, model, 0.4, tokens=[1, 70, 200, 300], contexts=contexts, per_request=150)
    ref = np.empty_like(comp)
    for row in range(16):
        mine = np.flatnonzero((np.arange(300) // 150 == row // 8) & (contexts == row % 8))
        ref[mine] = one_by_one(mu[row], model, 0.4, len(mine), first=150 * row)
    np.testing.assert_array_equal(comp, ref)
    for step, count in zip([1, 70, 200, 300], counts, strict=True):
        np.testing.assert_array_equal(count, np.bincount(ref[:step].ravel(), minlength=model.n_experts))


BATCHES, N_BATCH = 40, 50_000


def many_tokens(mu, model, group_sigma=0.0):
    """Two million tokens of one layer, in batches of ids."""
    for batch in range(BATCHES):
        yield sample(mu, model, group_sigma, N_BATCH, seed=batch)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["v3", "v2", "softmax-top2", "odd groups", "all groups"])
def test_two_million_tokens_spread_over_groups_by_the_exact_law(name):
    """Chi-square against the probabilities by integration, false-alarm rate 1e-4: uniform traffic, tokens independent."""
    model, found = MODELS[name], {}
    for ids in many_tokens(np.zeros(model.n_experts), model):
        taken = 1 << 4 * (ids // model.group_size).astype(np.int64)  # of a group so many sixteenths
        for code, n in zip(*np.unique(taken.sum(axis=1), return_counts=True), strict=True):
            spread = tuple(sorted((int(code >> 4 * g & 15) for g in range(model.n_group)), reverse=True))[
                : model.topk_group
            ]
            found[spread] = found.get(spread, 0) + n
    shape = model.n_group, model.group_size, model.topk_group, model.top_k
    exact = spread_over_groups(*shape, model.group_score == "top2_sum", model.scoring, X0)
    n_tokens, rare = BATCHES * N_BATCH, {spread for spread, p in exact.items() if p * BATCHES * N_BATCH < 20}
    assert set(found) <= set(exact)
    expected = np.array([p * n_tokens for spread, p in exact.items() if spread not in rare])
    seen = np.array([found.get(spread, 0) for spread in exact if spread not in rare])
    expected, seen = np.append(expected, n_tokens - expected.sum()), np.append(seen, n_tokens - seen.sum())
    kept = expected > 1
    assert ((seen - expected)[kept] ** 2 / expected[kept]).sum() < chi2.isf(FALSE_ALARM, max(kept.sum() - 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("weights", [[8, 4, 2, 1, 0.5, 0.5], [1000, 1, 1, 1, 1, 0.1], [1, 1, 1, 1, 1, 1]])
def test_two_million_ungrouped_tokens_are_plackett_luce_in_order(weights):
    """Chi-square over ordered triples against their exact probabilities, false-alarm rate 1e-4 each."""
    share, seen = np.array(weights) / np.sum(weights), np.zeros((6, 6, 6))
    for ids in many_tokens(np.log(weights), ModelSpec("pl", 6, 3, 1, 1, "softmax", "max")):
        np.add.at(seen, tuple(ids.T), 1)
    n_tokens = seen.sum()
    expected = np.zeros_like(seen)
    for i, j, k in itertools.permutations(range(6), 3):
        expected[i, j, k] = share[i] * share[j] / (1 - share[i]) * share[k] / (1 - share[i] - share[j]) * n_tokens
    assert seen[expected == 0].sum() == 0
    common = expected >= 20
    rare = seen[~common].sum(), expected[~common].sum()
    statistic = ((seen - expected)[common] ** 2 / expected[common]).sum()
    statistic += (rare[0] - rare[1]) ** 2 / rare[1] if rare[1] > 1 else 0.0
    assert statistic < chi2.isf(FALSE_ALARM, common.sum() - 1 + (rare[1] > 1))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mu", "group_sigma"),
    [([0.0] * 12, 0.4), (np.linspace(-1.5, 1.5, 12), 0.0), ([6.0, 0, 0, 0, 0, 5.0, 0, 0, 0, 0, 0, 8.0], 0.4)],
)
@pytest.mark.parametrize(("top_k", "group_score"), [(4, "top2_sum"), (3, "max"), (6, "top2_sum")])
def test_sets_of_300_000_tokens_are_as_often_as_by_route(mu, group_sigma, top_k, group_score):
    """Two-sample chi-square over all sets of experts, false-alarm rate 1e-4: twelve experts in three groups, two kept,
    some of them dominant; with top_k below, at and above the experts that kept groups begin with.
    """
    model = ModelSpec("small", 12, top_k, 3, 2, "sigmoid", group_score)
    found = np.zeros((2, 2**12))
    for batch in range(6):
        for row, ids in enumerate(
            (
                sample(mu, model, group_sigma, N_BATCH, seed=batch)[0],
                full(np.array(mu), model, group_sigma, N_BATCH, batch),
            )
        ):
            found[row] += np.bincount((1 << ids.astype(int)).sum(axis=1), minlength=2**12)
    total = found.sum(axis=0)
    common = total >= 40
    found = np.column_stack([found[:, common], found[:, ~common].sum(axis=1)])
    total = found.sum(axis=0)
    difference, total = (found[0] - found[1])[total > 0], total[total > 0]
    assert (difference**2 / total).sum() < chi2.isf(FALSE_ALARM, len(total) - 1)
