"""Measure what the experts of the busiest rank cost on a GPU, or show what was measured (--show): the model's predictions
beside it, and what one placement gains over another.
"""

import json
import sys
import time
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import names, note, seconds, table, whole_number, whole_numbers
from sim.errors import InputError, unknown


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim measure`."""
    add = parser.add_argument
    add("--model", default="deepseek-v3", help="preset (epsim models) or path of a config.json (default: deepseek-v3)")
    add("--workload", default="chat,gpqa-tilted", metavar="LIST", help="traffic (default: chat,gpqa-tilted)")
    add("--ep", default="8,16,32,64", metavar="LIST", help="EP sizes (default: 8,16,32,64)")
    add(
        "--tokens",
        default="8..16384",
        metavar="LIST",
        help="tokens per step over the EP group (default: 8..16384, doubling)",
    )
    add("--placement", default="linear,round_robin", metavar="LIST", help="placements (default: linear,round_robin)")
    add("--dtype", default="bf16,fp8", metavar="LIST", help="types of the weights (default: bf16,fp8)")
    add("--steps", default="16", metavar="N", help="steps to sample, each of a fresh layer (default: 16)")
    add("--seed", default="0", metavar="N", help="same seed, same steps and ranks (default: 0)")
    add("--device", default="cuda", help="cuda (needs PyTorch: epsim[gpu]), or cpu for toy sizes (default: cuda)")
    add("--gpu", help="GPU that predictions are for (epsim gpus; default: by the device's name)")
    add("--time-limit", metavar="TIME", help="stop after this time, as in 90s or 8m; steps that were measured are kept")
    add("--out", metavar="FILE.csv", help="where the rows go; what the device reaches goes to FILE.json")
    add("--show", type=Path, metavar="FILE.csv", help="measure nothing; print the tables of a file that was written")
    add("--plot", action="store_true", help="with --show: draw the figures beside the file, PNG and SVG")
    add("--markdown", action="store_true", help="with --show: Markdown tables")


def run(arguments: Namespace) -> None:
    """Run `epsim measure`."""
    if arguments.show is None:
        for option in ("plot", "markdown"):
            if getattr(arguments, option):
                raise InputError(f"--{option} goes with --show FILE.csv")
        _measure(arguments)
    else:
        if arguments.out is not None:
            raise InputError("--out goes without --show: what was measured is only read")
        _show(
            arguments.show, names("--placement")(arguments.placement), arguments.gpu, arguments.plot, arguments.markdown
        )


def _measure(arguments: Namespace) -> None:
    started = time.monotonic()
    from sim.cost import load_gpu
    from sim.kernels import is_cold
    from sim.measure import Shape, measure, sample_steps
    from sim.measure.experts import DTYPES
    from sim.model import load_model
    from sim.results import whole_files
    from sim.workload import load_workload

    if arguments.out is None or not arguments.out.endswith(".csv"):
        raise InputError("--out FILE.csv must say where the rows go")
    if arguments.device not in ("cuda", "cpu"):
        raise unknown("--device", arguments.device, ["cuda", "cpu"])
    dtypes = list(dict.fromkeys(names("--dtype")(arguments.dtype)))
    for dtype in dtypes:
        if dtype not in DTYPES:
            raise unknown("--dtype", dtype, DTYPES)
    limit_s = float("inf") if arguments.time_limit is None else seconds("--time-limit")(arguments.time_limit)
    gpu = load_gpu(arguments.gpu or _preset_of_device(arguments.device))
    if is_cold():
        note("compiling the kernels, once for this version: about 30 seconds")
    model = load_model(arguments.model)
    steps = sample_steps(
        model,
        [load_workload(name) for name in names("--workload")(arguments.workload)],
        ep_sizes=whole_numbers("--ep")(arguments.ep),
        tokens=whole_numbers("--tokens")(arguments.tokens),
        placements=names("--placement")(arguments.placement),
        steps=whole_number("--steps")(arguments.steps),
        seed=whole_number("--seed")(arguments.seed),
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


def _preset_of_device(device: str) -> str:
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


def _show(path: Path, pair: list[str], gpu: str | None, plot: bool, markdown: bool) -> None:
    from sim.cost import load_gpu
    from sim.measure import constants, errors, gains, read_measured, with_predictions
    from sim.measure.compare import missed
    from sim.placement import ALIASES

    if len(pair) != 2:
        raise InputError(f"--placement {','.join(pair)}: the gain of one placement over another takes two names")
    rows = with_predictions(read_measured(path), None if gpu is None else load_gpu(gpu))
    baseline, other = (ALIASES.get(name, name) for name in pair)
    first = rows.iloc[0]
    print(
        f"{first.model} on {first.device}, predicted for {first.gpu}: {len(rows)} ranks in {rows.step.nunique()} steps"
    )
    for dtype, kernel in rows.groupby("dtype").kernel.first().items():
        print(f"  {dtype}: {kernel}")
    tables = [
        ("Error of the prediction as it stands, predicted / measured - 1", _errors_table(errors(rows))),
        (
            "Constants that these rows alone would give (a check; the model keeps its own)",
            _constants_table(constants(rows)),
        ),
        ("Layers whose rank picked at random was slower than those picked as busiest", _missed_table(missed(rows))),
        (
            f"Gain of {other} over {baseline} in the layer's time, its slowest rank",
            _gains_table(gains(rows, baseline, other), baseline, other),
        ),
    ]
    for title, (heads, cells) in tables:
        print(f"\n{title}\n")
        if markdown:
            print("| " + " | ".join(heads) + " |\n|" + "---:|" * len(heads))
            print("\n".join("| " + " | ".join(row) + " |" for row in cells))
        else:
            print(table(heads, cells, ">" * len(heads)))
    if plot:
        _plot(path, rows, baseline, other)


def _plot(path: Path, rows: Any, baseline: str, other: str) -> None:
    from sim.figures import save
    from sim.figures.measured import measured_gain, predicted_against_measured

    for name, figure in (
        ("predicted", predicted_against_measured(rows)),
        ("gain", measured_gain(rows, baseline, other)),
    ):
        for suffix in ("png", "svg"):
            target = path.with_name(f"{path.stem}-{name}.{suffix}")
            save(figure, target)
            print(target)


Cells = tuple[list[str], list[list[str]]]


def _errors_table(found: Any) -> Cells:
    heads = ["dtype", "bound", "ranks", "steps", "mean error (95 %)", "p10", "median", "p90", "within 20 %"]
    return heads, [
        [
            *(str(getattr(row, name)) for name in ("dtype", "bound", "ranks", "steps")),
            _percent(row.error_mean, row.error_mean_high),
            *(f"{value:+.1%}" for value in (row.error_p10, row.error_p50, row.error_p90)),
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
            _percent(row.measured, row.measured_high),
            f"{row.predicted:+.1%}",
            _percent(row.difference, row.difference_high),
            f"{row.baseline_us:.1f}",
            f"{row.other_us:.1f}",
        ]
        for row in found.itertuples()
    ]


def _percent(value: float, high: float) -> str:
    return f"{value:+.1%}" if high != high else f"{value:+.1%} ± {high - value:.1%}"
