"""Placement files of serving engines, read and written: one expert per slot, slots dealt to EP ranks in order.

vllm
    JSON with `physical_to_logical_map` [layers, slots], the layout of vLLM's EPLB state.
sglang
    The same and no other key: `--init-expert-location FILE.json`.
trtllm
    The load balancer's YAML: `num_slots`, `initial_global_assignments` (layer: expert of each slot) and
    `layer_updates_per_iter` (0: static).
vllm-ascend
    The expert map's JSON: `moe_layer_count` and `layer_list` of `layer_id`, `device_count` and `device_list` of `device_id`
    and `device_expert`.

And a form of its own, read only: a JSON list with the rank of each expert, or a list of such lists, one per layer.
Layers are read in the order of their ids; where these begin is up to the model (DeepSeek-V3's first MoE layer is 3).
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError, shown
from sim.files import parse_json, read_text
from sim.placement.placement import Placement
from sim.placement.trtllm import read_assignments

FORMATS = ("vllm", "sglang", "trtllm", "vllm-ascend")
"""Formats that `placement_text` writes."""
_MOST_SLOTS = 2**15  # experts are int16, and beyond a copy of each for each no model goes


def read_placement(path: Path, n_experts: int, ep_size: int) -> Placement:
    """A placement file of any format, told apart by content, of a model with `n_experts` on `ep_size` ranks.

    Raises
    ------
    InputError
        The file is missing, damaged or too large; a layer differs in width, lacks an expert, or has one that the model has
        not; slots do not divide by the ranks.
    """
    where, name = f"placement file {path}", f"file:{path}"
    text = read_text(path, where)
    if "initial_global_assignments" in text and not text.lstrip().startswith("{"):
        return _from_map(read_assignments(text, where), name, n_experts, ep_size, where)
    content = parse_json(text, where)
    if isinstance(content, dict) and "physical_to_logical_map" in content:
        rows = content["physical_to_logical_map"]
        if not isinstance(rows, list) or not rows:
            raise InputError(f"{where}: physical_to_logical_map must be a list of layers, each a list of experts")
        return _from_map(dict(enumerate(rows)), name, n_experts, ep_size, where)
    if isinstance(content, dict) and "layer_list" in content:
        return _from_map(_ascend_layers(content, ep_size, where), name, n_experts, ep_size, where)
    if not isinstance(content, list) or not content:
        raise InputError(
            f"{where} must be a list with the rank of each expert, or of such lists, one per layer; or have "
            "physical_to_logical_map (vLLM, SGLang), initial_global_assignments (TensorRT-LLM) or layer_list (vllm-ascend)"
        )
    return Placement.of_ranks(name, ep_size, _ranks(content, n_experts, ep_size, where))


def placement_text(placement: Placement, form: str, ep_size: int, first_layer: int = 0) -> str:
    """The text of a placement file.

    Parameters
    ----------
    placement : Placement
        All layers, with equal numbers of slots on each rank.
    form : str
        One of FORMATS.
    ep_size : int
    first_layer : int
        Id of the first layer, in the formats that name layers (trtllm, vllm-ascend).

    Raises
    ------
    InputError
        Ranks hold different numbers of slots, which none of these formats can say.
    """
    held = np.array([np.bincount(row, minlength=ep_size) for row in placement.ranks])
    per_rank = int(held.min())
    if held.max() > per_rank:
        raise InputError(
            f"--format {form} deals slots to ranks in equal numbers; here ranks hold from {per_rank} to {held.max()}"
        )
    layers = placement.experts.tolist()
    rows = [json.dumps(row) for row in layers]
    if form in ("vllm", "sglang"):
        return '{"physical_to_logical_map": [\n' + ",\n".join(rows) + "\n]}\n"
    if form == "trtllm":
        lines = [f"  {first_layer + i}: {row}" for i, row in enumerate(rows)]
        head = f"num_slots: {placement.n_slots}\ninitial_global_assignments:\n"
        return head + "\n".join(lines) + "\nlayer_updates_per_iter: 0\n"
    layer_list = [
        {
            "layer_id": first_layer + i,
            "device_count": ep_size,
            "device_list": [
                {"device_id": rank, "device_expert": row[rank * per_rank : (rank + 1) * per_rank]}
                for rank in range(ep_size)
            ],
        }
        for i, row in enumerate(layers)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layer_list}, indent=1) + "\n"


def _from_map(layers: dict[int, Any], name: str, n_experts: int, ep_size: int, where: str) -> Placement:
    """Slots of layers by id, each a list with the expert of each slot."""
    width = None
    for layer, row in layers.items():
        at = f"{where}, layer {layer}"
        _check_ids(row, n_experts, f"{at}: slot", "an expert", at)
        width = len(row) if width is None else width
        if len(row) != width:
            raise InputError(f"{at} has {len(row)} slots, the first layer has {width}")
        if len(row) % ep_size or not n_experts <= len(row) <= n_experts + _MOST_SLOTS:
            raise InputError(
                f"{at}: its {len(row)} slots must be from the model's {n_experts} experts to {n_experts + _MOST_SLOTS}, and "
                f"divide by --ep {ep_size}"
            )
        missing = set(range(n_experts)) - set(row)
        if missing:
            raise InputError(f"{at}: expert {min(missing)} of the model's {n_experts} has no slot")
    experts = np.array([layers[layer] for layer in sorted(layers)], np.int16)
    return Placement.of_slots(name, ep_size, n_experts, experts)


def _check_ids(row: Any, n: int, one: str, what: str, at: str) -> None:
    """Refuse what is no list of whole numbers from 0 to n - 1."""
    if not isinstance(row, list):
        raise InputError(f"{at} must be a list, not {shown(row)}")
    for i, value in enumerate(row):
        if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < n:
            raise InputError(f"{one} {i} must have {what} from 0 to {n - 1}, not {shown(value)}")


def _ranks(rows: list[Any], n_experts: int, ep_size: int, where: str) -> np.ndarray:
    """Rank of each expert, int32 [layers, n_experts], of the form of its own."""
    rows = rows if isinstance(rows[0], list) else [rows]
    for layer, row in enumerate(rows):
        at = f"{where}, layer {layer}"
        if not isinstance(row, list) or len(row) != n_experts:
            found = len(row) if isinstance(row, list) else "no list"
            raise InputError(f"{at}: expected the ranks of {n_experts} experts, found {found}")
        _check_ids(row, ep_size, f"{at}: expert", "a rank", at)
        if len(set(row)) < ep_size:
            raise InputError(f"{at}: rank {min(set(range(ep_size)) - set(row))} of --ep {ep_size} holds no expert")
    return np.array(rows, np.int32)


def _ascend_layers(content: dict[str, Any], ep_size: int, where: str) -> dict[int, list[Any]]:
    """Experts of the slots of each layer of a vllm-ascend map, its devices in order."""
    rows, layers = content["layer_list"], {}
    if not isinstance(rows, list) or not rows or content.get("moe_layer_count") != len(rows):
        raise InputError(f"{where}: layer_list must have as many layers as moe_layer_count says, and at least one")
    for row in rows:
        layer = row.get("layer_id") if isinstance(row, dict) else None
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0 or layer in layers:
            raise InputError(f"{where}: each layer of layer_list needs a layer_id of its own, a whole number")
        layers[layer] = _device_experts(row, ep_size, f"{where}, layer {layer}")
    return layers


def _device_experts(row: dict[str, Any], ep_size: int, at: str) -> list[Any]:
    """Experts of a layer's slots, device by device."""
    devices = row.get("device_list")
    devices = devices if isinstance(devices, list) and all(isinstance(device, dict) for device in devices) else []
    held = {device.get("device_id"): device.get("device_expert") for device in devices if _has_id(device)}
    whole = len(devices) == ep_size and set(held) == set(range(ep_size)) and row.get("device_count") == ep_size
    if not whole or not all(isinstance(experts, list) for experts in held.values()):
        raise InputError(
            f"{at}: must have the devices 0 to {ep_size - 1} of --ep {ep_size}, each with its device_expert"
        )
    if len({len(experts) for experts in held.values()}) > 1:
        raise InputError(f"{at}: devices hold different numbers of experts")
    return [expert for rank in range(ep_size) for expert in held[rank]]


def _has_id(device: dict[str, Any]) -> bool:
    return type(device.get("device_id")) is int
