"""Experts of single tokens, as vLLM and SGLang return them: arrays [tokens, layers, top_k] of requests, and JSON lines."""

import base64
import binascii
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError, shown
from sim.traffic.arrays import Archive, reading

TOKEN_NAMES = ("topk_ids", "routed_experts", "topk_ids_of_layer")
_MAX_LINE = 256 << 20
_MOST_IDS = 2**30
_DEEPEST = 6  # levels of a JSON line that are searched for `routed_experts`
_MOST_DENSE = 16


def requests_of(archive: Archive, names: list[str]) -> Iterator[np.ndarray]:
    """Arrays of an archive, one request each: whole numbers [tokens, layers, top_k]."""
    n_ids = 0
    for name in names:
        shape, dtype = archive.shape(name)
        if dtype.kind not in "iu":
            raise InputError(f"{archive.where}: {name or 'its array'} must be of whole numbers, not {dtype}")
        if len(shape) != 3:
            raise InputError(
                f"{archive.where}: {name or 'its array'} must have shape [tokens, layers, top_k], not {list(shape)}"
            )
        n_ids += int(np.prod(shape, dtype=float))
        if n_ids > 2 * _MOST_IDS:
            raise InputError(f"{archive.where} holds more than {2 * _MOST_IDS} expert ids; keep a part of it")
        yield archive.read_ids(name)


def requests_of_lines(path: Path, where: str, top_k: int, n_layers: int) -> Iterator[np.ndarray]:
    """Requests of a JSON-lines file, one line at a time: int [tokens, layers, top_k].

    A line is the nested list of a request, or an object with a key `routed_experts` somewhere in it (vLLM: a nested list;
    SGLang: base64 of the flat int32 ids, shaped by `top_k` and `n_layers` of the model, 0 where unknown, or by a key
    `shape` beside it).
    """
    n_ids = 0
    with reading(where, "JSON-lines"), path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
            here = f"{where}, line {number}"
            if len(line) >= _MAX_LINE:
                raise InputError(f"{here}: longer than {_MAX_LINE >> 20} MiB")
            if not line.strip():
                continue
            try:
                held = json.loads(line)
            except (ValueError, RecursionError):
                raise InputError(f"{here} is not JSON; each request is a line of its own") from None
            found = list(_find(held, _DEEPEST)) if isinstance(held, dict) else [(held, None)]
            if not found:
                raise InputError(f"{here} has no key 'routed_experts'")
            for value, shape in found:
                ids = _decode(value, shape, here, top_k, n_layers) if isinstance(value, str) else _nested(value, here)
                n_ids += ids.size
                if n_ids > _MOST_IDS:
                    raise InputError(f"{where} holds more than {_MOST_IDS} expert ids; keep a part of it")
                yield ids


def _find(held: Any, depth: int) -> Iterator[tuple[Any, Any]]:
    """Values of the key `routed_experts`, each with the `shape` beside it."""
    if isinstance(held, dict):
        if held.get("routed_experts") is not None:
            yield held["routed_experts"], held.get("shape", held.get("routed_experts_shape"))
            return
        held = list(held.values())
    if isinstance(held, list) and depth > 0:
        for value in held:
            if isinstance(value, dict | list):
                yield from _find(value, depth - 1)


def _nested(value: Any, here: str) -> np.ndarray:
    try:
        ids = np.asarray(value)
    except (ValueError, OverflowError):
        raise InputError(f"{here}: routed_experts is not a regular list [tokens][layers][top_k]") from None
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise InputError(f"{here}: routed_experts must be whole numbers [tokens][layers][top_k]")
    return _narrow(ids, here)


def _decode(text: str, shape: Any, here: str, top_k: int, n_layers: int) -> np.ndarray:
    """Ids from base64 of little-endian int32."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{here}: routed_experts is not base64") from None
    if len(data) % 4 or not data:
        raise InputError(f"{here}: routed_experts is cut off: {len(data)} bytes are not whole int32 ids")
    flat = np.frombuffer(data, "<i4")
    if shape is not None:
        if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
            raise InputError(f"{here}: shape must be a list [tokens, layers, top_k]")
        if shape[0] * shape[1] * shape[2] != flat.size:
            raise InputError(f"{here}: {flat.size} ids do not fill the shape {shown(shape)}")
        return _narrow(flat.reshape(shape), here)
    if not top_k or not n_layers:
        raise InputError(f"{here}: base64 ids need --model, which says how many layers and experts per token they have")
    return _narrow(_shaped(flat, here, top_k, n_layers), here)


def _shaped(flat: np.ndarray, here: str, top_k: int, n_layers: int) -> np.ndarray:
    """Flat ids as [tokens, layers, top_k]: the model's MoE layers, and as many dense ones (all zero) as fit exactly."""
    for dense in range(_MOST_DENSE + 1):
        width = (n_layers + dense) * top_k
        if flat.size % width == 0:
            ids = flat.reshape(-1, n_layers + dense, top_k)
            zero = np.asarray(~ids.any(axis=2))
            if (zero == zero[0]).all() and zero[0].sum() == dense:
                return ids
    raise InputError(
        f"{here}: {flat.size} ids do not make tokens of {n_layers} MoE layers (and dense ones of zeros) with {top_k} "
        "experts each: another model?"
    )


def _narrow(ids: np.ndarray, here: str) -> np.ndarray:
    if ids.min() < -1 or ids.max() > 2**15 - 1:
        raise InputError(f"{here}: expert ids must lie from 0 to 32767 (-1: padding), found {ids.min()} to {ids.max()}")
    return ids.astype(np.int16)


def join_requests(requests: Iterator[np.ndarray], where: str) -> tuple[np.ndarray, np.ndarray, int]:
    """Ids [tokens, layers, top_k] and lengths [sequences] of all requests, and how many padding tokens (-1) were dropped."""
    kept: list[np.ndarray] = []
    n_padding = 0
    for number, ids in enumerate(requests):
        if kept and ids.shape[1:] != kept[0].shape[1:]:
            found, first = "x".join(map(str, ids.shape[1:])), "x".join(map(str, kept[0].shape[1:]))
            raise InputError(f"{where}: request {number} has layers x top_k {found}, the first one {first}")
        padding = (ids == -1).any(axis=(1, 2))
        n_padding += int(padding.sum())
        ids = ids[~padding] if padding.any() else ids
        if len(ids):
            kept.append(ids)
    if not kept:
        raise InputError(f"{where} holds no tokens")
    lengths = np.array([len(ids) for ids in kept], np.int64)
    return (kept[0] if len(kept) == 1 else np.concatenate(kept)), lengths, n_padding
