"""Whole layers: plans that move every token right, ranks that end together, and the layer itself on processors."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, fails
from devices import serve_fault

from sim.cli import main
from sim.cost import load_gpu
from sim.errors import InputError, RunError
from sim.figures.measured import measured_exchange
from sim.measure.layer import LAYER_COLUMNS, running_ranks, saying_why
from sim.measure.layer_compare import layer_gains, predicted_gains, read_layers, sums
from sim.measure.layer_plan import EXCHANGES, plan_rank, sample_layers
from sim.measure.steps import plan_measurement
from sim.measure.table import growing_table
from sim.model import load_model
from sim.traffic import load_workload

ALL = list(EXCHANGES)
needs_torch = pytest.mark.skipif(find_spec("torch") is None, reason="PyTorch is not installed (epsim[gpu])")


def layers_of(model, **changes):
    asked = {"ep_size": 4, "tokens": [8, 64], "placements": ["linear", "round_robin", "eplb+8"], "exchanges": ALL}
    asked |= {"steps": 3, "seed": 1} | changes
    return sample_layers(load_model(model), [load_workload("chat"), load_workload("gpqa-tilted")], **asked)


# Plans, without PyTorch


def run_plans(routed, exchange, x, expert):
    """One layer in numpy, rank by rank, by their plans alone: x [tokens, width], expert(slot, rows)."""
    n, plans = routed.ep_size, [plan_rank(routed, exchange, rank) for rank in range(routed.ep_size)]
    assert all(
        isinstance(part, list) or part.flags.c_contiguous for plan in plans for part in plan
    )  # as kernels read them
    own = [x[routed.own(rank)] for rank in range(n)]
    if exchange in ("gather", "reduce"):
        received = [x] * n
    else:
        sent = [np.split(own[r][plans[r].send], np.cumsum(plans[r].send_splits)[:-1]) for r in range(n)]
        received = [np.concatenate([sent[source][r] for source in range(n)]) for r in range(n)]
        for r in range(n):
            assert [len(sent[source][r]) for source in range(n)] == plans[r].receive_splits
    parts = []
    for rank, plan in enumerate(plans):
        rows, y, first = received[rank][plan.rows], [np.empty((0, x.shape[1]))], 0
        for local, end in enumerate(plan.ends):
            y.append(expert(rank * routed.slots_per_rank + local, rows[first:end]))
            first = end
        assert first == len(rows)
        parts.append(weighted_sum(np.concatenate(y), plan.back, plan.back_weights))
    if exchange in ("gather", "reduce"):
        return sum(parts)
    back = [np.split(parts[r], np.cumsum(plans[r].receive_splits)[:-1]) for r in range(n)]
    returned = [np.concatenate([back[r][home] for r in range(n)]) for home in range(n)]
    return np.concatenate([weighted_sum(returned[r], plans[r].home, plans[r].home_weights) for r in range(n)])


def weighted_sum(y, rows, weights):
    taken = np.where(rows[..., None] >= 0, y[rows] if len(y) else 0, 0)
    return (taken * weights[..., None]).sum(axis=1)


@pytest.mark.parametrize("exchange", ALL)
def test_plans_give_each_token_the_weighted_sum_of_its_own_experts(tiny, exchange):
    """Under every placement, also one with replicas: experts that differ by slot show where each pair was computed."""
    steps, random = layers_of(tiny), np.random.default_rng(0)
    factor = random.normal(size=(64, 5))
    for workload, placement in steps.placed:
        for tokens in steps.tokens:
            routed = steps.routed(workload, placement, 2, tokens)
            x = random.normal(size=(tokens, 5))
            ref_y = np.zeros_like(x)
            for t in range(tokens):
                for slot, weight in zip(routed.slots[t], routed.weights[t], strict=True):
                    ref_y[t] += weight * x[t] * factor[slot]
            comp_y = run_plans(routed, exchange, x, lambda slot, rows: rows * factor[slot])
            np.testing.assert_allclose(comp_y, ref_y, rtol=1e-12)


def test_slots_hold_the_experts_that_the_router_chose(tiny):
    steps = layers_of(tiny)
    for (workload, placement), placed in steps.placed.items():
        for step in range(3):
            routed = steps.routed(workload, placement, step, 64)
            assert (placed.experts[step % placed.n_rows][routed.slots] == steps.ids[workload][step]).all()
            assert (placed.ranks[0][routed.slots] == routed.ranks).all()


def test_copies_are_taken_by_vllms_hash_of_the_index_on_the_tokens_rank(tiny):
    steps = layers_of(tiny, placements=["eplb+32"])
    placed, routed = steps.placed["chat", "eplb+32"], steps.routed("chat", "eplb+32", 0, 64)
    for token in range(64):
        for expert, slot in zip(steps.ids["chat"][0, token], routed.slots[token], strict=True):
            copies = np.flatnonzero(placed.experts[0] == expert)
            assert slot == copies[(token % 16) * 2654435769 % 2**32 % len(copies)]


def test_tokens_are_those_that_the_other_measurement_counts(tiny):
    steps = layers_of(tiny, placements=["linear"])
    workloads = [load_workload("chat"), load_workload("gpqa-tilted")]
    asked = {"ep_sizes": [4], "tokens": [8, 64], "placements": ["linear"], "steps": 3, "seed": 1}
    counted = plan_measurement(load_model(tiny), workloads, **asked)
    for workload, ids in steps.ids.items():
        for step in range(3):
            for size, tokens in enumerate([8, 64]):
                ref_counts = counted.counts[workload][step, size]
                assert (np.bincount(ids[step, :tokens].ravel(), minlength=32) == ref_counts).all()


def test_loads_are_what_plans_carry(tiny):
    steps = layers_of(tiny)
    routed = steps.routed("chat", "round_robin", 0, 64)
    for rank in range(4):
        load = routed.load(rank)
        token, pair = (plan_rank(routed, exchange, rank) for exchange in ("token", "pair"))
        assert load["received"] == sum(token.receive_splits) <= 64
        assert load["pairs"] == sum(pair.receive_splits) == token.ends[-1] == len(token.rows)
        assert load["distinct"] == np.count_nonzero(np.diff(pair.ends, prepend=0))


def test_what_goes_first_changes_from_step_to_step_and_steps_are_outermost(tiny):
    steps = layers_of(tiny, placements=["linear", "round_robin"])
    cells = list(steps.cells())
    assert [cell.step for cell in cells] == [0] * 4 + [1] * 4 + [2] * 4
    assert [cells[i].placements[0] for i in (0, 4, 8)] == ["linear", "round_robin", "linear"]
    assert [cells[i].exchanges[0] for i in (0, 4, 8)] == ALL[:3]


def test_a_layer_that_cannot_be_measured_is_refused_in_one_line(tiny):
    for changes, message in (
        ({"ep_size": 3, "placements": ["linear"]}, "`ep_sizes` 3: must divide the experts"),
        ({"tokens": [8, 65], "placements": ["linear"]}, "`ep_sizes` 4: must divide the `tokens`, 65"),
        ({"exchanges": ["tokens"]}, "--exchange 'tokens' is not known; did you mean token"),
        ({"exchanges": []}, "--exchange must name at least one"),
        ({"placements": ["round"]}, "`strategy` 'round' is not known"),
        ({"steps": 0}, "`steps` 0"),
        ({"dtype": "fp4", "placements": ["linear"]}, "--dtype 'fp4' is not known"),
    ):
        with pytest.raises(InputError, match=message):
            layers_of(tiny, **changes)


# Ranks that end together, without PyTorch


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "ranks", "message"),
    [("die", 4, "rank 1 ended with exit status -9"), ("fail", 2, "rank 1: OutOfMemoryError: made up")],
)
def test_a_rank_that_dies_or_fails_ends_the_others_within_30_s(tiny, what, ranks, message):
    steps, pids, began = layers_of(tiny, ep_size=ranks), [], time.monotonic()

    def run():
        with running_ranks(steps, "cpu", serve_fault) as running:
            pids.extend(answer["pid"] for answer in running.answers())
            assert running.ask("ping") == list(range(ranks))
            nonlocal began
            began = time.monotonic()
            running.ask(what)

    with pytest.raises(RunError, match=message):
        run()
    assert time.monotonic() - began < 30
    assert len(pids) == ranks
    assert not any(map(is_there, pids))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_run_told_to_end_says_by_what_and_where_its_rows_are(tmp_path, number):
    out = tmp_path / "layer.csv"
    before = signal.getsignal(number)
    message = f"ended by {number.name}.*; 1 rows are kept in .*layer.partial.csv"

    def run():
        with growing_table(out, LAYER_COLUMNS) as table, saying_why(table, out):
            table.add([dict.fromkeys(LAYER_COLUMNS, 1)])
            os.kill(os.getpid(), number)

    with pytest.raises(RunError, match=message):
        run()
    assert signal.getsignal(number) == before
    assert [path.name for path in tmp_path.iterdir()] == ["layer.partial.csv"]


# Measured layers, read back


def made_up(tmp_path, change=lambda rows: None, steps=12):
    """A table whose layers take exactly the slowest rank's experts and the exchange; linear is a tenth slower."""
    random, rows = np.random.default_rng(0), []
    for step, exchange, placement in itertools.product(range(steps), ["token", "reduce"], ["linear", "round_robin"]):
        pairs = random.multinomial(128, [0.3, 0.3, 0.2, 0.2])
        experts_us = pairs * (11.0 if placement == "linear" else 10.0)
        for rank in range(4):
            times = {"layer_us": experts_us.max() + 100, "experts_us": experts_us[rank], "exchange_us": 100}
            about = {"model": "m", "gpu": "g", "dtype": "bf16", "ep_size": 4, "exchange": exchange, "workload": "chat"}
            about |= {"tokens": 64, "step": step, "placement": placement, "rank": rank, "pairs": pairs[rank]}
            rows.append(
                about | times | {"distinct": 4, "received": 10, "layers": 2, "replays": 3, "seed": 0, "versions": "v"}
            )
    change(rows)
    path = tmp_path / "layers.csv"
    pd.DataFrame(rows)[list(LAYER_COLUMNS)].to_csv(path, index=False)
    return path


def test_layers_are_compared_with_their_parts_and_with_each_other(tmp_path):
    layers = read_layers(made_up(tmp_path))
    assert len(layers) == 12 * 2 * 2
    found = sums(layers)
    assert found.excess.abs().max() < 1e-12
    gains = layer_gains(layers)
    for exchange in ("token", "reduce"):
        wide = layers[layers.exchange == exchange].pivot(index="step", columns="placement", values="layer_us")
        row = gains[gains.exchange == exchange].iloc[0]
        assert row.gain == pytest.approx(wide.linear.sum() / wide.round_robin.sum() - 1)
        assert row.gain_low < row.gain < row.gain_high
        assert row.exchange_gain == 0


def test_a_table_of_layers_that_is_wrong_is_refused_in_one_line(tmp_path):
    for change, message in (
        (lambda rows: rows.pop(), "a layer needs all its ranks"),
        (lambda rows: rows.append(rows[0]), "is measured twice"),
        (lambda rows: rows[3].update(layer_us=0), "line 5: times must be above 0"),
        (lambda rows: rows[3].update(layer_us="x"), "column layer_us must hold numbers"),
        (lambda rows: rows[3].update(exchange="all"), "exchange must be one of token"),
        (lambda rows: rows[3].update(received=65), "received must be from 0 to tokens"),
        (lambda rows: rows[3].update(gpu="h"), "column gpu must be the same"),
        (lambda rows: rows.clear(), "first line|no rows"),
    ):
        if message.startswith("first"):
            (tmp_path / "layers.csv").write_text(",".join(LAYER_COLUMNS) + "\n")
            path = tmp_path / "layers.csv"
        else:
            path = made_up(tmp_path, change)
        with pytest.raises(InputError, match=message):
            read_layers(path)


def test_a_figure_of_layers_names_the_type_that_was_measured(tmp_path):
    layers = read_layers(made_up(tmp_path, lambda rows: [row.update(dtype="fp8") for row in rows]))
    assert ", fp8, 12 steps" in measured_exchange(layers)._suptitle.get_text()


@pytest.mark.slow
def test_measured_layers_are_shown_with_tables_and_figures(tmp_path, capsys):
    path = made_up(tmp_path)
    assert main(["measure", "--show", str(path), "--plot"]) == 0
    said = capsys.readouterr().out
    assert "48 layers in 12 steps" in said
    assert {p.name for p in tmp_path.glob("*.png")} == {"layers-gain.png", "layers-exchange.png"}
    assert main(["measure", "--show", str(path), "--table", "gain", "--exchange", "reduce", "--markdown"]) == 0
    assert "token" not in capsys.readouterr().out.replace("tokens", "")
    fails(capsys, ["measure", "--show", path, "--exchange", "pair"], "--exchange pair: ")
    fails(
        capsys, ["measure", "--show", path, "--table", "predicted"], "presets of models (epsim models), and m is none"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "points", "off"),
    [
        ("h100-ep4", 4, 0.07), ("h100-ep4-placements", 5, 0.06), ("h100-ep2", 5.5, 0.10), ("h100-ep2-fp8", 1, 0.10),
        ("h200-ep4", 4, 0.08), ("h200-ep4-placements", 5, 0.06), ("h200-ep4-uniform", 1.5, 0.10), ("h200-ep4-fp8", 1.5, 0.14),
    ],
)  # fmt: skip
def test_measured_layers_are_what_their_parts_predict(name, points, off):
    """Whole layers; the experts' constants saw none, the exchange's those of h100-ep4. Gains within so many points, times within
    so much; not of pair, whose constants are those of DeepEP's kernels: NCCL's were measured.
    """
    layers = read_layers(ROOT / "results" / "measured" / f"{name}.csv.gz", load_gpu(name[:4]))
    found = predicted_gains(layers[layers.exchange != "pair"])
    assert (100 * found.difference.abs()).max() <= points
    assert (100 * found.difference.abs()).median() <= 1
    assert found.error.abs().max() <= off


def test_predicted_gains_are_those_of_predicted_layers():
    layers = read_layers(ROOT / "results" / "measured" / "h100-ep2-fp8.csv.gz", load_gpu("h100"))
    found = predicted_gains(layers[(layers.exchange == "token") & (layers.tokens == 64)])
    assert len(found) == 1
    part = layers[(layers.exchange == "token") & (layers.tokens == 64)]
    us = (part.predicted_experts_us + part.predicted_exchange_us).groupby(part.placement).sum()
    assert found.predicted.item() == pytest.approx(us["linear"] / us["round_robin"] - 1)


# The command


def test_what_is_missing_is_said_in_one_line(tiny, tmp_path, capsys, monkeypatch):
    out = tmp_path / "layer.csv"
    monkeypatch.setattr("sim.measure.layer.find_spec", lambda name: None)
    fails(capsys, ["measure", "--layer", "--model", tiny, "--ep", 2, "--out", out], "--layer needs PyTorch")
    for wrong, message in (
        (["--exchange", "token"], "--exchange goes with --layer"),
        (["--layer", "--dtype", "bf16,fp8"], "a layer is measured in one type"),
        (["--layer", "--ep", "2,4"], "a layer is measured at one EP size"),
        (["--layer", "--show", str(out)], "--layer goes without --show"),
    ):
        fails(capsys, ["measure", "--model", tiny, *wrong, *([] if "--show" in wrong else ["--out", out])], message)
    assert not list(tmp_path.iterdir())


def command(tiny, out, *more):
    words = [sys.executable, "-m", "sim", "measure", "--layer", "--device", "cpu", "--model", str(tiny), "--ep", "2"]
    return [*words, "--workload", "chat", "--tokens", "8,64", "--out", str(out), *more]


@needs_torch
@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "error"), [("bf16", 1e-2), ("fp8", 3e-2)])
def test_a_layer_on_processors_is_right_and_measured(tiny, tmp_path, dtype, error):
    out = tmp_path / "layer.csv"
    more = ("--steps", "2", "--placement", "linear,eplb+2", "--dtype", dtype)
    done = subprocess.run(command(tiny, out, *more), cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.with_suffix(".json").read_text())["largest_relative_error"] < error
    lines = out.read_text().splitlines()
    assert len(lines) == 1 + 2 * 2 * 2 * 4 * 2  # ranks, steps, sizes, exchanges, placements
    assert not (tmp_path / "layer.partial.csv").exists()


@needs_torch
@pytest.mark.slow
def test_a_killed_rank_ends_the_run_with_its_rows_kept_and_nothing_left_behind(tiny, tmp_path):
    out = tmp_path / "layer.csv"
    run = subprocess.Popen(command(tiny, out, "--steps", "10000"), cwd=ROOT, stderr=subprocess.PIPE, text=True)
    for line in run.stderr:
        if line.startswith("step 2"):
            break
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if "spawn_main" in Path(f"/proc/{pid}/cmdline").read_text()]
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    began = time.monotonic()
    _, said = run.communicate(timeout=60)
    assert time.monotonic() - began < 30
    assert run.returncode == 1
    assert "epsim measure: error: rank " in said.splitlines()[-1]
    assert not any(map(is_there, ranks))
    assert not out.exists()
    assert (tmp_path / "layer.partial.csv").read_text().endswith("\n")
