"""Capacities: tails of tilted laws, deployments against sampled steps, exact answers, formulas of engines, bad usage."""

import numpy as np
import pandas as pd
import pytest
from scipy.stats import binom

import sim
from sim import InputError, load_model, load_workload, place
from sim.cli import main
from sim.cost.buffers import DEEPEP_LIMIT_BYTES, buffer_bytes, deepep_low_latency_bytes, size_buffers
from sim.cost.deployments import QUANTITIES, sample_deployments
from sim.sweeps.plan import make_plan
from sim.theory import UniformRouter, tails
from sim.theory.family import BERNOULLI, family_of, place_in_family, saddle_points, tail_of_tilted
from sim.theory.tails import tilted_moments
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
            at = [np.empty(1) for _ in range(3)]
            saddle_points(law[None], least / n_tokens, *at)
            comp = tail_of_tilted(n_tokens, least, *(part[0] for part in at), theta, cumulant, mean, variance)
            ref = tails(tilted[None] / tilted.sum(), n_tokens, least)[0]
            assert comp == pytest.approx(ref, rel=0.01 if n_tokens >= 128 else 0.04)


def test_a_law_of_a_family_has_its_mean():
    laws = np.random.default_rng(0).dirichlet(np.ones(5), 40)
    family = family_of(laws, 8)
    assert (np.diff(family.means) > 0).all()
    means = np.linspace(0.5, 3.5, 21)
    base, theta = np.empty(21, np.int64), np.empty(21)
    place_in_family(means, family.laws, family.means, base, theta)
    found = [tilted_moments(family.laws[b], t)[1] for b, t in zip(base, theta, strict=True)]
    np.testing.assert_allclose(found, means, rtol=1e-9)


@pytest.fixture(scope="module")
def deployments():
    plan = make_plan(
        V3, "chat", ep_sizes=[8, 32], tokens=256, placements=["linear", "round_robin", "eplb+32"], trials=1,
        bound_layers=0, received="off",
    )  # fmt: skip
    return plan, sample_deployments(plan, 58, 20, 2)


def test_means_are_those_of_a_sweep(deployments):
    """Mean tokens that a rank receives, from laws by mean load, against all tokens of sampled steps, within 1 %."""
    plan, found = deployments
    summary = sim.sweep(
        V3,
        "chat",
        ep_sizes=[8, 32],
        tokens=256,
        placements=["linear", "round_robin", "eplb+32"],
        trials=400,
        bound_layers=0,
    ).summary
    for (placement, ep_size), of_pair in zip(plan.grid.pairs, found, strict=True):
        row = summary[(summary.placement == placement) & (summary.ep_size == ep_size)].iloc[0]
        assert 256 * of_pair["received"].mean == pytest.approx(row.received_tokens_mean, rel=0.01)
        assert of_pair["pairs"].mean == pytest.approx(8 / ep_size, rel=1e-9)
        n_slots = 288 if placement == "eplb+32" else 256
        assert of_pair["expert_rows"].mean == pytest.approx(8 / n_slots, rel=1e-9)


@pytest.mark.parametrize("quantity", ["received", "pairs"])
def test_probabilities_hold_against_sampled_steps(deployments, quantity):
    """P(some rank of a layer has more than a capacity), layers drawn afresh, against a sweep of other layers.

    Not below it by more than 4 standard errors of both (one false alarm in 30,000 a line), nor above it by more than these and
    15 %, or under EPLB, whose ranks are nearly alike, three quarters: there the sum over groups of ranks is loose.
    """
    plan, found = deployments
    result = sim.sweep(
        V3, "chat", ep_sizes=[8, 32], tokens=256, placements=["linear", "round_robin", "eplb+32"], trials=2000,
        bound_layers=0, seed=9, replica_choice="vllm_hash",
    )  # fmt: skip
    metric = {"received": "received_tokens_max", "pairs": "max_load"}[quantity]
    counts = result.counts[result.counts.metric == metric]
    for (placement, ep_size), of_pair in zip(plan.grid.pairs, found, strict=True):
        of_cell = counts[(counts.placement == placement) & (counts.ep_size == ep_size)].sort_values("value")
        above = 1 - np.cumsum(of_cell["count"].to_numpy()) / 2000
        for wanted in (0.2, 0.05, 0.01):
            at = int(np.abs(above - wanted).argmin())
            p = -np.expm1(of_pair[quantity].log_fine(256, int(of_cell["value"].iloc[at])))
            se = np.hypot(p.mean(axis=1).std(ddof=1) / len(p) ** 0.5, (above[at] * (1 - above[at]) / 2000) ** 0.5)
            most = (1.75 if placement == "eplb+32" else 1.15) * above[at] + 4 * se
            assert above[at] - 4 * se <= p.mean() <= most, (placement, ep_size, wanted)


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


def test_worst_of_58_layers_against_independent_figures():
    """V3, chat, linear, 2048 tokens: the layer mean within 1 %; the mean of the worst of 58 layers, whose figures come from few
    deployments: within the spread between deployments, and 6 %.
    """
    from sim.cost.expert import expert_rates
    from sim.cost.steps import sample_steps

    sizes, worst, layer = [8, 16, 32, 64], [1.46, 1.71, 2.22, 3.10], [1.23, 1.39, 1.66, 2.15]
    rates = [expert_rates(V3, sim.load_gpu("h200"), "fp8")]
    sample = sample_steps(
        V3, "chat", rates, layer_sets=60, most_steps=60, budget_tokens=2**23, ep_sizes=sizes, tokens=2048,
        placements="linear",
    )  # fmt: skip
    for size, ref_worst, ref_layer in zip(sizes, worst, layer, strict=True):
        imbalance = sample.max_load[sample.cell("linear", size, 2048)] / (2048 * 8 / size)
        of_deployment = imbalance.max(axis=1)
        assert imbalance.mean() == pytest.approx(ref_layer, rel=0.01)
        assert np.quantile(of_deployment, 0.025) < ref_worst < np.quantile(of_deployment, 0.975)
        assert of_deployment.mean() == pytest.approx(
            ref_worst, rel=0.06 + 2 * of_deployment.std() / 60**0.5 / ref_worst
        )


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


def test_the_verb_prints_and_writes(tmp_path, capsys):
    words = "capacity --ep 16 --tokens-per-rank 32 --placement linear,round_robin --deployments 8 --horizon 24h"
    assert main([*words.split(), "--capacity-factor", "1.25", "--out", str(tmp_path / "cap")]) == 0
    said = capsys.readouterr().out
    assert "received tokens, capacity exceeded with a probability of at most 0.001" in said
    assert "vLLM receive fraction" in said
    assert "Capacity factor 1.25" in said
    table = pd.read_csv(tmp_path / "cap" / "capacity.csv")
    assert list(table.columns) == COLUMNS
    assert (tmp_path / "cap" / "capacity.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--capacity-factor", "0.9"], "--capacity-factor 0.9: must be a number from 1 to 10000"),
        (["--horizon", "0"], "--horizon '0': expected a time"),
        (["--horizon", "0h"], "--horizon '0h': expected a time"),
        (["--horizon", "1s", "--steps-per-second", "0.1"], "--horizon: it has no step"),
        (["--steps-per-second", "-3"], "--steps-per-second -3"),
        (["--risk", "0"], "--risk 0.0: must be a probability above 0 and below 1"),
        (["--risk", "1"], "--risk 1.0: must be a probability above 0 and below 1"),
        (["--deployments", "1"], "--deployments 1: must be a whole number from 2 to 100000"),
        (["--workload", "prefill"], "the tokens of a request are not independent"),
        (["--dummy-tokens", "3"], "dummy tokens are identical"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["capacity", "--ep", "8", "--tokens", "64", *words, "--out", "new"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len([line for line in said.splitlines() if "error" in line]) == 1
    assert not (tmp_path / "new").exists()


def test_a_model_without_sizes_is_refused():
    from dataclasses import replace

    with pytest.raises(InputError, match="sizes that are not known"):
        sim.capacity(replace(V3, moe_intermediate_size=0), "chat", **SMALL)
    with pytest.raises(InputError, match="needs the number of MoE layers"):
        sim.capacity(replace(V3, n_moe_layers=0, moe_layer_ids=()), "chat", **SMALL)


def test_the_family_of_what_happens_or_not_is_binomial():
    at = [np.empty(1) for _ in range(3)]
    saddle_points(BERNOULLI.laws, 0.4, *at)
    theta = np.log(0.25 / 0.75)
    cumulant, mean, variance = tilted_moments(BERNOULLI.laws[0], theta)
    assert tail_of_tilted(500, 200, *(part[0] for part in at), theta, cumulant, mean, variance) == pytest.approx(
        binom.sf(199, 500, 0.25), rel=2e-3
    )
