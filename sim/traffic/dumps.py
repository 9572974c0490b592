"""What engines and users dump: SGLang's expert distribution recorder, TensorRT-LLM's expert statistics, arrays of numpy.

Formats as of SGLang 0.5.23 (srt/eplb/expert_distribution.py: `_StatAccumulator`, `_DetailAccumulator`) and TensorRT-LLM
(tensorrt_llm/_torch/expert_statistic.py, examples/wide_ep/ep_load_balancer/utils.py).
"""

import io
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sim.errors import InputError, shown
from sim.files import read_json
from sim.model import ModelSpec
from sim.traffic.answers import BY_LAYER, PROMPT, TOKEN_NAMES, Requests, add_arrays
from sim.traffic.arrays import MAX_ARRAYS, Archive, as_array, narrow_ids, read_pt, read_safetensors
from sim.traffic.counts import (
    COUNT_NAMES,
    MAP_NAMES,
    MOST_COUNTS,
    PHYSICAL_NAMES,
    CountTable,
    add_tables,
    logical_counts,
)
from sim.traffic.recorded import check_shapes
from sim.traffic.tables import layer_of_key

_MAP = "last_physical_to_logical_map"
SAMPLE = 4096
"""First rows of an array that tell what it is."""
_LENGTHS = ("sequence_lengths", "seq_lens", "seqlens", "extend_seq_lens")
_MOST_TOP_K = 32  # columns: no router takes more experts
_NO_LOADS = re.compile(r"map$|log2phy|phy2log|logcnt|replica|logit|prob|weight|score")
_DECODE = 2  # SGLang's ForwardMode of a step with one token of each request


def read_recorder(paths: list[Path], wheres: list[str], model: ModelSpec | None) -> tuple[CountTable | Requests, str]:
    """Loads or tokens of SGLang's expert distribution recorder, a file or those of several ranks; and what they are.

    Only known keys are read: `logical_count` (mode stat), `records` with `global_physical_count` (per_pass) or
    `topk_ids_of_layer` (per_token), which are of physical experts, with `last_physical_to_logical_map`.

    Raises
    ------
    InputError
        A file without a known key, of another mode than the first, or of another map.
    """
    tables: list[CountTable] = []
    requests = Requests(wheres[0], model)
    records: list[tuple[dict[str, Any], np.ndarray, str]] = []
    form = ""
    for path, where in zip(paths, wheres, strict=True):
        held = read_pt(path, where)
        if isinstance(held, dict) and isinstance(held.get("records"), list):
            table = as_array(held.get(_MAP), where)
            if table is None or table.ndim != 2 or table.dtype.kind not in "iu" or table.min(initial=0) < 0:
                raise InputError(
                    f"{where}: SGLang's recorder counts physical experts; beside records it needs {_MAP} [layers, experts]"
                )
            if table.max(initial=0) > 2**15 - 1:  # of tokens too
                raise InputError(f"{where}: {_MAP} has expert {table.max()}, above 32767")
            if any(not isinstance(record, dict) for record in held["records"]):
                raise InputError(f"{where}: its records are no dicts of SGLang's recorder")
            records += [(record, table, where) for record in held["records"]]
            if not held["records"]:
                raise InputError(f"{where}: SGLang's recorder, but it holds no record")
            continue
        archive = _tensors(held, path, where)
        found, form = read_archive(archive, requests, len(paths) == 1)
        form = "SGLang's recorder in mode stat" if "logical_count" in archive.names else f"a torch file: {form}"
        if found is not None:
            found.form = form
            tables.append(found)
    if sum(map(bool, (records, tables, requests.arrays))) > 1:
        raise InputError(
            f"{wheres[0]} and others: dumps of several recorder modes, or of loads and tokens, in one folder"
        )
    if tables:
        return _add_dumps(tables, wheres)
    if requests.arrays:
        return requests, form
    maps = [table for _, table, _ in records]
    if any(not np.array_equal(table, maps[0]) for table in maps):
        raise InputError(
            f"{wheres[0]} and others were recorded under different {_MAP}: mixed models, or a rebalance between"
        )
    if all("topk_ids_of_layer" in record for record, _, _ in records):  # has global_physical_count, too
        return _per_token(records, maps[0], wheres[0], model)
    if all("global_physical_count" in record for record, _, _ in records):
        summed = _per_pass(records, maps[0])
        return summed, summed.form
    known = shown(", ".join(sorted(map(str, records[0][0]))))
    raise InputError(
        f"{records[0][2]}: its records have neither global_physical_count (mode per_pass) nor topk_ids_of_layer (per_token), "
        f"or not all of them: {known}"
    )


def _tensors(held: Any, path: Path, where: str) -> Archive:
    """The tensors of a torch file without records: one, a list of them, or those of a dict with a key that is known."""
    several = dict(enumerate(held)) if isinstance(held, list | tuple) else {"tensor": held}
    parts = held if isinstance(held, dict) else several
    arrays = {str(key): array for key, part in parts.items() if (array := as_array(part, where)) is not None}
    if not arrays and not isinstance(held, dict):
        raise InputError(f"{where} holds no tensor, but a {type(held).__name__}")
    names = (*COUNT_NAMES, *PHYSICAL_NAMES, *TOKEN_NAMES, BY_LAYER)
    if isinstance(held, dict) and not (arrays and (_are_layers(arrays) or any(name in arrays for name in names))):
        keys = shown(", ".join(map(str, held)))
        raise InputError(
            f"{where} holds no tensor that is known ({', '.join(names)}; or SGLang's records): it has {keys}"
        )
    file = io.BytesIO()
    np.savez(file, allow_pickle=False, **arrays)
    return Archive(path, where, zipfile.ZipFile(file))


def _are_layers(names: Iterable[str]) -> bool:
    """Whether each name is a layer's."""
    return all(layer_of_key(name) is not None for name in names)


def _add_dumps(tables: list[CountTable], wheres: list[str]) -> tuple[CountTable, str]:
    """Dumps of mode stat, which SGLang sums over ranks itself, one after the other; equal ones count once."""
    distinct: dict[bytes, CountTable] = {}
    for table in tables:
        distinct.setdefault(table.counts.tobytes(), table)
    found = list(distinct.values())
    where = f"{wheres[0]} and others"
    if {table.counts.ndim for table in found} != {3}:
        first = add_tables(found, where)
    else:
        first = found[0]
        shapes = sorted({table.counts.shape[-2:] for table in found})
        if len(shapes) > 1:
            raise InputError(
                f"{where} have counts of {' and '.join(' x '.join(map(str, shape)) for shape in shapes)} layers x experts: mixed "
                "models in one folder?"
            )
        if sum(table.counts.size for table in found) > MOST_COUNTS:
            raise InputError(f"{where} have more than {MOST_COUNTS} counts; keep a part of them")
        if len(found) > 1:
            first.counts = np.concatenate([table.counts for table in found])
            first.notes.append(f"the steps of {len(found)} dumps follow each other")
    if len(found) < len(tables):
        first.notes.append(f"{len(tables) - len(found)} dumps that equal another are counted once")
    return first, first.form


def _per_pass(records: list[tuple[dict[str, Any], np.ndarray, str]], logical: np.ndarray) -> CountTable:
    """Counts of logical experts by forward pass, ranks added up."""
    passes: dict[Any, np.ndarray] = {}
    ranks = set()
    for record, _, where in records:
        counts = as_array(record["global_physical_count"], where)
        if counts is None or counts.dtype.kind not in "iuf" or counts.shape != logical.shape:
            shape = "no tensor" if counts is None else f"{counts.dtype} {list(counts.shape)}"
            raise InputError(
                f"{where}: global_physical_count must have the shape {list(logical.shape)} of {_MAP}, not {shape}"
            )
        if counts.min(initial=0) < 0:
            raise InputError(f"{where}: counts must not be negative, found {counts.min()}")
        number = record.get("forward_pass_id", len(passes))
        if type(number) is not int:
            raise InputError(f"{where}: forward_pass_id must be a whole number, not {shown(number)}")
        passes[number] = passes[number] + counts if number in passes else counts.astype(np.int64)
        ranks.add(str(record.get("rank", 0)))
        if len(passes) * logical.size > MOST_COUNTS:
            raise InputError(
                f"{where} and the files before it have more than {MOST_COUNTS} counts; keep a part of them"
            )
    total = logical_counts(
        PHYSICAL_NAMES[0], np.stack([passes[number] for number in sorted(passes)]), logical, records[0][2]
    )
    table = CountTable(total, "SGLang's recorder in mode per_pass, physical experts by their map", is_open=True)
    if len(ranks) > 1:
        table.notes.append(f"{len(ranks)} ranks are added up")
    return table


def _per_token(
    records: list[tuple[dict[str, Any], np.ndarray, str]], logical: np.ndarray, where: str, model: ModelSpec | None
) -> tuple[Requests, str]:
    """Logical experts of the tokens of all forward passes: a sequence for each prompt, and for each token of a decode step."""
    requests, passes, seen, n_twice = Requests(where, model), set(), set(), 0
    rows = np.arange(len(logical))[:, None, None]
    for record, _, here in records:
        ids = as_array(record["topk_ids_of_layer"], here)
        if ids is None or ids.dtype.kind not in "iu" or ids.ndim != 3 or len(ids) != len(logical):
            shape = "no tensor" if ids is None else f"{ids.dtype} {list(ids.shape)}"
            raise InputError(
                f"{here}: topk_ids_of_layer must be whole numbers [{len(logical)} layers, tokens, top_k], not {shape}"
            )
        if not ids.shape[1]:
            continue
        if ids.min() < -1 or ids.max() >= logical.shape[1]:
            raise InputError(
                f"{here}: topk_ids_of_layer has expert {ids.min() if ids.min() < -1 else ids.max()}, {_MAP} has physical "
                f"experts 0 to {logical.shape[1] - 1}"
            )
        number, content = record.get("forward_pass_id"), ids.tobytes()
        passes.add(number)
        if (
            number,
            hash(content),
        ) in seen and number is not None:  # ranks of tensor-parallel attention have the same tokens
            n_twice += 1
            continue
        seen.add((number, hash(content)))
        ids = ids[:, :, : None if model is None else model.top_k].astype(np.int64)  # columns behind are never written
        ids = np.where(ids < 0, -1, logical[rows, np.maximum(ids, 0)])
        requests.add(ids.transpose(1, 0, 2).astype(np.int16), here, lengths=_lengths(record, ids.shape[1], here))
    requests.n_steps = len(passes)
    form = "SGLang's recorder in mode per_token, physical experts by their map"
    if n_twice:
        form += f"; {n_twice} records that other ranks have too are counted once"
    return requests, form


def _lengths(record: dict[str, Any], n_tokens: int, where: str) -> np.ndarray:
    """Tokens of each sequence of a forward pass: prompts by `extend_seq_lens`; each token of a decode step is a request's."""
    lengths = record.get("extend_seq_lens")
    if isinstance(lengths, list) and lengths and set(map(type, lengths)) == {int} and min(lengths) >= 0:
        found = np.array([n for n in lengths if n], np.int64)
        if found.sum() == n_tokens:
            return found
        raise InputError(f"{where}: extend_seq_lens adds up to {found.sum()}, the forward pass has {n_tokens} tokens")
    return np.ones(n_tokens, np.int64) if record.get("forward_mode") == _DECODE else np.array([n_tokens])


def read_archive(archive: Archive, requests: Requests, is_one: bool) -> tuple[CountTable | None, str]:
    """Loads of an archive of arrays, or None where its requests were taken; and the form."""
    names, where = archive.names, archive.where
    if not names:
        raise InputError(f"{where} holds no arrays")
    tokens = [name for name in (*TOKEN_NAMES, BY_LAYER) if name in names]
    counted = [name for name in (*COUNT_NAMES, *PHYSICAL_NAMES) if name in names]
    ends = next((name for name in (*_LENGTHS, "cu_seqlens") if name in names), None)
    if ends:
        name, lengths = tokens[0] if tokens else "topk_ids", archive.read(ends, most=MOST_COUNTS)
        ids, lengths = archive.read_ids(name), np.diff(lengths) if ends == "cu_seqlens" else lengths
        check_shapes(where, ids, lengths)
        requests.most_ids = 2**62 if is_one else requests.most_ids
        requests.add(ids, where, lengths=lengths)
        return None, f"arrays {name} [tokens, layers, top_k] and {ends}{_not_read(names, {name, ends})}"
    if tokens:
        parts, by_layer = [name for name in (PROMPT, tokens[0]) if name in names], tokens[0] == BY_LAYER
        if by_layer:
            requests.add(archive.read_ids(tokens[0]).swapaxes(0, 1), where)
        elif len(parts) == 2:
            requests.add(np.concatenate([archive.read_ids(name) for name in parts]), where)
        else:
            add_arrays(requests, archive, parts)
        axes = "layers, tokens" if by_layer else "tokens, layers"
        return None, f"arrays of expert ids [{axes}, top_k] named {tokens[0]}{_not_read(names, {*parts})}"
    if counted:
        table = _array_counts(archive, counted[0])
        own = next((key for key in ("layer_ids", "layers") if key in names), None)
        if own and archive.shape(own)[0] == table.counts.shape[-2:-1]:
            table.layer_ids = archive.read(own, most=MOST_COUNTS).astype(np.int64)
        slots = next((archive.read(key, most=MOST_COUNTS) for key in MAP_NAMES if key in names), None)
        table.counts = logical_counts(counted[0], table.counts, slots, where)
        table.form += _not_read(names, {counted[0], own, *MAP_NAMES})
        return table, table.form
    shape, _ = archive.shape(names[0])
    if len(names) > 1 and _are_layers(names) and len(shape) in (1, 2):
        return _of_layers(archive, requests)
    if (
        len(names) > 1
        or (len(shape) == 3 and not are_counts(archive.head(names[0], SAMPLE)))
        or len(shape) not in (2, 3)
    ):
        add_arrays(requests, archive, names)
        return None, "arrays of expert ids [tokens, layers, top_k], one for each request"
    if _NO_LOADS.search(names[0]):
        raise InputError(
            f"{where}: its array '{names[0]}' holds no loads by its name; loads go by {', '.join(COUNT_NAMES)}"
        )
    table = _array_counts(archive, names[0])
    return table, table.form


def _of_layers(archive: Archive, requests: Requests) -> tuple[CountTable | None, str]:
    """An array for each layer, named by it: of loads [experts] or [steps, experts], or of ids [tokens, top_k]."""
    layers = np.array([layer_of_key(name) for name in archive.names])
    arrays = [archive.read(archive.names[i], "iuf", MOST_COUNTS) for i in np.argsort(layers)]
    if len({array.shape for array in arrays}) > 1 or len(set(layers.tolist())) < len(layers):
        raise InputError(
            f"{archive.where}: its arrays, one for each layer, differ in their shapes or name a layer twice"
        )
    stacked, layers = np.stack(arrays, axis=-2), np.sort(layers)
    if stacked.ndim == 2 or are_counts(stacked[:SAMPLE]):
        form = "an array of loads for each layer"
        return CountTable(stacked, form, layers), form
    if stacked.dtype.kind not in "iu":
        raise InputError(f"{archive.where}: ids must be of whole numbers, not {stacked.dtype}")
    if requests.layer_ids not in (None, layers.tolist()):
        raise InputError(f"{archive.where} has other layers than the files before it: mixed models in one folder?")
    requests.layer_ids = layers.tolist()
    requests.add(narrow_ids(stacked, archive.where), archive.where)
    return None, "an array of expert ids [tokens, top_k] for each layer"


def _not_read(names: list[str], read: set[str | None]) -> str:
    """What is said of the arrays that are not read."""
    others = [name for name in names if name not in read]
    return f"; not read: {shown(', '.join(others))}" if others else ""


def _array_counts(archive: Archive, name: str) -> CountTable:
    counts = archive.read(name, "iuf", MOST_COUNTS)
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


def are_counts(sample: np.ndarray) -> bool:
    """Whether the first rows of an array are counts [steps, layers, experts], and not ids [tokens, layers, top_k]."""
    if sample.dtype.kind == "f" and not (sample.any() and (np.isfinite(sample) & (np.floor(sample) == sample)).all()):
        return True
    if sample.size == 0 or sample.shape[2] == 1:
        return False
    if sample.shape[2] > _MOST_TOP_K:
        return True
    alike = (sample == sample[..., :1]).all(axis=2)  # padding, of ids
    ordered = np.sort(sample, axis=2)
    repeated = (ordered[..., 1:] == ordered[..., :-1]).any(axis=2) & (sample >= 0).all(axis=2)
    if ((repeated | (ordered[..., -1] > 2**15 - 1)) & ~alike).any():
        return True
    sums = sample.sum(axis=2, dtype=np.int64)
    largest = sums.max(axis=1, keepdims=True)
    return sample.shape[1] > 1 and bool(((sums == largest) | (sums == 0)).all() and (largest > 0).any())


class Statistics(NamedTuple):
    """What meta_info.json says."""

    n_experts: int | None
    top_k: int | None


def read_statistics(folder: Path, files: list[Path], where: str) -> tuple[Statistics, CountTable]:
    """Loads of TensorRT-LLM's EXPERT_STATISTIC_PATH: in rank*.safetensors an array [experts] for each `iteration_layer`.

    Raises
    ------
    InputError
        A key or shape that these files do not have; no meta_info.json.
    """
    meta_path = folder / "meta_info.json"
    held = read_json(meta_path, f"{where}: meta_info.json")
    held = held if isinstance(held, dict) else {}
    meta = Statistics(*(held.get(key) for key in ("num_experts", "num_experts_per_token")))
    if any(value is not None and type(value) is not int for value in meta):
        raise InputError(f"{where}: meta_info.json: num_experts and num_experts_per_token must be whole numbers")
    tables = []
    for file in files:
        here = f"{where}: {file.name}"
        arrays = read_safetensors(file, here)
        if not arrays or len(arrays) > 10 * MAX_ARRAYS:
            raise InputError(f"{here} has {len(arrays)} arrays")
        keys = {}
        for key, array in arrays.items():
            found = re.fullmatch(r"(\d{1,9})_(\d{1,6})", key)
            if found is None:
                raise InputError(
                    f"{here}: the key '{shown(key)}' is no iteration_layer of TensorRT-LLM's expert statistics"
                )
            if array.ndim != 1 or array.dtype.kind not in "iuf" or len(array) != (meta.n_experts or len(array)):
                raise InputError(
                    f"{here}: '{key}' has {array.dtype} {list(array.shape)}, meta_info.json says {meta.n_experts} experts: "
                    "mixed models in one folder?"
                )
            keys[int(found[1]), int(found[2])] = array
        width = {len(array) for array in keys.values()}
        if len(width) > 1:
            raise InputError(f"{here}: its arrays have {' and '.join(map(str, sorted(width)))} experts")
        steps, layers = (np.unique([key[axis] for key in keys]) for axis in (0, 1))
        if len(steps) * len(layers) * max(width) > MOST_COUNTS:
            raise InputError(f"{here} has more than {MOST_COUNTS} counts; record fewer iterations")
        counts = np.zeros((len(steps), len(layers), max(width)), np.result_type(*keys.values()))
        for (step, layer), array in keys.items():
            counts[np.searchsorted(steps, step), np.searchsorted(layers, layer)] = array
        tables.append(CountTable(counts, "TensorRT-LLM's expert statistics", layers, steps))
    total = add_tables(tables, where)
    total.notes = [f"{len(files)} ranks are added up"] if len(files) > 1 else []
    return meta, total
