"""The Dask executor: the rows of threads, whatever becomes of the workers, in a process of their own."""

import subprocess
import sys

import pytest
from conftest import fails

from sim.cli import main

pytest.importorskip("distributed", reason="the extra 'cluster' is not installed")

COMMAND = ["sweep", "--ep", "8,64", "--tokens", "1,256", "--placement", "linear,random,eplb+64", "--trials", "3000"]
COMMAND += ["--bound-layers", "3", "--fit-tokens", "100"]
TABLES = ("summary.csv", "tail.csv", "counts.parquet")


@pytest.fixture(scope="module")
def by_threads(tmp_path_factory):
    folder = tmp_path_factory.mktemp("threads")
    assert main([*COMMAND, "--out", str(folder)]) == 0
    return {name: (folder / name).read_bytes() for name in TABLES}


BY_DASK = """
import os, signal, sys, threading, time
from pathlib import Path
from distributed import LocalCluster
from sim.cli import main

if __name__ == "__main__":
    out, command = Path(sys.argv[1]), [*sys.argv[2:], "--executor", "dask"]
    if status := main([*command, "--threads", "2", "--out", str(out / "local")]):
        sys.exit(status)
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None, silence_logs=50) as cluster:
        killed = []

        def kill():
            while len(list(out.glob("killed/.partial/*.npz"))) < 3:
                time.sleep(0.002)
            worker = next(iter(cluster.workers.values()))
            pid = worker.pid
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

        thread = threading.Thread(target=kill, daemon=True)
        thread.start()
        status = main([*command, "--scheduler", cluster.scheduler_address, "--out", str(out / "killed")])
        print("killed", len(killed))
    sys.exit(status)
"""


@pytest.mark.slow
def test_a_cluster_gives_the_rows_of_threads_and_a_worker_that_is_killed_loses_and_doubles_nothing(
    by_threads, tmp_path
):
    words = [sys.executable, "-c", BY_DASK, tmp_path, *COMMAND]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "killed 1" in done.stdout
    for folder in ("local", "killed"):
        assert {name: (tmp_path / folder / name).read_bytes() for name in TABLES} == by_threads


def test_bad_clusters_are_one_line_and_leave_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sim.sweeps.executors._ANSWER_S", 1)
    for options, message in (
        (["--executor", "dask", "--scheduler", "tcp://127.0.0.1:1"], "no Dask scheduler answers there"),
        (["--executor", "dask", "--scheduler", "nonsense"], "no Dask scheduler answers there"),
        (["--scheduler", "tcp://127.0.0.1:1"], "--scheduler goes with --executor dask"),
    ):
        fails(capsys, [*COMMAND, *options, "--out", tmp_path / "out"], message)
        assert not (tmp_path / "out").exists()
