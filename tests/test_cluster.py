"""The Dask executor: the rows of threads, whatever becomes of the workers. Each test runs in a process of its own."""

import subprocess
import sys
import textwrap

import pytest
from conftest import fails

from sim.cli import main

pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")

COMMAND = ["sweep", "--ep", "8,64", "--tokens", "1,256", "--placement", "linear,random,eplb+64", "--trials", "3000"]
COMMAND += ["--bound-layers", "3", "--fit-tokens", "100"]
TABLES = ("summary.csv", "tail.csv", "counts.parquet")


def python(code, *arguments):
    """Run a script with the arguments; its output."""
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def by_threads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    assert main([*COMMAND, "--out", str(folder)]) == 0
    return {name: (folder / name).read_bytes() for name in TABLES}


@pytest.mark.slow
def test_a_local_cluster_gives_the_rows_of_threads(by_threads, tmp_path):
    python(
        "import sys; from sim.cli import main\nif __name__ == '__main__': sys.exit(main(sys.argv[1:]))",
        *COMMAND, "--executor", "dask", "--threads", 2, "--out", tmp_path,
    )  # fmt: skip
    assert {name: (tmp_path / name).read_bytes() for name in TABLES} == by_threads


KILL = """
import os, signal, sys, threading, time
from pathlib import Path
from distributed import Client, LocalCluster
from sim.cli import main

if __name__ == "__main__":
    out = Path(sys.argv[-1])
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        killed = []

        def kill():
            while len(list(out.glob(".partial/*.npz"))) < 3:
                time.sleep(0.002)
            worker = next(iter(cluster.workers.values()))
            pid = worker.pid
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        status = main([*sys.argv[1:-1], "--scheduler", cluster.scheduler_address, "--out", str(out)])
        print("killed", len(killed))
    sys.exit(status)
"""


@pytest.mark.slow
def test_a_worker_that_is_killed_loses_and_doubles_nothing(by_threads, tmp_path):
    printed = python(KILL, *COMMAND, "--executor", "dask", tmp_path / "out")
    assert "killed 1" in printed
    assert {name: (tmp_path / "out" / name).read_bytes() for name in TABLES} == by_threads


def test_bad_clusters_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sim.sweeps.executors._ANSWER_S", 1)
    for options, message in (
        (["--executor", "dask", "--scheduler", "tcp://127.0.0.1:1"], "no Dask scheduler answers there"),
        (["--executor", "dask", "--scheduler", "nonsense"], "no Dask scheduler answers there"),
        (["--scheduler", "tcp://127.0.0.1:1"], "--scheduler goes with --executor dask"),
    ):
        fails(capsys, [*COMMAND, *options, "--out", tmp_path / "out"], message)
        assert not (tmp_path / "out").exists()
