"""The model of expert and exchange times beside published measurements."""

import pandas as pd

from sim.cost.exchange import exchange_time_us
from sim.cost.expert import expert_time_us
from sim.cost.refit import expert_rows, experts_left_out, other_expert_rows, pair_rows, pairs_left_out
from sim.cost.tables import measured
from sim.model import load_model

FITTED = {"wideep_experts": "fp8", "wideep_nvfp4": "fp4"}
"""Published tables of expert times that constants are fitted to, and their types."""


def predicted_against_measured(*, left_out: bool = True) -> pd.DataFrame:
    """Published times of DeepSeek-V3's experts and of its pair exchange, and the model's.

    Parameters
    ----------
    left_out : bool
        Whether each fitted row is also predicted by a fit without its EP size (experts) or number of tokens (exchange): some
        seconds.

    Returns
    -------
    DataFrame
        One row per measurement: part ('experts', 'dispatch', 'combine'), gpu, dtype, source (a table of measured.toml),
        ep_size, tokens (experts: of the whole EP group; exchange: per rank), pairs and distinct_experts (of a rank),
        measured_us, predicted_us, error (predicted / measured - 1), fitted (whether the constants saw the row) and
        held_out_error: that of the fit without it, and for rows that no fit saw the error itself.
    """
    model = load_model("deepseek-v3")
    tables = [_experts(expert_rows(name), name, dtype) for name, dtype in FITTED.items()]
    tables.append(_experts(other_expert_rows(), "moe_decode", "fp8"))
    tables += [_pairs(pair_rows(), "low_latency_one_node"), _pairs(_deepep_rows(), "deepep_low_latency")]
    rows = pd.concat(tables, ignore_index=True)
    rows["error"] = rows.predicted_us / rows.measured_us - 1
    rows["fitted"] = rows.source != "moe_decode"
    rows["held_out_error"] = rows.error.where(~rows.fitted)
    if left_out:
        times_left_out = {name: experts_left_out(expert_rows(name), dtype) for name, dtype in FITTED.items()}
        for source, times in (times_left_out | {"low_latency_one_node": pairs_left_out(pair_rows())}).items():
            mine = rows.source == source
            rows.loc[mine, "held_out_error"] = times / rows.measured_us[mine] - 1
    is_expert = rows.part == "experts"
    rows["pairs"] = rows.pairs.where(is_expert, rows.tokens * model.top_k)
    return rows


def _experts(rows: pd.DataFrame, source: str, dtype: str) -> pd.DataFrame:
    times = [
        expert_time_us(
            measured()[source]["model"],
            row.gpu,
            pairs=row.pairs,
            distinct_experts=row.distinct,
            local_experts=row.local,
            dtype=dtype,
        ).item()
        for row in rows.itertuples()
    ]
    rows = rows.rename(columns={"distinct": "distinct_experts"}).drop(columns="local")
    return rows.assign(part="experts", dtype=dtype, source=source, predicted_us=times)


def _pairs(rows: pd.DataFrame, source: str) -> pd.DataFrame:
    model, times = measured()[source]["model"], []
    for row in rows.itertuples():
        both = exchange_time_us(model, row.gpu, ep_size=row.ep_size, tokens_per_rank=row.tokens)
        times.append((both.dispatch_us if row.phase == "dispatch" else both.combine_us).item())
    rows = rows.rename(columns={"phase": "part"})
    dtype = {"dispatch": "fp8" if source == "deepep_low_latency" else "not named", "combine": "bf16"}
    return rows.assign(dtype=rows.part.map(dtype), source=source, predicted_us=times)


def _deepep_rows() -> pd.DataFrame:
    table = measured()["deepep_low_latency"]
    wide = pd.DataFrame(table["rows"], columns=["ep_size", "dispatch", "combine"])
    rows = wide.melt("ep_size", var_name="phase", value_name="measured_us")
    return rows.assign(gpu=table["gpu"], tokens=table["tokens_per_rank"])
