"""Time of one rank's experts in one layer: a fixed part, then memory or arithmetic, whichever takes longer."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim.cost.gpu import Gpu
from sim.cost.inputs import as_gpu, as_numbers, expert_parameters, expert_width, together
from sim.cost.tables import grouped_gemm_profile
from sim.errors import InputError
from sim.model import ModelSpec, load_model

BYTES_PER_VALUE = {
    "bf16": 2.0,
    "fp8": 1.0,  # scales of 128 x 128 blocks would add 0.02 %
    "fp4": 0.5 + 1 / 16,  # NVFP4: a scale of one byte for every 16 values
}
_OUTPUT_BYTES = 2  # an expert's output is BF16, whatever goes in


class ExpertRates(NamedTuple):
    """What the time of one rank's experts is made of, for a model, a GPU and a type of weights."""

    launch_us: float
    us_per_expert: float  # to read its weights
    us_per_pair: float  # to read its input and write its output
    us_per_row: float  # to compute a row, tiles padded
    tile_rows: int


def expert_rates(model: ModelSpec | str | Path, gpu: Gpu | str | Path, dtype: str = "fp8") -> ExpertRates:
    """Constants of `expert_time_us`; same errors."""
    model, gpu, kernel = load_model(model), as_gpu(gpu), grouped_gemm_profile()
    peak_tflops = gpu.peak_tflops(dtype)
    weights, width, value = expert_parameters(model), expert_width(model), BYTES_PER_VALUE[dtype]
    bytes_per_us = gpu.hbm_tb_per_s * 1e6 * kernel.bandwidth_fraction
    flops_per_us = peak_tflops * 1e6 * (gpu.peak_fraction or kernel.peak_fraction)
    return ExpertRates(
        launch_us=kernel.launch_us,
        us_per_expert=weights * value / bytes_per_us,
        us_per_pair=width * (value + _OUTPUT_BYTES) / bytes_per_us,
        us_per_row=2 * weights / flops_per_us,
        tile_rows=kernel.tile_rows,
    )


def expert_time_us(
    model: ModelSpec | str | Path,
    gpu: Gpu | str | Path,
    *,
    pairs: ArrayLike,
    distinct_experts: ArrayLike,
    dtype: str = "fp8",
) -> np.ndarray:
    """Time of one rank's routed experts in one layer, in microseconds.

    launch + max(bytes / reached bandwidth, operations / reached peak), with the constants of
    `grouped_gemm_profile()`:

    - bytes: the weights of the distinct experts, and what goes into and out of them for each pair. What passes
      between the two GEMMs is taken to stay in the L2 cache.
    - operations: 2 per weight and row. A tile has rows of one expert only, so an expert with a token computes at least
      one tile, and one with many computes half a tile more than it has rows, in the mean over uneven counts.

    A rank without pairs takes the launch time: its kernels run all the same (CUDA graphs).

    Parameters
    ----------
    model : ModelSpec, str or Path
    gpu : Gpu, str or Path
    pairs : float array
        (token, expert) pairs of the rank; fractions are means over steps. The time is convex in the load, so the time of
        a mean is a little below the mean time.
    distinct_experts : float array
        Experts of the rank with at least one token; broadcasts with `pairs`.
    dtype : str
        Type of weights and inputs, 'bf16', 'fp8' or 'fp4' (NVFP4); shares of the peak were measured in FP8 only.

    Returns
    -------
    float array
        Microseconds, in the shape that the inputs broadcast to.

    Raises
    ------
    InputError
        Unknown names, a model whose sizes are not known, a type that the GPU has no peak for, or loads that are
        negative, NaN or inconsistent: more distinct experts than pairs or than the model has, or pairs on no expert.

    Examples
    --------
    A rank of EP 32 that reads 8 experts of DeepSeek-V3, 352 MB:

    >>> expert_time_us("deepseek-v3", "h200", pairs=[0, 8, 256], distinct_experts=[0, 8, 8]).round(0)
    array([ 30., 118., 119.])
    """
    model = load_model(model)
    rates = expert_rates(model, gpu, dtype)
    return rates.launch_us + np.maximum(*_parts_us(model, rates, pairs, distinct_experts))


def ideal_times_us(
    model: ModelSpec | str | Path,
    gpu: Gpu | str | Path,
    *,
    pairs: ArrayLike,
    distinct_experts: ArrayLike,
    dtype: str = "fp8",
) -> tuple[np.ndarray, np.ndarray]:
    """Times to move the bytes at the whole bandwidth, and to do the operations at the whole peak: the two sides of
    `expert_time_us`, which takes the same arguments, before its constants.
    """
    model, gpu, kernel = load_model(model), as_gpu(gpu), grouped_gemm_profile()
    memory_us, compute_us = _parts_us(model, expert_rates(model, gpu, dtype), pairs, distinct_experts)
    return memory_us * kernel.bandwidth_fraction, compute_us * (gpu.peak_fraction or kernel.peak_fraction)


def _parts_us(
    model: ModelSpec, rates: ExpertRates, pairs: ArrayLike, distinct_experts: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    """Times of memory and of arithmetic, loads checked."""
    pairs, distinct = as_numbers("pairs", pairs, 0), as_numbers("distinct_experts", distinct_experts, 0)
    pairs, distinct = together(pairs=pairs, distinct_experts=distinct)
    _check_loads(model, pairs, distinct)
    memory_us = distinct * rates.us_per_expert + pairs * rates.us_per_pair
    return memory_us, rates.us_per_row * tile_padded_rows(pairs, distinct, rates.tile_rows)


def crossover_tokens(model: ModelSpec, rates: ExpertRates) -> float:
    """Tokens per step from which, under even load, a rank's time grows with its tokens.

    Below, it grows with its distinct experts alone: their weights are read, or a tile of each is computed, whichever
    takes longer. The same for every EP size.
    """
    half_tile = rates.tile_rows / 2
    read = (rates.us_per_expert - rates.us_per_row * half_tile) / (rates.us_per_row - rates.us_per_pair)
    return max(read, half_tile) * model.n_experts / model.top_k


def tile_padded_rows(pairs: np.ndarray, distinct: np.ndarray, tile_rows: int) -> np.ndarray:
    """Rows that a grouped GEMM computes for `pairs` over `distinct` experts, padded to tiles of `tile_rows`."""
    return np.maximum(distinct * tile_rows, pairs + distinct * (tile_rows / 2))


def _check_loads(model: ModelSpec, pairs: np.ndarray, distinct: np.ndarray) -> None:
    for wrong, rule in (
        (distinct > pairs * (1 + 1e-9), "each takes at least one pair"),
        ((distinct == 0) & (pairs > 0), "pairs need an expert"),
        (distinct > model.n_experts, f"{model.name} has {model.n_experts}"),
    ):
        if wrong.any():
            d, p = distinct[wrong].flat[0], pairs[wrong].flat[0]
            raise InputError(f"distinct_experts {d:g} with pairs {p:g}: {rule}")
