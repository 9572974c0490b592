"""The one way in for recorded routing and measured loads: what a file holds is told by its content."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sim.errors import InputError, unknown
from sim.files import check_regular
from sim.model import ModelSpec
from sim.traffic.arrays import Archive, open_archive
from sim.traffic.counts import COUNT_NAMES, MOST_COUNTS, LoadCounts, build_counts, read_csv, read_pt
from sim.traffic.recorded import PHASES, RecordedTraffic, build_record
from sim.traffic.tokens import TOKEN_NAMES, join_requests, requests_of, requests_of_lines

SUFFIXES = (".npz", ".npy", ".jsonl", ".ndjson", ".json", ".csv", ".pt")
"""Endings of the files that `read_traffic` reads."""
_SAMPLE = 4096


def names_file(name: str) -> bool:
    """Whether a workload's name is that of a file of recorded routing or load counts."""
    return name.startswith("file:") or name.endswith(SUFFIXES)


class Traffic(NamedTuple):
    """What a file holds, and remarks on what was left out."""

    data: RecordedTraffic | LoadCounts
    notes: list[str]


def read_traffic(path: Path | str, model: ModelSpec | None = None, phase: str = "decode") -> Traffic:
    """Read recorded routing or load counts.

    Per-token ids: .npz with `topk_ids` [tokens, layers, top_k] and `sequence_lengths`; .npy or .npz with arrays [tokens,
    layers, top_k], one request each (`routed_experts` of vLLM and SGLang, or any name); JSON lines with a request each.
    Load counts [layers, experts] or [steps, layers, experts]: .npz, .npy, .csv, .pt of SGLang's recorder. An unnamed
    array [a, b, c] is taken for ids unless it has what only counts have: fractions, a value twice in a row, values above
    32767, or the same sum in every layer of a step. Dense layers (all zero) and padding tokens (-1) are dropped.

    Parameters
    ----------
    path : Path or str
    model : ModelSpec, optional
        The model that it was taken on: checked, and needed for SGLang's base64 ids, whose shape it tells.
    phase : str
        'decode' or 'prefill', how recorded tokens are replayed.

    Raises
    ------
    InputError
        The file is missing, damaged, too large, of another model, or not what it should be.
    """
    path = Path(path)
    where = f"workload file {path}"
    if phase not in PHASES:
        raise InputError(f"`phase` must be one of {', '.join(PHASES)}, not '{phase}'")
    if path.suffix not in SUFFIXES:
        raise InputError(f"{where}: the ending must be one of {', '.join(SUFFIXES)}")
    check_regular(path, where)
    name = f"file:{path.name}"
    if path.suffix == ".csv":
        counts, layers = read_csv(path, where)
        return _with_model(_counts(where, name, counts, layers), model)
    if path.suffix in (".jsonl", ".ndjson", ".json"):
        top_k, n_layers = (model.top_k, model.n_moe_layers) if model else (0, 0)
        requests = join_requests(requests_of_lines(path, where, top_k, n_layers), where)
        return _with_model(_record(where, name, *requests, phase, path), model)
    if path.suffix == ".pt":
        arrays = read_pt(path, where)
        key = _only_name(list(arrays), where)
        if key in TOKEN_NAMES:
            ids = arrays[key].transpose(1, 0, 2) if key == "topk_ids_of_layer" else arrays[key]
            return _with_model(_record(where, name, *join_requests(iter([ids]), where), phase, path), model)
        return _with_model(_counts(where, name, arrays[key]), model)
    with open_archive(path, where) as archive:
        return _with_model(_read_archive(archive, where, name, phase, path), model)


def read_recorded(path: Path, phase: str = "decode") -> RecordedTraffic:
    """Per-token ids of a file that `read_traffic` reads; load counts are refused.

    Raises
    ------
    InputError
        As `read_traffic`, or the file holds load counts.
    """
    data = read_traffic(path, phase=phase).data
    if isinstance(data, LoadCounts):
        raise InputError(
            f"workload file {path} holds load counts, not tokens: fit them first (epsim traffic fit {path} --out my.toml)"
        )
    return data


def _read_archive(archive: Archive, where: str, name: str, phase: str, path: Path) -> Traffic:
    names = archive.names
    if not names:
        raise InputError(f"{where} holds no arrays")
    if "topk_ids" in names or "sequence_lengths" in names:
        ids, lengths = archive.read_ids("topk_ids"), archive.read("sequence_lengths", most=MOST_COUNTS)
        return _record(where, name, ids, lengths, 0, phase, path)
    counted = [key for key in COUNT_NAMES if key in names]
    if counted:
        return _counts(where, name, archive.read(counted[0], "iuf", MOST_COUNTS))
    shape, dtype = archive.shape(names[0])
    if "topk_ids_of_layer" in names:
        ids = archive.read_ids("topk_ids_of_layer").transpose(1, 0, 2)
        return _record(where, name, *join_requests(iter([ids]), where), phase, path)
    if "routed_experts" not in names and len(names) == 1:
        of_ids = dtype.kind != "f" and len(shape) != 2
        if not of_ids or (dtype.kind in "iu" and len(shape) == 3 and _are_counts(archive.head(names[0], _SAMPLE))):
            return _counts(where, name, archive.read(names[0], "iuf", MOST_COUNTS))
    names = ["routed_experts"] if "routed_experts" in names else names
    return _record(where, name, *join_requests(requests_of(archive, names), where), phase, path)


def _are_counts(sample: np.ndarray) -> bool:
    """Whether the first rows of an array are counts [steps, layers, experts], and not ids [tokens, layers, top_k]."""
    if sample.size == 0 or sample.shape[2] == 1:
        return False
    if sample.max() > 2**15 - 1:
        return True
    ordered = np.sort(sample, axis=2)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2) & sample.any(axis=2) & (sample >= 0).all(axis=2)
    if repeated.any():
        return True
    sums = sample.sum(axis=2, dtype=np.int64)
    largest = sums.max(axis=1, keepdims=True)
    return sample.shape[1] > 1 and bool(((sums == largest) | (sums == 0)).all() and (largest > 0).any())


def _only_name(names: list[str], where: str) -> str:
    known = [key for key in (*COUNT_NAMES, *TOKEN_NAMES) if key in names]
    if not known and len(names) > 1:
        raise unknown(f"{where}: of its tensors, none is", json.dumps(names[0]), [*COUNT_NAMES, *TOKEN_NAMES])
    return known[0] if known else names[0]


def _record(
    where: str, name: str, ids: np.ndarray, lengths: np.ndarray, n_padding: int, phase: str, path: Path
) -> Traffic:
    record, n_dense = build_record(where, name, ids, lengths, phase, str(path))
    notes = [f"{n_dense} dense layers (all zero) are left out"] if n_dense else []
    return Traffic(record, notes + ([f"{n_padding} padding tokens (-1) are left out"] if n_padding else []))


def _counts(where: str, name: str, counts: np.ndarray, layers: np.ndarray | None = None) -> Traffic:
    data, n_dense = build_counts(where, name, counts, layers)
    return Traffic(data, [f"{n_dense} layers without any load are left out"] if n_dense else [])


def _with_model(traffic: Traffic, model: ModelSpec | None) -> Traffic:
    """The same, once it is known to be of the model."""
    data = traffic.data
    if model is None:
        return traffic
    if isinstance(data, RecordedTraffic):
        data.check_model(model.n_experts, model.top_k, model.name)
    elif data.counts.shape[2] != model.n_experts:
        raise InputError(
            f"workload {data.name} has counts of {data.counts.shape[2]} experts, model {model.name} has {model.n_experts}"
        )
    if model.n_moe_layers and data_layers(data) > model.n_moe_layers:
        raise InputError(
            f"workload {data.name} has {data_layers(data)} MoE layers, model {model.name} has {model.n_moe_layers}"
        )
    return traffic


def data_layers(data: RecordedTraffic | LoadCounts) -> int:
    """Layers of a record or of counts."""
    return data.n_layers if isinstance(data, RecordedTraffic) else data.counts.shape[1]
