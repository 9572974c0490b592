"""Workloads by preset name, from a TOML file (of the presets' keys, or fitted), or from a record of real routing."""

import dataclasses
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sim.errors import InputError, unknown
from sim.files import read_toml
from sim.traffic.fitted import KEYS, FittedLayers
from sim.traffic.read import names_file, read_recorded
from sim.traffic.recorded import PHASES, RecordedTraffic
from sim.traffic.synthetic import SyntheticTraffic


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("sim.traffic").joinpath("presets.toml").read_text(encoding="utf-8"))


def workload_names() -> list[str]:
    """Names of the presets, in the order of the table."""
    return list(_presets())


def load_workload(name_or_path: str | Path, **overrides: Any) -> SyntheticTraffic | RecordedTraffic:
    """Traffic by preset name, `file:TRACE` (recorded) or the path of a TOML file with a preset's keys, or fitted.

    Parameters
    ----------
    name_or_path : str or Path
    **overrides
        Fields of `SyntheticTraffic` to change, or `phase` ('decode' | 'prefill') of recorded or fitted traffic.

    Raises
    ------
    InputError
        Unknown name or field, or a file that is missing or invalid.
    """
    name = str(name_or_path)
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if names_file(name):
        unused = sorted(set(overrides) - {"phase"})
        if unused:
            raise InputError(f"recorded traffic takes only 'phase', not '{unused[0].replace('_', '-')}'")
        return read_recorded(Path(name.removeprefix("file:")), **overrides)
    phase = overrides.pop("phase", None)
    if name.endswith(".toml"):
        fields = {"name": Path(name).stem, **read_toml(Path(name), f"workload file {name}")}
    elif name in _presets():
        fields = {"name": name, **_presets()[name]}
    else:
        raise unknown("--workload", name, _presets(), " (or file:TRACE, or a .toml file; `epsim workloads` lists them)")
    fields = _of_phase(name, fields, phase) | overrides
    known = [field.name for field in dataclasses.fields(SyntheticTraffic) if field.name != "layers"]
    for key in fields:
        if key not in known and key not in KEYS:
            raise unknown(f"field of workload {name}", key, known)
    tables = {key: fields.pop(key) for key in KEYS if key in fields}
    if tables:
        if "mu" not in tables:
            raise InputError(f"workload {name} has {', '.join(tables)} but no mu")
        fields["layers"] = FittedLayers.of(**tables, where=f"workload {name}: ")
    return SyntheticTraffic(**fields)


def _of_phase(name: str, fields: dict[str, Any], phase: str | None) -> dict[str, Any]:
    """Fields of a phase. A fitted file is of decode, where every token is a request of its own, and its table `prefill`
    says what is other where the tokens of a request follow each other.
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
    return fields | (prefill or {}) if phase == "prefill" else fields
