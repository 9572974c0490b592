"""Capacities: tails of tilted laws, deployments against sampled steps, exact answers, formulas of engines, bad usage."""

from itertools import product

import numpy as np
import pandas as pd
import pytest
from conftest import fails
from scipy.stats import binom

import sim
from sim import InputError, load_model, load_workload, place
from sim.cli import main
from sim.cost.buffers import DEEPEP_LIMIT_BYTES, buffer_bytes, deepep_low_latency_bytes, size_buffers
from sim.cost.deployments import QUANTITIES, sample_deployments
from sim.sweeps.plan import make_plan
from sim.theory import UniformRouter, tails
from sim.theory.tails import BERNOULLI, family_of, place_in_family, saddle_points, tail_of_tilted, tilted_moments
from sim.traffic.synthetic import X0

V3 = load_model("deepseek-v3")
SMALL = {"ep_sizes": 16, "tokens": 512, "placements": ["linear", "round_robin"], "deployments": 12}
COLUMNS = [
    *["model", "workload", "placement", "exchange", "ep_size", "tokens", "quantity", "scope", "risk", "deployments"],
    *["balanced_tokens", "capacity_tokens", "capacity_low", "capacity_high", "factor", "bytes", "worst_case_tokens"],
    "dropped_share",
]


@pytest.fixture(scope="module")
def small():
    return size_buffers(V3, "chat", **SMALL, horizon_steps=10**6, capacity_factor=1.25, curves=True)


def tail_by_saddle_point(law, n_tokens, least, theta):
    """P(a sum of so many tokens of the tilted law reaches `least`)."""
    at = [np.empty(1) for _ in range(3)]
    saddle_points(law[None], least / n_tokens, *at)
    return tail_of_tilted(n_tokens, least, *(part[0] for part in at), theta, *tilted_moments(law, theta))


@pytest.mark.parametrize("law", [[0.5, 0.5], [0.9, 0.1], [0.3, 0.2, 0.2, 0.1, 0.1, 0.05, 0.03, 0.02]])
@pytest.mark.parametrize("n_tokens", [16, 128, 4096])
@pytest.mark.parametrize("theta", [-0.5, 0.0, 0.3])
def test_tails_of_tilted_laws_equal_exact_ones(law, n_tokens, theta):
    """Within 1 % from 128 tokens on (4 % at 16) from one standard deviation above the mean to 20."""
    law = np.array(law)
    cumulant, mean, variance = tilted_moments(law, theta)
    tilted = law * np.exp(theta * np.arange(len(law)) - cumulant)
    for sds in (1, 2, 4, 8, 20):
        least = int(n_tokens * mean + sds * np.sqrt(n_tokens * variance)) + 1
        if least < n_tokens * (len(law) - 1):
            comp = tail_by_saddle_point(law, n_tokens, least, theta)
            ref = tails(tilted[None] / tilted.sum(), n_tokens, least)[0]
            assert comp == pytest.approx(ref, rel=0.01 if n_tokens >= 128 else 0.04)


def test_tails_of_many_tokens_fall_from_1_to_0():
    """2**20 tokens, at and far beyond where the saddlepoint's exponent leaves the range of doubles, on either side."""
    law = np.array([0.7, 0.3])
    tail = [tail_by_saddle_point(law, 2**20, int(share * 2**20), 0.0) for share in np.linspace(0.01, 0.99, 99)]
    assert tail[:28] == [1.0] * 28
    assert tail[32:] == [0.0] * 67
    assert (np.diff(tail) <= 0).all()


def test_the_family_of_what_happens_or_not_is_binomial():
    found = tail_by_saddle_point(BERNOULLI.laws[0], 500, 200, np.log(0.25 / 0.75))
    assert len(BERNOULLI.laws) == 1
    assert found == pytest.approx(binom.sf(199, 500, 0.25), rel=2e-3)


def test_a_law_of_a_family_has_its_mean():
    laws = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    family = family_of(laws, 8)
    assert (np.diff(family.means) > 0).all()
    means = np.linspace(0.5, 3.5, 21)
    base, theta = np.empty(21, np.int64), np.empty(21)
    place_in_family(means, family.laws, family.means, base, theta)
    found = [tilted_moments(family.laws[b], t)[1] for b, t in zip(base, theta, strict=True)]
    np.testing.assert_allclose(found, means, rtol=1e-9)


GRID = {"ep_sizes": [8, 32], "tokens": 256, "placements": ["linear", "round_robin", "eplb+32"], "bound_layers": 0}


@pytest.fixture(scope="module")
def deployments():
    plan = make_plan(V3, "chat", **GRID, trials=1, received="off")
    return plan, sample_deployments(plan, 58, 20, 2)


@pytest.fixture(scope="module")
def swept():
    return sim.sweep(V3, "chat", **GRID, trials=2000, seed=9, replica_choice="vllm_hash")


@pytest.mark.slow
def test_means_are_those_of_a_sweep(deployments, swept):
    """Mean tokens that a rank receives, from laws by mean load, against all tokens of sampled steps, within 1 %."""
    plan, found = deployments
    summary = swept.summary
    for (placement, ep_size), of_pair in zip(plan.grid.pairs, found, strict=True):
        row = summary[(summary.placement == placement) & (summary.ep_size == ep_size)].iloc[0]
        assert 256 * of_pair["received"].mean == pytest.approx(row.received_tokens_mean, rel=0.01)
        assert of_pair["pairs"].mean == pytest.approx(8 / ep_size, rel=1e-9)
        n_slots = 288 if placement == "eplb+32" else 256
        assert of_pair["expert_rows"].mean == pytest.approx(8 / n_slots, rel=1e-9)


@pytest.mark.slow
def test_probabilities_hold_against_sampled_steps(deployments, swept):
    """P(some rank of a layer has more than a capacity), layers drawn afresh, against a sweep of other layers.

    Not below it by more than 4 standard errors of both (one false alarm in 30,000 a line), nor above it by more than these and
    15 %, or under EPLB, whose ranks are nearly alike, three quarters: there the sum over groups of ranks is loose.
    """
    plan, found = deployments
    counts = swept.counts
    metrics = {"received": "received_tokens_max", "pairs": "max_load"}
    for quantity, ((placement, ep_size), of_pair) in product(metrics, zip(plan.grid.pairs, found, strict=True)):
        of_cell = counts[(counts.placement == placement) & (counts.ep_size == ep_size)].sort_values("value")
        of_cell = of_cell[of_cell.metric == metrics[quantity]]
        above = 1 - np.cumsum(of_cell["count"].to_numpy()) / 2000
        for wanted in (0.2, 0.05, 0.01):
            at = int(np.abs(above - wanted).argmin())
            p = -np.expm1(of_pair[quantity].log_fine(256, int(of_cell["value"].iloc[at])))
            se = np.hypot(p.mean(axis=1).std(ddof=1) / len(p) ** 0.5, (above[at] * (1 - above[at]) / 2000) ** 0.5)
            most = (1.75 if placement == "eplb+32" else 1.15) * above[at] + 4 * se
            assert above[at] - 4 * se <= p.mean() <= most, (quantity, placement, ep_size, wanted)


def test_uniform_traffic_has_the_capacity_of_binomials():
    """All layers alike: no spread is left once the noise of counting is taken off. Within 1 token of the exact answer."""
    table = sim.capacity(
        V3, "uniform", ep_sizes=8, tokens=1024, placements="linear", deployments=3, horizon_steps=10**6, risk=1e-3
    )
    p = _uniform_share()
    received = table[table.quantity == "received"].set_index(["scope", "deployments"])
    for scope, n in (("layer", 1), ("step", 58), ("horizon", 58 * 10**6)):
        exact = binom.isf(1e-3 / (8 * n), 1024, p)
        rows = received.loc[scope]
        assert rows.capacity_tokens.to_numpy() == pytest.approx(exact, abs=1 + 0.005 * exact)


def _uniform_share():
    """P(a token has an expert on rank 0) under linear on 8 ranks."""
    from sim.theory import UniformLayer

    layer = UniformLayer(UniformRouter.of(V3, X0), place("linear", V3, 8).rank_of_expert)
    return 1 - float(layer._missing(layer.held)[0])


WORST = {8: (1.490, 0.010), 16: (1.777, 0.015), 32: (2.301, 0.027), 64: (3.272, 0.053)}
"""Mean of the worst of 58 layers by EP size, with its 95 % half-width, as `_brute_force` gives it: V3, chat, linear, 2048 tokens,
200 deployments."""


def _brute_force(rng, n_deployments):
    """Imbalances of 58 layers, each of its own popularity, by fully drawn logits: float64 [deployments, 58, EP sizes]."""
    out = np.empty((n_deployments, 58, len(WORST)))
    for at in np.ndindex(out.shape[:2]):
        x = rng.normal(0, 0.65, 256) + np.repeat(rng.normal(0, 0.4, (2048, 8)), 32, axis=1)
        score = 1 / (1 + np.exp(-(x + rng.gumbel(size=x.shape) - 4)))
        of_group = np.partition(score.reshape(2048, 8, 32), -2, axis=2)[:, :, -2:].sum(axis=2)
        kept = np.repeat(of_group >= np.partition(of_group, -4, axis=1)[:, -4:-3], 32, axis=1)
        ids = np.argpartition(np.where(kept, -score, 1), 7, axis=1)[:, :8]
        counts = np.bincount(ids.ravel(), minlength=256)
        out[at] = [counts.reshape(size, -1).sum(axis=1).max() * size / (2048 * 8) for size in WORST]
    return out


@pytest.mark.slow
def test_worst_of_58_layers_is_that_of_brute_force():
    """Steps of 300 deployments: the mean over layers within 1 % of the independent figures 1.23, 1.39, 1.66 and 2.15, and that of
    the worst layer within 3 standard errors of brute force and its own (one false alarm in 100 for the four).

    The issue's figures for the worst layer, 1.46, 1.71, 2.22 and 3.10, are 2 to 4 % lower. One deployment differs from the next
    by a standard deviation of 0.07, 0.11, 0.19 and 0.37: they lie within 0.6 of that, all on the same side, as few deployments
    do. With layers fixed, the mean over steps of the worst layer is the same (within 0.01, 100 deployments of 8 steps).
    """
    from sim.cost.expert import expert_rates
    from sim.cost.steps import sample_steps

    rates = [expert_rates(V3, sim.load_gpu("h200"), "fp8")]
    sample = sample_steps(
        V3, "chat", rates, layer_sets=300, most_steps=300, budget_tokens=2**26, ep_sizes=list(WORST), tokens=2048,
        placements="linear",
    )  # fmt: skip
    for (size, (ref, half)), layer, issue in zip(
        WORST.items(), (1.23, 1.39, 1.66, 2.15), (1.46, 1.71, 2.22, 3.10), strict=True
    ):
        imbalance = sample.max_load[sample.cell("linear", size, 2048)] / (2048 * 8 / size)
        worst = imbalance.max(axis=1)
        assert imbalance.mean() == pytest.approx(layer, rel=0.01)
        assert worst.mean() == pytest.approx(ref, abs=3 * np.hypot(half / 1.96, worst.std() / len(worst) ** 0.5))
        assert abs(worst.mean() - issue) < worst.std()
        assert worst.mean() == pytest.approx(issue, rel=0.06)


@pytest.mark.slow
def test_brute_force_of_the_worst_of_58_layers():
    """Other layers than those that the figures come from, 5 deployments, as spread as the 200: within 3 standard errors of both
    means (one false alarm in 100 for the four).
    """
    worst = _brute_force(np.random.default_rng(4), 5).max(axis=1)
    for of_size, (ref, half) in zip(worst.T, WORST.values(), strict=True):
        assert of_size.mean() == pytest.approx(ref, abs=3 * half / 1.96 * (1 + 200 / 5) ** 0.5)


def test_table_has_the_columns_that_are_promised(small):
    assert list(small.table.columns) == COLUMNS
    assert set(small.table.quantity) == set(QUANTITIES)
    assert set(zip(small.table.scope, small.table.deployments, strict=True)) == {
        ("layer", "all"), ("step", "median"), ("step", "worst_5_percent"), ("horizon", "median"), ("horizon", "worst_5_percent"),
    }  # fmt: skip
    assert (small.table.capacity_tokens <= small.table.worst_case_tokens).all()
    pd.testing.assert_series_equal(
        small.table.factor, small.table.capacity_tokens / small.table.balanced_tokens, check_names=False
    )


def test_capacity_grows_with_scope_deployments_and_safety(small):
    asked = small.table[small.table.risk == 1e-3]
    for _, cell in asked.groupby(["placement", "quantity", "exchange"]):
        held = cell.set_index(["scope", "deployments"]).capacity_tokens
        assert held["step", "median"] < held["horizon", "median"] < held["horizon", "worst_5_percent"]
        assert held["step", "median"] <= held["step", "worst_5_percent"] < held["horizon", "worst_5_percent"]
        step = cell[cell.scope == "step"]
        assert (step.capacity_low <= step.capacity_tokens).all() or step.capacity_low.isna().any()
    safer = sim.capacity(V3, "chat", **SMALL, risk=1e-6)
    both = asked.merge(safer, on=["placement", "quantity", "exchange", "scope", "deployments"])
    assert (both.capacity_tokens_y > both.capacity_tokens_x).all()


def test_a_capacity_is_the_smallest_that_keeps_the_risk():
    plan = make_plan(V3, "chat", ep_sizes=16, tokens=512, placements="linear", trials=1, bound_layers=0, received="off")
    for of in sample_deployments(plan, 58, 4, 1)[0].values():
        for deployment, held in enumerate(of.capacities(512, np.log1p(-1e-3))):
            exceeded = [-np.expm1(of.log_fine(512, int(held) - less)[deployment].sum()) for less in (0, 1)]
            assert exceeded[0] <= 1e-3 < exceeded[1]


def test_a_given_factor_says_what_it_risks_and_drops(small):
    given = small.table[small.table.risk != 1e-3]
    assert (given.capacity_tokens == np.floor(1.25 * given.balanced_tokens)).all()
    pairs = given[(given.quantity == "pairs") & (given.exchange == "pair") & (given.scope == "layer")].set_index(
        "placement"
    )
    counts = sim.sweep(V3, "chat", ep_sizes=16, tokens=512, placements="linear", trials=3000, bound_layers=0).counts
    most = counts[counts.metric == "max_load"]
    above = most["count"][most["value"] > 320].sum() / 3000
    assert above - 0.02 <= pairs.risk["linear"] <= 1.1 * above  # a sum over ranks, which are common here


def test_dropped_pairs_equal_those_of_sampled_steps(small):
    """Share of pairs beyond 1.25 times the balanced load, from loads of all ranks of 600 fresh layers: within 10 %."""
    from sim.router import draw_trials

    counts, _ = draw_trials(V3, load_workload("chat"), 5, range(600), 600, np.array([512]))
    loads = sim.score(place("linear", V3, 16), counts[:, 0]).loads
    ref = np.maximum(loads - 320, 0).sum() / loads.sum()
    given = small.table[
        (small.table.risk != 1e-3) & (small.table.quantity == "pairs") & (small.table.placement == "linear")
    ]
    assert given.dropped_share.iloc[0] == pytest.approx(ref, rel=0.1)


def test_known_layers_are_one_deployment(tmp_path):
    from sim.traffic import FittedLayers, SyntheticTraffic

    mu = 0.65 * np.random.default_rng(2).standard_normal((5, 256))
    fitted = SyntheticTraffic("mine", popularity="fitted", group_sigma=0.4, layers=FittedLayers.of(mu))
    table = sim.capacity(V3, fitted, ep_sizes=16, tokens=512, placements=["linear", "eplb+16"])
    held = table.set_index(["placement", "quantity", "exchange", "scope", "deployments"])
    median, worst = (held.xs(name, level="deployments") for name in ("median", "worst_5_percent"))
    pd.testing.assert_series_equal(median.capacity_tokens, worst.capacity_tokens)
    assert (held.capacity_low < held.capacity_tokens).all()
    assert (held.capacity_high > held.capacity_tokens).all()
    assert (held.capacity_high - held.capacity_low < 0.05 * held.capacity_tokens).all()


def test_bytes_are_those_of_the_engines():
    """DeepEP takes at most 1,840 tokens for 5,120 hidden and 448 slots (vllm #57894). GLM-5 at EP 16 and 8,192 tokens a rank:
    24 GiB of workspace in the worst case, 1.5 balanced (vllm #57270).
    """
    assert deepep_low_latency_bytes(5120, 1840, 448) <= DEEPEP_LIMIT_BYTES < deepep_low_latency_bytes(5120, 1850, 448)
    glm, worst = load_model("glm-5"), 8192 * 16 * 8
    assert buffer_bytes(glm, "workspace", worst, 16, 256) == 24 * 2**30
    assert buffer_bytes(glm, "workspace", worst / 16, 16, 256) == 1.5 * 2**30


def test_slots_that_do_not_divide_are_left_out_and_named():
    found = size_buffers(V3, "chat", ep_sizes=[32, 64], tokens=64, placements=["linear", "eplb+32"], deployments=2)
    assert set(zip(found.table.placement, found.table.ep_size, strict=True)) == {
        ("linear", 32),
        ("linear", 64),
        ("eplb+32", 32),
    }
    assert found.notes == [
        "left out: strategy eplb+32 at ep_size 64: 256 experts + 32 redundant slots do not divide by 64 ranks; eplb+64 does"
    ]


@pytest.mark.slow
def test_the_verb_prints_and_writes(tmp_path, capsys):
    map_of_288 = tmp_path / "a+b.json"
    map_of_288.write_text('{"physical_to_logical_map": [%s]}' % [*range(256), *range(32)])
    words = f"capacity --ep 16 --tokens-per-rank 32 --placement linear,file:{map_of_288} --deployments 8 --horizon 24h"
    assert main([*words.split(), "--capacity-factor", "1.25", "--out", str(tmp_path / "cap")]) == 0
    printed = capsys.readouterr().out.rpartition("\nwritten to")[0]
    said = " ".join(printed.split())
    assert said.startswith(
        "deepseek-v3, chat traffic: what to set, so that it is exceeded in any layer of any of 1728000 steps"
    )
    assert "Received tokens by scope: the capacity that is exceeded with a probability of at most 0.001" in said
    assert "num_max_dispatch_tokens_per_rank" in said
    assert "Capacity factor 1.25" in said
    assert "MiB" in said  # of a decode step, which in GiB would be 0.00
    assert " 0.00 " not in said
    table = pd.read_csv(tmp_path / "cap" / "capacity.csv")
    assert list(table.columns) == COLUMNS
    assert (tmp_path / "cap" / "capacity.png").stat().st_size > 10_000
    assert main(["show", str(tmp_path / "cap")]) == 0  # says the same again
    assert capsys.readouterr().out.split() == said.split()
    fails(capsys, ["show", tmp_path / "cap", "--tail"], "--worst and --tail go with a sweep")


def test_bad_usage_is_one_line_and_status_2(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["--horizon", "1s", "--steps-per-second", "0.1"], "--horizon: it has no step"),
        (["--steps-per-second", "5"], "--steps-per-second goes with --horizon"),
        (["--layer-correlation", "59"], "--layer-correlation 59: must be from 1 to the number of MoE layers, 58"),
        (["--placement", "linear,liner"], "--placement 'liner' is not known"),
        (["--workload", "prefill", "--horizon", "1h"], "a horizon: the tokens of a request are not independent"),
        (["--dummy-tokens", "3", "--layer-correlation"], "--layer-correlation: dummy tokens are identical"),
        (["--dummy-tokens", "3", "--risk", "1e-8"], "--risk 1e-08 takes 368887944 steps of 64 tokens under linear"),
    ):
        fails(capsys, ["capacity", "--ep", "8", "--tokens", "64", *words, "--out", "new"], message)
        assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_correlated_layers_need_no_more_and_far_out_the_same():
    """Any layer of a step, at a risk of 0.5 and of 1e-3, where all layers are alike (where one is the worst, it decides); off by
    default; and steps of that variance.
    """
    options = {"ep_sizes": 16, "tokens": 65536, "placements": "linear", "deployments": 3}
    for risk, least in ((0.5, 0.97), (1e-3, 0.9995)):
        plain, together = (sim.capacity(V3, "uniform", **options, risk=risk, layer_correlation=f) for f in (None, 4.0))
        ratio = (together.capacity_tokens / plain.capacity_tokens)[plain.scope == "step"]
        assert ((least <= ratio) & (ratio <= 1)).all()
        assert (ratio < 1).any() or risk < 0.5
        pd.testing.assert_frame_equal(plain[plain.scope == "layer"], together[together.scope == "layer"])
    options = {"ep_sizes": 8, "tokens": 64, "placements": "linear", "layer_sets": 4, "most_steps": 64}
    one, two = (sim.predict_steps(V3, "chat", "h200", **options, layer_correlation=f) for f in (None, 2.0))
    changed = (one.metric != "worst_imbalance").to_numpy()
    assert one["mean"].to_numpy() == pytest.approx(two["mean"].to_numpy())
    assert (two.sd_within_set / one.sd_within_set)[changed].to_numpy() == pytest.approx(
        (31 / 15) ** 0.5
    )  # 16 steps a set
    assert two.sd_within_set[~changed].equals(one.sd_within_set[~changed])


@pytest.mark.parametrize("more", [{"workload": "prefill"}, {"workload": load_workload("chat", dummy_tokens=16)}])
def test_tokens_that_depend_on_each_other_are_sampled(more):
    """One layer of one step: the capacity that at most 5 % of 1,000 other sampled steps exceed, within 4 standard errors (one
    false alarm in 15,000).
    """
    found = size_buffers(V3, **more, ep_sizes=16, tokens=256, placements="linear", risk=0.05, capacity_factor=1.25)
    table = found.table[found.table.risk == 0.05].set_index(["quantity", "exchange"])
    assert set(table.scope) == {"layer"}
    assert any("rows of an expert are left out" in text for text in found.notes)
    counts = sim.sweep(
        V3, more["workload"], ep_sizes=16, tokens=256, placements="linear", trials=1000, bound_layers=0, seed=3
    ).counts
    for (quantity, exchange), metric in (
        (("pairs", "pair"), "max_load"),
        (("received", "token"), "received_tokens_max"),
    ):
        of_metric = counts[counts.metric == metric]
        assert ((quantity, exchange) in table.index) == bool(len(of_metric))
        if len(of_metric):
            row = table.loc[(quantity, exchange)]
            above = of_metric["count"][of_metric["value"] > row.capacity_tokens].sum() / 1000
            assert above == pytest.approx(0.05, abs=4 * (0.05 * 0.95 * (1 / 1000 + 1 / 292)) ** 0.5)
            assert row.capacity_low <= row.capacity_tokens <= row.capacity_high


def test_a_model_without_sizes_is_refused():
    from dataclasses import replace

    with pytest.raises(InputError, match="sizes that are not known"):
        sim.capacity(replace(V3, moe_intermediate_size=0), "chat", **SMALL)
    with pytest.raises(InputError, match="needs the number of MoE layers"):
        sim.capacity(replace(V3, n_moe_layers=0, moe_layer_ids=()), "chat", **SMALL)


def test_steps_report_the_worst_of_their_layers():
    """`predict_steps`: the mean over layers and the worst of 58, against the loads of the same layers in a sweep."""
    options = {"ep_sizes": 8, "tokens": 64, "placements": "linear"}
    steps = sim.predict_steps(V3, "chat", "h200", **options, layer_sets=3, most_steps=3).set_index("metric")
    result = sim.sweep(V3, "chat", **options, trials=174, bound_layers=0, received="off")
    assert steps["mean"]["mean_imbalance"] == pytest.approx(result.summary.imbalance_mean.iloc[0])
    most = result.counts[result.counts.metric == "max_load"]["value"].max()
    assert steps.p99["worst_imbalance"] == pytest.approx(most / 64)
