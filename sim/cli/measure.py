"""`epsim measure`: one rank's experts, or whole layers, timed on GPUs; and what was measured, beside the model's predictions."""

import json
import re
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from sim.cli.inputs import check_there, rows_of
from sim.cli.terminal import add_output, note, note_compiling, print_rows, print_table, say_notes
from sim.errors import InputError, unknown
from sim.files import model_label
from sim.options import TABLES_OF_LAYERS, TABLES_OF_RANKS, MeasuredOptions, MeasureOptions, TrafficOptions
from sim.options.declare import add_options

_PLACEMENTS, _WORKLOADS = ["linear", "round_robin"], ["chat", "gpqa-tilted"]
_EP_SIZES, _TOKENS, _DTYPES = [8, 16, 32, 64], [2**i for i in range(3, 15)], ["bf16", "fp8"]
_LAYER_TOKENS = [8, 64, 512, 2048, 8192, 16384]


class _Table(NamedTuple):
    """A table of what was measured."""

    title: str
    compute: Callable[[], Any]
    columns: dict[str, Any]
    keys: int


def add_measure(parser: ArgumentParser) -> None:
    """Measure on a GPU what the experts of the busiest rank cost, or whole layers (--layer), one rank on each GPU.

    Or show what was measured (--show): the model's predictions beside it, and what one placement gains over another.
    """
    add_options(parser, TrafficOptions, only=("model",))
    add_options(parser, MeasureOptions)
    add_options(parser, MeasuredOptions)
    add_output(parser, figures=True)


def run_measure(arguments: Namespace) -> None:
    if arguments.show is not None:
        for option in ("out", "layer"):
            if getattr(arguments, option):
                raise InputError(f"--{option} goes without --show: what was measured is only read")
        arguments.show = Path(arguments.show)
        _show(arguments)
        return
    for option in ("plot", "markdown", "json", "csv", "table"):
        if getattr(arguments, option):
            raise InputError(f"--{option} goes with --show FILE.csv")
    if arguments.exchange is not None and not arguments.layer:
        raise InputError("--exchange goes with --layer")
    if arguments.out is None or not arguments.out.endswith(".csv"):
        raise InputError("--out FILE.csv must say where the rows go")
    (_measure_layers if arguments.layer else _measure_ranks)(arguments, Path(arguments.out), time.monotonic())


def _measure_ranks(arguments: Namespace, out: Path, started: float) -> None:
    from sim.cost import load_gpu
    from sim.files import whole_files
    from sim.measure.experts import DTYPES, Shape
    from sim.measure.run import measure
    from sim.measure.steps import plan_measurement
    from sim.model import load_model

    dtypes = list(dict.fromkeys(arguments.dtype or _DTYPES))
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise unknown("--dtype", dtype, DTYPES)
    gpu = load_gpu(arguments.gpu or preset_of_device(arguments.device))
    note_compiling()
    model = load_model(arguments.model)
    steps = plan_measurement(
        model,
        _workloads(arguments),
        ep_sizes=arguments.ep_sizes or _EP_SIZES,
        tokens=arguments.tokens or _TOKENS,
        placements=arguments.placement or _PLACEMENTS,
        steps=arguments.steps,
        seed=arguments.seed,
    )
    backend = _backend(arguments.device, Shape.of(model, steps.most_local_experts, steps.most_pairs), steps.seed)
    say_notes()
    reached = measure(steps, backend, gpu, dtypes, out, time_limit_s=_left_s(arguments, started), say=_say)
    about = out.with_suffix(".json")
    with whole_files(about) as (temporary,):
        temporary.write_text(json.dumps(reached, indent=1) + "\n")
    print(f"written to {out} and {about}; tables and figures: epsim measure --show {out} --plot")


def _measure_layers(arguments: Namespace, out: Path, started: float) -> None:
    from sim.measure.layer import gpus_for, measure_layers
    from sim.measure.layer_plan import EXCHANGES, sample_layers
    from sim.model import load_model

    dtypes, sizes = arguments.dtype or ["bf16"], arguments.ep_sizes or [None]
    if len(dtypes) > 1:
        raise InputError(f"--dtype {','.join(dtypes)}: a layer is measured in one type")
    if len(sizes) > 1:
        raise InputError(f"--ep {','.join(map(str, sizes))}: a layer is measured at one EP size, a GPU for each rank")
    ep_size = gpus_for(sizes[0], arguments.device)
    note_compiling()
    steps = sample_layers(
        load_model(arguments.model),
        _workloads(arguments),
        ep_size=ep_size,
        tokens=arguments.tokens or _LAYER_TOKENS,
        placements=arguments.placement or _PLACEMENTS,
        exchanges=arguments.exchange or list(EXCHANGES),
        steps=arguments.steps,
        seed=arguments.seed,
        dtype=dtypes[0],
    )
    if arguments.device == "cpu":
        note("times on a CPU test the path, and say nothing about a GPU")
    say_notes()
    measure_layers(steps, arguments.device, out, time_limit_s=_left_s(arguments, started), say=_say)
    print(f"written to {out}; tables and figures: epsim measure --show {out} --plot")


def _workloads(arguments: Namespace) -> list[Any]:
    from sim.traffic import load_workload

    return [load_workload(name) for name in arguments.workload or _WORKLOADS]


def _left_s(arguments: Namespace, started: float) -> float:
    limit_s = float("inf") if arguments.time_limit is None else arguments.time_limit
    return limit_s - (time.monotonic() - started)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def preset_of_device(device: str) -> str:
    """GPU preset that the device's name has as a word; on a CPU, h200."""
    if device == "cpu":
        return "h200"
    from sim.measure.timers import cuda_torch

    return _preset_in(str(cuda_torch().cuda.get_device_name(0)))


def _preset_in(name: str) -> str:
    from sim.cost import gpu_names

    words = re.split(r"[\s-]+", name.lower())
    for preset in gpu_names():
        if preset in words:
            return preset
    raise InputError(f"--gpu must say which GPU predicts the times of {name} (epsim gpus lists them, or a .toml file)")


def _backend(device: str, shape: Any, seed: int) -> Any:
    if device == "cpu":
        from sim.measure.experts import NumpyExperts

        note("times on a CPU test the path, and say nothing about a GPU")
        return NumpyExperts(shape, seed)
    from sim.measure.torch_experts import TorchExperts

    return TorchExperts(shape, "cuda", seed)


def _show(arguments: Namespace) -> None:
    """Print the tables of a file, and draw its figures."""
    from sim.measure.layer_compare import is_of_layers

    if arguments.show.suffix == ".json":
        raise InputError(
            f"--show {arguments.show}: is what the device reaches; the times lie beside it, in a .csv or .csv.gz"
        )
    of_layers = is_of_layers(arguments.show)
    known = TABLES_OF_LAYERS if of_layers else TABLES_OF_RANKS
    if arguments.table is not None and arguments.table not in known:
        raise unknown("--table", arguments.table, known)
    if arguments.table is None and (arguments.json or arguments.csv):
        raise InputError(f"--json and --csv print the rows of one table: give --table, of {', '.join(known)}")
    about, tables, figures = (_layers if of_layers else _ranks)(arguments)
    if arguments.table is None:
        print(about)
    for name, one in tables.items():
        if arguments.table not in (None, name):
            continue
        rows = one.compute()
        if print_rows(rows, arguments):
            continue
        if arguments.table is None:
            print(f"\n{one.title}\n" if arguments.markdown else "")
        print_table(one.title, rows.itertuples(), one.columns, arguments.markdown, keys=one.keys)
        if name == "predicted" and not arguments.markdown:
            _say_errors(rows)
    if arguments.plot:
        from sim.figures import save_as

        for name, figure in figures().items():
            stem = arguments.show.with_name(f"{arguments.show.name.partition('.csv')[0]}-{name}")
            for path in save_as(figure, stem, arguments.formats):
                print(path, file=sys.stderr if arguments.json or arguments.csv else sys.stdout)


def _chosen(rows: Any, arguments: Namespace) -> Any:
    """Rows of the workloads, sizes, types and exchanges that are asked for."""
    wanted = {name: getattr(arguments, name) for name in ("workload", "tokens", "dtype", "exchange") if name in rows}
    wanted["ep_size"] = arguments.ep_sizes
    check_there(rows, wanted, str(arguments.show))
    return rows_of(rows, wanted)


def _ranks(arguments: Namespace) -> tuple[str, dict[str, _Table], Callable[[], dict[str, Any]]]:
    """What a file of ranks holds, its tables, and its figures."""
    from sim.cost import load_gpu
    from sim.measure.compare import constants, errors, gains, missed, with_predictions
    from sim.measure.table import read_measured
    from sim.placement import ALIASES

    pair = arguments.placement or _PLACEMENTS
    baseline, other = (ALIASES.get(name, name) for name in pair) if len(pair) == 2 else ("", "")
    if baseline == other:
        raise InputError(f"--placement {','.join(pair)}: the gain of one placement over another takes two names")
    gpu = None if arguments.gpu is None else load_gpu(arguments.gpu)
    rows = _chosen(with_predictions(read_measured(arguments.show), gpu), arguments)
    first = rows.iloc[0]
    about = f"{model_label(first.model)} on {first.device}, predicted for {first.gpu}: "
    about += f"{len(rows)} ranks in {rows.step.nunique()} steps"
    about += "".join(f"\n  {dtype}: {kernel}" for dtype, kernel in rows.groupby("dtype").kernel.first().items())
    tables = {
        "error": _Table("Error of the prediction as it stands, predicted / measured - 1", lambda: errors(rows), {
            "dtype": "dtype", "bound": "bound", "ranks": "ranks", "steps": "steps", "mean error (95 %)": "error_mean±+z.1%",
            "p10": "error_p10:+z.1%", "median": "error_p50:+z.1%", "p90": "error_p90:+z.1%", "within 20 %": "within_20:.0%",
        }, 2),
        "constants": _Table(
            "Constants that these rows alone would give (a check; the model keeps its own)", lambda: constants(rows),
            {"dtype": "dtype", "constant": "constant", "model": "model:.3g", "these rows (95 %)": _constant}, 2,
        ),
        "missed": _Table(
            "Layers whose rank picked at random was slower than those picked as busiest", lambda: missed(rows),
            {"dtype": "dtype", "layers": "layers", "slower at random": "missed", "by at most": "excess_max:.1%"}, 1,
        ),
        "gain": _Table(
            f"Gain of {other} over {baseline} in the layer's time, its slowest rank", lambda: gains(rows, baseline, other), {
                "dtype": "dtype", "workload": "workload", "EP": "ep_size", "tokens": "tokens", "steps": "steps",
                "measured (95 %)": "measured±+z.1%", "predicted": "predicted:+z.1%", "difference (95 %)": "difference±+z.1%",
                f"{baseline} us": "baseline_us:.1f", f"{other} us": "other_us:.1f",
            }, 4,
        ),
    }  # fmt: skip

    def figures() -> dict[str, Any]:
        from sim.figures.measured import measured_gain, predicted_against_measured

        gained = measured_gain(rows, gains(rows, baseline, other), baseline, other)
        return {"predicted": predicted_against_measured(rows), "gain": gained}

    return about, tables, figures


def _constant(row: Any) -> str:
    """The fitted value with its interval; - where these rows do not depend on it."""
    if row.fitted != row.fitted:
        return "-"
    return f"{row.fitted:.3g}" + (f" ({row.low:.3g} to {row.high:.3g})" if row.low == row.low else "")


def _layers(arguments: Namespace) -> tuple[str, dict[str, _Table], Callable[[], dict[str, Any]]]:
    """What a file of whole layers holds, its tables, and its figures."""
    from sim.measure.layer_compare import layer_gains, predicted_gains, read_layers, sums
    from sim.placement import ALIASES

    baseline, *others = (ALIASES.get(name, name) for name in arguments.placement or ["linear"])
    layers = read_layers(arguments.show)
    gpu = _gpu_of(arguments, layers)
    layers = _chosen(layers if gpu is None else read_layers(arguments.show, gpu), arguments)
    first = layers.iloc[0]
    about = (
        f"{model_label(first.model)} in {first['dtype']}, EP {first.ep_size} on {first.gpu}: {len(layers)} layers in "
        f"{layers.step.nunique()} steps"
    )
    cell = {"exchange": "exchange", "workload": "workload", "tokens": "tokens"}
    of_placement = cell | {"placement": "placement", "steps": "steps", "gain (95 %)": "gain±+z.1%"}
    tables = {
        "sum": _Table(
            "A layer against its slowest rank's experts and the exchange, layer / (experts + exchange) - 1",
            lambda: sums(layers), cell | {
                "steps": "steps", "layer us": "layer_us:.0f", "experts us": "experts_us:.0f", "exchange us": "exchange_us:.0f",
                "off by (95 %)": "excess±+z.1%",
            }, 3,
        ),
        "gain": _Table(
            f"Gain over {baseline} in the time of a layer", lambda: layer_gains(layers, baseline, others), of_placement | {
                "experts alone": "experts_gain:+z.1%", "exchange alone": "exchange_gain:+z.1%",
                f"{baseline} us": "baseline_us:.0f", "new us": "other_us:.0f",
            }, 4,
        ),
    }  # fmt: skip
    if gpu is not None:
        tables["predicted"] = _Table(
            f"Gain over {baseline} as measured and as predicted for {gpu.name}, and the predicted time of {baseline}'s layers",
            lambda: predicted_gains(layers, baseline, others), of_placement | {
                "predicted": "predicted:+z.1%", "difference": "difference:+z.1%",
                f"{baseline} measured us": "baseline_us:.0f", f"{baseline} predicted us": "predicted_us:.0f",
            }, 4,
        )  # fmt: skip

    def figures() -> dict[str, Any]:
        from sim.figures.measured import measured_exchange, measured_layer_gain

        gained = measured_layer_gain(layers, layer_gains(layers, baseline, others), baseline)
        return {"gain": gained, "exchange": measured_exchange(layers)}

    return about, tables, figures


def _gpu_of(arguments: Namespace, layers: Any) -> Any:
    """The GPU that predicts the layers: the one named, or the measured one; None where that one or the model is no preset. Raises
    InputError where it is asked for, and is not there.
    """
    from sim.cost import load_gpu
    from sim.model import model_names

    device, model = str(layers.gpu.iloc[0]), str(layers.model.iloc[0])
    asked = arguments.gpu is not None or arguments.table == "predicted"
    if model not in model_names():
        if asked:
            raise InputError(f"--gpu: times are predicted for presets of models (epsim models), and {model} is none")
        return None
    try:
        return load_gpu(arguments.gpu or _preset_in(device))
    except InputError:
        if asked:
            raise
        return None


def _say_errors(found: Any) -> None:
    print("\nOff, absolute, by exchange: gains in points, layers in % (median, worst)")
    for exchange, rows in found.groupby("exchange", sort=False):
        gain, layer = 100 * rows.difference.abs(), 100 * rows.error.abs()
        why = "; DeepEP's kernels are predicted, NCCL's were measured" if exchange == "pair" else ""
        print(
            f"  {exchange}: {gain.median():.1f} and {gain.max():.1f} points, {layer.median():.0f} and {layer.max():.0f} %{why}"
        )
