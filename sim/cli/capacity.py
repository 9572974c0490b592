"""How much room buffers need: tokens and rows that a rank or an expert receives more of with at most a given probability.

Of one layer of one step, of any layer of a step, and of any layer of any step of a horizon; for the median deployment (layers
drawn once) and for the worst 5 % of them. Given its layers, a deployment's tokens, the layers of a step and steps are taken as
independent. Recorded steps (epsim step --traffic) exceed a capacity in some layer as often or up to a seventh less.
"""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import note, note_compiling, print_table, say_about_inputs, say_about_layers, traffic_fields
from sim.errors import InputError
from sim.options import CapacityOptions, Folder, Number, Seconds, TrafficOptions, add_options, given

_PER_SECOND, _MOST_PER_SECOND = 20.0, 1e6
_SHORT = {"received": "received tokens", "pairs": "rows of a rank", "expert_rows": "rows of an expert"}
_TITLE_EXCHANGE = {"token": "buffer", "pair": "buffer", "workspace": "workspace", "deepep_low_latency": "low latency"}


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim capacity`."""
    add_options(parser, TrafficOptions)
    only = [name for name in CapacityOptions.__dataclass_fields__ if name != "horizon_steps"]
    add_options(parser, CapacityOptions, only=only, ep_sizes="16,32,64", tokens="2048", placements="linear,round_robin")
    parser.add_argument("--horizon", type=Seconds(), metavar="TIME", help="also of any step of so long, as in 24h")
    parser.add_argument(
        "--steps-per-second",
        type=Number(1e-6, _MOST_PER_SECOND),
        metavar="X",
        help=f"steps of the horizon (default: {_PER_SECOND:g})",
    )
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--out", type=Folder(), metavar="DIR", help="also write capacity.csv and capacity.png there")


def run(arguments: Namespace) -> None:
    """Run `epsim capacity`."""
    from sim.cost.buffers import size_buffers
    from sim.model import load_model
    from sim.traffic import load_workload

    options = given(arguments, CapacityOptions)
    if arguments.horizon is not None:
        options["horizon_steps"] = round(arguments.horizon * (arguments.steps_per_second or _PER_SECOND))
        if not options["horizon_steps"]:
            raise InputError("--horizon: it has no step; take a longer one, or more --steps-per-second")
    elif arguments.steps_per_second is not None:
        raise InputError("--steps-per-second goes with --horizon")
    model = load_model(arguments.model)
    workload = load_workload(arguments.workload, model, **traffic_fields(arguments))
    note_compiling()
    say_about_inputs(model, workload)
    say_about_layers(arguments.layer_correlation)
    found = size_buffers(model, workload, curves=arguments.out is not None, **options)
    if arguments.layer_correlation is not None:
        note(
            "with a layer correlation some layer of a step exceeds less often; below a probability of about 1 % nothing changes"
        )
    for text in found.notes:
        note(text)
    _print(found, model, options, arguments)
    if arguments.out is not None:
        _write(found, model, workload, options, arguments.out)
        figure = ", capacity.png" if len(found.curves) else ""
        print(f"\nwritten to {arguments.out}: capacity.csv, capacity.json (what made it){figure}")


def _print(found: Any, model: Any, options: dict[str, Any], arguments: Namespace) -> None:
    from sim.cost.buffers import buffer_bytes

    table, risk = found.table, options["risk"]
    row = table.iloc[0]
    asked = table[table.risk == risk]
    for quantity, text in _SHORT.items():
        rows = asked[asked.quantity == quantity]
        if not len(rows):
            continue
        exchanges = list(dict.fromkeys(rows.exchange))
        first = rows[rows.exchange == exchanges[0]]
        heads = ["EP", "tokens", "placement", "balanced"]
        scopes = list(dict.fromkeys(zip(first.scope, first.deployments, strict=True)))
        heads += [f"{scope} {'layers drawn afresh' if of == 'all' else of.replace('_', ' ')}" for scope, of in scopes]
        heads += ["worst case", *(f"{_TITLE_EXCHANGE[exchange]} GiB" for exchange in exchanges), "worst GiB"]
        cells = []
        for keys, cell in first.groupby(["ep_size", "tokens", "placement"], sort=False):
            line = [str(keys[0]), str(keys[1]), str(keys[2]), _count(cell.balanced_tokens.iloc[0])]
            for scope, of in scopes:
                at = cell[(cell.scope == scope) & (cell.deployments == of)].iloc[0]
                line.append(f"{at.capacity_tokens:.0f} ({at.factor:.2f}x)")
            worst = cell.worst_case_tokens.iloc[0]
            line.append(f"{worst}")
            same = rows[(rows.ep_size == keys[0]) & (rows.tokens == keys[1]) & (rows.placement == keys[2])]
            for exchange in exchanges:
                line.append(f"{same[same.exchange == exchange].bytes.iloc[-1] / 2**30:.2f}")
            n_slots = model.n_experts + int(str(keys[2]).partition("+")[2] or 0)
            at_worst = buffer_bytes(model, exchanges[-1], worst, int(keys[0]), n_slots)
            cells.append([*line, f"{at_worst / 2**30:.2f}"])
        title = (
            f"{row.model}, {row.workload} traffic, {found.n_layers} MoE layers: {text}, capacity exceeded with a probability of "
            f"at most {risk:g}\n(its factor of the balanced load); bytes of the last scope"
        )
        print_table(title, heads, cells, arguments.markdown, align=">><")
        print()
    if options["capacity_factor"] is not None:
        _print_factor(table[table.risk != risk], options["capacity_factor"], arguments.markdown)
    _print_engines(asked, model, arguments.markdown)


def _count(x: float) -> str:
    """Tokens or rows, of few with a decimal: factors are of them."""
    return f"{x:.1f}" if x < 10 else f"{x:.0f}"


def _print_engines(asked: Any, model: Any, markdown: bool) -> None:
    """What engines call the capacities of the last scope, and the values to set."""
    from sim.cost.buffers import DEEPEP_LIMIT_BYTES, deepep_low_latency_bytes
    from sim.cost.inputs import expert_width

    keys = ["ep_size", "tokens", "placement"]
    last = asked.groupby([*keys, "quantity"], sort=False).tail(1)
    heads = ["EP", "tokens", "placement", "vLLM fraction", "torchtitan factor", "Megatron-LM factor"]
    heads += ["DeepEP tokens", "DeepEP GiB"]
    cells = []
    for of_cell, rows in last.groupby(keys, sort=False):
        (ep_size, tokens, placement), at = of_cell, rows.set_index("quantity")
        line = [str(ep_size), str(tokens), str(placement)]
        line.append(f"{at.capacity_tokens['received'] / tokens:.2f}" if "received" in at.index else "-")
        line += [f"{at.factor[name]:.2f}" if name in at.index else "-" for name in ("pairs", "expert_rows")]
        per_rank = -(-tokens // ep_size)
        n_slots = model.n_experts + int(placement.partition("+")[2] or 0)
        static = deepep_low_latency_bytes(expert_width(model), per_rank, n_slots)
        line += [str(per_rank), f"{static / 2**30:.2f}{'!' if static > DEEPEP_LIMIT_BYTES else ''}"]
        cells.append(line)
    title = (
        "What engines call it, for the last scope\n"
        "vLLM: receive fraction, received tokens of a rank / tokens of the step; torchtitan: capacity factor, of a rank's rows;\n"
        "Megatron-LM: moe_expert_capacity_factor; DeepEP, SGLang: num_max_dispatch_tokens_per_rank, what a rank sends at most,\n"
        "with its static low-latency buffer (! above its limit of 32 GiB)"
    )
    print_table(title, heads, cells, markdown, align=">><", keys=3)


def _print_factor(rows: Any, factor: float, markdown: bool) -> None:
    """A line for each cell and quantity: P(exceed) in each scope, and the share that is dropped."""
    rows = rows[rows.exchange != "workspace"]
    scopes = list(dict.fromkeys(zip(rows.scope, rows.deployments, strict=True)))
    heads = ["EP", "tokens", "placement", "of", "capacity", "dropped share"]
    heads += [f"P({scope}) {'all' if of == 'all' else of.replace('_', ' ')}" for scope, of in scopes]
    cells = []
    for keys, cell in rows.groupby(["ep_size", "tokens", "placement", "quantity"], sort=False):
        first = cell.iloc[0]
        line = [*map(str, keys[:3]), _SHORT[str(keys[3])], f"{first.capacity_tokens:.0f}"]
        line.append("-" if first.dropped_share != first.dropped_share else f"{first.dropped_share:.2g}")
        at = cell.set_index(["scope", "deployments"]).risk
        cells.append([*line, *(f"{at[scope]:.2g}" for scope in scopes)])
    title = f"Capacity factor {factor:g}: what it drops, and the probability that it is exceeded in a layer, a step, a horizon"
    print_table(title, heads, cells, markdown, align=">><<", keys=4)
    print()


def _write(found: Any, model: Any, workload: Any, options: dict[str, Any], folder: Path) -> None:
    from sim.figures.buffers import capacity_curves
    from sim.files import whole_files, writable_folder
    from sim.results import write_table
    from sim.router import routing_law

    identity = {name: value for name, value in options.items() if name not in ("threads", "fit_on")}
    identity |= {"fit_on": None if options["fit_on"] is None else str(options["fit_on"])}
    identity |= {"model": model.name, "workload": workload.name, "law": routing_law(model, workload)}
    with writable_folder(folder):
        write_table(found.table, folder, "capacity", identity)
        if len(found.curves):
            figure = capacity_curves(found.curves, options["risk"], f"{model.name}, {workload.name} traffic")
            with whole_files(folder / "capacity.png") as (path,):
                figure.savefig(path, format="png", dpi=150)
