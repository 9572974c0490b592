"""Rank-to-rank traffic: matrices against plain recomputation and exact expectation, and the files that hold them."""

from itertools import pairwise
from math import comb

import numpy as np
import pytest
from conftest import fails

import sim
from sim import load_model, load_workload, place, score_tokens
from sim.cli import main
from sim.cost.links import source_tokens
from sim.router import draw_trials

V3, TOY = load_model("deepseek-v3"), load_model("mixtral-8x7b")


@pytest.mark.parametrize("placement", ["linear", "round_robin", "eplb+16"])
def test_matrices_equal_a_plain_recomputation(placement):
    """Rows by scoring each source's tokens alone (without replicas, whose copies hang on the index in the step); columns sum to
    what `score_tokens` counts of the whole step; percentiles by sorting.
    """
    trials, tokens, shares = 30, 50, [5, 0, 1, 3]
    placed = place(placement, V3, 4, loads=np.arange(256) + 1.0 if "eplb" in placement else None)
    found = sim.rank_traffic(
        V3, "chat", ep_sizes=4, tokens=[10, tokens], placements=placed, trials=trials, source_imbalance=shares,
        threads=2,
    )  # fmt: skip
    cell = found[placed.strategy, 4, tokens]
    assert cell["source_tokens"].tolist() == [28, 0, 5, 17]  # of 27.8, 0, 5.6, 16.7: the largest remainders go up
    _, ids = draw_trials(V3, load_workload("chat"), 0, range(trials), trials, np.array([10, tokens]), tokens)
    whole = [score_tokens(placed, of_trial) for of_trial in ids]
    for kind, name in (("token", "received_tokens"), ("pair", "loads")):
        ref = np.mean([getattr(of_step, name) for of_step in whole], axis=0)
        np.testing.assert_allclose(cell[f"{kind}_mean"].sum(axis=0), ref, rtol=1e-12)
        if placed.has_replicas:
            continue
        first = np.cumsum([0, *cell["source_tokens"]])
        ref = np.array([
            [getattr(score_tokens(placed, of_trial[a:b]), name) for a, b in pairwise(first)]
            for of_trial in ids
        ])  # fmt: skip
        rank = int(np.ceil(0.99 * trials)) - 1
        np.testing.assert_allclose(cell[f"{kind}_mean"], ref.mean(axis=0), rtol=1e-12)
        np.testing.assert_array_equal(cell[f"{kind}_p99"], np.sort(ref, axis=0)[rank])
        ref = np.where(np.eye(4, dtype=bool), 0, ref)
        for way, axis in (("out", 2), ("in", 1)):
            np.testing.assert_allclose(cell[f"{kind}_{way}_mean"], ref.sum(axis=axis).mean(axis=0), rtol=1e-12)
            np.testing.assert_array_equal(cell[f"{kind}_{way}_p99"], np.sort(ref.sum(axis=axis), axis=0)[rank])


def test_uniform_traffic_meets_its_exact_expectation():
    """A token needs a rank of n experts with probability 1 - C(E-n, k) / C(E, k), and has k n / E pairs there: within 4 standard
    errors (a false alarm in 400 of the 36 numbers), which are those of the interval.
    """
    found = sim.rank_traffic(
        TOY, "uniform", ep_sizes=3, tokens=30, placements="linear", trials=2000, source_imbalance=1.5, seed=1
    )
    cell, n_experts = found["linear", 3, 30], np.array([3, 3, 2])
    source = cell["source_tokens"][:, None]
    assert source.ravel().tolist() == [15, 9, 6]  # shares 1, 0.62, 0.38 of their sum
    needs = np.array([1 - comb(8 - n, 2) / comb(8, 2) for n in n_experts])
    for kind, share in (("token", needs), ("pair", 2 * n_experts / 8)):
        error = (cell[f"{kind}_mean_high"] - cell[f"{kind}_mean_low"]) / 2 / 1.96
        assert (np.abs(cell[f"{kind}_mean"] - source * share) < 4 * error).all()
        assert (cell[f"{kind}_p99_low"] <= cell[f"{kind}_p99"]).all()
        assert (cell[f"{kind}_p99"] <= cell[f"{kind}_p99_high"]).all()


def test_a_recorded_draw_counts_once():
    """Steps of one layer are alike: means have intervals from the two layers, percentiles none."""
    workload = sim.synthetic_traffic(np.arange(16).reshape(2, 8) + 1.0)
    cell = sim.rank_traffic(TOY, workload, ep_sizes=2, tokens=8, placements="linear", trials=600)["linear", 2, 8]
    assert int(cell["draws"]) == 2
    assert np.isfinite(cell["token_mean_high"]).all()
    assert np.isnan(cell["token_p99_high"]).all()


def test_shares_of_source_ranks():
    assert source_tokens(10, 4, [1.0]).tolist() == [3, 3, 2, 2]
    shares = source_tokens(10**6, 8, [2.5])
    assert shares.sum() == 10**6
    assert shares[0] == pytest.approx(2.5 * 10**6 / 8, abs=1)
    np.testing.assert_allclose(shares[1:] / shares[:-1], shares[1] / shares[0], rtol=1e-4)
    assert source_tokens(7, 3, [3.0]).tolist() == [7, 0, 0]


def test_a_sweep_writes_a_file_for_each_cell(tmp_path, capsys):
    """The same steps and seed as in Python; nothing is pickled; rows of the sweep are those without the option."""
    words = "sweep --ep 4,8 --tokens 16 --placement linear,eplb+8 --trials 40 --fit-tokens 64".split()
    assert main([*words, "--out", str(tmp_path / "with"), "--rank-traffic", "--source-imbalance", "1.5"]) == 0
    assert main([*words, "--out", str(tmp_path / "without")]) == 0
    assert "rank_traffic/*.npz" in capsys.readouterr().out
    assert (tmp_path / "with/tail.csv").read_bytes() == (tmp_path / "without/tail.csv").read_bytes()
    files = sorted(path.name for path in (tmp_path / "with/rank_traffic").iterdir())
    assert files == [f"{name}-ep{size}-tokens16.npz" for name in ("eplb+8", "linear") for size in (4, 8)]
    found = sim.rank_traffic(
        V3, "chat", ep_sizes=8, tokens=16, placements=["linear", "eplb+8"], trials=40, source_imbalance=1.5,
        fit_tokens=64,
    )  # fmt: skip
    with np.load(tmp_path / "with/rank_traffic/eplb+8-ep8-tokens16.npz", allow_pickle=False) as held:
        for name, array in found["eplb+8", 8, 16].items():
            np.testing.assert_array_equal(held[name], array, err_msg=name)
        assert (held["pair_dispatch_bytes"], held["pair_combine_bytes"]) == (7168 * (1 + 4 / 128), 7168 * 2)
        assert str(held["placement"]) == "eplb+8"


def test_wrong_use_is_one_line_and_writes_nothing(tmp_path, capsys):
    for words, message in (
        (["--source-imbalance", "2"], "--source-imbalance goes with --rank-traffic"),
        (["--rank-traffic", "--source-imbalance", "9"], "--source-imbalance 9: must be from 1 to the EP size, 8"),
        (["--rank-traffic", "--source-imbalance", "1,2"], "--source-imbalance: 2 shares go with EP size 2, not 8"),
        (["--rank-traffic", "--source-imbalance", "0,0,0,0,0,0,0,0"], "one share at least must be above 0"),
        (["--rank-traffic", "--precision", "1%"], "rank traffic goes with --trials, not with a precision"),
        (["--rank-traffic", "--dummy-tokens", "4"], "--rank-traffic: dummy tokens are counted by their experts"),
        (["--rank-traffic", "--ep", "256", "--tokens", "65536"], "would hold"),
    ):
        trials = [] if "--precision" in words else ["--trials", "5"]
        fails(capsys, ["sweep", "--ep", "8", "--tokens", "16", *trials, "--out", tmp_path / "out", *words], message)
        assert not (tmp_path / "out").exists()


def test_unknown_width_leaves_bytes_out(tmp_path):
    config = tmp_path / "config.json"
    config.write_text('{"model_type": "x", "num_local_experts": 8, "num_experts_per_tok": 2, "num_hidden_layers": 2}')
    cell = sim.rank_traffic(str(config), "uniform", ep_sizes=2, tokens=4, placements="linear", trials=3)["linear", 2, 4]
    assert not [name for name in cell if "bytes" in name or name == "hidden_size"]
