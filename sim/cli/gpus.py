"""List the GPUs with their bandwidths, peaks and links, and where the numbers come from."""

from argparse import ArgumentParser, Namespace

from sim.cli.text import table
from sim.cost import gpu_names, load_gpu
from sim.cost.tables import exchange_profile, grouped_gemm_profile


def add_arguments(parser: ArgumentParser) -> None:
    """`epsim gpus` takes no options."""


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:g}"


def run(arguments: Namespace) -> None:
    """Run `epsim gpus`."""
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
