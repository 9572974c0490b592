"""The executor on this machine's GPUs against the CPU (`make bench-cuda`): the same rows, and how fast.

    python tests/bench_cuda.py [--check-tokens N] [--repeats N] [--out results/measured/speed-h100.json]

First every kind of traffic and router is swept on both, and the raw counts are held against each other, integer for
integer. Then the headline sweep and one of small steps are timed, several times each; the CPU's figure stands beside them.
With several GPUs, the rate of all is held against that of one. Exit status 1 if any count differs.
"""

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numba
import numpy as np

from sim import load_workload, sweep
from sim.kernels import usable_processors
from sim.results import SweepResult
from sim.sweeps.device import count_devices, device_name

GRID = {"ep_sizes": [8, 16, 32, 64], "placements": ["linear", "round_robin"]}
V3, CHAT = "deepseek-v3", "chat"
CASES: list[tuple[str, Any, str, dict[str, Any], float]] = [
    # name, workload, model, other options, share of the tokens that are checked
    ("chat, 4096 tokens", CHAT, V3, {"tokens": [4096]}, 1.0),
    ("chat, six step sizes", CHAT, V3, {"tokens": [1, 8, 64, 128, 512, 2048]}, 0.2),
    ("chat, 64 tokens", CHAT, V3, {"tokens": [64]}, 0.1),
    ("chat, 100 layers", CHAT, V3, {"tokens": [64, 1024], "draws": 100}, 0.1),
    ("chat, random placements", CHAT, V3, {"tokens": [1024], "placements": ["linear", "random"]}, 0.02),
    ("gpqa-tilted", "gpqa-tilted", V3, {"tokens": [64, 512]}, 0.1),
    ("uniform", "uniform", V3, {"tokens": [64, 512]}, 0.1),
    ("prefill", "prefill", V3, {"tokens": [1500, 4096]}, 0.1),
    (
        "requests of 100 tokens",
        replace(load_workload("prefill-strong"), tokens_per_request=100),
        V3,
        {"tokens": [512]},
        0.05,
    ),
    ("sharp layers", load_workload(CHAT, sigma=4.0), V3, {"tokens": [512]}, 0.01),
    (
        "deepseek-v2 (best expert of a group, 20 experts in each)",
        CHAT,
        "deepseek-v2",
        {"tokens": [512], "ep_sizes": [8, 32]},
        0.1,
    ),
    ("kimi-k2 (no groups)", CHAT, "kimi-k2", {"tokens": [512]}, 0.1),
]
SPEED = {
    "the headline sweep: deepseek-v3, chat, EP 8,16,32,64, linear and round_robin, 4096 tokens": ([4096], 2**33, 2**28),
    "the same at 64 tokens, where every step is a fresh layer": ([64], 2**31, 2**27),
}  # tokens per step, tokens sampled on the GPUs, and on the CPU


SCALING = {
    "model": V3, "workload": CHAT, "ep": "8,16,32,64", "placement": "linear,round_robin", "tokens": 4096,
    "received": "off", "bound-layers": 0, "executor": "cuda",
}  # fmt: skip


def run(executor: str, model: str, workload: Any, trials: int, options: dict[str, Any], seed: int = 0) -> SweepResult:
    """A sweep without bounds and without received tokens."""
    return sweep(
        model, workload, **GRID | options, trials=trials, seed=seed, bound_layers=0, received="off", executor=executor
    )


def differing(a: SweepResult, b: SweepResult) -> int:
    """By how much the raw counts of two results differ: 0 if all are equal."""
    keys = ["placement", "ep_size", "tokens", "metric", "value"]
    both = [part.counts.astype({"placement": str, "metric": str}).set_index(keys)["count"] for part in (a, b)]
    return int(both[0].sub(both[1], fill_value=0).abs().sum())


def check(n_tokens: int) -> list[dict[str, Any]]:
    """Every case on both, with the number of tokens and the difference of the counts."""
    rows = []
    for name, workload, model, options, share in CASES:
        step = max(options["tokens"])
        trials = max(int(share * n_tokens) // step, 128)
        start = time.perf_counter()
        on_gpu = run("cuda", model, workload, trials, options)
        middle = time.perf_counter()
        on_cpu = run("threads", model, workload, trials, options)
        seconds = middle - start, time.perf_counter() - middle
        row = {"case": name, "tokens": trials * step, "differing_counts": differing(on_cpu, on_gpu)}
        row["same_tables"] = on_cpu.summary.equals(on_gpu.summary) and on_cpu.tail.equals(on_gpu.tail)
        print(f"{row}  GPU {seconds[0]:.1f} s, CPU {seconds[1]:.1f} s", flush=True)
        rows.append(row)
    return rows


def measure(steps: list[int], on_gpu: int, on_cpu: int, repeats: int) -> dict[str, Any]:
    """Tokens per second of a sweep from start to tables: on GPUs, each repeat, and on all processors."""
    found: dict[str, Any] = {}
    for executor, tokens, n in (("cuda", on_gpu, repeats), ("threads", on_cpu, min(repeats, 3))):
        trials, rates = tokens // steps[-1], []
        run(executor, V3, CHAT, 64, {"tokens": steps})
        for i in range(n):
            start = time.perf_counter()
            run(executor, V3, CHAT, trials, {"tokens": steps}, seed=i + 1)
            rates.append(trials * steps[-1] / (time.perf_counter() - start))
            print(f"  {executor:<8} {rates[-1] / 1e6:10.1f} M tokens/s", flush=True)
        found[executor] = {"trials": trials, "tokens_per_s": [round(rate) for rate in rates]}
        found[executor]["median_tokens_per_s"] = round(statistics.median(rates))
    return found


def scaling(n_gpus: int) -> dict[str, int]:
    """Tokens per second of the first sweep on one GPU and on all, from two lengths, so that start and compilation drop out."""
    rates, short, step = {}, 2**24, 4096
    for n in sorted({1, n_gpus}):
        seconds = []
        for trials in (short, 3 * short):
            with tempfile.TemporaryDirectory() as folder:
                options = [f"--{name}={value}" for name, value in SCALING.items()]
                command = [sys.executable, "-m", "sim", "sweep", *options, f"--trials={trials}", f"--out={folder}/out"]
                devices = ",".join(map(str, range(n)))
                start = time.perf_counter()
                subprocess.run(
                    command, env=os.environ | {"CUDA_VISIBLE_DEVICES": devices}, stdout=subprocess.DEVNULL, check=True
                )
                seconds.append(time.perf_counter() - start)
        rates[f"{n} GPU"] = round(2 * short * step / (seconds[1] - seconds[0]))
        print(
            f"  {n} GPU {rates[f'{n} GPU'] / 1e6:10.1f} M tokens/s ({seconds[0]:.1f} and {seconds[1]:.1f} s)",
            flush=True,
        )
    return rates


def main() -> None:
    """Check, measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check-tokens", type=int, default=10**9)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    about = {
        "command": shlex.join(["python", *sys.argv]), "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "card": device_name(), "gpus": count_devices(), "processors": usable_processors(),
        "versions": {"python": platform.python_version(), "numba": numba.__version__, "numpy": np.__version__},
    }  # fmt: skip
    print(about, flush=True)
    checked = check(arguments.check_tokens) if arguments.check_tokens else []
    measured = {}
    for name, (steps, on_gpu, on_cpu) in SPEED.items() if arguments.repeats else ():
        print(name, flush=True)
        measured[name] = measure(steps, on_gpu, on_cpu, arguments.repeats)
    found = about | {"checked": checked, "measured": measured}
    if about["gpus"] > 1:
        print("one GPU and all", flush=True)
        found["scaling_tokens_per_s"] = scaling(about["gpus"])
    if arguments.out:
        arguments.out.write_text(json.dumps(found, indent=1) + "\n")
    if any(row["differing_counts"] or not row["same_tables"] for row in checked):
        sys.exit("the GPU's counts differ from the CPU's")


if __name__ == "__main__":
    main()
