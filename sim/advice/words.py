"""What advice says in plain sentences: the verdict, and what would change it. Every number comes from its tables."""

import pandas as pd

from sim.advice.compare import WORTH, Advice, judged_ends, perfect_is_best
from sim.cost.gain import PERFECT
from sim.placement import is_load_aware, split_name
from sim.verdicts.verdict import percent


def verdict_text(advice: Advice) -> str:
    """The verdict over all, and a line for each number of tokens per step, with the saved share of the step."""
    rows = advice.best.sort_values("tokens")
    wide = len(str(rows.tokens.max())) if len(rows) else 0
    why = advice.why if len(rows) else "no engine runs any of these placements"
    lines = [advice.verdict + (f": {why}" if why else "")]
    for row in rows.itertuples():
        name, low = row.placement if row.verdict == WORTH else f"best: {row.placement}", row.step_saved_low
        ends = f"{100 * low:z.1f} to {percent(row.step_saved_high)}" if low == low else "one layer has no interval"
        lines.append(f"{row.tokens:>{wide}}: {row.verdict} ({name}, {ends})")
    return "\n".join(lines)


def not_run(advice: Advice) -> dict[str, str]:
    """Of each placement that vLLM does not run where it is asked for, the reason."""
    other = advice.verdicts[advice.verdicts.runs_as != advice.verdicts.placement]
    hows = {name: how for names, how in advice.engines.items() for name in names.split(", ")}
    return {name: hows[name] for name in dict.fromkeys(other.placement)}


def changes(advice: Advice, least_saved: float) -> list[str]:
    """What would change the verdict, a sentence each."""
    texts = [_by_share(advice, least_saved), _by_perfection(advice, least_saved), _by_split(advice), _by_copies(advice)]
    return [text for text in [*texts, _by_stall(advice)] if text]


def _main(advice: Advice) -> pd.DataFrame:
    """Gains in the split that is shown."""
    return advice.gains[advice.gains.split == advice.gains.split.iloc[0]]


def _by_share(advice: Advice, least_saved: float) -> str:
    """The share of the step that experts and exchange would need, of the named placement at each number of tokens."""
    enough, never = [], []
    for row in advice.best.itertuples():
        mine = advice.gains[(advice.gains.placement == row.placement) & (advice.gains.tokens == row.tokens)]
        low = float((judged_ends(mine)[0] / mine.moe_share).min())
        if low >= least_saved:
            enough.append(f"{percent(least_saved / low, 0)} at {row.tokens} tokens ({row.placement})")
        elif low < least_saved:  # not where one layer has no interval
            never.append(str(row.tokens))
    share = _main(advice).moe_share
    ends = dict.fromkeys(percent(value, 0) for value in (share.min(), share.max()))
    texts = [f"a trial is worth it from a share of {', '.join(enough)}"] if enough else []
    texts += [f"at {', '.join(never)} tokens no share brings the lower end to {percent(least_saved)}"] if never else []
    if not texts:
        return ""
    return f"The share of the step that experts and exchange take, here {' to '.join(ends)}: {'; '.join(texts)}."


def perfect_text(gains: pd.DataFrame) -> str:
    """What perfect balance is in a table or a figure."""
    if perfect_is_best(gains):
        return PERFECT
    return f"{PERFECT} of pairs, with the received tokens of {gains.baseline.iloc[0]}"


def _by_perfection(advice: Advice, least_saved: float) -> str:
    """What perfect balance saves, which no placement can beat where the exchange does not go by received tokens."""
    rows = _main(advice)[_main(advice).placement == PERFECT]
    listed = ", ".join(f"{percent(row.layer_saved)} at {row.tokens}" for row in rows.itertuples())
    if not perfect_is_best(rows):
        return (
            f"Perfect balance of pairs would save of the layer's time {listed} tokens, with the busiest rank's received tokens "
            f"under {rows.baseline.iloc[0]}: a placement that sends it fewer may save more."
        )
    hopeless = [str(row.tokens) for row in rows.itertuples() if row.step_saved_high < least_saved]
    text = f"Perfect balance, which no placement can beat, would save of the layer's time {listed} tokens"
    if hopeless:
        text += f"; with this share of the step no placement is worth a trial at {', '.join(hopeless)}"
    return text + "."


def _by_split(advice: Advice) -> str:
    """How the gain of the best placement at most tokens depends on what it was fitted on."""
    if not len(advice.best):
        return ""
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
    """Where copies of experts cost time: against the baseline, and against EPLB without them."""
    table = _main(advice)
    copied = table[[name != PERFECT and split_name(name)[1] > 0 for name in table.placement]]
    least = copied.groupby("tokens").layer_saved_high.max()
    loses = [str(tokens) for tokens, saved in least.items() if saved < 0]
    plain = table[table.placement == "eplb"]
    behind = [
        str(row.tokens)
        for row in plain.itertuples()
        if least.get(row.tokens, 0.0) < row.layer_saved_low and row.tokens in least
    ]
    texts = [f"than {table.baseline.iloc[0]} at {', '.join(loses)}"] if loses else []
    texts += [f"than EPLB without them at {', '.join(behind)}"] if behind else []
    if not texts:
        return ""
    return f"Redundant slots take more time {' and '.join(texts)} tokens: every copy that gets a token is read."


def _by_stall(advice: Advice) -> str:
    """What a rebalance takes. vLLM's default: `EPLBConfig.use_async` (vllm/config/parallel.py at 00193b8). SGLang's: all layers
    between two steps (`eplb_rebalance_layers_per_chunk` None, srt/eplb/eplb_manager.py at 53e29da).
    """
    worth = [row for row in advice.best.itertuples() if row.verdict == WORTH and is_load_aware(row.placement)]
    if not worth:
        return ""
    listed = ", ".join(f"{1 / row.step_saved_low:.0f} s at {row.tokens}" for row in worth)
    return (
        "The rebalances: vLLM's are asynchronous by default and taken to stall nothing. SGLang's, and vLLM's with use_async "
        "false, stall the engine, DeepSeek-R1 on 32 GB200 for 0.65 to 1.70 s (vLLM #43219), Kimi K3 for some 40 s (#50647): "
        f"each second is paid back in {listed} tokens, at the lower ends."
    )
