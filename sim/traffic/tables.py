"""Tables of load counts, before they are checked: CSV and JSON, with a row per layer, or per layer and expert."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from sim.errors import InputError, shown
from sim.files import open_stream, reading
from sim.traffic.counts import (
    COUNT_NAMES,
    MAP_NAMES,
    MOST_COUNTS,
    PHYSICAL_NAMES,
    CountTable,
    add_tables,
    logical_counts,
)

_MAX_LINE = 1 << 20
_ROLES = {
    "layer": r"(moe_|decoder_)?layers?(_?(id|idx|index|num|number|no))?",
    "step": r"(step|iter|iteration|pass|forward_pass|window|time_?step)(_?(id|idx|index|num|number|no))?",
    "rank": r"((ep|dp|tp|world|gpu)_)?(rank|gpu|device)(_?(id|idx|index))?",
    "expert": r"(logical_)?experts?(_?(id|idx|index|num|number|no))?",
    "count": r"((token|expert|n|num|logical|activation)_)?(counts?|loads?|tokens|hits?|usage|frequency|value)"
    r"|(num_)?tokens_per_expert",
}
"""What a column holds, by its name in lower case: `layer_id`, `iteration`, `ep_rank`, `expert_idx`, `count` ..."""
_EXPERT_COLUMN = r"((logical_)?(experts?|exp|e)_?((id|idx)_)?)?(\d{1,6})"  # 3, e3, expert_3
_LAYER_KEY = (
    r"(([a-z_]+\.)*(moe_|decoder_)?(layers?|blk|l)[_ .-]?)?(\d{1,6})(\.[a-z_.]+)?"  # 3, layer_3, model.layers.3.mlp
)
_BESIDE = re.compile(
    r"(.+_)?(total|sum|mean|average|avg|max|min|std|cv|share|percent(age)?|pct|ratio|(im)?balance(d|dness)?|entropy|time(stamp)?"
    r"|date)(_.+)?"
)
"""Columns that only describe the others: they are not read."""
_MOST_RANKS = 4096
_COLUMNS = "'layer', 'step', 'rank', and 'expert_0', 'expert_1', ... or 'expert' and 'count'"


def read_csv(path: Path, where: str) -> CountTable:
    """Counts of a CSV file: a row per layer (and step), a column per expert, or a row per layer and expert.

    A first line of names says what the columns are (`_ROLES`); 0, 1, ..., E-1 is such a line too, and 1, 2, ..., E. Without
    names every column is an expert and every row a layer.
    """
    with reading(where, "CSV"), open_stream(path, where) as file:
        number, line = _first_line(file, where)
        separator = next((mark for mark in ",;\t" if mark in line), r"\s+" if re.search(r"\S\s+\S", line) else ",")
        cells = [cell.strip().strip('"') for cell in re.split(separator, line.strip() if separator == r"\s+" else line)]
        width = len(cells)
        cells = cells[: -1 if width > 1 and not cells[-1] else width]  # each line ends with a separator
        numbers = [_number(cell) for cell in cells]
        rows: list[np.ndarray] = []
        names: list[str] | None = None
        notes = []
        is_data = None not in numbers
        first = next((n for n in (0, 1) if numbers == list(range(n, n + len(cells))) and len(cells) > 1 + n), None)
        if first is not None:
            names, is_data = [str(first + place) for place in range(len(cells))], False
            notes.append(f"its first line, {first} to {first + len(cells) - 1}, numbers the experts")
        elif is_data:
            rows.append(np.array([numbers], float))
        else:
            names = _names(cells, f"{where}, line {number}")
            if names[0] == "layer" and _role(cells[0]) is None:
                notes.append("its first column, which has no name, is taken for the layer")
            beside = [cell for cell, name in zip(cells, names, strict=True) if not name]
            notes += [f"columns that are not read: {shown(', '.join(beside))}"] if beside else []
        wanted = {place: names[place] if names else "" for place in range(len(cells)) if names is None or names[place]}
        names = names and [name for name in names if name]
        n_numbers = 0
        try:
            for whole in _chunks(file, width, separator):
                if len(cells) < width and whole[width - 1].notna().any():
                    raise InputError(
                        f"{where}: its first line ends with '{separator}', other lines have a value behind it"
                    )
                chunk = whole[list(wanted)].copy() if len(wanted) < width else whole
                for place, role in wanted.items():
                    if len(chunk) and role in ("layer", "expert") and chunk[place].dtype.kind not in "iufb":
                        chunk[place] = chunk[place].map({name: _value(name, role) for name in chunk[place].unique()})
                if len(chunk) and any(kind.kind not in "iuf" for kind in chunk.dtypes):  # text, or booleans
                    raise ValueError("a column is not of numbers")
                rows.append(chunk.to_numpy(float))
                n_numbers += rows[-1].size
                if n_numbers > MOST_COUNTS:
                    raise InputError(f"{where} has more than {MOST_COUNTS} counts; add up steps first")
        except pd.errors.EmptyDataError:
            pass
        except InputError:
            raise
        except (ValueError, pd.errors.ParserWarning):
            _name_fault(path, where, (number, sum(map(len, rows[int(is_data) :]))), width, wanted, separator)
            raise
    if not rows or not sum(map(len, rows)):
        raise InputError(f"{where} has no rows of counts")
    table = np.concatenate(rows)
    if np.isnan(table).any():
        first_nan = int(np.isnan(table).any(axis=1).argmax())
        _name_fault(path, where, (number, max(0, first_nan - is_data)), width, wanted, separator)
    found = _table_of_columns(table, names, where, "CSV")
    found.notes += notes
    return found


def _first_line(file: IO[bytes], where: str) -> tuple[int, str]:
    """The first line that is neither empty nor a comment, and its number."""
    for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
        if len(line) >= _MAX_LINE:
            raise InputError(f"{where}, line {number}: longer than {_MAX_LINE >> 20} MiB")
        text = line.decode("utf-8-sig").rstrip("\r\n")
        if text.strip(",; \t") and not text.startswith("#"):
            return number, text
    raise InputError(f"{where} has no rows of counts")


def _chunks(file: IO[bytes], width: int, separator: str) -> Iterable[pd.DataFrame]:
    """The rows that follow, some at a time."""
    options: dict[str, Any] = {"header": None, "names": range(width), "index_col": False}
    options |= {"sep": separator, "comment": "#", "skipinitialspace": True}
    with pd.read_csv(file, chunksize=max(1, 2**20 // width), **options) as chunks:
        yield from chunks


def _value(cell: str, role: str) -> float | None:
    """The number of a cell, or of the layer or expert that it names: layer_3, model.layers.3.mlp, expert_5."""
    number = _number(cell)
    named = {"layer": layer_of_key, "expert": _expert_of_key}.get(role)
    return named(cell) if number is None and named else number


def _name_fault(
    path: Path, where: str, sound: tuple[int, int], width: int, wanted: dict[int, str], separator: str
) -> None:
    """Raise the error that names the line which is not a row of `width` numbers; none where each is. `sound`: the first line,
    and how many rows after it are known to be sound; `wanted`: the columns that are read, and their roles.
    """
    n_rows = 0
    with open_stream(path, where) as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE), b""), 1):
            if len(line) >= _MAX_LINE:
                raise InputError(f"{where}, line {number}: longer than {_MAX_LINE >> 20} MiB")
            if number <= sound[0] or line.isspace() or line.startswith(b"#"):
                continue
            n_rows += 1
            if n_rows <= sound[1]:
                continue
            text = line.decode("utf-8-sig", "replace").strip("\r\n")
            cells = re.split(separator, text.strip() if separator == r"\s+" else text)
            read = [(cells[place].strip().strip('"'), role) for place, role in wanted.items() if place < len(cells)]
            bad = [cell for cell, role in read if _value(cell, role) is None]
            if bad:
                raise InputError(f"{where}, line {number}: '{shown(bad[0])}' is not a number")
            if len(cells) != width:
                raise InputError(f"{where}, line {number}: {len(cells)} columns where the first line has {width}")


def _names(cells: list[str], here: str) -> list[str]:
    """The columns by their roles; an expert's column by its number. A name that is not known is refused."""
    names: list[str] = []
    unknown: list[str] = []
    beside: list[str] = []
    for place, cell in enumerate(cells):
        name = re.sub(r"[ .\-]+", "_", cell.lower())
        role = next((role for role, pattern in _ROLES.items() if re.fullmatch(pattern, name)), None)
        expert = _expert_of_key(name)
        if place == 0 and name in ("", "unnamed:_0", "index"):
            role = "index"
        if role is None and expert is None:
            (beside if _BESIDE.fullmatch(name) else unknown).append(cell)
        names.append(role or ("" if expert is None else str(expert)))
    if unknown or (beside and "layer" not in names):
        raise InputError(
            f"{here}: neither counts nor a name for each column ({_COLUMNS}): '{shown((unknown + beside)[0])}' is not known"
        )
    if "layer" not in names and names[0] == "index":
        names[0] = "layer"
    for role in (*_ROLES, "index"):
        if names.count(role) > 1:
            raise InputError(f"{here}: {names.count(role)} columns name a {role}: {shown(','.join(cells))}")
    if "layer" not in names:
        other = next((role for role in ("step", "rank", "expert") if role in names), None)
        if other:
            raise InputError(f"{here}: a column '{other}' needs a column 'layer' beside it")
    if ("expert" in names) != ("count" in names):
        there, missing = ("expert", "count") if "expert" in names else ("count", "expert")
        raise InputError(f"{here}: a column '{there}' needs a column '{missing}' beside it")
    experts = [name for name in names if name.isdigit()]
    if "expert" in names and experts:
        raise InputError(f"{here}: columns 'expert' and 'count' do not go with a column for each expert")
    if "expert" not in names and not experts:
        raise InputError(f"{here}: no column is an expert ({_COLUMNS})")
    return names


def _table_of_columns(table: np.ndarray, names: list[str] | None, where: str, kind: str) -> CountTable:
    """Counts of a table [rows, columns] of numbers whose columns have these roles."""
    if names is None:
        form = f"a {kind} table of loads without names: a row per layer, a column per expert"
        index, rest = table[:, 0], table[:, 1:].sum(axis=1)
        if len(table) > 1 and (np.diff(index) == 1).all() and np.ptp(rest) < 1e-6 * rest.max(initial=0):
            note = f"its first column, {index[0]:g} to {index[-1]:g}, is taken for the layer: the others add up to the same"
            return CountTable(_whole(table[:, 1:]), form, _ids(index, "layers", where), notes=[note])
        return CountTable(_whole(table), form)
    if "rank" in names:
        place = names.index("rank")
        ranks, others = np.unique(table[:, place]), names[:place] + names[place + 1 :]
        if len(ranks) > _MOST_RANKS:
            raise InputError(f"{where} has {len(ranks)} ranks, more than {_MOST_RANKS}")
        parts = [np.delete(table[table[:, place] == rank], place, axis=1) for rank in ranks]
        return add_tables([_table_of_columns(part, others, where, kind) for part in parts], where, "ranks")
    keys = {name: table[:, place] for place, name in enumerate(names) if not name.isdigit()}
    columns = [place for place, name in enumerate(names) if name.isdigit()]
    layer = _ids(keys["layer"], "layers", where) if "layer" in keys else None
    if "step" in keys and not np.isfinite(keys["step"]).all():
        raise InputError(f"{where}: steps must be numbers")
    if "expert" in keys:
        return _long(table, keys, where, kind)
    experts = np.array([int(names[place]) for place in columns])
    if len(set(experts.tolist())) != len(experts):
        raise InputError(f"{where}: an expert has two columns")
    if experts.max() > 2**15 - 1:
        raise InputError(f"{where}: expert {experts.max()} is above 32767")
    wide = np.zeros((len(table), int(experts.max()) + 1))
    wide[:, experts] = table[:, columns]
    missing = wide.shape[1] - len(experts)
    notes = (
        [f"{missing} experts below {experts.max()} have no column: they are taken to have no load"] if missing else []
    )
    form = f"a {kind} table of loads: a row per layer{' and step' if 'step' in keys else ''}, a column per expert"
    if layer is None:
        return CountTable(_whole(wide), form, notes=notes)
    steps, at_step = np.unique(keys.get("step", np.zeros(len(table))), return_inverse=True)
    layers, at_layer = np.unique(layer, return_inverse=True)
    cells = np.unique(at_step * len(layers) + at_layer)
    n_wanted = len(steps) * len(layers)
    if len(cells) != n_wanted or len(table) != n_wanted:
        raise InputError(
            f"{where}: {len(table)} rows are not one for each of {len(layers)} layers in {len(steps)} steps"
        )
    counts = np.zeros((len(steps), len(layers), wide.shape[1]))
    np.add.at(counts, (at_step, at_layer), wide)
    return _by_step(counts, steps if "step" in keys else None, CountTable(counts, form, layers, notes=notes))


def _long(table: np.ndarray, keys: dict[str, np.ndarray], where: str, kind: str) -> CountTable:
    """Counts of a table with a row per layer and expert; experts without a row have no load."""
    expert, layer = _ids(keys["expert"], "experts", where), _ids(keys["layer"], "layers", where)
    if expert.max() > 2**15 - 1:
        raise InputError(f"{where}: expert {expert.max()} is above 32767")
    steps, at_step = np.unique(keys.get("step", np.zeros(len(table))), return_inverse=True)
    layers, at_layer = np.unique(layer, return_inverse=True)
    shape = (len(steps), len(layers), int(expert.max()) + 1)
    if np.prod(shape, dtype=float) > MOST_COUNTS:
        raise InputError(f"{where} has more than {MOST_COUNTS} counts; add up steps first")
    if (keys["count"] < 0).any():  # before they are added up
        raise InputError(f"{where}: counts must not be negative, found {shown(keys['count'].min().item())}")
    counts = np.zeros(shape)
    np.add.at(counts, (at_step, at_layer, expert), keys["count"])
    place = (at_step * len(layers) + at_layer) * shape[2] + expert
    n_repeated, notes = len(place) - len(np.unique(place)), []
    if n_repeated:
        notes.append(f"{n_repeated} rows repeat a layer and expert: they are added up")
    form = f"a {kind} table of loads: a row per layer and expert{' of a step' if 'step' in keys else ''}"
    found = CountTable(counts, form, layers, is_open=True, notes=notes)
    return _by_step(counts, steps if "step" in keys else None, found)


def _by_step(counts: np.ndarray, steps: np.ndarray | None, table: CountTable) -> CountTable:
    table.counts, table.steps = _whole(counts if steps is not None else counts[0]), steps
    return table


def _ids(values: np.ndarray, what: str, where: str) -> np.ndarray:
    if not ((values >= 0) & (values < 2**31) & (values % 1 == 0)).all():
        raise InputError(f"{where}: {what} must be whole numbers from 0 on")
    return values.astype(np.int64)


def _whole(counts: np.ndarray) -> np.ndarray:
    """Counts as int64 where all are whole numbers that float64 holds exactly."""
    is_whole = (counts == np.floor(counts)).all() and np.abs(counts).max(initial=0) < 2**53  # False for NaN
    return counts.astype(np.int64) if is_whole else counts


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def table_of_json(held: Any, where: str) -> CountTable | None:
    """Counts of parsed JSON; None where it is no table of counts.

    {layer: [count of each expert]} or {layer: {expert: count}}, null for a dense layer; a list [layers][experts] (or
    [steps][layers][experts] under one of COUNT_NAMES); a list of objects whose keys name the columns of a table.
    """
    if isinstance(held, dict):
        known = (*COUNT_NAMES, *PHYSICAL_NAMES, "layers")
        named = next((name for name in known if isinstance(held.get(name), list | dict)), None)
        if named == "layers" and isinstance(held[named], list) and not all(isinstance(x, dict) for x in held[named]):
            named = None
        if named is not None:
            inner = held[named]
            if isinstance(inner, list) and depth_of(inner) in (2, 3):
                ids, table = (
                    held.get("layer_ids", held.get("layers")),
                    next((held[x] for x in MAP_NAMES if x in held), None),
                )
                slots = _regular(table, where) if isinstance(table, list) else None
                counts, form = (
                    logical_counts(named, _regular(inner, where), slots, where),
                    f"JSON with counts under '{named}'",
                )
                return CountTable(counts, form, _given_ids(ids, inner, where))
            return table_of_json(inner, where)
        return _table_of_layers(held, where)
    if not isinstance(held, list) or not held:
        return None
    if all(isinstance(row, dict) and row for row in held):
        by_step = _steps(held, where)
        if by_step is not None:
            return by_step
        beside = [str(key) for key in held[0] if _is_beside(key)]
        held = [without_descriptions(row) for row in held]
        keys = list(held[0])
        if "layer" not in [_role(key) for key in keys] or any(list(row) != keys for row in held):
            return None
        listed = [key for key in keys if isinstance(held[0][key], list)]
        if len(listed) == 1 and _role(listed[0]) == "count":  # a row per layer, its counts in a list
            others = [key for key in keys if key != listed[0]]
            rows = [
                [row[key] for key in others] + (row[listed[0]] if isinstance(row[listed[0]], list) else [])
                for row in held
            ]
            table = _regular(rows, where)
            if any(_role(key) not in ("layer", "step", "rank") for key in others):
                raise InputError(
                    f"{where}: beside '{listed[0]}', keys must be layer, step or rank: {shown(', '.join(others))}"
                )
            names = [_role(key) or "" for key in others] + [str(e) for e in range(table.shape[1] - len(others))]
        else:
            names = _names(keys, where)
            table = _regular([list(row.values()) for row in held], where)
        found = _table_of_columns(table.astype(float), names, where, "JSON")
        found.notes += [f"keys that are not read: {shown(', '.join(beside))}"] if beside else []
        return found
    if depth_of(held) == 2:
        return CountTable(_regular(held, where), "a JSON list of loads [layers][experts]")
    return None


def is_row(held: dict[str, Any]) -> bool:
    """Whether the keys of an object of JSON are those of a row of a table: one is a layer's, and all are known."""
    roles = [_role(key) for key in held]
    return "layer" in roles and all(
        role or _expert_of_key(key) is not None for key, role in zip(held, roles, strict=True)
    )


def without_descriptions(row: dict[str, Any]) -> dict[str, Any]:
    """A row of a table without what only describes it, such as a total or a time."""
    return {key: value for key, value in row.items() if not _is_beside(key)}


def _is_beside(key: str) -> bool:
    return _role(key) is None and bool(_BESIDE.fullmatch(str(key).lower()))


def layer_of_key(key: str) -> int | None:
    """Number of the layer that a key of a JSON object names: '3', 'layer_3', 'model.layers.3.mlp'; None where it does not."""
    found = re.fullmatch(_LAYER_KEY, str(key).lower())
    return int(found[5]) if found else None


def _expert_of_key(key: str) -> int | None:
    """Number of the expert that a name is of: '5', 'e5', 'expert_5'; None where it is of none."""
    found = re.fullmatch(_EXPERT_COLUMN, str(key).lower())
    return int(found[6]) if found else None


def depth_of(held: Any) -> int:
    """Levels of lists, down the first element of each."""
    depth = 0
    while isinstance(held, list) and depth < 5:
        depth, held = depth + 1, held[0] if held else None
    return depth


def _role(key: str) -> str | None:
    return next((role for role, pattern in _ROLES.items() if re.fullmatch(pattern, str(key).lower())), None)


def _table_of_layers(held: dict[str, Any], where: str) -> CountTable | None:
    layers = [layer_of_key(key) for key in held]
    rows = [row for row in held.values() if row is not None]
    if all(isinstance(row, dict) for row in rows):  # {layer: {expert_counts: ..., and what describes them}}
        rows = [next((row[name] for name in COUNT_NAMES if name in row), row) for row in rows]
    if not rows or None in layers or not all(isinstance(row, list | dict) and row for row in rows):
        return None
    if len(set(layers)) != len(layers):
        raise InputError(f"{where}: a layer stands there twice")
    ids = np.array([layer for layer, row in zip(layers, held.values(), strict=True) if row is not None], np.int64)
    if all(isinstance(row, dict) for row in rows):
        experts = [[_expert_of_key(key) for key in row] for row in rows]
        numbers = [[number for number in row if number is not None] for row in experts]
        if numbers != experts:
            return None
        width = max(map(max, numbers)) + 1
        if width > 2**15 - 1:
            raise InputError(f"{where}: expert {width - 1} is above 32767")
        counts = np.zeros((len(rows), width))
        for out, at, row in zip(counts, numbers, rows, strict=True):
            out[at] = _regular([list(row.values())], where)[0]
        form, is_open, counts = "JSON {layer: {expert: count}}", True, _whole(counts)
    elif all(isinstance(row, list) and depth_of(row) == 1 for row in rows):
        form, is_open, counts = "JSON {layer: [count of each expert]}", False, _regular(rows, where)
    else:
        return None
    order = np.argsort(ids)
    return CountTable(counts[order], form, ids[order], is_open=is_open)


def _steps(held: list[Any], where: str) -> CountTable | None:
    """Counts of a list of steps, each a table of its own, as {layer: [count of each expert]}; None where it is none."""
    first = table_of_json(held[0], where)
    if first is None:
        return None
    tables = [table for table in (table_of_json(step, where) for step in held) if table is not None]
    if len(tables) < len(held):
        raise InputError(f"{where}: of its {len(held)} steps {len(held) - len(tables)} have no counts")
    width = max(table.counts.shape[1] for table in tables)
    rows = []
    for table in tables:
        ids, wanted = (np.arange(len(t.counts)) if t.layer_ids is None else t.layer_ids for t in (table, first))
        same = np.array_equal(ids, wanted)
        if table.counts.ndim != 2 or not same or (table.counts.shape[1] < width and not table.is_open):
            raise InputError(f"{where}: its steps differ in their layers or experts")
        rows.append(np.pad(table.counts, ((0, 0), (0, width - table.counts.shape[1]))))
    form = f"a JSON list of steps, each {first.form.removeprefix('JSON ')}"
    return CountTable(np.stack(rows), form, first.layer_ids, is_open=first.is_open)


def _regular(rows: list[Any], where: str) -> np.ndarray:
    """Nested lists of numbers as an array; booleans, text and rows of different lengths are refused."""
    flat: list[Any] = rows
    while flat and isinstance(flat[0], list):
        if not all(isinstance(row, list) for row in flat):
            raise InputError(f"{where}: its lists of counts are not regular")
        flat = [value for row in flat for value in row]
    if set(map(type, flat)) - {int, float}:
        raise InputError(
            f"{where}: counts must be numbers, found {shown(next(x for x in flat if type(x) not in (int, float)))}"
        )
    try:
        array = np.asarray(rows)
    except (ValueError, OverflowError):
        raise InputError(f"{where}: its lists of counts are not equally long") from None
    if array.dtype.kind not in "iuf":
        raise InputError(f"{where}: counts above 2**53")
    return _whole(array) if array.dtype.kind == "f" else array


def _given_ids(ids: Any, counts: list[Any], where: str) -> np.ndarray | None:
    """Layer ids that stand beside counts, where they are a list of as many."""
    n_layers = len(counts[0]) if depth_of(counts) == 3 else len(counts)
    if not isinstance(ids, list) or len(ids) != n_layers or set(map(type, ids)) != {int}:
        return None
    return _ids(np.array(ids, float), "layers", where)
