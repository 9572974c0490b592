"""Measure what the experts of the busiest rank cost on a GPU, or show what was measured (--show): the model's predictions
beside it, and what one placement gains over another.
"""

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.cli.text import estimate, note, note_compiling, print_table, table
from sim.errors import InputError, unknown
from sim.options import NAMES, WHOLE_NUMBERS, Choice, FigureOptions, Seconds, Whole, add_options

Cells = tuple[list[str], list[list[str]]]

_PLACEMENTS = ["linear", "round_robin"]
_GRID = {
    "workload": ["chat", "gpqa-tilted"],
    "ep": [8, 16, 32, 64],
    "tokens": [2**i for i in range(3, 15)],
    "dtype": ["bf16", "fp8"],
}
_TABLES = {
    "error": "Error of the prediction as it stands, predicted / measured - 1",
    "constants": "Constants that these rows alone would give (a check; the model keeps its own)",
    "missed": "Layers whose rank picked at random was slower than those picked as busiest",
    "gain": "Gain of {other} over {baseline} in the layer's time, its slowest rank",
}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim measure`."""
    add = parser.add_argument
    add("--model", default="deepseek-v3", help="preset (epsim models) or path of a config.json (default: deepseek-v3)")
    add("--workload", type=NAMES, metavar="LIST", help="traffic (default: chat,gpqa-tilted)")
    add("--ep", type=WHOLE_NUMBERS, metavar="LIST", help="EP sizes (default: 8,16,32,64)")
    add(
        "--tokens",
        type=WHOLE_NUMBERS,
        metavar="LIST",
        help="tokens per step over the EP group (default: 8..16384, doubling)",
    )
    add(
        "--placement",
        type=NAMES,
        metavar="LIST",
        help="placements (default: linear,round_robin)",
    )
    add("--dtype", type=NAMES, metavar="LIST", help="types of the weights (default: bf16,fp8; a --layer: one, bf16)")
    add(
        "--layer", action="store_true", help="measure whole layers, one rank on each GPU (--ep: how many; default: all)"
    )
    add("--exchange", type=NAMES, metavar="LIST", help="with --layer: token,pair,gather,reduce (default: all four)")
    add("--steps", type=Whole(), default=16, metavar="N", help="steps to sample, each of a fresh layer (default: 16)")
    add("--seed", type=Whole(), default=0, metavar="N", help="same seed, same steps and ranks (default: 0)")
    add(
        "--device",
        type=Choice(names=("cuda", "cpu")),
        default="cuda",
        help="cuda (needs PyTorch: epsim[gpu]), or cpu for toy sizes (default: cuda)",
    )
    add("--gpu", help="GPU that predictions are for (epsim gpus; default: by the device's name)")
    add(
        "--time-limit",
        type=Seconds(),
        metavar="TIME",
        help="stop after this time, as in 90s or 8m; steps that were measured are kept",
    )
    add("--out", metavar="FILE.csv", help="where the rows go; what the device reaches goes to FILE.json")
    add("--show", type=Path, metavar="FILE.csv", help="measure nothing; print the tables of a file that was written")
    add("--plot", action="store_true", help="with --show: draw the figures beside the file")
    add_options(parser, FigureOptions)
    add(
        "--table",
        metavar="NAME",
        help=f"with --show: one of the tables alone: {', '.join(_TABLES)}; of layers: sum, gain, predicted",
    )
    add("--markdown", action="store_true", help="with --show: Markdown tables")


def run(arguments: Namespace) -> None:
    """Run `epsim measure`."""
    if arguments.show is None:
        for option in ("plot", "markdown", "table"):
            if getattr(arguments, option):
                raise InputError(f"--{option} goes with --show FILE.csv")
        if arguments.exchange is not None and not arguments.layer:
            raise InputError("--exchange goes with --layer")
        if arguments.layer:
            from sim.cli.measured_layers import measure_all

            measure_all(arguments)
            return
        for option, default in _GRID.items():
            if getattr(arguments, option) is None:
                setattr(arguments, option, default)
        _measure(arguments)
    else:
        for option in ("out", "layer"):
            if getattr(arguments, option):
                raise InputError(f"--{option} goes without --show: what was measured is only read")
        from sim.measure.layer_compare import is_of_layers

        if is_of_layers(arguments.show):
            from sim.cli.measured_layers import show

            show(arguments)
            return
        _show(arguments)


def _measure(arguments: Namespace) -> None:
    started = time.monotonic()
    from sim.cost import load_gpu
    from sim.files import whole_files
    from sim.measure import Shape, measure, plan_measurement
    from sim.measure.experts import DTYPES
    from sim.model import load_model
    from sim.traffic import load_workload

    if arguments.out is None or not arguments.out.endswith(".csv"):
        raise InputError("--out FILE.csv must say where the rows go")
    dtypes = list(dict.fromkeys(arguments.dtype))
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise unknown("--dtype", dtype, DTYPES)
    limit_s = float("inf") if arguments.time_limit is None else arguments.time_limit
    gpu = load_gpu(arguments.gpu or preset_of_device(arguments.device))
    note_compiling()
    model = load_model(arguments.model)
    steps = plan_measurement(
        model,
        [load_workload(name) for name in arguments.workload],
        ep_sizes=arguments.ep,
        tokens=arguments.tokens,
        placements=arguments.placement or _PLACEMENTS,
        steps=arguments.steps,
        seed=arguments.seed,
    )
    shape = Shape.of(model, steps.most_local_experts, steps.most_pairs)
    backend = _backend(arguments.device, shape, steps.seed)
    out = Path(arguments.out)
    left_s = limit_s - (time.monotonic() - started)
    reached = measure(steps, backend, gpu, dtypes, out, time_limit_s=left_s, say=_say)
    about = out.with_suffix(".json")
    with whole_files(about) as (temporary,):
        temporary.write_text(json.dumps(reached, indent=1) + "\n")
    print(f"written to {out} and {about}; tables and figures: epsim measure --show {out} --plot")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def preset_of_device(device: str) -> str:
    """GPU preset whose name is in the device's, the longest first; on a CPU, h200."""
    if device == "cpu":
        return "h200"
    from sim.cost import gpu_names
    from sim.measure.timers import cuda_torch

    name = str(cuda_torch().cuda.get_device_name(0))
    for preset in sorted(gpu_names(), key=len, reverse=True):
        if preset in name.lower():
            return preset
    raise InputError(f"--gpu must say which GPU predicts the times of {name} (epsim gpus lists them, or a .toml file)")


def _backend(device: str, shape: Any, seed: int) -> Any:
    if device == "cpu":
        from sim.measure import NumpyExperts

        note("times on a CPU test the path, and say nothing about a GPU")
        return NumpyExperts(shape, seed)
    from sim.measure.torch_experts import TorchExperts

    return TorchExperts(shape, "cuda", seed)


def _chosen_rows(arguments: Namespace) -> Any:
    """Rows of the file, with predictions, of the workloads, sizes and types that are asked for."""
    from sim.cost import load_gpu
    from sim.measure import read_measured, with_predictions

    rows = with_predictions(read_measured(arguments.show), None if arguments.gpu is None else load_gpu(arguments.gpu))
    for option, column in (("workload", "workload"), ("ep", "ep_size"), ("tokens", "tokens"), ("dtype", "dtype")):
        wanted = getattr(arguments, option)
        if wanted is None:
            continue
        for value in wanted:
            if value not in set(rows[column]):
                there = ", ".join(map(str, rows[column].unique()))
                raise InputError(f"--{option} {value}: {arguments.show} has {there}")
        rows = rows[rows[column].isin(wanted)]
    return rows


def _show(arguments: Namespace) -> None:
    from sim.measure import constants, errors, gains
    from sim.measure.compare import missed
    from sim.placement import ALIASES

    pair = arguments.placement or _PLACEMENTS
    baseline, other = (ALIASES.get(name, name) for name in pair) if len(pair) == 2 else ("", "")
    if baseline == other:
        raise InputError(f"--placement {','.join(pair)}: the gain of one placement over another takes two names")
    if arguments.table is not None and arguments.table not in _TABLES:
        raise unknown("--table", arguments.table, _TABLES)
    rows = _chosen_rows(arguments)
    tables: dict[str, Callable[[], Cells]] = {
        "error": lambda: _errors_table(errors(rows)),
        "constants": lambda: _constants_table(constants(rows)),
        "missed": lambda: _missed_table(missed(rows)),
        "gain": lambda: _gains_table(gains(rows, baseline, other), baseline, other),
    }
    if arguments.table is None:
        first = rows.iloc[0]
        print(
            f"{first.model} on {first.device}, predicted for {first.gpu}: {len(rows)} ranks in {rows.step.nunique()} steps"
        )
        for dtype, kernel in rows.groupby("dtype").kernel.first().items():
            print(f"  {dtype}: {kernel}")
    for name, compute in tables.items():
        if arguments.table not in (None, name):
            continue
        heads, cells = compute()
        title = _TABLES[name].format(other=other, baseline=baseline)
        if arguments.markdown and arguments.table is not None:
            print_table("", heads, cells, markdown=True)
        elif arguments.markdown:
            print(f"\n{title}\n")
            print_table("", heads, cells, markdown=True)
        else:
            print(f"\n{title}\n\n{table(heads, cells, '>' * len(heads))}")
    if arguments.plot:
        _plot(arguments.show, rows, baseline, other, arguments.formats)


def _plot(path: Path, rows: Any, baseline: str, other: str, formats: list[str]) -> None:
    from sim.figures import save_as
    from sim.figures.measured import measured_gain, predicted_against_measured
    from sim.measure import gains

    for name, figure in (
        ("predicted", predicted_against_measured(rows)),
        ("gain", measured_gain(rows, gains(rows, baseline, other), baseline, other)),
    ):
        for target in save_as(figure, path.with_name(f"{path.name.partition('.csv')[0]}-{name}"), formats):
            print(target)


def _errors_table(found: Any) -> Cells:
    heads = ["dtype", "bound", "ranks", "steps", "mean error (95 %)", "p10", "median", "p90", "within 20 %"]
    return heads, [
        [
            *(str(getattr(row, name)) for name in ("dtype", "bound", "ranks", "steps")),
            estimate(row.error_mean, row.error_mean_high, "+z.1%"),
            *(f"{value:+z.1%}" for value in (row.error_p10, row.error_p50, row.error_p90)),
            f"{row.within_20:.0%}",
        ]
        for row in found.itertuples()
    ]


def _constants_table(found: Any) -> Cells:
    return ["dtype", "constant", "model", "these rows (95 %)"], [
        [row.dtype, row.constant, f"{row.model:.3g}", _constant(row)] for row in found.itertuples()
    ]


def _constant(row: Any) -> str:
    """The fitted value with its interval; - where these rows do not depend on it."""
    if row.fitted != row.fitted:
        return "-"
    return f"{row.fitted:.3g}" + (f" ({row.low:.3g} to {row.high:.3g})" if row.low == row.low else "")


def _missed_table(found: Any) -> Cells:
    return ["dtype", "layers", "slower at random", "by at most"], [
        [row.dtype, str(row.layers), str(row.missed), f"{row.excess_max:.1%}"] for row in found.itertuples()
    ]


def _gains_table(found: Any, baseline: str, other: str) -> Cells:
    heads = ["dtype", "workload", "EP", "tokens", "steps", "measured (95 %)", "predicted", "difference (95 %)"]
    return [*heads, f"{baseline} us", f"{other} us"], [
        [
            *(str(getattr(row, name)) for name in ("dtype", "workload", "ep_size", "tokens", "steps")),
            estimate(row.measured, row.measured_high, "+z.1%"),
            f"{row.predicted:+z.1%}",
            estimate(row.difference, row.difference_high, "+z.1%"),
            f"{row.baseline_us:.1f}",
            f"{row.other_us:.1f}",
        ]
        for row in found.itertuples()
    ]
