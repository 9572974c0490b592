"""Compile the kernels by small runs of what uses them, in two processes: so does `pytest -n` before its workers share the cache.

Usage: PYTHONPATH=. python tests/compile.py
"""

import contextlib
import io
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from sim.cli import main

SMALL = "--ep 4 --tokens 8"
PARTS = [
    [  # the sampler; on one thread a sweep starts no process of its own that compiles
        f"sweep --threads 1 --workload chat {SMALL} --trials 20 --placement linear --bound-layers 0 --out {{}}/a",
        f"sweep --workload prefill {SMALL} --trials 20 --placement linear --bound-layers 0 --out {{}}/p",
        f"sweep --workload chat {SMALL} --trials 20 --placement linear+4 --replica-choice vllm_hash --out {{}}/e",
        f"sweep --model gpt-oss-20b --workload chat {SMALL} --trials 20 --out {{}}/d",
        f"step --model gpt-oss-20b {SMALL} --layer-sets 2 --steps 2",
        f"gain --model gpt-oss-20b {SMALL} --layer-sets 2 --steps 2",
        f"capacity {SMALL} --deployments 2",
    ],
    [  # what needs no sampler first
        "export --model gpt-oss-20b --placement eplb+4 --fit-on {}/x.npz --ep 4 --format vllm --out {}/x.json",
        f"sweep --model gpt-oss-20b --workload {{}}/x.npz {SMALL} --trials 20 --placement linear,eplb+4 --out {{}}/f",
        f"step --model gpt-oss-20b --traffic {{}}/x.npz {SMALL} --steps 4",
        "traffic show {}/x.npz --model gpt-oss-20b",
        "traffic fit {}/x.npz --model gpt-oss-20b --out {}/x.toml",
        f"advise --model gpt-oss-20b --workload {{}}/x.npz {SMALL} --steps 2",
        f"sweep --workload chat {SMALL} --trials 20 --placement eplb,eplb+4,eplb_refined --fit-tokens 64 --rank-traffic"
        " --out {}/b",
        f"sweep --model deepseek-v2 --workload uniform {SMALL} --trials 20 --replica-choice even --out {{}}/c",
    ],
]


def compile_part(part):
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).random((80, 2, 32)).argsort(axis=2)[:, :, :4].astype(np.int16)
        np.savez(Path(folder) / "x.npz", topk_ids=ids, sequence_lengths=np.full(16, 5))
        for command in PARTS[part]:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                status = main(command.replace("{}", folder).split())
            if status:
                raise SystemExit(f"epsim {command}: {said.getvalue()}")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        compile_part(int(sys.argv[1]))
    else:
        parts = [subprocess.Popen([sys.executable, __file__, str(part)]) for part in range(len(PARTS))]
        sys.exit(any([part.wait() for part in parts]))
