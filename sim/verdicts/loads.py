"""Claims about load alone."""

import numpy as np

from sim.sweeps import sweep
from sim.verdicts.verdict import DOES_NOT_FOLLOW, HOLDS, HOLDS_ONLY, Conditions, Finding, ranges_text

_SIZES = [2, 4, 8, 16, 32, 64, 128, 256]
_TOKENS = [1, 8, 64, 512, 4096]


def less_waiting(conditions: Conditions) -> Finding:
    """Change of the mean imbalance, paired, in every cell; a cell counts where its 95 % interval lies below 0."""
    model = conditions.model("deepseek-v3")
    summary = sweep(
        model, conditions.workload, ep_sizes=_SIZES, tokens=_TOKENS, placements=["linear", "round_robin"],
        trials=conditions.scaled(4000), seed=conditions.seed, bound_layers=0, threads=conditions.threads,
    ).summary  # fmt: skip
    rows = summary[summary.placement == "round_robin"].set_index(["ep_size", "tokens"])
    base = summary[summary.placement == "linear"].set_index(["ep_size", "tokens"])
    less = (rows.imbalance_change_mean_high < 0).unstack()
    more = (rows.imbalance_change_mean_low > 0).unstack()
    at = rows.loc[(8, 64)]
    half = float(at.imbalance_change_mean_high - at.imbalance_change_mean)
    waiting = [1 - float(table.loc[(8, 64)].balancedness_mean) for table in (base, rows)]
    lower_everywhere = [bool(less.loc[size].all()) for size in _SIZES]
    if all(lower_everywhere):
        verdict = HOLDS
    elif any(lower_everywhere):
        verdict = f"{HOLDS_ONLY} EP is {ranges_text(_SIZES, lower_everywhere, '').replace(' ,', ',').strip()}"
    elif less.to_numpy().any():
        cells = ", ".join(f"EP {size} at {tokens}" for size, tokens in zip(*np.nonzero(less.to_numpy()), strict=True))
        verdict = f"{HOLDS_ONLY} {int(less.to_numpy().sum())} of {less.size} cells of the grid are meant ({cells[:60]})"
    else:
        verdict = DOES_NOT_FOLLOW
    return Finding(
        f"EP 8, 64 tokens: mean imbalance {base.loc[(8, 64)].imbalance_mean:.3f}, {at.imbalance_change_mean:+.3f} ± {half:.3f} "
        "under round_robin",
        float(at.imbalance_change_mean),
        float(at.imbalance_change_mean_low),
        float(at.imbalance_change_mean_high),
        "change of the mean imbalance, EP 8, 64 tokens",
        verdict,
        f"The mean imbalance falls in {int(less.to_numpy().sum())} and rises in {int(more.to_numpy().sum())} of {less.size} "
        f"cells (EP {_SIZES[0]} to {_SIZES[-1]}, {_TOKENS[0]} to {_TOKENS[-1]} tokens), the others do not differ by their 95 % "
        "intervals; "
        f"at EP 8 and 64 tokens the other ranks wait {100 * waiting[0]:.0f} % of the time under linear, "
        f"{100 * waiting[1]:.0f} % under round_robin.",
    )
