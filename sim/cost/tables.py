"""Constants of the named kernels, and the published measurements behind them."""

import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources
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
    bandwidth_fraction, peak_fraction : float
        Shares of the memory bandwidth and of the dense peak that it reaches.
    tile_rows : int
        Rows that each expert's tokens are padded to a multiple of.
    """

    name: str
    launch_us: float
    bandwidth_fraction: float
    peak_fraction: float
    tile_rows: int
    source: str


@dataclass(frozen=True)
class Exchange:
    """What an all-to-all reaches of the links.

    Attributes
    ----------
    name, source : str
        The kernel, and what its constants were fitted to.
    latency_us : float
        Time of one direction without traffic.
    scale_up_fraction, scale_out_fraction : float
        Shares of NVLink and network bandwidth that it reaches.
    """

    name: str
    latency_us: float
    scale_up_fraction: float
    scale_out_fraction: float
    source: str


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("sim.cost").joinpath(name).read_text(encoding="utf-8"))


@cache
def grouped_gemm_profile() -> GroupedGemm:
    """The kernel that expert times are computed for."""
    return GroupedGemm(**_read("kernels.toml")["grouped_gemm"])


@cache
def exchange_profile() -> Exchange:
    """The kernel that exchange times are computed for."""
    return Exchange(**_read("kernels.toml")["exchange"])


@cache
def measured() -> dict[str, Any]:
    """Published measurements by name, each a table with its source, columns in comments of measured.toml."""
    return _read("measured.toml")
