"""Experts of tokens as loggers write them: a row for each token and layer with the list of its experts, or a row for each pair.

JSON lines of the MoE loggers for vLLM, with or without their line of metadata ahead; tables in CSV.
"""

import csv
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from sim.errors import InputError, shown
from sim.files import numbered_lines, open_stream, reading
from sim.traffic.answers import TOKEN_NAMES, Requests
from sim.traffic.arrays import narrow_ids
from sim.traffic.counts import MOST_TOP_K
from sim.traffic.tables import ROLES, depth_of, first_row, layer_of_key, number_of

_NUMBER = r"(_?(id|idx|index|pos(ition)?|num|number|no))?"
_ROLES = {role: ROLES[role] for role in ("layer", "rank", "count")} | {
    "token": rf"tok(en)?{_NUMBER}|position|pos",
    "request": rf"(request|req|seq(uence)?|prompt|sample|conversation){_NUMBER}|rid",
    "step": ROLES["step"] + "|batch(_?(id|idx|index))?",
    "list": "|".join(TOKEN_NAMES) + r"|(top_?k|selected|chosen)_(experts?|ids|indices)|experts?_(ids|indices|list)",
    "expert": ROLES["expert"],
}
"""What a column of a table of tokens holds, by its name in lower case."""
_TOLD = "a row of tokens has 'layer', 'token' and 'expert' or 'topk_ids', and may have 'request' and 'step'"
_LIST = re.compile(r"[\s\[(]*(\d+|-1)(?:[\s,;|/]+(?:\d+|-1))*[\s\])]*")
_ONE = re.compile(r"\s*-?\d{1,18}\s*")
_MOST_ROWS = 2**26
_ROWS = 2**16  # at a time


def roles_of(names: Iterable[Any]) -> dict[Any, str] | None:
    """Of the columns of a table of tokens each one's role by its name; None where it is none. Of several columns of a role an
    index or position counts, then an id: a token's text may stand beside.
    """
    found: dict[str, tuple[int, Any]] = {}
    for name in names:
        plain = re.sub(r"[ .\-]+", "_", str(name).lower())
        role = next((role for role, pattern in _ROLES.items() if re.fullmatch(pattern, plain)), None)
        place = next(i for i, part in enumerate(("idx|index|pos|num", "id", "")) if re.search(part, plain))
        if role and place < found.get(role, (9, ""))[0]:
            found[role] = place, name
    if "count" in found or "layer" not in found or not ("list" in found or {"token", "expert"} <= set(found)):
        return None
    found["expert"] = found.pop("list") if "list" in found else found["expert"]
    return {name: role for role, (_, name) in found.items()}


def roles_of_json(held: Any) -> dict[Any, str] | None:
    """`roles_of` the keys of an object of JSON, where its experts are a token's, or of the tokens of one layer."""
    roles = roles_of(held) if isinstance(held, dict) else None
    experts = [held[key] for key, role in (roles or {}).items() if role == "expert"]
    return roles if roles and all(depth_of(x) < 3 and not isinstance(x, str | dict) for x in experts) else None


def add_csv(path: Path, where: str, requests: Requests) -> Requests | None:
    """Take the tokens of a CSV file whose first line names the columns of a table of tokens; None where it does not."""
    with reading(where, "CSV"), open_stream(path, where) as file:
        number, cells, separator, _ = first_row(file, where)
        roles = roles_of(cells)
        if roles is None:
            return None
        rows = _rows_of_csv(file, cells, separator, where, number)
        places = [cells.index(name) for name in roles]
        return _add_rows(requests, map(itemgetter(*places), rows), roles, cells, where)


def _rows_of_csv(file: Any, cells: list[str], separator: str, where: str, first: int) -> Iterator[list[str]]:
    """Rows of as many cells; of a list that is not quoted, in the last column, the cells behind belong to it."""
    lines, n = (line.decode("utf-8-sig") for _, line in numbered_lines(file, where)), len(cells)
    reader = csv.reader(lines, delimiter=separator if len(separator) == 1 else " ", skipinitialspace=True)
    for row in reader:
        if not any(row) or row[0].startswith("#"):
            continue
        if len(row) < n:
            raise InputError(
                f"{where}, line {first + reader.line_num}: {len(row)} columns where the first line has {n}"
            )
        yield row if len(row) == n else [*row[: n - 1], ",".join(filter(None, row[n - 1 :]))]


def add_json(
    requests: Requests, rows: Iterable[tuple[Any, str]], roles: dict[Any, str], names: Iterable[str], where: str
) -> Requests:
    """Take the tokens of objects of JSON, each with where it stands, whose keys have these roles."""

    def cells() -> Iterator[tuple[Any, ...]]:
        for row, here in rows:
            try:
                yield tuple([row[key] for key in roles])
            except (KeyError, TypeError):
                raise InputError(f"{here}: its keys are not those of the first row, {', '.join(roles)}") from None

    return _add_rows(requests, cells(), roles, names, where)


def _add_rows(
    requests: Requests, rows: Iterator[tuple[Any, ...]], roles: dict[Any, str], names: Iterable[Any], where: str
) -> Requests:
    """Take the tokens of rows whose cells have these roles.

    Tokens are told apart by request, step and number; where numbers lack, or start again and do so alike in all layers, by
    their order in the file. Without requests all are one sequence. The last tokens of a request may be cut off. Raises InputError
    for rows of several ranks, and for a token that stands twice, or lacks experts that others have.
    """
    parts: list[list[np.ndarray]] = []
    while some := list(islice(rows, _ROWS)):
        parts.append([_packed(column) for column in zip(*some, strict=True)])
        if len(parts) * _ROWS > _MOST_ROWS:
            raise InputError(f"{where} holds more than {_MOST_ROWS} rows; keep a part of it")
    if not parts:
        raise InputError(f"{where} holds no tokens")
    columns = dict(zip(roles.values(), map(np.concatenate, zip(*parts, strict=True)), strict=True))
    key_of = {role: f"{where}: {key}" for key, role in roles.items()}
    cells = columns.pop("expert")
    is_single = cells.dtype != object or all(type(cell) is int or _ONE.fullmatch(str(cell)) for cell in cells)
    is_pair = is_single and "token" in columns
    if is_single:
        experts, widths = cells.astype(np.int64), np.ones(len(cells), np.int64)
    else:
        held = [_experts(cell, f"{key_of['expert']} of row {row}") for row, cell in enumerate(cells, 1)]
        n_tokens = [len(of_row) for of_row in held]
        columns = {role: np.repeat(column, n_tokens) for role, column in columns.items()}
        widths = np.array([len(ids) for of_row in held for ids in of_row])
        experts = np.array([expert for of_row in held for ids in of_row for expert in ids])
    codes = {role: _coded(column, role, key_of[role]) for role, column in columns.items()}
    if "rank" in codes and len(codes["rank"][1]) > 1:
        raise InputError(
            f"{where}: rows of {len(codes['rank'][1])} ranks, which may have the same tokens: keep those of one (or, where they "
            "are places in a token's top k, name the column otherwise)"
        )
    tokens, lengths, layers = _tokens(narrow_ids(experts, where), widths, codes, is_pair, f"{where}: ")
    if requests.layer_ids not in (None, layers):
        raise InputError(f"{where} has other layers than the files before it: mixed models in one folder?")
    requests.layer_ids = layers
    requests.add(tokens, where, lengths=lengths)
    others = [str(name) for name in names if name not in roles]
    requests.form = (
        f"rows of tokens, {'a pair' if is_pair else 'a list of experts'} each"
        + ("" if "request" in codes else ": one sequence, for no column tells requests")
        + (f"; not read: {shown(', '.join(others))}" if others else "")
    )
    return requests


def _packed(column: tuple[Any, ...]) -> np.ndarray:
    """A column of whole numbers from 0 on as int64, any other as objects."""
    kinds = set(map(type, column))
    if kinds == {int} or (kinds == {str} and all(map(str.isdecimal, column)) and max(map(len, column)) < 18):
        with suppress(OverflowError):
            return np.array(column, np.int64)
    packed = np.empty(len(column), object)
    packed[:] = column
    return packed


def _experts(cell: Any, here: str) -> list[list[int]]:
    """The experts of each token of a cell: a number, a list, a list of lists, or text of a list."""
    if isinstance(cell, str) and _LIST.fullmatch(cell):
        return [[int(number) for number in re.findall(r"-?\d+", cell)]]
    held = cell if isinstance(cell, list) else [cell]
    held = held if held and isinstance(held[0], list) else [held]
    if any(not isinstance(ids, list) or not ids or set(map(type, ids)) != {int} for ids in held):
        raise InputError(f"{here} must be whole numbers, or a list of them, not {shown(cell)}")
    return held


def _coded(cells: np.ndarray, role: str, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Cells as places, and what stands there: requests in the order of the file, all else by number."""
    codes, values = pd.factorize(cells if cells.dtype != object else pd.Series(cells).map(str))
    if role in ("request", "rank"):
        return codes, values
    numbers = [layer_of_key(x) if role == "layer" else number_of(x) for x in values]
    odd = [x for x, n in zip(values, numbers, strict=True) if n is None or not 0 <= n < 2**53 or n % 1]
    if odd:
        raise InputError(f"{what} must be whole numbers from 0 on, found {shown(odd[0])}")
    ordered, places = np.unique(np.array(numbers, float), return_inverse=True)
    return places[codes], ordered


def _tokens(
    experts: np.ndarray, widths: np.ndarray, codes: dict[str, tuple[np.ndarray, np.ndarray]], is_pair: bool, here: str
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Ids int16 [tokens, layers, top_k], lengths of the sequences, and the layers, of rows with so many experts each."""
    n_rows, (layer, layers) = len(widths), codes["layer"]
    none = np.zeros(n_rows, np.int64)
    request, step = (codes[role][0] if role in codes else none for role in ("request", "step"))
    group = pd.factorize(request * (step.max() + 1) + step, sort=True)[0]
    at = np.zeros(n_rows, np.int64)
    in_layer = group * len(layers) + layer
    token = codes["token"][0] if "token" in codes else None
    if not is_pair:
        at = pd.Series(in_layer).groupby(in_layer).cumcount().to_numpy()
        if token is not None and len(np.unique(in_layer * (token.max() + 1) + token)) < n_rows:
            number = codes["token"][1][token]
            of_place = pd.DataFrame({"g": group, "at": at, "n": number}).groupby(["g", "at"]).n
            if (of_place.transform("min") != number).any():
                raise InputError(f"{here}a token stands twice in one layer; {_TOLD}")
            token = None  # its numbers start again, alike in all layers
    token = at if token is None else token
    _, token = np.unique(group * (token.max() + 1) + token, return_inverse=True)
    cell = token * len(layers) + layer
    if is_pair and np.count_nonzero(np.diff(cell)) + 1 > len(np.unique(cell)):
        raise InputError(f"{here}the rows of a token and layer do not stand together; {_TOLD}")
    if np.bincount(cell, widths).max() > MOST_TOP_K:
        raise InputError(f"{here}a token has more than {MOST_TOP_K} experts in a layer; {_TOLD}")
    cells = np.repeat(cell, widths)
    order = np.argsort(cells, kind="stable")
    experts, cells = experts[order], cells[order]
    n_tokens, held = int(token.max()) + 1, np.bincount(cells)
    top_k, of_token = int(held.max()), np.zeros(n_tokens, np.int64)
    of_token[token] = request
    n_held, wanted = np.bincount(token, widths, minlength=n_tokens), top_k * len(layers)
    cut = np.append(n_held < wanted, True)  # a cut file lacks the last of a request
    if 2 * cut.sum() > n_tokens + 2 or (cut[:-1] & ~cut[1:] & (of_token == np.append(of_token[1:], -1))).any():
        raise InputError(
            f"{here}token {cut.argmax()} has {n_held[cut.argmax()]:.0f} experts, where others have {top_k} in each of "
            f"{len(layers)} layers; {_TOLD}"
        )
    ids = np.full((n_tokens * len(layers), top_k), -1, np.int16)
    ids[cells, np.arange(len(cells)) - (np.cumsum(held) - held)[cells]] = experts
    return ids.reshape(n_tokens, len(layers), top_k), np.bincount(of_token), [int(x) for x in layers]
