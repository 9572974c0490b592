"""The fits behind kernels.toml and gpus.toml, to the published tables: for all rows, and for rows that are left
out in turn; and what the model predicts for each of their rows.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.cost.exchange import exchange_kind, exchange_time_us
from sim.cost.expert import ExpertRates, counted_rows, expert_rates, expert_time_us, reached_fractions, time_ranks
from sim.cost.gpu import load_gpu
from sim.cost.tables import PAIR_SHARPNESS, exchange_profile, grouped_gemm_profile, measured
from sim.model import load_model

_RANDOM = "wideep_nvfp4"  # its experts are picked at random, the other tables' evenly
_NEVER_ALONE = 0.1
"""Weight that holds a GPU's shares to the mean of its generation, where its own rows do not tell them."""


class ExpertFit(NamedTuple):
    """Constants of the experts' kernel: shared ones, and shares of bandwidth and peak of each GPU."""

    launch_us: float
    idle_us: float
    spread_us: float
    sharpness: float
    bandwidth_fraction: dict[str, float]
    peak_fraction: dict[str, float]
    large_peak_fraction: dict[str, float]  # with large tiles; 1 where there are none


def expert_rows(name: str = "wideep_experts") -> pd.DataFrame:
    """Expert times of a published table: gpu, ep_size, tokens, measured_us, and a rank's pairs, distinct and local experts."""
    table = measured()[name]
    rows, model = _frame(table, "gpu ep_size tokens measured_us"), load_model(table["model"])
    pairs, local = rows.tokens * model.top_k / rows.ep_size, model.n_experts / rows.ep_size
    picked = local * (1 - (1 - 1 / model.n_experts) ** (rows.tokens * model.top_k)) if name == _RANDOM else local
    return rows.assign(pairs=pairs, distinct=np.minimum(picked, pairs), local=local)


def _frame(table: dict[str, Any], columns: str) -> pd.DataFrame:
    """Rows of a published table; columns that are the same in all of them are keys of the table instead."""
    names = columns.split()
    same = {name: table[name] for name in names if name in table}
    return pd.DataFrame(table["rows"], columns=[name for name in names if name not in same]).assign(**same)


def _whole_rates(gpus: list[str], kernel: str) -> dict[str, ExpertRates]:
    """Rates of each GPU at all of its bandwidth and peak."""
    model, rates = load_model(measured()["wideep_experts"]["model"]), {}
    for name in gpus:
        own = expert_rates(model, load_gpu(name), kernel.split("_")[0], kernel)
        bandwidth, peak, large_peak = reached_fractions(load_gpu(name), kernel)
        rates[name] = own._replace(
            us_per_expert=own.us_per_expert * bandwidth,
            us_per_pair=own.us_per_pair * bandwidth,
            us_per_row=own.us_per_row * peak,
            large_us_per_row=own.large_us_per_row * large_peak,
        )
    return rates


def expert_times(fit: ExpertFit, rows: pd.DataFrame, kernel: str = "fp8") -> np.ndarray:
    """Times of rows with the constants of a fit."""
    whole = _whole_rates(list(fit.bandwidth_fraction), kernel)
    times = np.empty(len(rows))
    for name in rows.gpu.unique():
        mine = (rows.gpu == name).to_numpy()
        times[mine] = _times(whole[name], fit, name, _Loads.of(rows[mine]))
    return times


class _Loads(NamedTuple):
    """Loads of ranks as arrays, with the tiles that were counted where there are `tiles_*`."""

    pairs: np.ndarray
    distinct: np.ndarray
    local: np.ndarray
    tiles: dict[int, np.ndarray]

    @classmethod
    def of(cls, rows: pd.DataFrame) -> "_Loads":
        tiles = {int(name[6:]): rows[name].to_numpy(float) for name in rows if name.startswith("tiles_")}
        pairs, distinct, local = (rows[name].to_numpy(float) for name in ("pairs", "distinct", "local"))
        return cls(pairs, distinct, local, tiles)


def _times(whole: ExpertRates, fit: ExpertFit, gpu: str, loads: _Loads) -> np.ndarray:
    """Times on a GPU."""
    rates = whole._replace(
        launch_us=fit.launch_us,
        idle_us=fit.idle_us,
        spread_us=fit.spread_us,
        sharpness=fit.sharpness,
        us_per_expert=whole.us_per_expert / fit.bandwidth_fraction[gpu],
        us_per_pair=whole.us_per_pair / fit.bandwidth_fraction[gpu],
        us_per_row=whole.us_per_row / fit.peak_fraction[gpu],
        large_us_per_row=whole.large_us_per_row / fit.large_peak_fraction[gpu],
    )
    pairs, distinct, local, tiles = loads
    return time_ranks(rates, pairs, distinct, local, counted_rows(rates, pairs, local, tiles) if tiles else None)


def fit_experts(rows: pd.DataFrame, kernel: str = "fp8") -> ExpertFit:
    """Constants with the least soft absolute log error over all GPUs at once, since launch, idle, spread and sharpness are
    the kernel's.
    """
    gpus = list(dict.fromkeys(rows.gpu))
    n, whole, parts = len(gpus), _whole_rates(gpus, kernel), [rows[rows.gpu == name] for name in gpus]
    loads, measured_us = [_Loads.of(part) for part in parts], [part.measured_us.to_numpy() for part in parts]
    has_large = grouped_gemm_profile(kernel).large_tile_rows > 0
    is_hopper = np.array([name.startswith("h") for name in gpus])
    generations = [of_one for of_one in (is_hopper, ~is_hopper) if of_one.any()]

    def of(x: np.ndarray) -> ExpertFit:
        launch_us, idle_us, spread_us, sharpness = np.exp(x[:4])
        bandwidth, peak = np.minimum(np.exp(x[4 : 4 + n]), 1.0), np.exp(x[4 + n : 4 + 2 * n])
        large_peak = np.exp(x[4 + 2 * n :]) if has_large else np.ones(n)
        shares = (dict(zip(gpus, values, strict=True)) for values in (bandwidth, peak, large_peak))
        return ExpertFit(launch_us, idle_us, spread_us, 1 + sharpness, *shares)

    def misfit(x: np.ndarray) -> np.ndarray:
        fit = of(x)
        errors = [
            np.log(_times(whole[name], fit, name, of_gpu) / us)
            for name, of_gpu, us in zip(gpus, loads, measured_us, strict=True)
        ]
        for shares in np.split(x[4:], len(x[4:]) // n):
            errors += [_NEVER_ALONE * (shares[of_one] - shares[of_one].mean()) for of_one in generations]
        return np.concatenate(errors)

    start = np.log([20, 0.6, 5, 3] + [0.8] * n + [0.6] * n + [0.7] * n * has_large)
    return of(least_squares(misfit, start, loss="soft_l1", f_scale=0.03).x)


def experts_left_out(rows: pd.DataFrame, kernel: str = "fp8") -> np.ndarray:
    """Times of each row predicted by a fit without the rows of its EP size and GPU, in microseconds."""
    times = np.empty(len(rows))
    for (gpu, ep_size), part in rows.groupby(["gpu", "ep_size"]):
        mine = ((rows.gpu == gpu) & (rows.ep_size == ep_size)).to_numpy()
        times[mine] = expert_times(fit_experts(rows[~mine], kernel), part, kernel)
    return times


def exchange_rows(name: str = "low_latency_one_node") -> pd.DataFrame:
    """Published times of an exchange within a node: gpu, ep_size, tokens (per rank), phase, measured_us, and `sent`, the rows of
    a token that go to experts that are picked at random.
    """
    table = measured()[name]
    wide = _frame(table, "gpu ep_size tokens dispatch combine")
    top_k, ep = load_model(table["model"]).top_k, wide.ep_size
    wide["sent"] = top_k if exchange_kind(table["exchange"]) == "pair" else ep * (1 - (1 - 1 / ep) ** top_k)
    return wide.melt(["gpu", "ep_size", "tokens", "sent"], var_name="phase", value_name="measured_us")


class LinkFit(NamedTuple):
    """Constants of one phase of an exchange on GPUs that are fitted together."""

    floor_us: dict[str, float]  # by GPU
    falls: float  # of the floor, with the tokens
    row_us: float  # of a row that leaves its rank
    sharpness: float


def link_times(fit: LinkFit, rows: pd.DataFrame) -> np.ndarray:
    """Times of published rows of one phase with the constants of a fit."""
    p, tokens = fit.sharpness, rows.tokens.to_numpy(float)
    floor_us = rows.gpu.map(fit.floor_us).to_numpy(float) * tokens**-fit.falls
    moved = (rows.sent * (1 - 1 / rows.ep_size)).to_numpy() * tokens
    return (floor_us**p + (fit.row_us * moved) ** p) ** (1 / p)


def fit_links(rows: pd.DataFrame, *, falls: bool, sharpness: float = PAIR_SHARPNESS) -> LinkFit:
    """Constants with the least soft absolute log error."""
    gpus = list(dict.fromkeys(rows.gpu))

    def of(x: np.ndarray) -> LinkFit:
        floors = dict(zip(gpus, np.exp(x), strict=False))
        return LinkFit(floors, float(x[-1]) if falls else 0.0, float(np.exp(x[len(gpus)])), sharpness)

    def misfit(x: np.ndarray) -> np.ndarray:
        return np.log(link_times(of(x), rows) / rows.measured_us.to_numpy())

    start = [*np.log([55] * len(gpus) + [0.09]), *([0.05] if falls else [])]
    return of(least_squares(misfit, start, loss="soft_l1", f_scale=0.1).x)


_TWINS = {"h200": "h100", "b300": "b200", "gb300": "gb200"}
"""GPUs with the links of another."""


def link_groups(name: str = "low_latency_one_node") -> list[tuple[pd.DataFrame, dict[str, Any]]]:
    """Rows of a table that are fitted together, and how: those of pair by generation, whose combine falls with the tokens on
    Blackwell; of DeepEP's normal kernels, whose floor and links add up, by the GPUs' links.
    """
    rows = exchange_rows(name)
    is_pair, is_hopper = (rows.sent == rows.sent.iloc[0]).all(), rows.gpu.str.startswith("h")
    if not is_pair:
        rows["gpu"] = rows.gpu.replace(_TWINS)
    return [
        (part, {"falls": phase == "combine" and not one} if is_pair else {"falls": False, "sharpness": 1.0})
        for phase in ("dispatch", "combine")
        for one in ((True, False) if is_pair else rows.gpu.unique())
        if len(part := rows[(rows.phase == phase) & ((is_hopper if is_pair else rows.gpu) == one)])
    ]


def links_left_out(name: str) -> pd.Series:
    """Times of each row of a table predicted by a fit without the rows of its number of tokens, in microseconds."""
    times: list[pd.Series] = []
    for part, how in link_groups(name):
        for tokens, out in part.groupby("tokens"):
            times.append(pd.Series(link_times(fit_links(part[part.tokens != tokens], **how), out), out.index))
    return pd.concat(times).sort_index()


GATHER_LINKS = "nccl_blackwell"
"""Published times of NCCL's all-gather and reduce-scatter."""


def gather_times(large_floor_us: float, share: float, rows: pd.DataFrame) -> np.ndarray:
    """Times of NCCL's all-gather or reduce-scatter alone on Blackwell, with some constants."""
    of_gpu, times = exchange_profile("gather", "b200"), np.empty(len(rows))
    own = replace(of_gpu, large_floor_us=large_floor_us, scale_up_fraction=(share, share), copies=())
    for gpu in rows.gpu.unique():
        mine = (rows.gpu == gpu).to_numpy()
        sizes = {"ep_size": rows.ep_size[mine], "tokens_per_rank": rows.tokens[mine]}
        times[mine] = exchange_time_us(load_model("deepseek-v3"), gpu, kind="gather", profile=own, **sizes).dispatch_us
    return times


def fit_gather(rows: pd.DataFrame) -> tuple[float, float]:
    """Floor of large messages and share of NVLink, to those of 8 MiB and more, with the least soft absolute log error."""
    rows = rows[rows.tokens * rows.ep_size > 585]  # of 14,336 bytes

    def misfit(x: np.ndarray) -> np.ndarray:
        floor_us, share = np.exp(x)
        return np.log(gather_times(floor_us, share, rows) / rows.measured_us.to_numpy())

    floor_us, share = np.exp(least_squares(misfit, np.log([45, 0.6]), loss="soft_l1", f_scale=0.1).x)
    return float(floor_us), float(share)


def gathers_left_out() -> pd.Series:
    """Times of each row of GATHER_LINKS predicted by a fit without the messages of its size, in microseconds."""
    rows, times = exchange_rows(GATHER_LINKS), []
    size = (rows.tokens * rows.ep_size).round(-1)
    for value in size.unique():
        out = rows[size == value]
        times.append(pd.Series(gather_times(*fit_gather(rows[size != value]), out), out.index))
    return pd.concat(times).sort_index()


FITTED = {"wideep_experts": "fp8", "wideep_nvfp4": "fp4"}
"""Published tables of expert times that constants are fitted to, and their types."""
_FITTED_LINKS = ("low_latency_one_node", "deepep_normal")
_OTHER_LINKS = [
    "deepep_normal_others", "flashinfer_two_sided", "low_latency_others", "low_latency_kernels", "low_latency_network",
    "low_latency_qwen3", "nccl_others",
]  # fmt: skip


def predicted_against_measured() -> pd.DataFrame:
    """Published times of DeepSeek-V3's experts and of their exchange, and the model's; takes some seconds.

    Returns
    -------
    DataFrame
        One row per measurement: part ('experts', 'dispatch', 'combine'), gpu, dtype, source (a table of measured.toml),
        ep_size, tokens (experts: of the whole EP group; exchange: per rank), pairs and distinct_experts (of a rank),
        measured_us, predicted_us, error (predicted / measured - 1), fitted (whether the constants saw the row) and
        held_out_error: that of a fit without its EP size (experts) or number of tokens (exchange), and for rows that no fit
        saw the error itself.
    """
    model = load_model("deepseek-v3")
    tables = [_experts(expert_rows(name), name, dtype) for name, dtype in (FITTED | {"moe_decode": "fp8"}).items()]
    tables += [_exchanges(exchange_rows(name), name) for name in (*_FITTED_LINKS, GATHER_LINKS, "deepep_low_latency")]
    rows = pd.concat(tables, ignore_index=True)
    rows["error"] = rows.predicted_us / rows.measured_us - 1
    rows["fitted"] = rows.source != "moe_decode"
    rows["held_out_error"] = rows.error.where(~rows.fitted)
    left_out = {name: experts_left_out(expert_rows(name), dtype) for name, dtype in FITTED.items()}
    left_out |= {name: links_left_out(name).to_numpy() for name in _FITTED_LINKS}
    left_out[GATHER_LINKS] = gathers_left_out().to_numpy()
    for source, times in left_out.items():
        mine = rows.source == source
        rows.loc[mine, "held_out_error"] = times / rows.measured_us[mine] - 1
    is_expert = rows.part == "experts"
    rows["pairs"] = rows.pairs.where(is_expert, rows.tokens * model.top_k)
    return rows


def exchanges_of_others() -> pd.DataFrame:
    """Published times of other versions and backends, which no fit saw, and the model's: the columns part to error."""
    rows = pd.concat([_exchanges(exchange_rows(name), name) for name in _OTHER_LINKS], ignore_index=True)
    return rows.assign(error=rows.predicted_us / rows.measured_us - 1)


def _experts(rows: pd.DataFrame, source: str, dtype: str) -> pd.DataFrame:
    loads = {"pairs": rows.pairs, "distinct_experts": rows.distinct, "local_experts": rows.local}
    model, times = measured()[source]["model"], pd.Series(0.0, rows.index)
    for gpu, i in rows.groupby("gpu").groups.items():
        times[i] = expert_time_us(model, str(gpu), **{name: values[i] for name, values in loads.items()}, dtype=dtype)
    rows = rows.rename(columns={"distinct": "distinct_experts"}).drop(columns="local")
    return rows.assign(part="experts", dtype=dtype, source=source, predicted_us=times)


def _exchanges(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    """Without sorting pairs by expert and summing them, which is not in the published times; NCCL's are without any copies."""
    table, times = measured()[source], pd.Series(0.0, rows.index)
    backend, dtype, top_k = table["exchange"], table["dtype"], load_model(table["model"]).top_k
    for (gpu, phase), part in rows.groupby(["gpu", "phase"]):
        alone = replace(exchange_profile("gather", str(gpu)), copies=()) if source.startswith("nccl") else None
        both = exchange_time_us(
            table["model"], str(gpu), kind=backend, ep_size=part.ep_size, tokens_per_rank=part.tokens, dtype=dtype,
            ranks_per_node=table.get("ranks_per_node", 8), profile=alone, sorts_pairs=False,
            received_tokens=part.tokens * np.minimum(top_k, part.ep_size) if table.get("spread") else None,
        )  # fmt: skip
        times[part.index] = both.dispatch_us if phase == "dispatch" else both.combine_us
    rows = rows.rename(columns={"phase": "part"}).drop(columns="sent")
    dtypes = rows.part.map({"dispatch": dtype, "combine": "bf16"})
    return rows.assign(dtype=dtypes, source=source, predicted_us=times)
