"""Time of one rank's experts in one layer: fixed parts, then memory or arithmetic, whichever takes longer, bent smoothly."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import lambertw

from sim.cost.gpu import Gpu, load_gpu
from sim.cost.inputs import as_numbers, dtype_of, expert_parameters, expert_width, together
from sim.cost.tables import grouped_gemm_profile
from sim.errors import InputError
from sim.kernels import kernel
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
    idle_us: float  # of an expert of the rank without a token
    spread_us: float  # of many distinct experts over that of one
    us_per_expert: float  # to read its weights
    us_per_pair: float  # to read its input and write its output
    us_per_row: float  # to compute a row, tiles padded
    tile_rows: float
    sharpness: float  # of the bend from memory to arithmetic
    large_from_rows: float  # mean rows of the rank's experts from which another kernel runs; infinite without one
    large_us_per_row: float
    large_tile_rows: float


def expert_rates(
    model: ModelSpec | str | Path, gpu: Gpu | str | Path, dtype: str | None = None, kernel: str = ""
) -> ExpertRates:
    """Constants of `expert_time_us`, or of another `kernel` of that type in kernels.toml; same errors."""
    model, gpu = load_model(model), load_gpu(gpu)
    dtype = dtype_of(model, [gpu], dtype)
    kernel = kernel or dtype
    peak_tflops = gpu.peak_tflops(dtype)
    profile = grouped_gemm_profile(kernel)
    weights, width, value = expert_parameters(model), expert_width(model), BYTES_PER_VALUE[dtype]
    bandwidth, peak, large_peak = reached_fractions(gpu, kernel)
    bytes_per_us = gpu.hbm_tb_per_s * 1e6 * bandwidth
    return ExpertRates(
        launch_us=profile.launch_us,
        idle_us=profile.idle_us,
        spread_us=profile.spread_us,
        us_per_expert=weights * value / bytes_per_us,
        us_per_pair=width * (value + _OUTPUT_BYTES) / bytes_per_us,
        us_per_row=2 * weights / (peak_tflops * 1e6 * peak),
        tile_rows=profile.tile_rows,
        sharpness=profile.sharpness,
        large_from_rows=profile.large_from_rows,
        large_us_per_row=2 * weights / (peak_tflops * 1e6 * large_peak) if large_peak else 0.0,
        large_tile_rows=profile.large_tile_rows,
    )


def reached_fractions(gpu: Gpu, kernel: str = "fp8") -> tuple[float, float, float]:
    """Shares of the memory bandwidth and of the peak that the grouped GEMM of a type reaches on a GPU, and of the peak with its
    large tiles, 0 where it has none.
    """
    profile = grouped_gemm_profile(kernel)
    if gpu.name in profile.shares:
        bandwidth, peak, *large = profile.shares[gpu.name]
        return bandwidth, peak, large[0] if large else 0.0
    if profile.large_tile_rows:  # a GPU's own shares are of DeepGEMM, whose tiles are others
        return profile.bandwidth_fraction, profile.peak_fraction, profile.large_peak_fraction
    return gpu.bandwidth_fraction or profile.bandwidth_fraction, gpu.peak_fraction or profile.peak_fraction, 0.0


def expert_time_us(
    model: ModelSpec | str | Path,
    gpu: Gpu | str | Path,
    *,
    pairs: ArrayLike,
    distinct_experts: ArrayLike,
    dtype: str | None = None,
    local_experts: ArrayLike | None = None,
) -> np.ndarray:
    """Time of one rank's routed experts in one layer, in microseconds.

    launch + idle x (local - distinct) + spread x (1 - 1 / distinct) + (memory^p + compute^p)^(1/p), with the constants of
    `grouped_gemm_profile(dtype)` and of the GPU:

    - memory: the weights of the distinct experts, and what goes into and out of them for each pair, over the bandwidth that
      is reached. What passes between the two GEMMs is taken to stay in the L2 cache.
    - compute: 2 operations per weight and row, over the peak that is reached. A tile has rows of one expert only, so an
      expert with a token computes at least one tile, and one with many computes half a tile more than it has rows, in the
      mean over uneven counts. PyTorch's kernel (bf16) takes a larger tile where the rank's experts have many rows in the mean.
    - idle: a masked GEMM looks at all experts of the rank, those without a token too.

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
        Type of weights and inputs, 'bf16', 'fp8' or 'fp4' (NVFP4), each with the kernel that was measured in it; by default as
        the model's experts are stored (`dtype_of`).
    local_experts : float array
        Slots of the rank, with and without tokens. Where nobody says: the number whose chance of `distinct_experts` under
        `pairs` random picks is best. With a pair for each distinct expert there is no best number; then, and at most,
        the geometric mean of the fewest (the distinct ones) and the most (half of the model's, at EP 2) is taken.

    Returns
    -------
    float array
        Microseconds, in the shape that the inputs broadcast to.

    Raises
    ------
    InputError
        Unknown names, a model whose sizes are not known, a type that the GPU has no peak for, or loads that are
        negative, NaN or inconsistent: more distinct experts than pairs, than local ones or than the model has, or pairs on
        no expert.

    Examples
    --------
    A rank of EP 32 that has 8 experts of DeepSeek-V3 and reads them all, 352 MB:

    >>> expert_time_us("deepseek-v3", "h200", pairs=[0, 8, 256], distinct_experts=[0, 8, 8], local_experts=8).round(0)
    array([ 24., 114., 115.])
    """
    model = load_model(model)
    rates = expert_rates(model, gpu, dtype)
    pairs, distinct = _loads(model, pairs, distinct_experts)
    if local_experts is None:
        local = likely_local_experts(model, pairs, distinct)
    else:
        most = as_numbers("local_experts", local_experts, 0)
        pairs, distinct, local = together(pairs=pairs, distinct_experts=distinct, local_experts=most)
        _refuse(distinct > local * (1 + 1e-9), distinct, local, "local_experts", "it must hold them all")
    return time_ranks(rates, pairs, distinct, local)


def time_ranks(
    rates: ExpertRates, pairs: np.ndarray, distinct: np.ndarray, local: np.ndarray, rows: np.ndarray | None = None
) -> np.ndarray:
    """Times of ranks by `rank_time_us`: loads as in `expert_time_us`, float64 of one shape, not checked; rows where counted."""
    rows = np.zeros(np.shape(pairs)) if rows is None else rows
    flat = (np.ascontiguousarray(values, float).reshape(-1) for values in (pairs, distinct, local, rows))
    times_us = np.empty(pairs.size)
    _time_ranks(np.array(rates), *flat, times_us)
    return times_us.reshape(pairs.shape)


@kernel
def tile_of(rates, pairs, local):
    """Time of a row, and rows of a tile, of the kernel that runs for a rank; rates as in `rank_time_us`."""
    if pairs >= rates[8] * local and pairs > 0.0:
        return rates[9], rates[10]
    return rates[5], rates[6]


@kernel
def rank_time_us(rates, pairs, distinct, local, rows):
    """Time of one rank and whether it grows with the rank's pairs; rates float64, the fields of ExpertRates; rows that the rank
    computes, tiles padded, 0 where they were not counted.
    """
    launch_us, idle_us, spread_us, us_per_expert, us_per_pair, _, _, sharpness, _, _, _ = rates
    fixed_us = launch_us + idle_us * (local - distinct)
    if distinct <= 0.0:
        return fixed_us, False
    memory_us = distinct * us_per_expert + pairs * us_per_pair
    us_per_row, tile_rows = tile_of(rates, pairs, local)
    least_rows = distinct * tile_rows
    if rows <= 0.0:
        rows = max(least_rows, pairs + distinct * (tile_rows / 2))
    compute_us = us_per_row * rows
    most_us, least_us = max(memory_us, compute_us), min(memory_us, compute_us)
    fixed_us += spread_us * (1.0 - 1.0 / max(distinct, 1.0))
    bent_us = most_us * (1.0 + (least_us / most_us) ** sharpness) ** (1.0 / sharpness)
    return fixed_us + bent_us, rows > least_rows and compute_us > memory_us


@kernel
def _time_ranks(rates, pairs, distinct, local, rows, times_us):
    for i in range(len(pairs)):
        times_us[i], _ = rank_time_us(rates, pairs[i], distinct[i], local[i], rows[i])


def counted_rows(rates: ExpertRates, pairs: np.ndarray, local: np.ndarray, tiles: dict[int, np.ndarray]) -> np.ndarray:
    """Rows that ranks compute, from their tiles of each size; 0 for a kernel without large tiles, whose rows are estimated."""
    if np.isinf(rates.large_from_rows):
        return np.zeros(np.shape(pairs))
    small, large = int(rates.tile_rows), int(rates.large_tile_rows)
    return np.where(pairs >= rates.large_from_rows * local, tiles[large] * large, tiles[small] * small)


def least_time_us(rates: ExpertRates, pairs: np.ndarray, distinct: np.ndarray, local: np.ndarray) -> np.ndarray:
    """Time of ranks that no other with as many pairs and distinct experts beats: tiles full, with the faster kernel."""
    if np.isinf(rates.large_from_rows):
        return time_ranks(rates, pairs, distinct, local)
    times = [
        time_ranks(
            rates._replace(large_from_rows=start), pairs, distinct, local, np.maximum(pairs, distinct * tile_rows)
        )
        for start, tile_rows in ((np.inf, rates.tile_rows), (0.0, rates.large_tile_rows))
    ]
    return np.minimum(*times)


def likely_local_experts(model: ModelSpec, pairs: np.ndarray, distinct: np.ndarray) -> np.ndarray:
    """Experts that a rank most likely has, of which `pairs` random picks hit `distinct`; see `expert_time_us`.

    With x = pairs / local the picks hit local (1 - exp(-x)), so (1 - exp(-x)) / x = distinct / pairs.
    """
    most = np.maximum(distinct, np.sqrt(distinct * model.n_experts / 2))
    a = np.divide(pairs, distinct, out=np.ones(np.shape(pairs)), where=distinct > 0)
    x = np.maximum(a + lambertw(-a * np.exp(-a)).real, 0.0)
    likely = np.divide(pairs, x, out=np.full(np.shape(pairs), np.inf), where=x > 1e-6)
    return np.clip(likely, distinct, most)


def sides_us(
    rates: ExpertRates, pairs: np.ndarray, distinct: np.ndarray, local: np.ndarray, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Times of memory and of arithmetic, the two sides that `rank_time_us` bends together; arguments as there."""
    is_large = pairs >= rates.large_from_rows * np.maximum(local, 1)
    us_per_row = np.where(is_large, rates.large_us_per_row, rates.us_per_row)
    estimated = tile_padded_rows(pairs, distinct, np.where(is_large, rates.large_tile_rows, rates.tile_rows))
    return distinct * rates.us_per_expert + pairs * rates.us_per_pair, us_per_row * np.where(rows > 0, rows, estimated)


def crossover_tokens(model: ModelSpec, rates: ExpertRates) -> float:
    """Tokens per step from which, under even load, a rank's time grows with its tokens.

    Below, it grows with its distinct experts alone: their weights are read, or a tile of each is computed, whichever
    takes longer. The same for every EP size. The time bends smoothly there; this is where the two straight parts meet.
    """
    half_tile = rates.tile_rows / 2
    read = (rates.us_per_expert - rates.us_per_row * half_tile) / (rates.us_per_row - rates.us_per_pair)
    return max(read, half_tile) * model.n_experts / model.top_k


def tile_padded_rows(pairs: np.ndarray, distinct: np.ndarray, tile_rows: ArrayLike) -> np.ndarray:
    """Rows that a grouped GEMM computes for `pairs` over `distinct` experts, padded to tiles of `tile_rows`; the mean over uneven
    counts.
    """
    return np.maximum(distinct * tile_rows, pairs + distinct * (np.asarray(tile_rows) / 2))


def _loads(model: ModelSpec, pairs: ArrayLike, distinct_experts: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Loads as float arrays of one shape, checked."""
    pairs, distinct = together(
        pairs=as_numbers("pairs", pairs, 0), distinct_experts=as_numbers("distinct_experts", distinct_experts, 0)
    )
    _refuse(distinct > pairs * (1 + 1e-9), distinct, pairs, "pairs", "each takes at least one pair")
    _refuse((distinct == 0) & (pairs > 0), distinct, pairs, "pairs", "pairs need an expert")
    _refuse(distinct > model.n_experts, distinct, pairs, "pairs", f"{model.name} has {model.n_experts}")
    return pairs, distinct


def _refuse(wrong: np.ndarray, distinct: np.ndarray, other: np.ndarray, name: str, rule: str) -> None:
    if wrong.any():
        d, value = distinct[wrong].flat[0], other[wrong].flat[0]
        raise InputError(f"distinct_experts {d:g} with {name} {value:g}: {rule}")
