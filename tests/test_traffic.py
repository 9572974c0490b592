"""Statistics of recorded traffic, and the fit: against exact values, published ones, laws that are known, and real data."""

import itertools
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
from conftest import assert_nothing_overlaps, fails, load_config, record_of, run, write
from naive import picked_experts
from scipy.stats import norm
from test_readers import COUNTS

from sim import InputError, load_model, load_workload, score, sweep
from sim.cli import main
from sim.figures.traffic import load_map, traffic_page
from sim.fit import description as skew
from sim.fit import effects, fit_text, fit_traffic, hold_out, popularity
from sim.fit.correlation import (
    across_sequences,
    count_runs,
    count_sequences,
    count_tokens,
    over_multinomial,
    run_starts,
    same_group,
    within_sequences,
)
from sim.fit.description import describe
from sim.fit.effects import RequestEffect, draw_effects
from sim.fit.fitting import wanted_shares
from sim.fit.hold_out import fill_figures
from sim.fit.popularity import Noise, Popularity, exp_of_minus, fill_latest, fit_popularity, sum_selection
from sim.model import ModelSpec
from sim.placement import place
from sim.router import draw_trials, routing_law, score_law
from sim.scoring import score_tokens
from sim.streams import REQUEST, stream_key, uniforms
from sim.traffic import FittedLayers, RecordedTraffic, SyntheticTraffic, read_traffic
from sim.traffic.counts import build_counts
from sim.traffic.recorded import build_record

SMALL = ModelSpec("small", n_experts=16, top_k=4)
GROUPED = ModelSpec("grouped", 16, 3, 4, 2, "sigmoid", "top2_sum", True)
BY_MAX = ModelSpec("by max", 16, 3, 4, 2, "softmax", "max")


def test_skew_of_simple_loads():
    level, one = np.full((2, 8), 5), np.eye(8)[:1]
    for statistic, of_level, of_one in (
        (skew.variation, 0, np.sqrt(7)), (skew.max_over_mean, 1, 8), (skew.gini, 0, 7 / 8), (skew.top_share, 1 / 8, 1),
    ):  # fmt: skip
        np.testing.assert_allclose(statistic(level), of_level, atol=1e-12)
        np.testing.assert_allclose(statistic(one), of_one)
    rising = np.arange(1, 9)[None]
    i, j = np.meshgrid(rising, rising)
    np.testing.assert_allclose(skew.gini(rising), np.abs(i - j).mean() / 2 / rising.mean())
    v = (np.arange(8) + 0.5) / 8
    np.testing.assert_allclose(skew.index_tilt(1 - 0.7 * (v - 0.5)[None]), -0.7)
    np.testing.assert_allclose(skew.variation(rising * 1e-300), skew.variation(rising))
    np.testing.assert_allclose(skew.group_shares(rising, 4), np.array([[3, 7, 11, 15]]) / 9)
    np.testing.assert_allclose(skew.distance(rising, rising[:, ::-1]), 16 / 36)
    np.testing.assert_allclose(skew.alikeness(rising, rising[:, ::-1]), -1)


def a_record(rng, lengths, n_layers=2, n_experts=16, top_k=4, spread=0.0, offset=0.0):
    """Tokens of sequences whose popularity differs by `spread`."""
    taste = spread * rng.standard_normal((len(lengths), 1, n_layers, n_experts))
    ids = [
        (taste[s] + offset + rng.gumbel(size=(n, n_layers, n_experts))).argsort(axis=2)[:, :, -top_k:]
        for s, n in enumerate(lengths)
    ]
    return record_of(np.concatenate(ids), lengths)


def test_counts_of_blocks_equal_a_loop():
    record = a_record(np.random.default_rng(0), [5, 9, 20])
    layer = record.topk_ids[0]
    first = run_starts(record, 4)
    assert first.tolist() == [0, 5, 9, 14, 18, 22, 26, 30]
    comp = np.empty((len(first), 16), np.int32)
    count_runs(layer, first, 4, comp)
    np.testing.assert_array_equal(comp, [np.bincount(layer[f : f + 4].ravel(), minlength=16) for f in first])
    tokens = np.array([[0, 7, 33], [1, 1, 2]])
    comp = np.empty((2, 16), np.int32)
    count_tokens(layer, tokens, comp)
    np.testing.assert_array_equal(comp, [np.bincount(layer[row].ravel(), minlength=16) for row in tokens])
    comp = np.empty((3, 16), np.int64)
    count_sequences(layer, record.starts, comp)
    starts = record.starts
    ref = [np.bincount(layer[a:b].ravel(), minlength=16) for a, b in itertools.pairwise(starts)]
    np.testing.assert_array_equal(comp, ref)
    part = record.only_sequences(np.array([0, 2]))
    np.testing.assert_array_equal(part.topk_ids, np.delete(record.topk_ids, np.arange(5, 14), axis=1))
    assert part.starts.tolist() == [0, 5, 25]


def test_independent_tokens_have_the_variance_of_their_law():
    """1 within 3 % over 3000 blocks of 16 (standard error 1.1 %); correlated ones are far above."""
    rng = np.random.default_rng(0)
    record = a_record(rng, [160] * 300)
    assert within_sequences(record, 16, 16) == pytest.approx(1, abs=0.03)
    # p = 1/4 of all: a draw of 4 of 16 has the variance of a binomial for each expert
    assert across_sequences(record, 16, 16) == pytest.approx(1, abs=0.03)
    strong = a_record(rng, [160] * 300, spread=1.0)
    assert within_sequences(strong, 16, 16).min() > 2
    assert across_sequences(strong, 16, 16) == pytest.approx(1, abs=0.03)
    assert within_sequences(record, 256, 16) is None
    assert across_sequences(record, 512, 16) is None


def test_variance_over_multinomial_by_hand():
    counts = np.array([[4, 0], [0, 4]])
    assert over_multinomial(counts, 4) == pytest.approx(4.0 / (4 * 0.25))
    assert over_multinomial(np.array([[4, 0], [4, 0]]), 4) == 1  # every token takes the same experts


def test_same_group_is_one_by_chance_and_large_where_groups_go_together():
    rng = np.random.default_rng(0)
    plain = a_record(rng, [4000], n_experts=16, top_k=2)
    assert same_group(plain, 4, 16) == pytest.approx(1, abs=0.08)  # 4000 pairs, a fifth of them together: error 3 %
    first = rng.integers(0, 4, (1, 4000, 1)) * 4
    together = np.concatenate([first, first + 1], axis=2).astype(np.int16)
    record = RecordedTraffic("x", "decode", together, np.array([0, 4000]), "d")
    assert same_group(record, 4, 16)[0] > 3


@pytest.mark.slow
@pytest.mark.parametrize("model", [SMALL, GROUPED, BY_MAX], ids=lambda model: model.name)
def test_latest_times_are_those_of_the_router(model):
    """The threshold of each expert against bisection on the naive router."""
    rng = np.random.default_rng(1)
    law = score_law(model)
    shape = (model.n_group, model.topk_group, model.top_k)
    for _ in range(20):
        weight = np.exp(rng.normal(size=model.n_experts))
        time = rng.exponential(size=model.n_experts) / weight
        comp = np.empty(model.n_experts)
        fill_latest(time, *shape, law, comp)
        ref = picked_experts(weight, time, *shape, tuple(law))
        np.testing.assert_allclose(1 - np.exp(-weight * comp), ref, rtol=1e-6, atol=1e-9)


def test_exponentials_are_those_of_numpy():
    x = np.concatenate(
        [[0.0, 1e-300, 1e-20, 700.0], np.random.default_rng(0).uniform(0, 700, 10_000), np.logspace(-12, 2)]
    )
    np.testing.assert_allclose([exp_of_minus(value) for value in x], np.exp(-x), rtol=4e-16)


def test_sums_of_selection_equal_a_loop():
    rng = np.random.default_rng(2)
    weight = np.exp(rng.normal(size=16))
    noise, shared = rng.exponential(size=(6, 2, 16)), np.exp(rng.normal(size=(6, 2, 16)))
    own = np.exp(rng.normal(size=(6, 4, 16)))
    noise, shared, own = (x.astype(np.float32) for x in (noise, shared, own))
    comp, ref = np.empty((3, 16)), np.zeros((3, 16))
    law, router = score_law(GROUPED), np.array([4, 2, 3])
    sum_selection(weight, noise, shared, own, router, law, comp)
    for q in range(6):
        p = np.empty((2, 3, 16))
        for t in range(2):
            time = noise[q, t] / (weight * shared[q, t] * own[q, 0])
            latest = np.empty(16)
            fill_latest(time, 4, 2, 3, law, latest)
            for i in range(3):
                x = weight * shared[q, t] * own[q, 1 + i] * latest
                p[t, i] = 1 - np.exp(-x)
                ref[1] += np.nan_to_num(x * np.exp(-x)) / 6
        ref[0] += p.mean(axis=(0, 1))
        ref[2] += (p[0] * p[1]).mean(axis=0)
    np.testing.assert_allclose(comp, ref, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "preset"),
    [("deepseek-v3", "gpqa-tilted"), ("deepseek-v2", "chat"), ("olmoe-1b-7b", "chat"), ("mixtral-8x7b", "mixed")],
)
def test_a_known_popularity_is_found_again(model, preset):
    """Loads of 2**18 tokens per layer of a law, fitted: mu is the law's within its own sampling error (which the count of an
    expert gives as 1 / sqrt(count)) and 1.5 %, and the project's sampler gives the loads back.
    """
    model, workload = load_model(model), load_workload(preset)
    n = 2**18
    counts, _ = draw_trials(model, workload, 3, range(2), 2, np.array([n]))
    data, _ = build_counts("x", "file:x", counts[:, 0])
    fit = fit_traffic(model, data)
    assert fit.rms.max() < 0.01
    assert fit.prefill is None
    table = SyntheticTraffic("t", popularity="fitted", group_sigma=fit.decode.group_sigma, layers=fit.decode.layers)
    again, _ = draw_trials(model, table, 4, range(2), 2, np.array([n]))
    p = data.total / n
    error = np.sqrt(2 * p * (1 - p) * n + (0.012 * p * n) ** 2)
    assert (np.abs(again[:, 0] - data.total) < 5 * error).all()  # 656 experts at most: false alarms below 1e-3
    key = stream_key(3, json.dumps(routing_law(model, workload), sort_keys=True))
    mu = workload.draw_popularity(key, np.arange(2), model.n_experts)
    off = fit.decode.layers.mu - (mu - mu.mean(axis=1, keepdims=True))
    slope = np.clip((1 - p) * -np.log1p(-p) / p, 0.1, None)  # of a share by mu, roughly
    assert (np.abs(off) < 6 * (1 / np.sqrt(data.total) / slope + 0.015)).all()


def test_experts_without_load_and_loads_that_cannot_be():
    counts = np.array([[1000, 1000, 1000, 1000, 0, 500, 500, 1000]])
    model = ModelSpec("m", 8, 2)
    p, notes = wanted_shares(counts, model, "x")
    assert notes == ["1 experts without any load are taken at half a count"]
    assert p.sum() == pytest.approx(2)
    assert p[0, 4] == pytest.approx(0.5 / 3000, rel=1e-3)
    data, _ = build_counts("x", "file:x", counts)
    fit = fit_traffic(model, data)
    assert np.isfinite(fit.decode.layers.mu).all()
    with pytest.raises(InputError, match="more than 1/2 of the load"):
        wanted_shares(np.array([[10.0, 1, 1, 1, 1, 1, 1, 1]]), model, "x")
    with pytest.raises(InputError, match="every token takes all"):
        wanted_shares(counts, ModelSpec("m", 8, 8), "x")
    always, _ = wanted_shares(np.array([[3000, 500, 500, 500, 0, 500, 500, 500]]), model, "x")
    assert always.max() < 1


@pytest.mark.slow
def test_a_known_request_effect_is_found_again():
    """Sequences drawn with request_sigma 0.8, every expert for itself: the strength within 10 %, the variance at 64 tokens
    within 8 % (200 sequences: standard errors of about 3 %).
    """
    rng = np.random.default_rng(5)
    record = a_record(rng, [256] * 200, spread=0.8, offset=0.5 * rng.standard_normal((1, 2, 16)))
    fit = fit_traffic(SMALL, record)
    assert fit.rms.max() < 0.01
    assert fit.prefill.request_sigma == pytest.approx(0.8, rel=0.1)
    assert fit.prefill.tokens_per_request == 256
    counts = [
        draw_trials(SMALL, fit.prefill, 0, range(t, t + 2), 2, np.array([64]))[0][:, 0] for t in range(0, 4000, 2)
    ]
    found = [over_multinomial(np.stack(counts)[:, layer], 64) for layer in range(2)]
    np.testing.assert_allclose(found, within_sequences(record, 64, 16), rtol=0.08)
    taste = fit.prefill.layers
    variance = taste.request_sd**2 + (taste.request_loadings**2).sum(axis=1)
    assert variance.mean() == pytest.approx(1, abs=0.01)


def test_tastes_are_a_latin_hypercube_of_the_stream():
    """Against the plain formula, scaled as `of_one_strength` says."""
    n, n_experts, key = 1000, 6, stream_key(0, "x")
    rng = np.random.default_rng(4)
    taste = RequestEffect(rng.uniform(0.5, 1, n_experts), rng.normal(size=(2, n_experts)), 0.1, 0.1, 0.1)
    comp = draw_effects(taste, key, 3, n)
    u = uniforms(key, REQUEST, 3, (n, 2 * n_experts + 2))
    u = (np.argsort(np.argsort(u, axis=0), axis=0) + 0.5) / n
    first, second, of_factors = np.split(u, [n_experts, 2 * n_experts], axis=1)
    strata = (np.arange(4)[:, None] + second[:, None, :]) / 4
    own = norm.ppf(np.concatenate([first[:, None, :], strata], axis=1)) * taste.sd
    shared = norm.ppf(of_factors) @ taste.loadings
    strength = np.sqrt(((own[:, 0] + shared) ** 2).mean(axis=1) / taste.variance)
    np.testing.assert_allclose(comp.own, own / strength[:, None, None], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(comp.shared, shared / strength[:, None], rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_a_fit_is_the_same_on_any_number_of_threads_and_another_with_another_seed():
    data, _ = build_counts("x", "file:x", COUNTS)
    first, again, other = (fit_traffic(SMALL, data, seed=seed, threads=n) for seed, n in ((0, 1), (0, 3), (1, 2)))
    assert first.decode.law == again.decode.law
    assert first.decode.law != other.decode.law
    assert fit_text(first) == fit_text(again)


@pytest.mark.slow
def test_a_fit_that_does_not_converge_gives_its_best():
    """Shares that ask for more than the largest strength still end."""
    taste = RequestEffect(np.ones(16), np.zeros((0, 16)), 0.9999, 0.9999, 0.9999)
    found = fit_popularity(Noise(SMALL, 0.0, 0, 0), np.full(16, 0.25), taste)
    assert isinstance(found, Popularity)
    assert found.strength <= 10
    assert np.isfinite(found.mu).all()


@pytest.mark.slow
def test_a_written_fit_is_read_back_and_swept(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.modules["sim.fit.hold_out"], "_ALL_BLOCKS", 500)
    config = {"model_type": "qwen3_moe", "num_experts": 16, "num_experts_per_tok": 4, "num_hidden_layers": 2}
    model = load_config(tmp_path, config)
    record = a_record(np.random.default_rng(6), [48] * 32, spread=1.0)
    ids = record.topk_ids.transpose(1, 0, 2)
    path = write(tmp_path / 'odd "name".npz', topk_ids=ids, sequence_lengths=np.full(32, 48))
    out, half, of_model = tmp_path / "my.toml", tmp_path / "half.toml", ["--model", tmp_path / "config.json"]
    assert run("traffic", "fit", path, *of_model, "--out", out, "--hold-out") == 0
    text = capsys.readouterr().out
    assert "held-out sequences" in text
    assert "fitted to all of the file: 2 layers" in text
    direct = fit_traffic(model, read_traffic(path), threads=1)
    assert load_workload(out).law == direct.decode.law
    assert load_workload(out, phase="prefill").law == direct.prefill.law
    assert load_workload(out).fitted_to == model.name
    words = ["sweep", *of_model, "--workload", out, *"--ep 8 --tokens 8,64 --trials 20".split()]
    assert run(*words, "--out", tmp_path / "a") == 0
    assert "assumption" not in capsys.readouterr().err
    assert run(*words, "--phase", "prefill", "--out", tmp_path / "b") == 0
    assert "not independent" in capsys.readouterr().err
    assert run("traffic", "fit", path, *of_model, "--out", half, "--hold-out", "--half") == 0
    assert "fitted to the first half (--half): 2 layers" in capsys.readouterr().out
    assert load_workload(half).law != direct.decode.law


def test_bad_options_write_nothing(tmp_path, capsys):
    path = write(tmp_path / "x.npy", x=np.tile(COUNTS, (1, 1, 4)))
    before = set(tmp_path.iterdir())
    out, model = ["--out", tmp_path / "my.toml"], ["--model", "olmoe-1b-7b"]
    fails(capsys, ["traffic", "fit", path, *out], "needs --model")
    fails(capsys, ["traffic", "fit", path, *model], "needs --out")
    fails(capsys, ["traffic", "fit", path, *model, "--out", tmp_path / "x.npz"], "must be the name of a .toml file")
    fails(capsys, ["traffic", "fit", path, *model, "--out", tmp_path / "no" / "x.toml"], "does not exist")
    fails(capsys, ["traffic", "fit", path, *model, *out, "--half"], "--half goes with --hold-out")
    fails(capsys, ["traffic", "fit", path, *model, *out, "--seed", "-1"], "--seed -1: must be a whole number")
    fails(capsys, ["traffic", "fit", path, *model, *out, "--group-sigma", "nan"], "nan: must be a number from 0 to 5")
    fails(capsys, ["traffic", "fit", path, *model, *out, "--group-sigma", "1,2"], "1,2: must be a number from 0 to 5")
    fails(
        capsys, ["traffic", "fit", path, *model, *out, "--threads", "0"], "--threads 0: must be a whole number from 1"
    )
    fails(capsys, ["traffic", "fit", path, *model, *out, "--plot", tmp_path / "p"], "--plot does not go with")
    fails(capsys, ["traffic", "show", path, *out], "--out does not go with")
    fails(capsys, ["traffic", "show", path, "--threads", "1"], "--threads does not go with")
    fails(capsys, ["traffic", "shew", path], "did you mean show")
    other = write(tmp_path / "y.npy", x=COUNTS)
    fails(capsys, ["traffic", "show", path, "--against", other, "--plot", tmp_path / "p"], "has 4 layers of 16 experts")
    assert set(tmp_path.iterdir()) - {other} == before


def test_statistics_are_printed(tmp_path, capsys):
    counts = np.tile(COUNTS, (1, 1, 16))
    path = write(tmp_path / "x.npy", x=counts)
    assert main(["traffic", "show", str(path), "--model", "deepseek-v3", "--plot", str(tmp_path / "p")]) == 0
    out = capsys.readouterr().out
    assert "4 layers, 256 experts, 3 steps" in out
    total = counts.sum(axis=0)
    assert f"{total[0].std() / total[0].mean():.3f}" in out
    assert "group shares over uniform, mean of layers: 1.00" in out
    assert "drift, first half of the steps against second half" in out
    assert sorted(p.name for p in (tmp_path / "p").iterdir()) == ["load_map.png", "traffic.png"]


@pytest.mark.slow
def test_held_out_steps_of_counts(tmp_path):
    """Steps of a known law: the second half is predicted within its interval and 2 %, under the placement that is asked for."""
    model, workload = load_model("olmoe-1b-7b"), load_workload("chat")
    counts = np.stack(
        [draw_trials(model, workload, 0, range(s, s + 4), 4, np.array([1000]))[0][:, 0] for s in range(0, 48, 4)]
    )
    data, _ = build_counts("x", "file:x", counts)
    for placement in ("linear", "random"):
        _, rows = hold_out(model, data, placement=placement)
        assert [row.ep_size for row in rows] == [4, 8, 16, 32]
        for row in rows:
            assert row.error.low - 0.02 < 0 < row.error.high + 0.02
            placed = place(placement, model, row.ep_size)
            assert row.real.value == pytest.approx(score(placed, counts[6:]).imbalance.mean())
    assert hold_out(model, build_counts("x", "file:x", counts[:3])[0]) is None


def test_equal_sequences_are_not_held_out():
    """40 of them are 20 twice, or one, however many tokens they have: no verdict from so few."""
    ids = np.random.default_rng(3).integers(0, 8, (3, 20 * 64, 1)).astype(np.int16)
    for n_different in (1, 20):
        repeated = np.tile(ids[:, : n_different * 64], (1, 40 // n_different, 1))
        record = RecordedTraffic("x", "decode", repeated, np.arange(41) * 64, "d")
        assert hold_out(replace(load_model("mixtral-8x7b"), top_k=1), record) is None


def test_blocks_have_the_figures_of_the_scorer():
    model = ModelSpec("m", 12, 3)
    rng = np.random.default_rng(0)
    ids = rng.permuted(np.tile(np.arange(12, dtype=np.int16), (5, 7, 1)), axis=2)[:, :, :3].copy()
    sizes = (4, 6)
    comp = np.empty((3, 2, 5, 1))[..., 0]  # a part of an array, as the check gives it
    fill_figures(ids, np.stack([place("linear", model, size).rank_of_expert for size in sizes]).astype(np.int64), comp)
    for j, size in enumerate(sizes):
        for b, block in enumerate(ids):
            ref = score_tokens(place("linear", model, size), block)
            ref_figures = ref.loads.max() / ref.loads.mean(), ref.received_tokens.max() / 7, ref.ranks_per_token.mean()
            np.testing.assert_allclose(comp[:, j, b], ref_figures)


@pytest.mark.parametrize(
    ("model", "lengths"),
    [
        (ModelSpec("top-1", 8, 1), [40] * 40),
        (ModelSpec("grouped", 32, 4, 4, 2), [20] * 32),
        (ModelSpec("wide", 64, 8), [3] * 20 + [40] * 34),
        (ModelSpec("few", 3, 2), [1] * 64),
    ],
    ids=lambda x: x.name if isinstance(x, ModelSpec) else "",
)
def test_records_of_other_shapes_are_held_out(model, lengths, monkeypatch):
    """One layer of two; every figure is a number, and prefill is compared where 16 sequences of a half are long enough."""
    monkeypatch.setattr(popularity, "_MOST_REQUESTS", 512)
    monkeypatch.setattr(popularity, "_LEAST_REQUESTS", 512)
    monkeypatch.setattr(effects, "_REQUESTS", 512)
    monkeypatch.setattr(sys.modules["sim.fit.hold_out"], "_ALL_BLOCKS", 500)
    rng = np.random.default_rng(1)
    logits = rng.normal(size=model.n_experts) + rng.gumbel(size=(sum(lengths), 1, model.n_experts))
    if model.is_grouped:  # all experts of a token in two groups: not the two best, as it is
        best = logits.reshape(-1, 1, 4, 8).max(axis=3).argsort(axis=2)[..., :2]
        np.put_along_axis(logits.reshape(-1, 1, 4, 8), best[..., None], -np.inf, axis=2)
    ids = logits.argsort(axis=2)[:, :, -model.top_k :]
    record = build_record("x", "x", ids.repeat(2, axis=1), np.array(lengths), "decode", "")
    fit, rows = hold_out(model, record, threads=1, most_layers=1)
    assert fit.decode.n_layers == 1
    assert {row.phase for row in rows} == ({"decode", "prefill"} if lengths[-1] >= 16 else {"decode"})
    for row in rows:
        for found in (row.real, row.simulated, row.error):
            assert found.low <= found.value <= found.high
        assert row.both_ways.value == row.both_ways.value


@pytest.mark.parametrize("draw", [load_map, traffic_page])
@pytest.mark.parametrize("grouped", [True, False])
def test_figures_have_names_on_their_axes_and_nothing_overlaps(draw, grouped):
    record = a_record(np.random.default_rng(0), [100] * 20, n_experts=32)
    figure = draw("file:x", describe(record, ModelSpec("g", 32, 4, 4, 2) if grouped else None))
    assert_nothing_overlaps(figure)
    for ax in figure.axes:
        assert ax.get_ylabel()
        assert ax.get_xlabel() or ax.get_label() == "<colorbar>"


# Real data.


@pytest.fixture(scope="module")
def gpt_oss(shared):
    return read_traffic(shared / "traces" / "gpt-oss-20b-tokens.npz", load_model("gpt-oss-20b"))


@pytest.mark.slow
def test_gpt_oss_has_its_published_statistics(gpt_oss):
    """CV 0.7 to 0.9; variance over multinomial about 4, 13, 46 at 16, 64, 256 tokens of one request, 0.9 to 1.0 of different
    requests (figures that were taken with other definitions of the mean over experts: within 10 %).
    """
    about = describe(gpt_oss, load_model("gpt-oss-20b"))
    assert 0.7 < about.by_layer["CV"].mean() < 0.9
    for n, published in ((16, 4), (64, 13), (256, 46)):
        assert about.within[n].mean() == pytest.approx(published, rel=0.1)
        assert 0.9 <= about.across[n].mean() <= 1.0


@pytest.mark.slow
def test_gpt_oss_is_predicted_from_its_other_half(gpt_oss, monkeypatch):
    """At EP 4, 8, 16, blocks of 16, 64, 256 tokens, each half from the other: mean max / mean within 1.5 % in decode and 4 % in
    prefill, tokens that the busiest rank receives within 4 %, ranks per token within 2.5 %. Shares of experts to 1 %; with a
    request effect to 4 %, on the random numbers of the check. Of every sixth layer, which takes a sixth of the time.
    """
    monkeypatch.setattr(sys.modules["sim.fit.hold_out"], "_ALL_BLOCKS", 2400)
    third = replace(gpt_oss, topk_ids=gpt_oss.topk_ids[::6], layer_ids=gpt_oss.layer_ids[::6])
    fit, rows = hold_out(load_model("gpt-oss-20b"), third)
    assert fit.rms[0].max() < 0.01
    assert fit.rms[1].max() < 0.04
    bounds = {"imbalance": 0.04, "received": 0.04, "ranks_per_token": 0.025}
    means = [row for row in rows if row.statistic == "mean"]
    assert len(means) == 3 * 18
    for row in means:
        of_decode = row.figure == "imbalance" and row.phase == "decode"
        assert abs(row.both_ways.value) < (0.015 if of_decode else bounds[row.figure]), row


@pytest.mark.slow
def test_olmoe_drifts_between_domains(shared):
    """CV 0.4 on the web; the loads of c4 and of github are no more alike than chance, so a fit to one misses the other."""
    model = load_model("olmoe-1b-7b")
    c4, github = (read_traffic(shared / "traces" / f"olmoe-{name}-load.csv", model) for name in ("c4", "github"))
    about = describe(c4, model, github)
    assert about.by_layer["CV"].mean() == pytest.approx(0.4, abs=0.05)
    assert about.drift.distance.mean() > 0.4
    assert about.drift.alike.mean() < 0
    fit = fit_traffic(model, c4)
    assert fit.rms.max() < 0.01
    result = sweep(model, fit.decode, ep_sizes=[8], tokens=[4096], placements="linear", trials=60, bound_layers=0)
    loads = [data.total.reshape(3, 8, -1).sum(axis=2) for data in (c4, github)]
    of_c4, of_github = ((load.max(axis=1) / load.mean(axis=1)).mean() for load in loads)
    found = result.summary.imbalance_mean[0]
    assert found == pytest.approx(of_c4, rel=0.02)
    assert abs(found / of_github - 1) > 0.05


def test_layers_of_a_fit_are_checked():
    with pytest.raises(InputError, match="go together"):
        SyntheticTraffic("x", popularity="lognormal", layers=FittedLayers.of([[0.0, 1.0]]))


def test_level_loads_have_no_correlation_and_say_so(tmp_path, capsys):
    assert main(["traffic", "show", str(write(tmp_path / "x.npy", x=np.full((6, 3, 8), 5)))]) == 0
    out = capsys.readouterr().out
    assert "correlation of shares -: the loads are level" in out
    assert "nan" not in out
