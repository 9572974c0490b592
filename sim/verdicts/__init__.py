"""Published claims examined: set-up, computation and verdict of each. No verdict is written by hand."""

import re
import tomllib
from collections.abc import Callable
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from sim.errors import InputError, shown, unknown
from sim.options import ClaimOptions
from sim.options.declare import takes
from sim.progress import track
from sim.traffic import SyntheticTraffic, Workload, load_workload
from sim.verdicts import gains, loads
from sim.verdicts.verdict import Conditions, Finding

__all__ = ["CLAIMS", "Conditions", "Finding", "claims"]

CLAIMS: dict[str, Callable[..., Finding]] = {
    "groups-unused": loads.groups_unused,
    "one-rank": loads.one_rank,
    "less-waiting": loads.less_waiting,
    "fewer-gpus-unlucky": loads.fewer_gpus_unlucky,
    "last-rank": loads.last_rank,
    "qpm-8": gains.qpm_8,
    "tput-14.57": gains.tput_14_57,
    "eplb-3": gains.eplb_3,
    "balanced-18": gains.balanced_18,
    "eplb-1.49-2.54": gains.eplb_gains,
    "rearrange-16.7": gains.rearrange_16_7,
    "idle-half": loads.idle_half,
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
    return tomllib.loads(resources.files("sim.verdicts").joinpath("claims.toml").read_text(encoding="utf-8"))


@takes(ClaimOptions)
def claims(
    workload: Workload | str | Path = "chat", *, only: str | list[str] | None = None, **options: Any
) -> pd.DataFrame:
    """Examine published claims under some traffic.

    Parameters
    ----------
    workload : Workload, str or Path
        Synthetic decode traffic; prefill claims add the request effect of the preset 'prefill' to it.
    only : str or list of str
        Ids of those to examine, or the number of a pull request or issue, as in '15517' (default: all; see CLAIMS).
    **options

    Returns
    -------
    DataFrame
        One row per claim: id, source, setup, claim, assumed, workload, computed (text), value, low, high, unit,
        needed_share, needed_share_low, needed_share_high, verdict, why.

    Raises
    ------
    InputError
        Unknown names, recorded traffic, or numbers out of range.

    Examples
    --------
    >>> import sim
    >>> sim.claims(only="idle-half", threads=1).verdict.item()
    'holds only when a batch has at most 16 tokens'
    """
    traffic = workload if isinstance(workload, Workload) else load_workload(workload)
    if not isinstance(traffic, SyntheticTraffic):
        raise InputError(f"`workload` {traffic.name}: claims are examined under synthetic traffic, not under a record")
    names = [only] if isinstance(only, str) else list(CLAIMS) if only is None else only
    if not isinstance(names, list) or not names:
        raise InputError(f"`only` {shown(names)}: must be ids of claims, at least one")
    told = {name: re.findall(r"#(\d+)", entry["source"]) for name, entry in _entries().items()}
    names = [one for name in names for one in [of for of in told if str(name).lstrip("#") in told[of]] or [name]]
    for name in names:
        if name not in CLAIMS:
            raise unknown("claim", shown(name), CLAIMS)
    conditions = Conditions(traffic, **vars(ClaimOptions(**options)))
    sizes = [_SECONDS.get(name, 0.1) for name in names]
    return pd.DataFrame([_row(name, conditions) for name in track(names, sizes, names)])


def _row(name: str, conditions: Conditions) -> dict[str, object]:
    entry = _entries()[name]
    published = [entry["published"]] if "published" in entry else []
    finding = CLAIMS[name](conditions, *published)
    row = {"id": name, **{key: entry[key] for key in ("source", "setup", "claim", "assumed")}}
    row |= {"workload": conditions.workload.name, "computed": finding.computed}
    row |= dict(zip(("value", "low", "high"), finding.estimate, strict=True)) | {"unit": finding.unit}
    ends = ("needed_share", "needed_share_low", "needed_share_high")
    return row | dict(zip(ends, finding.needed_share, strict=True)) | {"verdict": finding.verdict, "why": finding.why}
