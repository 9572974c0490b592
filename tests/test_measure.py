"""Measurement: sampled shares of ranks, experts computed for real, tables that survive a kill, the model beside them."""

import itertools
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT

from sim.cli import main
from sim.cost import expert_time_us, load_gpu
from sim.cost.expert import ideal_times_us
from sim.cost.tables import grouped_gemm_profile
from sim.errors import InputError
from sim.figures.measured import measured_gain, predicted_against_measured
from sim.measure import (
    BackendError,
    Shape,
    Timing,
    constants,
    errors,
    gains,
    measure,
    plan_measurement,
    read_measured,
    with_predictions,
)
from sim.measure.compare import missed
from sim.measure.experts import reference_layer, round_bf16, round_fp8
from sim.measure.steps import busiest_ranks, rank_sums
from sim.measure.table import COLUMNS, partial_path
from sim.measure.timers import GraphTimer
from sim.model import ModelSpec, load_model
from sim.stats import half_width, ratio_parts
from sim.traffic import load_workload

TINY = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "n_routed_experts": 32,
    "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "scoring_func": "sigmoid", "topk_method": "noaux_tc",
    "hidden_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 4, "first_k_dense_replace": 1,
}  # fmt: skip
H100 = load_gpu("h100")
KERNEL = grouped_gemm_profile()
OF_MODEL = (KERNEL.launch_us, H100.bandwidth_fraction, H100.peak_fraction)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "config.json"
    path.write_text(json.dumps(TINY))
    return path


def steps_of(model="deepseek-v3", **changes):
    asked = {"ep_sizes": [8, 32], "tokens": [8, 512], "placements": ["linear", "round_robin"], "steps": 3, "seed": 1}
    return plan_measurement(
        load_model(model), [load_workload("chat"), load_workload("gpqa-tilted")], **(asked | changes)
    )


class MadeUp:
    """A device that takes the time of a formula, with a fault on demand."""

    device, versions = "NVIDIA H100 made up", "none"

    def __init__(self, launch_us=5.0, bandwidth=0.7, peak=0.6, noise=0.0, fails=lambda dtype, calls: False):
        self.of, self.noise, self.fails = (launch_us, bandwidth, peak), noise, fails
        self.random, self.calls = np.random.default_rng(0), 0

    def prepare(self, dtype, say):
        if self.fails(dtype, 0):
            raise BackendError(f"no {dtype}\nat all")
        return f"formula {dtype}"

    def calibrate(self, dtype):
        raise RuntimeError("no calibration")

    def time_layer(self, dtype, counts):
        self.calls += 1
        if self.fails(dtype, self.calls):
            raise RuntimeError("CUDA error: made up")
        work = {"pairs": counts.sum(), "distinct_experts": (counts > 0).sum(), "dtype": dtype}
        memory_us, compute_us = ideal_times_us("deepseek-v3", "h100", **work)
        launch_us, bandwidth, peak = self.of
        p, distinct = KERNEL.sharpness, work["distinct_experts"]
        fixed_us = KERNEL.idle_us * (len(counts) - distinct) + KERNEL.spread_us * (1 - 1 / max(distinct, 1))
        time_us = launch_us + fixed_us + ((memory_us / bandwidth) ** p + (compute_us / peak) ** p) ** (1 / p)
        return Timing(float(time_us * np.exp(self.noise * self.random.normal())), 0.1, 4, 5)


def measured(tmp_path, backend=None, dtypes=("bf16", "fp8"), **changes):
    out, lines = tmp_path / "measured.csv", []
    steps = changes.pop("steps_of", None) or steps_of()
    measure(steps, backend or MadeUp(), H100, list(dtypes), out, say=lines.append, **changes)
    return out, lines


# What is measured


def test_all_placements_and_ep_sizes_share_the_tokens():
    steps = steps_of()
    for workload, counts in steps.counts.items():
        assert counts.shape == (3, 2, 256)
        assert (counts.sum(axis=2) == np.array([8, 512]) * 8).all()
        assert (counts[:, 0] <= counts[:, 1]).all(), workload  # a shorter step begins a longer one
    assert steps.most_local_experts == 32
    loads = [
        rank_sums(steps.counts[workload], slots.rank_of_expert).max()
        for (workload, _, _), slots in steps.placed.items()
    ]
    assert steps.most_pairs == max(loads)


def test_copies_of_an_expert_share_its_tokens():
    """Each step has its own fitted slots; the tokens of an expert's copies add up to its own, and differ by one at most."""
    steps = steps_of(placements=["linear", "eplb+32"], ep_sizes=[32])
    for workload, counts in steps.counts.items():
        key = (workload, "eplb+32", 32)
        assert len(steps.placed[key].ranks) == 3
        for step, size in itertools.product(range(3), range(2)):
            of_slot, ranks = steps.slot_counts(key, step, size)
            assert np.bincount(ranks).tolist() == [9] * 32
            experts = steps.placed[key].experts[step]
            for e in range(256):
                mine = of_slot[experts == e]
                assert mine.sum() == counts[step, size, e]
                assert mine.max() - mine.min() <= 1
    assert steps.most_local_experts == 9


def test_rank_sums_are_the_plain_ones():
    counts = steps_of().counts["chat"][0, 1]
    ranks = np.arange(256) % 32
    assert rank_sums(counts, ranks).tolist() == [sum(counts[e] for e in range(256) if ranks[e] == r) for r in range(32)]


def test_the_busiest_ranks_and_one_other_are_measured():
    steps = steps_of()
    for layers in steps.compared(H100, ["bf16", "fp8"]):
        for layer in layers:
            counts = steps.counts[layer.workload][layer.step, steps.tokens.index(layer.tokens)]
            rank_of_expert = steps.placed[layer.workload, layer.placement, layer.ep_size].rank_of_expert
            loads, distinct = rank_sums(counts, rank_of_expert), rank_sums(counts > 0, rank_of_expert)
            busiest = [rank.rank for rank in layer.ranks if rank.chosen == "busiest"]
            assert max(loads) == max(loads[busiest])
            assert max(distinct) == max(distinct[busiest])
            for dtype in ("bf16", "fp8"):
                us = expert_time_us(steps.model, H100, pairs=loads, distinct_experts=distinct, dtype=dtype)
                assert us.max() == us[busiest].max()
            assert [rank.chosen for rank in layer.ranks].count("random") == 1
            assert len({rank.rank for rank in layer.ranks}) == len(layer.ranks)
            for rank in layer.ranks:
                assert (rank.counts.sum(), (rank.counts > 0).sum()) == (loads[rank.rank], distinct[rank.rank])


def test_equal_loads_are_decided_by_distinct_experts():
    model = ModelSpec("small", 4, 1, hidden_size=64, moe_intermediate_size=32)
    counts, ranks = np.array([4, 0, 2, 2], np.int32), np.array([0, 0, 1, 1], np.int32)
    assert busiest_ranks(model, H100, counts, ranks, ["bf16"]) == [1]


def test_steps_are_outermost_and_the_first_placement_changes():
    groups = list(steps_of().compared(H100, ["bf16"]))
    assert len(groups) == 3 * 2 * 2 * 2
    keys = [(g[0].step, g[0].tokens) for g in groups]
    assert keys == sorted(keys)
    for group in groups:
        assert len({layer[:4] for layer in group}) == 1
        assert [layer.placement for layer in group][group[0].step % 2] == "linear"


def test_a_seed_gives_the_same_ranks_and_every_other_rank_gets_its_turn():
    def random_ranks(seed):
        steps = steps_of(seed=seed, steps=40, ep_sizes=[8], tokens=[512])
        return [rank.rank for group in steps.compared(H100, ["bf16"]) for layer in group for rank in layer.ranks[-1:]]

    assert random_ranks(3) == random_ranks(3)
    assert random_ranks(3) != random_ranks(4)
    assert set(random_ranks(3)) == set(range(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "`steps` 0: must be a whole number from 1"),
        ({"tokens": [0]}, "`tokens` 0"),
        ({"tokens": []}, "`tokens` must name at least one"),
        ({"ep_sizes": [257]}, "`ep_sizes` 257"),
        ({"placements": ["linera"]}, "did you mean linear"),
        ({"seed": -1}, "`seed` -1"),
    ],
)
def test_bad_steps_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        steps_of(**change)


def test_models_without_gate_up_and_down_are_refused():
    with pytest.raises(InputError, match="not known: hidden_size"):
        Shape.of(ModelSpec("small", 4, 1), 4, 8)
    with pytest.raises(InputError, match="gate, up and down"):
        Shape.of(ModelSpec("small", 4, 1, hidden_size=8, moe_intermediate_size=8, expert_matrices=2), 4, 8)


# Arithmetic


def test_bf16_keeps_eight_bits_half_to_even():
    values = np.array([1, 1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.14159265, 0, 1e-30], np.float32)
    expected = [1, 1, 1 + 2**-6, 1 + 2**-7, -3.140625, 0]
    np.testing.assert_array_equal(round_bf16(values)[:6], np.array(expected, np.float32))
    assert round_bf16(values)[6] == pytest.approx(1e-30, rel=2**-8)


def test_fp8_takes_the_nearest_of_all_e4m3_numbers():
    mantissa, exponent = np.meshgrid(np.arange(8), np.arange(1, 16))
    positive = np.concatenate([np.arange(8) * 2.0**-9, ((1 + mantissa / 8) * 2.0 ** (exponent - 7)).ravel()])
    positive = positive[positive <= 448]
    assert len(positive) == 127  # all but NaN
    random = np.random.default_rng(0)
    row = np.concatenate([random.uniform(-448, 448, 500), random.normal(size=500) * 0.02, [448.0]]).astype(np.float32)
    nearest = np.abs(np.abs(row)[:, None] - positive).min(axis=1)
    np.testing.assert_array_equal(np.abs(row - round_fp8(row)), nearest.astype(np.float32))
    np.testing.assert_array_equal(round_fp8(positive), positive.astype(np.float32))
    assert not round_fp8(np.zeros((2, 4))).any()
    assert round_fp8(np.zeros((0, 4))).shape == (0, 4)


def test_the_reference_is_the_experts_formula():
    random = np.random.default_rng(1)
    x, gate_up, down = random.normal(size=(6, 8)), random.normal(size=(3, 10, 8)), random.normal(size=(3, 8, 5))
    owner = [0, 0, 2, 2, 2, 2]
    plain = []
    for row, e in zip(x, owner, strict=True):
        gate, up = gate_up[e, :5] @ row, gate_up[e, 5:] @ row
        plain.append(down[e] @ (gate / (1 + np.exp(-gate)) * up))
    single = [array.astype(np.float32) for array in (x, gate_up, down)]
    for dtype, tolerance in (("bf16", 0.01), ("fp8", 0.06)):
        out = reference_layer(single[0], np.array([2, 0, 4]), single[1], single[2], dtype)
        assert np.linalg.norm(out - plain) / np.linalg.norm(plain) < tolerance


# The run


def test_rows_are_what_was_measured(tmp_path):
    out, lines = measured(tmp_path)
    rows = read_measured(out)
    assert list(rows.columns) == list(COLUMNS)
    assert set(rows.dtype) == {"bf16", "fp8"}
    assert set(rows.groupby(["dtype", "workload", "tokens", "ep_size", "placement"]).step.nunique()) == {3}
    steps = steps_of()
    row = rows.iloc[57]
    counts = steps.counts[row.workload][row.step, steps.tokens.index(row.tokens)]
    mine = counts[steps.placed[row.workload, row.placement, row.ep_size].rank_of_expert == row["rank"]]
    assert (row.pairs, row.distinct) == (mine.sum(), (mine > 0).sum())
    assert row.time_us == pytest.approx(MadeUp().time_layer(row["dtype"], mine).time_us, abs=1e-3)
    assert not partial_path(out).exists()
    assert any("step 3 of 3" in line for line in lines)
    assert any("not calibrated: no calibration" in line for line in lines)


def test_a_time_limit_keeps_pairs_together(tmp_path, monkeypatch):
    clock = iter(np.arange(0, 1e6, 0.5))
    monkeypatch.setattr("sim.measure.run.time.monotonic", lambda: float(next(clock)))
    out, lines = measured(tmp_path, time_limit_s=10)
    rows = read_measured(out)
    assert any("--time-limit is reached in step" in line for line in lines)
    assert len(rows) < 200
    assert (rows.groupby(["dtype", "workload", "tokens", "ep_size", "step"]).placement.nunique() == 2).all()
    (tmp_path / "other").mkdir()
    with pytest.raises(InputError, match="nothing was measured"):
        measured(tmp_path / "other", time_limit_s=0.1)
    assert not list((tmp_path / "other").iterdir())


def test_one_type_that_fails_does_not_stop_the_other(tmp_path):
    out, lines = measured(tmp_path, MadeUp(fails=lambda dtype, calls: dtype == "fp8"))
    assert set(read_measured(out).dtype) == {"bf16"}
    assert any("fp8 is left out: no fp8 at all" in line for line in lines)
    (tmp_path / "later").mkdir()
    out, lines = measured(tmp_path / "later", MadeUp(fails=lambda dtype, calls: dtype == "bf16" and calls > 30))
    rows = read_measured(out)
    assert any("bf16 stops in step 1: CUDA error: made up" in line for line in lines)
    assert set(rows[rows.step == 2].dtype) == {"fp8"}
    assert (rows.groupby(["dtype", "workload", "tokens", "ep_size", "step"]).placement.nunique() == 2).all()
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="nothing that was asked for can be measured"):
        measured(tmp_path / "none", MadeUp(fails=lambda dtype, calls: True))
    assert not list((tmp_path / "none").iterdir())


def test_a_run_that_dies_leaves_its_rows_and_nothing_is_overwritten(tmp_path):
    def dies(dtype, calls):
        if calls > 40:
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        measured(tmp_path, MadeUp(fails=dies))
    partial = tmp_path / "measured.partial.csv"
    assert 10 < len(read_measured(partial)) <= 40
    assert not (tmp_path / "measured.csv").exists()
    with pytest.raises(InputError, match=r"measured.partial.csv is there already"):
        measured(tmp_path)
    partial.unlink()
    measured(tmp_path)
    with pytest.raises(InputError, match=r"measured.csv is there already"):
        measured(tmp_path)


# Reading back


@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("time_us", "nan", "time_us must be above 0"),
        ("time_us", "-1", "time_us must be above 0"),
        ("time_us", "fast", "column time_us must hold numbers"),
        ("spread_us", "-1", "spread_us must be"),
        ("tokens", "8.5", "column tokens must hold whole numbers"),
        ("tokens", "9" * 40, "column tokens must hold whole numbers"),
        ("tokens", "0", "tokens must be from 1"),
        ("rank", "8", "rank must be from 0"),
        ("ep_size", "0", "ep_size must be"),
        ("pairs", "-1", "pairs must be"),
        ("distinct", "100000", "distinct must be from 0 to pairs"),
        ("distinct", "0", "pairs need a distinct expert"),
        ("step", "-1", "must count something"),
        ("dtype", "fp4", "dtype must be bf16 or fp8"),
        ("chosen", "me", "chosen must be"),
        ("gpu", "h200", "column gpu must be the same"),
        ("kernel", "x" * 201, "fields of at most 200 printable letters"),
        ("workload", "\x1b[31mred", "fields of at most 200 printable letters"),
    ],
)
def test_bad_tables_are_refused(tmp_path, column, value, message):
    out, _ = measured(tmp_path, dtypes=["bf16"])
    lines = out.read_text().splitlines()
    fields = lines[2].split(",")
    fields[list(COLUMNS).index(column)] = value
    out.write_text("\n".join([*lines[:2], ",".join(fields), *lines[3:]]) + "\n")
    with pytest.raises(InputError, match=message) as error:
        read_measured(out)
    assert "\n" not in str(error.value)


def test_other_files_are_refused(tmp_path):
    out, _ = measured(tmp_path, dtypes=["bf16"])
    text = out.read_text()
    head, first = text.splitlines()[:2]
    for broken, message in (
        ("", "first line must name the columns"),
        ("a,b\n1,2\n", "first line must name the columns"),
        (head + "\n", "has no rows"),
        ("\n" * 200_001, "more than 200000 lines"),
        (f"{head}\n{first}\n{first}\n", "is measured twice"),
        (f"{head}\n{first[:40]}\n", "line 2: expected 20 fields"),
        (head + "\n" + "\0" * 300_000 + "\n", "is not a table"),
    ):
        out.write_text(broken)
        with pytest.raises(InputError, match=message):
            read_measured(out)
    out.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="UTF-8"):
        read_measured(out)
    with pytest.raises(InputError, match="cannot be read"):
        read_measured(tmp_path / "absent.csv")


# The model beside it


def test_a_device_as_the_model_says_has_no_error(tmp_path):
    rows = with_predictions(read_measured(measured(tmp_path, MadeUp(*OF_MODEL))[0]))
    np.testing.assert_allclose(rows.error, 0, atol=1e-4)
    assert (errors(rows).within_20 == 1).all()
    table = gains(rows)
    np.testing.assert_allclose(table.measured, table.predicted, atol=1e-4)
    np.testing.assert_allclose(table.difference, 0, atol=1e-4)


def test_errors_by_hand(tmp_path):
    rows = with_predictions(read_measured(measured(tmp_path, MadeUp(OF_MODEL[0], OF_MODEL[1] / 2, OF_MODEL[2] / 2))[0]))
    assert set(rows.bound) == {"memory"}
    part = rows[rows.dtype == "fp8"]
    row = errors(rows).set_index("dtype").loc["fp8"]
    assert row.ranks == len(part)
    assert row.error_mean == pytest.approx(part.error.mean())
    assert row.error_mean_low < row.error_mean < row.error_mean_high < 0
    assert row.error_p50 == pytest.approx(part.error.median())


def test_the_constants_of_a_device_are_found_again(tmp_path):
    steps = steps_of(tokens=[8, 512, 16384])
    rows = with_predictions(read_measured(measured(tmp_path, MadeUp(8.0, 0.7, 0.6, noise=0.02), steps_of=steps)[0]))
    table = constants(rows)
    found = table.set_index(["dtype", "constant"])
    assert found.loc[("fp8", "launch_us"), "model"] == KERNEL.launch_us
    for dtype in ("bf16", "fp8"):
        for name, true in (("launch_us", 8.0), ("bandwidth_fraction", 0.7), ("peak_fraction", 0.6)):
            assert found.loc[(dtype, name), "fitted"] == pytest.approx(true, rel=0.1)
    few = constants(rows[(rows.tokens == 8) & (rows.step == 0)]).set_index(["dtype", "constant"])
    assert np.isnan(few.loc[("fp8", "peak_fraction"), "fitted"])  # no row depends on it
    assert np.isnan(few.loc[("fp8", "launch_us"), "low"])  # one step


def test_gains_by_hand(tmp_path):
    rows = with_predictions(read_measured(measured(tmp_path, MadeUp(noise=0.05))[0]))
    table = gains(rows, "linear", "round_robin").set_index(["dtype", "workload", "ep_size", "tokens"])
    cell = rows[(rows.dtype == "fp8") & (rows.workload == "chat") & (rows.ep_size == 8) & (rows.tokens == 8)]
    slowest = cell.groupby(["placement", "step"]).time_us.max()
    a, b = slowest["linear"].to_numpy(), slowest["round_robin"].to_numpy()
    row = table.loc[("fp8", "chat", 8, 8)]
    assert row.measured == pytest.approx(a.mean() / b.mean() - 1)
    half = 4.302653 * np.std(a - (row.measured + 1) * b, ddof=1) / np.sqrt(3) / b.mean()  # Student, 2 degrees
    assert row.measured_high - row.measured == pytest.approx(half, rel=1e-5)
    assert row.measured - row.measured_low == pytest.approx(half, rel=1e-5)
    assert row.baseline_us == pytest.approx(a.mean())
    assert row.difference == pytest.approx(row.measured - row.predicted)
    swapped = gains(rows, "round_robin", "linear").set_index(["dtype", "workload", "ep_size", "tokens"])
    np.testing.assert_allclose(1 / (1 + swapped.measured), 1 + table.measured)
    one = gains(rows[rows.step == 0])
    assert one.measured_low.isna().all()
    # A step where one of the two was not measured does not count.
    torn = rows.drop(rows.index[(rows.step == 1) & (rows.placement == "linear")])
    assert set(gains(torn).steps) == {2}
    with pytest.raises(InputError, match="`placements` random: measured were linear, round_robin"):
        gains(rows, "linear", "random")


def test_intervals_of_a_ratio_cover():
    """20 steps of times that differ by 30 % from step to step: 95 % of 4000 intervals hold the true ratio; the standard
    error of the share is 0.35 %, so the bounds are at 4 of them.
    """
    random, true, hits = np.random.default_rng(5), 1.08, 0
    for _ in range(4000):
        step = np.exp(0.3 * random.normal(size=20))
        above, below = true * step * np.exp(0.1 * random.normal(size=20)), step * np.exp(0.1 * random.normal(size=20))
        ratio, parts = ratio_parts(above, below)
        hits += abs(ratio - true) <= half_width(parts)
    assert 0.95 - 0.014 < hits / 4000 < 0.95 + 0.014


def test_missed_ranks_are_counted():
    keys = {"dtype": "fp8", "workload": "chat", "ep_size": 8, "tokens": 8, "placement": "linear"}
    times = [(0, "busiest", 10.0), (0, "busiest", 12.0), (0, "random", 11.0), (1, "busiest", 10.0), (1, "random", 11.0),
             (2, "busiest", 9.0)]  # fmt: skip
    rows = pd.DataFrame([keys | {"step": step, "chosen": chosen, "time_us": us} for step, chosen, us in times])
    row = missed(rows).iloc[0]
    assert (row.layers, row.missed) == (2, 1)
    assert row.excess_max == pytest.approx(0.1)


# Figures


def test_figures_show_the_tables_numbers(tmp_path):
    rows = with_predictions(read_measured(measured(tmp_path, MadeUp(noise=0.05))[0]))
    figures = [predicted_against_measured(rows), measured_gain(rows, gains(rows))]
    for figure in figures:
        figure.draw_without_rendering()
        boxes = [ax.get_window_extent() for ax in figure.axes]
        legend, title = figure.legends[0].get_window_extent(), figure._suptitle.get_window_extent()
        assert not any(box.overlaps(other) for box in boxes for other in (legend, title))
        assert title.x1 <= figure.bbox.x1
        assert any("us" in ax.get_xlabel() or "tokens" in ax.get_xlabel() for ax in figure.axes)
        assert "NVIDIA H100 made up" in figure._suptitle.get_text()
    scatter = figures[0].axes[1]
    assert scatter.get_title(loc="left") == "fp8: formula fp8"
    points = np.concatenate([line.get_xydata() for line in scatter.get_lines() if line.get_linestyle() == "None"])
    part = rows[rows.dtype == "fp8"]
    np.testing.assert_allclose(np.sort(points[:, 0]), np.sort(part.time_us))
    np.testing.assert_allclose(np.sort(points[:, 1]), np.sort(part.predicted_us))
    panel = next(ax for ax in figures[1].axes if ax.get_title(loc="left") == "fp8, EP 8")
    table = gains(rows).query("dtype == 'fp8' and ep_size == 8 and workload == 'chat'").sort_values("tokens")
    drawn = [line.get_ydata() for line in panel.get_lines() if line.get_color() == "#0072B2"]
    np.testing.assert_allclose(drawn[0], 100 * table.predicted)
    np.testing.assert_allclose(drawn[1], 100 * table.measured)


# The command


def command(tiny, out, *more):
    words = ["measure", "--model", str(tiny), "--ep", "4,8", "--tokens", "8,32", "--steps", "2", "--device", "cpu"]
    return main([*words, "--out", str(out), *more])


def test_the_command_measures_and_shows(tiny, tmp_path, capsys):
    out = tmp_path / "here" / "a.csv"
    assert command(tiny, out) == 0
    printed = capsys.readouterr()
    assert f"epsim measure --show {out}" in printed.out
    assert "step 2 of 2" in printed.err
    rows = read_measured(out)
    assert set(rows.placement) == {"linear", "round_robin"}
    assert set(rows.gpu) == {"h200"}
    about = json.loads(out.with_suffix(".json").read_text())
    assert about["dtypes"]["fp8"]["empty_layer_us"] > 0
    assert "numpy" in about["versions"]
    assert main(["measure", "--show", str(out), "--plot", "--placement", "linear,group_aware"]) == 0
    text = capsys.readouterr().out
    assert "Gain of round_robin over linear" in text
    for name in ("a-predicted.png", "a-gain.png"):
        assert (out.parent / name).stat().st_size > 1000
        assert name in text
    assert main(["measure", "--show", str(out), "--markdown", "--gpu", "h20"]) == 0
    text = capsys.readouterr().out
    assert "| bf16 |" in text
    assert "predicted for h20" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "x.txt"], "--out FILE.csv must say"),
        ([], "--out FILE.csv must say"),
        (["--out", "x.csv", "--device", "tpu"], "--device 'tpu' is not known"),
        (["--out", "x.csv", "--dtype", "fp4"], "--dtype 'fp4' is not known"),
        (["--out", "x.csv", "--device", "cpu"], "--device cpu is for toy sizes"),
        (["--out", "x.csv", "--device", "cpu", "--gpu", "h9"], "gpu 'h9' is not known"),
        (["--out", "x.csv", "--time-limit", "soon"], "--time-limit 'soon'"),
        (["--plot", "--out", "x.csv"], "--plot goes with --show"),
        (["--show", "absent.csv"], "cannot be read"),
        (["--show", "x.csv", "--out", "y.csv"], "--out goes without --show"),
        (["--show", "x.csv", "--placement", "linear"], "takes two names"),
        (["--show", "x.csv", "--placement", "round_robin,group_aware"], "takes two names"),
    ],
)
def test_bad_usage_is_one_line(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    quick = ["--tokens", "8", "--ep", "8", "--steps", "1"] if "--show" not in words else []
    assert main(["measure", *quick, *words]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("epsim measure: error: ")
    assert message in last
    assert not list(tmp_path.iterdir())


def test_a_machine_without_pytorch_or_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["measure", "--out", "x.csv"]) == 2
    assert "needs PyTorch, which is not installed: pip install 'epsim[gpu]'" in capsys.readouterr().err
    absent = SimpleNamespace(__version__="9", cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", absent)
    assert main(["measure", "--out", "x.csv"]) == 2
    assert "PyTorch 9 sees no CUDA device on this machine" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA GB200", "gb200"),
        ("TITAN", None),
    ],
)
def test_the_preset_comes_from_the_devices_name(name, preset, monkeypatch):
    from sim.cli.measure import _preset_of_device

    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda index: name)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    if preset is None:
        with pytest.raises(InputError, match="--gpu must say which GPU predicts the times of TITAN"):
            _preset_of_device("cuda")
    else:
        assert _preset_of_device("cuda") == preset


# PyTorch


def test_graphs_are_captured_once_and_replayed(monkeypatch):
    """The order of calls, on a made-up torch: 5 replays of 600 us for 3 ms, one after another between events."""
    calls, clock = [], [0.0]

    class Graph:
        def capture_begin(self, pool, capture_error_mode):
            calls.append("begin")

        def capture_end(self):
            calls.append("end")

        def replay(self):
            calls.append("replay")
            clock[0] += 0.6

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = clock[0]

        def elapsed_time(self, other):
            return other.at - self.at

    class Stream:
        def __enter__(self):
            calls.append("stream")

        def __exit__(self, *error):
            return False

    cuda = SimpleNamespace(
        is_available=lambda: True, Stream=Stream, stream=lambda s: s, graph_pool_handle=lambda: (0, 1),
        CUDAGraph=Graph, Event=Event, synchronize=lambda: calls.append("wait"),
    )  # fmt: skip
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda, zeros=lambda *a, **k: None))
    timer = GraphTimer()
    calls.clear()
    assert timer.times_us(lambda: calls.append("work")) == pytest.approx([600.0] * 5)
    assert calls[:6] == ["wait", "stream", "begin", "work", "end", "wait"]
    assert calls.count("replay") == 1 + 1 + 1 + 5
    calls.clear()
    with pytest.raises(ZeroDivisionError):
        timer.times_us(lambda: 1 / 0)
    assert calls[-1] == "end"  # a capture that is left open would break all that comes after


def torch_or_skip():
    return pytest.importorskip("torch", reason="PyTorch is not installed (extra: epsim[gpu])")


SHAPE = Shape(width=64, inner=32, local_experts=6, pairs=200)
COUNTS = np.array([3, 0, 17, 130, 0, 1])


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_pytorch_computes_what_numpy_does(dtype):
    torch_or_skip()
    from sim.measure.torch_experts import TorchExperts
    from sim.measure.torch_kernels import dequantise

    backend = TorchExperts(SHAPE, "cpu", seed=3)
    assert "loop" in backend.prepare(dtype, print)
    experts = backend._experts[dtype]
    x, gate_up, down = (dequantise(part).numpy() for part in (experts.x, experts.gate_up, experts.down))
    out = next(backend._layers(dtype, COUNTS))().float().numpy()
    wanted = reference_layer(x[:151], COUNTS, gate_up[:6], down[:6], dtype)
    assert np.linalg.norm(out - wanted) / np.linalg.norm(wanted) < 1e-2
    assert backend.time_layer(dtype, COUNTS).time_us > 0
    assert backend.calibrate(dtype)["empty_layer_us"] > 0


def test_pytorch_rounds_as_numpy_does():
    torch = torch_or_skip()
    from sim.measure.torch_kernels import dequantise, quantise

    values = np.random.default_rng(0).standard_normal((40, 96), np.float32)
    for dtype, rounding in (("bf16", round_bf16), ("fp8", round_fp8)):
        np.testing.assert_allclose(
            dequantise(quantise(torch.from_numpy(values), dtype)).numpy(), rounding(values), rtol=1e-6
        )


@pytest.mark.parametrize("align", [1, 16])
def test_pytorchs_own_grouped_gemm_passes_the_check(align):
    """The kernel that runs on a GPU has a CPU version for BF16, with uneven groups and empty ones."""
    torch = torch_or_skip()
    from sim.measure.torch_experts import TorchExperts
    from sim.measure.torch_kernels import gemm_choices, plain_activation

    if not hasattr(torch.nn.functional, "grouped_mm"):
        pytest.skip(f"torch {torch.__version__} has no grouped_mm")
    backend = TorchExperts(SHAPE, "cpu")
    backend.prepare("bf16", print)
    choice = next(choice for choice in gemm_choices("bf16", "cuda") if choice.align == align)
    with torch.inference_mode():
        assert backend._gemm_error("bf16", choice, plain_activation, COUNTS) < 1e-2
        wrong = choice._replace(gemm=lambda *arguments: 1.05 * choice.gemm(*arguments))
        assert backend._gemm_error("bf16", wrong, plain_activation, COUNTS) > 1e-2


def test_layers_of_a_replay_have_weights_of_their_own():
    torch_or_skip()
    from sim.measure.torch_experts import TorchExperts

    backend = TorchExperts(SHAPE, "cpu")
    backend._l2_bytes = 1 << 20
    assert backend._n_layers("bf16", COUNTS, slices=100) == 16
    assert backend._n_layers("bf16", COUNTS, slices=3) == 3
    backend._l2_bytes = 4 * SHAPE.expert_values  # 8 of them are 8 x 4 / (4 x 2) layers of four experts in BF16
    assert backend._n_layers("bf16", COUNTS, slices=100) == 4
    assert backend._n_layers("fp8", COUNTS, slices=100) == 8
    assert backend._n_layers("bf16", np.full(600, 1), slices=100) == 2


def test_kernels_that_do_not_work_are_passed_over_and_named(monkeypatch):
    torch_or_skip()
    from sim.measure import torch_experts
    from sim.measure.torch_kernels import GemmChoice, gemm_choices

    def absent(*arguments):
        raise NotImplementedError("no such kernel\nhere")

    right = gemm_choices("bf16", "cpu")[0]
    wrong = GemmChoice("wrong", lambda *arguments: 2 * right.gemm(*arguments), 1)
    missing = GemmChoice("missing", absent, 1)
    empty = GemmChoice("empty", lambda *arguments: right.gemm(*arguments) * float("nan"), 1)
    backend = torch_experts.TorchExperts(SHAPE, "cpu")
    monkeypatch.setattr(torch_experts, "gemm_choices", lambda *a: [missing, wrong, empty, right])
    assert backend.prepare("bf16", print).startswith(right.name)
    monkeypatch.setattr(torch_experts, "gemm_choices", lambda *a: [missing, wrong, empty])
    said = []
    with pytest.raises(BackendError, match="no grouped GEMM comes out right"):
        backend.prepare("fp8", said.append)
    assert said[0] == "missing is passed over: no such kernel"
    assert "wrong is passed over: relative error 1" in said[1]
    assert said[2] == "empty is passed over: relative error nan"
    assert "fp8" not in backend._experts


def test_the_fused_activation_is_the_plain_one():
    """Triton's interpreter runs the kernel on a processor; the variable must be set before Triton is imported. It does not
    carry into the exponent when it rounds to E4M3, so values that round up to a power of two are left out there.
    """
    torch_or_skip()
    pytest.importorskip("triton", reason="Triton is not installed")
    program = """
import torch
from sim.measure.fused import silu_mul
from sim.measure.torch_kernels import plain_activation
rows = torch.randn((7, 2 * 48), generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
rows[3] = 0
gate, up = rows.float().chunk(2, dim=1)
wanted = gate * torch.sigmoid(gate) * up
found, scale = silu_mul(rows, "bf16")
assert scale is None and float((found.float() - wanted).norm() / wanted.norm()) < 1e-2
(found, scale), (plain, plain_scale) = silu_mul(rows, "fp8"), plain_activation(rows, "fp8")
torch.testing.assert_close(scale, plain_scale)
found, plain = found.float(), plain.float()
whole = torch.frexp(plain).mantissa.abs() != 0.5
assert whole.float().mean() > 0.8
assert float((found - plain)[whole].norm() / plain[whole].norm()) < 1e-2
assert not found[3].any()
assert silu_mul(rows[:0], "fp8")[0].shape == (0, 48)
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
