"""Precision on demand, and sums of sweeps."""

import hashlib
import json
import shutil

import numpy as np
import pandas as pd
import pytest
from conftest import fails

from sim import InputError, sweep
from sim.cli import main
from sim.results import read_result
from sim.sweeps import Journal, combine, executors, make_plan, run_plan
from sim.sweeps.chunk import first_stage, stage_chunks
from sim.sweeps.tally import build_counts, read_counts

GRID = {"ep_sizes": [8, 64], "tokens": [1, 64], "placements": ["linear", "random"], "bound_layers": 0}
ONE_THREAD = executors.threads(1)


def half_widths(summary):
    return (summary.imbalance_mean_high - summary.imbalance_mean) / summary.imbalance_mean


def test_each_cell_stops_when_it_is_precise_enough():
    summary = sweep("deepseek-v3", "chat", **GRID, precision=0.015, max_trials=20_000).summary
    assert (half_widths(summary) <= 0.015).all()
    assert set(summary.stopped) == {"precision"}
    assert set(summary.trials) <= {1024 * 2**i for i in range(5)}
    assert summary.trials.nunique() > 1
    assert (summary.groupby(["ep_size", "tokens"]).trials.nunique() == 1).all()  # changes are paired


def test_a_precise_row_is_the_row_of_a_plain_sweep_of_as_many_trials():
    """Stages and the company of other cells change nothing; later stages fit EPLB to layers of their own."""
    grid = GRID | {"placements": [*GRID["placements"], "eplb+64"], "fit_tokens": 200}
    result = sweep("deepseek-v3", "chat", **grid, precision=0.015)
    assert result.summary.trials.max() > 1024  # more than one stage
    for trials, rows in result.summary.groupby("trials"):
        plain = sweep("deepseek-v3", "chat", **grid, trials=int(trials)).summary.drop(columns="stopped")
        same = plain.merge(rows.drop(columns="stopped"))
        assert len(same) == len(rows)


@pytest.mark.slow
def test_clustered_cells_are_gone_through_from_the_start():
    result = sweep("deepseek-v3", "chat", **GRID, draws=1500, precision=0.01, max_trials=5000)
    for (trials, stopped), rows in result.summary.groupby(["trials", "stopped"]):
        assert stopped in ("precision", "draws", "max_trials")
        plain = sweep("deepseek-v3", "chat", **GRID, draws=min(1500, int(trials)), trials=int(trials)).summary
        assert len(plain.drop(columns="stopped").merge(rows.drop(columns="stopped"))) == len(rows)


def test_a_tail_precision_holds_for_all_that_is_not_rare():
    result = sweep(
        "deepseek-v3", "chat", ep_sizes=8, tokens=64, placements="linear", precision_tail=0.2, max_trials=200_000,
        thresholds=[1.25, 1.5, 2.5], bound_layers=0,
    )  # fmt: skip
    tail = result.tail[(result.tail.metric == "imbalance") & (result.tail.method == "sampled")]
    wide = (tail.high - tail.low) / 2 > 0.2 * tail.probability
    assert (tail[wide].high <= 1e-3).all()
    assert wide.any()
    assert not wide.all()
    assert set(result.summary.stopped) == {"precision"}


@pytest.mark.slow
def test_what_cannot_be_met_is_said(capsys, tmp_path):
    """12 layers differ too much: it stops early. And a limit on trials is reached."""
    arguments = ["sweep", "--ep", "8", "--tokens", "4096", "--precision", "0.1%", "--bound-layers", "0"]
    arguments += ["--placement", "linear"]
    assert main([*arguments, "--draws", "12", "--max-trials", "100000", "--out", str(tmp_path / "a")]) == 0
    assert "more trials would not help" in capsys.readouterr().err
    summary = pd.read_csv(tmp_path / "a/summary.csv")
    assert set(summary.stopped) == {"draws"}
    assert summary.trials.max() < 100_000
    assert main([*arguments, "--max-trials", "1500", "--out", str(tmp_path / "b")]) == 0
    assert "--max-trials is reached" in capsys.readouterr().err
    assert set(pd.read_csv(tmp_path / "b/summary.csv").stopped) == {"max_trials"}


@pytest.mark.slow
def test_out_of_time_the_same_command_goes_on(tmp_path, capsys):
    command = "sweep --ep 8 --tokens 1024 --precision 1% --max-trials 4096 --bound-layers 0".split()
    limited = [*command, "--precision", "0.01%", "--out", str(tmp_path / "a")]
    assert main([*limited, "--time-limit", "0.001s"]) == 0
    assert "--time-limit is reached" in capsys.readouterr().err
    assert set(pd.read_csv(tmp_path / "a/summary.csv").stopped) == {"time_limit"}
    assert main(limited) == 0
    assert main([*command, "--precision", "0.01%", "--out", str(tmp_path / "b")]) == 0
    for name in ("summary.csv", "tail.csv", "counts.parquet"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert not (tmp_path / "a/.partial").exists()


def test_bad_precisions_are_refused_by_name():
    for change, message in (
        ({"trials": 100}, "`trials` and a precision exclude each other"),
        ({"precision": 0}, "`precision` 0"),
        ({"precision": 1.5}, "`precision` 1.5"),
        ({"precision": None, "precision_tail": float("nan")}, "`precision_tail` nan"),
        ({"max_trials": 0}, "`max_trials` 0"),
        ({"precision": None, "max_trials": 5}, "`max_trials` goes with"),
        ({"bound_layers": -1}, "`bound_layers` -1"),
    ):
        with pytest.raises(InputError, match=message):
            make_plan("deepseek-v3", "chat", **GRID | {"precision": 0.01} | change)


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    """Folder of a small sweep."""
    folder = tmp_path_factory.mktemp("swept") / "a"
    assert main(["sweep", "--ep", "4", "--tokens", "2", "--trials", "20", "--out", str(folder)]) == 0
    return folder


def test_a_result_of_another_version_is_refused(swept, tmp_path, capsys):
    shutil.copytree(swept, tmp_path / "a")
    about = json.loads((tmp_path / "a/provenance.json").read_text())
    for schema in (1, None, 99):
        about["sweep"]["schema"] = schema
        (tmp_path / "a/provenance.json").write_text(json.dumps(about))
        for words in (["show", "a"], ["plot", "a"], ["combine", "a", "a", "--out", "b"]):
            fails(capsys, [word if word != "a" else tmp_path / "a" for word in words], "another version")


def test_an_identity_that_was_changed_is_refused(swept, tmp_path, capsys):
    """With another seed in it, combine would count the same draws twice."""
    shutil.copytree(swept, tmp_path / "b")
    about = json.loads((tmp_path / "b/provenance.json").read_text())
    about["sweep"]["seed"] = 1
    (tmp_path / "b/provenance.json").write_text(json.dumps(about))
    command = ["combine", str(swept), str(tmp_path / "b"), "--out", str(tmp_path / "sum")]
    capsys.readouterr()
    for words in (command, ["show", str(tmp_path / "b")], ["plot", str(tmp_path / "b")]):
        fails(capsys, words, "provenance.json is damaged or was changed")
    del about["sha256"]["sweep"]  # as earlier versions wrote it
    (tmp_path / "b/provenance.json").write_text(json.dumps(about))
    assert main(["show", str(tmp_path / "b")]) == 0
    fails(capsys, command, "has no digest of the sweep's identity")
    assert not (tmp_path / "sum").exists()


@pytest.mark.parametrize("name", ["summary.csv", "tail.csv", "counts.parquet"])
@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"a,b\n1,2\n"])
def test_a_table_that_is_none_is_refused_though_its_digest_fits(name, data, swept, tmp_path, capsys):
    folder = shutil.copytree(swept, tmp_path / "a")
    about = json.loads((folder / "provenance.json").read_text())
    about["sha256"][name] = hashlib.sha256(data).hexdigest()
    (folder / "provenance.json").write_text(json.dumps(about))
    (folder / name).write_bytes(data)
    capsys.readouterr()
    fails(capsys, ["show", folder], name)


def test_two_journals_of_one_sweep_do_not_disturb_each_other(tmp_path):
    plan = make_plan("deepseek-v3", "chat", **GRID, trials=40)
    one, two = Journal(tmp_path, plan), Journal(tmp_path, plan)
    stage = first_stage(plan)
    draws = stage_chunks(plan, stage)[0]
    tally = executors.run_chunk(plan, stage, draws)
    one.clear()
    two.add(stage, draws, tally)  # the folder is made again
    np.testing.assert_array_equal(Journal(tmp_path, plan).read(stage, draws).metric, tally.metric)
    two.clear()
    one.clear()
    assert not list(tmp_path.iterdir())


def test_raw_counts_are_the_tally():
    plan = make_plan("deepseek-v3", "gpqa-tilted", **GRID, trials=50, draws=9)
    result = run_plan(plan, ONE_THREAD)
    tally = read_counts(plan.grid, result.counts.sample(frac=1, random_state=0), "here")
    pd.testing.assert_frame_equal(build_counts(plan.grid, tally), result.counts)


@pytest.mark.parametrize("draws", [None, 40])
def test_a_sum_of_sweeps_is_the_sweep_of_both(draws):
    """Means and probabilities of the sum are the weighted ones; intervals shrink; the order does not matter."""
    parts = [
        (name, sweep("deepseek-v3", "chat", **GRID | {"bound_layers": 3}, trials=trials, draws=draws, seed=seed))
        for name, trials, seed in (("a", 200, 1), ("b", 400, 2), ("c", 300, 7))
    ]
    total = combine(parts)
    again = combine([("bc", combine(parts[1:])), parts[0]])
    for name in ("summary", "counts"):
        pd.testing.assert_frame_equal(getattr(total, name), getattr(again, name))
    pd.testing.assert_frame_equal(total.tail, again.tail)
    weights = np.array([200, 400, 300]) / 900
    for column in ("imbalance_mean", "idle_ranks_mean", "imbalance_change_mean", "ranks_per_token_mean"):
        mean = sum(w * result.summary[column] for w, (_, result) in zip(weights, parts, strict=True))
        np.testing.assert_allclose(total.summary[column], mean, atol=1e-12)
    assert (half_widths(total.summary) < half_widths(parts[1][1].summary)).all()
    assert (total.summary.trials == 900).all()
    assert (total.summary.draws == (3 * draws if draws else 900)).all()
    n = len(parts[0][1].tail[parts[0][1].tail.given == ""])
    sampled = [result.tail.iloc[:n].probability for _, result in parts]
    np.testing.assert_allclose(
        total.tail.iloc[:n].probability, sum(w * p for w, p in zip(weights, sampled, strict=True))
    )
    assert set(total.tail.given) == {"", "9 drawn layers"}
    assert total.identity["seed"] == [1, 2, 7]


@pytest.mark.slow
def test_what_does_not_belong_together_is_refused(tmp_path, capsys):
    small = ["sweep", "--ep", "8", "--tokens", "4", "--trials", "50", "--bound-layers", "0"]
    variants = {
        "one": [], "two": ["--seed", "1"], "seed": [], "ep": ["--seed", "2", "--ep", "4"],
        "traffic": ["--seed", "2", "--workload", "uniform"], "nodes": ["--seed", "2", "--ranks-per-node", "4"],
    }  # fmt: skip
    for name, change in variants.items():
        assert main([*small, *change, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    for name, why in (
        ("seed", "the same seed 0"), ("ep", "ep_sizes is [4], not [8]"), ("traffic", "workload is uniform, not chat"),
        ("nodes", "ranks_per_node is 4, not 8"),
    ):  # fmt: skip
        fails(capsys, ["combine", tmp_path / "one", tmp_path / name, "--out", tmp_path / "sum"], why)
        assert not (tmp_path / "sum").exists()
    fails(capsys, ["combine", tmp_path / "one", "--out", tmp_path / "sum"])
    fails(capsys, ["combine", tmp_path / "one", tmp_path / "two", "--out", ""])
    (tmp_path / "begun/.partial").mkdir(parents=True)
    fails(capsys, ["combine", tmp_path / "one", tmp_path / "two", "--out", tmp_path / "begun"], "unfinished sweep")
    assert main(["combine", str(tmp_path / "one"), str(tmp_path / "two"), "--out", str(tmp_path / "sum")]) == 0
    assert (read_result(tmp_path / "sum").summary.trials == 100).all()
    assert main(["show", str(tmp_path / "sum"), "--tail"]) == 0
    assert main(["plot", str(tmp_path / "sum"), "--figures", "exceedance", "--format", "svg"]) == 0
