"""Placement files of serving engines, read and written: one expert per slot, slots assigned to EP ranks in order.

Engines index the layers of a map in their own ways, and so do the files:

sglang
    JSON with `physical_to_logical_map` [num_hidden_layers, slots] and no other key: row i is decoder layer i, dense layers have
    rows that nobody reads (`ExpertLocationMetadata`, srt/eplb/expert_location.py, SGLang 0.5.23).
trtllm
    The load balancer's YAML: `num_slots`, `initial_global_assignments` (decoder layer: expert of each slot) and
    `layer_updates_per_iter` (0: static); `MoeLoadBalancerConfig.get_layer_initial_global_assignments` looks a layer up by its
    id. Without assignments slot s of rank r starts with expert (r * experts // ranks + s) % experts.
vllm-ascend
    The expert map's JSON: `moe_layer_count` and `layer_list` of `layer_id`, `device_count` and `device_list` of `device_id` and
    `device_expert`. Its loader takes MoE layer i and rank r from the i-th and r-th places of these lists, whatever their ids, and
    the distinct experts of rank 0 for the slots of each rank, so that no rank may hold an expert twice (`expert_file_to_tensor`,
    `generate_log2phy_map`, eplb/core/eplb_utils.py). Each layer reads its own number of slots (`init_eplb_config`, there): alone
    of these forms it lets layers differ.
vllm
    JSON with `physical_to_logical_map` [MoE layers, slots], the layout of vLLM's EPLB state; vLLM 0.33 reads no file.

And a form of its own, read only: a JSON list with the rank of each expert, or a list of such lists, one per layer.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np

from sim.errors import InputError, shown
from sim.files import parse_json, read_text
from sim.model import ModelSpec
from sim.model.spec import MOST_DRAFTS
from sim.placement.placement import LayerIds, Placement, decoder_layers

FORMATS = ("vllm", "sglang", "trtllm", "vllm-ascend")
"""Formats that `placement_text` writes."""
_MOST_SLOTS = 2**15  # experts are int16, and beyond a copy of each for each no model goes
_MOST_LAYERS = 4096
_YAML = re.compile(r"^(num_slots|initial_global_assignments) *:", re.MULTILINE)
_YAML_MAP = re.compile(r"\s*\{\s*[a-z_]+ *:")
_KEY = re.compile(r"^(?P<indent> *)(?P<quote>['\"]?)(?P<key>\w+)(?P=quote) *:(?: +(?P<value>.*)|)$")
_ANCHOR = re.compile(r"(?:([&*])(\w+) *)?(.*)")
_NUMBERS = ("num_slots", "ep_size", "layer_updates_per_iter")
_ITEM = re.compile(r"^ *- +(?P<value>\S+)$")


def read_placement(path: Path, model: ModelSpec, ep_size: int) -> Placement:
    """A placement file of any format, told apart by content, for the MoE layers of a model on `ep_size` ranks.

    Rows of dense layers are left out, and with a note those past the decoder (of a draft model). One row serves all layers.

    Raises InputError where the file is missing, damaged or too large; a layer differs in width, lacks an expert, or has one that
    the model has not; slots do not divide by the ranks; its layers are not the model's.
    """
    file = _File(f"placement file {path}", f"file:{path}", model, ep_size)
    content = _content(path, file.where)
    known = content if isinstance(content, dict) else {}
    if "ep_size" in known and known["ep_size"] != ep_size:
        raise InputError(f"{file.where} says ep_size {shown(known['ep_size'])}: it is no map for `ep_size` {ep_size}")
    if "num_slots" in known or "initial_global_assignments" in known:
        return _from_trtllm(known, file)
    for key in ("physical_to_logical_map", "phy2log"):
        if key in known:
            rows = known[key]
            if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
                raise InputError(f"{file.where}: {key} must be a list of layers, each a list of experts")
            rows, layer_ids, notes = file.by_place(rows)
            if layer_ids and len(known[key]) == len(layer_ids) <= max(layer_ids):
                notes += ("its rows are taken for the MoE layers in order; SGLang takes row i for decoder layer i",)
            return file.of_slots(rows, layer_ids, notes)
    if "layer_list" in known:
        return _from_ascend(known, file)
    if not isinstance(content, list) or not content:
        found = f", not {shown(', '.join(known))}" if known else ""
        raise InputError(
            f"{file.where} must be a list with the rank of each expert, or of such lists, one per layer; or have "
            "physical_to_logical_map (vLLM, SGLang), initial_global_assignments or num_slots (TensorRT-LLM) or layer_list "
            f"(vllm-ascend){found}"
        )
    is_one = not isinstance(content[0], list)
    rows, layer_ids, notes = file.by_place([content] if is_one else content)
    notes = () if is_one else notes
    if ep_size == model.n_experts:
        notes += (
            "read as the rank of each expert; a map with the expert of each slot stands under physical_to_logical_map",
        )
    return file.of_ranks(rows, layer_ids, notes)


def _content(path: Path, where: str) -> Any:
    """What a file holds, as JSON would have it."""
    if path.suffix == ".pt":  # torch.save({"physical_to_logical_map": tensor}), which SGLang loads, too
        from sim.traffic.arrays import as_array, read_pt

        content = read_pt(
            path, where, 'save the map as JSON, {"physical_to_logical_map": [[expert of each slot], ...]}'
        )
        arrays = {key: as_array(value, where) for key, value in content.items()} if isinstance(content, dict) else {}
        return {key: array.tolist() for key, array in arrays.items() if array is not None}
    text = read_text(path, where)
    if _YAML.search(text) and not text.lstrip().startswith(("{", "[")):
        return parse_assignments(text, where)
    try:
        return _flow_map(text, where) if _YAML_MAP.match(text) else parse_json(text, where)
    except InputError as error:
        raise InputError(
            f"{error}; maps are JSON, or TensorRT-LLM's YAML with num_slots at the beginning of a line"
        ) from None


def placement_text(placement: Placement, form: str, n_layers: int = 0) -> str:
    """The text of a placement file in one of FORMATS. Without `layer_ids` the rows are layers 0, 1, ... An 'sglang' map has a row
    for each of n_layers decoder layers; fewer than there are MoE layers count for nothing.

    Raises InputError where ranks hold different numbers of slots, which none of these formats can say; layers do, which only
    vllm-ascend's can; or for vllm-ascend a rank holds an expert twice.
    """
    ep_size, layers = placement.ep_size, placement.experts.tolist()
    held = np.array([np.bincount(row, minlength=ep_size) for row in placement.ranks])
    per_rank = int(held.min())
    if held.max() > per_rank:
        raise InputError(
            f"--format {form} assigns slots to ranks in equal numbers; here ranks hold from {per_rank} to {held.max()}"
        )
    slots = placement.slots_of_row
    if slots.min() < slots.max():
        if form != "vllm-ascend":
            raise InputError(
                f"--format {form} has one number of slots for all layers; here layers have from {slots.min()} to {slots.max()} "
                f"({placement.strategy}). vllm-ascend alone reads the slots of each layer by itself"
            )
        layers = [[expert for expert in row if expert >= 0] for row in layers]
    ids = placement.layer_ids or range(placement.n_rows)
    if form in ("vllm", "sglang"):
        if form == "sglang":
            start = [slot % placement.n_experts for slot in range(placement.n_slots)]  # as SGLang starts without a map
            of_layer = dict(zip(ids, layers, strict=True))
            layers = [of_layer.get(layer, start) for layer in range(max(n_layers, max(ids) + 1))]
        return '{"physical_to_logical_map": [\n' + ",\n".join(map(json.dumps, layers)) + "\n]}\n"
    if form == "trtllm":
        lines = [f"  {layer}: {json.dumps(row)}" for layer, row in zip(ids, layers, strict=True)]
        head = f"num_slots: {placement.n_slots}\ninitial_global_assignments:\n"
        return head + "\n".join(lines) + "\nlayer_updates_per_iter: 0\n"
    if placement.idle_copies.any():
        layer = ids[int(placement.idle_copies.argmax())]
        raise InputError(
            f"--format {form}: a rank holds an expert twice (layer {layer}); vllm-ascend counts distinct experts as slots, and "
            "would send the tokens of all later slots to wrong ones"
        )
    layer_list = [
        {
            "layer_id": layer,
            "device_count": ep_size,
            "device_list": [
                {"device_id": rank, "device_expert": experts}
                for rank, experts in enumerate(np.reshape(row, (ep_size, -1)).tolist())
            ],
        }
        for layer, row in zip(ids, layers, strict=True)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layer_list}, indent=1) + "\n"


def how_to_load(form: str, path: Path, redundant: int, round_robin: bool) -> str:
    """What makes an engine load a file of a format with so many redundant slots, and when it does not; `round_robin`: whether
    vLLM runs that for the model.
    """
    if form == "sglang":
        return (
            f"SGLang: --init-expert-location {path} --ep-num-redundant-experts {redundant}. It is replaced at the first "
            "rebalance where --enable-eplb is on, and needs a model class with get_model_config_for_expert_location."
        )
    if form == "trtllm":
        return (
            f"TensorRT-LLM: in the LLM API options 'moe_config: {{load_balancer: {path}}}' and 'enable_attention_dp: true'. It "
            "ignores the file in silence unless the architecture is on its list (DeepSeek-V3, Qwen2 and Qwen3 MoE, Mixtral, "
            "Llama 4; newer versions also DeepSeek-V4, GLM-5, gpt-oss, Kimi K2.5, Nemotron-H and Qwen3.5), EP is above 1 and "
            "attention data parallelism is on. With MTP it stops at the draft layer, which has no key there (its pull request "
            "13974): add a line for it."
        )
    if form == "vllm-ascend":
        return (
            f'vllm-ascend: --additional-config \'{{"eplb_config": {{"expert_map_path": "{path}"}}}}\' with '
            "--enable-expert-parallel. It takes MoE layers by their place in layer_list and ignores the file at EP 1. For "
            "balanced experts its guide (0.23) lists W8A8 and W4A8 weights (A2, A3), MXFP4 and MXFP8 (Ascend 950)."
        )
    return (
        "vLLM 0.33 has no option that reads a map file: a fixed map needs patched code. What can be turned on instead: "
        + ("--expert-placement-strategy round_robin, or " if round_robin else "")
        + f"--enable-eplb --eplb-config '{{\"num_redundant_experts\": {redundant}}}', which balances on the loads that it sees."
    )


Rows = dict[int, Any]
"""What a file holds of each layer, a list where it is sound, by its number there."""


class _File(NamedTuple):
    """A file that is read, and what it must fit."""

    where: str  # it begins the message of an error
    name: str
    model: ModelSpec
    ep_size: int

    def by_place(self, rows: list[Any]) -> tuple[Rows, LayerIds, tuple[str, ...]]:
        """`by_layer` of rows without numbers: as many as MoE layers are these in order, others all decoder layers."""
        moe = self.model.moe_layer_ids
        if 0 < len(moe) < len(rows) < decoder_layers(self.model):
            raise InputError(
                f"{self.where} has {len(rows)} layers; {self.model.name} has {decoder_layers(self.model)} decoder layers, "
                f"{len(moe)} of them with experts"
            )
        numbers = moe if len(rows) == len(moe) else range(len(rows))
        found, ids, notes = self.by_layer(dict(zip(numbers, rows, strict=True)))
        return found, ids if len(rows) >= len(moe) else None, notes

    def by_layer(self, rows: Rows) -> tuple[Rows, LayerIds, tuple[str, ...]]:
        """Rows of the MoE layers, of rows by decoder layer; the layers' ids if these are known; and notes. One row serves all
        layers, fewer than MoE layers are taken in turn, and of more only draft layers may lie past the decoder.
        """
        moe, ids, n_layers = self.model.moe_layer_ids, tuple(rows), decoder_layers(self.model)
        if not moe or len(ids) == 1:
            note = f"its one layer is taken for all {len(moe)} MoE layers of {self.model.name}"
            return rows, None, (note,) if len(moe) > 1 else ()
        if not set(moe) <= set(ids):
            note = f"{len(ids)} layers for the {len(moe)} MoE layers of {self.model.name}: taken in turn"
            return rows, ids if set(ids) <= set(moe) else None, (note,)
        past = sorted(layer for layer in ids if layer >= n_layers)
        told = f"layers past the {n_layers} decoder layers of {self.model.name}"
        if len(past) > MOST_DRAFTS:
            raise InputError(f"{self.where} has {told}: {shown(past)}; another model's map?")
        notes = (f"{told} are left out (a draft model's?): {past}",) if past else ()
        return {layer: rows[layer] for layer in moe}, moe, notes

    def of_slots(self, rows: Rows, layer_ids: LayerIds, notes: tuple[str, ...], may_differ: bool = False) -> Placement:
        """The placement of rows with the expert of each slot; whether layers may have different numbers of slots."""
        n_experts, width = self.model.n_experts, None
        for layer, row in rows.items():
            at = f"{self.where}, layer {layer}"
            _check_ids(row, n_experts, f"{at}: slot", "an expert", at)
            width = len(row) if width is None else width
            if len(row) != width and not may_differ:
                raise InputError(f"{at} has {len(row)} slots, the first layer has {width}")
            if len(row) % self.ep_size or not n_experts <= len(row) <= n_experts + _MOST_SLOTS:
                raise InputError(
                    f"{at}: its {len(row)} slots must be from the model's {n_experts} experts to {n_experts + _MOST_SLOTS}, and "
                    f"divide by `ep_size` {self.ep_size}"
                )
            missing = set(range(n_experts)) - set(row)
            if missing:
                raise InputError(f"{at}: expert {min(missing)} of the model's {n_experts} has no slot")
        width = max(map(len, rows.values())) // self.ep_size
        slots = np.full((len(rows), self.ep_size, width), -1, np.int16)
        for of_rank, row in zip(slots, rows.values(), strict=True):
            of_rank[:, : len(row) // self.ep_size] = np.reshape(row, (self.ep_size, -1))
        return Placement.of_slots(self.name, self.ep_size, n_experts, slots.reshape(len(rows), -1), layer_ids, notes)

    def of_ranks(self, rows: Rows, layer_ids: LayerIds, notes: tuple[str, ...]) -> Placement:
        """The placement of rows with the rank of each expert, the form of its own."""
        n_experts, ep_size = self.model.n_experts, self.ep_size
        for layer, row in rows.items():
            at = f"{self.where}, layer {layer}"
            if not isinstance(row, list) or len(row) != n_experts:
                found = len(row) if isinstance(row, list) else "no list"
                raise InputError(
                    f"{at}: expected the ranks of {n_experts} experts, found {found}; the experts of slots stand under "
                    "physical_to_logical_map"
                )
            _check_ids(row, ep_size, f"{at}: expert", "a rank", at)
            if len(set(row)) < ep_size:
                raise InputError(
                    f"{at}: rank {min(set(range(ep_size)) - set(row))} of `ep_size` {ep_size} holds no expert"
                )
        return Placement.of_ranks(self.name, ep_size, np.array(list(rows.values()), np.int32), layer_ids, notes)


def _from_trtllm(content: dict[str, Any], file: _File) -> Placement:
    """TensorRT-LLM's map, which is keyed by decoder layer, or the start that it has without one."""
    where, model, ep_size = file.where, file.model, file.ep_size
    n_slots, given = content.get("num_slots"), content.get("initial_global_assignments")
    if updates := content.get("layer_updates_per_iter"):
        note = (
            f"layer_updates_per_iter {shown(updates)}: TensorRT-LLM moves experts as it runs; this is where they start"
        )
        placement = _from_trtllm(content | {"layer_updates_per_iter": 0}, file)
        return replace(placement, notes=(*placement.notes, note))
    if not _is_whole(n_slots) or not 1 <= n_slots < 2**16:
        raise InputError(f"{where}: num_slots must be a whole number from 1 to {2**16 - 1}, not {shown(n_slots)}")
    if given is None:
        if n_slots % ep_size:
            raise InputError(f"{where}: num_slots {n_slots} does not divide by `ep_size` {ep_size}")
        n = model.n_experts
        start = [(rank * n // ep_size + slot) % n for rank in range(ep_size) for slot in range(n_slots // ep_size)]
        note = "no initial_global_assignments: slot s of rank r has expert (r * experts // ranks + s) % experts, as at the start"
        return file.of_slots({0: start}, None, (note,))
    if not isinstance(given, dict) or not given or not all(re.fullmatch("[0-9]{1,9}", key) for key in given):
        raise InputError(
            f"{where}: initial_global_assignments must be {{layer: [expert of each slot]}}, not {shown(given)}"
        )
    rows = {int(key): given[key] for key in sorted(given, key=int)}
    for layer, row in rows.items():
        if not isinstance(row, list) or len(row) != n_slots:
            found = len(row) if isinstance(row, list) else shown(row)
            raise InputError(
                f"{where}: every layer of initial_global_assignments must have num_slots = {n_slots} slots; layer {layer} has "
                f"{found}"
            )
    moe, ids = model.moe_layer_ids, tuple(rows)
    missing = sorted(set(moe) - set(ids))
    if not moe or not missing:
        return file.of_slots(*file.by_layer(rows))
    if len(ids) > len(moe):
        raise InputError(
            f"{where} has {len(ids)} layers, {ids[0]} to {ids[-1]}; the {len(moe)} MoE layers of {model.name} are {moe[0]} to "
            f"{moe[-1]}, and {missing[0]} is not there"
        )
    if len(ids) == len(moe):
        note = f"layers {ids[0]} to {ids[-1]} taken for the MoE layers in order; TensorRT-LLM looks for {moe[0]} to {moe[-1]}"
        return file.of_slots(dict(zip(moe, rows.values(), strict=True)), moe, (note,))
    rows, known, notes = file.by_layer(rows)
    stops = f"TensorRT-LLM stops at layer {missing[0]}, which is not there"  # get_layer_initial_global_assignments
    return file.of_slots(rows, known, (f"{notes[0]}; {stops}",))


def _from_ascend(content: dict[str, Any], file: _File) -> Placement:
    """vllm-ascend's map: MoE layers by their place in the list, and draft layers behind them."""
    where, moe = file.where, file.model.moe_layer_ids
    rows, count = content["layer_list"], content.get("moe_layer_count")
    if not isinstance(rows, list) or not rows or not _is_whole(count) or count != len(rows):
        raise InputError(f"{where}: layer_list must have as many layers as moe_layer_count says, and at least one")
    ids: list[Any] = [row.get("layer_id", i) if isinstance(row, dict) else None for i, row in enumerate(rows)]
    if not all(_is_whole(layer) and layer >= 0 for layer in ids) or len(set(ids)) < len(ids):
        raise InputError(f"{where}: each layer of layer_list needs a layer_id of its own, a whole number")
    of_place = ids != sorted(ids)
    read = [_device_experts(row, file.ep_size, f"{where}, layer {layer}") for layer, row in zip(ids, rows, strict=True)]
    if 0 < len(moe) <= len(ids):
        ids = [*moe, *range(decoder_layers(file.model), decoder_layers(file.model) + len(ids) - len(moe))]
    found = file.by_layer({layer: slots for layer, (slots, _) in zip(ids, read, strict=True)})
    placement = file.of_slots(*found, may_differ=True)
    notes = placement.notes
    if len(ids) < len(moe):  # `expert_file_to_tensor`
        stops = (
            f", and stops at the next (Invalid EPLB Table): the file needs all {len(moe)}"
            if len(ids) + 1 < len(moe)
            else ""
        )
        notes += (f"vllm-ascend has no map for MoE layer {len(ids)} (from 0), which starts as without a file{stops}",)
    if of_place:
        notes += ("layers are taken in the order of the list, as vllm-ascend does, not by layer_id",)
    if not all(in_order for _, in_order in read):
        notes += ("devices are taken in the order of the list, as vllm-ascend does, not by device_id",)
    if placement.idle_copies.any():
        notes += ("a rank holds an expert twice: vllm-ascend would send the tokens of all later slots to wrong ones",)
    return replace(placement, notes=notes)


def _device_experts(row: dict[str, Any], ep_size: int, at: str) -> tuple[list[Any], bool]:
    """Experts of a layer's slots, device by device as they are listed, and whether that is by their ids."""
    listed = row.get("device_list")
    devices = [device for device in listed if isinstance(device, dict)] if isinstance(listed, list) else []
    count = row.get("device_count", len(devices))  # the engine reads neither this nor ids
    ids: list[Any] = [device.get("device_id", i) for i, device in enumerate(devices)]
    held: list[Any] = [device.get("device_expert") for device in devices]
    if not _is_whole(count) or count != ep_size or not all(map(_is_whole, ids)) or sorted(ids) != [*range(ep_size)]:
        raise InputError(f"{at}: must have the devices 0 to {ep_size - 1} of `ep_size` {ep_size}")
    if not all(isinstance(experts, list) for experts in held) or len(set(map(len, held))) > 1:
        raise InputError(f"{at}: each device must have a device_expert, a list of equally many experts")
    return [expert for experts in held for expert in experts], ids == sorted(ids)


def _is_whole(value: Any) -> TypeGuard[int]:
    return type(value) is int  # JSON's true and false are no numbers


def _check_ids(row: Any, n: int, one: str, what: str, at: str) -> None:
    """Refuse what is no list of whole numbers from 0 to n - 1."""
    if not isinstance(row, list):
        raise InputError(f"{at} must be a list, not {shown(row)}")
    for i, value in enumerate(row):
        if not _is_whole(value) or not 0 <= value < n:
            told = f"'{shown(value)}'" if isinstance(value, str) else shown(value)
            raise InputError(f"{one} {i} must have {what} from 0 to {n - 1}, not {told}")


def parse_assignments(text: str, where: str) -> dict[str, Any]:
    """What JSON would have of a TensorRT-LLM load balancer file: its numbers, and `initial_global_assignments`, the expert of
    each slot by layer, where that key has any.

    The one shape of YAML that these files have, read strictly: no tags. The map of layers may be a flow map; lists may be flow
    lists, both over several lines too, or block lists of `- expert`, or an anchor's (`&id001`) again (`*id001`), as PyYAML
    writes a list that several layers share. Raises InputError for anything else.
    """
    content: dict[str, Any] = {}
    anchors: dict[str, list[Any]] = {}
    section, row = "", None
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
            layer, layers = str(_whole(key, at)), content.get(section)
            if not isinstance(layers, dict) or layer in layers or len(layers) >= _MOST_LAYERS:
                raise InputError(f"{at}: layer {layer} is out of place, there twice, or beyond {_MOST_LAYERS} layers")
            mark, name, value = _ANCHOR.fullmatch(value).groups()  # type: ignore[union-attr]
            if mark == "*" and (name not in anchors or value):
                raise InputError(f"{at}: *{name} must be the anchor of a list above, and stand alone")
            row = layers[layer] = anchors[name] if mark == "*" else _flow_list(value, at) if value else []
            anchors |= {name: row} if mark == "&" else {}
            continue
        if key in content:
            raise InputError(f"{at}: {key} stands twice")
        section, row, content[key] = key, None, value
        if key in _NUMBERS:
            content[key] = _whole(value, at)
        elif key == "initial_global_assignments":
            content[key] = {} if not value else None if value in ("null", "~") else _flow_map(value, at)
    return content


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
        n_open += sum(map(line.count, "[{")) - sum(map(line.count, "]}"))
        if n_open <= 0:
            yield first, " ".join(held)
            held, n_open = [], 0
    if held:
        raise InputError(f"{where}, line {first}: a list or map is not closed")


def _flow_map(text: str, at: str) -> Any:
    """What a map in YAML's flow style holds, `{0: [1, 2], 1: [2, 1]}`: JSON once its keys have quotes."""
    quoted = re.sub(r"(['\"]?)\b(\w+)\1 *:", r'"\2":', re.sub(r", *([\]}])", r"\1", text))
    return parse_json(quoted, f"{at}: expected a map {{layer: [experts]}}, which")


def _flow_list(text: str, at: str) -> list[Any]:
    if not (text.startswith("[") and text.endswith("]")):
        raise InputError(f"{at}: expected a list of experts, not {shown(text)}")
    inside = text[1:-1].strip().removesuffix(",")
    return [_whole(part.strip(), at) for part in inside.split(",")]


def _whole(text: str, at: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", text):
        raise InputError(f"{at}: expected a whole number, not {shown(text)}")
    return int(text)
