"""The one shape of YAML that TensorRT-LLM's load balancer files have, read strictly: no tags, anchors or nested maps."""

import re
from collections.abc import Iterator
from typing import Any

from sim.errors import InputError, shown

_KEY = re.compile(r"^(?P<indent> *)(?P<quote>['\"]?)(?P<key>\w+)(?P=quote) *:(?: +(?P<value>.*)|)$")
_ITEM = re.compile(r"^ *- +(?P<value>\S+)$")
_MOST_LAYERS = 4096


def read_assignments(text: str, where: str) -> dict[int, list[Any]]:
    """`initial_global_assignments` of a load balancer file: layer id to the expert of each slot.

    Lists may be flow lists, over several lines too, or block lists of `- expert`. Raises InputError for anything else, and
    where `num_slots` is not the length of each list.
    """
    layers: dict[int, list[Any]] = {}
    n_slots, section, row = None, "", None
    for number, line in _logical_lines(text, where):
        at = f"{where}, line {number}"
        if (item := _ITEM.match(line)) and row is not None:
            row.append(_whole(item["value"], at))
            continue
        found = _KEY.match(line)
        if not found:
            raise InputError(f"{at}: expected 'key: value' or a list of experts, not {shown(line.strip())}")
        key, value = found["key"], (found["value"] or "").strip()
        if found["indent"]:
            layer = _whole(key, at)
            if section != "initial_global_assignments" or layer in layers or len(layers) >= _MOST_LAYERS:
                raise InputError(f"{at}: layer {layer} is out of place, there twice, or beyond {_MOST_LAYERS} layers")
            row = layers[layer] = _flow_list(value, at) if value else []
            continue
        section, row = key, None
        if key == "num_slots":
            n_slots = _whole(value, at)
        elif value and key == "initial_global_assignments":
            raise InputError(f"{at}: expected a line 'layer: [experts]' for each layer below {key}")
    if n_slots is None:
        raise InputError(f"{where} has no num_slots")
    wrong = [layer for layer, experts in layers.items() if len(experts) != n_slots]
    if not layers or wrong:
        raise InputError(
            f"{where}: every layer of initial_global_assignments must have num_slots = {n_slots} slots"
            + (f"; layer {wrong[0]} has {len(layers[wrong[0]])}" if wrong else "; there is none")
        )
    return layers


def _logical_lines(text: str, where: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without comments and blank ones; a flow list that goes on is one line."""
    held: list[str] = []
    first = n_open = 0
    for number, line in enumerate(text.splitlines(), 1):
        line = line.partition("#")[0].rstrip()
        if not held and line.strip() in ("", "---", "..."):
            continue
        first = first if held else number
        held.append(line.strip() if held else line)
        n_open += line.count("[") - line.count("]")
        if n_open <= 0:
            yield first, " ".join(held)
            held, n_open = [], 0
    if held:
        raise InputError(f"{where}, line {first}: a list is not closed")


def _flow_list(text: str, at: str) -> list[Any]:
    if not (text.startswith("[") and text.endswith("]")):
        raise InputError(f"{at}: expected a list of experts, not {shown(text)}")
    inside = text[1:-1].strip().removesuffix(",")
    return [_whole(part.strip(), at) for part in inside.split(",")]


def _whole(text: str, at: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InputError(f"{at}: expected a whole number, not {shown(text)}")
    return int(text)
