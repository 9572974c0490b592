"""What a result depends on: what placements save under each kind of traffic, and which conclusions hold for all of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from sim.advice.splits import splits_of
from sim.cost import Gpu, predict_gain
from sim.cost.gain import IN_STEP, PERFECT
from sim.errors import InputError
from sim.model import ModelSpec
from sim.placement import is_load_aware, split_name, strategy_name
from sim.progress import track
from sim.traffic import LoadCounts, Workload
from sim.traffic.split import MeasuredTraffic

PLACEMENTS = ("round_robin", "eplb", "eplb+R")
"""What is compared where nobody says; +R is one redundant slot on each rank."""
SAMPLED = {"most_steps": 64, "layer_sets": 16}
"""What is sampled where nobody says, as in `sample_steps`: of steps of 16,384 tokens about as many as there are layer sets."""
LEAST = 0.01
"""Saved share below which a change is none to speak of, where nobody says."""
_COLUMNS = ["layer_draws", "knee", "extrapolated"]


class Subject(NamedTuple):
    """Traffic on a model, and other traffic of the same layers to fit on, if there is some."""

    model: ModelSpec
    traffic: Workload | LoadCounts
    fit_on: MeasuredTraffic | None = None

    @property
    def name(self) -> str:
        """Of the traffic, without the ending of a file; of two files, with the one that load-aware placements are fitted on."""
        if self.fit_on is None:
            return self.traffic.name.partition(".")[0]
        return f"{self.traffic.name.partition('.')[0]} (fitted on {self.fit_on.name.removeprefix('file:').partition('.')[0]})"


def saved_by_traffic(
    subjects: Sequence[Subject],
    gpu: Gpu | str | Path,
    *,
    ep_sizes: Sequence[int],
    exchange: Sequence[str] = ("pair", "token"),
    placements: Sequence[str] = PLACEMENTS,
    baseline: str = "linear",
    seed: int = 0,
    threads: int | None = None,
    **options: Any,
) -> pd.DataFrame:
    """What placements save over a baseline under each kind of traffic, on the same sampled tokens.

    Load-aware placements are fitted as advice fits them (the first of `splits_of`): of synthetic traffic on other tokens of the
    same layers, of recorded routing on every second sequence, of load counts on a half at random, or on the other file.

    EP sizes of more ranks than a model has experts are left out for it; where there are as many, so are placements without
    redundant slots: every rank has one expert, wherever it is. `+R` in the name of a placement stands for one redundant slot on
    each rank; `options` are those of `sim.predict_gain`.

    A row for each subject, EP size, number of tokens, placement and measure, which is `imbalance` or the name of an exchange, has
    in `saved` the share of the busiest rank's load, or of the layer's time under that exchange, that the placement has less
    than the baseline, with its paired 95 % interval over layers, and in `of` what it is a share of (us for times).
    """
    for name in [baseline, *placements]:
        if name not in (IN_STEP, PERFECT):
            strategy_name(name.replace("+R", "+1"), "placement")
    tables = []
    names = [subject.name for subject in subjects]
    for subject in track(subjects, [1.0] * len(subjects), names):
        model, split = subject.model, splits_of(subject.model, subject.traffic, subject.fit_on, seed, threads)[0]
        for ep_size in ep_sizes:
            if ep_size > model.n_experts:
                continue
            of_name = {name.replace("+R", f"+{ep_size}"): name for name in placements}
            if ep_size == model.n_experts:
                of_name = {own: name for own, name in of_name.items() if split_name(own)[1]}
            if not of_name:
                continue
            is_fitted = any(map(is_load_aware, [baseline, *of_name]))
            setup = SAMPLED | options | ({"fit_on": split.fitted_on} if is_fitted else {})
            gains = predict_gain(
                model, split.scored, gpu, placement=list(of_name), baseline=baseline, exchange=list(exchange), ep_sizes=ep_size,
                seed=seed, threads=threads, paired_imbalance=True, **setup,
            )  # fmt: skip
            tables.append(_long(gains, of_name).assign(workload=subject.name, fitted=split.about))
    if not tables:
        raise InputError(f"`ep_sizes` {','.join(map(str, ep_sizes))}: no rank has several experts to place, nor copies")
    table = pd.concat(tables, ignore_index=True)
    first = ["workload", "model", "fitted", "gpu", "dtype", "baseline", "ep_size", "tokens", "placement", "measure"]
    return table[[*first, "of", "saved", "low", "high", *_COLUMNS]]


def _long(gains: pd.DataFrame, of_name: dict[str, str]) -> pd.DataFrame:
    """Rows of `predict_gain` with a row for each measure; placements as they were asked for."""
    gains = gains.assign(placement=gains.placement.replace(of_name))
    keys = ["model", "gpu", "dtype", "baseline", "ep_size", "tokens", "placement", *_COLUMNS]
    parts = []
    first = gains[gains.exchange == gains.exchange.iloc[0]].assign(exchange="imbalance", knee=False, extrapolated=False)
    for rows, of, saved in (
        (first, "baseline_imbalance", "imbalance_saved"),
        (gains, "baseline_layer_us", "layer_saved"),
    ):
        ends = {of: "of", saved: "saved", f"{saved}_low": "low", f"{saved}_high": "high", "exchange": "measure"}
        parts.append(rows[[*keys, *ends]].rename(columns=ends))
    return pd.concat(parts, ignore_index=True)


SAVES, LEVEL, COSTS, UNDECIDED = "saves", "level", "costs", "undecided"


class Conclusion(NamedTuple):
    """What a placement does to a measure at a number of tokens per step: what is shown for the most traffic.

    A cell shows that a placement saves (or costs) where its whole 95 % interval is above `least` (or below -`least`), that it
    changes nothing to speak of (LEVEL) where it lies between the two, and nothing (UNDECIDED) elsewhere.
    """

    placement: str
    measure: str
    tokens: int
    effect: str  # SAVES, LEVEL or COSTS
    holds: list[str]  # traffic that shows it at every EP size
    range: tuple[float, float]  # of the saved share in these; nan without any
    others: dict[str, dict[str, list[int]]]  # by what is shown instead, traffic and the EP sizes where; [] for all
    n_traffic: int


def conclusions(table: pd.DataFrame, least: float = LEAST) -> list[Conclusion]:
    """The conclusions of `saved_by_traffic`, one for each number of tokens, measure and placement."""
    shown = np.select(
        [table.low > least, table.high < -least, (table.low >= -least) & (table.high <= least)],
        [SAVES, COSTS, LEVEL],
        UNDECIDED,
    )
    groups = table.assign(shown=shown).groupby(["tokens", "measure", "placement"], sort=False)
    return sorted((_conclusion(rows) for _, rows in groups), key=lambda one: one.tokens)


def _conclusion(rows: pd.DataFrame) -> Conclusion:
    of_traffic = {str(name): of for name, of in rows.groupby("workload", sort=False)}

    def everywhere(effect: str) -> list[str]:
        return [name for name, of in of_traffic.items() if (of.shown == effect).all()]

    effect = max((SAVES, COSTS, LEVEL), key=lambda name: (len(everywhere(name)), (rows.shown == name).sum()))
    others: dict[str, dict[str, list[int]]] = {}
    for instead in (SAVES, COSTS, LEVEL, UNDECIDED):
        there = {name: of.ep_size[of.shown == instead].tolist() for name, of in of_traffic.items()}
        if instead != effect and any(there.values()):
            others[instead] = {
                name: [] if len(sizes) == len(of_traffic[name]) else sizes for name, sizes in there.items() if sizes
            }
    holds, row = everywhere(effect), rows.iloc[0]
    saved = rows.saved[rows.workload.isin(holds)]
    ends = (float(saved.min()), float(saved.max()))
    return Conclusion(row.placement, row.measure, int(row.tokens), effect, holds, ends, others, len(of_traffic))
