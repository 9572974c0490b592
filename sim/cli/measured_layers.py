"""Whole layers in `epsim measure`: --layer measures them, --show prints and draws what was measured."""

import sys
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sim.cli.text import estimate, note, note_compiling, print_table, table
from sim.errors import InputError, unknown

_TABLES = {
    "sum": "A layer against its slowest rank's experts and the exchange, layer / (experts + exchange) - 1",
    "gain": "Gain over {baseline} in the time of a layer",
    "predicted": "Gain over {baseline} as measured and as predicted for {gpu}, and the predicted time of {baseline}'s layers",
}


def measure_all(arguments: Namespace) -> None:
    """Measure whole layers: `epsim measure --layer`."""
    started = time.monotonic()
    from sim.measure.layer import gpus_for, measure_layers
    from sim.measure.layer_plan import EXCHANGES, sample_layers
    from sim.model import load_model
    from sim.traffic import load_workload

    if arguments.out is None or not arguments.out.endswith(".csv"):
        raise InputError("--out FILE.csv must say where the rows go")
    dtypes = arguments.dtype or ["bf16"]
    if len(dtypes) > 1:
        raise InputError(f"--dtype {','.join(dtypes)}: a layer is measured in one type")
    limit_s = float("inf") if arguments.time_limit is None else arguments.time_limit
    sizes = arguments.ep or [None]
    if len(sizes) > 1:
        raise InputError(f"--ep {','.join(map(str, sizes))}: a layer is measured at one EP size, a GPU for each rank")
    ep_size = gpus_for(sizes[0], arguments.device)
    note_compiling()
    steps = sample_layers(
        load_model(arguments.model),
        [load_workload(name) for name in arguments.workload or ["chat", "gpqa-tilted"]],
        ep_size=ep_size,
        tokens=arguments.tokens or [8, 64, 512, 2048, 8192, 16384],
        placements=arguments.placement or ["linear", "round_robin"],
        exchanges=arguments.exchange or list(EXCHANGES),
        steps=arguments.steps,
        seed=arguments.seed,
        dtype=dtypes[0],
    )
    if arguments.device == "cpu":
        note("times on a CPU test the path, and say nothing about a GPU")
    left_s = limit_s - (time.monotonic() - started)
    measure_layers(
        steps,
        arguments.device,
        Path(arguments.out),
        time_limit_s=left_s,
        say=lambda line: print(line, file=sys.stderr, flush=True),
    )
    print(f"written to {arguments.out}; tables and figures: epsim measure --show {arguments.out} --plot")


def show(arguments: Namespace) -> None:
    """Print the tables of measured layers, and draw their figures."""
    from sim.measure.layer_compare import layer_gains, predicted_gains, read_layers, sums
    from sim.placement import ALIASES

    if arguments.table is not None and arguments.table not in _TABLES:
        raise unknown("--table", arguments.table, _TABLES)
    if arguments.placement is None:
        baseline, others = "linear", []
    else:
        baseline, *others = (ALIASES.get(name, name) for name in arguments.placement)
    layers = read_layers(arguments.show)
    gpu = _gpu_of(arguments, layers)
    if gpu is not None:
        layers = read_layers(arguments.show, gpu)
    for option in ("exchange", "workload", "tokens"):
        wanted = getattr(arguments, option)
        if wanted is not None:
            for value in wanted:
                if value not in set(layers[option]):
                    there = ", ".join(map(str, layers[option].unique()))
                    raise InputError(f"--{option} {value}: {arguments.show} has {there}")
            layers = layers[layers[option].isin(wanted)]
    if arguments.table is None:
        first = layers.iloc[0]
        print(
            f"{first.model} in {first['dtype']}, EP {first.ep_size} on {first.gpu}: {len(layers)} layers in "
            f"{layers.step.nunique()} steps"
        )
    tables: dict[str, Callable[[], Any]] = {
        "sum": lambda: _sums(sums(layers)),
        "gain": lambda: _gains(layer_gains(layers, baseline, others)),
    }
    if gpu is not None:
        tables["predicted"] = lambda: _predicted(predicted_gains(layers, baseline, others))
    for name, compute in tables.items():
        if arguments.table in (None, name):
            heads, cells = compute()
            title = _TABLES[name].format(baseline=baseline, gpu=gpu.name if gpu else "")
            if arguments.markdown:
                if arguments.table is None:
                    print(f"\n{title}\n")
                print_table("", heads, cells, markdown=True)
            else:
                print(f"\n{title}\n\n{table(heads, cells, '>' * len(heads))}")
    if gpu is not None and arguments.table in (None, "predicted") and not arguments.markdown:
        _say_errors(predicted_gains(layers, baseline, others))
    if arguments.plot:
        _plot(arguments.show, layers, baseline, others, arguments.formats)


def _gpu_of(arguments: Namespace, layers: Any) -> Any:
    """The GPU that predicts the layers: the one named, or the measured one; None where that one or the model is no preset.

    Raises
    ------
    InputError
        It is asked for by name, and is not there.
    """
    from sim.cost import gpu_names, load_gpu
    from sim.model import model_names

    device, model = str(layers.gpu.iloc[0]), str(layers.model.iloc[0])
    asked = arguments.gpu is not None or arguments.table == "predicted"
    if model not in model_names():
        if asked:
            raise InputError(f"--gpu: times are predicted for presets of models (epsim models), and {model} is none")
        return None
    names = [arguments.gpu] if arguments.gpu else [name for name in gpu_names() if name in device.lower().split()]
    if not names and asked:
        raise InputError(
            f"--gpu must say which GPU predicts the times of {device} (epsim gpus lists them, or a .toml file)"
        )
    return load_gpu(names[0]) if names else None


def _predicted(found: Any) -> tuple[list[str], list[list[str]]]:
    heads = [
        "exchange",
        "workload",
        "tokens",
        "placement",
        "steps",
        "gain (95 %)",
        "predicted",
        "difference",
        "from us",
    ]
    return [*heads, "predicted us"], [
        [
            *(str(getattr(row, name)) for name in ("exchange", "workload", "tokens", "placement", "steps")),
            estimate(row.gain, row.gain_high, "+z.1%"),
            *(f"{value:+z.1%}" for value in (row.predicted, row.difference)),
            *(f"{value:.0f}" for value in (row.baseline_us, row.predicted_us)),
        ]
        for row in found.itertuples()
    ]


def _say_errors(found: Any) -> None:
    print("\nOff, absolute, by exchange: gains in points, layers in % (median, worst)")
    for exchange, rows in found.groupby("exchange", sort=False):
        gain, layer = 100 * rows.difference.abs(), 100 * rows.error.abs()
        note = "; DeepEP's kernels are predicted, NCCL's were measured" if exchange == "pair" else ""
        print(
            f"  {exchange}: {gain.median():.1f} and {gain.max():.1f} points, {layer.median():.0f} and {layer.max():.0f} %{note}"
        )


def _sums(found: Any) -> tuple[list[str], list[list[str]]]:
    heads = ["exchange", "workload", "tokens", "steps", "layer us", "experts us", "exchange us", "off by (95 %)"]
    return heads, [
        [
            *(str(getattr(row, name)) for name in ("exchange", "workload", "tokens", "steps")),
            *(f"{value:.0f}" for value in (row.layer_us, row.experts_us, row.exchange_us)),
            estimate(row.excess, row.excess_high, "+z.1%"),
        ]
        for row in found.itertuples()
    ]


def _gains(found: Any) -> tuple[list[str], list[list[str]]]:
    heads = ["exchange", "workload", "tokens", "placement", "steps", "gain (95 %)", "experts alone", "exchange alone"]
    return [*heads, "from us", "to us"], [
        [
            *(str(getattr(row, name)) for name in ("exchange", "workload", "tokens", "placement", "steps")),
            estimate(row.gain, row.gain_high, "+z.1%"),
            *(f"{value:+z.1%}" for value in (row.experts_gain, row.exchange_gain)),
            *(f"{value:.0f}" for value in (row.baseline_us, row.other_us)),
        ]
        for row in found.itertuples()
    ]


def _plot(path: Path, layers: Any, baseline: str, others: list[str], formats: list[str]) -> None:
    from sim.figures import save_as
    from sim.figures.measured import measured_exchange, measured_layer_gain
    from sim.measure.layer_compare import layer_gains

    for name, figure in (
        ("gain", measured_layer_gain(layers, layer_gains(layers, baseline, others), baseline)),
        ("exchange", measured_exchange(layers)),
    ):
        for target in save_as(figure, path.with_name(f"{path.name.partition('.csv')[0]}-{name}"), formats):
            print(target)
