"""Time of the two all-to-alls of one layer: tokens to their experts (dispatch) and results back (combine)."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim.cost.gpu import Gpu, load_gpu
from sim.cost.inputs import as_gpu, as_numbers, as_whole_numbers, expert_width, together
from sim.cost.tables import exchange_profile, measured
from sim.errors import InputError
from sim.model import ModelSpec, load_model

_DISPATCH_BYTES = 1 + 4 / 128  # FP8 with a 4-byte scale for every 128 values
_COMBINE_BYTES = 2  # BF16


class ExchangeTime(NamedTuple):
    """Times of one layer's exchange, arrays of one shape."""

    dispatch_us: np.ndarray
    combine_us: np.ndarray
    extrapolated: np.ndarray  # bool: anything but what was measured

    @property
    def total_us(self) -> np.ndarray:
        """Dispatch and combine, one after the other."""
        return self.dispatch_us + self.combine_us


def exchange_time_us(
    model: ModelSpec | str | Path,
    gpu: Gpu | str | Path,
    *,
    ep_size: ArrayLike,
    tokens_per_rank: ArrayLike,
    ranks_per_token: ArrayLike | None = None,
    nodes_per_token: ArrayLike | None = None,
    imbalance: ArrayLike = 1.0,
    ranks_per_node: int = 8,
) -> ExchangeTime:
    """Dispatch and combine of one layer, for the rank with the most traffic, in microseconds.

    Each direction takes latency + max(NVLink bytes / reached NVLink, network bytes / reached network). Three constants,
    fitted to the 12 published times of DeepEP's low-latency kernels on H800, give all of them within 8 %
    (`exchange_profile()`). Dispatch carries FP8 with scales, combine BF16.

    The latency is an intercept, from messages of 7.6 and 14.7 MB: it is weakest where there are few tokens.

    Assumptions: tokens sit on all ranks alike, so a copy stays on its rank with probability 1 / ep_size and on its
    node with (ranks of a node) / ep_size; the rank with the most load receives, and sends back, `imbalance` times the
    mean; the two links work at the same time; nothing overlaps with computation.

    Parameters
    ----------
    model : ModelSpec, str or Path
    gpu : Gpu, str or Path
        Needs scale_out_gb_per_s where the EP group is larger than a node.
    ep_size, tokens_per_rank : array
        Ranks, and tokens that each of them sends.
    ranks_per_token, nodes_per_token : float array
        Fan-out, for kernels that send a token once to each node and there once to each rank. Without it a token is sent once
        to each of its top_k experts, as the low-latency kernels do, whatever the placement.
    imbalance : float array
        Load of the rank with the most load over the mean.
    ranks_per_node : int
        Ranks joined by NVLink: 8, or 72 in a GB200 NVL72.

    Returns
    -------
    ExchangeTime
        `extrapolated` marks all that was not measured: an EP size outside 8 to 256, other traffic per rank than that of 128
        tokens of DeepSeek-V3 without imbalance, links other than H800's, nodes of other than 8 ranks, a fan-out.

    Raises
    ------
    InputError
        Unknown names, numbers out of range, a model without sizes, or a GPU without a network bandwidth.
    """
    model, gpu, kernel = load_model(model), as_gpu(gpu), exchange_profile()
    width = expert_width(model)
    if (ranks_per_token is None) != (nodes_per_token is None):
        raise InputError("ranks_per_token and nodes_per_token go together")
    ranks = model.top_k if ranks_per_token is None else ranks_per_token
    nodes = model.top_k if nodes_per_token is None else nodes_per_token
    ep, tokens, to_ranks, to_nodes, hot = together(
        ep_size=as_whole_numbers("ep_size", ep_size, 1, 1e6),
        tokens_per_rank=as_numbers("tokens_per_rank", tokens_per_rank, 0),
        ranks_per_token=as_numbers("ranks_per_token", ranks, 1, model.top_k),
        nodes_per_token=as_numbers("nodes_per_token", nodes, 1, model.top_k),
        imbalance=as_numbers("imbalance", imbalance, 1, 1e6),
    )
    node_size = as_whole_numbers("ranks_per_node", ranks_per_node, 1, 1e6)
    _check_traffic(ep, to_ranks, to_nodes, hot, is_fan_out=ranks_per_token is not None)
    on_node = np.minimum(ep, node_size)
    off_node_share = 1 - on_node / ep
    if gpu.scale_out_gb_per_s is None and (off_node_share > 0).any():
        raise InputError(
            f"gpu {gpu.name}: scale_out_gb_per_s differs by cluster and is not known; give a .toml file that has it, "
            f"or an ep_size of at most {node_size:g}"
        )
    # Every copy may take NVLink as its last hop; where the network is used at all, it is the slower of the two.
    up_us_per_byte = to_ranks * (1 - 1 / on_node) / (gpu.scale_up_gb_per_s * 1e3 * kernel.scale_up_fraction)
    out_us_per_byte = to_nodes * off_node_share / ((gpu.scale_out_gb_per_s or 1) * 1e3 * kernel.scale_out_fraction)
    us_per_byte = tokens * hot * width * np.maximum(up_us_per_byte, out_us_per_byte)

    table = measured()["deepep_low_latency"]
    h800, v3, sizes = load_gpu(table["gpu"]), load_model(table["model"]), [row[0] for row in table["rows"]]
    measured_traffic = table["tokens_per_rank"] * v3.top_k * expert_width(v3)
    extrapolated = (ep < min(sizes)) | (ep > max(sizes)) | (tokens * hot * model.top_k * width != measured_traffic)
    same_links = (gpu.scale_up_gb_per_s, gpu.scale_out_gb_per_s) == (h800.scale_up_gb_per_s, h800.scale_out_gb_per_s)
    if not same_links or node_size != table["ranks_per_node"] or ranks_per_token is not None:
        extrapolated = np.ones_like(extrapolated)
    return ExchangeTime(
        kernel.latency_us + us_per_byte * _DISPATCH_BYTES,
        kernel.latency_us + us_per_byte * _COMBINE_BYTES,
        extrapolated,
    )


def _check_traffic(
    ep: np.ndarray, to_ranks: np.ndarray, to_nodes: np.ndarray, hot: np.ndarray, *, is_fan_out: bool
) -> None:
    for wrong, text in (
        (hot > ep, "imbalance: cannot be above ep_size, all load on one rank"),
        (to_nodes > to_ranks, "nodes_per_token: cannot be above ranks_per_token"),
        ((to_ranks > ep) & is_fan_out, "ranks_per_token: cannot be above ep_size"),
    ):
        if wrong.any():
            raise InputError(text)
