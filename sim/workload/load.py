"""Workloads by preset name, from a TOML file of the presets' keys, or from a record of real routing."""

import dataclasses
import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sim.errors import InputError, unknown
from sim.files import read_toml
from sim.workload.gumbel import GumbelTraffic
from sim.workload.recorded import RecordedTraffic, read_recorded


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return tomllib.loads(resources.files("sim.workload").joinpath("presets.toml").read_text(encoding="utf-8"))


def workload_names() -> list[str]:
    """Names of the presets, in the order of the table."""
    return list(_presets())


def load_workload(name_or_path: str | Path, **overrides: Any) -> GumbelTraffic | RecordedTraffic:
    """Traffic by preset name, `file:TRACE.npz` (recorded) or the path of a TOML file with a preset's keys.

    Parameters
    ----------
    name_or_path : str or Path
    **overrides
        Fields of `GumbelTraffic` to change, or `phase` ('decode' | 'prefill') of recorded traffic.

    Raises
    ------
    InputError
        Unknown name or field, or a file that is missing or invalid.
    """
    name = str(name_or_path)
    overrides = {key: value for key, value in overrides.items() if value is not None}
    if name.startswith("file:") or name.endswith(".npz"):
        unused = sorted(set(overrides) - {"phase"})
        if unused:
            raise InputError(f"recorded traffic takes only 'phase', not '{unused[0].replace('_', '-')}'")
        return read_recorded(Path(name.removeprefix("file:")), **overrides)
    if "phase" in overrides:
        raise InputError(f"--phase goes with a recorded workload (file:TRACE.npz), not with '{name}'")
    if name.endswith(".toml"):
        fields = {"name": Path(name).stem, **read_toml(Path(name), f"workload file {name}")}
    elif name in _presets():
        fields = {"name": name, **_presets()[name]}
    else:
        raise unknown(
            "--workload", name, _presets(), " (or file:TRACE.npz, or a .toml file; `epsim workloads` lists them)"
        )
    known = [field.name for field in dataclasses.fields(GumbelTraffic)]
    for key in (*fields, *overrides):
        if key not in known:
            raise unknown(f"field of workload {name}", key, known)
    return GumbelTraffic(**(fields | overrides))
