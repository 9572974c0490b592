"""The rule that turns predicted gains into a verdict."""

import numpy as np
import pandas as pd

from sim.placement import split_name

WORTH, NOT, UNSURE = "worth a trial", "not for this traffic", "not enough data"
ASSUMED_SHARE = 0.5
"""Share of a step that experts and exchange are taken to have where nobody says."""
LEAST_SAVED = 0.02
"""Share of a step that is worth a trial where nobody says: what a benchmark of a serving engine can show."""
LEAST_SEQUENCES = 16
"""Of each half of a record: with fewer, sequences that happen to be there decide."""


KNEE_ERROR = {"bf16": 0.06, "fp8": 0.15, "fp4": 0.15}
"""Share of the experts' time by which the model may be off near the crossover (`sim.cost.gain.KNEE`), either way. In bf16 the
largest difference between saved shares as measured and as predicted (results/measured; elsewhere below 0.04). In fp8 and fp4 an
assumption: so much a time without whole tiles missed the bf16 ones.
"""


def rule_text(least_saved: float) -> str:
    """The rule, for people."""
    return (
        f"'{WORTH}' if the predicted step saves at least {least_saved:.1%} at the lower end of its 95 % interval in every "
        f"split of the traffic; '{NOT}' if it, or perfect balance, saves less even at the upper end, in every split; else "
        f"'{UNSURE}', and always so with fewer than {LEAST_SEQUENCES} recorded sequences in a half or one layer. Near the "
        f"crossover (~) both ends are first moved outwards by {KNEE_ERROR['fp8']:.0%} of the experts' time "
        f"({KNEE_ERROR['bf16']:.0%} in bf16), by which the model may be off there. Of placements whose lower ends are within "
        f"{least_saved / 2:.1%} of the best one's, the one with the fewest slots is named."
    )


def judged_ends(gains: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the step's saved share, float64 [rows], with the model's own error near the crossover."""
    of_experts = 1 - gains.baseline_exchange_us / gains.baseline_layer_us
    error = np.where(gains.knee, gains["dtype"].map(KNEE_ERROR) * of_experts * gains.moe_share, 0.0)
    return (gains.step_saved_low - error).to_numpy(), (gains.step_saved_high + error).to_numpy()


def judge(low: np.ndarray, high: np.ndarray, least_saved: float, *, is_enough: bool) -> str:
    """Verdict on a placement at one number of tokens: ends of the step's saved share in each split, float64 [splits]; the
    upper ones not above those of perfect balance.
    """
    if not is_enough or not np.isfinite([low, high]).all():
        return UNSURE
    if low.min() >= least_saved:
        return WORTH
    return NOT if high.max() < least_saved else UNSURE


def best_of(run: pd.DataFrame, least_saved: float) -> pd.DataFrame:
    """Of the verdicts on placements that an engine runs, the one to name at each number of tokens."""
    chosen = []
    for _, rows in run.groupby("tokens"):
        near = rows[rows.step_saved_low >= rows.step_saved_low.max() - least_saved / 2]
        near = near if not rows.step_saved_low.isna().all() else rows
        slots = np.array([split_name(name)[1] for name in near.placement])
        order = np.lexsort((-near.step_saved_low, slots, near.verdict != WORTH))
        chosen.append(near.iloc[order[0]])
    return pd.DataFrame(chosen, columns=run.columns)


def overall(verdicts: pd.DataFrame) -> str:
    """One verdict from those on placements that an engine can run: the best there is; NOT where it runs none."""
    found = set(verdicts.verdict)
    return next(verdict for verdict in (WORTH, UNSURE, NOT) if verdict in found or verdict == NOT)
