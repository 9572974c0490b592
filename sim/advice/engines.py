"""What serving engines do where a placement is asked for."""

from typing import NamedTuple

from sim.cost.exchange import BACKENDS, KINDS, SGLANG, exchange_kind
from sim.cost.tables import exchange_profile
from sim.model import ModelSpec
from sim.placement import BUDGET, is_load_aware, split_name, why_linear

DEFAULT_BACKEND = "allgather_reducescatter"
"""vLLM's own default."""


def exchange_of(backend: str, data_parallel: int, gpu: str) -> str:
    """The exchange that vLLM runs, as times name it: the backend where it has times of its own on a GPU, else its kind; and an
    all-reduce where there is no data parallelism.

    With one data-parallel rank attention is tensor parallel, all ranks have all tokens and no all2all backend is used
    (`FusedMoEParallelConfig.use_all2all_kernels`).
    """
    kind = exchange_kind(backend, "backend")
    if backend in BACKENDS and data_parallel == 1:
        return "reduce"
    return kind if kind == "none" else exchange_profile(kind, gpu, backend).kind


class Engine(NamedTuple):
    """What becomes of a placement."""

    runs_as: str  # the placement that vLLM 0.33 runs; empty where it has no such option
    how: str  # how to turn it on, and what to know


def engine_of(placement: str, model: ModelSpec, ep_size: int, backend: str, data_parallel: int) -> Engine:
    """What vLLM runs where a placement is asked for, and the ways to it in other engines.

    vLLM 0.33: `why_linear` and `EPLBConfig`; SGLang 0.5.23: server arguments.
    """
    if placement == "linear":
        return Engine("linear", "the default of vLLM and SGLang")
    if placement == "random":
        return Engine("", "no engine has it as an option; it stands for any map that ignores loads and groups")
    if placement.startswith("file:"):
        return Engine(
            placement,
            "a map of its own: SGLang --init-expert-location FILE, TensorRT-LLM's load balancer or vllm-ascend's expert map; "
            "vLLM 0.33 has no option that reads one",
        )
    base = split_name(placement)[0]
    if base in ("node_aware", "linear_legacy", "linear", "eplb_refined"):
        return Engine(placement, "no engine has it as an option; epsim export writes it as a map that SGLang reads")
    if base == BUDGET:
        return Engine(
            placement,
            "layers with different numbers of slots: epsim export writes the map for vllm-ascend, which reads each layer's own; "
            "vLLM, SGLang and TensorRT-LLM have one number for all layers, so that it is compared and not judged",
        )
    if is_load_aware(placement):
        return Engine(
            placement,
            "vLLM: --enable-eplb, for N redundant slots with --eplb-config '{\"num_redundant_experts\": N}', if it supports "
            f"EPLB for the model; it starts with expert p % {model.n_experts} in slot p and balances on the loads of recent "
            "steps at every rebalance. SGLang: --enable-eplb --ep-num-redundant-experts N, or a fixed map that epsim export "
            "writes: --init-expert-location FILE",
        )
    if backend in SGLANG:
        return Engine(placement, "SGLang: epsim export writes it as a map, --init-expert-location FILE")
    reason = why_linear(model, ep_size, "" if backend in KINDS else backend, data_parallel)
    if reason:
        return Engine("linear", f"vLLM falls back to linear: {reason}")
    return Engine("round_robin", "vLLM: --expert-placement-strategy round_robin; not with EPLB or redundant experts")
