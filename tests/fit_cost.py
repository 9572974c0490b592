"""Fit the constants of sim/cost/kernels.toml and gpus.toml again: `PYTHONPATH=. python tests/fit_cost.py` prints them.

The fits in bf16 are to results/measured. With paths of measured layers (`epsim measure --layer`) also those of their exchanges.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.cost.exchange import exchange_time_us
from sim.cost.expert import tile_padded_rows
from sim.cost.gpu import gpu_names, load_gpu
from sim.cost.refit import GATHER_LINKS, exchange_rows, expert_rows, fit_experts, fit_gather, fit_links, link_groups
from sim.cost.tables import PAIR_SHARPNESS, exchange_profile, grouped_gemm_profile, measured
from sim.measure.layer_compare import read_layers
from sim.measure.table import read_measured
from sim.model import load_model

ROOT = Path(__file__).parent.parent
V3 = load_model("deepseek-v3")
WEIGHTS = 3 * V3.hidden_size * V3.moe_intermediate_size
GATE_UP, DOWN = WEIGHTS * 2 / 3, WEIGHTS / 3


def fit_peak_fraction(name):
    """Geometric mean over the shapes of a table of the share of the peak at which the padded rows are computed."""
    experts, rows, gate_up_tflops, down_tflops = table(name)
    peak_tflops = load_gpu(measured()[name]["gpu"]).fp8_tflops
    us = 2 * experts * rows * (GATE_UP / gate_up_tflops + DOWN / down_tflops) / 1e6
    padded = tile_padded_rows(experts * rows, experts, grouped_gemm_profile().tile_rows)
    return np.exp(np.mean(np.log(2 * WEIGHTS * padded / (peak_tflops * 1e6) / us)))


def fit_deepep():
    """Floor and shares of the two links of DeepEP's own times, least squares of relative errors; beyond a node only the
    network counts.
    """
    ep, dispatch_us, combine_us = table("deepep_low_latency")
    published = measured()["deepep_low_latency"]
    gpu, node = load_gpu(published["gpu"]), published["ranks_per_node"]
    kilobytes = published["tokens"] * V3.top_k * V3.hidden_size / 1e3 * np.array([[1 + 4 / 128], [2]])
    on_node = np.minimum(ep, node)
    ideal_us = (
        kilobytes * (1 - 1 / on_node) / gpu.scale_up_gb_per_s,
        kilobytes * (1 - node / ep) / gpu.scale_out_gb_per_s,
    )

    def misfit(x):
        floor, up, out = np.exp(x)
        link_us = np.where(ep <= node, ideal_us[0] / up, ideal_us[1] / out)
        p = PAIR_SHARPNESS
        return ((floor**p + link_us**p) ** (1 / p) / [dispatch_us, combine_us] - 1).ravel()

    return np.exp(least_squares(misfit, np.log([31, 0.94, 0.89])).x)


def fit_one_node(name):
    """Floors, their falls and shares of NVLink of exchanges on one node, by GPU, each of dispatch and combine."""
    found = {}
    for part, how in link_groups(name):
        fit, phase = fit_links(part, **how), part.phase.iloc[0]
        for gpu in part.gpu.unique():
            row_us = (
                V3.hidden_size
                * {"dispatch": 1 + 4 / 128, "combine": 2}[phase]
                / (load_gpu(gpu).scale_up_gb_per_s * 1e3)
            )
            found[gpu, phase] = {
                "floor_us": fit.floor_us[gpu],
                "floor_falls": fit.falls,
                "scale_up_fraction": row_us / fit.row_us,
            }
    return found


def fit_layers(layers, gpu):
    """Floor, share of NVLink and median error of each kind of exchange in measured layers (`read_layers`).

    Layers know dispatch and combine together, so both get the same floor and share, and BF16 both ways. What the GPU copies
    beside the exchange is not fitted: it goes at the rate of a copy, which was measured apart.
    """
    found = {}
    for kind, rows in layers.groupby("exchange"):
        shipped = exchange_profile(kind, gpu.name)

        def misfit(x, kind=kind, rows=rows, shipped=shipped):
            floor, share = np.exp(x)
            own = replace(
                shipped, floor_us=(0.0 if kind == "reduce" else floor, floor), floor_falls=(0.0, 0.0),
                scale_up_fraction=(share, share), bytes_per_value=(2.0, 2.0),
            )  # fmt: skip
            times = exchange_time_us(
                rows.model.iloc[0], gpu, kind=kind, ep_size=rows.ep_size, tokens_per_rank=rows.tokens / rows.ep_size,
                received_tokens=rows.received, pairs=rows.pairs, profile=own,
            )  # fmt: skip
            return np.log(times.total_us / rows.exchange_us.to_numpy())

        fit = least_squares(misfit, np.log([30, 0.5]), loss="soft_l1", f_scale=0.1)
        found[kind] = *np.exp(fit.x), float(np.median(np.abs(np.expm1(misfit(fit.x)))))
    return found


def table(name):
    """Columns of one of the published tables."""
    return np.array(measured()[name]["rows"], float).T


def preset_of(device):
    """Preset of a device by its own name, as in 'NVIDIA H100 80GB HBM3'."""
    return next(name for name in gpu_names() if name in device.lower().split())


def measured_rows(dtype="bf16"):
    """Measured times of experts, H100 and H200: the columns of `expert_rows`, and tiles."""
    rows = pd.concat(
        read_measured(ROOT / "results" / "measured" / f"{gpu}.csv.gz").query(f"dtype == '{dtype}'")
        for gpu in ("h100", "h200")
    )
    return rows.rename(columns={"time_us": "measured_us"}).assign(local=V3.n_experts / rows.ep_size)


def shares_of(kernel):
    """Names of the shares of a GPU that a kernel has."""
    has_large = grouped_gemm_profile(kernel).large_tile_rows > 0
    return ("bandwidth_fraction", "peak_fraction", *(["large_peak_fraction"] if has_large else []))


def fit_all():
    """Every fitted constant by name."""
    found, (floor, up, out) = {}, fit_deepep()
    for kernel, rows, mean_of in (
        ("fp8", expert_rows(), ("h100", "h200")),
        ("bf16", measured_rows(), ("h100", "h200")),
        ("fp8_torch", measured_rows("fp8"), ("h100", "h200")),
        ("fp4", expert_rows("wideep_nvfp4"), ("b200", "gb200", "b300", "gb300")),
    ):
        fit = fit_experts(rows, kernel)
        for name in ("launch_us", "idle_us", "spread_us", "sharpness"):
            found[f"{kernel}.{name}"] = getattr(fit, name)
        for name in shares_of(kernel):
            shares = getattr(fit, name)
            found[f"{kernel}.{name}"] = np.exp(np.mean(np.log([shares[gpu] for gpu in mean_of])))
            found |= {f"{kernel}.{gpu}.{name}": share for gpu, share in shares.items()}
    found["h20.peak_fraction"] = fit_peak_fraction("deepgemm_h20")
    found |= {"h800.floor_us": floor, "h800.scale_up_fraction": up, "h800.scale_out_fraction": out}
    for name, kind in (("low_latency_one_node", "pair"), ("deepep_normal", "deepep_high_throughput")):
        for of, constants in fit_one_node(name).items():
            found |= {".".join((kind, *of, constant)): value for constant, value in constants.items()}
    floor_us, share = fit_gather(exchange_rows(GATHER_LINKS))
    return found | {"gather.large_floor_us": floor_us, "gather.scale_up_fraction": share}


if __name__ == "__main__":
    for name, value in fit_all().items():
        print(f"{name} = {value:.5f}")
    for path in map(Path, sys.argv[1:]):
        layers = read_layers(path)
        for kind, (floor, share, error) in fit_layers(layers, load_gpu(preset_of(layers.gpu.iloc[0]))).items():
            print(f"{path.name}: {kind}: floor_us {floor:.1f}, scale_up_fraction {share:.3f}, median error {error:.1%}")
