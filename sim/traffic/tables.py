"""Tables of load counts, before they are checked: CSV and JSON, with a row per layer, or per layer and expert."""

import csv
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

import numpy as np
import pandas as pd

from sim.errors import InputError, shown
from sim.files import numbered_lines, open_stream, reading
from sim.traffic.arrays import MOST_COUNTS
from sim.traffic.counts import (
    COUNT_NAMES,
    MAP_NAMES,
    PHYSICAL_NAMES,
    CountTable,
    add_tables,
    are_counts,
    logical_counts,
    tabulate,
)

ROLES = {
    "layer": r"(moe_|decoder_)?layers?(_?(id|idx|index|num|number|no|name))?",
    "step": r"(step|iter|iteration|pass|forward_pass|window|time_?step)(_?(id|idx|index|num|number|no))?",
    "rank": r"((ep|dp|tp|world|gpu)_)?(rank|gpu|device)(_?(id|idx|index))?",
    "expert": r"(logical_)?experts?(_?(id|idx|index|num|number|no))?",
    "count": r"((token|expert|n|num|logical|activation)_)?(counts?|loads?|tokens|hits?|usage|freq(uency)?|value)"
    r"|(num_)?tokens_per_expert|activations|selections|hotness",
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
_THOUSANDS = re.compile(r"\d{1,3}(,\d{3})+(\.\d*)?")
_AROUND = ("layers", "load_history", "snapshots")
"""Keys of JSON whose value is the table; the last two hold steps: of the EPLB workloads of openevolve, and of vLLM's dumps."""
_MOST_RANKS = 4096
_COLUMNS = (
    "'layer', 'step', 'rank', and 'expert_0', 'expert_1', ... or 'expert' and 'count', or 'expert' and 'layer_0', ...; "
    "of tokens 'token', 'layer' and 'expert' or 'expert_ids'"
)
_LAYER = "of layer "
"""Begins the role of a column with the loads of one layer, in a table with a row for each expert."""


def read_csv(path: Path, where: str) -> CountTable:
    """Counts of a CSV file: a row per layer (and step), a column per expert, or a row per layer and expert.

    A first line of names says what the columns are (`ROLES`); 0, 1, ..., E-1 is such a line too, and 1, 2, ..., E. Without
    names every column is an expert and every row a layer.
    """
    with reading(where, "CSV"), open_stream(path, where) as file:
        number, cells, separator, width = first_row(file, where)
        names, notes = _header(cells, f"{where}, line {number}")
        rows = [] if names else [np.array([[number_of(cell) for cell in cells]], float)]
        marks = set() if names else _marks(cells)
        wanted = {place: names[place] if names else "" for place in range(len(cells)) if names is None or names[place]}
        n_numbers = 0
        try:
            for whole in _chunks(file, width, separator):
                if len(cells) < width and whole[width - 1].notna().any():
                    raise InputError(
                        f"{where}: its first line ends with '{separator}', other lines have a value behind it"
                    )
                chunk = whole[list(wanted)].copy() if len(wanted) < width else whole
                for place, role in wanted.items():
                    if role not in ("layer", "expert") and chunk[place].any():
                        marks |= {""} if chunk[place].dtype.kind in "iufb" else _marks(chunk[place].unique())
                    if len(chunk) and chunk[place].dtype.kind not in "iufb":
                        numbers = {cell: _value(cell, role) for cell in chunk[place].unique()}
                        if any(abs(number or 0) > 2**63 for number in numbers.values()):
                            raise ValueError("too large")
                        chunk[place] = chunk[place].map(numbers)
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
            _name_fault(path, where, number, width, wanted, separator)
            raise
    if not rows or not sum(map(len, rows)):
        raise InputError(f"{where} has no rows of counts")
    table = np.concatenate(rows)
    if np.isnan(table).any():
        _name_fault(path, where, number, width, wanted, separator)
    found = _table_of_columns(table, names and list(wanted.values()), where, "CSV")
    if {"", "%"} <= marks:
        raise InputError(f"{where}: some of its numbers have a percent sign, others have none")
    if "," in marks and separator != ",":
        raise InputError(f"{where}: commas in its numbers, of thousands or decimals? Write 1234 or 1.234")
    told = {"%": "its loads are percentages", ",": "commas in its numbers are taken for thousands"}
    found.notes += [*notes, *(text for mark, text in told.items() if mark in marks)]
    if separator == ";" and (x := found.counts).dtype.kind == "f" and np.allclose(x, x.round(3), 0, 1e-9):
        found.notes.append("a dot in its numbers is taken for the decimal point, not for thousands")
    return found


def first_row(file: IO[bytes], where: str) -> tuple[int, list[str], str, int]:
    """The first line of a table that holds something: its number, its cells, what separates them, and their number where each
    line ends with a separator, too. The file stands behind it.
    """
    lines = ((number, line.decode("utf-8-sig").rstrip("\r\n")) for number, line in numbered_lines(file, where))
    filled = ((number, line) for number, line in lines if line.strip(",; \t") and not line.startswith("#"))
    number, line = next(filled, (0, ""))
    if not line:
        raise InputError(f"{where} has no rows of counts")
    separator = next((mark for mark in "\t,;" if mark in line), r"\s+" if re.search(r"\S\s+\S", line) else ",")
    cells = _cells(line, separator)
    width = len(cells)
    return number, cells[: -1 if width > 1 and not cells[-1] else width], separator, width


def _cells(text: str, separator: str) -> list[str]:
    mark, text = (" ", text.strip()) if separator == r"\s+" else (separator, text)
    return [cell.strip() for cell in next(csv.reader([text], delimiter=mark, skipinitialspace=True), [])]


def _marks(cells: Iterable[str]) -> set[str]:
    """What stands in cells beside the digits of their numbers, zeros aside: a percent sign, commas, or nothing ('')."""
    found = {mark for cell in cells for mark in "%," if mark in str(cell)}
    return found | ({""} if any("%" not in str(cell) and number_of(cell) for cell in cells) else set())


def _chunks(file: IO[bytes], width: int, separator: str) -> Iterable[pd.DataFrame]:
    """The rows that follow, some at a time."""
    options: dict[str, Any] = {"header": None, "names": range(width), "index_col": False}
    options |= {"sep": separator, "comment": "#", "skipinitialspace": True}
    with pd.read_csv(file, chunksize=max(1, 2**20 // width), **options) as chunks:
        yield from chunks


def _value(cell: str, role: str) -> float | None:
    """The number of a cell, or of the layer or expert that it names: layer_3, model.layers.3.mlp, expert_5."""
    number = number_of(cell)
    named = {"layer": layer_of_key, "expert": _expert_of_key}.get(role)
    return named(cell) if number is None and named else number


def _name_fault(path: Path, where: str, first: int, width: int, wanted: dict[int, str], separator: str) -> None:
    """Raise the error that names the first line after `first` that is not a row of `width` numbers; none where each is.
    `wanted`: the columns that are read, and their roles.
    """
    with open_stream(path, where) as file:
        for number, line in numbered_lines(file, where):
            if number <= first or line.isspace() or line.startswith(b"#"):
                continue
            cells = _cells(line.decode("utf-8-sig", "replace").strip("\r\n"), separator)
            bad = [cells[i] for i, role in wanted.items() if i < len(cells) and _value(cells[i], role) is None]
            if bad:
                raise InputError(f"{where}, line {number}: '{shown(bad[0])}' is not a number")
            if any(abs(number_of(cell) or 0) > 2**63 for cell in cells):
                raise InputError(f"{where}, line {number}: counts above 2**53")
            if len(cells) != width:
                raise InputError(f"{where}, line {number}: {len(cells)} columns where the first line has {width}")


def column_role(name: str) -> str | None:
    """What a column holds by its name: a role, an expert by its number, '' for what only describes the others; None: unknown."""
    name = re.sub(r"[ .\-]+", "_", str(name).lower())
    role = next((role for role, pattern in ROLES.items() if re.fullmatch(pattern, name)), None)
    if role is None and (expert := _expert_of_key(name)) is not None:
        return str(expert)
    return "" if role is None and _BESIDE.fullmatch(name) else role


def _header(cells: list[str], here: str) -> tuple[list[str] | None, list[str]]:
    """What each column holds by a first line, None where that is a row of numbers already; and notes."""
    numbers = [number_of(cell) for cell in cells]
    for first in (0, 1):
        if numbers == list(range(first, first + len(cells))) and len(cells) > 1 + first:
            note = f"its first line, {first} to {first + len(cells) - 1}, numbers the experts"
            return [str(first + place) for place in range(len(cells))], [note]
    if None not in numbers:
        return None, []
    names, notes = _names(cells, here), []
    if names[0] == "layer" and column_role(cells[0]) is None:
        notes.append("its first column, which has no name, is taken for the layer")
    beside = [cell for cell, name in zip(cells, names, strict=True) if cell and not name]
    return names, notes + ([f"columns that are not read: {shown(', '.join(beside))}"] if beside else [])


def _names(cells: list[str], here: str) -> list[str]:
    """What each column holds; what only describes the others needs a layer's column beside it."""
    names = [column_role(cell) for cell in cells]
    of_layer = [None if number_of(cell) is not None else layer_of_key(cell) for cell in cells]
    names = [name if layer is None else f"{_LAYER}{layer}" for name, layer in zip(names, of_layer, strict=True)]
    is_told = "layer" in names or any(layer is not None for layer in of_layer)
    if names[0] is None and cells[0].lower() in ("", "unnamed: 0", "index"):
        names[0] = "" if "layer" in names else "expert" if is_told else "layer"
        is_told = True
    odd = [cell for cell, name in zip(cells, names, strict=True) if name is None or not (name or is_told)]
    if odd:
        raise InputError(
            f"{here}: '{shown(odd[0])}' is not known: neither counts nor a name for each column ({_COLUMNS})"
        )
    found = [name for name in names if name is not None]
    _check_columns(found, here)
    return found


def _check_columns(names: list[str], here: str) -> None:
    """Refuse columns that make no table together."""
    for name, n in Counter(names).items():
        if n > 1 and name:
            told = "an expert has two columns" if name.isdigit() else f"{n} columns name a {name}"
            raise InputError(f"{here}: {told}: {shown(','.join(names))}")
    by_expert, by_layer = any(name.isdigit() for name in names), any(name.startswith(_LAYER) for name in names)
    if by_layer and (by_expert or {"layer", "count"} & set(names)):
        raise InputError(f"{here}: a column for each layer goes with a row for each expert, and no other counts")
    if not by_expert and not by_layer and "expert" not in names and "count" not in names:
        raise InputError(f"{here}: no column is an expert ({_COLUMNS})")
    needed = {
        "step": ["layer"],
        "rank": ["layer"],
        "expert": [] if by_layer else ["layer", "count"],
        "count": ["expert"],
    }
    for role, others in needed.items():
        lacking = [other for other in others if role in names and other not in names]
        if lacking:
            raise InputError(f"{here}: a column '{role}' needs a column '{lacking[0]}' beside it")
    if by_expert and "expert" in names:
        raise InputError(f"{here}: columns 'expert' and 'count' do not go with a column for each expert")


def _table_of_columns(table: np.ndarray, names: list[str] | None, where: str, kind: str) -> CountTable:
    """Counts of a table [rows, columns] of numbers whose columns have these roles."""
    if names is None:
        width = table.shape[1]
        if width in (3, 4) and (n_keys := _keys_of_rows(table)):
            if width == 4:
                raise InputError(
                    f"{where}: 4 columns without names, of which {n_keys} number its rows: name them ({_COLUMNS})"
                )
            found = _table_of_columns(table, ["layer", "expert", "count"], where, kind)
            found.notes.append("its three columns, which have no names, are taken for layer, expert and count")
            return found
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
    if not np.isfinite(keys.get("step", np.zeros(1))).all():
        raise InputError(f"{where}: steps must be numbers")
    layer = _ids(keys.get("layer", np.arange(len(table))), "layers", where)[:, None]
    step, is_long, notes = keys.get("step", np.zeros(len(table)))[:, None], "expert" in keys, []
    columns = [place for place, name in enumerate(names) if name.startswith(_LAYER)]
    if columns:
        layer, is_long = np.array([int(names[place].removeprefix(_LAYER)) for place in columns]), True
        expert, values = _ids(keys.get("expert", np.arange(len(table))), "experts", where)[:, None], table[:, columns]
    elif is_long:
        expert, values = _ids(keys["expert"], "experts", where)[:, None], keys["count"][:, None]
    else:
        columns = [place for place, name in enumerate(names) if name.isdigit()]
        expert, values = np.array([int(names[place]) for place in columns]), table[:, columns]
    counts, steps, layers = tabulate([(step, layer, expert, values)], where)
    n_rows, _, _ = tabulate([(step, layer, expert, np.ones(values.shape))], where)
    if is_long:
        form = "a row per expert, a column per layer" if columns else "a row per layer and expert"
        form = f"a {kind} table of loads: {form}{' of a step' if 'step' in keys else ''}"
        n_repeated = int((n_rows - 1).clip(0).sum())
        notes += [f"{n_repeated} rows repeat a layer and expert: they are added up"] if n_repeated else []
    else:
        form = f"a {kind} table of loads: a row per layer{' and step' if 'step' in keys else ''}, a column per expert"
        if (n_rows[..., expert] != 1).any():
            raise InputError(
                f"{where}: {len(table)} rows are not one for each of {len(layers)} layers in {len(steps)} steps"
            )
        missing = counts.shape[2] - len(expert)
        told = f"{missing} experts below {expert.max()} have no column: they are taken to have no load"
        notes += [told] if missing else []
    found = CountTable(_whole(counts if "step" in keys else counts[0]), form, is_open=is_long, notes=notes)
    found.layer_ids = layers if "layer" in keys or columns else None
    found.steps = steps if "step" in keys else None
    return found


def _keys_of_rows(table: np.ndarray) -> int:
    """How many columns before the counts tell a row of a table without names: 2 (layer and expert) or 3, where they are whole
    numbers that come together once each, and make up most of a grid; else 0.
    """
    for n_keys in range(2, min(table.shape[1], 4)):
        keys = table[:, :n_keys]
        sizes = [np.unique(column).size for column in keys.T]
        is_grid = max(sizes[:-1]) < len(table) >= np.prod(sizes) / 2 and sizes[-1] > 2
        if is_grid and ((keys >= 0) & (np.floor(keys) == keys)).all() and len(np.unique(keys, axis=0)) == len(table):
            return n_keys
    return 0


def _ids(values: np.ndarray, what: str, where: str) -> np.ndarray:
    if not ((values >= 0) & (values < 2**31) & (np.floor(values) == values)).all():
        raise InputError(f"{where}: {what} must be whole numbers from 0 on")
    return values.astype(np.int64)


def _whole(counts: np.ndarray) -> np.ndarray:
    """Counts as int64 where all are whole numbers that float64 holds exactly."""
    is_whole = (counts == np.floor(counts)).all() and np.abs(counts).max(initial=0) < 2**53  # False for NaN
    return counts.astype(np.int64) if is_whole else counts


def number_of(cell: Any) -> float | None:
    """The number of a cell, also `12.5%` or `1,234`; None where it is none."""
    text = str(cell).strip().removesuffix("%")
    text = text.replace(",", "") if _THOUSANDS.fullmatch(text) else text
    try:
        return float(text) if text.isascii() and "_" not in text else None
    except ValueError:
        return None


def table_of_json(held: Any, where: str) -> CountTable | None:
    """Counts of parsed JSON; None where it is no table of counts.

    {layer: [count of each expert]} or {layer: {expert: count}}, null for a dense layer; a list [layers][experts] or
    [steps][layers][experts], also under one of COUNT_NAMES; objects whose keys name the columns of a table, or a list of them;
    a list of steps, each in one of these forms.
    """
    if isinstance(held, dict) and not _is_row(held):
        return _named_table(held, where) or _table_of_layers(held, where)
    held = [held] if isinstance(held, dict) else held
    if not isinstance(held, list) or not held:
        return None
    if all(isinstance(row, dict) and row for row in held):
        return _table_of_rows(held, where) if all(map(_is_row, held)) else _steps(held, where)
    if depth_of(held) == 2 or (depth_of(held) == 3 and _are_steps(held)):
        steps = "[steps]" if depth_of(held) == 3 else ""
        return CountTable(_regular(held, where), f"a JSON list of loads {steps}[layers][experts]")
    return None


def _are_steps(held: list[Any]) -> bool:
    """Whether a list [][][] is of counts [steps][layers][experts], and not a request's ids [tokens][layers][top_k]."""
    try:
        array = np.asarray(held)
    except (ValueError, OverflowError):
        return False
    return array.ndim == 3 and (array.dtype.kind == "f" or (array.dtype.kind in "iu" and are_counts(array)))


def _named_table(held: dict[str, Any], where: str) -> CountTable | None:
    """Counts under a known name of an object, and perhaps beside them the layers' ids, or a map of physical experts."""
    name = next((name for name in (*COUNT_NAMES, *PHYSICAL_NAMES) if isinstance(held.get(name), list | dict)), None)
    if name is None:
        inner = next((held[key] for key in _AROUND if key in held), None)
        is_table = isinstance(inner, dict) or (isinstance(inner, list) and all(isinstance(row, dict) for row in inner))
        return table_of_json(inner, where) if is_table else None
    inner = held[name]
    if depth_of(inner) not in (2, 3):
        return table_of_json(inner, where)
    slots = next((held[key] for key in MAP_NAMES if isinstance(held.get(key), list)), None)
    counts = logical_counts(name, _regular(inner, where), None if slots is None else _regular(slots, where), where)
    ids = held.get("layer_ids", held.get("layers"))
    is_told = isinstance(ids, list) and len(ids) == counts.shape[-2] and set(map(type, ids)) == {int}
    form = f"JSON with counts under '{name}'{'' if is_told or not isinstance(ids, list) else '; not read: its layers'}"
    return CountTable(counts, form, _ids(np.array(ids, float), "layers", where) if is_told else None)


def _is_row(held: dict[str, Any]) -> bool:
    """Whether the keys of an object of JSON name the columns of a table, with one layer: a number, or a name that has it."""
    of_column = {column_role(key): value for key, value in held.items()}
    is_one = type(of_column.get("layer")) in (int, float) or layer_of_key(of_column.get("layer", "")) is not None
    return is_one and depth_of(of_column.get("count")) < 2 and None not in of_column


def _table_of_rows(held: list[Any], where: str) -> CountTable | None:
    """Counts of objects whose keys name the columns of a table; a list stands for a column of each expert."""
    keys = [key for key in held[0] if column_role(key)]
    if any([key for key in row if column_role(key)] != keys for row in held):
        return None
    names: list[str] = []
    for key in keys:
        is_list = column_role(key) == "count" and isinstance(held[0][key], list)
        names += map(str, range(len(held[0][key]))) if is_list else [column_role(key) or ""]
    _check_columns(names, where)
    of_layer = next(key for key in keys if column_role(key) == "layer")
    held = [row | {of_layer: layer_of_key(row[of_layer])} if isinstance(row[of_layer], str) else row for row in held]
    rows = [[cell for key in keys for cell in (row[key] if isinstance(row[key], list) else [row[key]])] for row in held]
    table = _regular(rows, where)
    if table.shape[1] != len(names):
        raise InputError(f"{where}: a list of counts stands where a number should")
    found = _table_of_columns(table.astype(float), names, where, "JSON")
    beside = [key for key in held[0] if not column_role(key)]
    found.notes += [f"keys that are not read: {shown(', '.join(beside))}"] if beside else []
    return found


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


def _table_of_layers(held: dict[str, Any], where: str) -> CountTable | None:
    """Counts of {layer: [count of each expert]} or {layer: {expert: count}}; a layer may have them under a known name."""
    of_layer = {layer_of_key(key): row for key, row in held.items() if row not in (None, [], {})}
    if not of_layer or None in map(layer_of_key, held):
        return None
    if len(of_layer) < sum(row not in (None, [], {}) for row in held.values()):
        raise InputError(f"{where}: a layer stands there twice")
    rows = list(of_layer.values())
    if all(isinstance(row, dict) for row in rows):  # {layer: {expert_counts: ..., and what describes them}}
        rows = [next((row[name] for name in COUNT_NAMES if name in row), row) for row in rows]
    if all(isinstance(row, list) and row and depth_of(row) == 1 for row in rows):
        form = "JSON {layer: [count of each expert]}"
        table = np.column_stack([np.array(list(of_layer), int), _regular(rows, where)])
        names = ["layer", *map(str, range(table.shape[1] - 1))]
    elif all(isinstance(row, dict) and row for row in rows):
        form, names = "JSON {layer: {expert: count}}", ["layer", "expert", "count"]
        of_row = zip(of_layer, rows, strict=True)
        cells = [[layer, _expert_of_key(key), n] for layer, row in of_row for key, n in row.items()]
        if any(cell[1] is None for cell in cells):
            return None
        table = _regular(cells, where)
    else:
        return None
    found = _table_of_columns(table.astype(float), names, where, "JSON")
    found.form = form
    return found


def _steps(held: list[Any], where: str) -> CountTable | None:
    """Counts of a list of steps, each a table of its own, as {layer: [count of each expert]}; None where it is none."""
    first = table_of_json(held[0], where)
    if first is None:
        return None
    tables = [table for table in (table_of_json(step, where) for step in held) if table is not None]
    if len(tables) < len(held):
        raise InputError(f"{where}: of its {len(held)} steps {len(held) - len(tables)} have no counts")
    layers = np.arange(len(first.counts))
    kinds = {
        (t.counts.shape[:-1] if t.is_open else t.counts.shape, t.layer_ids is not None and t.layer_ids.tobytes())
        for t in tables
    }
    if len(kinds) > 1 or first.counts.ndim != 2:
        raise InputError(f"{where}: its steps differ in their layers or experts")
    entries = [(i, layers[:, None], np.arange(table.counts.shape[1]), table.counts) for i, table in enumerate(tables)]
    form = f"a JSON list of steps, each {first.form.removeprefix('JSON ')}"
    return CountTable(tabulate(entries, where)[0], form, first.layer_ids, is_open=first.is_open)


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
