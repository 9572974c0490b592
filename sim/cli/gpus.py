"""List the GPUs with their bandwidths, peaks and links, and where the numbers come from; check times against published ones."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import print_table, table
from sim.cost import gpu_names, load_gpu
from sim.cost.exchange import BACKENDS, KINDS
from sim.cost.gpu import DTYPES
from sim.cost.tables import grouped_gemm_profile, measured
from sim.errors import InputError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim gpus`."""
    parser.add_argument(
        "--check",
        action="store_true",
        help="how far predicted expert and exchange times are from published ones instead",
    )
    parser.add_argument("--markdown", action="store_true", help="with --check: a Markdown table")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="with --check: draw them too, PNG or SVG")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def run(arguments: Namespace) -> None:
    """Run `epsim gpus`."""
    if arguments.check:
        _check(arguments)
        return
    if arguments.markdown or arguments.plot is not None:
        raise InputError("--markdown and --plot go with --check")
    gpus = [load_gpu(name) for name in gpu_names()]
    rows = [
        [
            gpu.name,
            _number(gpu.hbm_tb_per_s),
            _number(gpu.bf16_tflops),
            _number(gpu.fp8_tflops),
            _number(gpu.fp4_tflops),
            _number(gpu.scale_up_gb_per_s),
            _number(gpu.scale_out_gb_per_s),
            ", ".join(gpu.unverified) or "-",
        ]
        for gpu in gpus
    ]
    heads = [
        "gpu",
        "HBM TB/s",
        "BF16 TFLOPS",
        "FP8 TFLOPS",
        "FP4 TFLOPS",
        "NVLink GB/s",
        "network GB/s",
        "not verified",
    ]
    print(table(heads, rows, align="<>>>>>><"))
    print("\nPeaks are dense; links are per GPU and direction. Sources:")
    for gpu in gpus:
        print(f"  {gpu.name}: {gpu.source}")
    kernels = "; ".join(f"{dtype}, {grouped_gemm_profile(dtype).name}" for dtype in DTYPES)
    print(f"Expert times: {kernels}.\nExchanges (--exchange), by kind or backend:")
    for kind, about in KINDS.items():
        backends = ", ".join(backend for backend, of in BACKENDS.items() if of == kind)
        print(f"  {kind}: {about}" + (f" ({backends})" if backends else ""))
    print("Your own GPU: a .toml file with hbm_tb_per_s, bf16_tflops, scale_up_gb_per_s, and fp8_tflops, fp4_tflops,")
    print("scale_out_gb_per_s where it has them.")


def _check(arguments: Namespace) -> None:
    from sim.cost import predicted_against_measured

    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {arguments.plot}: must end in .png or .svg")
    check = predicted_against_measured()
    cells = []
    for (part, gpu, dtype, source), rows in check.groupby(["part", "gpu", "dtype", "source"], sort=False):
        seen, held_out = rows.error[rows.fitted].abs(), rows.held_out_error.dropna().abs()
        cells.append([part, gpu, dtype, source, str(len(rows)), *_errors(seen), *_errors(held_out)])
    heads = ["part", "gpu", "type", "published table", "rows", "fitted: median", "worst", "held out: median", "worst"]
    title = (
        "Predicted against published times of DeepSeek-V3, absolute errors.\n"
        "Fitted: by the constants that epsim uses. Held out: by a fit without the row's\n"
        "EP size (experts) or tokens per rank (exchange); moe_decode: no fit saw it"
    )
    print_table(title, heads, cells, arguments.markdown, align="<<<<>>>>>", keys=4)
    if not arguments.markdown:
        print("\nHeld out by more than 25 %, so take such cells as extrapolated:")
        for row in check[check.held_out_error.abs() > 0.25].itertuples():
            print(
                f"  {row.part} {row.gpu} {row.dtype}: EP {row.ep_size}, {row.tokens} tokens, {row.held_out_error:+.0%}"
            )
        print("\nPublished tables:")
        for source in check.source.unique():
            print(f"  {source}: {measured()[source]['source']}")
        print(
            "Not in them, so not verified: h20. In bf16, and token, gather and reduce: epsim measure --show, results/measured"
        )
    if arguments.plot is not None:
        from sim.figures import save
        from sim.figures.measured import published_kernels

        save(published_kernels(check[check.source == "moe_decode"]), arguments.plot)
        print(arguments.plot)


def _errors(values: Any) -> list[str]:
    return [f"{values.median():.1%}", f"{values.max():.1%}"] if len(values) else ["-", "-"]
