"""The model of expert time beside published measurements."""

import pandas as pd

from sim.cost.expert import expert_time_us
from sim.cost.tables import measured
from sim.model import load_model


def predicted_against_measured() -> pd.DataFrame:
    """Expert times of DeepSeek-V3 on H200 as measured and as computed.

    Returns
    -------
    DataFrame
        One row per measurement: ep_size, tokens (of the whole EP group), pairs and distinct_experts (of a rank),
        measured_us, predicted_us, error (predicted / measured - 1), fitted (whether the constants saw the row).
    """
    table = measured()["moe_decode"]
    model = load_model(table["model"])
    rows = pd.DataFrame(table["rows"], columns=["ep_size", "tokens", "measured_us"])
    rows.insert(2, "pairs", rows.tokens * model.top_k / rows.ep_size)
    rows.insert(3, "distinct_experts", (model.n_experts / rows.ep_size).clip(upper=rows.pairs))
    rows["predicted_us"] = expert_time_us(
        model, table["gpu"], pairs=rows.pairs, distinct_experts=rows.distinct_experts, dtype="fp8"
    )
    rows["error"] = rows.predicted_us / rows.measured_us - 1
    rows["fitted"] = rows.ep_size.isin(table["fitted_ep_sizes"])
    return rows
