"""Write a placement as a file that a serving engine reads: vLLM, SGLang, TensorRT-LLM or vllm-ascend."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import note, whole_number
from sim.errors import InputError, unknown
from sim.errors import whole_number as check_whole_number

_MOST_LAYERS = 1024


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim export`."""
    parser.add_argument("--model", default="deepseek-v3", help="preset or path of a config.json (default: deepseek-v3)")
    parser.add_argument("--placement", required=True, metavar="P", help="a placement (epsim placements), as in eplb+32")
    parser.add_argument("--ep", required=True, metavar="R", help="EP size")
    parser.add_argument("--format", required=True, metavar="F", help="vllm, sglang, trtllm or vllm-ascend")
    parser.add_argument("--out", required=True, metavar="FILE", help="file to write")
    parser.add_argument(
        "--traffic",
        metavar="FILE",
        help="what eplb is fitted on, layer by layer: recorded routing or load counts (as epsim traffic reads them)",
    )
    parser.add_argument("--ranks-per-node", default="8", metavar="N", help="for node_aware and eplb (default: 8)")
    parser.add_argument("--layers", metavar="N", help="layers of other placements (default: the model's MoE layers)")
    parser.add_argument(
        "--first-layer",
        default="0",
        metavar="N",
        help="id of the first MoE layer in the formats that name layers, trtllm and vllm-ascend: the model's dense layers "
        "come first, so 3 for DeepSeek-V3 (default: 0)",
    )


def run(arguments: Namespace) -> None:
    """Run `epsim export`."""
    from sim.model import load_model
    from sim.placement import FORMATS, placement_text

    if arguments.format not in FORMATS:
        raise unknown("--format", arguments.format, FORMATS)
    first_layer = check_whole_number("--first-layer", whole_number("--first-layer")(arguments.first_layer), 0, 2**20)
    if first_layer and arguments.format in ("vllm", "sglang"):
        raise InputError(
            f"--first-layer: {arguments.format} does not name layers; its rows are the MoE layers in order"
        )
    model = load_model(arguments.model)
    ep_size = whole_number("--ep")(arguments.ep)
    slots = _slots(arguments, model, ep_size)
    text = placement_text(slots, arguments.format, ep_size, first_layer)
    _write_checked(Path(arguments.out), text, slots, ep_size)
    n_layers, n_slots = slots.experts.shape
    print(
        f"{n_layers} layers x {n_slots} slots on {ep_size} ranks, {arguments.format} format, written to {arguments.out}"
    )


def _slots(arguments: Namespace, model: Any, ep_size: int) -> Any:
    """Placement of all layers."""
    from dataclasses import replace

    import numpy as np

    from sim.placement import (
        check_ep_size,
        check_loads,
        check_slots,
        is_load_aware,
        place_balanced,
        place_fixed,
        strategy_name,
    )
    from sim.traffic import load_table

    name = strategy_name(arguments.placement)
    ranks_per_node = whole_number("--ranks-per-node")(arguments.ranks_per_node)
    check_whole_number("--ranks-per-node", ranks_per_node, 1, 2**15)
    check_ep_size(model, ep_size)
    check_slots(name, model, ep_size)
    if name == "random":
        raise InputError("--placement random: is drawn anew for each layer draw; there is none to export")
    if is_load_aware(name):
        if arguments.traffic is None:
            raise InputError(f"--placement {name} needs --traffic FILE to be fitted on")
        if arguments.layers is not None:
            raise InputError("--layers goes with placements that are not fitted: --traffic has its own layers")
        table = load_table(Path(arguments.traffic.removeprefix("file:")), model)
        loads = check_loads(table.loads, model.n_experts, f"--traffic {arguments.traffic}", layers=True)
        if model.n_moe_layers not in (0, len(loads)):
            note(f"{arguments.traffic} has {len(loads)} layers, {model.name} has {model.n_moe_layers} MoE layers")
        return place_balanced(name, model, ep_size, ranks_per_node, loads)
    if arguments.traffic is not None:
        raise InputError(f"--traffic goes with a load-aware placement (eplb, eplb_refined), not with {name}")
    slots = place_fixed(name, model, ep_size, ranks_per_node)
    if len(slots.ranks) > 1 and arguments.layers is not None:
        raise InputError(f"--layers goes with placements of one layer: {name} has {len(slots.ranks)}")
    if len(slots.ranks) > 1:
        return slots
    wanted = model.n_moe_layers if arguments.layers is None else whole_number("--layers")(arguments.layers)
    if arguments.layers is None and not wanted:
        raise InputError(f"--layers is needed: {model.name} does not say how many MoE layers it has")
    n_layers = check_whole_number("--layers", wanted, 1, _MOST_LAYERS)
    return replace(
        slots, ranks=np.repeat(slots.ranks, n_layers, axis=0), experts=np.repeat(slots.experts, n_layers, axis=0)
    )


def _write_checked(path: Path, text: str, slots: Any, ep_size: int) -> None:
    """Write the file whole or not at all, and only if it reads back as these slots."""
    import numpy as np

    from sim.placement import read_placement
    from sim.results import whole_files

    if path.is_dir() or not path.name:
        raise InputError(f"--out {path} is a folder, not a file")
    with whole_files(path) as (temporary,):
        temporary.write_text(text, encoding="utf-8")
        found = read_placement(temporary, slots.n_experts, ep_size)
        same = np.array_equal(found.experts, slots.experts) and np.array_equal(found.ranks, slots.ranks)
        if not same:
            raise RuntimeError(f"{path}: what was written does not read back as the placement")
