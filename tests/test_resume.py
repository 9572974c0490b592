"""A sweep that was stopped goes on, and ends with the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest

from sim import InputError
from sim.sweeps import Journal, executors, make_plan, run_plan
from sim.sweeps.chunk import stage_chunks
from sim.sweeps.precision import first_stage

ONE_THREAD = executors.threads(1)

ARGUMENTS = {
    "ep_sizes": [8, 12],
    "tokens": [1, 64],
    "placements": ["linear", "random"],
    "trials": 400,
    "bound_layers": 2,
}


@pytest.fixture
def plan():
    return make_plan("deepseek-v3", "chat", **ARGUMENTS)


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


def test_finished_chunks_are_not_computed_again(plan, tmp_path, monkeypatch):
    whole = run_plan(plan, ONE_THREAD)
    n_chunks = len(stage_chunks(plan, first_stage(plan)))
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


def test_a_damaged_chunk_is_computed_again(plan, tmp_path, monkeypatch):
    whole = run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan))
    files = sorted((tmp_path / ".partial").glob("*.npz"))
    files[0].write_bytes(files[0].read_bytes()[:-100])
    files[1].write_bytes(b"")
    computed = _count_chunks(monkeypatch)
    assert run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan)).summary.equals(whole.summary)
    assert len(computed) == 2


def test_a_journal_of_another_sweep_is_refused(plan, tmp_path):
    run_plan(plan, ONE_THREAD, journal=Journal(tmp_path, plan))
    other = make_plan("deepseek-v3", "chat", **ARGUMENTS, seed=1)
    with pytest.raises(InputError, match="another unfinished sweep"):
        Journal(tmp_path, other)


@pytest.mark.slow
def test_killed_at_random_moments_the_tables_are_the_same_bytes(tmp_path):
    """kill -9 again and again, the moments drawn with a fixed seed; then one run to the end."""
    moments = random.Random(5)
    command = [
        sys.executable,
        "-m",
        "sim",
        "sweep",
        "--ep",
        "8,64",
        "--tokens",
        "1,4096",
        "--trials",
        "3000",
        "--threads",
        "1",
    ]
    subprocess.run([*command, "--out", tmp_path / "whole"], check=True, capture_output=True)
    stopped = tmp_path / "stopped"
    killed = 0
    for _ in range(4):
        process = subprocess.Popen([*command, "--out", stopped], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(1.0 + moments.random())
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
    assert killed >= 1
    subprocess.run([*command, "--out", stopped], check=True, capture_output=True)
    for name in ("summary.csv", "tail.csv", "counts.parquet"):
        assert (stopped / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in stopped.iterdir()) == [
        "counts.parquet",
        "provenance.json",
        "summary.csv",
        "tail.csv",
    ]
