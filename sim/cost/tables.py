"""Constants of the named kernels, and the published measurements behind them."""

import tomllib
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from math import inf
from typing import Any


@dataclass(frozen=True)
class GroupedGemm:
    """What an implementation of the experts reaches of a GPU.

    Attributes
    ----------
    name, source : str
        The kernel, and what its constants were fitted to.
    launch_us : float
        Time of a layer without work: launches, activation and quantisation kernels, ramp-up.
    idle_us, spread_us : float
        Time of each expert of the rank without a token, and of many distinct experts over that of one.
    sharpness : float
        Exponent of the sum of the times of memory and arithmetic: they add up at 1, the longer one counts at infinity.
    bandwidth_fraction, peak_fraction : float
        Shares of the memory bandwidth and of the dense peak that it reaches, on a GPU that has none of its own.
    tile_rows : int
        Rows that each expert's tokens are padded to a multiple of.
    large_from_rows, large_tile_rows, large_peak_fraction : float
        Where a rank's experts have so many rows in the mean, another kernel of the library runs: its tile, and its share of the
        peak. Padded rows are then counted expert by expert, wherever the tokens of each are known.
    shares : dict of (bandwidth_fraction, peak_fraction[, large_peak_fraction])
        Of GPUs, by preset, on which this kernel was measured, and which come before a GPU's own.
    """

    name: str
    launch_us: float
    idle_us: float
    spread_us: float
    sharpness: float
    bandwidth_fraction: float
    peak_fraction: float
    tile_rows: int
    source: str
    large_from_rows: float = inf
    large_tile_rows: int = 0
    large_peak_fraction: float = 0.0
    shares: dict[str, list[float]] = field(default_factory=dict)


FP8_WITH_SCALES = 1 + 4 / 128
"""Bytes of a value in FP8 with a 4-byte scale for every 128 values, as DeepEP sends them."""
PAIR_SHARPNESS = 1.5
"""`Exchange.sharpness` of the pair kind, chosen by leaving one size out of the published tables."""


@dataclass(frozen=True)
class Exchange:
    """What an exchange of one kind reaches of the links. Pairs are of dispatch and combine.

    Attributes
    ----------
    kind : str
        token, pair, gather or reduce, or a backend whose kernels were measured apart.
    gpus : tuple of str
        Presets that it is for; empty: all others.
    kernels : str
        Whose times the constants stand for.
    floor_us : pair of float
        Time of a direction with hardly any traffic.
    hop_us : float
        What a ring adds to the floor for each further rank of the node, in each of its two passes.
    large_floor_us, large_bytes : float
        The floor that a message of so many bytes has; it rises to that in proportion.
    floor_falls : pair of float
        The floor falls with the tokens per rank to this power.
    bytes_per_value : pair of float
        FP8 with a 4-byte scale for every 128 values, and BF16.
    scale_up_fraction, scale_out_fraction : pair of float
        Shares of NVLink and network bandwidth that are reached; of the network by default that of token.
    fp8_share : float
        Share of that on NVLink which dispatch reaches in FP8, whose rows are as many and half as large.
    sharpness : float
        Exponent of the sum of the times of floor and links: they add up at 1, the longer one counts at infinity.
    copy_fraction : float
        Share of the memory bandwidth that copies inside a GPU reach, where it has none of its own.
    copies : tuple of str
        What is copied beside the exchange, unless its kernels do it: 'tokens', packed and summed; 'pairs', sorted by expert
        and summed.
    measured_on : tuple of str
        GPUs that the constants were fitted to.
    measured_ep_size, measured_tokens : pair of int
        From and to: EP sizes and tokens per rank of that fit.
    source : str
    """

    kind: str
    gpus: tuple[str, ...]
    kernels: str
    floor_us: tuple[float, float]
    scale_up_fraction: tuple[float, float]
    source: str
    scale_out_fraction: tuple[float, float] = (0.860, 0.860)
    hop_us: float = 0.0
    large_floor_us: float = 0.0
    large_bytes: float = inf
    floor_falls: tuple[float, float] = (0.0, 0.0)
    fp8_share: float = 1.0
    bytes_per_value: tuple[float, float] = (FP8_WITH_SCALES, 2.0)
    sharpness: float = PAIR_SHARPNESS
    copy_fraction: float = 0.648
    copies: tuple[str, ...] = ()
    measured_on: tuple[str, ...] = ()
    measured_ep_size: tuple[int, int] = (0, 0)
    measured_tokens: tuple[int, int] = (0, 0)


@cache
def read_table(name: str) -> dict[str, Any]:
    """A TOML file of this folder."""
    return tomllib.loads(resources.files("sim.cost").joinpath(name).read_text(encoding="utf-8"))


MEASURED_KERNELS = {"bf16": "bf16", "fp8": "fp8_torch"}
"""The kernel of kernels.toml that `epsim measure` runs in a type."""


@cache
def grouped_gemm_profile(name: str = "fp8") -> GroupedGemm:
    """The kernel that expert times of a type are computed for, or one of MEASURED_KERNELS."""
    return GroupedGemm(**read_table("kernels.toml")["grouped_gemm"][name])


@cache
def exchange_profiles() -> list[Exchange]:
    """Constants of all kinds of exchange."""
    rows: list[dict[str, Any]] = [
        {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
        for row in read_table("kernels.toml")["exchange"]
    ]
    return [Exchange(**row) for row in rows]


def exchange_profile(kind: str, gpu: str, backend: str = "") -> Exchange:
    """Constants of a backend on a GPU where it has its own there, else of its kind: the GPU's, or those for all others."""
    profiles = exchange_profiles()
    own = [profile for name in (backend, kind) for profile in profiles if profile.kind == name and gpu in profile.gpus]
    return own[0] if own else next(profile for profile in profiles if profile.kind == kind and not profile.gpus)


def measured() -> dict[str, Any]:
    """Published measurements by name, each a table with its source, columns in comments of measured.toml."""
    return read_table("measured.toml")
