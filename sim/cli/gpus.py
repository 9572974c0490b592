"""List the GPUs with their bandwidths, peaks and links, and where the numbers come from; check times against published ones."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from sim.cli.text import print_table, table
from sim.cost import gpu_names, load_gpu
from sim.cost.tables import exchange_profile, grouped_gemm_profile, measured
from sim.errors import InputError


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim gpus`."""
    parser.add_argument(
        "--check", action="store_true", help="print predicted expert times beside published kernel times instead"
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
    print(f"Times are those of two kernels: {grouped_gemm_profile().name}; {exchange_profile().name}.")
    print("Your own GPU: a .toml file with hbm_tb_per_s, bf16_tflops, scale_up_gb_per_s, and fp8_tflops, fp4_tflops,")
    print("scale_out_gb_per_s where it has them.")


def _check(arguments: Namespace) -> None:
    from sim.cost import predicted_against_measured

    if arguments.plot is not None and arguments.plot.suffix not in (".png", ".svg"):
        raise InputError(f"--plot {arguments.plot}: must end in .png or .svg")
    check = predicted_against_measured()
    cells = [
        [
            str(row.ep_size),
            str(row.tokens),
            f"{row.measured_us:.1f}",
            f"{row.predicted_us:.1f}",
            f"{row.error:+z.1%}",
            "fitted" if row.fitted else "predicted",
        ]
        for row in check.itertuples()
    ]
    about = measured()["moe_decode"]
    heads = ["EP", "tokens", "measured us", "model us", "error", "constants saw it"]
    print_table(f"{about['source']}; {about['about']}", heads, cells, arguments.markdown)
    held_out = check[~check.fitted].error.abs()
    print(f"\nnot fitted: median absolute error {held_out.median():.1%}, largest {held_out.max():.1%}")
    if arguments.plot is not None:
        from sim.figures import save
        from sim.figures.measured import published_kernels

        save(published_kernels(check), arguments.plot)
        print(arguments.plot)
