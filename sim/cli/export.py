"""`epsim export`: a placement as a file of a serving engine."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sim.cli.terminal import note
from sim.errors import InputError, counted, unknown
from sim.options import TrafficOptions
from sim.options.declare import add_options
from sim.options.kinds import MAX_TOKENS, Whole

if TYPE_CHECKING:
    from sim.model import ModelSpec
    from sim.placement import LayerCost, Placement


def add_export(parser: ArgumentParser) -> None:
    """Write a placement as a file in a serving engine's form: vLLM, SGLang, TensorRT-LLM or vllm-ascend."""
    add_options(parser, TrafficOptions, only=("model",))
    add = parser.add_argument
    add("--placement", required=True, metavar="P", help="a placement (epsim placements), as in eplb+32")
    add("--ep", type=Whole(), required=True, metavar="R", help="EP size")
    add("--format", required=True, metavar="F", help="vllm, sglang, trtllm or vllm-ascend")
    add("--out", required=True, metavar="FILE", help="file to write")
    add(
        "--fit-on",
        "--traffic",
        metavar="FILE",
        help="traffic that eplb is fitted on, layer by layer: recorded routing or load counts (as epsim traffic reads them)",
    )
    add("--gpu", metavar="GPU", help="of eplb_budget: spend copies by the predicted time on this GPU (epsim gpus), as advise "
        "does (default: by the busiest rank's load)")  # fmt: skip
    add(
        "--tokens",
        type=Whole(1, MAX_TOKENS),
        metavar="N",
        help="with --gpu: tokens per step over the EP group (default: 512 on each rank)",
    )
    add("--ranks-per-node", type=Whole(1, 2**15), default=8, metavar="N", help="for node_aware and eplb (default: 8)")
    add(
        "--layers",
        type=Whole(1, 1024),
        metavar="N",
        help="layers of other placements (default: the model's MoE layers)",
    )
    add("--first-layer", type=Whole(0, 2**20), metavar="N", help="decoder layer of the first MoE layer, for a model that does "
        "not say which of its layers are MoE layers; those of the map follow one another from there")  # fmt: skip


def run_export(arguments: Namespace) -> None:
    """Run `epsim export`."""
    from sim.model import load_model
    from sim.placement import FORMATS, decoder_layers, how_to_load, notes_on, placement_text, why_linear

    form, path = arguments.format, Path(arguments.out)
    if form not in FORMATS:
        raise unknown("--format", form, FORMATS)
    if form in ("sglang", "vllm-ascend") and path.suffix != ".json":
        raise InputError(f"--out {path}: the name must end in .json, or {form} does not load it")
    if arguments.first_layer is not None and form == "vllm":
        raise InputError("--first-layer: vllm does not name layers; its rows are the MoE layers in order")
    model = load_model(arguments.model)
    placement = _placement(arguments, model, arguments.ep)
    note(*notes_on(placement))
    moe, ids = model.moe_layer_ids, placement.layer_ids or ()
    named = ids == moe or ids != tuple(range(len(ids)))  # others are numbers of rows, not of decoder layers
    if moe and len(ids) != len(moe):
        note(f"the map has {_listed(ids)}, {model.name} has {len(moe)} MoE layers; engines need a row for each")
    elif moe and ids != moe and model.n_layers:
        note(f"the map has {_listed(ids)}, the MoE layers of {model.name} are {_listed(moe)}")
    _write_checked(path, placement_text(placement, form, decoder_layers(model) if named else 0), placement, model)
    fewest, most = int(placement.slots_of_row.min()), placement.n_slots
    slots = f"{most}" if fewest == most else f"{fewest} to {most}"
    size = f"{counted(placement.n_rows, 'layer')} x {slots} slots on {counted(placement.ep_size, 'rank')}"
    print(f"{size}, {form} format, written to {path}")
    print(how_to_load(form, path, most - model.n_experts, not why_linear(model, placement.ep_size)))
    if fewest < most:
        note(
            "layers differ in slots, which vllm-ascend's source reads from its map; not run here. Its dynamic EPLB needs one "
            "number of slots for all layers: leave it off"
        )


def _placement(arguments: Namespace, model: "ModelSpec", ep_size: int) -> "Placement":
    """Placement with a row for each layer, and the decoder layers that these are."""
    from sim.placement import BUDGET, check_ep_size, check_slots, is_load_aware, place_fixed, split_name, strategy_name

    name = strategy_name(arguments.placement)
    ranks_per_node = arguments.ranks_per_node
    check_ep_size(model, ep_size, [name])
    check_slots(name, model, ep_size)
    if name == "random":
        raise InputError("--placement random: is drawn anew for each layer draw; there is none to export")
    if split_name(name)[0] != BUDGET and (arguments.gpu, arguments.tokens) != (None, None):
        raise InputError(f"--gpu and --tokens go with eplb_budget, whose copies are spent by time, not with {name}")
    if is_load_aware(name):
        placement = _fitted(arguments, name, model, ep_size, ranks_per_node)
    elif arguments.fit_on is not None:
        raise InputError(f"--fit-on goes with a load-aware placement (eplb, eplb_refined), not with {name}")
    else:
        placement = place_fixed(name, model, ep_size, ranks_per_node)
    n_layers = placement.n_rows
    if n_layers > 1 and arguments.layers is not None:
        raise InputError(f"--layers goes with placements of one layer: {name} has {n_layers}")
    if n_layers == 1 and not is_load_aware(name):
        n_layers = arguments.layers or model.n_moe_layers or 0
        if not n_layers:
            raise InputError(f"--layers is needed: {model.name} does not say how many MoE layers it has")
    first = arguments.first_layer
    if first is not None:
        return placement.for_layers(tuple(range(first, first + n_layers)))
    moe = model.moe_layer_ids
    ids = placement.layer_ids or (moe if len(moe) == n_layers else tuple(range(n_layers)))
    return placement.for_layers(ids)


def _fitted(arguments: Namespace, name: str, model: "ModelSpec", ep_size: int, ranks_per_node: int) -> "Placement":
    """A load-aware placement of the layers of --fit-on."""
    from sim.placement import check_loads, place_balanced, spread_copies
    from sim.traffic import read_traffic
    from sim.traffic.split import load_of

    if arguments.fit_on is None:
        raise InputError(f"--placement {name} needs --fit-on FILE to be fitted on")
    if arguments.layers is not None:
        raise InputError("--layers goes with placements that are not fitted: --fit-on has its own layers")
    data = read_traffic(Path(arguments.fit_on.removeprefix("file:")), model)
    note(*data.notes)
    loads = check_loads(load_of(data, model.n_experts), model.n_experts, f"--fit-on {arguments.fit_on}", layers=True)
    moe, of_file = model.moe_layer_ids, tuple(data.layer_ids.tolist())
    ids = moe if len(loads) == len(moe) else of_file if set(of_file) <= set(moe) else None
    placement = place_balanced(name, model, ep_size, ranks_per_node, loads, ids, _layer_cost(arguments, model, ep_size))
    if arguments.format != "vllm-ascend" or not placement.idle_copies.any():
        return placement
    note(
        f"copies of an expert that shared a rank were moved in {(placement.idle_copies > 0).sum()} of {placement.n_rows} layers: "
        "vllm-ascend counts distinct experts as slots"
    )
    return spread_copies(placement, loads)


def _layer_cost(arguments: Namespace, model: "ModelSpec", ep_size: int) -> "LayerCost | None":
    """What copies are spent by: the time of --gpu, where there is one."""
    if arguments.gpu is None:
        if arguments.tokens is not None:
            raise InputError("--tokens goes with --gpu: the load of ranks is spent alike at any number of them")
        return None
    from sim.cost.expert import expert_rates
    from sim.cost.steps import time_cost

    return time_cost(expert_rates(model, arguments.gpu), model, arguments.tokens or 512 * ep_size)


def _listed(layers: tuple[int, ...]) -> str:
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"layers {layers[0]} to {layers[-1]}"
    return "layers " + ", ".join(map(str, layers[:4])) + (f", ... {layers[-1]}" if len(layers) > 4 else "")


def _write_checked(path: Path, text: str, placement: "Placement", model: "ModelSpec") -> None:
    """Write the file whole or not at all, and only if it reads back as this placement."""
    import numpy as np

    from sim.files import whole_files
    from sim.placement import read_placement

    if path.is_dir() or not path.name:
        raise InputError(f"--out {path} is a folder, not a file")
    with whole_files(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
        found = read_placement(temporary, model, placement.ep_size)
        rows, ids = found.experts, placement.layer_ids or ()
        if len(rows) > placement.n_rows:  # of layers that are not in the placement the map has the engine's start
            rows = rows[[found.layer_ids.index(layer) if found.layer_ids else layer for layer in ids]]
        if not np.array_equal(rows, placement.experts):
            raise RuntimeError(f"{path}: what was written does not read back as the placement")
