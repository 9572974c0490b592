"""What a page shows, read from folders of sweeps and of advice: cells, worst cases, an answer in a sentence, provenance."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.errors import InputError, counted
from sim.files import is_there, model_label, read_json
from sim.results import PROVENANCE, SweepResult, read_result, read_table

_LABELS = {
    "against_baseline_mean": "busiest rank's load relative to the baseline: mean",
    "against_baseline_p99": "busiest rank's load relative to the baseline: 99th percentile",
    "imbalance_mean": "imbalance (busiest rank's load / mean): mean",
    "imbalance_p50": "imbalance: median",
    "imbalance_p95": "imbalance: 95th percentile",
    "imbalance_p99": "imbalance: 99th percentile",
    "max_load_mean": "busiest rank's load (pairs)",
    "balancedness_mean": "balancedness (mean load / busiest rank's): mean",
    "idle_ranks_mean": "idle ranks: mean",
    "idle_ranks_p99": "idle ranks: 99th percentile",
    "distinct_experts_max_mean": "distinct experts of the rank that has the most: mean",
    "ranks_per_token_mean": "ranks that a token is sent to: mean",
    "nodes_per_token_mean": "nodes that a token is sent to: mean",
    "received_tokens_max_mean": "tokens that the busiest rank receives: mean",
    "received_tokens_max_p99": "tokens that the busiest rank receives: 99th percentile",
    "layer_saved": "share of a layer's time saved over the baseline",
    "experts_saved": "share of the experts' time saved over the baseline",
    "step_saved": "share of a step's time saved over the baseline",
    "layer_us": "time of a layer (us)",
    "exchange_us": "time of the exchange (us)",
}
_LABELS |= {of: _LABELS[f"{of}_mean"] for of in ("imbalance", "idle_ranks", "ranks_per_token", "nodes_per_token")}
_KEYS = ["placement", "ep_size", "tokens"]
_TAIL = ["threshold", "probability", "low", "high", "method"]
_POINTS = 24  # of a sampled curve
_DEEPEST = 1e-9


def read_sources(folder: Path) -> list[dict[str, Any]]:
    """A sweep, or advice in its splits. Raises InputError where a folder holds neither or something damaged."""
    if is_there(folder / PROVENANCE):
        return [_of_sweep(folder)]
    if is_there(folder / "advice.json"):
        return _of_advice(folder)
    what = f"holds neither a finished sweep ({PROVENANCE}) nor advice (advice.json)"
    raise InputError(f"{folder} {what if is_there(folder) else 'does not exist'}")


def _of_sweep(folder: Path) -> dict[str, Any]:
    result = read_result(folder)
    ratios = result.against_baseline().rename(
        columns=lambda name: name if name in _KEYS else f"against_baseline_{name}"
    )
    cells = result.summary.merge(ratios, on=_KEYS, how="left")
    first = result.summary.iloc[0]
    return {
        "name": f"{model_label(first.model)}, {first.workload} traffic",
        "model": model_label(first.model),
        "answer": answer_of_sweep(result),
        "baseline": str(first.baseline),
        **_cells(cells),
        "tail": _tail_of(result),
        "notes": [
            *result.notes,
            f"{first.trials} steps in each cell, of {counted(first.draws, 'independent layer')}.",
        ],
        "provenance": read_json(folder / PROVENANCE, str(folder / PROVENANCE)),
        "folder": str(folder),
    }


def _of_advice(folder: Path) -> list[dict[str, Any]]:
    table, about = read_table(folder, "advice", "advise")
    try:
        return [_of_split(folder, rows, about) for _, rows in table.groupby(["gpu", "exchange", "split"], sort=False)]
    except (ValueError, KeyError, AttributeError) as error:
        raise InputError(f"{folder / 'advice.csv'} is not a table of epsim advise ({error})") from None


def _of_split(folder: Path, rows: pd.DataFrame, about: dict[str, Any]) -> dict[str, Any]:
    """One GPU, exchange and split of an advice; what the engine runs as another placement has no curve."""
    first = rows.iloc[0]
    other = rows.verdict.notna() & (rows.runs_as != rows.placement)  # perfect balance has no verdict, and stays
    left = [
        f"{row.placement} is not run by the engine"
        + (f": it runs {row.runs_as}." if isinstance(row.runs_as, str) else ", which has no such option.")
        for row in rows[other].itertuples()
    ]
    base = rows.drop_duplicates("tokens").assign(
        placement=first.baseline, layer_saved=0.0, experts_saved=0.0, step_saved=0.0
    )
    for name in [name for name in rows if f"baseline_{name}" in rows]:
        base[name] = base[f"baseline_{name}"]
    for name in [name for name in base if name.endswith(("_low", "_high")) and f"baseline_{name}" not in rows]:
        base[name] = base.get(name.rpartition("_")[0], np.nan)
    cells = pd.concat([base, rows[~other]], ignore_index=True)
    name = f"{model_label(first.model)}, advice on {first.gpu}, {first.exchange}: {first.split}"
    return {
        "name": name,
        "model": model_label(first.model),
        "answer": _answer_of_advice(rows[~other], left),
        "baseline": str(first.baseline),
        **_cells(cells),
        "tail": None,
        "notes": [f"Traffic: {first.workload}."],
        "provenance": about,
        "folder": str(folder),
    }


def _cells(cells: pd.DataFrame) -> dict[str, Any]:
    """Cells by column, and the metrics that they have: those with an interval first asked for."""
    metrics = [
        {"key": key, "label": label, "interval": f"{key}_low" in cells}
        for key, label in _LABELS.items()
        if key in cells and cells[key].notna().any()
    ]
    columns = [
        name
        for m in metrics
        for name in (m["key"], *([f"{m['key']}_low", f"{m['key']}_high"] if m["interval"] else []))
    ]
    placements = list(dict.fromkeys(cells.placement))
    return {
        "placements": placements,
        "ep_sizes": sorted({int(size) for size in cells.ep_size}),
        "metrics": metrics,
        "cells": {
            "placement": [placements.index(name) for name in cells.placement],
            "ep_size": cells.ep_size.tolist(),
            "tokens": cells.tokens.tolist(),
            **{name: [None if value != value else value for value in cells[name].tolist()] for name in columns},
        },
    }


def _tail_of(result: SweepResult) -> dict[str, Any]:
    """P(imbalance >= x): sampled, from the counts where they were kept, and what goes beyond sampling."""
    tail = result.tail[(result.tail.metric == "imbalance") & (result.tail.probability < 1)]
    beyond = tail[(tail.method != "sampled") & (tail.high >= _DEEPEST)]
    if result.counts.empty:
        sampled = tail[tail.method == "sampled"]
    else:
        curves = result.exceedances("imbalance", _POINTS)
        sampled = curves.rename(columns={"value": "threshold"}).assign(method="sampled")
    rows = pd.concat([sampled[[*_KEYS, *_TAIL]], beyond[[*_KEYS, *_TAIL]]])
    methods, placements = ["sampled", "bound", "exact", "rare"], list(dict.fromkeys(result.summary.placement))
    given = sorted(set(beyond.given) - {""})
    return {
        "methods": methods,
        "given": given[-1] if given else "",
        "placement": [placements.index(name) for name in rows.placement],
        "method": [methods.index(name) for name in rows.method],
        "ep_size": rows.ep_size.tolist(),
        "tokens": rows.tokens.tolist(),
        **{name: [float(f"{value:.6g}") for value in rows[name]] for name in _TAIL[:-1]},
    }


def answer_of_sweep(result: SweepResult) -> str:
    """What the best placement changes over the baseline, in a sentence or two, with its cells."""
    ratios = result.against_baseline()
    baseline = str(result.summary.baseline.iloc[0])
    ratios = ratios[(ratios.placement != baseline) & (ratios.ep_size > 1)]
    if ratios.empty:
        return f"One placement was sampled, {baseline}: there is nothing to compare it with."
    means = ratios.groupby("placement")["mean"].apply(lambda ratio: float(np.log(ratio).mean()))
    best = str(means.idxmin())
    rows = ratios[ratios.placement == best]
    most = rows.loc[rows["mean"].idxmin()]
    largest = rows[rows.tokens == rows.groupby("ep_size").tokens.transform("max")].sort_values("ep_size")
    text = f"{best} instead of {baseline} changes the busiest rank's mean load by {_change(most['mean'])} at best "
    text += f"(95 %: {_change(most.mean_low)} to {_change(most.mean_high)}; "
    text += f"EP {most.ep_size}, {counted(most.tokens, 'token')} per step). In the largest steps: "
    few = largest.iloc[np.unique(np.linspace(0, len(largest) - 1, min(4, len(largest))).round().astype(int))]
    parts = (
        f"{_change(row['mean']).removesuffix(' %')} ± {50 * (row.mean_high - row.mean_low):.1f} % at EP {row.ep_size}"
        for _, row in few.iterrows()
    )
    return text + ", ".join(parts) + "."


def _change(ratio: float) -> str:
    text = f"{100 * (ratio - 1):.1f}"
    return "0 %" if float(text) == 0 else f"{float(text):+.1f} %".replace("-", "\N{MINUS SIGN}")


def _answer_of_advice(rows: pd.DataFrame, left: list[str]) -> str:
    """Which placement has which verdict at which step sizes."""
    judged = rows[rows.verdict.notna()]
    worth = judged[judged.verdict.str.startswith("worth")]
    if worth.empty:
        text = "No placement is worth a trial on this traffic."
    else:
        parts = []
        for name, of in worth.groupby("placement", sort=False):
            best = of.loc[of.layer_saved.idxmax()]
            steps = ", ".join(map(str, of.tokens))
            parts.append(f"{name} at {steps} tokens per step (up to {best.layer_saved:.1%} of a layer's time)")
        text = f"Worth a trial: {'; '.join(parts)}."
    return " ".join([text, *dict.fromkeys(left)])
