"""Fit the constants of sim/cost/kernels.toml and gpus.toml again: `PYTHONPATH=. python tests/fit_cost.py` prints them."""

from itertools import combinations

import numpy as np

from sim.cost.expert import tile_padded_rows
from sim.cost.gpu import load_gpu
from sim.cost.tables import grouped_gemm_profile, measured
from sim.model import load_model

V3 = load_model("deepseek-v3")
WEIGHTS = 3 * V3.hidden_size * V3.moe_intermediate_size
GATE_UP, DOWN = WEIGHTS * 2 / 3, WEIGHTS / 3


def loads(ep_size, tokens):
    """Pairs and distinct experts of a rank under even routing."""
    pairs = tokens * V3.top_k / ep_size
    return pairs, np.minimum(V3.n_experts / ep_size, pairs)


def fit_launch_and_bandwidth(ep_size, tokens, us):
    """Launch time and share of the bandwidth with the least absolute relative error.

    The best line goes through two of the points, so all pairs of points are tried. Absolute errors, because the rows
    with idle experts take longer for a reason that the model does not know, and squares would let them rule.
    """
    pairs, distinct = loads(ep_size, tokens)
    hbm_tb_per_s = load_gpu(measured()["moe_decode"]["gpu"]).hbm_tb_per_s
    ideal_us = (distinct * WEIGHTS + pairs * V3.hidden_size * (1 + 2)) / (hbm_tb_per_s * 1e6)
    best = np.inf, 0.0, 0.0
    for i, j in combinations(range(len(us)), 2):
        if ideal_us[i] != ideal_us[j]:
            slope = (us[i] - us[j]) / (ideal_us[i] - ideal_us[j])
            launch = us[i] - slope * ideal_us[i]
            best = min(best, (np.abs((launch + slope * ideal_us) / us - 1).sum(), launch, slope))
    return best[1], 1 / best[2]


def fit_peak_fraction(name):
    """Geometric mean over the shapes of a table of the share of the peak at which the padded rows are computed."""
    experts, rows, gate_up_tflops, down_tflops = table(name)
    peak_tflops = load_gpu(measured()[name]["gpu"]).fp8_tflops
    us = 2 * experts * rows * (GATE_UP / gate_up_tflops + DOWN / down_tflops) / 1e6
    padded = tile_padded_rows(experts * rows, experts, grouped_gemm_profile().tile_rows)
    return np.exp(np.mean(np.log(2 * WEIGHTS * padded / (peak_tflops * 1e6) / us)))


def fit_exchange():
    """Latency and shares of the two links, least squares of relative errors; beyond a node only the network counts."""
    ep_size, dispatch_us, combine_us = table("deepep_low_latency")
    published = measured()["deepep_low_latency"]
    gpu, node = load_gpu(published["gpu"]), published["ranks_per_node"]
    values = published["tokens_per_rank"] * V3.top_k * V3.hidden_size / 1e3
    kilobytes = np.concatenate([np.full(len(ep_size), values * (1 + 4 / 128)), np.full(len(ep_size), values * 2)])
    us, ep = np.concatenate([dispatch_us, combine_us]), np.tile(ep_size, 2)
    up_us = np.where(ep <= node, kilobytes * (1 - 1 / ep) / gpu.scale_up_gb_per_s, 0)
    out_us = np.where(ep > node, kilobytes * (1 - node / ep) / gpu.scale_out_gb_per_s, 0)
    columns = np.stack([np.ones(len(us)), up_us, out_us], axis=1) / us[:, None]
    latency, up, out = np.linalg.lstsq(columns, np.ones(len(us)), rcond=None)[0]
    return latency, 1 / up, 1 / out


def table(name):
    """Columns of one of the published tables."""
    return np.array(measured()[name]["rows"], float).T


def fit_all():
    """Every fitted constant by name."""
    ep_size, tokens, us = table("moe_decode")
    seen = np.isin(ep_size, measured()["moe_decode"]["fitted_ep_sizes"])
    launch, bandwidth = fit_launch_and_bandwidth(ep_size[seen], tokens[seen], us[seen])
    latency, up, out = fit_exchange()
    return {
        "launch_us": launch,
        "bandwidth_fraction": bandwidth,
        "peak_fraction": fit_peak_fraction("deepgemm_h800"),
        "h20_peak_fraction": fit_peak_fraction("deepgemm_h20"),
        "latency_us": latency,
        "scale_up_fraction": up,
        "scale_out_fraction": out,
    }


if __name__ == "__main__":
    for name, value in fit_all().items():
        print(f"{name} = {value:.5f}")
