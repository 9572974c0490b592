"""The rule that turns predicted gains into a verdict."""

import numpy as np
import pandas as pd

WORTH, NOT, UNSURE = "worth a trial", "not for this traffic", "not enough data"
ASSUMED_SHARE = 0.5
"""Share of a step that experts and exchange are taken to have where nobody says."""
LEAST_SAVED = 0.02
"""Share of a step that is worth a trial where nobody says: what a benchmark of a serving engine can show."""
LEAST_SEQUENCES = 16
"""Of each half of a record: with fewer, sequences that happen to be there decide."""


def rule_text(least_saved: float) -> str:
    """The rule, for people."""
    return (
        f"'{WORTH}' if the predicted step saves at least {least_saved:.1%} at the lower end of its 95 % interval in every "
        f"split of the traffic; '{NOT}' if it, or perfect balance, saves less even at the upper end, in every split; else "
        f"'{UNSURE}', and always so with fewer than {LEAST_SEQUENCES} recorded sequences in a half or one layer."
    )


def judge(low: np.ndarray, high: np.ndarray, least_saved: float, *, is_enough: bool) -> str:
    """Verdict on a placement at one number of tokens: ends of the step's saved share in each split, float64 [splits]; the
    upper ones not above those of perfect balance.
    """
    if not is_enough or not np.isfinite([low, high]).all():
        return UNSURE
    if low.min() >= least_saved:
        return WORTH
    return NOT if high.max() < least_saved else UNSURE


def overall(verdicts: pd.DataFrame) -> str:
    """One verdict from those on placements that an engine can run: the best there is."""
    found = set(verdicts.verdict)
    return next(verdict for verdict in (WORTH, UNSURE, NOT) if verdict in found)
