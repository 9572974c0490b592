"""The tokens of trials on a CUDA device: the counts of `sim.router.sampler`, bit for bit, from the same words.

A block of threads takes a trial, a thread one token after another (`sim.router.one_token`). Tables of layers are made on the
CPU, as for the CPU's own sampler. Every float operation is one that the device rounds as the CPU does (IEEE 754): there is no
product that a compiler could fuse with a sum, and division and square root are the exact ones.
"""

import numpy as np
from numba import cuda, float32, int32

from sim.errors import InputError
from sim.kernels import kernel
from sim.router.one_token import MOST_GROUPS, MOST_PLACES, Token, route_token
from sim.router.tables import fill_layer, new_layer

_THREADS = 128
_TWICE = 2 * MOST_GROUPS


@cuda.jit
def _sample(
    first_trial, key, tokens_per_request, tokens, topk_group, top_k, sigma, score_law,
    weight, gap, gap_without, alias, counts, ids,
):  # fmt: skip
    own = Token(
        cuda.local.array(MOST_GROUPS, float32),
        cuda.local.array(MOST_GROUPS, int32),
        cuda.local.array(MOST_GROUPS, float32),
        cuda.local.array(_TWICE, float32),
        cuda.local.array(MOST_GROUPS, int32),
        cuda.local.array(MOST_GROUPS, float32),
        cuda.local.array(MOST_PLACES, float32),
        cuda.local.array(MOST_PLACES, int32),
    )
    running = cuda.shared.array(0, int32)
    t, thread, n_threads = cuda.blockIdx.x, cuda.threadIdx.x, cuda.blockDim.x
    for e in range(thread, counts.shape[2], n_threads):
        running[e] = 0
    cuda.syncthreads()
    start = 0
    for step in range(tokens.size):
        for token in range(start + thread, tokens[step], n_threads):
            r = token // tokens_per_request
            route_token(
                token, first_trial + t, key, topk_group, top_k, sigma, score_law,
                weight[t, r], gap[t, r], gap_without[t, r], alias[t, r], own,
            )  # fmt: skip
            for k in range(top_k):
                cuda.atomic.add(running, own.expert[k], 1)
                if token < ids.shape[1]:
                    ids[t, token, k] = own.expert[k]
        cuda.syncthreads()
        for e in range(thread, counts.shape[2], n_threads):
            counts[t, step, e] = running[e]
        start = tokens[step]
        cuda.syncthreads()


@kernel
def _fill_tables(mu, n_group, weight, gap, gap_without, alias):
    """Tables of all layers: mu float64 [trials, requests, n_experts]; the others as in `Layer`, for each."""
    layer = new_layer(mu.shape[2], n_group)
    for t in range(mu.shape[0]):
        for r in range(mu.shape[1]):
            fill_layer(mu[t, r], layer)
            weight[t, r], gap[t, r] = layer.weight, layer.gap
            gap_without[t, r], alias[t, r] = layer.gap_without, layer.alias


def sample_trials_on_gpu(
    first_trial: int,
    key: np.ndarray,
    mu: np.ndarray,
    tokens_per_request: int,
    tokens: np.ndarray,
    n_group: int,
    topk_group: int,
    group_sigma: float,
    score_law: np.ndarray,
    counts: np.ndarray,
    ids: np.ndarray,
) -> None:
    """As `sim.router.sampler.sample_trials`, on the current CUDA device.

    Raises
    ------
    InputError
        No device, or a router of more groups or experts per token than a thread has room for.
    """
    top_k = ids.shape[2]
    if not cuda.is_available():
        raise InputError(
            "`executor` cuda needs a CUDA device and the extra 'cuda' (pip install 'epsim[cuda]'); none was found"
        )
    if n_group > MOST_GROUPS or 2 * max((top_k + 1) // 2, topk_group) > MOST_PLACES:
        raise InputError(
            f"`executor` cuda takes routers of up to {MOST_GROUPS} groups and {MOST_PLACES} experts per token"
        )
    shape = mu.shape[:2]
    weight, gap = np.empty(mu.shape), np.empty((*shape, n_group), np.float32)
    gap_without, alias = np.empty(mu.shape, np.float32), np.empty(mu.shape, np.uint64)
    _fill_tables(mu, n_group, weight, gap, gap_without, alias)
    n_threads = min(_THREADS, -(-int(tokens[-1]) // 32) * 32)
    stream = cuda.stream()
    inputs = [cuda.to_device(a, stream) for a in (key, tokens, score_law, weight, gap, gap_without, alias)]
    on_device = [cuda.device_array(a.shape, a.dtype, stream=stream) for a in (counts, ids)]
    key_d, tokens_d, law_d, *tables = inputs
    _sample[len(mu), n_threads, stream, 4 * counts.shape[2]](
        first_trial, key_d, tokens_per_request, tokens_d, topk_group, top_k, np.float32(group_sigma), law_d,
        *tables, *on_device,
    )  # fmt: skip
    for of_device, out in zip(on_device, (counts, ids), strict=True):
        of_device.copy_to_host(out, stream)
    stream.synchronize()
