"""Load-aware placements and replicas in sweeps: what they are fitted on, which copies take pairs, what the tables say."""

import dataclasses
import json
from contextlib import nullcontext

import numpy as np
import pandas as pd
import pytest
from conftest import fails, run, write
from hypothesis import given
from hypothesis import strategies as st
from naive import scores as ref_scores
from naive import slot_counts as ref_slot_counts

from sim import InputError, ModelSpec, load_model, load_workload, place, sweep
from sim.advice.splits import splits_of
from sim.copies import assign_by_hash, assign_evenly, find_copies, pick_slots
from sim.router import draw_loads, draw_trials
from sim.sweeps import make_plan
from sim.traffic import FittedLayers, LoadCounts, SyntheticTraffic
from sim.traffic.counts import build_counts

V3, CHAT = load_model("deepseek-v3"), load_workload("chat")
NAMES = ["linear", "eplb", "eplb+16", "linear+16", "eplb_refined"]
SMALL = {"ep_sizes": [4, 16], "tokens": [1, 16], "placements": NAMES, "trials": 30, "seed": 4, "fit_tokens": 500}


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(0, 6), st.sampled_from(["even", "vllm_hash"]))
def test_pairs_are_assigned_to_copies_as_the_reference_does(seed, n_experts, redundant, choice):
    rng = np.random.default_rng(seed)
    maps = [rng.permutation([*range(n_experts), *rng.integers(0, n_experts, redundant)]) for _ in range(2)]
    top_k = int(rng.integers(1, n_experts + 1))
    ids = np.array([[rng.permutation(n_experts)[:top_k] for _ in range(12)] for _ in range(3)], np.int16)
    steps, layout = np.array([1, 5, 12]), np.array([1, 0, 1])
    counts = np.array([[np.bincount(t[:n].ravel(), minlength=n_experts) for n in steps] for t in ids], np.int32)
    comp = np.empty((3, 3, n_experts + redundant), np.int32)
    copies = find_copies(np.array(maps, np.int16), n_experts)
    if choice == "even":
        assign_evenly(counts, layout, copies, comp)
    else:
        assign_by_hash(ids, steps, layout, copies, comp)
    for t in range(3):
        for j, n in enumerate(steps):
            ref = ref_slot_counts(ids[t, :n].tolist(), maps[layout[t]].tolist(), n_experts, choice)
            assert comp[t, j].tolist() == ref
    assert (comp.sum(axis=2) == steps * top_k).all()


def test_a_token_of_the_fan_out_goes_to_one_copy_of_each_expert_and_to_all_equally_often():
    maps = np.array([[0, 1, 2, 0, 1, 0]], np.int16)
    copies, n = find_copies(maps, 3), 6000
    slots = np.empty((n, 3), np.int16)
    pick_slots(np.tile(np.arange(3, dtype=np.int16), (n, 1)), 1000 + np.arange(n), np.zeros(n, np.int64), copies, slots)
    np.testing.assert_array_equal(maps[0][slots], np.tile([0, 1, 2], (n, 1)))
    shares = np.bincount(slots.ravel(), minlength=6) / n
    np.testing.assert_allclose(shares, [1 / 3, 1 / 2, 1, 1 / 3, 1 / 2, 1 / 3], atol=0.01)


@pytest.mark.slow
@pytest.mark.parametrize(("choice", "draws"), [("even", 7), ("vllm_hash", None)])
def test_summary_equals_a_plain_recomputation(choice, draws):
    result = sweep(V3, CHAT, **SMALL, draws=draws, replica_choice=choice)
    rows = result.summary.set_index(["placement", "ep_size", "tokens"])
    loads = draw_loads(V3, CHAT, 4, range(draws or 30), 500)
    blocks = {}
    for trial in range(30):
        _, ids = draw_trials(V3, CHAT, 4, range(trial, trial + 1), draws or 30, np.array([1, 16]), 16)
        for name in NAMES:
            for ep_size in (4, 16):
                of_draw = loads[trial % (draws or 30)] if name.startswith("eplb") else None
                placement = place(name, V3, ep_size, loads=of_draw)
                for tokens in (1, 16):
                    counts = ref_slot_counts(ids[0, :tokens].tolist(), placement.logical_of_slot.tolist(), 256, choice)
                    scores = ref_scores(counts, placement.rank_of_slot.tolist(), ep_size)
                    blocks.setdefault((name, ep_size, tokens), []).append(scores)
    for key, scores in blocks.items():
        row, values = rows.loc[key], np.array(scores)
        assert row.max_load_mean == pytest.approx(values[:, 0].mean())
        assert row.idle_ranks_mean == pytest.approx(values[:, 1].mean())
        assert row.distinct_experts_busiest_mean == pytest.approx(values[:, 2].mean())
        assert row.distinct_experts_max_mean == pytest.approx(values[:, 3].mean())
        change = values[:, 0] - np.array(blocks[("linear", *key[1:])])[:, 0]
        assert row.imbalance_change_mean == pytest.approx(change.mean() / row.mean_load)


def test_loads_are_fitted_on_other_tokens_of_the_same_layers():
    """Shares of the fit and of the scored tokens agree within their noise for a draw, and not for another draw."""
    fit = draw_loads(V3, CHAT, 3, range(2), 2**16) / 2**16
    scored, _ = draw_trials(V3, CHAT, 3, range(2), 2, np.array([2**16]))
    scored = scored[:, 0] / 2**16
    noise = np.sqrt((fit + scored) / 2**16)
    assert not (fit == scored).all()
    z = (fit - scored) / noise
    assert (np.abs(z) < 5).all()  # 512 comparisons: false alarm below 1e-3
    assert 0.8 < np.mean(z**2) < 1.2
    assert np.mean(((fit - scored[::-1]) / noise) ** 2) > 100
    np.testing.assert_array_equal(draw_loads(V3, CHAT, 3, range(1, 2), 2**16)[0] / 2**16, fit[1])


@pytest.mark.slow
def test_cells_do_not_depend_on_the_others():
    """Neither linear's on what eplb is fitted on, nor eplb's on other placements."""
    whole = sweep(V3, CHAT, **SMALL)
    alone = sweep(V3, CHAT, **{**SMALL, "placements": "eplb+16", "ep_sizes": 16})
    row = whole.summary.query("placement == 'eplb+16' and ep_size == 16").reset_index(drop=True)
    columns = [name for name in row.columns if "change" not in name and name != "baseline"]
    pd.testing.assert_frame_equal(alone.summary[columns], row[columns])
    other = sweep(V3, CHAT, **SMALL | {"fit_tokens": 400})
    pd.testing.assert_frame_equal(
        whole.summary.query("placement == 'linear'"), other.summary.query("placement == 'linear'")
    )
    fitted = whole.summary.placement.str.startswith("eplb")
    assert (whole.summary.cell_id[fitted] != other.summary.cell_id[fitted]).all()
    hashed = sweep(V3, CHAT, **SMALL, replica_choice="vllm_hash")
    changed = hashed.summary.cell_id != whole.summary.cell_id
    assert set(whole.summary.placement[changed]) == {"eplb+16", "linear+16"}
    assert (changed == whole.summary.placement.isin(["eplb+16", "linear+16"])).all()


def test_identity_has_what_the_tables_depend_on():
    plain = make_plan(V3, CHAT, **SMALL | {"placements": "linear", "fit_tokens": None}).identity
    fitted = make_plan(V3, CHAT, **SMALL).identity
    assert not {"fit", "replica_choice"} & set(plain)
    assert fitted["fit"] == "500 other tokens of each layer draw"
    assert fitted["replica_choice"] == "even"
    assert (
        make_plan(V3, CHAT, **SMALL | {"placements": ["eplb"]}).identity["layouts"][0].startswith("eplb, fitted on 500")
    )


def test_bounds_past_sampling_leave_replicas_out():
    result = sweep(V3, CHAT, **SMALL | {"placements": ["linear", "eplb", "eplb+16"], "bound_layers": 4})
    beyond = result.tail[result.tail.given != ""]
    assert set(beyond.placement) == {"linear", "eplb"}
    assert set(beyond.given) == {"4 drawn layers"}
    uniform = sweep(V3, "uniform", **SMALL | {"placements": ["linear", "eplb", "eplb+16"], "bound_layers": 4})
    theory = uniform.tail[
        uniform.tail.probability.between(0, 1, inclusive="neither") & (uniform.tail.method != "sampled")
    ]
    assert set(theory.placement) == {"linear"}


def test_what_eplb_buys():
    """Chat traffic, 4096 tokens: EPLB is far below linear, replicas help at EP 32, few tokens to fit on spoil it. Paired over
    200 layers; each difference is beyond 5 standard errors.
    """
    options = {"ep_sizes": [16, 32], "tokens": 4096, "trials": 200, "bound_layers": 0}
    names = ["linear", "eplb", "eplb+32"]
    rows = {n: sweep(V3, CHAT, **options, placements=names, fit_tokens=n).summary for n in (64, 2**14)}
    by_fit = {n: table.set_index(["placement", "ep_size"]).imbalance_mean for n, table in rows.items()}
    many, few = by_fit[2**14], by_fit[64]
    for ep_size in (16, 32):
        assert many["eplb", ep_size] - 1 < 0.3 * (many["linear", ep_size] - 1)
        assert few["eplb", ep_size] - many["eplb", ep_size] > 0.1
        assert few["eplb", ep_size] < many["linear", ep_size]
    assert many["eplb+32", 32] < many["eplb", 32] - 0.02


@pytest.fixture
def trace(tmp_path):
    """Records of 3 layers with popular experts; `other` is of the same layers, `short` of two."""
    rng = np.random.default_rng(0)
    mu = rng.normal(0, 1, (3, 32))

    def record(name, n_tokens, layers):
        noise = rng.gumbel(size=(n_tokens, layers, 32))
        ids = np.argsort(-(mu[:layers] + noise), axis=2)[:, :, :4].astype(np.int16)
        np.savez(tmp_path / f"{name}.npz", topk_ids=ids, sequence_lengths=np.full(n_tokens // 10, 10))
        return tmp_path / f"{name}.npz"

    return record("mine", 2000, 3), record("other", 1000, 3), record("short", 1000, 2)


def test_recorded_traffic_is_fitted_on_every_second_sequence(trace):
    record = load_workload(f"file:{trace[0]}")
    even, odd = record.halves()
    whole = record.topk_ids.reshape(3, 200, 10, 4)
    np.testing.assert_array_equal(even.topk_ids, whole[:, ::2].reshape(3, 1000, 4))
    np.testing.assert_array_equal(odd.topk_ids, whole[:, 1::2].reshape(3, 1000, 4))
    assert even.digest != odd.digest != record.digest
    options = {"ep_sizes": 4, "tokens": [64], "trials": 300}
    fitted = sweep("gpt-oss-20b", record, **options, placements=["linear", "eplb", "eplb+8"])
    assert set(fitted.summary.workload) == {"file:mine.npz [odd sequences]"}
    scored = sweep("gpt-oss-20b", odd, **options, placements="linear")
    assert scored.summary.imbalance_mean[0] == fitted.summary.imbalance_mean[0]
    means = fitted.summary.set_index("placement").imbalance_mean
    assert means["eplb"] < means["linear"]
    loads = even.count_experts(32)
    plan = make_plan("gpt-oss-20b", record, **options, placements="eplb+8")
    for layer in range(3):
        ref = place("eplb+8", load_model("gpt-oss-20b"), 4, loads=loads[layer]).logical_of_slot
        np.testing.assert_array_equal(plan.placements[0].experts[layer], ref)


def test_fit_on_another_record(trace, tmp_path, capsys):
    mine, other, short = trace
    words = f"sweep --model gpt-oss-20b --ep 4 --tokens 64 --trials 30 --placement linear,eplb+8 --workload file:{mine}"
    words = words.split()
    assert run(*words, "--fit-on", f"file:{other}", "--out", tmp_path / "a") == 0
    assert "fitted on other.npz" in capsys.readouterr().err
    assert set(pd.read_csv(tmp_path / "a" / "summary.csv").workload) == {"file:mine.npz"}
    identity = json.loads((tmp_path / "a" / "provenance.json").read_text())["sweep"]
    assert identity["fit"].startswith("other.npz (")
    for options, message in {
        ("--fit-on", short): "has 2 layers, workload file:mine.npz has 3",
        ("--fit-on", mine): "is the traffic that is scored",
        ("--fit-on", "absent.npz"): "does not exist",
        ("--fit-tokens", "5"): "--fit-tokens goes with synthetic traffic",
        ("--replica-choice", "vllm_hash", "--phase", "prefill"): "recorded prefill is replayed in runs",
    }.items():
        fails(capsys, [*words, *options, "--out", tmp_path / "b"], message)
    assert not (tmp_path / "b").exists()


def test_a_map_or_loads_of_other_layers_than_the_record_are_refused(tmp_path):
    model = ModelSpec("m", 4, 1, n_layers=4, moe_layer_ids=(1, 2, 3))
    rows = [{"layer": layer, "token": t, "experts": [t % 4]} for layer in (2, 3) for t in range(8)]
    record = load_workload(f"file:{write(tmp_path / 'x.jsonl', lines=rows)}", model)
    options = {"ep_sizes": 2, "tokens": 2, "trials": 4, "bound_layers": 0}
    for layers, message in (((2, 3), ""), ((1, 2), "has decoder layer 1 where workload file:x.jsonl has layer 2")):
        loads, _ = build_counts("loads", "file:loads", np.array([[4, 3, 2, 1], [1, 2, 3, 4]]), np.array(layers))
        linear = place("linear", model, 2).for_layers(layers)
        for more in ({"placements": "eplb", "fit_on": loads}, {"placements": [linear]}):
            with pytest.raises(InputError, match=message) if message else nullcontext():
                make_plan(model, record, **options, **more)
    three, _ = build_counts("loads", "file:loads", np.array([[4, 3, 2, 1]] * 3), np.array([1, 2, 3]))
    with pytest.raises(InputError, match="has 2 layers, workload file:loads has 3"):  # the first two of them
        splits_of(model, three, loads, seed=0)


def test_real_routing_is_evened_out(shared):
    """gpt-oss-20b: fitted on half of the generations, scored on the other half, by layer; EP 8, 256 tokens."""
    result = sweep(
        "gpt-oss-20b", f"file:{shared / 'traces' / 'gpt-oss-20b-tokens.npz'}", ep_sizes=8, tokens=256,
        placements=["linear", "eplb", "eplb+8"], trials=480,
    )  # fmt: skip
    rows = result.summary.set_index("placement")
    assert rows.imbalance_change_mean_high["eplb"] < -0.2
    assert rows.imbalance_mean["eplb+8"] < rows.imbalance_mean["eplb"]


def test_counts_from_outside_are_checked(tmp_path, capsys, monkeypatch):
    """Whatever reads the loads: NaN and negative counts, other widths."""
    for bad, message in {
        float("nan"): "layer 1, expert 3 is nan",
        -1.0: "layer 1, expert 3 is -1.0",
        float("inf"): "expert 3 is inf",
    }.items():
        table = np.ones((2, 32))
        table[1, 3] = bad
        counts = LoadCounts("x", table[None], np.arange(2), "x")
        monkeypatch.setattr("sim.traffic.read_traffic", lambda *_, counts=counts: counts)
        words = ["export", "--model", "gpt-oss-20b", "--placement", "eplb", "--ep", "4", "--fit-on", "x.npz"]
        fails(capsys, [*words, "--format", "vllm", "--out", tmp_path / "out"], message)
    assert not list(tmp_path.iterdir())


def test_bad_arguments():
    for change, message in (
        ({"ep_sizes": [12]}, "`strategy` eplb at `ep_size` 12: .* do not divide by 12 ranks"),
        ({"fit_tokens": 0}, "`fit_tokens` 0"),
        ({"fit_tokens": 2**25}, "`fit_tokens` 33554432"),
        ({"placements": "linear"}, "`fit_tokens` goes with a load-aware placement"),
        ({"placements": "linear", "fit_tokens": None, "fit_on": "chat"}, "`fit_on` goes with a load-aware placement"),
        ({"fit_on": "mixed", "fit_tokens": None}, "`fit_on` mixed: goes with recorded or fitted traffic"),
        ({"replica_choice": "hash"}, "`replica_choice` 'hash' is not known"),
        ({"replica_choice": "vllm_hash", "tokens": 2**21}, "at most 1048576 tokens"),
    ):
        with pytest.raises(InputError, match=message):
            make_plan(V3, CHAT, **SMALL | change)


def test_fitted_traffic_is_balanced_by_other_traffic_of_its_layers(tmp_path):
    """A law of fixed layers is scored, load counts are fitted: those of the same layers help, reversed ones do not as much."""
    rng = np.random.default_rng(5)
    model = load_model("gpt-oss-20b")
    here = np.sort(rng.gamma(2, 1, (3, 32)), axis=1)
    there = here[:, ::-1]
    mine = FittedLayers.of(np.log(here))
    law = SyntheticTraffic("mine", popularity="fitted", layers=mine, source="fitted to file:mine.csv, digest 123abc")
    loads = {name: build_counts(name, name, np.round(1000 * table))[0] for name, table in (("a", here), ("b", there))}
    found = {
        name: sweep(model, law, ep_sizes=8, tokens=512, placements=["linear", "eplb"], trials=90, fit_on=of).summary
        for name, of in loads.items()
    }
    change = {name: table.set_index("placement").loc["eplb"] for name, table in found.items()}
    assert change["a"].imbalance_change_mean_high < -0.5
    assert change["b"].imbalance_change_mean > change["a"].imbalance_change_mean + 0.5
    with pytest.raises(InputError, match="exclude each other"):
        make_plan(model, law, ep_sizes=8, tokens=8, placements="eplb", fit_tokens=9, fit_on=loads["a"])
    other = dataclasses.replace(loads["a"], digest="23abc")  # a part of the digest that the law names
    make_plan(model, law, ep_sizes=8, tokens=8, placements="eplb", fit_on=other)
    same = dataclasses.replace(law, source=f"fitted to a, digest {loads['a'].digest}")
    with pytest.raises(InputError, match="`fit_on` a is the traffic that is scored"):
        make_plan(model, same, ep_sizes=8, tokens=8, placements="eplb", fit_on=loads["a"])
