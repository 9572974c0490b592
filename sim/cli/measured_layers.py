"""Whole layers in `epsim measure`: --layer measures them, --show prints and draws what was measured."""

import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import estimate, names, note, print_table, seconds, table, whole_number, whole_numbers
from sim.errors import InputError, unknown

_TABLES = {
    "sum": "A layer against its slowest rank's experts and the exchange, layer / (experts + exchange) - 1",
    "gain": "Gain over {baseline} in the time of a layer",
}


def measure_all(arguments: Namespace) -> None:
    """Measure whole layers: `epsim measure --layer`."""
    started = time.monotonic()
    from sim.kernels import is_cold
    from sim.measure.layer import gpus_for, measure_layers
    from sim.measure.layer_plan import EXCHANGES, sample_layers
    from sim.model import load_model
    from sim.traffic import load_workload

    if arguments.out is None or not arguments.out.endswith(".csv"):
        raise InputError("--out FILE.csv must say where the rows go")
    if arguments.device not in ("cuda", "cpu"):
        raise unknown("--device", arguments.device, ["cuda", "cpu"])
    if arguments.dtype not in (None, "bf16"):
        raise InputError(f"--dtype {arguments.dtype}: a layer is measured in bf16")
    limit_s = float("inf") if arguments.time_limit is None else seconds("--time-limit")(arguments.time_limit)
    sizes = whole_numbers("--ep")(arguments.ep) if arguments.ep else [None]
    if len(sizes) > 1:
        raise InputError(f"--ep {arguments.ep}: a layer is measured at one EP size, a GPU for each rank")
    ep_size = gpus_for(sizes[0], arguments.device)
    if is_cold():
        note("compiling the kernels, once for this version: about 30 seconds")
    steps = sample_layers(
        load_model(arguments.model),
        [load_workload(name) for name in names("--workload")(arguments.workload or "chat,gpqa-tilted")],
        ep_size=ep_size,
        tokens=whole_numbers("--tokens")(arguments.tokens or "8,64,512,2048,8192,16384"),
        placements=names("--placement")(arguments.placement or "linear,round_robin"),
        exchanges=names("--exchange")(arguments.exchange or ",".join(EXCHANGES)),
        steps=whole_number("--steps")(arguments.steps),
        seed=whole_number("--seed")(arguments.seed),
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
    from sim.measure.layer_compare import layer_gains, read_layers, sums
    from sim.placement import ALIASES

    if arguments.table is not None and arguments.table not in _TABLES:
        raise unknown("--table", arguments.table, _TABLES)
    if arguments.placement is None:
        baseline, others = "linear", []
    else:
        baseline, *others = (ALIASES.get(name, name) for name in names("--placement")(arguments.placement))
    layers = read_layers(arguments.show)
    for option, column, of in (
        ("exchange", "exchange", names),
        ("workload", "workload", names),
        ("tokens", "tokens", whole_numbers),
    ):
        text = getattr(arguments, option)
        if text is not None:
            wanted: list[Any] = of(f"--{option}")(text)
            for value in wanted:
                if value not in set(layers[column]):
                    there = ", ".join(map(str, layers[column].unique()))
                    raise InputError(f"--{option} {value}: {arguments.show} has {there}")
            layers = layers[layers[column].isin(wanted)]
    if arguments.table is None:
        first = layers.iloc[0]
        print(
            f"{first.model}, EP {first.ep_size} on {first.gpu}: {len(layers)} layers in {layers.step.nunique()} steps"
        )
    for name, title in _TABLES.items():
        if arguments.table in (None, name):
            heads, cells = _sums(sums(layers)) if name == "sum" else _gains(layer_gains(layers, baseline, others))
            if arguments.markdown:
                if arguments.table is None:
                    print(f"\n{title.format(baseline=baseline)}\n")
                print_table("", heads, cells, markdown=True)
            else:
                print(f"\n{title.format(baseline=baseline)}\n\n{table(heads, cells, '>' * len(heads))}")
    if arguments.plot:
        _plot(arguments.show, layers, baseline, others)


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


def _plot(path: Path, layers: Any, baseline: str, others: list[str]) -> None:
    from sim.figures import save
    from sim.figures.layers import measured_exchange, measured_layer_gain

    for name, figure in (
        ("gain", measured_layer_gain(layers, baseline, others)),
        ("exchange", measured_exchange(layers)),
    ):
        for suffix in ("png", "svg"):
            target = path.with_name(f"{path.name.partition('.csv')[0]}-{name}.{suffix}")
            save(figure, target)
            print(target)
