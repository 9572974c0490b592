"""Made-up devices, measurements of sampled steps on one, and ranks that fail: what the tests of `sim.measure` share."""

import os
import signal
import time
from functools import cache

import numpy as np

from sim.cost import load_gpu
from sim.cost.expert import counted_rows, expert_rates, reached_fractions, sides_us
from sim.cost.tables import grouped_gemm_profile
from sim.measure.experts import BackendError, Timing
from sim.measure.run import measure
from sim.measure.steps import plan_measurement
from sim.measure.table import TILE_ROWS
from sim.model import load_model
from sim.traffic import load_workload

V3, H100 = load_model("deepseek-v3"), load_gpu("h100")


def steps_of(**changes):
    asked = {"ep_sizes": [8, 32], "tokens": [8, 512], "placements": ["linear", "round_robin"], "steps": 3, "seed": 1}
    return plan_measurement(V3, [load_workload("chat"), load_workload("gpqa-tilted")], **(asked | changes))


usual_steps = cache(steps_of)


class MadeUp:
    """A device that takes the time of a formula, with a fault on demand."""

    device, versions = "NVIDIA H100 made up", "none"

    def __init__(self, launch_us=5.0, bandwidth=0.7, peak=0.6, noise=0.0, fails=lambda dtype, calls: False):
        self.of, self.noise, self.fails = (launch_us, bandwidth, peak), noise, fails
        self.random, self.calls = np.random.default_rng(0), 0

    @classmethod
    def of_model(cls, share=1.0):
        """Whose times are the model's own, with so much of its shares of bandwidth and peak."""
        device = cls()
        device.of = {
            dtype: (grouped_gemm_profile(dtype).launch_us, *(share * own for own in reached_fractions(H100, dtype)[:2]))
            for dtype in ("bf16", "fp8")
        }
        return device

    def prepare(self, dtype, say):
        if self.fails(dtype, 0):
            raise BackendError(f"no {dtype}\nat all")
        return f"formula {dtype}"

    def calibrate(self, dtype):
        raise RuntimeError("no calibration")

    def time_layer(self, dtype, counts):
        self.calls += 1
        if self.fails(dtype, self.calls):
            raise RuntimeError("CUDA error: made up")
        pairs, distinct, kernel = counts.sum(), (counts > 0).sum(), grouped_gemm_profile(dtype)
        tiles = {size: (-(-counts // size)).sum() for size in TILE_ROWS}
        rates, own = expert_rates(V3, H100, dtype), reached_fractions(H100, dtype)
        rows = counted_rows(rates, pairs, len(counts), tiles)
        memory_us, compute_us = sides_us(rates, pairs, distinct, len(counts), rows)
        launch_us, bandwidth, peak = self.of[dtype] if isinstance(self.of, dict) else self.of
        memory_us, compute_us = memory_us * own[0], compute_us * own[1]
        p = kernel.sharpness
        fixed_us = kernel.idle_us * (len(counts) - distinct) + kernel.spread_us * (1 - 1 / max(distinct, 1))
        time_us = launch_us + fixed_us + ((memory_us / bandwidth) ** p + (compute_us / peak) ** p) ** (1 / p)
        return Timing(float(time_us * np.exp(self.noise * self.random.normal())), 0.1, 4, 5)


def measured(tmp_path, backend=None, dtypes=("bf16", "fp8"), **changes):
    out, lines = tmp_path / "measured.csv", []
    steps = changes.pop("steps_of", None) or usual_steps()
    measure(steps, backend or MadeUp(), H100, list(dtypes), out, say=lines.append, **changes)
    return out, lines


def serve_fault(rank, steps, device, rendezvous, end):
    """A made-up rank: rank 1 does on request what goes wrong on a real one."""
    end.send((True, {"pid": os.getpid()}))
    while (question := end.recv()) is not None:
        if rank == 1 and question[0] == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        elif rank == 1 and question[0] == "fail":
            end.send((False, "OutOfMemoryError: made up"))
        elif question[0] == "ping":
            end.send((True, rank))
        else:
            time.sleep(600)  # waits, as in a collective whose other rank is gone
