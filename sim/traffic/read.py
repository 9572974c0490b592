"""The one way in for recorded routing and load counts: what a file or folder is, is recognised before its numbers are read."""

import itertools
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from sim.errors import InputError, shown
from sim.files import check_regular, is_folder, is_there, numbered_lines, open_stream, reading
from sim.model import ModelSpec, load_model
from sim.model.spec import MOST_DRAFTS
from sim.traffic.answers import MAX_LINE, Requests, add_answer, add_trace, is_step, is_trace, json_values
from sim.traffic.arrays import open_archive, parquet_as_text, read_safetensors
from sim.traffic.counts import (
    COUNT_NAMES,
    PHYSICAL_NAMES,
    CountTable,
    LoadCounts,
    add_tables,
    are_counts,
    build_counts,
    doubts_about,
    of_experts,
)
from sim.traffic.dumps import STAT, are_known, read_archive, read_statistics, read_tensors, read_torch, successive
from sim.traffic.recorded import MOST_LAYERS, PHASES, RecordedTraffic, build_record
from sim.traffic.rows import add_csv, add_json, roles_of_json
from sim.traffic.tables import column_role, read_csv, table_of_json

_KINDS = {
    ".npz": "archive", ".npy": "archive", ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "csv",
    ".pt": "pt", ".safetensors": "safetensors", ".parquet": "parquet", ".txt": "text", ".log": "text",
}  # fmt: skip
_IS_TEXT = ("json", "csv", "text")
SUFFIXES = (*_KINDS, *(f"{suffix}.gz" for suffix, kind in _KINDS.items() if kind in _IS_TEXT))
"""Endings of the files that `read_traffic` reads."""
_MOST_FILES = 50_000
_MOST_ROWS = 1 << 22  # of a table in JSON
_STATISTICS = r"rank\d+\.safetensors"
_TRACE = "a trace set: a list of steps {layer: [[expert ids] of each token]} for each request"
_NO_TRAFFIC = {
    "physical_to_logical_map": "a map of physical experts",
    "physical_expert_map": "an expert map",
    "layer_list": "vllm-ascend's expert map",
    "num_hidden_layers": "a model's config.json",
    "tpe": "Megatron's tokens per expert of the experts that one rank has",
}
_ANSWERS = "answers of an engine with routed_experts"
T = TypeVar("T", RecordedTraffic, LoadCounts)


def names_file(name: str) -> bool:
    """Whether a workload's name is that of a file, or a folder, of recorded routing or load counts."""
    return name.startswith("file:") or name.endswith(SUFFIXES) or (os.sep in name and is_folder(Path(name)))


def read_traffic(
    path: Path | str | Sequence[Path | str], model: ModelSpec | Path | str | None = None, phase: str = "decode"
) -> RecordedTraffic | LoadCounts:
    r"""Read recorded routing or load counts, in any form that serving engines and trace sets have.

    What the file is, is recognised before its numbers are read, and said in `notes` with all that is left out.

    * Experts of tokens, to `RecordedTraffic`: answers of vLLM and SGLang with `routed_experts` (JSON, JSON lines, a stream of
      events; nested lists, base64, {data, shape, dtype}); arrays [tokens, layers, top_k] in .npy, .npz, .safetensors and .pt,
      one request each, a batch [requests, tokens, layers, top_k], [tokens, top_k] for each layer, or `topk_ids` with
      `sequence_lengths`; SGLang's recorder in mode per_token (.pt); JSON lines and CSV with a row for each token and layer, or
      each pair (`token`, `layer`, `expert` or `topk_ids`; perhaps `request`, `step`); a folder of JSON files, one for each
      request, a list of steps {layer: [[expert ids] of each token]}, of which step 0 is the prefill.
    * Loads of experts, to `LoadCounts`: arrays [layers, experts] or [steps, layers, experts] in the same; tables in CSV and
      JSON, with a row per layer, per layer and expert, or per expert (`layer_0`, `layer_1`, ...); SGLang's recorder in modes
      stat and per_pass (.pt); vLLM's `expert_load_window` beside its map; the folder of TensorRT-LLM's EXPERT_STATISTIC_PATH.

    Text may be packed as .gz, or be in UTF-16; .txt and .log are read by what they hold. Of a folder (or a list of paths) all
    files are read: ranks are added up, requests put together.
    An unnamed array [a, b, c] is taken for ids unless it has what only counts have: fractions, a value twice in a row, values
    above 32767, more than 32 columns, or the same sum in every layer of a step. Maps of experts, probabilities of a router and
    axes that are exchanged are refused where they show.

    Parameters
    ----------
    path : Path, str, or list of them
        A file, a folder, or several files.
    model : ModelSpec, Path or str, optional
        The model that it was taken on, by spec, name or path: checked, and needed for base64 ids without a shape.
    phase : str
        'decode' or 'prefill': how recorded tokens are replayed, and which steps of a trace set are read.

    Returns
    -------
    RecordedTraffic or LoadCounts
        Both have `expert_counts` int64 [layers, n_experts] (logical experts, summed over steps; without a model n_experts is
        the largest id + 1, or the width of the table), `layer_ids` int64 [layers] (decoder layers where the file or the model
        tells them, else 0, 1, ...), `n_tokens` and `n_sequences` (None for load counts), `n_steps` (None where there are
        none) and `notes`.

    Raises
    ------
    InputError
        The file is missing, damaged, too large, of another model, or nothing that is known.

    Examples
    --------
    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "loads.csv"
    >>> _ = file.write_text("layer_id,expert_id,count\n3,0,7\n3,2,1\n4,1,5\n")
    >>> loads = read_traffic(file)
    >>> loads.expert_counts.tolist(), loads.layer_ids.tolist()
    ([[7, 0, 1], [0, 5, 0]], [3, 4])
    """
    several: Sequence[Any] = path if isinstance(path, list | tuple) else [path]
    if not several or not all(isinstance(part, str | Path) for part in several):
        raise InputError(f"`path` {shown(path)}: must be the name of a file or folder, or a list of them")
    paths = [Path(part) for part in several]
    if phase not in PHASES:
        raise InputError(f"`phase` must be one of {', '.join(PHASES)}, not '{phase}'")
    if model is not None and not isinstance(model, ModelSpec):
        model = load_model(model)
    where = f"workload file {paths[0]}" if len(paths) == 1 else f"workload files {paths[0]} ..."
    name, source = f"file:{paths[0].name or paths[0].resolve().name}", ", ".join(map(str, paths))
    more: list[str] = []
    if len(paths) == 1 and is_folder(paths[0]):
        where = f"workload folder {paths[0]}"
        paths, more = _listed(paths[0], where)
    elif any(re.fullmatch(_STATISTICS, path.name) for path in paths):
        raise InputError(f"{where}: of TensorRT-LLM's expert statistics give the folder, with meta_info.json in it")
    found = _read_files(paths, Requests(where, model), phase)
    if isinstance(found, CountTable):
        return _loads(found, where, name, model, more)
    return _tokens(found, where, name, phase, source, more)


def _check_shape(
    shape: tuple[int, ...], model: ModelSpec | None, where: str, axes: tuple[str, ...], is_by_shape: bool
) -> str:
    """Refuse an array [..., layers, ...] whose first axis has the model's layers, and the second has not. Without a model, say
    what its shape was taken for, and what else it may be.
    """
    if model is not None:
        wanted = (model.n_moe_layers, model.n_layers)
        if len(shape) == 3 and shape[0] in wanted and shape[1] not in wanted and shape[0] > 1:
            raise InputError(
                f"{where} has the shape {list(shape)}; it must be [{', '.join(axes)}], and model {model.name} has {shape[0]} "
                "layers: are the axes exchanged?"
            )
        return ""
    if not is_by_shape or (len(shape) == 3 and not 1 < shape[0] <= MOST_LAYERS):
        return ""
    other = f"[{axes[1]}, {axes[0]}, {axes[-1]}]"
    told = (
        f"of {other} exchange the axes"
        if len(shape) == 3
        else "loads of ranks, and ids [tokens, top_k] of one layer, look the same, and are not read"
    )
    return f"; without --model its shape {list(shape)} is taken for [{', '.join(axes)}]: {told}"


def _listed(folder: Path, where: str) -> tuple[list[Path], list[str]]:
    """The files of a folder that are read, in natural order: TensorRT-LLM's statistics of ranks, or else all whose endings are
    known; and notes on others that there are, or are not.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, _MOST_FILES + 1) if entry.is_file()]
    except OSError as error:
        raise InputError(f"{where} cannot be read: {error.strerror or error}") from None
    if len(names) > _MOST_FILES:
        raise InputError(f"{where} has more than {_MOST_FILES} files; give a part of them")
    statistics = [name for name in names if re.fullmatch(_STATISTICS, name)]
    known = [name for name in names if name.endswith(SUFFIXES) and name[0] != "." and name != "meta_info.json"]
    about = [
        name for name in known if _KINDS.get(Path(name.removesuffix(".gz")).suffix) == "text"
    ]  # README.txt, server.log
    chosen = statistics or [name for name in known if name not in set(about)] or about
    if not chosen:
        raise InputError(f"{where} has no file that is known: their endings are {', '.join(SUFFIXES)}")
    chosen.sort(key=lambda name: [part.zfill(20) for part in re.split(r"(\d+)", name)])
    n_ignored = len(set(names) - {*chosen, "meta_info.json"})
    notes = [f"{n_ignored} other files of the folder are not read"] if n_ignored else []
    if statistics and chosen[-1] != f"rank{len(chosen) - 1}.safetensors":
        notes.append(f"of ranks up to {chosen[-1]} there are {len(chosen)}: the loads of others are missing")
    return [folder / name for name in chosen], notes


def _kind(path: Path, where: str) -> str:
    """How a file is read, by its ending; what is no regular file is refused."""
    suffix = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
    if suffix in (".pkl", ".pickle"):
        raise InputError(f"{where}: a pickle may run any code and is not read; save arrays as .npy or .npz")
    kind = "statistics" if re.fullmatch(_STATISTICS, path.name) else _KINDS.get(suffix)
    if not is_there(path):
        raise InputError(f"{where} cannot be read: it does not exist")
    if kind is None or (path.suffix == ".gz" and kind not in _IS_TEXT):
        raise InputError(f"{where}: the ending must be one of {', '.join(SUFFIXES)}")
    check_regular(path, where)
    return kind if kind != "text" else "json" if _begins_json(path, where) else "csv"


def _begins_json(path: Path, where: str) -> bool:
    """Whether the first line of a text that holds something is one of JSON, or of a stream of events."""
    with reading(where, "text"), open_stream(path, where) as file:
        lines = (line.removeprefix(b"\xef\xbb\xbf").strip() for _, line in numbered_lines(file, where, MAX_LINE))
        return next(filter(None, lines), b"").startswith((b"{", b"[", b"data:", b"event:"))


def _read_files(paths: list[Path], requests: Requests, phase: str) -> CountTable | Requests:
    """What files hold together: loads that are added up, or `requests`, with the requests of all."""
    where, wheres = requests.where, [f"workload file {path}" for path in paths]
    kinds = {_kind(path, here) for path, here in zip(paths, wheres, strict=True)}
    if len(kinds) > 1:
        raise InputError(f"{where} holds files of several kinds: {', '.join(sorted({path.suffix for path in paths}))}")
    kind, tables, forms = kinds.pop(), [], dict[str, str]()
    for path, here in zip(paths, wheres, strict=True):
        found = _read_file(kind, path, here, requests, phase)
        forms.setdefault(found.form, path.name)
        if isinstance(found, CountTable):
            tables.append(found)
        if tables and (requests.arrays or requests.notes):
            raise InputError(f"{where} holds both: {'; '.join(f'{text} ({file})' for text, file in forms.items())}")
    named = [re.search(r"(?:^|[^a-z])l(?:ayers?)?[-_. ]?(\d+)", path.name.lower()) for path in paths]
    of_layers = all(named) and len({found and found[1] for found in named}) > 1  # and not of an L40S
    if of_layers and (tables[0] if tables else requests).layer_ids is None:
        raise InputError(
            f"{where} has a file for each layer ({paths[0].name}, {paths[1].name} ...); several files are those of ranks or "
            "requests: stack the layers in one array [tokens, layers, top_k] or [layers, experts]"
        )
    if tables:
        what = "ranks" if kind in ("pt", "statistics") else "files"
        return add_tables(successive(tables) if tables[0].form == STAT else tables, where, what)
    requests.form = "; ".join(forms) + ("" if len(paths) == 1 else f", {len(paths)} files")
    if requests.n_untold:
        requests.form += (
            f"; {requests.n_untold} have no token counts (usage) that fit their ids: prompts are read with them"
        )
    if requests.n_other_phase:
        other = "prefill" if phase == "decode" else "decode"
        if not requests.arrays:
            raise InputError(f"{where} has no steps of {phase}, only {other}: read it with phase '{other}'")
        requests.form += (
            f": the {phase} steps; {requests.n_other_phase} tokens of {other} are left out (--phase {other} reads them)"
        )
    return requests


def _read_file(kind: str, path: Path, here: str, requests: Requests, phase: str) -> CountTable | Requests:
    """Loads of a file, or `requests` with its requests and its form."""
    if kind == "parquet":
        with parquet_as_text(path, here) as text:
            return _read_file("json" if text.suffix == ".jsonl" else "csv", text, here, requests, phase)
    if kind == "csv":
        return add_csv(path, here, requests) or read_csv(path, here)
    if kind == "pt":
        return read_torch(path, here, requests)
    if kind == "statistics":
        return read_statistics(path, here, requests.model)
    if kind == "safetensors":
        return read_tensors(read_safetensors(path, here, are_known), path, here, requests)
    if kind == "archive":
        with open_archive(path, here) as archive:
            return read_archive(archive, requests)
    with reading(here, "JSON"):  # which may be nested too deep
        return _read_json(path, here, requests, phase)


def _read_json(path: Path, where: str, requests: Requests, phase: str) -> CountTable | Requests:
    """Loads of a JSON file, of one value or with a row, a layer or a step on each line; or `requests` with its requests.
    A line that is torn off at the end, as by a server that was killed, is left out with a note.
    """
    torn = list[str]()
    values = json_values(path, where, torn)
    ahead = list(itertools.islice(values, 2))
    if not ahead:
        raise InputError(f"{where} holds no tokens")
    (first, here), values = ahead[0], itertools.chain(ahead[1:], values)
    found = _rows_of_json(ahead, values, where, requests) or _other_json(first, here, values, where, requests, phase)
    (found.notes if isinstance(found, CountTable) else found.torn).extend(torn)
    return found


def _rows_of_json(
    ahead: list[tuple[Any, str]], values: Iterable[tuple[Any, str]], where: str, requests: Requests
) -> Requests | None:
    """`requests` with the tokens of rows: JSON lines, perhaps below one of metadata, or a list; else None."""
    rows = [(row, ahead[0][1]) for row in ahead[0][0]] if isinstance(ahead[0][0], list) else ahead[:1]
    for some in (rows, ahead[1:] if isinstance(ahead[0][0], dict) else []):
        if some and (roles := roles_of_json(some[0][0])):
            return add_json(requests, itertools.chain(rows if some is rows else [], values), roles, some[0][0], where)
    return None


def _other_json(
    first: Any, here: str, values: Iterator[tuple[Any, str]], where: str, requests: Requests, phase: str
) -> CountTable | Requests:
    """Loads, or `requests` with requests of answers or of a trace set."""
    _refuse_known(first, here)
    table = None if is_trace(first) else table_of_json(first, here)
    if table is not None:
        more = [held for held, _ in itertools.islice(values, _MOST_ROWS)]
        if len(more) == _MOST_ROWS:
            raise InputError(f"{where} has more than {_MOST_ROWS} rows")
        table = table_of_json([first, *more], where) if more else table
        if table is None:
            raise InputError(f"{where}: its lines are no rows of one table of loads")
        return table
    requests.form, n_keyed = _TRACE if is_trace(first) else _ANSWERS, 0
    for held, at in itertools.chain([(first, here)], values):
        if is_trace(held):
            add_trace(requests, held, at, phase)
            n_keyed += 1
        else:
            n_keyed += add_answer(requests, held, at, phase)
    row = first[0] if isinstance(first, list) and first else first
    roles = {key: column_role(key) for key in row} if isinstance(row, dict) else {}
    if not n_keyed and "layer" in roles.values() and None in roles.values():
        odd = shown(", ".join(key for key, role in roles.items() if role is None))
        raise InputError(
            f"{here}: not known beside a layer: {odd}; a row has layer, expert and count, or layer and counts"
        )
    if not n_keyed:
        raise InputError(
            f"{where} has no key 'routed_experts', is no table of loads {{layer: [count of each expert]}}, and has no rows of "
            "tokens {layer, token, topk_ids}"
        )
    return requests


def _refuse_known(held: Any, here: str) -> None:
    """Refuse by name what is no traffic."""
    if not isinstance(held, dict) or not {"routed_experts", *COUNT_NAMES, *PHYSICAL_NAMES}.isdisjoint(held):
        return
    for key, what in _NO_TRAFFIC.items():
        if key in held:
            raise InputError(f"{here}: {what}, and no traffic")
    if is_step(held) and any(held.values()):
        raise InputError(f"{here}: one step {{layer: [[expert ids] of each token]}}; a request is a list of such steps")


def _tokens(found: Requests, where: str, name: str, phase: str, source: str, more: list[str]) -> RecordedTraffic:
    """Checked ids of requests, of the model where it is known."""
    model, form, (ids, lengths) = found.model, f"read as {found.form}", found.joined()
    if len(found.arrays) == 1 and found.layer_ids is None:
        form += _check_shape(ids.shape, model, where, ("tokens", "layers", "top_k"), found.is_by_shape)
    layer_ids = None if found.layer_ids is None else np.array(found.layer_ids)
    ids, layer_ids, drafts = _without_drafts(ids, layer_ids, model)
    if model is not None and ids.shape[1:] == (model.n_layers, 1) and model.n_moe_layers < model.n_layers:
        moe = np.array(model.moe_layer_ids)  # with one expert per token zeros do not tell dense layers
        if not np.delete(ids, moe, axis=1).any():
            ids, layer_ids = ids[:, moe], moe
            drafts.append(f"{model.n_layers - len(moe)} layers that are dense in {model.name} are left out")
    record = build_record(where, name, ids, lengths, phase, source, layer_ids)
    n_equal = len(found.arrays) - len({hash(array.tobytes()) for array in found.arrays}) if len(found.arrays) > 1 else 0
    equal = [f"{n_equal} requests have the same routing as another: each is counted"] if n_equal else []
    notes = (form, *found.notes, *record.notes, *more, *drafts, *equal)
    record = replace(record, notes=notes, n_steps=len(found.passes) or None)
    return _of_model(record, layer_ids is not None, model, ids.shape[1])


def _loads(table: CountTable, where: str, name: str, model: ModelSpec | None, more: list[str]) -> LoadCounts:
    """Checked counts of a table, of the model where it is known."""
    counts, layer_ids, drafts = _without_drafts(table.counts, table.layer_ids, model)
    notes = [f"read as {table.form}", *table.notes, *more, *drafts]
    if counts.ndim in (2, 3) and layer_ids is None:
        axes = ("steps", "layers", "experts")[-counts.ndim :]
        notes[0] += _check_shape(counts.shape, model, where, axes, table.steps is None)
    may_be_ids = model is None and counts.ndim == 3 and "{layer: [" in table.form and 4 * counts.max() < counts.size
    if may_be_ids and not are_counts(counts):
        raise InputError(
            f"{where}: its lists, of {counts.shape[2]} numbers, may be loads or the experts of a token: give --model, or name "
            "what they are (rows of tokens have layer, token and topk_ids; of loads layer and counts)"
        )
    if model is not None:
        counts, told = of_experts(counts, model.n_experts, model.top_k, table.is_open)
        notes += told
    if counts.ndim == 3 and counts.size and counts.dtype.kind in "iuf":
        used = np.asarray(counts.any(axis=(1, 2)))
        if used.any() and not used.all():
            notes.append(f"{(~used).sum()} of {len(used)} steps have no load (unfilled, or idle) and are left out")
            counts = counts[used]
    data, n_dense = build_counts(where, name, counts, layer_ids)
    notes += [f"{n_dense} layers without any load are left out"] if n_dense else []
    notes += doubts_about(data)
    return _of_model(replace(data, notes=tuple(notes)), layer_ids is not None, model, counts.shape[-2])


def _without_drafts(
    table: np.ndarray, layer_ids: np.ndarray | None, model: ModelSpec | None
) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
    """Counts or ids [..., layers, numbers] without the draft layers that engines number behind the decoder's, their layers,
    and a note. A few at most, where all MoE layers of the model are there too, by numbers of the file or of rows that dense
    layers have too: else it is another model.
    """
    numbers = np.arange(table.shape[-2] if table.ndim > 1 else 0) if layer_ids is None else layer_ids
    if model is None or not np.isin(model.moe_layer_ids, numbers).all():
        return table, layer_ids, []
    if not model.n_layers or (layer_ids is None and model.n_moe_layers == model.n_layers):
        return table, layer_ids, []
    drafts = numbers[numbers >= model.n_layers]
    if not 0 < len(drafts) <= MOST_DRAFTS:
        return table, layer_ids, []
    note = f"layers past the {model.n_layers} decoder layers of {model.name} are left out (a draft model's?): {drafts.tolist()}"
    return table[..., numbers < model.n_layers, :], numbers[numbers < model.n_layers], [note]


def _odd_experts(data: RecordedTraffic | LoadCounts, model: ModelSpec | None) -> tuple[str, ...]:
    """Notes on experts that no layer uses, or each token: seldom what a router does."""
    counts = data.expert_counts if isinstance(data, RecordedTraffic) else data.total
    n_experts = model.n_experts if model else counts.shape[1]
    taken = counts.sum(axis=0) > 0
    last = int(np.flatnonzero(taken)[-1]) + 1
    if last > 2 and not taken[0] and taken[1:last].all():
        return ("no layer uses expert 0, and each above it is used: if its experts are numbered from 1, subtract 1",)
    if last < n_experts and taken[:last].all():
        return (
            f"no layer uses experts {last} to {n_experts - 1}: another model, or experts numbered on each rank by itself?",
        )
    if data.n_tokens is not None and data.n_tokens > 19 and n_experts > data.topk_ids.shape[2]:
        always = np.flatnonzero((counts == data.n_tokens).all(axis=0))
        return (f"each token takes expert {always[0]} in every layer: a shared expert?",) if always.size else ()
    return ()


def _of_model(data: T, is_told: bool, model: ModelSpec | None, n_rows: int) -> T:
    """The same, once it is known to be of the model, with the model's experts and layer ids."""
    data = replace(data, notes=data.notes + _odd_experts(data, model))
    if model is None:
        return data
    if isinstance(data, RecordedTraffic):
        data = data.without_shared(model.n_experts, model.top_k)
        data.check_model(model.n_experts, model.top_k, model.name)
        data = replace(data, n_experts=model.n_experts)
    elif data.n_experts != model.n_experts:
        or_else = ", or physical experts without a map" if data.n_experts > model.n_experts else ""
        or_else = or_else or ", or loads of ranks, or of one rank" * (model.n_experts % data.n_experts == 0)
        raise InputError(
            f"workload {data.name} has counts of {data.n_experts} experts, model {model.name} has {model.n_experts}: "
            f"another model{or_else}?"
        )
    if model.n_moe_layers and data.n_layers > model.n_moe_layers:
        raise InputError(
            f"workload {data.name} has {data.n_layers} MoE layers, model {model.name} has {model.n_moe_layers}: another model?"
        )
    ids, notes = _decoder_layers(data, is_told or n_rows > data.n_layers, model)
    return replace(data, layer_ids=ids, notes=data.notes + tuple(notes))


def _decoder_layers(
    data: RecordedTraffic | LoadCounts, is_told: bool, model: ModelSpec
) -> tuple[np.ndarray, list[str]]:
    """Ids of the decoder layers, by the file's own numbers and by the model's MoE layers."""
    moe = np.array(model.moe_layer_ids, np.int64)
    ids = data.layer_ids
    if not moe.size or (moe[-1] == len(moe) - 1 != model.n_layers - 1):  # only their number is known
        return ids, []
    if not is_told:
        if len(ids) == len(moe):
            return moe, []
        return ids, [f"which of the {len(moe)} MoE layers of {model.name} its {len(ids)} layers are, is not told"]
    if np.isin(ids, moe).all():
        return ids, []
    if np.array_equal(ids, moe + 1) or np.array_equal(ids, np.arange(1, len(moe) + 1)):
        return moe, [f"its layers are numbered from 1: layer {ids[0]} is decoder layer {moe[0]}"]
    if ids.max() < len(moe):
        return moe[ids], [
            f"its layers are numbered among the MoE layers: layer {ids[0]} is decoder layer {moe[ids[0]]}"
        ]
    odd = int(ids[~np.isin(ids, moe)][0])
    raise InputError(
        f"workload {data.name} has routing in layer {odd}, the {len(moe)} MoE layers of model {model.name} are "
        f"{moe[0]} to {moe[-1]}: another model?"
    )


def read_recorded(path: Path, phase: str = "decode", model: ModelSpec | Path | str | None = None) -> RecordedTraffic:
    """Experts of tokens of a file that `read_traffic` reads. Raises InputError as it does, and for load counts."""
    data = read_traffic(path, model, phase)
    if isinstance(data, LoadCounts):
        raise InputError(
            f"workload file {path} holds load counts, not tokens: fit them first (epsim traffic fit {path} --out my.toml)"
        )
    return data
