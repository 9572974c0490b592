"""Measured times beside the predicted ones: errors, constants, gains, figures, and the command that shows them."""

import io
import json
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import assert_nothing_overlaps, fails
from devices import MadeUp, measured, steps_of

from sim.cli import main
from sim.cost.tables import grouped_gemm_profile
from sim.errors import InputError
from sim.figures.measured import measured_gain, predicted_against_measured
from sim.measure.compare import constants, errors, gains, missed, with_predictions
from sim.measure.table import read_measured
from sim.stats import half_width, ratio_parts

# The model beside it


def test_a_device_as_the_model_says_has_no_error(tmp_path):
    rows = with_predictions(read_measured(measured(tmp_path, MadeUp.of_model())[0]))
    np.testing.assert_allclose(rows.error, 0, atol=1e-4)
    assert (errors(rows).within_20 == 1).all()
    table = gains(rows)
    np.testing.assert_allclose(table.measured, table.predicted, atol=1e-4)
    np.testing.assert_allclose(table.difference, 0, atol=1e-4)


def test_errors_by_hand(tmp_path):
    rows = with_predictions(read_measured(measured(tmp_path, MadeUp.of_model(1 / 2), dtypes=["fp8"])[0]))
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
    for dtype in ("bf16", "fp8"):
        assert found.loc[(dtype, "launch_us"), "model"] == grouped_gemm_profile(dtype).launch_us
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


@pytest.mark.slow
def test_figures_show_the_tables_numbers(tmp_path):
    rows = with_predictions(read_measured(measured(tmp_path, MadeUp(noise=0.05))[0]))
    figures = [predicted_against_measured(rows), measured_gain(rows, gains(rows))]
    for figure in figures:
        assert_nothing_overlaps(figure)
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


@pytest.mark.slow
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
    for table, made in (("error", errors), ("gain", lambda rows: gains(rows, "linear", "round_robin"))):
        ref = made(with_predictions(rows))
        assert main(["measure", "--show", str(out), "--table", table, "--csv"]) == 0
        comp = pd.read_csv(io.StringIO(capsys.readouterr().out))
        pd.testing.assert_frame_equal(comp, ref.reset_index(drop=True), check_dtype=False, rtol=1e-8)
        assert main(["measure", "--show", str(out), "--table", table, "--json"]) == 0
        assert list(json.loads(capsys.readouterr().out)[0]) == list(ref)
    fails(capsys, ["measure", "--show", out, "--json"], "--json and --csv print the rows of one table: give --table")


def test_bad_usage_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words, message in (
        (["--out", "x.txt"], "--out FILE.csv must say"),
        ([], "--out FILE.csv must say"),
        (["--out", "x.csv", "--dtype", "fp4"], "--dtype 'fp4' is not known"),
        (["--out", "x.csv", "--device", "cpu"], "--device cpu is for toy sizes"),
        (["--out", "x.csv", "--device", "cpu", "--gpu", "h9"], "gpu 'h9' is not known"),
        (["--plot", "--out", "x.csv"], "--plot goes with --show"),
        (["--show", "absent.csv"], "cannot be read"),
        (["--show", "x.csv", "--out", "y.csv"], "--out goes without --show"),
        (["--show", "x.csv", "--placement", "linear"], "takes two names"),
        (["--show", "x.csv", "--placement", "round_robin,group_aware"], "takes two names"),
    ):
        quick = ["--tokens", "8", "--ep", "8", "--steps", "1"] if "--show" not in words else []
        fails(capsys, ["measure", *quick, *words], "epsim measure: error: ", message)
    assert not list(tmp_path.iterdir())


def test_a_machine_without_pytorch_or_without_a_gpu_is_told_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "torch", None)
    fails(capsys, ["measure", "--out", "x.csv"], "needs PyTorch, which is not installed: pip install 'epsim[gpu]'")
    absent = SimpleNamespace(__version__="9", cuda=SimpleNamespace(is_available=lambda: False))
    monkeypatch.setitem(sys.modules, "torch", absent)
    fails(capsys, ["measure", "--out", "x.csv"], "PyTorch 9 sees no CUDA device on this machine")


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
    from sim.cli.measure import preset_of_device

    cuda = SimpleNamespace(is_available=lambda: True, get_device_name=lambda index: name)
    monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=cuda))
    if preset is None:
        with pytest.raises(InputError, match="--gpu must say which GPU predicts the times of TITAN"):
            preset_of_device("cuda")
    else:
        assert preset_of_device("cuda") == preset
