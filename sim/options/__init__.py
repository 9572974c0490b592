"""Options, each declared once: its name, type, range, default, unit and help.

A class of options is a frozen dataclass whose fields are made by `option`. From it derive

- the options of the command line: `add_options(parser, SweepOptions)`, and `given(arguments, SweepOptions)` to read them back;
- the keys of a TOML file (`--config`): the options without their dashes (`config_words`);
- the checks of a Python call: `SweepOptions(**keywords)` raises InputError for what is out of range;
- signature and docstring of the functions that take them: `@takes(SweepOptions)`;
- what identifies a result in its provenance: `identity(values)`.

To add an option, add a field. To add a verb, see `sim.cli`; it takes the classes that it needs, and gives `type=` one of
`sim.options.kinds` to options of its own.
A message about a parameter names it in backquotes, as in "`ep_sizes` 300: ...". The command line writes the option in its place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sim.errors import InputError
from sim.options.declare import Options, option, optional
from sim.options.kinds import (
    FILE,
    MAX_TOKENS,
    NAME,
    NAMES,
    PRECISION,
    RISK,
    SEED,
    THREADS,
    WHOLE_NUMBERS,
    Choice,
    Flag,
    Folder,
    Kind,
    Listed,
    Measured,
    NewFile,
    Number,
    PerRank,
    Placements,
    Positive,
    Seconds,
    Share,
    Whole,
)

MAX_TRIALS = 10**9
MAX_RANKS_PER_NODE = 2**15
THRESHOLDS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
"""Imbalance thresholds of tail.csv."""
LAYER_SETS, MOST_STEPS = 32, 512
LAYER_CORRELATION = 1.8
"""Variance of a step's mean imbalance over its layers, relative to independent layers: 1.77, the geometric mean of 18 cells (1.2
to 2.9), of gpt-oss-20b's recorded steps under continuous batching (AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting at 72b368f):
epsim step --model gpt-oss-20b --traffic FILE --ep 4,8,16 --tokens 8,64,256 --steps 4096. Replays of other models' traces: 1.3 to
2.5."""
DEFAULT_TRIALS = 10_000
DEFAULT_MAX_TRIALS = 1_000_000
TABLES_OF_RANKS, TABLES_OF_LAYERS = ("error", "constants", "missed", "gain"), ("sum", "gain", "predicted")
"""Tables of measured ranks, and of measured layers."""


_MODEL = "preset (epsim models), its Hugging Face id, or a config.json or the folder that it is in"
_WORKLOAD = (
    "preset (epsim workloads), file:TRACE of recorded routing, or a .toml file, as epsim traffic fit writes it of recorded "
    "routing or load counts"
)
_THREADS = "threads (default: all processors of this process)"


@dataclass(frozen=True, kw_only=True)
class TrafficOptions(Options):
    """The model, and what comes in: arguments of `load_model` and `load_workload`."""

    title = "model and traffic"
    model: str = option(NAME, _MODEL, default="deepseek-v3")
    workload: str = option(NAME, _WORKLOAD, default="chat")
    phase: str | None = optional(
        NAME,
        "of recorded or fitted routing: decode (default), the tokens of a step are of different sequences, after the prompt "
        "where answers count their tokens; or prefill, consecutive ones of a sequence, of the prompt",
    )
    tokens_per_request: int | None = optional(
        Whole(1, MAX_TOKENS),
        "consecutive tokens of each request in a decode step, as speculative decoding verifies them, usually 2 to 8: they share "
        "the request's effect; must divide the tokens of a step (default: 1)",
    )
    dummy_tokens: int | None = optional(
        Whole(), "padding tokens per step, as idle data-parallel ranks run them (default: 0)"
    )


@dataclass(frozen=True, kw_only=True)
class CellOptions(Options):
    """The cells of a grid, and the random stream."""

    title = "what is sampled"
    ep_sizes: list[int] = option(WHOLE_NUMBERS, "EP sizes, each from 1 to the number of experts", flag="--ep")
    tokens: list[int] = option(
        Listed(of=Whole(1, MAX_TOKENS)), "tokens per step over the whole EP group (`tokens_per_rank`: on each rank)"
    )
    tokens_per_rank: bool = option(PerRank(), "instead of `tokens`: tokens per step on each rank", default=False)
    ranks_per_node: int = option(
        Whole(1, MAX_RANKS_PER_NODE),
        "ranks joined by NVLink: the nodes of placements (node_aware, eplb) and of nodes per token",
        default=8,
        identifies=True,
        is_last=True,
    )
    seed: int = option(SEED, "same seed, same rows, on any number of threads", default=0, identifies=True, is_last=True)


@dataclass(frozen=True, kw_only=True)
class PlacedOptions(CellOptions):
    """Placements in each cell, some of which may be fitted."""

    placements: Any = option(
        Placements(), "placements (epsim placements); changes, where shown, are against the first", flag="--placement"
    )
    fit_tokens: int | None = optional(
        Whole(1, MAX_TOKENS),
        "of synthetic traffic: tokens of each layer draw, other than those scored, that eplb is fitted on (default: 16384)",
        is_last=True,
    )
    fit_on: Any = optional(
        FILE,
        "of recorded or fitted traffic: other traffic of the same layers to fit eplb on (default: a part of the traffic itself)",
        is_last=True,
    )


@dataclass(frozen=True, kw_only=True)
class SweepOptions(PlacedOptions):
    """What `sim.sweep` takes beside model and workload, and what decides its rows."""

    trials: int | None = optional(
        Whole(1, MAX_TRIALS),
        f"steps scored in each cell (default: {DEFAULT_TRIALS}); not with a precision",
        identifies=True,
    )
    draws: int | None = optional(
        Whole(),
        "independent layer draws that the trials come from (default: a fresh layer for every step; of recorded traffic its "
        "layers). Intervals rest on the variation between draws",
    )
    precision: float | None = optional(
        PRECISION,
        "instead of `trials`: go on until the 95% interval of each mean imbalance has at most this relative half-width, as in 1%",
    )
    precision_tail: float | None = optional(
        PRECISION, "the same for each P(imbalance >= x) that is not shown to be below 1e-3, as in 10%"
    )
    max_trials: int | None = optional(
        Whole(1, MAX_TRIALS), f"the most trials under a precision (default: {DEFAULT_MAX_TRIALS})"
    )
    thresholds: Sequence[float] = option(
        Listed(of=Number(1, 2**15)), "imbalance thresholds of the tail", default=THRESHOLDS
    )
    bound_layers: int | None = optional(
        Whole(0, 4096),
        "layers used for analytic tail bounds (default: up to 32, none where that takes long; 0: no bounds)",
        identifies=True,
    )
    tail_floor: float | None = optional(
        Number(1e-12, 0.1),
        "of synthetic traffic with drawn popularity: estimate tails over all layers down to this probability, as in 1e-8 (some "
        "ten seconds a cell)",
    )
    replica_choice: str = option(
        Choice(names=("even", "vllm_hash", "in_step")),
        "copy of a replicated expert that a token goes to: even; vllm_hash of the token's index in the step; or in_step, the "
        "best split of each step's pairs that there is, as balancers within the step (LPLB) strive for",
        default="even",
    )
    received: str = option(
        Choice(names=("auto", "on", "off")),
        "count the tokens that ranks and nodes receive, on all tokens of a step: on, off, or auto: where single tokens can be "
        "had and fit in memory",
        default="auto",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Where and how long a sweep runs: nothing that changes its rows."""

    title = "where and how long it runs"
    time_limit: float | None = optional(
        Seconds(),
        "stop a precision run after this time (not before 1024 trials), as in 90s or 10m; the same command goes on",
    )
    threads: int | None = optional(
        THREADS, "threads, or workers of a local cluster (default: all processors of this process)"
    )
    executor: str = option(
        Choice(names=("threads", "cuda", "dask")),
        "threads; cuda: the NVIDIA GPUs of this machine (extra: epsim[cuda]); or dask: a local cluster, or the one of "
        "`scheduler` (extra: epsim[cluster])",
        default="threads",
    )
    scheduler: str | None = optional(Kind(metavar="ADDRESS"), "address of a Dask scheduler, as in tcp://HOST:8786")


@dataclass(frozen=True, kw_only=True)
class StepOptions(CellOptions):
    """Whole steps through all layers: what `sim.predict_gain` and `sim.predict_steps` sample."""

    layer_sets: int = option(
        Whole(1, 4096), "independent sets of the model's layers, of synthetic traffic", default=LAYER_SETS
    )
    most_steps: int = option(
        Whole(1, 10**6), "steps of each size, fewer where they are large", flag="--steps", default=MOST_STEPS
    )
    threads: int | None = optional(THREADS, _THREADS)


@dataclass(frozen=True, kw_only=True)
class LayerOptions(Options):
    """What layers of a step have to do with each other."""

    title = CellOptions.title
    layer_correlation: float | None = optional(
        Measured(1, 1e4, alone=LAYER_CORRELATION),
        "variance of a step's mean imbalance over its layers, relative to independent layers (default: independent). Without a "
        f"number {LAYER_CORRELATION:g}, as on gpt-oss-20b's recorded steps; epsim step --traffic FILE measures yours",
    )

    def check_layers(self, n_layers: int) -> None:
        """Refuse more than layers can have that are all alike."""
        if self.layer_correlation is not None and self.layer_correlation > n_layers:
            raise InputError(
                f"`layer_correlation` {self.layer_correlation:g}: must be from 1 to the number of MoE layers, {n_layers}"
            )


@dataclass(frozen=True, kw_only=True)
class CapacityOptions(LayerOptions, PlacedOptions):
    """What `sim.capacity` takes beside model and workload."""

    risk: float = option(RISK, "probability with which a capacity may be exceeded", default=1e-3)
    horizon_steps: int | None = optional(
        Whole(1, 10**15), "steps of a horizon; without it there are no rows of scope 'horizon'"
    )
    capacity_factor: float | None = optional(
        Number(1, 1e4),
        "also judge a given capacity, a factor of the balanced load of at least 1: what it risks and drops",
    )
    deployments: int = option(
        Whole(2, 10**5),
        "deployments to draw of synthetic traffic whose layers are not known (at most 80 where placements are fitted)",
        default=400,
    )
    threads: int | None = optional(THREADS, _THREADS)


@dataclass(frozen=True, kw_only=True)
class LinkOptions(PlacedOptions):
    """What `sim.rank_traffic` takes beside model and workload."""

    title = "output"
    trials: int = option(Whole(1, MAX_TRIALS), "steps of each cell", default=1000)
    draws: int | None = optional(
        Whole(), "independent layer draws that the trials come from (default: a fresh layer for every step)"
    )
    source_imbalance: Any = option(
        Listed(of=Number(), may_repeat=True),
        "how unevenly source ranks hold the tokens: the busiest one's over the mean (each next one has the same fraction of the "
        "one before), or a list of all shares",
        default=1.0,
    )
    threads: int | None = optional(THREADS, _THREADS)


@dataclass(frozen=True, kw_only=True)
class GpuOptions(Options):
    """What times are for, and what they are compared with."""

    title = "what is compared"
    gpu: str = option(NAME, "GPU (epsim gpus), or a .toml file of your own", default="h200")
    gpus: Any = option(NAMES, "GPUs (epsim gpus), or .toml files of your own", flag="--gpu", default="h200")
    baseline: str = option(NAME, "placement to compare with", default="linear")
    least_saved: float = option(
        Share(),
        "smallest saved share of a step that is worth a trial",
        flag="--worth",
        default=0.01,
    )


EXCHANGES = (
    "pair (DeepEP low latency as launched from Python, an upper bound for decode in CUDA graphs), token, gather, reduce, none "
    "and backends of these kinds (epsim gpus)"
)


@dataclass(frozen=True, kw_only=True)
class TimeOptions(Options):
    """What turns loads into times."""

    title = "times"
    exchange: str = option(
        NAME,
        f"dispatch and combine, one of {EXCHANGES}",
        default="pair",
    )
    dtype: str | None = optional(
        NAME,
        "type of weights and inputs: fp8, bf16 or fp4 (default: what the model's experts are stored in; fp8 where that is none "
        "of them, or a GPU does not compute in it)",
    )
    network_gb_per_s: float | None = optional(
        Positive(metavar="GB/S"),
        "network bandwidth of a GPU per direction (default: the GPU's; 50 if it has none)",
        flag="--network-gb",
    )


@dataclass(frozen=True, kw_only=True)
class RestOptions(Options):
    """What a step does beside routed experts and their exchange: one of the first two; and what a balancer takes of it."""

    title = "the rest of a step"
    moe_share: float | None = optional(
        Share(1e-6, allowed="a share from 0.0001% to 100%, as in 40%"),
        "share of a step that experts and exchange take, as in 40%",
    )
    step_us: float | None = optional(
        Positive(most=1e9, scale=1e3, metavar="MS", allowed="a time above 0, and at most 1000 seconds"),
        "instead of `moe_share`: the baseline's measured step time",
        flag="--step-ms",
    )
    balancer_us: float | None = optional(
        Number(0, 1e6, metavar="US"),
        "of placement in_step: what the balancer takes of each layer (default: 100 within a node, 200 across nodes, as LPLB's "
        "authors say; not verified)",
    )


@dataclass(frozen=True, kw_only=True)
class ClaimOptions(Options):
    """What published claims are tried with. Attention, shared experts, norms and the sampler take a part of every step too."""

    seed: int = option(SEED, "same seed, same table", default=0)
    effort: float = option(
        Number(0.01, 100), "scales the number of trials; 0.1 is quick, with wide intervals", default=1.0
    )
    plausible_share: float = option(
        Share(1e-6, allowed="a share above 0%, at most 100%"),
        "the most of a step that routed experts and exchange may take for a gain to be put down to them",
        default=0.8,
    )
    threads: int | None = optional(THREADS, _THREADS)


@dataclass(frozen=True, kw_only=True)
class FigureOptions(Options):
    """How figures are written."""

    title = "output"
    formats: Any = option(Listed(of=Choice(names=("png", "svg"))), "png, svg or both", flag="--format", default="png")


@dataclass(frozen=True, kw_only=True)
class PlotOptions(FigureOptions):
    """How the figures of a sweep are drawn."""

    tokens: int | None = optional(
        Whole(1, MAX_TOKENS), "tokens per step of the worst-case figures (default: nearest to 64)"
    )
    deepest: float = option(
        Number(1e-300, 0.1, metavar="P"), "probability down to which worst cases are drawn", default=1e-6
    )


@dataclass(frozen=True, kw_only=True)
class FileOptions(Options):
    """A file of recorded routing or load counts: how it is read, and what it is compared with."""

    model: str = option(NAME, f"the model that the file was taken on: {_MODEL}")
    phase: str | None = optional(NAME, "decode (default) or prefill: the steps that are read of a set of traces")
    against: Any = optional(FILE, "another file of the same layers, to compare with")
    plot: Any = optional(Folder(), "draw figures there")
    all_layers: bool = option(Flag(), "a row for every layer", default=False)
    hold_out: bool = option(Flag(), "first fit each half and predict the rank imbalance of the other", default=False)
    placement: str = option(Kind(metavar="P"), "with `hold_out`: placement that needs no loads", default="linear")
    half: bool = option(Flag(), "with `hold_out`: write the fit of the first half", default=False)
    group_sigma: float | None = optional(
        Number(0, 5), "group effect of a grouped router, which loads do not tell (default: 0.4)"
    )
    n_windows: int | None = optional(Whole(), "windows that the file is cut into (default: 8)", flag="--windows")
    threads: int | None = optional(THREADS, _THREADS)
    seed: int = option(SEED, "same seed, same answer", default=0)


_IMBALANCE = "mean over layers of a step's max / mean rank load, under linear placement"


@dataclass(frozen=True, kw_only=True)
class MadeOptions(Options):
    """A trace of synthetic traffic."""

    title = "the trace"
    tokens: int = option(Whole(1, MAX_TOKENS), "tokens of the trace", default=65536)
    sequences: int = option(Whole(1, MAX_TOKENS), "sequences of the trace", default=256)
    imbalance: float | None = optional(Number(1, 2**15), f"scale the popularity to this {_IMBALANCE}")
    ep_sizes: int | None = optional(Whole(1, 2**15), "EP size of `imbalance`", flag="--ep")
    seed: int = option(SEED, "same seed, same trace", default=0)


@dataclass(frozen=True, kw_only=True)
class MatchOptions(Options):
    """An imbalance that was read off a log."""

    title = "your log"
    imbalance: float = option(Number(1, 2**15), _IMBALANCE)
    ep_sizes: int = option(Whole(2, 2**15), "its EP size", flag="--ep")
    tokens: int = option(Whole(1, MAX_TOKENS), "its tokens per step, in all ranks", default=16384)
    workloads: Any = optional(
        NAMES, "workloads to compare (default: every preset that fits the model)", flag="--workload"
    )
    seed: int = option(SEED, "same seed, same answer", default=0)


@dataclass(frozen=True, kw_only=True)
class MeasureOptions(Options):
    """What is measured on GPUs, or shown of what was measured. The defaults of lists are those of `epsim measure`."""

    title = "what is measured"
    workload: Any = optional(NAMES, "traffic (default: chat,gpqa-tilted)")
    ep_sizes: Any = optional(
        WHOLE_NUMBERS, "EP sizes (default: 8,16,32,64; with --layer one, the number of GPUs)", flag="--ep"
    )
    tokens: Any = optional(
        WHOLE_NUMBERS, "tokens per step over the EP group (default: 8..16384; with --layer 8,64,512,2048,8192,16384)"
    )
    placement: Any = optional(NAMES, "placements (default: linear,round_robin)")
    dtype: Any = optional(NAMES, "types of the weights (default: bf16,fp8; with --layer one, bf16)")
    exchange: Any = optional(NAMES, "with --layer: kinds of exchange (default: token,pair,gather,reduce)")
    steps: int = option(Whole(), "steps to sample, each of a fresh layer", default=16)
    seed: int = option(Whole(), "same seed, same steps and ranks", default=0)
    device: str = option(
        Choice(names=("cuda", "cpu")), "cuda (needs PyTorch: epsim[gpu]), or cpu for toy sizes", default="cuda"
    )
    gpu: str | None = optional(NAME, "GPU that predictions are for (epsim gpus; default: by the device's name)")
    time_limit: float | None = optional(
        Seconds(), "stop after this time, as in 90s or 8m; steps that were measured are kept"
    )
    layer: bool = option(
        Flag(), "measure whole layers, one rank on each GPU (`ep_sizes`; default: all GPUs)", default=False
    )
    out: str | None = optional(Kind(metavar="FILE.csv"), "where the rows go; what the device reaches goes to FILE.json")


@dataclass(frozen=True, kw_only=True)
class MeasuredOptions(Options):
    """A file of what was measured, and what is shown of it."""

    title = "what was measured"
    show: str | None = optional(
        Kind(metavar="FILE.csv"), "measure nothing; print the tables of a file that was written"
    )
    table: str | None = optional(
        NAME, f"one of them: {', '.join(TABLES_OF_RANKS)}; of layers: {', '.join(TABLES_OF_LAYERS)}"
    )
    plot: bool = option(Flag(), "draw the figures beside the file", default=False)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """A placement of a model's layers, and the file of an engine that it becomes."""

    title = "the map"

    placement: str = option(Kind(metavar="P"), "a placement (epsim placements), as in eplb+32")
    ep_size: int = option(Whole(metavar="R"), "EP size", flag="--ep")
    format: str = option(Kind(metavar="F"), "vllm, sglang, trtllm or vllm-ascend")
    out: Path = option(NewFile(), "file to write")
    fit_on: str | None = optional(
        FILE,
        "traffic that eplb is fitted on, layer by layer: recorded routing or load counts (as epsim traffic reads them)",
        alias="--traffic",
    )
    gpu: str | None = optional(
        NAME,
        "of eplb_budget: spend copies by the predicted time on this GPU (epsim gpus), as advise does (default: by the busiest "
        "rank's load)",
    )
    tokens: int | None = optional(
        Whole(1, MAX_TOKENS), "with `gpu`: tokens per step over the EP group (default: 512 on each rank)"
    )
    ranks_per_node: int = option(Whole(1, MAX_RANKS_PER_NODE), "for node_aware and eplb", default=8)
    layers: int | None = optional(Whole(1, 1024), "layers of other placements (default: the model's MoE layers)")
    first_layer: int | None = optional(
        Whole(0, 2**20),
        "decoder layer of the first MoE layer, for a model that does not say which of its layers are MoE layers; those of the "
        "map follow one another from there",
    )
