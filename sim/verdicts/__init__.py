"""Published claims examined: set-up, computation and verdict of each. No verdict is written by hand."""

import tomllib
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from sim.errors import InputError, unknown, whole_number
from sim.progress import track
from sim.traffic import SyntheticTraffic, Workload, load_workload
from sim.verdicts import exact, gains, loads
from sim.verdicts.verdict import PLAUSIBLE_SHARE, Conditions, Finding

__all__ = ["CLAIMS", "Conditions", "Finding", "claim_ids", "claims"]

CLAIMS: dict[str, Callable[..., Finding]] = {
    "groups-unused": exact.groups_unused,
    "one-rank": exact.one_rank,
    "less-waiting": loads.less_waiting,
    "fewer-gpus-unlucky": exact.fewer_gpus_unlucky,
    "last-rank": exact.last_rank,
    "qpm-8": gains.qpm_8,
    "tput-14.57": gains.tput_14_57,
    "eplb-3": gains.eplb_3,
    "balanced-18": gains.balanced_18,
    "eplb-1.49-2.54": gains.eplb_gains,
    "rearrange-16.7": gains.rearrange_16_7,
    "idle-half": exact.idle_half,
}
"""The computation of each claim, by id."""


_SECONDS = {
    "less-waiting": 7.5,
    "qpm-8": 3.4,
    "tput-14.57": 3.5,
    "eplb-3": 1.8,
    "balanced-18": 0.8,
    "eplb-1.49-2.54": 0.8,
}
"""What claims take, relative to each other; 0.1 where none is given."""


@cache
def _entries() -> dict[str, dict[str, Any]]:
    """The table of claims by id."""
    table = tomllib.loads(resources.files("sim.verdicts").joinpath("claims.toml").read_text(encoding="utf-8"))
    return {entry.get("id", key): entry for key, entry in table.items()}


def claim_ids() -> list[str]:
    """Ids of the claims."""
    return list(CLAIMS)


def claims(
    workload: Workload | str | Path = "chat",
    *,
    only: list[str] | None = None,
    seed: int = 0,
    effort: float = 1.0,
    plausible_share: float = PLAUSIBLE_SHARE,
    threads: int | None = None,
) -> pd.DataFrame:
    """Examine published claims under some traffic.

    Parameters
    ----------
    workload : Workload, str or Path
        Synthetic decode traffic; prefill claims add the request effect of the preset 'prefill' to it.
    only : list of str
        Some of the ids (default: all).
    seed : int
    effort : float
        Scales the number of trials; 1 is the published table.
    plausible_share : float
        Largest share of a step that routed experts and exchange may have, for a gain to be put down to them.
    threads : int

    Returns
    -------
    DataFrame
        One row per claim: id, source, setup, claim, assumed, workload, computed (text), value, low, high, unit,
        needed_share, needed_share_low, needed_share_high, verdict, why.

    Raises
    ------
    InputError
        Unknown names, recorded traffic, or numbers out of range.
    """
    traffic = workload if isinstance(workload, Workload) else load_workload(workload)
    if not isinstance(traffic, SyntheticTraffic):
        raise InputError(f"`workload` {traffic.name}: claims are examined under synthetic traffic, not under a record")
    for name in only or []:
        if name not in CLAIMS:
            raise unknown("claim", name, CLAIMS)
    if not 0.01 <= effort <= 100:
        raise InputError(f"`effort` {effort:g}: must be from 0.01 to 100")
    if not 0 < plausible_share <= 1:
        raise InputError(f"`plausible_share` {plausible_share:g}: must be above 0 and at most 1")
    conditions = Conditions(traffic, whole_number("`seed`", seed, 0, 2**63 - 1), effort, plausible_share, threads)
    names = list(only or CLAIMS)
    sizes = [_SECONDS.get(name, 0.1) for name in names]
    return pd.DataFrame([_row(name, conditions) for name in track(names, sizes, names)])


def _row(name: str, conditions: Conditions) -> dict[str, object]:
    entry = _entries()[name]
    published = [entry["published"]] if "published" in entry else []
    finding = CLAIMS[name](conditions, *published)
    row = {"id": name, **{key: entry[key] for key in ("source", "setup", "claim", "assumed")}}
    row |= {"workload": conditions.workload.name, "computed": finding.computed}
    row |= {"value": finding.value, "low": finding.low, "high": finding.high, "unit": finding.unit}
    ends = ("needed_share", "needed_share_low", "needed_share_high")
    return row | dict(zip(ends, finding.needed_share, strict=True)) | {"verdict": finding.verdict, "why": finding.why}
