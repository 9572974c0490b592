"""Time of a layer's exchange: tokens to the ranks of their experts (dispatch) and results back (combine), by its kind."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from sim.cost.gpu import Gpu, load_gpu
from sim.cost.inputs import as_numbers, expert_width, together
from sim.cost.tables import FP8_WITH_SCALES, Exchange, exchange_profile
from sim.errors import InputError, shown, unknown
from sim.model import ModelSpec, load_model

KINDS = {
    "token": "a token once to each rank that has one of its experts",
    "pair": "a token once for each of its experts",
    "gather": "all tokens to all ranks (all-gather), partial results summed back (reduce-scatter)",
    "reduce": "all ranks have all tokens; one all-reduce of the results",
    "none": "no exchange, or one that is hidden",
}
SGLANG = {"mooncake": "pair", "nixl": "pair", "mori": "token"}
"""Backends that SGLang alone has by these names."""
BACKENDS = {
    "allgather_reducescatter": "gather",
    "naive": "gather",
    "pplx": "gather",
    "deepep_high_throughput": "token",
    "deepep_low_latency": "pair",
    "deepep_v2": "token",
    "mori_high_throughput": "token",
    "mori_low_latency": "token",
    "nixl_ep": "pair",
    "flashinfer_all2allv": "token",
    "flashinfer_nvlink_one_sided": "token",
    "flashinfer_nvlink_two_sided": "token",
    "hybridep": "token",
} | SGLANG
"""Backends of engines, and the kind of exchange that each is.

vLLM (00193b8): the names are those of `All2AllBackend` in vllm/config/parallel.py, which puts its default,
allgather_reducescatter, in the place of `naive` and `pplx`: they were removed. mori_low_latency is token, not pair, whatever
its name says: vLLM runs MoRI's InterNodeV1LL across nodes and IntraNode on one, and all of MoRI's kernels leave out what a rank
already gets ("Deduplicate" in src/ops/dispatch_combine/low_latency_async.cpp, internode_v1.cpp at 013c13b; "PE dedup" in
intranode_ll.hpp at 47d469d), so SGLang's `mori` and that of older versions of vLLM are token too. mooncake and nixl are SGLang's:
they have low-latency kernels alone (srt/layers/moe/token_dispatcher at 0202c26 and 007baab; its other names are in REFUSED).
hybridep: Megatron's flex dispatcher (`moe_flex_dispatcher_backend`) and DeepEP PR #420.
"""
DEFAULT_EXCHANGE = "pair"
"""Where nobody says, the kind that was measured: DeepEP low latency from Python, with which round_robin runs in vLLM."""
DISPATCHED_FP8 = ("token", "gather")
"""Kinds whose tokens are quantised before they are sent, for experts in fp8. vLLM does so (fused_moe/prepare_finalize) for DeepEP
high-throughput where weights are quantised in blocks, as DeepSeek-V3's (deepep_ht.py: `is_block_quantized`), and before its
all-gather (naive_dp_ep.py: `_quantize_and_setup_dispatch`), but for experts that want BF16. Combine is BF16 always. Other
backends of these kinds are taken to do the same. fp4 is counted in BF16, as DeepEP and weights of 4 bits alone have it: where
inputs are NVFP4 too, FlashInfer's backends and the all-gather send 0.28 of that.
"""
_NPU = "of Ascend NPUs, not modelled"
REFUSED = {
    "moonep": "it balances within the step, by copies of experts that the step itself asks for: not modelled",
    "deepep": "its kernels are deepep_low_latency (pair; SGLang's decode) and deepep_high_throughput (token; prefill): name one",
    "flashinfer": "SGLang sends a token once to each rank in decode (token) and gathers all tokens in prefill (gather): name one",
    "megamoe": "one kernel overlaps exchange and experts: not modelled",
    "ascend_fuseep": _NPU,
    "ascend_tp": _NPU,
}
"""Names of engines that stand for no kind, and why: those of SGLang's `MoeA2ABackend` (srt/layers/moe/utils.py at 004813e;
`flashinfer`: token_dispatcher/flashinfer.py at 008b79d), and MoonEP, of both engines. SGLang's `none` is reduce, or gather with
data-parallel attention.
"""


def exchange_kind(name: str, parameter: str = "exchange") -> str:
    """The kind of exchange that a kind or a backend stands for; InputError where it is neither."""
    if isinstance(name, str) and name in REFUSED:
        raise InputError(f"`{parameter}` {name}: {REFUSED[name]}")
    if isinstance(name, str) and name in (*KINDS, *BACKENDS):
        return BACKENDS.get(name, name)
    kinds = f" (kinds: {', '.join(KINDS)}; `epsim gpus` lists backends)"
    raise unknown(f"`{parameter}`", shown(name), [*KINDS, *BACKENDS, *REFUSED], kinds)


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
    kind: str = "pair",
    ep_size: ArrayLike,
    tokens_per_rank: ArrayLike,
    received_tokens: ArrayLike | None = None,
    pairs: ArrayLike | None = None,
    ranks_per_node: int = 8,
    nodes_per_token: ArrayLike | None = None,
    dtype: str = "bf16",
    profile: Exchange | None = None,
    sorts_pairs: bool = True,
) -> ExchangeTime:
    """Dispatch and combine of one layer, for the rank with the most traffic, in microseconds.

    Each direction takes (floor^p + max(NVLink, network)^p)^(1/p): a floor for small messages, the bandwidth that is reached
    for large ones, the slower of the two links. `token`, `gather` and `reduce` also copy inside the GPU: rows are
    packed, sorted by expert, and summed; which does not become less with fewer ranks, as the links' work does. The constants
    of `exchange_profile(kind, gpu, backend)` say what they were fitted to, and `epsim gpus --check` how far others' times are
    from them: `token` are NCCL's, which TensorRT-LLM's all-to-all over NVLink keeps to; DeepEP's high-throughput kernels have
    their own, for they are slower, on Blackwell up to twice. `pair` is DeepEP low latency as launched from Python, in BF16
    (H800: its kernels in FP8): an upper bound for decode in CUDA graphs, for the kernels alone, in FP8, take 0.2 to 0.55 of it
    within a node, both ways together, and 0.4 to 0.95 on 16 to 64 H100s. `gather` on 8 B200s or B300s takes up to twice as long
    for 16 to 32 MiB with NCCL 2.27.3 and 2.29.2. Dispatch of `token` and `gather` is counted in FP8 with scales for experts in
    fp8, else in BF16; `pair` as it was measured, whatever the type. What each kind moves, out of and into the busiest rank:

    - token: `received_tokens` over NVLink; over the network a token once to each node that needs it.
    - pair: `pairs`, over both.
    - gather: the tokens of all other ranks over NVLink, those of other nodes shared among the network cards of a node.
    - reduce: nothing to dispatch; an all-reduce is a reduce-scatter and an all-gather of all tokens.

    Assumptions: tokens sit on all ranks alike, so a copy stays on its rank with probability 1 / ep_size and on its
    node with (ranks of a node) / ep_size; the two links work at the same time; nothing overlaps with computation.

    Parameters
    ----------
    model : ModelSpec, str or Path
    gpu : Gpu, str or Path
        Needs scale_out_gb_per_s where the EP group is larger than a node.
    kind : str
        One of KINDS, or a backend of BACKENDS that stands for one, by whose own constants where it has them.
    ep_size, tokens_per_rank : array
        Ranks, and tokens that each of them sends.
    received_tokens : float array
        For 'token': distinct tokens that the rank receives which receives most, its own ones included. By default the
        share that even routing without groups sends to a rank.
    pairs : float array
        For 'pair': (token, expert) pairs of the rank with the most load. By default the mean, top_k x tokens_per_rank.
    ranks_per_node : int
        Ranks joined by NVLink: 8, or 72 in a GB200 NVL72.
    nodes_per_token : float array
        For 'token': nodes that a token is sent to, its own one included. By default as many as independent ranks would
        make of `received_tokens`.
    dtype : str
        Type of the experts, see DISPATCHED_FP8.
    profile : Exchange
        Constants; by default those of the kind and GPU.
    sorts_pairs : bool
        Whether a GPU's sorting of pairs by expert, and the sums of a token's, are counted in.

    Returns
    -------
    ExchangeTime
        `extrapolated` marks all that was not measured: what differs from the measured set-ups in ranks, tokens, top_k, width
        or links, and of 'pair' in imbalance.

    Raises
    ------
    InputError
        Unknown names, numbers out of range, a model without sizes, or a GPU without a network bandwidth.

    Examples
    --------
    1,024 tokens per rank on one node, microseconds:

    >>> def total_us(kind):
    ...     times = exchange_time_us("deepseek-v3", "h200", kind=kind, ep_size=8, tokens_per_rank=1024)
    ...     return round(float(times.total_us), -1)
    >>> [total_us(kind) for kind in ("token", "pair", "gather", "reduce")]
    [660.0, 1360.0, 940.0, 800.0]
    """
    model, gpu, backend, kind = load_model(model), load_gpu(gpu), kind, exchange_kind(kind)
    width = expert_width(model)
    ep, tokens = together(
        ep_size=as_numbers("ep_size", ep_size, 1, 1e6, whole=True),
        tokens_per_rank=as_numbers("tokens_per_rank", tokens_per_rank, 0),
    )
    even = ep * tokens * (1 - (1 - 1 / ep) ** model.top_k)
    ep, tokens, received, load, nodes = together(
        ep_size=ep,
        tokens_per_rank=tokens,
        received_tokens=as_numbers("received_tokens", even if received_tokens is None else received_tokens, 0),
        pairs=as_numbers("pairs", tokens * model.top_k if pairs is None else pairs, 0),
        nodes_per_token=as_numbers("nodes_per_token", 0 if nodes_per_token is None else nodes_per_token, 0),
    )
    node_size = as_numbers("ranks_per_node", ranks_per_node, 1, 1e6, whole=True)
    on_node = np.minimum(ep, node_size)
    if nodes_per_token is None:
        share = np.divide(received, ep * tokens, out=np.zeros(ep.shape), where=tokens > 0).clip(0, 1)
        nodes = ep / on_node * (1 - (1 - share) ** on_node)
    for over, most, text in (
        (received, ep * tokens, "received_tokens: cannot be above ep_size x tokens_per_rank"),
        (load, ep * tokens * model.top_k, "pairs: cannot be above ep_size x tokens_per_rank x top_k"),
    ):
        if (over > most * (1 + 1e-9)).any():
            raise InputError(text)
    off_node = 1 - on_node / ep
    if kind != "none" and gpu.scale_out_gb_per_s is None and (off_node > 0).any():
        raise InputError(
            f"gpu {gpu.name}: scale_out_gb_per_s differs by cluster and is not known; give a .toml file that has it, "
            f"or an ep_size of at most {node_size:g}"
        )
    if kind == "none":
        nothing = np.zeros(ep.shape)
        return ExchangeTime(nothing, nothing.copy(), np.zeros(ep.shape, bool))
    # Values that the busiest rank moves over each link; every copy may take NVLink as its last hop.
    everything = ep * tokens
    up, out = {
        "token": (received * (1 - 1 / on_node), tokens * nodes * off_node),
        "pair": (load * (1 - 1 / on_node), load * off_node),
        "gather": (everything * (1 - 1 / ep), everything * off_node / on_node),
        "reduce": (2 * everything * (1 - 1 / ep), 2 * everything * off_node / on_node),
    }[kind]
    if profile is None:
        profile = exchange_profile(kind, gpu.name, backend)
        if kind in DISPATCHED_FP8 and dtype == "fp8":
            dispatch, combine = profile.scale_up_fraction
            profile = replace(
                profile,
                bytes_per_value=(FP8_WITH_SCALES, 2.0),
                scale_up_fraction=(dispatch * profile.fp8_share, combine),
            )
    copies = {*profile.copies} - ({"pairs"} if not sorts_pairs else set())
    copied, times = _copied_rows(copies, kind, ep, tokens, tokens * model.top_k, received), []
    copy_us_per_byte = 1 / (gpu.hbm_tb_per_s * 1e6 * (gpu.copy_fraction or profile.copy_fraction))
    for direction in (0, 1):
        value_bytes = width * profile.bytes_per_value[direction]
        up_us = up * value_bytes / (gpu.scale_up_gb_per_s * 1e3 * profile.scale_up_fraction[direction])
        out_gb_per_s = (gpu.scale_out_gb_per_s or 1.0) * profile.scale_out_fraction[direction]
        link_us = np.maximum(up_us, out * value_bytes / (out_gb_per_s * 1e3))
        floor_us = profile.floor_us[direction] * np.maximum(tokens, 1.0) ** -profile.floor_falls[direction]
        passes = 2 if kind == "reduce" else 1  # an all-reduce is a reduce-scatter and an all-gather
        floor_us = floor_us + profile.hop_us * passes * (on_node - 1)
        is_large = np.minimum(everything * value_bytes / profile.large_bytes, 1)
        floor_us = floor_us + is_large * np.maximum(profile.large_floor_us - floor_us, 0)
        p = profile.sharpness
        copy_us = copied[direction] * value_bytes * copy_us_per_byte
        times.append(np.where(ep > 1, (floor_us**p + link_us**p) ** (1 / p), 0) + copy_us)
    if kind == "reduce":  # nothing is dispatched, but pairs are sorted
        sort_us = copied[0] * width * profile.bytes_per_value[0] * copy_us_per_byte
        times = [np.zeros(ep.shape), times[1] + sort_us]
    return ExchangeTime(times[0], times[1], ~_is_measured(model, gpu, profile, ep, tokens, load, on_node))


def _copied_rows(
    copies: set[str], kind: str, ep: np.ndarray, tokens: np.ndarray, pairs: np.ndarray, received: np.ndarray
) -> list[np.ndarray]:
    """Rows that a rank reads or writes in its own memory for dispatch and combine, as `epsim measure --layer` runs them.

    Pairs, those of the mean rank, since the imbalance of pairs is the experts': sorted by expert (a row read, one written), and
    read to be summed. Tokens of `token`: each row that is sent is packed (read, written), and what comes back is read and
    summed; of `gather` and `reduce`: all sums are written.
    """
    nothing = np.zeros(ep.shape)
    of_pairs = (2 * pairs, pairs + (received if kind == "token" else 0)) if "pairs" in copies else (nothing, nothing)
    of_tokens = (2 * received, received + tokens) if kind == "token" else (nothing, ep * tokens)
    if "tokens" not in copies:
        return list(of_pairs)
    return [a + np.where(ep > 1, b, 0) for a, b in zip(of_pairs, of_tokens, strict=True)]


def _is_measured(
    model: ModelSpec,
    gpu: Gpu,
    profile: Exchange,
    ep: np.ndarray,
    tokens: np.ndarray,
    load: np.ndarray,
    on_node: np.ndarray,
) -> np.ndarray:
    """Where a time is of a published set-up: DeepSeek-V3's sizes, no imbalance, nodes of 8; of any type."""
    v3, (least_ep, most_ep), (least, most) = (
        load_model("deepseek-v3"),
        profile.measured_ep_size,
        profile.measured_tokens,
    )
    preset = load_gpu(gpu.name) if gpu.name in profile.measured_on else None
    if (
        preset is None
        or (gpu.scale_up_gb_per_s, gpu.scale_out_gb_per_s) != (preset.scale_up_gb_per_s, preset.scale_out_gb_per_s)
        or (model.top_k, expert_width(model)) != (v3.top_k, expert_width(v3))
    ):
        return np.zeros(ep.shape, bool)
    is_even = (np.abs(load - tokens * model.top_k) <= 1e-9 * load) | (profile.kind != "pair")
    inside = (ep >= least_ep) & (ep <= most_ep) & (tokens >= least) & (tokens <= most)
    return inside & is_even & (on_node == np.minimum(ep, 8))
