"""Workloads by preset name, from a TOML file (of the presets' keys, or fitted), or from recorded routing."""

import dataclasses
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.errors import InputError, shown, unknown, whole_number
from sim.files import read_toml
from sim.model import ModelSpec
from sim.traffic.fitted import TABLE_NAMES, FittedLayers
from sim.traffic.read import names_file, read_recorded
from sim.traffic.recorded import PHASES, RecordedTraffic
from sim.traffic.synthetic import FROM_ARRAYS, SyntheticTraffic

_SAYS_NOTHING = {"name", "about", "source", "fitted_to", "prefill"}


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return _packaged("presets.toml")


def _packaged(name: str) -> dict[str, Any]:
    return tomllib.loads(resources.files("sim.traffic").joinpath(name).read_text(encoding="utf-8"))


@cache
def _preset(name: str) -> dict[str, Any]:
    """Fields of a preset, with the tables of its layers where it has a file of them."""
    fields = {key: value for key, value in _presets()[name].items() if key != "published"}
    if "tables" not in fields:
        return fields
    tables = _packaged(fields.pop("tables"))
    return fields | tables["decode"] | {"prefill": fields["prefill"] | tables["prefill"]}


def workload_names() -> list[str]:
    """Names of the presets, in the order of the table."""
    return list(_presets())


class Published(NamedTuple):
    """Published imbalance under linear placement that a preset is fitted to, or beside which it is laid."""

    data: str
    tokens: int  # per step
    ep_sizes: list[int]
    imbalance: list[float]
    low: list[float]  # of a figure that is a range, else as `imbalance`
    high: list[float]
    worst_of: int  # of so many layers the largest; 1: the mean over layers


def published_figures(preset: str) -> list[Published]:
    """What the figures of a preset are, on the model that it is fitted to; none of a preset without any."""
    rows = _presets()[preset].get("published", [])
    return [
        Published(
            row["data"], row["tokens"], row["ep"], row["imbalance"], row.get("low", row["imbalance"]),
            row.get("high", row["imbalance"]), row.get("worst_of", 1),
        )
        for row in rows
    ]  # fmt: skip


def load_workload(
    name_or_path: str | Path | SyntheticTraffic | RecordedTraffic,
    model: ModelSpec | str | Path | None = None,
    **overrides: Any,
) -> SyntheticTraffic | RecordedTraffic:
    """Traffic by preset name, by the path of a file, or as it is.

    Parameters
    ----------
    name_or_path : str, Path or Workload
        A preset (`workload_names`); `file:TRACE` or the path of recorded routing; the path of a .toml file with a preset's
        keys, or fitted (`epsim traffic fit`); or a workload, which is returned with the changes asked for.
    model : ModelSpec, str or Path, optional
        The model that recorded routing was taken on: see `read_traffic`.
    **overrides
        Fields of `SyntheticTraffic` to change, or `phase` ('decode' | 'prefill') of recorded or fitted traffic.
        `tokens_per_request`, from 2 on, makes a decode step of requests that have so many consecutive tokens each
        (speculative decoding): of recorded traffic runs of a sequence; of synthetic traffic tokens that share a request's
        effect, a preset without one taking that of `prefill`. It must divide the tokens of a step.

    Returns
    -------
    SyntheticTraffic or RecordedTraffic

    Raises
    ------
    InputError
        Unknown name or field, or a file that is missing or invalid.

    Examples
    --------
    >>> load_workload("chat", sigma=0.9).sigma
    0.9
    """
    overrides = {key: value for key, value in overrides.items() if value is not None}
    run = overrides.pop("tokens_per_request", None)
    if isinstance(name_or_path, SyntheticTraffic | RecordedTraffic):
        workload = _changed(name_or_path, overrides)
    elif isinstance(name_or_path, str | Path):
        workload = _load(str(name_or_path), model, overrides, in_runs=run not in (None, 1))
    else:
        raise InputError(f"`workload` {shown(name_or_path)}: must be a name, a path or a workload; {FROM_ARRAYS}")
    return workload if run is None else _in_runs(workload, run)


def _load(
    name: str, model: ModelSpec | str | Path | None, overrides: dict[str, Any], in_runs: bool
) -> SyntheticTraffic | RecordedTraffic:
    """Traffic by name or path; `in_runs` takes what a fitted workload says of tokens that follow each other."""
    if name not in _presets() and names_file(name):
        unused = sorted(set(overrides) - {"phase"})
        if unused:
            raise InputError(
                f"recorded traffic takes only 'phase' and 'tokens-per-request', not '{unused[0].replace('_', '-')}'"
            )
        return read_recorded(Path(name.removeprefix("file:")), model=model, **overrides)
    phase = overrides.pop("phase", None)
    if name.endswith(".toml"):
        read = read_toml(Path(name), f"workload file {name}")
        if not set(read) - _SAYS_NOTHING:
            raise InputError(
                f"workload file {name} says nothing of the traffic: it needs popularity, and has {', '.join(read) or 'no key'}"
            )
        fields = {"name": Path(name).stem, **read}
    elif name in _presets():
        fields = {"name": name, **_preset(name)}
    else:
        raise unknown("`workload`", name, _presets(), " (or file:TRACE, or a .toml file; `epsim workloads` lists them)")
    fields = _of_phase(name, fields, "prefill" if in_runs and "prefill" in fields else phase) | overrides
    known = _known_fields()
    for key in fields:
        if key not in known and key not in TABLE_NAMES:
            raise unknown(f"field of workload {name}", key, [*known, *TABLE_NAMES])
    tables = {key: fields.pop(key) for key in TABLE_NAMES if key in fields}
    if tables:
        if "mu" not in tables:
            raise InputError(f"workload {name} has {', '.join(tables)} but no mu")
        fields["layers"] = FittedLayers.of(**tables, where=f"workload {name}: ")
    traffic = SyntheticTraffic(**fields)
    if name.endswith(".toml") and traffic.request_sigma == 0 and np.any(traffic.local_share):
        raise InputError(f"workload {name}: local_share is of a request's effect, and needs request_sigma above 0")
    return traffic


def _in_runs(workload: SyntheticTraffic | RecordedTraffic, run: int) -> SyntheticTraffic | RecordedTraffic:
    """Decode steps of requests that have `run` consecutive tokens each."""
    run = whole_number("`tokens_per_request`", run, 1, 2**31)
    name = f"{workload.name} ({run} tokens per request)" if run > 1 else workload.name
    if isinstance(workload, RecordedTraffic):
        return dataclasses.replace(workload.with_runs(run), name=name)
    if workload.request_sigma == 0 and run == 1:
        return workload
    if workload.request_sigma == 0 and workload.name not in _presets():
        raise InputError(
            f"`tokens_per_request` {run}: workload {workload.name} has no request effect (request_sigma) that the tokens of a "
            "request could share"
        )
    effect = {} if workload.request_sigma else _effect_of_prefill()
    return dataclasses.replace(workload, **effect | {"name": name, "tokens_per_request": run, "whole_requests": True})


def _effect_of_prefill() -> dict[str, Any]:
    """The request effect of preset `prefill`: what it says beyond `chat`."""
    return {key: value for key, value in _preset("prefill").items() if key not in _preset("chat")}


def _known_fields() -> list[str]:
    """Fields of synthetic traffic that a file or a caller may set."""
    fields = dataclasses.fields(SyntheticTraffic)
    return [field.name for field in fields if field.name not in ("layers", "whole_requests")]


def _changed(
    workload: SyntheticTraffic | RecordedTraffic, overrides: dict[str, Any]
) -> SyntheticTraffic | RecordedTraffic:
    """The workload with some fields changed."""
    known = _known_fields() if isinstance(workload, SyntheticTraffic) else ["phase"]
    for key, value in overrides.items():
        if key not in known:
            raise unknown(f"field of workload {workload.name}", key, known)
        if key == "phase" and value not in PHASES:
            raise InputError(f"`phase` must be one of {', '.join(PHASES)}, not '{value}'")
    return dataclasses.replace(workload, **overrides)


def _of_phase(name: str, fields: dict[str, Any], phase: str | None) -> dict[str, Any]:
    """Fields of a phase. A fitted file is of decode, where every token is a request of its own, and its table `prefill`
    says what is other where the tokens of a request follow each other; with a mu of its own all tables are.
    """
    if phase not in (None, *PHASES):
        raise InputError(f"`phase` must be one of {', '.join(PHASES)}, not '{phase}'")
    prefill = fields.pop("prefill", None)
    if prefill is not None and not isinstance(prefill, dict):
        raise InputError(f"workload {name}: prefill must be a table")
    if phase is not None and prefill is None:
        raise InputError(
            f"`phase` goes with a recorded workload (file:TRACE) or one fitted to sequences, not with '{name}'"
        )
    if phase != "prefill" or prefill is None:
        return fields
    kept = {key: value for key, value in fields.items() if "mu" not in prefill or key not in TABLE_NAMES}
    return kept | prefill
