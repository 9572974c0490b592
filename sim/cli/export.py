"""`epsim export`: a placement as a file of a serving engine."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from sim.cli.inputs import read_file
from sim.cli.terminal import note
from sim.errors import InputError, counted, unknown
from sim.options import ExportOptions, TrafficOptions
from sim.options.declare import add_options

if TYPE_CHECKING:
    from sim.model import ModelSpec
    from sim.placement import Placement


def add_export(parser: ArgumentParser) -> None:
    """Write a placement as a file in a serving engine's form: vLLM, SGLang, TensorRT-LLM or vllm-ascend."""
    add_options(parser, TrafficOptions, only=("model",))
    add_options(parser, ExportOptions)


def run_export(arguments: Namespace) -> None:
    from sim.model import load_model
    from sim.placement import FORMATS, decoder_layers, how_to_load, notes_on, placement_text, why_linear

    form, path = arguments.format, arguments.out
    if form not in FORMATS:
        raise unknown("--format", form, FORMATS)
    if form in ("sglang", "vllm-ascend") and path.suffix != ".json":
        raise InputError(f"--out {path}: the name must end in .json, or {form} does not load it")
    if arguments.first_layer is not None and form == "vllm":
        raise InputError("--first-layer: vllm does not name layers; its rows are the MoE layers in order")
    model = load_model(arguments.model)
    placement = _placement(arguments, model)
    note(*notes_on(placement))
    moe, ids = model.moe_layer_ids, placement.layer_ids or ()
    named = ids == moe or ids != tuple(range(len(ids)))  # others are numbers of rows, not of decoder layers
    if form in ("vllm", "vllm-ascend") and set(ids) < set(moe) and ids != moe[: len(ids)]:
        raise InputError(
            f"--format {form}: takes MoE layers by their place, so {_listed(ids)} alone would go to {_listed(moe[: len(ids)])}: "
            f"give loads of {_listed(moe)}"
        )
    if moe and len(ids) != len(moe):
        note(f"the map has {_listed(ids)}, {model.name} has {len(moe)} MoE layers; engines need a row for each")
    elif moe and ids != moe and model.n_layers:
        note(f"the map has {_listed(ids)}, the MoE layers of {model.name} are {_listed(moe)}")
    _write_checked(path, placement_text(placement, form, decoder_layers(model) if named else 0), placement, model)
    fewest, most = int(placement.slots_of_row.min()), placement.n_slots
    slots = f"{most}" if fewest == most else f"{fewest} to {most}"
    rows = max(decoder_layers(model) if named else 0, max(ids) + 1)
    more = f", in {rows} rows, one for each decoder layer" if form == "sglang" and rows > placement.n_rows else ""
    size = f"{counted(placement.n_rows, 'layer')} x {slots} slots on {counted(placement.ep_size, 'rank')}"
    print(f"{size}{more}, {form} format, written to {path}")
    print(how_to_load(form, path, most - model.n_experts, not why_linear(model, placement.ep_size)))
    if fewest < most:
        note(
            "layers differ in slots, which vllm-ascend's source reads from its map; not run here. Its dynamic EPLB needs one "
            "number of slots for all layers: leave it off"
        )


def _placement(arguments: Namespace, model: "ModelSpec") -> "Placement":
    """The placement that is asked for, load-aware ones fitted on the traffic of --fit-on."""
    from sim.placement import BUDGET, check_loads, is_load_aware, place_layers, split_name, spread_copies, strategy_name
    from sim.traffic.split import load_of

    name, ep_size, ranks_per_node = strategy_name(arguments.placement), arguments.ep_size, arguments.ranks_per_node
    chosen = {"layers": arguments.layers, "first_layer": arguments.first_layer}
    if split_name(name)[0] != BUDGET and (arguments.gpu, arguments.tokens) != (None, None):
        raise InputError(f"--gpu and --tokens go with eplb_budget, whose copies are spent by time, not with {name}")
    if arguments.tokens is not None and arguments.gpu is None:
        raise InputError("--tokens goes with --gpu: the load of ranks is spent alike at any number of them")
    if not is_load_aware(name):
        if arguments.fit_on is not None:
            raise InputError(f"--fit-on goes with a load-aware placement (eplb, eplb_refined), not with {name}")
        return place_layers(name, model, ep_size, ranks_per_node, **chosen)
    if arguments.fit_on is None:
        raise InputError(f"--placement {name} needs --fit-on FILE to be fitted on")
    data = read_file(arguments.fit_on, model, None)
    loads = check_loads(load_of(data, model.n_experts), model.n_experts, f"--fit-on {arguments.fit_on}", layers=True)
    cost = None
    if arguments.gpu is not None:
        from sim.cost.expert import expert_rates
        from sim.cost.steps import time_cost

        cost = time_cost(expert_rates(model, arguments.gpu), model, arguments.tokens or 512 * ep_size)
    of_file = tuple(data.layer_ids.tolist())
    placement = place_layers(
        name, model, ep_size, ranks_per_node, loads=loads, loads_of=of_file, layer_cost=cost, **chosen
    )
    if arguments.format != "vllm-ascend" or not placement.idle_copies.any():
        return placement
    note(
        f"copies of an expert that shared a rank were moved in {(placement.idle_copies > 0).sum()} of {placement.n_rows} layers: "
        "vllm-ascend counts distinct experts as slots"
    )
    return spread_copies(placement, loads)


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

    with whole_files(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
        found = read_placement(temporary, model, placement.ep_size)
        rows, ids = found.experts, placement.layer_ids or ()
        if len(rows) > placement.n_rows:  # of layers that are not in the placement the map has the engine's start
            rows = rows[[found.layer_ids.index(layer) if found.layer_ids else layer for layer in ids]]
        if not np.array_equal(rows, placement.experts):
            raise RuntimeError(f"{path}: what was written does not read back as the placement")
