"""What advice says in plain sentences: the verdict, and what would change it. Every number comes from its tables."""

import pandas as pd

from sim.advice.advise import Advice
from sim.advice.engines import STALL_S
from sim.advice.rule import WORTH
from sim.claims.verdict import percent
from sim.cost.gain import PERFECT
from sim.placement import is_load_aware, split_name


def verdict_text(advice: Advice) -> str:
    """The verdict over all, with the placements and numbers of tokens that it rests on."""
    worth = advice.best[advice.best.verdict == WORTH]
    if worth.empty:
        return f"{advice.verdict}. The best that an engine runs saves {_ends(advice.best)} tokens per step"
    parts = [f"{name} saves {_ends(rows)} tokens per step" for name, rows in worth.groupby("placement", sort=False)]
    return f"{advice.verdict}. " + "; ".join(parts)


def _ends(rows: pd.DataFrame) -> str:
    """Ends of the step's saved share by number of tokens."""
    ends = [
        f"{100 * row.step_saved_low:z.1f} to {percent(row.step_saved_high)} at {row.tokens}"
        if row.step_saved_low == row.step_saved_low
        else f"an unknown share (one layer has no interval) at {row.tokens}"
        for row in rows.itertuples()
    ]
    return "of the step " + ", ".join(ends)


def changes(advice: Advice, least_saved: float) -> list[str]:
    """What would change the verdict, a sentence each."""
    texts = [_by_share(advice, least_saved), _by_perfection(advice, least_saved), _by_split(advice), _by_copies(advice)]
    return [text for text in [*texts, _by_stall(advice)] if text]


def _main(advice: Advice) -> pd.DataFrame:
    """Gains in the main split."""
    return advice.gains[advice.gains.split == advice.gains.split.iloc[0]]


def _by_share(advice: Advice, least_saved: float) -> str:
    """The share of the step that experts and exchange would need, of the best placement at each number of tokens."""
    parts = []
    for row in advice.best.itertuples():
        mine = advice.gains[(advice.gains.placement == row.placement) & (advice.gains.tokens == row.tokens)]
        parts.append(f"{_needed(mine.layer_saved_low.min(), least_saved)} at {row.tokens} ({row.placement})")
    share = _main(advice).moe_share
    taken = (
        percent(share.iloc[0], 0) if share.nunique() == 1 else f"{percent(share.min(), 0)} to {percent(share.max(), 0)}"
    )
    return (
        f"The share of the step that experts and exchange take, here {taken}. Needed for a trial to be worth it: "
        + ", ".join(parts)
        + " tokens."
    )


def _needed(low: float, least_saved: float) -> str:
    """Share of the step at which `low`, the saved share of the layer at its lower end, is enough."""
    if low != low:
        return "unknown"
    return percent(least_saved / low, 0) if low >= least_saved else "no share would do"


def _by_perfection(advice: Advice, least_saved: float) -> str:
    """What no placement can beat."""
    rows = _main(advice)[_main(advice).placement == PERFECT]
    listed = ", ".join(f"{percent(row.layer_saved)} at {row.tokens}" for row in rows.itertuples())
    hopeless = [str(row.tokens) for row in rows.itertuples() if row.step_saved_high < least_saved]
    text = f"Perfect balance, which no placement can beat, would save of the layer's time {listed} tokens"
    if any(hopeless):
        text += f"; with this share of the step no placement is worth a trial at {', '.join(hopeless)}"
    return text + "."


def _by_split(advice: Advice) -> str:
    """How the gain of the best placement at most tokens depends on what it was fitted on."""
    row = advice.best.iloc[-1]
    mine = advice.gains[(advice.gains.placement == row.placement) & (advice.gains.tokens == row.tokens)]
    if len(mine) < 2:
        return ""
    listed = "; ".join(f"{percent(of.layer_saved)} {of.split}" for of in mine.itertuples())
    return (
        f"The traffic that loads are taken from: at {row.tokens} tokens {row.placement} saves of the layer {listed}. How a "
        "placement ages: epsim traffic decay."
    )


def _by_copies(advice: Advice) -> str:
    """Where copies of experts cost more than they save."""
    table = _main(advice)
    plain = table[[name != PERFECT and split_name(name) == ("eplb", 0) for name in table.placement]]
    copied = table[[name != PERFECT and split_name(name)[1] > 0 for name in table.placement]]
    least = copied.groupby("tokens").layer_saved_high.max()
    worse = [str(row.tokens) for row in plain.itertuples() if least[row.tokens] < row.layer_saved_low]
    if not worse:
        return ""
    return (
        f"Redundant slots cost more than they save at {', '.join(worse)} tokens: every copy that gets a token is read."
    )


def _by_stall(advice: Advice) -> str:
    """How long a rebalance takes to pay for itself."""
    worth = [row for row in advice.best.itertuples() if row.verdict == WORTH and is_load_aware(row.placement)]
    if not worth:
        return ""
    listed = ", ".join(f"{STALL_S / row.step_saved_low:.0f} s at {row.tokens}" for row in worth)
    return (
        f"The rebalances: one that stalls the engine for {STALL_S:g} s (the longest that was reported, vLLM #50647) is paid back "
        f"in {listed} tokens, at the lower ends."
    )
