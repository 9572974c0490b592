"""A sweep that was stopped goes on, and ends with the same bytes."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from conftest import run

from sim import InputError, results
from sim.sweeps import Journal, executors, journal, make_plan, run_plan
from sim.sweeps.chunk import stage_chunks
from sim.sweeps.precision import first_stage

ONE_THREAD = executors.threads(1)

ARGUMENTS = {
    "ep_sizes": [8, 12], "tokens": [1, 64], "placements": ["linear", "random"], "trials": 400, "bound_layers": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def plan():
    return make_plan("deepseek-v3", "chat", **ARGUMENTS)


@pytest.fixture(scope="module")
def whole(plan):
    """The result of a run that is not stopped."""
    return run_plan(plan, ONE_THREAD)


@pytest.fixture(scope="module")
def n_chunks(plan):
    return len(stage_chunks(plan, first_stage(plan)))


class Stopped(Exception):  # noqa: N818
    pass


def _count_chunks(monkeypatch, stop_after=None):
    """Count the chunks that are computed; raise Stopped after some."""
    monkeypatch.undo()
    computed, original = [], executors.run_chunk

    def counted(plan, stage, draws):
        if len(computed) == stop_after:
            raise Stopped
        computed.append(draws)
        return original(plan, stage, draws)

    monkeypatch.setattr(executors, "run_chunk", counted)
    return computed


def _stop_after(plan, folder, monkeypatch, n_chunks):
    """Stop a sweep after some chunks; the files of its journal."""
    _count_chunks(monkeypatch, stop_after=n_chunks)
    with pytest.raises(Stopped):
        run_plan(plan, ONE_THREAD, journal=Journal(folder, plan))
    monkeypatch.undo()
    return sorted((folder / ".partial").glob("*.npz"))


def test_finished_chunks_are_not_computed_again(plan, whole, n_chunks, tmp_path, monkeypatch):
    first = _count_chunks(monkeypatch, stop_after=5)
    with pytest.raises(Stopped):
        run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan))
    second = _count_chunks(monkeypatch)
    resumed = run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan))
    assert len(first) == 5
    assert n_chunks - 5 <= len(second) <= n_chunks - 3  # what was in flight may be lost
    third = _count_chunks(monkeypatch)
    again = run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan))
    assert third == []
    for result in (resumed, again):
        for name in ("summary", "tail", "counts"):
            assert getattr(result, name).equals(getattr(whole, name))


def test_a_damaged_chunk_is_computed_again(plan, whole, n_chunks, tmp_path, monkeypatch):
    files = _stop_after(plan, tmp_path, monkeypatch, 5)
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].write_bytes(b"")
    computed = _count_chunks(monkeypatch)
    assert run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan)).summary.equals(whole.summary)
    assert len(computed) == n_chunks - len(files) + 2


def test_the_number_of_journal_files_is_bounded(plan, whole, n_chunks, tmp_path, monkeypatch):
    """Runs of `_FOLD` chunks become one file, runs of runs too, and a stage that is finished is a single file."""
    monkeypatch.setattr(journal, "_FOLD", 3)
    most = []
    original = Journal.add

    def counted(self, stage, draws, tally):
        original(self, stage, draws, tally)
        most.append(len(list((tmp_path / ".partial").glob("*.npz"))))

    monkeypatch.setattr(Journal, "add", counted)
    result = run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan))
    assert len(most) == n_chunks > 9
    assert max(most) <= 2 * 3 + 2  # two of each of three levels, and what two chunks in flight leave behind
    assert len(list((tmp_path / ".partial").glob("*.npz"))) == 1
    assert result.counts.equals(whole.counts)
    again = run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan))
    assert again.counts.equals(whole.counts)
    assert len(most) == n_chunks


@pytest.mark.parametrize("stop", [1, 4, 8, 11])
def test_folded_chunks_and_single_ones_go_on_together(plan, whole, tmp_path, monkeypatch, stop):
    _stop_after(plan, tmp_path, monkeypatch, stop)
    monkeypatch.setattr(journal, "_FOLD", 3)
    assert run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan)).counts.equals(whole.counts)
    assert len(list((tmp_path / ".partial").glob("*.npz"))) == 1


@pytest.mark.parametrize("head", [b"", b"{", b"\xff", b"[1]", b"{}", b'{"sweep": {"seed": 1}, "sha256": "0"}'])
def test_a_damaged_head_is_set_aside_and_the_sweep_goes_on(plan, n_chunks, tmp_path, monkeypatch, head):
    n_kept = len(_stop_after(plan, tmp_path, monkeypatch, 5))
    (tmp_path / ".partial" / "sweep.json").write_bytes(head)
    kept = Journal(tmp_path, plan)
    assert len(kept.notes) == 1
    assert "set aside as sweep.json.damaged" in kept.notes[0]
    assert (tmp_path / ".partial" / "sweep.json.damaged").read_bytes() == head
    computed = _count_chunks(monkeypatch)
    run_plan(plan, ONE_THREAD, journal=kept)
    assert len(computed) == n_chunks - n_kept
    assert not Journal(tmp_path, plan).notes


def test_chunks_of_another_sweep_under_a_damaged_head_are_not_used(plan, whole, n_chunks, tmp_path, monkeypatch):
    other = make_plan("deepseek-v3", "chat", **ARGUMENTS, seed=1)
    _stop_after(other, tmp_path, monkeypatch, 5)
    (tmp_path / ".partial" / "sweep.json").write_bytes(b"")
    computed = _count_chunks(monkeypatch)
    assert run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan)).counts.equals(whole.counts)
    assert len(computed) == n_chunks


def test_an_unfinished_sweep_of_an_earlier_version_is_refused(plan, tmp_path):
    (tmp_path / ".partial").mkdir()
    (tmp_path / ".partial" / "sweep.json").write_text(json.dumps(plan.identity))
    with pytest.raises(InputError, match="earlier version"):
        Journal(tmp_path, plan)


def test_a_journal_of_another_sweep_is_refused(plan, tmp_path):
    run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan))
    other = make_plan("deepseek-v3", "chat", **ARGUMENTS, seed=1)
    with pytest.raises(InputError, match="another unfinished sweep"):
        Journal(tmp_path, other)


@pytest.mark.slow
def test_killed_at_random_moments_the_tables_are_the_same_bytes(tmp_path):
    """kill -9 twice, the moments drawn with a fixed seed; then one run to the end."""
    moments = random.Random(5)
    words = "sweep --ep 8,64 --tokens 1,4096 --trials 3000 --threads 1 --placement linear,round_robin".split()
    command = [sys.executable, "-m", "sim", *words]
    assert run(*words, "--out", tmp_path / "whole") == 0
    stopped = tmp_path / "stopped"
    killed = 0
    for _ in range(2):
        process = subprocess.Popen([*command, "--out", stopped], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1.0 + moments.random())
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 1
    assert run(*words, "--out", stopped) == 0
    for name in ("summary.csv", "tail.csv", "counts.parquet"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in stopped.iterdir()) == [
        "counts.parquet", "provenance.json", "summary.csv", "tail.csv",
    ]  # fmt: skip


def _run_two(folder):
    words = "sweep --workload uniform,chat --ep 8 --tokens 64 --trials 100 --threads 2 --bound-layers 2 --out"
    return run(*words.split(), f"{folder}/{{workload}}")


def _tables(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.csv")}


def test_an_interrupt_stops_all_sweeps_of_a_command_and_it_goes_on_from_there(tmp_path, monkeypatch):
    assert _run_two(tmp_path / "whole") == 0
    original = executors.run_chunk

    def interrupted(plan, stage, draws):
        if plan.workload.name == "chat":  # the tables of the first are made meanwhile
            raise KeyboardInterrupt
        return original(plan, stage, draws)

    monkeypatch.setattr(executors, "run_chunk", interrupted)
    assert _run_two(tmp_path / "stopped") == 130
    monkeypatch.undo()
    assert _run_two(tmp_path / "stopped") == 0
    assert _tables(tmp_path / "stopped") == _tables(tmp_path / "whole")
    assert len(_tables(tmp_path / "whole")) == 4


def test_tables_that_cannot_be_written_fail_the_command_though_others_can(tmp_path, monkeypatch, capsys):
    original = results.write_result

    def full(result, folder):
        if folder.name == "uniform":
            raise OSError(28, "No space left on device", str(folder))
        original(result, folder)

    monkeypatch.setattr(results, "write_result", full)
    assert _run_two(tmp_path) == 1
    assert "No space left on device" in capsys.readouterr().err
    monkeypatch.undo()
    assert _run_two(tmp_path) == 0
