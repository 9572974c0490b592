"""Options of verbs that read, make, measure or write files: each declared once, as in `sim.options`."""

from dataclasses import dataclass
from typing import Any

from sim.options import MAX_RANKS_PER_NODE, MODEL_HELP, THREADS_HELP
from sim.options.declare import Options, option
from sim.options.kinds import (
    FILE,
    MAX_TOKENS,
    NAME,
    NAMES,
    SEED,
    THREADS,
    WHOLE_NUMBERS,
    Choice,
    Flag,
    Folder,
    Kind,
    Number,
    Seconds,
    Whole,
)  # fmt: skip

OF_RANKS, OF_LAYERS = ("error", "constants", "missed", "gain"), ("sum", "gain", "predicted")
"""Tables of measured ranks, and of measured layers."""


@dataclass(frozen=True, kw_only=True)
class FileOptions(Options):
    """A file of recorded routing or load counts: how it is read, and what it is compared with."""

    model: str = option(NAME, f"the model that the file was taken on: {MODEL_HELP}")
    phase: str | None = option(
        NAME, "decode (default) or prefill: the steps that are read of a set of traces", default=None
    )
    against: Any = option(FILE, "another file of the same layers, to compare with", default=None)
    plot: Any = option(Folder(), "draw figures there", default=None)
    all_layers: bool = option(Flag(), "a row for every layer", default=False)
    hold_out: bool = option(Flag(), "first fit each half and predict the rank imbalance of the other", default=False)
    half: bool = option(
        Flag(), "with `hold_out`: write the fit of the first half (even sequences, or first steps)", default=False
    )
    group_sigma: float | None = option(
        Number(0, 5), "group effect of a grouped router, which loads do not tell (default: 0.4)", default=None
    )
    n_windows: int | None = option(
        Whole(), "windows that the file is cut into (default: 8)", flag="--windows", default=None
    )
    threads: int | None = option(THREADS, THREADS_HELP, default=None)
    seed: int = option(SEED, "same seed, same answer", default=0)


_IMBALANCE = "mean over layers of a step's max / mean rank load, under linear placement"


@dataclass(frozen=True, kw_only=True)
class MadeOptions(Options):
    """A trace of synthetic traffic."""

    title = "the trace"
    tokens: int = option(Whole(1, MAX_TOKENS), "tokens of the trace", default=65536)
    sequences: int = option(Whole(1, MAX_TOKENS), "sequences of the trace", default=256)
    imbalance: float | None = option(Number(1, 2**15), f"scale the popularity to this {_IMBALANCE}", default=None)
    ep_sizes: int | None = option(Whole(1, 2**15), "EP size of `imbalance`", flag="--ep", default=None)
    seed: int = option(SEED, "same seed, same trace", default=0)


@dataclass(frozen=True, kw_only=True)
class MatchOptions(Options):
    """An imbalance that was read off a log."""

    title = "your log"
    imbalance: float = option(Number(1, 2**15), _IMBALANCE)
    ep_sizes: int = option(Whole(2, 2**15), "its EP size", flag="--ep")
    tokens: int = option(Whole(1, MAX_TOKENS), "its tokens per step, in all ranks", default=16384)
    workloads: Any = option(
        NAMES, "workloads to compare (default: every preset that fits the model)", flag="--workload", default=None
    )
    seed: int = option(SEED, "same seed, same answer", default=0)


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(Options):
    """What is measured on GPUs, or shown of what was measured. The defaults of lists are those of `epsim measure`."""

    title = "what is measured"
    workload: Any = option(NAMES, "traffic (default: chat,gpqa-tilted)", default=None)
    ep_sizes: Any = option(
        WHOLE_NUMBERS, "EP sizes (default: 8,16,32,64; with --layer one, the number of GPUs)", flag="--ep", default=None
    )
    tokens: Any = option(
        WHOLE_NUMBERS,
        "tokens per step over the EP group (default: 8..16384; with --layer 8,64,512,2048,8192,16384)",
        default=None,
    )
    placement: Any = option(NAMES, "placements (default: linear,round_robin)", default=None)
    dtype: Any = option(NAMES, "types of the weights (default: bf16,fp8; with --layer one, bf16)", default=None)
    exchange: Any = option(NAMES, "with --layer: kinds of exchange (default: token,pair,gather,reduce)", default=None)
    steps: int = option(Whole(), "steps to sample, each of a fresh layer", default=16)
    seed: int = option(Whole(), "same seed, same steps and ranks", default=0)
    device: str = option(
        Choice(names=("cuda", "cpu")), "cuda (needs PyTorch: epsim[gpu]), or cpu for toy sizes", default="cuda"
    )
    gpu: str | None = option(
        NAME, "GPU that predictions are for (epsim gpus; default: by the device's name)", default=None
    )
    time_limit: float | None = option(
        Seconds(), "stop after this time, as in 90s or 8m; steps that were measured are kept", default=None
    )
    layer: bool = option(
        Flag(), "measure whole layers, one rank on each GPU (`ep_sizes`; default: all GPUs)", default=False
    )
    out: str | None = option(
        Kind(metavar="FILE.csv"), "where the rows go; what the device reaches goes to FILE.json", default=None
    )


@dataclass(frozen=True, kw_only=True)
class MeasuredOptions(Options):
    """A file of what was measured, and what is shown of it."""

    title = "what was measured"
    show: str | None = option(
        Kind(metavar="FILE.csv"), "measure nothing; print the tables of a file that was written", default=None
    )
    table: str | None = option(
        NAME, f"one of them: {', '.join(OF_RANKS)}; of layers: {', '.join(OF_LAYERS)}", default=None
    )
    plot: bool = option(Flag(), "draw the figures beside the file", default=False)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """A placement of a model's layers, and the file of an engine that it becomes."""

    title = "the map"

    placement: str = option(Kind(metavar="P"), "a placement (epsim placements), as in eplb+32")
    ep_size: int = option(Whole(metavar="R"), "EP size", flag="--ep")
    format: str = option(Kind(metavar="F"), "vllm, sglang, trtllm or vllm-ascend")
    out: str = option(FILE, "file to write")
    fit_on: str | None = option(
        FILE,
        "traffic that eplb is fitted on, layer by layer: recorded routing or load counts (as epsim traffic reads them)",
        alias="--traffic",
        default=None,
    )
    gpu: str | None = option(
        NAME,
        "of eplb_budget: spend copies by the predicted time on this GPU (epsim gpus), as advise does (default: by the busiest "
        "rank's load)",
        default=None,
    )
    tokens: int | None = option(
        Whole(1, MAX_TOKENS), "with `gpu`: tokens per step over the EP group (default: 512 on each rank)", default=None
    )
    ranks_per_node: int = option(Whole(1, MAX_RANKS_PER_NODE), "for node_aware and eplb", default=8)
    layers: int | None = option(
        Whole(1, 1024), "layers of other placements (default: the model's MoE layers)", default=None
    )
    first_layer: int | None = option(
        Whole(0, 2**20),
        "decoder layer of the first MoE layer, for a model that does not say which of its layers are MoE layers; those of the "
        "map follow one another from there",
        default=None,
    )
