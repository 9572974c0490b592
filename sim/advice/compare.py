"""Whether a placement is worth a trial for some traffic: gains of all candidates, and the rule that judges them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.advice.engines import DEFAULT_BACKEND, engine_of, exchange_of
from sim.advice.splits import Split, splits_of
from sim.cost import Gpu, load_gpu, predict_gain
from sim.cost.exchange import exchange_kind
from sim.cost.expert import BYTES_PER_VALUE
from sim.cost.gain import IN_STEP, PERFECT
from sim.cost.inputs import as_numbers, expert_parameters
from sim.errors import InputError, shown, whole_number
from sim.model import ModelSpec, load_model
from sim.placement import BUDGET, check_ep_size, is_load_aware, place_fixed, split_name, strategy_name
from sim.progress import track
from sim.traffic import LoadCounts, RecordedTraffic, Workload, load_workload, read_traffic
from sim.traffic.read import names_file
from sim.traffic.split import MeasuredTraffic

PER_RANK = {"tokens": [1, 8, 64, 512], "tokens_per_rank": True}
"""Steps where nobody says."""
SAMPLED = {"most_steps": 128, "layer_sets": 8, "budget_tokens": 2**23}
"""What is sampled where nobody says, as in `sample_steps`: intervals come from the layers, more steps hardly narrow them."""
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
_SET_HERE = {"exchange": "backend", "ep_sizes": "ep_size", "placement": "placements", "baseline": "placements"}
_OF_SPLITS = ["step_saved_low", "step_saved_high", "splits"]


@dataclass(frozen=True, eq=False)
class Advice:
    """What was found.

    Attributes
    ----------
    gains : DataFrame
        Columns of `sim.predict_gain` for every split, candidate and number of tokens, perfect balance, and in_step where a
        placement has copies; `split` says how the traffic was split (first the one that load-aware placements save least in),
        `redundant_bytes` what a GPU holds in redundant slots.
    verdicts : DataFrame
        placement, tokens, the weakest lower and the strongest upper end of the step's saved share over the splits, near the
        crossover with the model's error, the verdict, in how many of the `splits` it is worth a trial, and `runs_as`, the
        placement that vLLM runs where this one is asked for (empty: no engine has it).
    engines : dict
        How an engine is told to run a candidate, and what it does; keyed by the candidates that it is said of.
    verdict : str
        Over all that an engine runs: 'worth a trial', 'not for this traffic' or 'not enough data'.
    best : DataFrame
        Of each number of tokens the row of `verdicts` that is named, of what an engine runs (`rule_text`).
    why : str
        Why that verdict is 'not enough data', and what would settle it; else empty.
    notes : list of str
        Remarks of the fits, where load counts are scored as synthetic traffic.
    """

    gains: pd.DataFrame
    verdicts: pd.DataFrame
    engines: dict[str, str]
    verdict: str
    best: pd.DataFrame
    why: str
    notes: list[str]

    def table(self) -> pd.DataFrame:
        """Gains of every split with the verdicts, which are over all splits, beside them."""
        return self.gains.merge(self.verdicts.drop(columns=_OF_SPLITS), how="left", on=["placement", "tokens"])


def candidates(model: ModelSpec, ep_size: int, redundant: int | None = None) -> list[str]:
    """Placements to compare with the baseline: eplb with 0, R and 2R redundant slots, or the next numbers that divide, and R of
    them for each layer as a budget.

    R is `redundant`, by default one slot per rank.
    """
    extra = ep_size if redundant is None else whole_number("`redundant`", redundant, 1, 2**13)
    if extra % ep_size:
        raise InputError(
            f"`redundant` {extra}: must be a multiple of `ep_size` {ep_size}, the same number on every rank"
        )
    least = -model.n_experts % ep_size
    of_eplb = [f"eplb+{least + n * extra}" for n in (0, 1, 2)]
    names = ["round_robin", "random", *map(strategy_name, of_eplb), f"{BUDGET}+{least + extra}"]
    return list(dict.fromkeys(names))


def advise(
    model: ModelSpec | str | Path,
    traffic: Workload | LoadCounts | str | Path,
    gpu: Gpu | str | Path,
    *,
    ep_size: int,
    fit_on: MeasuredTraffic | str | Path | None = None,
    placements: str | list[str] = "linear",
    backend: str = DEFAULT_BACKEND,
    data_parallel: int | None = None,
    redundant: int | None = None,
    least_saved: float = LEAST_SAVED,
    moe_share: float | None = None,
    step_us: float | None = None,
    seed: int = 0,
    **options: Any,
) -> Advice:
    """Compare placements for some traffic, and judge whether one is worth a trial.

    Parameters
    ----------
    model : ModelSpec, str or Path
    traffic : Workload, LoadCounts, str or Path
        Recorded routing, load counts or synthetic traffic; the name of a file or of a preset. Load-aware placements are
        fitted on one part of it and scored on another, in several ways (`splits_of`).
    gpu : Gpu, str or Path
    ep_size : int
    fit_on : RecordedTraffic, LoadCounts, str or Path
        Other traffic of the same layers, to fit on; or the name of its file.
    placements : str or list of str
        The baseline, as in `file:CURRENT` for the map that runs now; then the placements that are compared with it, by
        default linear and those of `candidates`. Budgets of copies are compared and not judged: of engines vllm-ascend alone
        loads such a map.
    backend : str
        All2all backend, or a kind of exchange, where the backend is not known (`epsim gpus`); times are the backend's own where
        it has some, else those of its kind.
    data_parallel : int
        Data-parallel ranks; by default `ep_size`.
    redundant : int
        R: eplb is compared with 0, R and 2R redundant slots, and with R as a budget; by default `ep_size`.
    least_saved : float
        Share of the step that is worth a trial.
    moe_share, step_us, balancer_us
        As in `sim.predict_gain`; without either the share is taken as ASSUMED_SHARE.
    **options
        dtype, tokens and the like, as in `sim.predict_gain`; by default steps have 1, 8, 64 and 512 tokens per rank.

    Returns
    -------
    Advice

    Raises
    ------
    InputError
        As `sim.predict_gain`, and for names and numbers that are not allowed.

    Examples
    --------
    >>> import sim
    >>> advice = sim.advise("mixtral-8x7b", "chat", "h200", ep_size=4, placements=["linear", "eplb"], tokens=[4096],
    ...     most_steps=4, layer_sets=1, threads=1)
    >>> advice.best.placement.item(), advice.best.verdict.item()
    ('eplb', 'worth a trial')
    """
    model, gpu = load_model(model), load_gpu(gpu)
    scored: Workload | LoadCounts = _as_traffic("traffic", traffic, model)
    other: MeasuredTraffic | None = None if fit_on is None else _as_traffic("fit_on", fit_on, model)
    check_ep_size(model, ep_size)
    if ep_size < 2:
        raise InputError(f"`ep_size` {ep_size}: there is nothing to place on one rank")
    for name in _SET_HERE.keys() & options.keys():
        raise InputError(f"`{name}`: sim.advise calls it `{_SET_HERE[name]}`")
    ranks = whole_number("`data_parallel`", ep_size if data_parallel is None else data_parallel, 1, 2**15)
    as_numbers("`least_saved`", least_saved, 1e-6, 1)
    if step_us is not None and np.size(options.get("tokens", PER_RANK["tokens"])) > 1:
        raise InputError("`step_us` is the time of steps of one size: give one number of `tokens` with it")
    baseline, *names = _names(placements, model, ep_size, redundant)
    ranks_per_node = whole_number("`ranks_per_node`", options.get("ranks_per_node", 8), 1, 2**15)
    asked, names = IN_STEP in names, [name for name in names if name != IN_STEP]
    copied = any(_has_copies(name, model, ep_size, ranks_per_node) for name in [baseline, *names])
    ends = [IN_STEP, PERFECT] if copied or asked else [PERFECT]
    share = ASSUMED_SHARE if moe_share is None and step_us is None else moe_share
    setup: dict[str, Any] = SAMPLED | (PER_RANK if "tokens" not in options else {}) | options
    setup |= {"ep_sizes": ep_size, "exchange": exchange_of(backend, ranks, gpu.name), "seed": seed}
    setup |= {"baseline": baseline, "placement": [*names, *ends], "moe_share": share, "step_us": step_us}
    splits = splits_of(model, scored, other, seed, options.get("threads"))
    gains = _gains(model, gpu, splits, setup)
    engines = {name: engine_of(name, model, ep_size, backend, ranks) for name in [baseline, *names]}
    judged = [name for name in names if split_name(name)[0] != BUDGET]  # which no engine on these GPUs runs
    verdicts = _verdicts(gains, judged, least_saved, is_enough=_is_enough(scored))
    verdicts["runs_as"] = [engines[name].runs_as for name in verdicts.placement]
    run = verdicts[verdicts.runs_as == verdicts.placement]
    hows: dict[str, str] = {}
    for how in dict.fromkeys(engine.how for engine in engines.values()):
        hows[", ".join(name for name, engine in engines.items() if engine.how == how)] = how
    notes = list(dict.fromkeys(note for split in splits for note in split.notes))
    verdict = overall(run)
    why = _why_open(scored, run, least_saved) if verdict == UNSURE else ""
    return Advice(gains, verdicts, hows, verdict, best_of(run, least_saved), why, notes)


def _names(placements: str | list[str], model: ModelSpec, ep_size: int, redundant: int | None) -> list[str]:
    """The baseline, and what is compared with it."""
    given = [placements] if isinstance(placements, str) else placements
    if not isinstance(given, list | tuple) or not given:
        raise InputError(f"`placements` {shown(given)}: must be names, at least one")
    names = [name if i and name == IN_STEP else strategy_name(name, "placements") for i, name in enumerate(given)]
    names = list(dict.fromkeys(names))
    others = names[1:] or ["linear", *candidates(model, ep_size, redundant)]
    return [names[0], *(name for name in others if name != names[0])]


def _has_copies(name: str, model: ModelSpec, ep_size: int, ranks_per_node: int) -> bool:
    if name.startswith("file:"):
        return place_fixed(name, model, ep_size, ranks_per_node).has_replicas
    base, redundant = split_name(name)
    return redundant > 0 and base != BUDGET  # which may spend none


def _as_traffic(parameter: str, value: Any, model: ModelSpec) -> Any:
    """Traffic itself, what a file of recorded routing or load counts holds, or, where it is scored, a workload by its name."""
    is_fitted = parameter == "fit_on"
    if isinstance(value, str | Path):
        if is_fitted or names_file(str(value)):
            return read_traffic(str(value).removeprefix("file:"), model)
        return load_workload(value)
    if not isinstance(value, MeasuredTraffic if is_fitted else Workload | LoadCounts):
        raise InputError(f"`{parameter}` {shown(value)}: must be traffic, or the name of a file of it")
    return value


def _gains(model: ModelSpec, gpu: Gpu, splits: list[Split], setup: dict[str, Any]) -> pd.DataFrame:
    """Gains in all splits, the hardest first."""
    is_fitted = any(map(is_load_aware, [setup["baseline"], *setup["placement"]]))
    names = [f"split {i} of {len(splits)}" for i in range(1, len(splits) + 1)]
    tables = [
        predict_gain(model, split.scored, gpu, fit_on=split.fitted_on if is_fitted else None, **setup).assign(
            split=split.about
        )
        for split in track(splits, [1.0] * len(splits), names if len(splits) > 1 else ())
    ]
    gains = pd.concat(sorted(tables, key=_saved_by_eplb), ignore_index=True)
    gains["copies_of"] = gains.get("copies_of", pd.Series("", gains.index)).fillna("")
    copies = [
        _redundant_bytes(model, row.copies_of or row.placement, row.ep_size, row.dtype) for row in gains.itertuples()
    ]
    return gains.assign(redundant_bytes=copies)


def _verdicts(gains: pd.DataFrame, names: list[str], least_saved: float, *, is_enough: bool) -> pd.DataFrame:
    """A row for each candidate and number of tokens, over all splits."""
    rows, best = [], gains[gains.placement == PERFECT]
    cap = judged_ends(best)[1] if perfect_is_best(gains) else np.inf
    most_saved = pd.Series(cap, index=[best.tokens, best.split])
    for (name, tokens), of_splits in gains[gains.placement.isin(names)].groupby(["placement", "tokens"], sort=False):
        low, high = judged_ends(of_splits)
        row = {"placement": name, "tokens": tokens, "step_saved_low": low.min(), "step_saved_high": high.max()}
        most = np.minimum(high, most_saved[tokens][of_splits.split])  # NaN where one of them is
        row |= {"verdict": judge(low, most.to_numpy(), least_saved, is_enough=is_enough)}
        rows.append(row | {"splits_worth": int((low >= least_saved).sum()), "splits": len(low)})
    columns = ["placement", "tokens", "step_saved_low", "step_saved_high", "verdict", "splits_worth", "splits"]
    return pd.DataFrame(rows, columns=columns)


def _saved_by_eplb(gains: pd.DataFrame) -> float:
    """What load-aware placements save in a split, for the order of splits: the least first."""
    saved = gains.layer_saved[gains.placement.str.startswith("eplb")]
    return float((saved if len(saved) else gains.layer_saved).mean())


def _is_enough(traffic: Workload | LoadCounts) -> bool:
    return not isinstance(traffic, RecordedTraffic) or len(traffic.starts) - 1 >= 2 * LEAST_SEQUENCES


def _why_open(traffic: Workload | LoadCounts, run: pd.DataFrame, least_saved: float) -> str:
    """What leaves the verdict over all open."""
    if not _is_enough(traffic) and isinstance(traffic, RecordedTraffic):
        n = len(traffic.starts) - 1
        return f"{traffic.name.removeprefix('file:')} has {n} recorded sequences, and a verdict takes {2 * LEAST_SEQUENCES}"
    if run.step_saved_low.isna().all():
        return "one layer has no interval"
    return (
        f"the saved share of the step may lie on either side of {least_saved:.1%}; more layers or sequences narrow it"
    )


def _redundant_bytes(model: ModelSpec, name: str, ep_size: int, dtype: str) -> float:
    """Weights that a GPU holds in redundant slots, over all layers; of a budget those that it may spend."""
    redundant = 0 if name == PERFECT else split_name(name)[1]
    return redundant / ep_size * model.n_moe_layers * expert_parameters(model) * BYTES_PER_VALUE[dtype]


def rule_text(least_saved: float) -> str:
    """The rule, for people."""
    return (
        f"'{WORTH}': the predicted step saves at least {least_saved:.1%} at the lower end of its 95 % interval, in every split "
        f"of the traffic. '{NOT}': it saves less at the upper end, in every split; perfect balance caps that end, except where "
        f"a token is sent once to each rank. '{UNSURE}': neither, or fewer than {LEAST_SEQUENCES} recorded sequences in a half, "
        f"or one layer. Near the crossover (~) both ends are first moved outwards by {KNEE_ERROR['fp8']:.0%} of the experts' "
        f"time ({KNEE_ERROR['bf16']:.0%} in bf16), by which the model may be off there. Of placements whose lower ends are "
        f"within {least_saved / 2:.1%} of the best one's, the one with the fewest slots is named."
    )


def judged_ends(gains: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the step's saved share, float64 [rows], with the model's own error near the crossover."""
    of_experts = 1 - gains.baseline_exchange_us / gains.baseline_layer_us
    error = np.where(gains.knee, gains["dtype"].map(KNEE_ERROR) * of_experts * gains.moe_share, 0.0)
    return (gains.step_saved_low - error).to_numpy(), (gains.step_saved_high + error).to_numpy()


def perfect_is_best(gains: pd.DataFrame) -> bool:
    """Whether no placement can beat perfect balance: not where tokens are sent once to each rank, since it is taken to receive as
    many as the baseline's busiest rank, and a placement may receive fewer.
    """
    return not (gains.exchange.map(exchange_kind) == "token").any()


def judge(low: np.ndarray, high: np.ndarray, least_saved: float, *, is_enough: bool) -> str:
    """Verdict on a placement at one number of tokens: ends of the step's saved share in each split, float64 [splits]; the
    upper ones not above those of perfect balance, where that is the best there is.
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
