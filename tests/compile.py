"""Compile the kernels, by small runs of what uses them: `make test` does so once, before its workers share the cache."""

import contextlib
import io
import tempfile
from pathlib import Path

import numpy as np

from sim.cli import main

SMALL = "--ep 4 --tokens 8"
COMMANDS = [
    f"sweep --workload chat {SMALL} --trials 20 --placement linear,eplb,eplb+4,eplb_refined --fit-tokens 64 --rank-traffic"
    " --out {}/a",
    f"sweep --workload uniform {SMALL} --trials 20 --out {{}}/b",
    f"sweep --model deepseek-v2 --workload prefill {SMALL} --trials 20 --replica-choice even --out {{}}/c",
    f"sweep --model gpt-oss-20b --workload chat {SMALL} --trials 20 --out {{}}/d",
    f"sweep --workload chat {SMALL} --trials 20 --placement linear+4 --replica-choice vllm_hash --out {{}}/e",
    f"sweep --model gpt-oss-20b --workload {{}}/x.npz {SMALL} --trials 20 --placement linear,eplb+4 --out {{}}/f",
    f"gain --model gpt-oss-20b {SMALL} --layer-sets 2 --steps 2",
    f"step --model gpt-oss-20b {SMALL} --layer-sets 2 --steps 2",
    f"step --model gpt-oss-20b --traffic {{}}/x.npz {SMALL} --steps 4",
    f"capacity {SMALL} --deployments 2",
    "traffic show {}/x.npz --model gpt-oss-20b",
    "traffic fit {}/x.npz --model gpt-oss-20b --out {}/x.toml",
    f"advise --model gpt-oss-20b --workload {{}}/x.npz {SMALL} --steps 2",
]

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).random((80, 2, 32)).argsort(axis=2)[:, :, :4].astype(np.int16)
        np.savez(Path(folder) / "x.npz", topk_ids=ids, sequence_lengths=np.full(16, 5))
        for command in COMMANDS:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
                status = main(command.replace("{}", folder).split())
            if status:
                raise SystemExit(f"epsim {command}: {said.getvalue()}")
