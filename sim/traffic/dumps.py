"""What engines and users dump: SGLang's expert distribution recorder, TensorRT-LLM's expert statistics, arrays of numpy.

Formats as of SGLang 0.5.23 (srt/eplb/expert_distribution.py: `_StatAccumulator`, `_DetailAccumulator`) and TensorRT-LLM
(tensorrt_llm/_torch/expert_statistic.py, examples/wide_ep/ep_load_balancer/utils.py).
"""

import io
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError, shown
from sim.files import read_json
from sim.model import ModelSpec
from sim.traffic.answers import BY_LAYER, PROMPT, TOKEN_NAMES, Requests
from sim.traffic.arrays import MAX_ARRAYS, Archive, as_array, narrow_ids, read_pt, read_safetensors
from sim.traffic.counts import (
    COUNT_NAMES,
    MAP_NAMES,
    PHYSICAL_NAMES,
    CountTable,
    Entry,
    are_counts,
    logical_counts,
    tabulate,
)
from sim.traffic.recorded import check_shapes
from sim.traffic.tables import layer_of_key

_MAP = "last_physical_to_logical_map"
_SAMPLE = 4096  # first rows of an array that tell what it is
_LENGTHS = ("sequence_lengths", "seq_lens", "seqlens", "extend_seq_lens")
_NO_LOADS = re.compile(r"map$|log2phy|phy2log|logcnt|replica|logit|prob(s|$|abilit)|weight|score|bias$")
_NAMES = f"loads go by {', '.join(COUNT_NAMES[:6])} ..., ids by {', '.join(TOKEN_NAMES[:4])} ..."
STAT = "SGLang's recorder in mode stat"
_DECODE = 2  # SGLang's ForwardMode of a step with one token of each request


def read_torch(path: Path, where: str, requests: Requests) -> CountTable | Requests:
    """Loads or tokens of a torch file: SGLang's expert distribution recorder, or tensors under names that are known.

    Of the recorder, mode stat has `logical_count`, mode per_pass `records` with `global_physical_count`, and mode per_token
    `records` with `topk_ids_of_layer`; records are of physical experts, with `last_physical_to_logical_map`. Raises InputError
    for a file without a known key, or with records that no mode has.
    """
    held = read_pt(path, where)
    if not isinstance(held, dict) or not isinstance(held.get("records"), list):
        return read_tensors(held, path, where, requests)
    records, logical = held["records"], as_array(held.get(_MAP), where)
    if not records or any(not isinstance(record, dict) for record in records):
        raise InputError(f"{where}: SGLang's recorder, but it holds no record, or one that is no dict")
    if logical is None or logical.ndim != 2 or logical.dtype.kind not in "iu" or logical.min(initial=0) < 0:
        raise InputError(
            f"{where}: SGLang's recorder counts physical experts; beside records it needs {_MAP} [layers, experts]"
        )
    if all(BY_LAYER in record for record in records):  # has global_physical_count, too
        return _per_token(records, logical, where, requests)
    if all("global_physical_count" in record for record in records):
        return _per_pass(records, logical, where)
    raise InputError(
        f"{where}: its records have neither global_physical_count (mode per_pass) nor {BY_LAYER} (per_token), or not all of "
        f"them: {shown(', '.join(sorted(map(str, records[0]))))}"
    )


def read_tensors(held: Any, path: Path, where: str, requests: Requests) -> CountTable | Requests:
    """Loads or tokens of the tensors of a file: one, a list of them, or those of a dict with a key that is known."""
    parts = held if isinstance(held, dict) else dict(enumerate(held if isinstance(held, list | tuple) else [held]))
    arrays = {str(key): array for key, part in parts.items() if (array := as_array(part, where)) is not None}
    if not arrays and not isinstance(held, dict):
        raise InputError(f"{where} holds no tensor, but a {type(held).__name__}")
    if isinstance(held, dict) and not (arrays and are_known(arrays)):
        or_else = "; or SGLang's records" if path.suffix == ".pt" else ""
        raise InputError(
            f"{where} holds no tensor that is known ({_NAMES}{or_else}): it has {shown(', '.join(map(str, held)))}"
        )
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    archive = Archive(path, where, zipfile.ZipFile(file))
    found = read_archive(archive, requests)
    found.form = STAT if "logical_count" in archive.names else f"a {path.suffix} file: {found.form}"
    return found


def _are_layers(names: Iterable[str]) -> bool:
    """Whether each name is a layer's."""
    return all(layer_of_key(name) is not None for name in names)


def are_known(names: Iterable[str]) -> bool:
    """Whether arrays of these names hold loads or ids: one has a name that they go by, or each is named by its layer."""
    known = {*COUNT_NAMES, *PHYSICAL_NAMES, *TOKEN_NAMES, BY_LAYER}
    return not known.isdisjoint(names) or (_are_layers(names) and not any(map(_NO_LOADS.search, names)))


def successive(tables: list[CountTable]) -> list[CountTable]:
    """Dumps of mode stat, which SGLang sums over ranks itself, with steps that follow each other; equal ones once."""
    distinct = list({table.counts.tobytes(): table for table in tables}.values())
    n_steps = 0
    for table in distinct:
        if table.counts.ndim == 3:
            table.steps = n_steps + np.arange(len(table.counts))
            n_steps += len(table.counts)
    if len(distinct) < len(tables):
        distinct[0].notes.append(f"{len(tables) - len(distinct)} dumps that equal another are counted once")
    return distinct


def _per_pass(records: list[dict[str, Any]], logical: np.ndarray, where: str) -> CountTable:
    """Counts of logical experts by forward pass."""
    entries: list[Entry] = []
    for record in records:
        counts, number = as_array(record["global_physical_count"], where), record.get("forward_pass_id", len(entries))
        if counts is None or counts.dtype.kind not in "iuf" or counts.shape != logical.shape:
            shape = "no tensor" if counts is None else f"{counts.dtype} {list(counts.shape)}"
            raise InputError(
                f"{where}: global_physical_count must have the shape {list(logical.shape)} of {_MAP}, not {shape}"
            )
        if type(number) is not int:
            raise InputError(f"{where}: forward_pass_id must be a whole number, not {shown(number)}")
        entries.append((number, np.arange(len(logical))[:, None], logical, counts))
    total, steps, _ = tabulate(entries, where)
    return CountTable(total, "SGLang's recorder in mode per_pass, physical experts by their map", steps=steps)


def _per_token(records: list[dict[str, Any]], logical: np.ndarray, where: str, requests: Requests) -> Requests:
    """Logical experts of the tokens of all forward passes: a sequence for each prompt, and for each token of a decode step."""
    rows, last = np.arange(len(logical))[:, None, None], logical.shape[1] - 1
    for record in records:
        ids = as_array(record[BY_LAYER], where)
        if ids is None or ids.dtype.kind not in "iu" or ids.ndim != 3 or len(ids) != len(logical):
            shape = "no tensor" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise InputError(
                f"{where}: {BY_LAYER} must be whole numbers [{len(logical)} layers, tokens, top_k], not {shape}"
            )
        if ids.min(initial=0) < -1 or ids.max(initial=0) > last:
            raise InputError(
                f"{where}: {BY_LAYER} has experts {ids.min()} to {ids.max()}, {_MAP} has physical experts 0 to {last}"
            )
        if not ids.shape[1]:
            continue
        number = record.get("forward_pass_id")
        requests.passes.add(number)
        # ranks of tensor-parallel attention have the same tokens
        key = None if number is None else (number, hash(ids.tobytes()))
        if requests.model is not None:
            ids = ids[:, :, : requests.model.top_k]  # columns behind are never written
        ids = np.where(ids < 0, -1, logical[rows, np.maximum(ids, 0)]).transpose(1, 0, 2)
        requests.add(narrow_ids(ids, where), where, key, _lengths(record, len(ids), where))
    requests.form = "SGLang's recorder in mode per_token, physical experts by their map"
    return requests


def _lengths(record: dict[str, Any], n_tokens: int, where: str) -> np.ndarray:
    """Tokens of each sequence of a forward pass: prompts by `extend_seq_lens`; each token of a decode step is a request's."""
    lengths = record.get("extend_seq_lens")
    if isinstance(lengths, list) and lengths and set(map(type, lengths)) == {int} and min(lengths) >= 0:
        found = np.array([n for n in lengths if n], np.int64)
        if found.sum() == n_tokens:
            return found
        raise InputError(f"{where}: extend_seq_lens adds up to {found.sum()}, the forward pass has {n_tokens} tokens")
    return np.ones(n_tokens, np.int64) if record.get("forward_mode") == _DECODE else np.array([n_tokens])


def read_archive(archive: Archive, requests: Requests) -> CountTable | Requests:
    """Loads or tokens of an archive of arrays, by their names, or of one array, by its shape and numbers."""
    names, where = archive.names, archive.where
    if not names:
        raise InputError(f"{where} holds no arrays")
    tokens = [name for name in (*TOKEN_NAMES, BY_LAYER) if name in names]
    counted = [name for name in (*COUNT_NAMES, *PHYSICAL_NAMES) if name in names]
    ends = next((name for name in (*_LENGTHS, "cu_seqlens") if name in names), None)
    if ends:
        name, lengths = tokens[0] if tokens else "topk_ids", archive.read(ends)
        ids, lengths = archive.read_ids(name), np.diff(lengths) if ends == "cu_seqlens" else lengths
        check_shapes(where, ids, lengths)
        own = _add_layers(requests, archive, ids, lengths)
        requests.form = f"arrays {name} [tokens, layers, top_k] and {ends}{_not_read(names, {name, ends, own})}"
        return requests
    if tokens:
        return _add_ids(requests, archive, tokens[0])
    if counted:
        table = _array_counts(archive, counted[0])
        own, table.layer_ids = _layers_beside(archive, table.counts.shape[-2:-1])
        slots = next((archive.read(key) for key in MAP_NAMES if key in names), None)
        table.counts = logical_counts(counted[0], table.counts, slots, where)
        table.form += _not_read(names, {counted[0], own, *MAP_NAMES})
        return table
    other = next((name for name in names if _NO_LOADS.search(name)), None)
    if other is not None:
        raise InputError(f"{where}: its array '{shown(other)}' holds no loads by its name, nor ids: {_NAMES}")
    shape, _ = archive.shape(names[0])
    if len(names) > 1 and _are_layers(names) and len(shape) in (1, 2):
        return _of_layers(archive, requests)
    if len(names) == 1 and (len(shape) == 2 or (len(shape) == 3 and are_counts(archive.head(names[0], _SAMPLE)))):
        return _array_counts(archive, names[0])
    for name in names:
        _add_ids(requests, archive, name)
    if len(names) > 1:
        requests.form = "arrays of expert ids [tokens, layers, top_k], a request each"
    return requests


def _add_ids(requests: Requests, archive: Archive, name: str) -> Requests:
    """Take an array of expert ids: one request [tokens, layers, top_k]; under a known name also a batch of them, padded to one
    length, or as SGLang has it, with its layers first.
    """
    (shape, dtype), what = archive.shape(name), f"{archive.where}: {name or 'its array'}"
    if dtype.kind not in "iu":
        raise InputError(f"{what} must be of whole numbers, not {dtype}")
    is_batch = len(shape) == 4 and name in TOKEN_NAMES
    if (len(shape) != 3 and not is_batch) or 0 in shape:
        raise InputError(f"{what} must have shape [tokens, layers, top_k], not {list(shape)}")
    axes, lengths, requests.is_by_shape = "tokens, layers, top_k", None, not is_batch and name != BY_LAYER
    ids = archive.read_ids(name)
    if name == BY_LAYER:
        axes, ids = "layers, tokens, top_k", ids.swapaxes(0, 1)
    elif is_batch:
        axes, ids, lengths = f"requests, {axes}", ids.reshape(-1, *shape[2:]), np.full(shape[0], shape[1])
    elif name in TOKEN_NAMES and PROMPT in archive.names:
        ids = np.concatenate([archive.read_ids(PROMPT), ids])
    is_named = name in TOKEN_NAMES or name == BY_LAYER
    own = _add_layers(requests, archive, ids, lengths, is_named)
    named = f" named {name}" if is_named else ""
    others = _not_read(archive.names, {name, PROMPT, own}) if is_named else ""
    requests.form = f"an array of expert ids [{axes}]{named}: {'a request each' if is_batch else 'one request'}{others}"
    return requests


def _layers_beside(archive: Archive, shape: tuple[int, ...]) -> tuple[str | None, np.ndarray | None]:
    """Name and numbers, int64 [layers], of an array of that shape that numbers each layer; None where there is none."""
    for key in ("layer_ids", "layers"):
        if key in archive.names and archive.shape(key)[0] == shape and archive.shape(key)[1].kind in "iu":
            numbers = archive.read(key).astype(np.int64)
            if numbers.min(initial=0) >= 0 and np.unique(numbers).size == numbers.size:
                return key, numbers
    return None, None


def _add_layers(
    requests: Requests, archive: Archive, ids: np.ndarray, lengths: np.ndarray | None, is_named: bool = True
) -> str | None:
    """Take ids [tokens, layers, top_k], in the order of their layers where an array beside them numbers these: its name."""
    own, numbers = _layers_beside(archive, ids.shape[1:2]) if is_named else (None, None)
    if numbers is not None:
        layers = np.sort(numbers).tolist()
        if requests.layer_ids not in (None, layers):
            raise InputError(f"{archive.where}: {own} has other layers than the files before it: {shown(layers)}")
        requests.layer_ids, ids = layers, ids[:, np.argsort(numbers)]
    requests.add(ids, archive.where, lengths=lengths)
    return own


def _of_layers(archive: Archive, requests: Requests) -> CountTable | Requests:
    """An array for each layer, named by it: of loads [experts] or [steps, experts], or of ids [tokens, top_k]."""
    layers = np.array([layer_of_key(name) for name in archive.names])
    arrays = [archive.read(archive.names[i], "iuf") for i in np.argsort(layers)]
    if len({array.shape for array in arrays}) > 1 or len(set(layers.tolist())) < len(layers):
        raise InputError(
            f"{archive.where}: its arrays, one for each layer, differ in their shapes or name a layer twice"
        )
    stacked, layers = np.stack(arrays, axis=-2), np.sort(layers)
    if stacked.ndim == 2 or are_counts(stacked[:_SAMPLE]):
        return CountTable(stacked, "an array of loads for each layer", layers)
    if stacked.dtype.kind not in "iu":
        raise InputError(f"{archive.where}: ids must be of whole numbers, not {stacked.dtype}")
    if requests.layer_ids not in (None, layers.tolist()):
        raise InputError(f"{archive.where} has other layers than the files before it: mixed models in one folder?")
    requests.layer_ids = layers.tolist()
    requests.add(narrow_ids(stacked, archive.where), archive.where)
    requests.form = "an array of expert ids [tokens, top_k] for each layer: one request"
    return requests


def _not_read(names: list[str], read: set[str | None]) -> str:
    """What is said of the arrays that are not read."""
    others = [name for name in names if name not in read]
    return f"; not read: {shown(', '.join(others))}" if others else ""


def _array_counts(archive: Archive, name: str) -> CountTable:
    counts = archive.read(name, "iuf")
    axes = "[steps, layers, experts]" if counts.ndim == 3 else "[layers, experts]"
    table = CountTable(counts, f"an array of loads {axes}" + (f" named {name}" if name else ""))
    whole, largest = counts.dtype.kind in "iu", counts.max(initial=0)
    if whole and counts.dtype.itemsize < 4 and largest > 0.75 * np.iinfo(counts.dtype).max:
        table.notes.append(f"its loads are {counts.dtype} up to {largest}: larger ones would have wrapped around")
    elif not whole and counts.dtype.itemsize < 8 and largest > 2 / np.finfo(counts.dtype).eps:
        table.notes.append(
            f"its loads are {counts.dtype} up to {largest:g}, where a counter stands still: 1 more is rounded off"
        )
    return table


def read_statistics(path: Path, where: str, model: ModelSpec | None) -> CountTable:
    """Loads of a rank of TensorRT-LLM's EXPERT_STATISTIC_PATH: in rank*.safetensors an array [experts] for each
    `iteration_layer`, beside a meta_info.json. Raises InputError for a key or shape that these files do not have, and without a
    meta_info.json, or with one of another model.
    """
    held = read_json(path.with_name("meta_info.json"), f"{where}: meta_info.json")
    n_experts, top_k = (
        held.get(key) if isinstance(held, dict) else None for key in ("num_experts", "num_experts_per_token")
    )
    if any(value is not None and type(value) is not int for value in (n_experts, top_k)):
        raise InputError(f"{where}: meta_info.json: num_experts and num_experts_per_token must be whole numbers")
    if model is not None and top_k not in (None, model.top_k):
        raise InputError(
            f"{where} has {top_k} experts per token, model {model.name} has top_k {model.top_k}: another model?"
        )
    arrays = read_safetensors(path, where, lambda names: True)
    if not arrays or len(arrays) > 10 * MAX_ARRAYS:
        raise InputError(f"{where} has {len(arrays)} arrays")
    entries, n_experts = [], n_experts or len(np.ravel(next(iter(arrays.values()))))
    for key, array in arrays.items():
        found = re.fullmatch(r"(\d{1,9})_(\d{1,6})", key)
        if found is None:
            raise InputError(
                f"{where}: the key '{shown(key)}' is no iteration_layer of TensorRT-LLM's expert statistics"
            )
        if array.dtype.kind not in "iuf" or array.shape != (n_experts,):
            raise InputError(
                f"{where}: '{key}' has {array.dtype} {list(array.shape)}, the first or meta_info.json says {n_experts} experts: "
                "mixed models in one folder?"
            )
        entries.append((int(found[1]), int(found[2]), np.arange(n_experts), array))
    counts, steps, layers = tabulate(entries, where)
    return CountTable(counts, "TensorRT-LLM's expert statistics", layers, steps)
