"""Steps through all layers: slowest ranks against a plain loop, gains, what engines log, dummy tokens."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from conftest import fails
from scipy.stats import t

import sim
from sim import InputError, expert_time_us, load_gpu, load_model, load_workload, place, predict_gain, predict_steps
from sim.cli import main
from sim.cost.expert import crossover_tokens, expert_rates
from sim.cost.gain import PERFECT
from sim.cost.step_log import balancedness_sglang, balancedness_vllm, compare_log, read_log
from sim.cost.steps import balanced_times, sample_steps
from sim.router import draw_trials
from sim.stats import clustered_quantile, ratio_interval

V3 = load_model("deepseek-v3")
SMALL = {"layer_sets": 2, "most_steps": 6, "budget_tokens": 2**17}


def rates_of(*gpus):
    return [expert_rates(V3, gpu) for gpu in gpus]


def sample(tokens=(4, 64), placements=("linear", "round_robin"), **more):
    return sample_steps(
        V3,
        "chat",
        rates_of("h200", "h20"),
        **{"ep_sizes": [8, 12], "tokens": list(tokens), "placements": list(placements)} | SMALL | more,
    )


def test_slowest_ranks_are_those_of_a_plain_loop():
    """Loads and times of every rank, computed with `expert_time_us` from the same tokens."""
    comp = sample()
    counts, _ = draw_trials(V3, load_workload("chat"), 0, range(0, 116), 116, np.array([4, 64]))
    for placement in ("linear", "round_robin"):
        for ep_size in (8, 12):
            ranks = place(placement, V3, ep_size).rank_of_expert
            for step, tokens in enumerate((4, 64)):
                cell = comp.cell(placement, ep_size, tokens)
                for trial in range(0, 116, 29):
                    count = counts[trial, step]
                    loads = np.bincount(ranks, weights=count, minlength=ep_size)
                    local = np.bincount(ranks, minlength=ep_size)
                    distinct = np.bincount(ranks, weights=count > 0, minlength=ep_size)
                    at = divmod(trial, 58)
                    assert comp.max_load[cell][at] == loads.max()
                    for g, gpu in enumerate(("h200", "h20")):
                        ref = expert_time_us(V3, gpu, pairs=loads, distinct_experts=distinct, local_experts=local)
                        assert comp.slowest_us[cell][at][g] == pytest.approx(ref.max(), rel=1e-12)


def test_steps_have_the_loads_of_a_sweep():
    """The same seed, the same layer draws: the same mean of the largest load, to the last digit."""
    steps = sample(tokens=[16], most_steps=6)
    trials, draws = steps.max_load[0].size, 2 * 58
    swept = sim.sweep(
        V3, "chat", ep_sizes=[8, 12], tokens=16, placements=["linear", "round_robin"], trials=trials, draws=draws,
        bound_layers=0,
    )  # fmt: skip
    for row in swept.summary.itertuples():
        cell = steps.cell(row.placement, row.ep_size, 16)
        assert steps.max_load[cell].mean() == row.max_load_mean


def test_the_sample_does_not_depend_on_threads():
    one, two = sample(threads=1), sample(threads=2)
    for a, b in zip(one.slowest_us, two.slowest_us, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(one.reached, two.reached)


def test_large_steps_are_fewer_and_the_same_tokens():
    many, few = sample(tokens=[8, 512]), sample(tokens=[8])
    assert many.max_load[many.cell("linear", 8, 512)].shape == (4, 58)
    assert many.max_load[many.cell("linear", 8, 8)].shape == (6, 58)
    np.testing.assert_array_equal(many.max_load[0], few.max_load[0])


def test_load_bound_is_where_time_grows_with_load():
    few, many = (sample(tokens=[n]).load_bound[0] for n in (4, 4096))
    assert not few.any()
    assert many[..., 1].all()


# Statistics


def test_ratio_interval_of_differences():
    """With equal denominators the ratio is a mean, and its interval Student's."""
    x = np.random.default_rng(0).normal(2, 1, 40)
    ratio, low, high = ratio_interval(x, np.ones(40))
    half = t.isf(0.025, 39) * x.std(ddof=1) / np.sqrt(40)
    np.testing.assert_allclose([ratio, low, high], [x.mean(), x.mean() - half, x.mean() + half])
    assert np.isnan(ratio_interval(np.ones(1), np.ones(1))[1])


def test_ratio_intervals_cover():
    """2000 seeds of 60 correlated pairs: coverage of 95 % within 93.5 to 96.5 % (false alarms below 1 in 500)."""
    rng = np.random.default_rng(1)
    bottom = rng.gamma(20, 1, (2000, 60))
    top = 0.9 * bottom + rng.normal(0, 1, bottom.shape)
    ends = np.array([ratio_interval(a, b)[1:] for a, b in zip(top, bottom, strict=True)])
    covered = ((ends[:, 0] <= 0.9) & (ends[:, 1] >= 0.9)).mean()
    assert 0.935 <= covered <= 0.965


def test_clustered_quantiles_cover():
    """400 seeds of 40 draws of 10 correlated blocks, 80th percentile: at least 92 % (false alarms below 1 in 200)."""
    rng = np.random.default_rng(2)
    draw, covered = np.repeat(np.arange(40), 10), 0
    true = np.sqrt(2) * 0.8416212335729143
    for _ in range(400):
        values = rng.normal(size=40)[draw] + rng.normal(size=400)
        at, low, high = clustered_quantile(values, draw, 0.8)
        assert low <= at <= high
        covered += low <= true <= high
    assert covered >= 368


# Gains


def gain(**more):
    return predict_gain(V3, "chat", ["h20", "h200"], **{"ep_sizes": 8, "tokens": [1, 256, 16384], **SMALL} | more)


def test_gains_are_u_shaped():
    """Few tokens: distinct experts; the middle: nothing; many: tokens. Intervals do not touch.

    A layer saves less than its experts: with one token on H200 the exchange, which no placement changes much, takes 99 of
    176 us, and 10 % of the other 77 are 4 % of all. At 256 tokens only the exchange gains: it goes with the busiest rank's pairs.
    """
    rows = gain(tokens=[1, 256, 16384]).set_index(["gpu", "tokens"])
    for gpu in ("h20", "h200"):
        few, middle, many = (rows.loc[(gpu, n)] for n in (1, 256, 16384))
        assert few.experts_saved_low > 0.08
        assert few.layer_saved_low > 0.08 * (1 - few.baseline_exchange_us / few.baseline_layer_us)
        assert middle.experts_saved_high < 0.001
        assert middle.layer_saved_high < 0.0045
        assert many.layer_saved_low > 2 * middle.layer_saved_high
    assert rows.loc[("h20", 1)].layer_saved > rows.loc[("h200", 1)].layer_saved


def test_times_are_for_the_type_that_the_experts_are_stored_in_where_the_gpus_compute_in_it():
    options = {"ep_sizes": 4, "tokens": [64], **SMALL, "layer_sets": 1, "most_steps": 1}
    for model, gpus, dtype in (
        ("deepseek-v3", "h200", "fp8"),
        ("mixtral-8x7b", "h200", "bf16"),
        ("gpt-oss-20b", "b200", "fp4"),
        ("gpt-oss-20b", ["b200", "h200"], "fp8"),  # which does not compute in fp4
    ):
        by_default, given = (predict_gain(model, "chat", gpus, **options, **more) for more in ({}, {"dtype": dtype}))
        pd.testing.assert_frame_equal(by_default, given)
        if isinstance(gpus, str):
            assert predict_steps(model, "chat", gpus, placements="linear", **options)["dtype"].unique() == [dtype]
            loads = {"pairs": 8, "distinct_experts": 8, "local_experts": 8}
            assert expert_time_us(model, gpus, **loads) == expert_time_us(model, gpus, **loads, dtype=dtype)


def test_equal_layouts_save_nothing():
    rows = gain(placement="linear_legacy", tokens=[8])
    assert (rows[["layer_saved", "layer_saved_low", "layer_saved_high", "experts_saved"]] == 0).all(axis=None)


def test_the_whole_step_dilutes_the_gain():
    layers = gain(tokens=[8]).iloc[0]
    share = gain(tokens=[8], moe_share=0.5).iloc[0]
    assert share.step_saved == pytest.approx(0.5 * layers.layer_saved)
    step = gain(tokens=[8], step_us=4e3 * layers.baseline_step_ms).iloc[0]
    assert step.moe_share == pytest.approx(0.25)
    assert np.isnan(layers.step_saved)


def test_the_exchange_counts_or_is_left_out():
    with_it, hidden = gain(tokens=[8]).iloc[0], gain(tokens=[8], exchange="none").iloc[0]
    assert hidden.baseline_exchange_us == 0
    assert not hidden.extrapolated
    assert hidden.layer_saved == hidden.experts_saved == with_it.experts_saved
    assert with_it.extrapolated


def test_each_kind_of_exchange_has_rows_of_its_own():
    """round_robin evens pairs out and raises received tokens; gather and reduce do not see it. Backends go by their kind."""
    kinds = ["pair", "token", "gather", "reduce", "none"]
    table = gain(tokens=[8192], exchange=kinds)
    assert table.exchange.tolist() == [kind for kind in kinds for _ in ("h20", "h200")]
    rows = table[table.gpu == "h200"].set_index("exchange")
    old, new = rows.baseline_exchange_us, rows.exchange_us
    assert new["pair"] < old["pair"]
    assert new["token"] > 1.1 * old["token"]
    assert (new[["gather", "reduce", "none"]] == old[["gather", "reduce", "none"]]).all()
    assert rows.experts_saved.nunique() == 1
    by_name = gain(tokens=[8192], exchange=["deepep_low_latency", "deepep_v2", "allgather_reducescatter"])
    of_kind = gain(tokens=[8192], exchange=["pair", "token", "gather"])
    pd.testing.assert_frame_equal(by_name.drop(columns="exchange"), of_kind.drop(columns="exchange"))


def test_received_tokens_are_those_of_a_plain_loop():
    comp = sample(tokens=[4, 64], counts_received=True)
    _, ids = draw_trials(V3, load_workload("chat"), 0, range(0, 58), 116, np.array([4, 64]), 64)
    uncounted = sample(tokens=[4]).received[0]  # even over ranks, from the fan-out
    assert 0 < uncounted.min() <= uncounted.max() < comp.received[comp.cell("linear", 12, 4)].mean()
    for placement in ("linear", "round_robin"):
        ranks = place(placement, V3, 12).rank_of_expert
        for tokens in (4, 64):
            of_rank = [[(ranks[ids[t, :tokens]] == r).any(axis=1).sum() for r in range(12)] for t in range(0, 58, 19)]
            assert comp.received[comp.cell(placement, 12, tokens)][0, ::19].tolist() == np.max(of_rank, axis=1).tolist()


def test_crossover_is_where_the_time_begins_to_grow():
    """Under even load, one token more per expert costs its input and output alone below, and its row above."""
    for gpu in ("h20", "h200", "b200"):
        rates = expert_rates(V3, gpu)
        pairs = crossover_tokens(V3, rates) * 8 / 8
        times = expert_time_us(
            V3, gpu, pairs=pairs * np.array([0.3, 0.31, 0.99, 1.01, 6, 6.1]), distinct_experts=32, local_experts=32
        )
        below, at, above = np.diff(times)[::2] / (pairs * np.array([0.01, 0.02, 0.1])) / rates.us_per_row
        assert below < 0.11
        assert 0.3 < at < 0.8
        assert 0.98 < above < 1.02
    assert crossover_tokens(V3, expert_rates(V3, "h20")) == 1024


# What engines log


def test_steps_log_the_balancedness_of_engines():
    steps = sample(tokens=[8], placements=["linear"])
    logged = predict_steps(V3, "chat", "h200", placements=["linear"], ep_sizes=[8, 12], tokens=[8], **SMALL)
    counts, _ = draw_trials(V3, load_workload("chat"), 0, range(0, 58), 116, np.array([8]))
    loads = np.array([np.bincount(place("linear", V3, 8).rank_of_expert, weights=c[0], minlength=8) for c in counts])
    at = loads.mean(), loads.max(axis=1)
    first = {"balancedness_vllm": balancedness_vllm(*at), "balancedness_sglang": balancedness_sglang(*at)}
    assert balancedness_vllm(0, np.zeros(1)) == 0
    assert balancedness_sglang(0, np.zeros(1)) == 1
    of = logged[(logged.ep_size == 8)].set_index("metric")
    for metric, value in first.items():
        assert of.loc[metric].p01 <= value <= of.loc[metric].p99
        assert of.loc[metric].low <= of.loc[metric]["mean"] <= of.loc[metric].high
    expected = steps.slowest_us[0][..., 0].sum(axis=1).mean() / 1e3
    assert of.loc["slowest_rank_ms"]["mean"] == pytest.approx(expected)
    assert of.loc["moe_ms"]["mean"] > expected


def test_a_log_is_laid_beside(tmp_path, capsys):
    logged = predict_steps(V3, "chat", "h200", placements=["linear"], ep_sizes=8, tokens=[8], **SMALL)
    row = logged[logged.metric == "balancedness_vllm"].iloc[0]
    path = tmp_path / "log.csv"
    path.write_text("step,balancedness\n" + "".join(f"{i},{row['mean']}\n" for i in range(5)))
    compared = compare_log(logged, "balancedness_vllm", read_log(path, "balancedness_vllm").values).iloc[0]
    assert compared.inside == 1
    assert compared.log_steps == 5
    assert main(f"step --ep 8 --tokens 8 --layer-sets 2 --steps 4 --log {path}".split()) == 0
    assert "your log: 5 values" in capsys.readouterr().out


def test_bad_logs_are_refused(tmp_path):
    for text, message in (
        ("", "holds no numbers"), ("1\n\nx\n", "line 3 does not end"), ("0.5\nnan\n", "nan is no value"),
        ("-1\n", "-1 is no value"), ("0.5\n1.5\n", "1.5 is no value of balancedness_vllm: they are numbers from 0 to 1"),
    ):  # fmt: skip
        (tmp_path / "log").write_text(text)
        with pytest.raises(InputError, match=message):
            read_log(tmp_path / "log", "balancedness_vllm")
        (tmp_path / "log").write_text("1.5\n")  # a time may be above 1
        assert read_log(tmp_path / "log", "moe_ms").values.tolist() == [1.5]


@pytest.mark.parametrize("verb", ["step", "gain --markdown"])
def test_one_layer_set_has_no_interval_and_says_nothing_of_nan(verb, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).random((40, 1, 32)).argsort(axis=2)[:, :, :4]
    np.savez("one.npz", topk_ids=ids, sequence_lengths=np.full(4, 10))
    words = f"{verb} --model gpt-oss-20b --workload one.npz --ep 2 --tokens 8 --steps 4"
    assert main(words.split()) == 0
    out = capsys.readouterr().out
    assert "nan" not in out
    assert "±" not in out


# Dummy tokens


def test_dummy_tokens_are_one_token_many_times():
    plain, dummies = (load_workload("chat", dummy_tokens=n) for n in (0, 5))
    tokens = np.array([2, 16])
    own, _ = draw_trials(V3, plain, 3, range(10), 20, tokens)
    both, _ = draw_trials(V3, dummies, 3, range(10), 20, tokens)
    extra = both - own
    assert set(np.unique(extra)) == {0, 5}
    assert (extra.sum(axis=2) == 5 * V3.top_k).all()
    np.testing.assert_array_equal(extra[:, 0], extra[:, 1])
    again, _ = draw_trials(V3, dummies, 3, range(20, 30), 20, tokens)
    own_again, _ = draw_trials(V3, plain, 3, range(20, 30), 20, tokens)
    np.testing.assert_array_equal(again - own_again, extra)  # the same layers, the same dummy token
    groups = [set(np.flatnonzero(row) // V3.group_size) for row in extra[:, 0]]
    assert all(len(g) <= V3.topk_group for g in groups)


def test_dummy_tokens_count_as_load(capsys, tmp_path):
    assert main(f"sweep --ep 8 --tokens 8 --trials 200 --dummy-tokens 8 --out {tmp_path / 'a'}".split()) == 0
    assert "dummy tokens are identical" in capsys.readouterr().err
    rows = sim.read_result(tmp_path / "a").summary
    assert (rows.mean_load == 16).all()
    assert main(f"sweep --ep 8 --tokens 8 --trials 200 --out {tmp_path / 'b'}".split()) == 0
    assert set(sim.read_result(tmp_path / "b").summary.cell_id).isdisjoint(rows.cell_id)
    capsys.readouterr()
    fails(capsys, f"sweep --ep 8 --tokens 8 --trials 200 --out {tmp_path / 'a'}".split(), "holds another sweep")


def test_dummy_tokens_may_reach_every_copy_of_their_experts():
    toy, options = sim.ModelSpec("toy", 16, 2), {"ep_sizes": 32, "tokens": 1, "placements": "eplb+48", "trials": 20}
    result = sim.sweep(toy, load_workload("chat", dummy_tokens=100), **options, bound_layers=0)
    assert (result.summary.idle_ranks_mean_low <= result.summary.idle_ranks_mean).all()
    assert (result.tail.low <= result.tail.probability).all()
    with pytest.raises(InputError, match="`replica_choice` vllm_hash: dummy tokens"):
        sim.sweep(toy, load_workload("chat", dummy_tokens=100), **options, replica_choice="vllm_hash")


def test_dummy_tokens_are_checked(capsys):
    fails(capsys, ["sweep", "--dummy-tokens", "-1"], "dummy_tokens")


# The command


def test_gain_prints_and_writes(tmp_path, capsys):
    words = f"gain --gpu h20,h200 --ep 8 --tokens 1,64 --layer-sets 2 --steps 4 --moe-share 50% --out {tmp_path}"
    assert main(words.split()) == 0
    out, err = capsys.readouterr()
    assert "h20 1024" in out
    assert "step saved" not in err
    assert "50%" in out
    assert "exchange computed, not measured" in out
    assert "network differs by cluster" in err
    table = pd.read_csv(tmp_path / "gain.csv")
    assert len(table) == 4
    assert {path.name for path in tmp_path.iterdir()} == {"gain.csv", "gain.json", "gain_by_tokens.png"}


def test_bad_usage_is_one_line_and_status_2(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        ("gain --gpu h21", "gpu 'h21' is not known"),
        ("gain --dtype int4", "dtype int4"),
        ("gain --gpu h20 --dtype fp4", "gpu h20 has no fp4 peak"),
        ("gain --placement linear", "--baseline linear and --placement linear are the same"),
        ("gain --baseline group_aware", "--baseline group_aware and --placement round_robin are the same"),
        ("gain --placement best", "--placement 'best' is not known"),
        ("gain --placement random,linear", "--baseline linear and --placement linear are the same"),
        ("gain --exchange nccl", "--exchange 'nccl' is not known"),
        ("gain --exchange pair,moonep", "--exchange moonep: it balances within the step"),
        ("gain --moe-share 40% --step-ms 20", "give one of them"),
        ("gain --step-ms 0.1 --steps 1 --layer-sets 1 --ep 8 --tokens 1", "--step-ms: 0.1 ms is below the"),
        ("gain --tokens 0", "--tokens 0"),
        ("gain --ep 300", "--ep 300"),
        ("gain --steps 0", "--steps 0"),
        ("step --gpu h20,h200", "one GPU at a time"),
        ("step --log /absent", "does not exist"),
        ("gain --model mixtral-8x7b --tokens 1 --phase decode", "--phase goes with a recorded workload"),
    ):
        fails(capsys, words.split(), message)
    assert not list(tmp_path.iterdir())


def test_a_model_without_sizes_is_refused():
    bare = dataclasses.replace(V3, moe_intermediate_size=0, unverified=("moe_intermediate_size",))
    with pytest.raises(InputError, match=r"not known: moe_intermediate_size \(not verified: moe_intermediate_size\)"):
        predict_gain(bare, "chat", load_gpu("h20"), ep_sizes=8, tokens=8)
    with pytest.raises(InputError, match="number of MoE layers"):
        predict_gain(dataclasses.replace(V3, n_moe_layers=0), "chat", "h20", ep_sizes=8, tokens=8)


# Perfect balance, and several placements at once


def test_no_placement_beats_perfect_balance_in_any_layer():
    """Layer by layer, replicas included, few tokens and many; and its time is that of the even shares."""
    h20 = load_gpu("h20")
    steps = sample(placements=["linear", "eplb", "eplb+8"], ep_sizes=[8], tokens=[1, 8, 512], fit_tokens=4096)
    for tokens in (1, 8, 512):
        base = steps.cell("linear", 8, tokens)
        least = balanced_times(steps, base, h20, "fp8", "none").experts_us
        active = steps.active_experts[steps.plan.grid.cells[base][1]]
        ref = expert_time_us(V3, h20, pairs=tokens * 8 / 8, distinct_experts=active / 8, local_experts=32)
        np.testing.assert_allclose(least, ref, rtol=1e-12)
        for placement in ("linear", "eplb", "eplb+8"):
            assert (steps.slowest_us[steps.cell(placement, 8, tokens)][..., 1] >= least * (1 - 1e-9)).all()


def test_active_experts_and_idle_ranks_are_counted():
    comp = sample(tokens=[1, 3], ep_sizes=[32])
    counts, _ = draw_trials(V3, load_workload("chat"), 0, range(0, 58), 116, np.array([1, 3]))
    ranks = place("round_robin", V3, 32).rank_of_expert
    for step, tokens in enumerate((1, 3)):
        cell = comp.cell("round_robin", 32, tokens)
        for trial in range(58):
            count = counts[trial, step]
            loads = np.bincount(ranks, weights=count, minlength=32)
            assert comp.active_experts[step][0, trial] == (count > 0).sum()
            assert comp.idle_ranks[cell][0, trial] == (loads == 0).sum()


def test_several_placements_give_the_rows_of_each_alone():
    together = gain(placement=["round_robin", PERFECT, "random"])
    assert list(dict.fromkeys(together.placement)) == ["round_robin", PERFECT, "random"]
    alone = pd.concat([gain(placement=name) for name in ("round_robin", "random")])
    for placement, rows in alone.groupby("placement"):
        mine = together[together.placement == placement].reset_index(drop=True)
        pd.testing.assert_frame_equal(mine, rows.reset_index(drop=True))
    perfect = together[together.placement == PERFECT]
    assert (perfect.layer_saved.to_numpy() >= together[together.placement == "random"].layer_saved.to_numpy()).all()
    assert (perfect.imbalance == 1).all()
    assert perfect.idle_ranks.isna().all()


def test_rows_near_the_crossover_are_marked():
    """In fp8 from 0.3 of it to 6 times it, on each GPU its own."""
    table = gain(tokens=[256, 2048, 8192, 32768])
    for row in table.itertuples():
        assert row.knee == (0.3 <= row.tokens / row.crossover_tokens <= 6)
    assert table.groupby("gpu").knee.apply(list).to_dict() == {
        "h20": [False, True, False, False],  # 1,024
        "h200": [False, True, True, False],  # 4,497
    }
