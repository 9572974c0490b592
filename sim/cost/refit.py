"""The fits behind kernels.toml and gpus.toml, to the published tables: for all rows, and for rows that are left out in turn."""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy.optimize import least_squares

from sim.cost.expert import ExpertRates, expert_rates, time_ranks
from sim.cost.gpu import load_gpu
from sim.cost.tables import EXCHANGE_SHARPNESS, grouped_gemm_profile, measured
from sim.model import load_model

_NEVER_ALONE = (
    0.1  # weight that holds a GPU's shares to the mean of its generation, where its own rows do not tell them
)


class ExpertFit(NamedTuple):
    """Constants of the experts' kernel: shared ones, and shares of bandwidth and peak of each GPU."""

    launch_us: float
    idle_us: float
    spread_us: float
    sharpness: float
    bandwidth_fraction: dict[str, float]
    peak_fraction: dict[str, float]


def expert_rows() -> pd.DataFrame:
    """Published expert times: gpu, ep_size, tokens, measured_us, and the pairs, distinct and local experts of a rank."""
    table = measured()["wideep_experts"]
    return _with_loads(pd.DataFrame(table["rows"], columns=["gpu", "ep_size", "tokens", "measured_us"]), table["model"])


def other_expert_rows() -> pd.DataFrame:
    """The same from an older version of the kernel, which no fit sees."""
    table = measured()["moe_decode"]
    rows = pd.DataFrame(table["rows"], columns=["ep_size", "tokens", "measured_us"])
    return _with_loads(rows.assign(gpu=table["gpu"]), table["model"])


def _with_loads(rows: pd.DataFrame, name: str) -> pd.DataFrame:
    model = load_model(name)
    pairs, local = rows.tokens * model.top_k / rows.ep_size, model.n_experts / rows.ep_size
    return rows.assign(pairs=pairs, distinct=np.minimum(local, pairs), local=local)


def _whole_rates(gpus: list[str]) -> dict[str, ExpertRates]:
    """Rates of each GPU at all of its bandwidth and peak."""
    model, profile = load_model(measured()["wideep_experts"]["model"]), grouped_gemm_profile()
    rates = {}
    for name in gpus:
        gpu = load_gpu(name)
        own = expert_rates(model, gpu)
        bandwidth = gpu.bandwidth_fraction or profile.bandwidth_fraction
        peak = gpu.peak_fraction or profile.peak_fraction
        rates[name] = own._replace(
            us_per_expert=own.us_per_expert * bandwidth,
            us_per_pair=own.us_per_pair * bandwidth,
            us_per_row=own.us_per_row * peak,
        )
    return rates


def expert_times(fit: ExpertFit, rows: pd.DataFrame) -> np.ndarray:
    """Times of published rows with the constants of a fit."""
    whole = _whole_rates(list(fit.bandwidth_fraction))
    times = np.empty(len(rows))
    for name in rows.gpu.unique():
        mine = (rows.gpu == name).to_numpy()
        times[mine] = _times(whole[name], fit, fit.bandwidth_fraction[name], fit.peak_fraction[name], rows[mine])
    return times


def _times(whole: ExpertRates, shared: ExpertFit, bandwidth: float, peak: float, rows: pd.DataFrame) -> np.ndarray:
    rates = whole._replace(
        launch_us=shared.launch_us,
        idle_us=shared.idle_us,
        spread_us=shared.spread_us,
        sharpness=shared.sharpness,
        us_per_expert=whole.us_per_expert / bandwidth,
        us_per_pair=whole.us_per_pair / bandwidth,
        us_per_row=whole.us_per_row / peak,
    )
    return time_ranks(rates, *(rows[name].to_numpy(float) for name in ("pairs", "distinct", "local")))


def fit_experts(rows: pd.DataFrame) -> ExpertFit:
    """Constants with the least soft absolute log error over all GPUs at once, since launch, idle, spread and sharpness are
    the kernel's.
    """
    gpus = list(dict.fromkeys(rows.gpu))
    n, whole, parts = len(gpus), _whole_rates(gpus), [rows[rows.gpu == name] for name in gpus]
    is_hopper = np.array([name.startswith("h") for name in gpus])

    def of(x: np.ndarray) -> ExpertFit:
        launch_us, idle_us, spread_us, sharpness = np.exp(x[:4])
        bandwidth, peak = np.exp(x[4 : 4 + n]), np.exp(x[4 + n :])
        shares = (dict(zip(gpus, values, strict=True)) for values in (bandwidth, peak))
        return ExpertFit(launch_us, idle_us, spread_us, 1 + sharpness, *shares)

    def misfit(x: np.ndarray) -> np.ndarray:
        fit = of(x)
        errors = [
            np.log(
                _times(whole[name], fit, fit.bandwidth_fraction[name], fit.peak_fraction[name], part) / part.measured_us
            )
            for name, part in zip(gpus, parts, strict=True)
        ]
        for shares in (x[4 : 4 + n], x[4 + n :]):
            errors += [_NEVER_ALONE * (shares[of_one] - shares[of_one].mean()) for of_one in (is_hopper, ~is_hopper)]
        return np.concatenate(errors)

    start = np.log([20, 0.6, 5, 3] + [0.8] * n + [0.6] * n)
    return of(least_squares(misfit, start, loss="soft_l1", f_scale=0.03).x)


def experts_left_out(rows: pd.DataFrame) -> np.ndarray:
    """Times of each row predicted by a fit without the rows of its EP size and GPU, in microseconds."""
    times = np.empty(len(rows))
    for (gpu, ep_size), part in rows.groupby(["gpu", "ep_size"]):
        mine = ((rows.gpu == gpu) & (rows.ep_size == ep_size)).to_numpy()
        times[mine] = expert_times(fit_experts(rows[~mine]), part)
    return times


def pair_rows() -> pd.DataFrame:
    """Published times of pair exchanges on one node: gpu, ep_size, tokens (per rank), phase, measured_us."""
    table = measured()["low_latency_one_node"]
    wide = pd.DataFrame(table["rows"], columns=["gpu", "ep_size", "tokens", "dispatch", "combine"])
    return wide.melt(["gpu", "ep_size", "tokens"], var_name="phase", value_name="measured_us")


class PairFit(NamedTuple):
    """Floor, its fall with the tokens, and the time of each token of a phase, of each GPU."""

    floor_us: dict[str, float]
    falls: float
    token_us: dict[str, float]


def pair_times(fit: PairFit, gpu: str, tokens: np.ndarray) -> np.ndarray:
    """Times of one phase on a GPU with the constants of a fit."""
    p = EXCHANGE_SHARPNESS
    floor_us = fit.floor_us[gpu] * tokens.astype(float) ** -fit.falls
    return (floor_us**p + (fit.token_us[gpu] * tokens) ** p) ** (1 / p)


def fit_pairs(rows: pd.DataFrame, *, falls: bool) -> PairFit:
    """Constants of one phase of one generation, with the least soft absolute log error."""
    gpus = list(dict.fromkeys(rows.gpu))

    def of(x: np.ndarray) -> PairFit:
        floors, tokens = (
            dict(zip(gpus, np.exp(values), strict=True)) for values in (x[: len(gpus)], x[len(gpus) : 2 * len(gpus)])
        )
        return PairFit(floors, float(x[-1]) if falls else 0.0, tokens)

    def misfit(x: np.ndarray) -> np.ndarray:
        fit, parts = of(x), [rows[rows.gpu == name] for name in gpus]
        return np.concatenate(
            [np.log(pair_times(fit, part.gpu.iloc[0], part.tokens.to_numpy()) / part.measured_us) for part in parts]
        )

    start = [*np.log([55] * len(gpus) + [0.6] * len(gpus)), *([0.05] if falls else [])]
    return of(least_squares(misfit, start, loss="soft_l1", f_scale=0.1).x)


def pair_groups(rows: pd.DataFrame) -> list[tuple[str, bool, pd.DataFrame]]:
    """Rows that are fitted together: phase, whether its floor falls with the tokens (combine on Blackwell), rows."""
    is_hopper = rows.gpu.str.startswith("h")
    return [
        (phase, phase == "combine" and not hopper, rows[(rows.phase == phase) & (is_hopper == hopper)])
        for phase in ("dispatch", "combine")
        for hopper in (True, False)
    ]


def pairs_left_out(rows: pd.DataFrame) -> np.ndarray:
    """Times of each row predicted by a fit without the rows of its number of tokens, in microseconds."""
    times = pd.Series(np.nan, rows.index)
    for _, falls, part in pair_groups(rows):
        for tokens in part.tokens.unique():
            fit, out = fit_pairs(part[part.tokens != tokens], falls=falls), part[part.tokens == tokens]
            for gpu, row in out.groupby("gpu"):
                times[row.index] = pair_times(fit, str(gpu), row.tokens.to_numpy())
    return times.to_numpy()
