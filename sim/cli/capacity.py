"""`epsim capacity`: how much room buffers need, in tokens, rows and bytes, at a given risk."""

from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.inputs import read_inputs, say_about_inputs, say_about_layers
from sim.cli.terminal import add_output, answer, note, note_compiling, pivoted, print_lines, say_notes
from sim.errors import InputError, counted
from sim.options import CapacityOptions, TrafficOptions
from sim.options.declare import add_options, given, section_of
from sim.options.kinds import Number, Seconds

_KEYS = ["ep_size", "tokens", "placement"]
_PER_SECOND, _MOST_PER_SECOND = 20.0, 1e6
_SHORT = {"received": "received tokens", "pairs": "rows of a rank", "expert_rows": "rows of an expert"}
_TITLE_EXCHANGE = {"token": "buffer", "pair": "buffer", "workspace": "workspace", "deepep_low_latency": "low latency"}


def add_capacity(parser: ArgumentParser) -> None:
    """How much room buffers need: tokens and rows that a rank or an expert receives more of with at most a given probability.

    Of one layer of one step, of any layer of a step, and of any layer of any step of a horizon; for the median deployment
    (layers drawn once) and for the worst 5 % of them. Given its layers, a deployment's tokens, the layers of a step and steps
    are taken as independent. Recorded steps (epsim step --traffic) exceed a capacity in some layer as often or up to a seventh
    less.
    """
    add_options(parser, TrafficOptions)
    cells = {"ep_sizes": "16,32,64", "tokens": "2048", "placements": "linear,round_robin"}
    add_options(parser, CapacityOptions, without="horizon_steps", **cells)
    add = section_of(parser, CapacityOptions.title).add_argument
    add("--horizon", type=Seconds(), metavar="TIME", help="also of any step of so long, as in 24h")
    add("--steps-per-second", type=Number(1e-6, _MOST_PER_SECOND), metavar="X", help=f"steps of the horizon (default: "
        f"{_PER_SECOND:g})")  # fmt: skip
    add_output(parser, "capacity.csv and the figure", figures=True)


def run_capacity(arguments: Namespace) -> None:
    """Run `epsim capacity`."""
    from sim.cost.buffers import size_buffers
    from sim.router import routing_law

    options = given(arguments, CapacityOptions)
    if arguments.horizon is not None:
        options["horizon_steps"] = round(arguments.horizon * (arguments.steps_per_second or _PER_SECOND))
        if not options["horizon_steps"]:
            raise InputError("--horizon: it has no step; take a longer one, or more --steps-per-second")
    elif arguments.steps_per_second is not None:
        raise InputError("--steps-per-second goes with --horizon")
    model, workload = read_inputs(arguments)
    note_compiling()
    say_about_inputs(model, workload)
    say_about_layers(arguments.layer_correlation)
    if arguments.layer_correlation is not None:
        note(
            "with a layer correlation some layer of a step exceeds less often; below a probability of about 1 % nothing changes"
        )
    say_notes()
    found = size_buffers(model, workload, curves=arguments.out is not None, **options)
    note(*found.notes)
    identity = {name: value for name, value in options.items() if name not in ("threads", "fit_on")}
    identity |= {"fit_on": None if options["fit_on"] is None else str(options["fit_on"])}
    identity |= {"model": model.name, "workload": workload.name, "law": routing_law(model, workload)}

    def figures() -> dict[str, Any]:
        from sim.figures.buffers import capacity_curves

        of = f"{model.name}, {workload.name} traffic"
        return {"capacity": capacity_curves(found.curves, options["risk"], of)} if len(found.curves) else {}

    tables = {"capacity": found.table}
    answer(
        arguments.out, arguments, lambda: _print(found, model, options, arguments.markdown), tables, identity, figures
    )


def _print(found: Any, model: Any, options: dict[str, Any], markdown: bool) -> None:
    table, risk = found.table, options["risk"]
    asked = table[table.risk == risk]
    for quantity, text in _SHORT.items():
        rows = asked[asked.quantity == quantity]
        if len(rows):
            _print_quantity(rows, text, found, risk, model, markdown)
            print()
    if options["capacity_factor"] is not None:
        _print_factor(table[table.risk != risk], options["capacity_factor"], markdown)
    _print_engines(asked, found.slots, model, markdown)


def _print_quantity(rows: Any, text: str, found: Any, risk: float, model: Any, markdown: bool) -> None:
    """Capacities of one quantity: in tokens or rows by scope, and in bytes by exchange."""
    from sim.cost.buffers import buffer_bytes

    exchanges = list(dict.fromkeys(rows.exchange))
    first = rows[rows.exchange == exchanges[0]]
    scopes, lines = pivoted(
        first.assign(balanced=first.balanced_tokens.map(_count)), [*_KEYS, "balanced"], ["scope", "deployments"],
        lambda row: f"{row.capacity_tokens:.0f} ({row.factor:.2f}x)",
    )  # fmt: skip
    sizes = []
    for line, ((ep_size, _, placement), of) in zip(lines, rows.groupby(_KEYS, sort=False), strict=True):
        worst = of.worst_case_tokens.iloc[0]
        line.append(f"{worst}")
        at_worst = buffer_bytes(model, exchanges[-1], worst, int(ep_size), found.slots[placement])
        sizes.append([*of.groupby("exchange", sort=False).bytes.last(), at_worst])
    unit, in_unit = _in_bytes(sizes)
    heads = ["EP", "tokens", "placement", "balanced"]
    heads += [f"{scope} {'layers drawn afresh' if of == 'all' else of.replace('_', ' ')}" for scope, of in scopes]
    heads += ["worst case", *(f"{_TITLE_EXCHANGE[exchange]} {unit}" for exchange in exchanges), f"worst {unit}"]
    row = rows.iloc[0]
    title = (
        f"{row.model}, {row.workload} traffic, {counted(found.n_layers, 'MoE layer')}: {text}: the capacity that is exceeded "
        f"with a probability of at most {risk:g}, and its factor over the balanced load; bytes of the last of these"
    )
    print_lines(
        title, heads, [line + of for line, of in zip(lines, in_unit, strict=True)], markdown, align=">><", keys=3
    )


def _in_bytes(sizes: list[list[float]]) -> tuple[str, list[list[str]]]:
    """Sizes in the largest of GiB, MiB and KiB that shows two digits of the smallest one, and the unit."""
    least = min((size for line in sizes for size in line if size > 0), default=2**30)
    unit, scale = next(((name, 2**n) for name, n in (("GiB", 30), ("MiB", 20)) if least >= 0.1 * 2**n), ("KiB", 2**10))
    return unit, [[f"{size / scale:.2f}" for size in line] for line in sizes]


def _count(x: float) -> str:
    """Tokens or rows, of few with a decimal: factors are of them."""
    return f"{x:.1f}" if x < 10 else f"{x:.0f}"


def _print_engines(asked: Any, slots: dict[str, int], model: Any, markdown: bool) -> None:
    """What engines call the capacities of the last scope, and the values to set."""
    from sim.cost.buffers import DEEPEP_LIMIT_BYTES, deepep_low_latency_bytes
    from sim.cost.inputs import expert_width

    last = asked.groupby([*_KEYS, "quantity"], sort=False).tail(1)
    heads = ["EP", "tokens", "placement", "vLLM fraction", "torchtitan factor", "Megatron-LM factor"]
    lines, sizes = [], []
    for of_cell, rows in last.groupby(_KEYS, sort=False):
        (ep_size, tokens, placement), at = of_cell, rows.set_index("quantity")
        line = [str(ep_size), str(tokens), str(placement)]
        line.append(f"{at.capacity_tokens['received'] / tokens:.2f}" if "received" in at.index else "-")
        line += [f"{at.factor[name]:.2f}" if name in at.index else "-" for name in ("pairs", "expert_rows")]
        per_rank = -(-tokens // ep_size)
        sizes.append([deepep_low_latency_bytes(expert_width(model), per_rank, slots[placement])])
        lines.append([*line, str(per_rank)])
    unit, in_unit = _in_bytes(sizes)
    marks = ["!" if size > DEEPEP_LIMIT_BYTES else "" for (size,) in sizes]
    title = (
        "What engines call it, for the last of these capacities\n"
        "vLLM: receive fraction, received tokens of a rank / tokens of the step; torchtitan: capacity factor, of a rank's rows;\n"
        "Megatron-LM: moe_expert_capacity_factor; DeepEP, SGLang: num_max_dispatch_tokens_per_rank, what a rank sends at most,\n"
        "with its static low-latency buffer (! above its limit of 32 GiB)"
    )
    lines = [[*line, size + mark] for line, (size,), mark in zip(lines, in_unit, marks, strict=True)]
    print_lines(title, [*heads, "DeepEP tokens", f"DeepEP {unit}"], lines, markdown, align=">><", keys=3)


def _print_factor(rows: Any, factor: float, markdown: bool) -> None:
    """A line for each cell and quantity: P(exceed) in each scope, and the share that is dropped."""
    rows = rows[rows.exchange != "workspace"]
    scopes = list(dict.fromkeys(zip(rows.scope, rows.deployments, strict=True)))
    heads = ["EP", "tokens", "placement", "of", "capacity", "dropped share"]
    heads += [f"P({scope}) {'all' if of == 'all' else of.replace('_', ' ')}" for scope, of in scopes]
    cells = []
    for keys, cell in rows.groupby([*_KEYS, "quantity"], sort=False):
        first = cell.iloc[0]
        line = [*map(str, keys[:3]), _SHORT[str(keys[3])], f"{first.capacity_tokens:.0f}"]
        line.append("-" if first.dropped_share != first.dropped_share else f"{first.dropped_share:.2g}")
        at = cell.set_index(["scope", "deployments"]).risk
        cells.append([*line, *(f"{at[scope]:.2g}" for scope in scopes)])
    title = f"Capacity factor {factor:g}: what it drops, and the probability that it is exceeded in a layer, a step, a horizon"
    print_lines(title, heads, cells, markdown, align=">><<", keys=4)
    print()
