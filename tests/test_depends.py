"""What a result depends on: savings by kind of traffic, and the conclusions that are drawn from them."""

import json

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, fails

from sim import load_model, load_workload, predict_gain, read_traffic
from sim.advice.dependence import COSTS, LEVEL, SAVES, UNDECIDED, Subject, conclusions, saved_by_traffic
from sim.cli import main

V3 = load_model("deepseek-v3")
FEW = {"tokens": [64], "most_steps": 4, "layer_sets": 2}
WORDS = ["--ep", "8,16", "--tokens", "64", "--steps", "4", "--layer-sets", "2"]


@pytest.mark.slow
def test_rows_are_those_of_predicted_gains_with_a_redundant_slot_on_each_rank():
    table = saved_by_traffic([Subject(V3, load_workload("chat"))], "h200", ep_sizes=[8, 16], **FEW)
    for ep_size in (8, 16):
        gains = predict_gain(
            V3, "chat", "h200", placement=["round_robin", "eplb", f"eplb+{ep_size}"], exchange=["pair", "token"],
            ep_sizes=ep_size, **FEW,
        )  # fmt: skip
        rows = table[table.ep_size == ep_size]
        assert rows.placement.unique().tolist() == ["round_robin", "eplb", "eplb+R"]
        for exchange in ("pair", "token"):
            mine, theirs = rows[rows.measure == exchange], gains[gains.exchange == exchange]
            np.testing.assert_array_equal(mine[["saved", "low", "high"]], theirs.filter(regex="^layer_saved"))
        even, gains = rows[rows.measure == "imbalance"], gains[gains.exchange == "pair"]
        np.testing.assert_allclose(even.saved, 1 - gains.imbalance / gains.baseline_imbalance, rtol=1e-9)
        unpaired = np.hypot(
            gains.imbalance_high - gains.imbalance, gains.baseline_imbalance_high - gains.baseline_imbalance
        )
        assert (even.high - even.saved < unpaired.to_numpy() / gains.baseline_imbalance.to_numpy()).all()


def test_a_conclusion_is_what_most_traffic_shows_at_every_ep_size_and_says_what_the_rest_shows():
    shown = {
        "a": (SAVES, SAVES), "b": (SAVES, SAVES), "c": (SAVES, COSTS), "d": (LEVEL, LEVEL), "e": (UNDECIDED, SAVES),
    }  # fmt: skip
    ends = {SAVES: (0.02, 0.06), COSTS: (-0.05, -0.015), LEVEL: (-0.004, 0.009), UNDECIDED: (0.005, 0.03)}
    rows = [
        {"workload": name, "ep_size": size, "low": ends[what][0], "high": ends[what][1], "saved": sum(ends[what]) / 2}
        for name, pair in shown.items()
        for size, what in zip((8, 16), pair, strict=True)
    ]
    table = pd.DataFrame(rows).assign(tokens=64, measure="imbalance", placement="eplb")
    (found,) = conclusions(table)
    assert (found.effect, found.holds, found.n_traffic) == (SAVES, ["a", "b"], 5)
    assert found.range == pytest.approx((0.04, 0.04))
    assert found.others == {COSTS: {"c": [16]}, LEVEL: {"d": []}, UNDECIDED: {"e": [8]}}
    (found,) = conclusions(table, least=0.1)
    assert (found.effect, found.holds, found.others) == (LEVEL, ["a", "b", "c", "d", "e"], {})


def test_one_expert_a_rank_is_left_out_but_for_copies():
    oss = load_model("gpt-oss-20b")
    table = saved_by_traffic([Subject(oss, load_workload("gpt-oss-20b"))], "h200", ep_sizes=[32, 64], **FEW)
    assert set(zip(table.ep_size, table.placement, strict=True)) == {(32, "eplb+R")}


def test_what_is_written_is_shown_again_and_refused_when_changed(tmp_path, capsys):
    out = tmp_path / "d"
    words = ["depends", "--workload", "chat,gpt-oss-20b", "--trace", "olmoe-1b-7b", "absent.csv", *WORDS]
    assert main([*words, "--placement", "round_robin", "--out", str(out)]) == 0
    said = capsys.readouterr()
    assert "absent.csv is not there: left out" in said.err
    assert "64 tokens: round_robin lowers the mean imbalance: holds for 1 of 2" in " ".join(said.out.split())
    assert {path.name for path in out.iterdir()} == {"depends.csv", "depends.json", "depends.png"}
    assert main(["depends", "--show", str(out)]) == 0
    assert capsys.readouterr().out.strip() in said.out
    assert (
        main(["depends", "--show", str(out), "--table", "saved", "--ep", "8", "--workload", "chat", "--markdown"]) == 0
    )
    assert len(capsys.readouterr().out.splitlines()) == 3
    assert main(["depends", "--show", str(out), "--json"]) == 0
    models = {row["workload"]: row["model"] for row in json.loads(capsys.readouterr().out)}
    assert models == {"chat": "deepseek-v3", "gpt-oss-20b": "gpt-oss-20b"}
    (out / "depends.csv").write_text((out / "depends.csv").read_text().replace("chat", "chut"))
    fails(capsys, ["depends", "--show", out], "was changed")


def test_bad_usage_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words, message in (
        (["--trace", "gpt-oss-20b"], "takes MODEL FILE, or MODEL FILE FIT_ON"),
        (["--show", "results/depends", "--out", "x"], "--out goes without --show"),
        (["--show", "results/depends", "--ep", "7"], "--ep 7: "),
        (["--show", "absent"], "absent"),
        (["--placement", "linear", *WORDS], "there is nothing to compare"),
        (["--exchange", "pear", *WORDS], "pear"),
        (["--placement", "eplb+X", *WORDS], "--placement eplb+X: redundant slots are a whole number"),
        (["--trace", "gpt-oss", "absent.npz"], "--trace gpt-oss absent.npz: model 'gpt-oss' is not known"),
        (["--placement", "round_robin", "--ep", "256", "--tokens", "64"], "--ep 256: no rank has several experts"),
    ):
        fails(capsys, ["depends", *([] if "--show" in words else ["--workload", "chat"]), *words], message)


def test_committed_rows_are_computed_again_to_the_last_digit(capsys):
    words = "depends --workload uniform,one-subject --placement round_robin --ep 16 --tokens 64".split()
    assert main([*words, "--csv"]) == 0
    found = [line for line in capsys.readouterr().out.splitlines() if ",imbalance," in line]
    committed = (ROOT / "results" / "depends" / "depends.csv").read_text().splitlines()
    assert len(found) == 2
    assert set(found) <= set(committed)


@pytest.mark.slow
def test_recorded_traffic_is_fitted_on_what_is_not_scored(shared):
    oss, olmoe = load_model("gpt-oss-20b"), load_model("olmoe-1b-7b")
    traces = shared / "traces"
    c4, github = (read_traffic(traces / f"olmoe-{name}-load.csv", olmoe) for name in ("c4", "github"))
    subjects = [Subject(oss, read_traffic(traces / "gpt-oss-20b-tokens.npz", oss)), Subject(olmoe, github, c4)]
    table = saved_by_traffic(subjects, "h200", ep_sizes=[8], placements=["eplb"], **FEW)
    about = dict(zip(table.workload, table.fitted, strict=True))
    assert about["file:gpt-oss-20b-tokens"] == "fitted on even sequences, scored on odd ones"
    assert about["file:olmoe-github-load (fitted on olmoe-c4-load)"] == "fitted on olmoe-c4-load.csv"
