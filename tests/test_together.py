"""Experts that go together: measured against enumeration and planted pairs, sampled as kinds of tokens, fitted, predicted."""

import io
import itertools
import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from conftest import record_of
from scipy.stats import norm
from test_traffic import a_record

from sim import InputError, ModelSpec, load_workload
from sim.cli import main
from sim.fit import co_selection, fit_text, fit_traffic
from sim.fit.kinds import fit_kinds
from sim.fit.together import expected_pairs, fit_odds
from sim.router import check_pair, draw_trials
from sim.traffic import FittedLayers, SyntheticTraffic

PLAIN = ModelSpec("plain", 16, 4)
GROUPED = ModelSpec("grouped", 32, 4, 4, 2, "sigmoid", "top2_sum", True)


def with_kinds(rng, n_experts=16, n_layers=2, spread=1.5, **other):
    """Traffic of three kinds of tokens."""
    effects = spread * rng.normal(size=(n_layers, 3, n_experts))
    mu = 0.5 * rng.normal(size=(n_layers, n_experts))
    layers = FittedLayers.of(mu, kind_shares=np.tile([0.5, 0.3, 0.2], (n_layers, 1)), kind_effects=effects)
    return SyntheticTraffic("kinds", popularity="fitted", layers=layers, **other)


def tokens_of(model, workload, n_tokens, n_layers=2, length=100):
    """A record of the first tokens of one trial of each layer, in sequences of equal length."""
    _, ids = draw_trials(model, workload, 0, range(n_layers), n_layers, np.array([n_tokens]), n_tokens)
    return record_of(ids.transpose(1, 0, 2), [length] * (n_tokens // length))


def ref_sets(odds, k):
    """Every set of k experts with its probability, in proportion to the product of odds."""
    sets = list(itertools.combinations(range(len(odds)), k))
    p = np.array([np.prod(odds[list(chosen)]) for chosen in sets])
    return sets, p / p.sum()


def ref_pairs(odds, k):
    pairs = np.zeros((len(odds), len(odds)))
    for chosen, p in zip(*ref_sets(odds, k), strict=True):
        for i, j in itertools.permutations(chosen, 2):
            pairs[i, j] += p
    return pairs


def ref_shares(odds, k):
    return np.array(
        [sum(p for chosen, p in zip(*ref_sets(odds, k), strict=True) if e in chosen) for e in range(len(odds))]
    )


def test_expected_pairs_are_those_of_all_sets_with_the_same_loads():
    rng = np.random.default_rng(0)
    ids = (1.2 * rng.normal(size=7) + rng.gumbel(size=(500, 7))).argsort(axis=1)[:, :3]
    comp = expected_pairs(ids, 7)
    p = np.bincount(ids.ravel(), minlength=7) / 500
    odds = fit_odds(p[None], np.array([[0.0, 0, 0, 1]]))[0]
    np.testing.assert_allclose(ref_shares(odds, 3), p, rtol=1e-4)
    np.testing.assert_allclose(comp, ref_pairs(odds, 3), rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(comp.sum(axis=1), 2 * p, rtol=1e-3)  # two other experts for each that a token takes


def test_expected_pairs_hold_what_the_groups_give():
    """Given how many experts a token takes of each group, groups are apart: by enumeration of each number."""
    rng = np.random.default_rng(1)
    logits = rng.normal(size=8) + np.repeat(1.5 * rng.normal(size=(400, 2)), 4, axis=1) + rng.gumbel(size=(400, 8))
    ids = logits.argsort(axis=1)[:, :3]
    comp = expected_pairs(ids, 8, 2)
    taken = np.stack([(ids // 4 == g).sum(axis=1) for g in (0, 1)])
    p = (np.bincount(ids.ravel(), minlength=8) / 400).reshape(2, 4)
    sizes = np.stack([np.bincount(n, minlength=4) for n in taken]) / 400
    odds = fit_odds(p, sizes)
    ref = np.zeros((8, 8))
    for first, second in taken.T:
        for g, n in enumerate((first, second)):
            ref[4 * g : 4 * g + 4, 4 * g : 4 * g + 4] += ref_pairs(odds[g], n)
        both = np.outer(ref_shares(odds[0], first), ref_shares(odds[1], second))
        ref[:4, 4:] += both
        ref[4:, :4] += both.T
    np.testing.assert_allclose(comp, ref / 400, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("model", [PLAIN, GROUPED], ids=["plain", "grouped"])
def test_independent_experts_have_no_lift(model):
    """Within 1 % of 1, where the product of shares would be off by 5 % and more; the excess is nil, layers are apart."""
    workload = replace(load_workload("chat"), sigma=0.9)
    found = co_selection(tokens_of(model, workload, 60_000), model)
    assert found.layer.tolist() == [0, 1, "all"]
    assert found.pair_lift.to_numpy() == pytest.approx(1, abs=0.01)
    assert found.excess.abs().max() < 0.01
    assert found.next_lift[1:].to_numpy() == pytest.approx(1, abs=0.01)
    ids = tokens_of(model, workload, 20_000).topk_ids[0]
    p = np.bincount(ids.ravel(), minlength=model.n_experts) / len(ids)
    naive = np.outer(p, p)[~np.eye(len(p), dtype=bool)].sum()
    assert naive > 1.05 * expected_pairs(ids, len(p), model.n_group).sum()


def test_planted_pairs_and_layers_are_found():
    """Eight couples of experts, of which a token takes two: a couple has lift 5 and other pairs 5 / 7. The next layer repeats
    the experts of this one, or only its sequence's subject.
    """
    rng, n = np.random.default_rng(2), 40_000
    couples = rng.random((n, 8)).argsort(axis=1)[:, :2]
    ids = np.concatenate([2 * couples, 2 * couples + 1], axis=1)
    found = co_selection(record_of(np.stack([ids, (ids + 3) % 16], axis=1), [50] * (n // 50)))
    assert found.pair_lift[0] == pytest.approx((2 * 5 + 4 * 5 / 7) / 6, rel=0.01)
    assert found.excess[0] == pytest.approx((0.25 - 0.05) * 8 / 6, rel=0.02)
    assert found.excess_in_few[0] == pytest.approx(6 / 8, abs=0.02)  # 12 of 240 ordered pairs, of 16 in couples
    assert found.next_lift[1] > 1.5
    assert found.next_lift_shuffled[1] == pytest.approx(1, abs=0.02)
    subjects = co_selection(a_record(rng, [50] * 400, spread=1.0))
    subject = subjects.next_lift[1], subjects.next_lift_shuffled[1]
    assert subject[0] == pytest.approx(subject[1], rel=0.02)
    with pytest.raises(InputError, match="co-selection takes 16"):
        co_selection(a_record(rng, [50] * 15))


@pytest.mark.slow
def test_intervals_of_lifts_cover():
    """95 % intervals of 100 records of 64 sequences, each with a subject, cover the lifts of a record of 6000: at least 90 do."""
    mu, kinds = np.random.default_rng(0).normal(size=16) / 2, np.random.default_rng(1).normal(size=(3, 16))

    def of(seed, n_sequences):
        rng = np.random.default_rng(seed)
        logits = mu + kinds[rng.integers(0, 3, (n_sequences, 40))] + 0.5 * rng.normal(size=(n_sequences, 1, 16))
        layers = [(logits + rng.gumbel(size=logits.shape)).argsort(axis=2)[:, :, -4:].reshape(-1, 4) for _ in range(2)]
        return co_selection(record_of(np.stack(layers, axis=1), [40] * n_sequences)).iloc[2]

    true, found = of(0, 6000), [of(seed, 64) for seed in range(1, 101)]
    for name in ("pair_lift", "next_lift"):
        assert true[name] > 1.03
        assert sum(row[f"{name}_low"] <= true[name] <= row[f"{name}_high"] for row in found) >= 90


@pytest.mark.parametrize("local_share", [None, 0.5])
def test_kinds_are_sampled_exactly(local_share):
    """Pairs of experts of 200,000 tokens and those by Gumbel noise on the kinds' logits: z-scores below the bound that all 120
    exceed with probability 1e-4. With contexts, whose effect is made nil, too.
    """
    rng, n = np.random.default_rng(3), 200_000
    workload = with_kinds(rng, n_layers=1)
    if local_share is not None:
        layers = replace(workload.layers, request_sd=np.zeros((1, 16)))
        workload = replace(workload, layers=layers, request_sigma=1.0, local_share=local_share, tokens_per_request=512)
    counts, ids = draw_trials(PLAIN, workload, 0, range(1), 1, np.array([1000, n]), n)
    np.testing.assert_array_equal(counts[0, 1], np.bincount(ids.ravel(), minlength=16))
    np.testing.assert_array_equal(counts[0, 0], np.bincount(ids[0, :1000].ravel(), minlength=16))
    kind = rng.choice(3, n, p=[0.5, 0.3, 0.2])
    logits = (workload.layers.mu + workload.layers.kind_effects[0])[kind] + rng.gumbel(size=(n, 16))
    ref = logits.argsort(axis=1)[:, -4:]
    comp, other = (
        (lambda x: x.T @ x)(np.stack([(i == e).any(axis=1) for e in range(16)], axis=1).astype(float))
        for i in (ids[0], ref)
    )
    above = np.triu_indices(16, 1)
    z = (comp - other)[above] / np.sqrt((comp + other)[above] * (1 - comp[above] / n) + 1)
    assert np.abs(z).max() < norm.isf(1e-4 / (2 * len(z)))


@pytest.mark.slow
def test_kinds_are_fitted_where_they_are_and_only_there(tmp_path):
    """A fit to tokens of three kinds has their pair lifts to 5 % and their loads; independent tokens are given none."""
    rng = np.random.default_rng(4)
    traffic = with_kinds(rng)
    record = tokens_of(PLAIN, traffic, 20_000)
    fit = fit_traffic(PLAIN, record, threads=1)
    assert fit.decode.layers.kind_effects.shape == (2, 8, 16)
    assert fit.rms[0].max() < 0.01
    again = tokens_of(PLAIN, fit.decode, 20_000)
    lifts = [co_selection(x).pair_lift[2] for x in (record, again)]
    assert lifts[1] == pytest.approx(lifts[0], rel=0.05)
    assert lifts[0] > 1.2
    path = tmp_path / "my.toml"
    path.write_text(fit_text(fit))
    assert load_workload(path).law == fit.decode.law
    with pytest.raises(InputError, match="kinds of tokens, which routers with groups"):
        check_pair(ModelSpec("g", 16, 4, 4, 2), fit.decode)
    assert fit_kinds(tokens_of(PLAIN, replace(load_workload("chat"), sigma=0.9), 20_000), 16) is None
    assert fit_kinds(tokens_of(PLAIN, traffic, 1000, length=50), 16) is None


def test_bad_tables_of_kinds_are_refused():
    for shares, effects, message in (
        ([[1.0]], None, "go together"),
        ([[0.5, 0.4]], np.zeros((1, 2, 16)), "sum to 1"),
        ([[1.0]], np.zeros((1, 2, 16)), "layers and experts of mu"),
        ([[1.0]], np.zeros((1, 1, 8)), "layers and experts of mu"),
        ([[1.5, -0.5]], np.zeros((1, 2, 16)), "not be negative"),
    ):
        with pytest.raises(InputError, match=message):
            FittedLayers.of(np.zeros((1, 16)), kind_shares=shares, kind_effects=effects)


def test_show_prints_and_exports_what_goes_together(tmp_path, capsys):
    record = tokens_of(PLAIN, with_kinds(np.random.default_rng(5)), 4000)
    path = tmp_path / "x.npz"
    np.savez(path, topk_ids=record.topk_ids.transpose(1, 0, 2), sequence_lengths=np.diff(record.starts))
    found = co_selection(record)
    assert main(["traffic", "show", str(path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert f"two experts of a token, over popularity and groups: {found.pair_lift[2]:.2f} (± " in out
    assert f"shuffled: {found.next_lift_shuffled[2]:.2f}" in out
    assert ("of these in 5 %" in out) == (found.excess[2] >= 0.0005)  # else it is a share of noise
    assert main(["traffic", "show", str(path), "--csv"]) == 0
    table = pd.read_csv(io.StringIO(capsys.readouterr().out))
    np.testing.assert_allclose(table.pair_lift_low, found.pair_lift_low[:2])
    assert table.cv.notna().all()
    assert main(["traffic", "show", str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["next_lift"] is None
