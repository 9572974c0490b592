"""The commands, called in process in temporary folders."""

import inspect
import json
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, fails

import sim
from sim.cli import VERBS, main
from sim.cli.terminal import note, time_left_s
from sim.figures import FIGURES
from sim.options import SweepOptions
from sim.options.declare import declarations, flag_of
from sim.progress import advance, map_on, phase, track, watching

RUN = ["sweep", "--ep", "2,12", "--tokens", "1,16", "--trials", "40", "--placement", "linear,linear_legacy,group_aware"]
SUMMARY = ["model", "workload", "placement", "ep_size", "tokens", "trials", "draws", "mean_load", "max_load_mean",
           "imbalance_mean", "imbalance_mean_low", "imbalance_mean_high", "imbalance_p50", "imbalance_p95", "imbalance_p99",
           "balancedness_mean", "idle_ranks_mean", "idle_ranks_p99", "distinct_experts_max_mean", "ranks_per_token_mean",
           "nodes_per_token_mean"]  # fmt: skip
TAIL = ["model", "workload", "placement", "ep_size", "tokens", "trials", "draws",
        "metric", "threshold", "probability", "low", "high", "method", "given", "effective_blocks"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("sweep") / "out"
    assert main([*RUN, "--out", str(path)]) == 0
    return path


def test_sweep_writes_the_named_columns(folder):
    assert sorted(p.name for p in folder.iterdir()) == ["counts.parquet", "provenance.json", "summary.csv", "tail.csv"]
    summary, tail = pd.read_csv(folder / "summary.csv"), pd.read_csv(folder / "tail.csv")
    assert set(SUMMARY) <= set(summary.columns)
    assert list(tail.columns) == TAIL
    assert set(summary.placement) == {"linear", "linear_legacy", "round_robin"}
    assert {1.1, 1.25, 1.5, 2, 3} <= set(tail[tail.metric == "imbalance"].threshold)
    assert set(tail[(tail.metric == "idle_ranks") & (tail.ep_size == 12)].threshold) == {1, 2, 4, 6, 8, 11}
    assert set(tail[tail.metric == "one_rank"].threshold) == {1}
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance["sweep"]["seed"] == 0
    assert {"epsim", "numpy", "numba", "python"} <= set(provenance["versions"])


def test_the_same_sweep_is_reused_and_another_is_refused(folder, capsys):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert main([*RUN, "--out", str(folder)]) == 0
    assert "nothing was computed" in capsys.readouterr().out
    fails(capsys, [*RUN, "--seed", "1", "--out", folder], "holds another sweep", "seed 0, not 1")
    assert before == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_the_answer_is_printed(folder, capsys):
    assert main(["show", str(folder), "--ep", "12"]) == 0
    out = capsys.readouterr().out
    assert "deepseek-v3, chat traffic: linear against linear_legacy, round_robin" in out
    row = pd.read_csv(folder / "summary.csv").query("placement == 'linear' and ep_size == 12 and tokens == 16").iloc[0]
    line = next(line.split() for line in out.splitlines() if line.split()[:2] == ["12", "16"])
    assert line[2:4] == ["linear", f"{row.imbalance_mean:.3f}"]
    assert line[-1] == f"{row.idle_ranks_mean:.1f}"
    assert main(["show", str(folder), "--placement", "linear,linear_legacy", "--tokens", "16", "--markdown"]) == 0
    assert capsys.readouterr().out.count("\n| ") == 2
    fails(capsys, ["show", folder, "--ep", "13"], "--ep 13", "2, 12")
    fails(capsys, ["show", folder, "--placement", "random"], "--placement random", "linear_legacy")


def test_a_config_file_holds_the_same_options(folder, tmp_path, capsys):
    config = tmp_path / "sweep.toml"
    config.write_text(
        'ep = [2, 12]\ntokens = "1,16"\ntrials = 40\nplacement = ["linear", "linear_legacy", "group_aware"]\n'
    )
    assert main(["sweep", "--config", str(config), "--out", str(tmp_path / "a")]) == 0
    assert (tmp_path / "a" / "summary.csv").read_bytes() == (folder / "summary.csv").read_bytes()
    assert main(["sweep", "--config", str(config), "--trials", "41", "--out", str(tmp_path / "b")]) == 0
    assert pd.read_csv(tmp_path / "b" / "summary.csv").trials.unique().tolist() == [41]
    capsys.readouterr()
    for text, parts in {
        "trails = 5": ["key 'trails'", "did you mean trials"], "trials = [": ["not TOML"],
        "trials = true": ["trials must be a number"], "[trials]\nx = 1": ["trials must be"], "ep = []": ["ep must be"],
    }.items():  # fmt: skip
        config.write_text(text)
        fails(capsys, ["sweep", "--config", config, "--out", tmp_path / "c"], "--config", *parts)
    fails(capsys, ["sweep", "--config", tmp_path / "absent.toml"], "absent.toml", "cannot be read")
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_plot_draws_every_figure_and_of_two_the_same_bytes_twice(folder, capsys):
    assert main(["plot", str(folder)]) == 0
    said = capsys.readouterr().out.splitlines()
    written = [Path(line).name for line in said if line.endswith(".png")]
    undrawn = [line.partition(": not drawn")[0] for line in said if not line.endswith(".png")]
    assert sorted([*undrawn, *(name.removesuffix(".png") for name in written)]) == sorted(FIGURES)
    two = [Path(name).stem for name in written[:2]]
    some = ["plot", str(folder), "--figures", ",".join(two), "--format"]
    assert main([*some, "svg"]) == 0
    written += [f"{name}.svg" for name in two]
    first = {name: (folder / name).read_bytes() for name in written}
    assert all(data.startswith((b"\x89PNG", b"<?xml")) for data in first.values())
    for name in first:
        (folder / name).unlink()
    assert main([*some, "png,svg"]) == 0
    for name in [f"{name}.{ending}" for name in two for ending in ("png", "svg")]:
        assert (folder / name).read_bytes() == first[name]
        (folder / name).unlink()
    capsys.readouterr()
    fails(capsys, ["plot", folder, "--figures", "exceedence"], "figure 'exceedence'", "did you mean exceedance")
    fails(capsys, ["plot", folder, "--tokens", "5"], "--tokens 5", "1, 16")
    fails(capsys, ["plot", folder, "--format", "pdf"], "--format 'pdf'", "png, svg")


def test_bad_usage_is_one_line_and_status_2(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words, parts in (
        (["--model", "deepsek-v3"], ["model 'deepsek-v3'", "did you mean deepseek-v3"]),
        (["--workload", "chta"], ["workload 'chta'", "did you mean chat"]),
        (["--workload", "foo"], ["workload 'foo' is not known; known: chat, gpqa-tilted, "]),
        (["--placement", "liner"], ["placement 'liner'", "did you mean linear"]),
        (["--ep", "0"], ["--ep 0", "from 1 to the 256"]),
        (["--ep", "-4"], ["--ep -4", "from 1"]),
        (["--ep", "300"], ["--ep 300", "256 experts"]),
        (["--ep", "8,x"], ["--ep 'x'", "whole numbers"]),
        (["--ep", "64..8"], ["--ep '64..8'", "goes up"]),
        (["--tokens", "0"], ["--tokens 0", "from 1"]),
        (["--draws", "50000"], ["--draws 50000"]),
        (["--phase", "prefill"], ["--phase", "chat"]),
        (["--tokens-per-rank", "4", "--tokens", "4"], ["--tokens-per-rank", "--tokens"]),
        (["--workload", "file:absent.npz"], ["absent.npz", "does not exist"]),
        (["--placement", "file:absent.json"], ["absent.json", "cannot be read"]),
        (["--model", "absent/config.json"], ["absent/config.json", "cannot be read"]),
        (["--nonsense"], ["--nonsense"]),
        (["--out", "pyproject.toml"], ["pyproject.toml", "not a folder"]),
    ):
        words = words if "--out" in words else [*words, "--out", "/nonexistent/epsim"]
        fails(capsys, ["sweep", *words], *parts)


def test_a_failed_write_is_status_1_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    fails(capsys, [*RUN, "--out", "/proc/epsim"], "cannot write", status=1)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pd.DataFrame, "to_parquet", full)
    fails(capsys, [*RUN, "--out", tmp_path / "full"], "No space left on device", status=1)
    assert [path.name for path in (tmp_path / "full").iterdir()] == [".partial"]  # finished chunks, for the next try
    monkeypatch.undo()
    assert main([*RUN, "--out", str(tmp_path / "full")]) == 0
    assert not (tmp_path / "full" / ".partial").exists()


def test_damaged_folders_are_refused(tmp_path, capsys):
    fails(capsys, ["plot", tmp_path / "absent"], "does not exist")
    (tmp_path / "provenance.json").write_text("{}")
    fails(capsys, ["show", tmp_path], "provenance.json")
    (tmp_path / "provenance.json").write_text('{"sweep": {}}')
    fails(capsys, ["show", tmp_path], "does not describe a sweep")
    (tmp_path / "provenance.json").write_text("[" * 100_000)
    fails(capsys, ["show", tmp_path], "is not JSON")


@pytest.mark.parametrize("name", ["summary.csv", "tail.csv", "counts.parquet"])
def test_tables_that_changed_since_are_refused(folder, tmp_path, capsys, name):
    """A table cut off at a line would still parse; digests tell."""
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[: data.rfind(b"\n", 0, len(data) // 2) + 1])
    for verb in (["show", copy], ["plot", copy], [*RUN, "--out", copy]):
        fails(capsys, verb, name, "damaged or was changed")
    (copy / name).unlink()
    if name != "counts.parquet":
        fails(capsys, ["show", copy], name, "cannot be read")
    else:
        assert main(["show", str(copy)]) == 0
        fails(capsys, ["plot", copy], "counts.parquet", "run the sweep again")
        assert main([*RUN, "--out", str(copy)]) == 0
        assert (copy / name).read_bytes() == data


def test_notes_tell_what_is_assumed(tmp_path, capsys):
    run = ["sweep", "--ep", "4", "--tokens", "4", "--trials", "5", "--bound-layers", "0"]
    assert main([*run, "--model", "glm-4.6", "--out", str(tmp_path / "a")]) == 0
    err = capsys.readouterr().err
    assert "glm-4.6: not read from the checkpoint itself: every field" in err
    assert "fitted to deepseek-r1; on glm-4.6 it is an assumption" in err
    assert "vLLM falls back to linear where round_robin is asked for" in err
    assert main([*run, "--model", "deepseek-r1", "--out", str(tmp_path / "b")]) == 0
    assert "assumption" not in capsys.readouterr().err


def test_recorded_routing_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ids = np.array([np.random.default_rng(s).permutation(32)[:4] for s in range(300)], np.int16)
    np.savez("my.npz", topk_ids=ids.reshape(100, 3, 4), sequence_lengths=np.full(20, 5))
    run = "sweep --model gpt-oss-20b --workload file:my.npz --ep 4 --tokens 4,64 --trials 30".split()
    assert main([*run, "--phase", "prefill"]) == 0
    [path] = Path("results").glob("gpt-oss-20b-my-????????")  # the id of what is sampled
    summary = pd.read_csv(path / "summary.csv")
    assert summary.draws.unique().tolist() == [3]
    assert summary.imbalance_mean_low.notna().all()
    capsys.readouterr()
    fails(capsys, [*run, "--draws", "7", "--out", "x"], "--draws 7", "3 layers")
    fails(capsys, [*run, "--model", "mixtral-8x7b", "--out", "x"], "top_k 2")


@pytest.mark.slow
def test_lists_and_help(capsys):
    for verb in ("models", "placements", "gpus", "columns"):
        assert main([verb, "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)) >= 8
    for verb in ("models", "workloads", "placements"):
        assert main([verb]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") > 53
    assert "deepseek-v3" in out
    assert "gpqa-tilted" in out
    assert "falls back to linear" in out
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in VERBS)
    assert "130 after an interrupt" in out
    for verb in VERBS:
        assert main([verb, "--help"]) == 0
    for verb in ("show", "fit", "decay"):
        assert main(["traffic", verb, "--help"]) == 0
        assert f"usage: epsim traffic {verb}" in capsys.readouterr().out
    fails(capsys, ["sweeep"], "did you mean sweep")
    fails(capsys, ["sweep", "--placement", "eblp"], "did you mean eplb")
    fails(capsys, ["sweep", "--trails", "5"], "--trails does not go with epsim sweep; did you mean --trials?")
    fails(capsys, ["traffic", "shw", "x"], "show", "fit", "decay")
    fails(capsys, ["traffic"], "epsim traffic: error: needs show|fit|decay")


def test_every_column_of_the_committed_tables_has_a_unit_and_a_meaning(capsys):
    for path in (ROOT / "results").glob("*/*.csv"):
        for name in pd.read_csv(path, nrows=0):
            assert main(["columns", name, "--json"]) == 0, f"{path.name}: {name}"
            assert all(row["meaning"] for row in json.loads(capsys.readouterr().out))
    fails(capsys, ["columns", "imbalence"], "did you mean imbalance")


def test_an_error_names_the_parameter_in_python_and_the_option_on_the_command_line(tmp_path, capsys):
    for change, in_python, words, on_the_command_line in (
        ({"seed": -1}, "`seed` -1: must be", "--seed -1", "--seed -1: must be"),
        (
            {"max_trials": 5},
            "`max_trials` goes with `precision`",
            "--max-trials 5",
            "--max-trials goes with --precision",
        ),
        ({"draws": 50_000}, "`draws` 50000", "--draws 50000", "--draws 50000"),
    ):
        with pytest.raises(sim.InputError) as error:
            sim.sweep("deepseek-v3", "chat", **{"ep_sizes": 8, "tokens": 1, "placements": "linear"} | change)
        assert str(error.value).startswith(in_python)
        fails(capsys, ["sweep", *words.split(), "--out", tmp_path / "x"], f"epsim sweep: error: {on_the_command_line}")


def test_a_wrong_call_names_the_parameter():
    for call, message in (
        (lambda: sim.sweep("deepseek-v3", "chat", foo=1), "sim.sweep: parameter 'foo' is not known"),
        (lambda: sim.sweep("deepseek-v3", "chat", placement="linear"), "did you mean placements?"),
        (lambda: sim.sweep("deepseek-v3", "chat"), "sim.sweep: missing a required argument: `ep_sizes`"),
        (lambda: sim.predict_gain("deepseek-v3", "chat", "h200", ep_size=8, tokens=8), "did you mean ep_sizes?"),
        (lambda: sim.capacity("deepseek-v3", "chat", foo=1), "sim.capacity: parameter 'foo' is not known"),
        (lambda: sim.advise("deepseek-v3", "chat", "h200", ep_size=8, exchange="pair"), "calls it `backend`"),
        (lambda: sim.load_model(None), "`model` None: must be"),
        (lambda: sim.load_gpu(3), "`gpu` 3: must be"),
        (lambda: sim.load_workload(3), "`workload` 3: must be"),
        (lambda: sim.read_traffic(3), "`path` 3: must be"),
        (lambda: sim.read_result(3), "`folder` 3: must be"),
        (lambda: sim.route(np.zeros((1, 256)), None), "`model` None: must be"),
    ):
        with pytest.raises(sim.InputError) as error:
            call()
        assert message in str(error.value)


def test_every_declared_option_is_an_option_a_key_and_a_parameter(capsys):
    assert main(["sweep", "--help"]) == 0
    words = capsys.readouterr().out.split()
    parameters = inspect.signature(sim.sweep).parameters
    for name, (declared, _) in declarations(SweepOptions).items():
        assert flag_of(name, declared) in {word.strip("[]|") for word in words}
        assert name in parameters
        assert f"{name} : " in sim.sweep.__doc__


def test_ranges(tmp_path):
    words = ["sweep", "--ep", "2..8,12", "--tokens", "2..6:2", "--trials", "3", "--bound-layers", "0"]
    assert main([*words, "--out", str(tmp_path / "r")]) == 0
    summary = pd.read_csv(tmp_path / "r" / "summary.csv")
    assert sorted(set(summary.ep_size)) == [2, 4, 8, 12]
    assert sorted(set(summary.tokens)) == [2, 4, 6]


def test_python_m_sim_is_the_same_program_and_help_does_not_load_numba():
    code = "import sys; from sim.cli import main; main(['--help']); assert not {'numba', 'pandas'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0
    run = subprocess.run([sys.executable, "-m", "sim", "placements"], capture_output=True, text=True, check=False)
    assert run.returncode == 0
    assert "round_robin" in run.stdout


@pytest.mark.parametrize(("verb", "goes_on"), [("sweep", True), ("claims", False)])
def test_only_a_sweep_promises_to_go_on_after_an_interrupt(verb, goes_on, monkeypatch, capsys):
    def interrupted(arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"sim.cli.{verb}.run_{verb}", interrupted)
    assert main([verb]) == 130
    err = capsys.readouterr().err
    assert err.startswith(f"epsim {verb}: error: interrupted")
    assert ("finished chunks are kept" in err) == goes_on


@pytest.mark.parametrize("works", [True, False])
def test_a_run_that_ends_with_an_error_says_nothing_else(works, monkeypatch, capsys):
    def run(arguments):
        note("a remark")
        note("a  remark")
        if not works:
            raise sim.InputError("`model` is wrong")

    monkeypatch.setattr("sim.cli.lists.run_placements", run)
    assert main(["placements"]) == (0 if works else 2)
    assert capsys.readouterr().err == ("note: a remark\n" if works else "epsim placements: error: model is wrong\n")


def test_help_of_a_verb_is_found_by_either_order_and_names_what_must_be_given(capsys):
    assert main(["help", "export"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("usage: epsim export --placement P --ep R --format F --out FILE [options]")
    assert main(["export", "--help"]) == 0
    assert capsys.readouterr().out == first


# Output


def test_any_number_of_placements_is_compared(folder, capsys):
    names = "round_robin,linear,linear_legacy"
    assert main(["show", str(folder), "--ep", "12", "--tokens", "16", "--placement", names]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[-7:][0] for line in lines if "linear" in line or "linear_legacy" in line]
    rows = pd.read_csv(folder / "summary.csv").query("ep_size == 12 and tokens == 16").set_index("placement")
    for name in names.split(","):
        assert any(name in line and f"{rows.imbalance_mean[name]:.3f}" in line for line in lines)
    assert main(["show", str(folder), "--placement", names, "--markdown"]) == 0
    assert "change legacy (95 %)" in capsys.readouterr().out


def test_rows_for_programs_stand_alone_on_stdout(folder, capsys):
    summary = pd.read_csv(folder / "summary.csv")
    chosen = summary.query("ep_size == 12 and placement == 'linear'")
    words = ["show", str(folder), "--ep", "12", "--placement", "linear"]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["imbalance_mean"] for row in rows] == chosen.imbalance_mean.tolist()
    assert main([*words, "--csv"]) == 0
    assert capsys.readouterr().out.splitlines() == chosen.to_csv(index=False, float_format="%.10g").splitlines()
    assert main([*words, "--tail", "--json"]) == 0
    assert {row["metric"] for row in json.loads(capsys.readouterr().out)} == {"imbalance"}
    assert main([*RUN, "--out", str(folder), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == len(summary)
    fails(capsys, [*words, "--json", "--csv"], "--csv", "--json")


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_tables_fit_the_terminal(folder, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for more in ([], ["--tail"], ["--worst"], ["--placement", "round_robin,linear,linear_legacy"]):
        assert main(["show", str(folder), *more]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert max(map(len, lines)) <= columns, more


def test_a_folder_by_default_is_of_this_sweep_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    run = ["sweep", "--model", "gpt-oss-20b", "--workload", "uniform", "--ep", "4", "--tokens", "4", "--trials", "5"]
    assert main(run) == 0
    assert main([*run, "--seed", "1"]) == 0
    folders = sorted(path.name for path in Path("results").iterdir())
    assert len(folders) == 2
    assert all(name.startswith("gpt-oss-20b-uniform-") and len(name) == 28 for name in folders)
    out = capsys.readouterr().out
    assert all(f"results/{name}" in out for name in folders)
    assert main([*run, "--workload", "uniform,gpt-oss-20b", "--out", "{workload}/{model}"]) == 0
    assert {path.parts[-3] for path in tmp_path.glob("*/gpt-oss-20b/summary.csv")} == {"uniform", "gpt-oss-20b"}
    capsys.readouterr()
    fails(capsys, [*run, "--workload", "uniform,chat", "--out", "one"], "several workloads need a folder each")


def test_provenance_does_not_change_when_nothing_else_does(folder, tmp_path, monkeypatch):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "counts.parquet").unlink()  # so that the sweep is run again
    before = (copy / "provenance.json").read_bytes()
    monkeypatch.setattr("sys.argv", ["epsim", "another", "command"])
    assert main([*RUN, "--out", str(copy)]) == 0
    assert (copy / "counts.parquet").exists()
    assert (copy / "provenance.json").read_bytes() == before


# Progress


def test_progress_is_one_share_of_the_whole_over_nested_parts():
    seen = []
    with watching(lambda share, name: seen.append((round(share, 3), name))):
        sizes = {"sampling": 1.0, "bounds": 3.0}
        with phase("sampling", sizes):
            advance(0.5)
        with phase("bounds", sizes):
            for _ in track(iter("ab"), [1.0, 2.0], ["a", "b"]):
                pass
    assert seen == [
        (0.0, "sampling"), (0.125, "sampling"), (0.25, "sampling"), (0.25, "bounds"), (0.25, "bounds: a"),
        (0.5, "bounds: b"), (1.0, "bounds"), (1.0, "bounds"),
    ]  # fmt: skip
    assert list(track("abc", [1.0])) == ["a", "b", "c"]  # nobody watches: nothing is counted


def test_progress_on_threads_counts_what_has_ended_by_size_not_in_order():
    small_ended, seen = threading.Event(), []

    def work(size):
        assert size < 3 or small_ended.wait(60)  # the largest, begun first, ends last
        return size

    def show(share, _):
        seen.append(share)
        small_ended.set()

    with watching(show), ThreadPoolExecutor(2) as pool:
        assert map_on(pool, work, [3.0, 1.0], [3.0, 1.0]) == [3.0, 1.0]
    assert seen == [0.25, 1.0]


def test_a_sweep_announces_all_of_its_phases(tmp_path):
    seen = []
    with watching(lambda share, name: seen.append((share, name))):
        assert main([*RUN, "--bound-layers", "4", "--out", str(tmp_path / "x")]) == 0
    shares = [share for share, _ in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert [name for name in dict.fromkeys(name for _, name in seen) if name] == [
        "sampling", "bounds", "bounds: layers", "bounds: ranks", "rare events", "writing"
    ]  # fmt: skip
    assert time_left_s(10.0, 0.25) == 30.0
    assert time_left_s(10.0, 0.0) == float("inf")
