"""The measurement: every chosen rank of every sampled layer, one after another, on one device."""

import gc
import platform
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from sim.cost import Gpu
from sim.errors import InputError
from sim.measure.experts import NumpyExperts, Say
from sim.measure.steps import MeasuredLayer, Measurement
from sim.measure.table import TILE_ROWS, Rows, growing_table
from sim.measure.torch_experts import TorchExperts
from sim.results import version_of

Backend = NumpyExperts | TorchExperts
"""A device that computes experts and takes the time."""


def measure(
    steps: Measurement,
    backend: Backend,
    gpu: Gpu,
    dtypes: Sequence[str],
    out: Path,
    *,
    time_limit_s: float = float("inf"),
    say: Say = print,
) -> dict[str, Any]:
    """Measure steps and append their rows to the CSV file `out`, until the end `NAME.partial.csv`; the numbers of `gpu` predict
    which ranks are busiest. What the device reaches, by type: kernel, and what `calibrate` gives.

    A type whose kernels do not come out right, or that fails later, is left out with a line that says why; the others go
    on. Layers that differ in their placement are measured one after the other, or none of them.

    Raises InputError where the file is there already, or no type can be measured.
    """
    started, versions = time.monotonic(), f"{software()}; {backend.versions}"
    fixed = {
        "model": steps.model.name,
        "gpu": gpu.name,
        "device": backend.device,
        "versions": versions,
        "seed": steps.seed,
    }
    with growing_table(out) as table:
        reached = _prepared(backend, dtypes, say)
        if not reached:
            raise InputError("--dtype: nothing that was asked for can be measured on this device (see above)")
        gc.collect()
        gc.disable()  # in the middle of a capture or a timing
        try:
            _measure_all(steps, backend, gpu, reached, fixed, table, started + time_limit_s, say)
        finally:
            gc.enable()
        if not table.written:
            raise InputError("nothing was measured: --time-limit was reached first, or every type failed (see above)")
    say(f"{table.written} rows in {time.monotonic() - started:.0f} s")
    return {"device": backend.device, "versions": versions, "dtypes": reached}


def _prepared(backend: Backend, dtypes: Sequence[str], say: Say) -> dict[str, dict[str, Any]]:
    """Kernel and calibration of each type that can be measured."""
    reached: dict[str, dict[str, Any]] = {}
    for dtype in dtypes:
        try:
            reached[dtype] = {"kernel": backend.prepare(dtype, say)}
        except Exception as error:  # of a library that may lack the type: the others go on
            say(f"{dtype} is left out: {_one_line(error)}")
            continue
        try:
            reached[dtype] |= backend.calibrate(dtype)
        except Exception as error:
            say(f"{dtype} is not calibrated: {_one_line(error)}")
        figures = ", ".join(f"{key} {value:.4g}" for key, value in reached[dtype].items() if key != "kernel")
        say(f"{dtype}: {reached[dtype]['kernel']}; {figures}")
    return reached


def _measure_all(
    steps: Measurement, backend: Backend, gpu: Gpu, reached: dict[str, Any], fixed: dict[str, Any], table: Rows,
    deadline: float, say: Say,
) -> None:  # fmt: skip
    left = list(reached)
    begun, step = time.monotonic(), -1
    for layers in steps.compared(gpu, list(reached)):
        if layers[0].step != step:
            step = layers[0].step
            say(f"step {step + 1} of {steps.n_steps}: {table.written} rows after {time.monotonic() - begun:.1f} s")
        for dtype in list(left):
            if time.monotonic() > deadline:
                say(f"--time-limit is reached in step {step + 1}")
                return
            about = fixed | {"dtype": dtype, "kernel": reached[dtype]["kernel"]}
            try:
                table.add([about | row for layer in layers for row in _measured(backend, dtype, layer)])
            except RuntimeError as error:  # CUDA's errors are RuntimeErrors
                left.remove(dtype)
                say(f"{dtype} stops in step {step + 1}: {_one_line(error)}")
        if not left:
            return


def _measured(backend: Backend, dtype: str, layer: MeasuredLayer) -> Iterator[dict[str, Any]]:
    """Rows of the chosen ranks of a layer."""
    for rank in layer.ranks:
        timing = backend.time_layer(dtype, rank.counts)
        yield {
            "workload": layer.workload,
            "tokens": layer.tokens,
            "step": layer.step,
            "ep_size": layer.ep_size,
            "placement": layer.placement,
            "rank": rank.rank,
            "chosen": rank.chosen,
            "pairs": int(rank.counts.sum()),
            "distinct": int((rank.counts > 0).sum()),
            **{f"tiles_{size}": int((-(-rank.counts // size)).sum()) for size in TILE_ROWS},
            "time_us": f"{timing.time_us:.3f}",
            "spread_us": f"{timing.spread_us:.3f}",
            "layers": timing.layers,
            "replays": timing.replays,
        }


def software() -> str:
    """Versions of what does not depend on the device."""
    return f"epsim {version_of('epsim')}; python {platform.python_version()}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
