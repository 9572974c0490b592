"""The lists: models, traffic presets, placements, and GPUs with their check against published times."""

import textwrap
import tomllib
from argparse import ArgumentParser, Namespace
from importlib import resources
from typing import Any

from sim.cli.terminal import (
    add_output,
    note_compiling,
    print_lines,
    print_rows,
    print_table,
    say,
    say_written,
    shown_progress,
)
from sim.errors import InputError, unknown
from sim.options import TrafficOptions
from sim.options.declare import add_options
from sim.options.kinds import Listed, NewFile, Whole


def add_models(parser: ArgumentParser) -> None:
    """List the model presets: their router, and whether every field was read from the checkpoint."""
    add_output(parser)


def run_models(arguments: Namespace) -> None:
    from sim.model import load_model, model_names

    models = list(map(load_model, model_names()))
    if print_rows(map(vars, models), arguments):
        return
    columns: dict[str, Any] = {
        "model": "name",
        "groups kept": lambda row: f"{row.topk_group} of {row.n_group}" if row.is_grouped else "no",
        "group score": lambda row: row.group_score if row.is_grouped else "-",
        "scoring": "scoring",
        "bias": lambda row: "yes" if row.has_bias else "no",
        "experts": "n_experts",
        "top_k": "top_k",
        "MoE layers": "n_moe_layers",
        "not verified": lambda row: textwrap.shorten("; ".join(row.unverified) or "-", 60, placeholder="..."),
    }
    title = "groups kept: of the router's expert groups, those that a token may use; not verified: not read from the checkpoint"
    print_table(title, models, columns, arguments.markdown, align="<<<<<>>><")


def add_workloads(parser: ArgumentParser) -> None:
    """List the traffic presets: how uneven each is, what it stands for, its source, and how near it is to published figures."""
    add_options(parser, TrafficOptions, only=("model",))
    add, sizes = parser.add_argument, "8,16,32,64"
    add("--ep", type=Listed(of=Whole(1, 2**15)), default=sizes, metavar="LIST", help=f"EP sizes (default: {sizes})")
    add_output(parser)


def run_workloads(arguments: Namespace) -> None:
    import pandas as pd

    from sim.traffic import load_workload, workload_names

    note_compiling()
    rows, fits = _imbalances(arguments.model, arguments.ep)
    found = pd.DataFrame(rows)
    if print_rows(found, arguments):
        return
    title = (
        "Imbalance: mean over layers of max / mean rank load of a large step, linear placement, on the model or on the one that "
        "a preset is fitted to; ± 95 %, over layers"
    )
    lines = []
    for (name, model), of in found.groupby(["workload", "model"], sort=False):
        of_size = {row.ep_size: f"{row.imbalance:.2f} ± {row.high - row.imbalance:.2f}" for row in of.itertuples()}
        lines.append([name, model, *(of_size.get(size, "-") for size in arguments.ep)])
    heads = ["workload", "model", *(f"EP {size}" for size in arguments.ep)]
    print_lines(title, heads, lines, arguments.markdown, align="<<")
    if arguments.markdown:
        return
    for workload in map(load_workload, workload_names()):
        print(f"\n{workload.name}")
        law = ", ".join(f"{key} {value}" for key, value in workload.law.items())
        texts = [("", workload.about), ("law: ", law), ("source: ", workload.source)]
        texts += [("published, and here: ", text) for text in fits[workload.name]]
        for name, text in texts:
            say(f"{name}{text}", "    ", "    " + " " * (8 if name else 0))
    print(
        "\nOn another model than the one that it is fitted to, a preset is an assumption.\n"
        "Recorded routing: file:TRACE, expert ids of tokens in .npz, .npy or JSON lines\n"
        "  (epsim traffic show TRACE).\n"
        "Fitted to a record or to load counts: the .toml file of epsim traffic fit.\n"
        "Your own law: a .toml file with the keys popularity, sigma, group_sigma,\n"
        "  request_sigma, tokens_per_request; local_share, context_tokens, context_shares,\n"
        "  passage_share and passage_tokens where the effect of a request decays, and\n"
        "  strength_sd where requests differ in its strength.\n"
        "Which is nearest to a number in your log: epsim traffic match."
    )


def _imbalances(name: str, ep_sizes: list[int]) -> tuple[list[dict[str, Any]], dict[str, list[str]]]:
    """Imbalance of each preset at each EP size, on the model if it goes with that, else on the one that it is fitted to; and
    in words its published figures with what it has there.
    """
    from sim.fit.made import mean_imbalances, misfits
    from sim.model import load_model
    from sim.progress import track
    from sim.router import model_for
    from sim.traffic import load_workload, workload_names

    asked, names = load_model(name), workload_names()
    rows, fits = [], {}
    with shown_progress():
        for preset in track(names, [1.0] * len(names), names):
            workload = load_workload(preset)
            model = model_for(workload, asked)
            sizes = [size for size in ep_sizes if size <= model.n_experts]
            about = {"workload": preset, "model": model.name}
            rows += [
                {**about, "ep_size": size, "imbalance": mean, "low": mean - half, "high": mean + half}
                for size, (mean, half) in zip(sizes, mean_imbalances(workload, model, sizes), strict=True)
            ]
            fits[preset] = [_fit_text(figure, found) for figure, found in misfits(preset)]
    return rows, fits


def _fit_text(figure: Any, found: Any) -> str:
    """A published figure at its EP sizes, and what the preset has there."""
    parts = []
    for size, wanted, low, high, (mean, half) in zip(
        figure.ep_sizes, figure.imbalance, figure.low, figure.high, found, strict=True
    ):
        text = f"{wanted:.2f}" if low == high else f"{low:.2f} to {high:.2f}"
        parts.append(f"EP {size} {text}, here {mean:.2f} ± {half:.2f} ({mean / wanted - 1:+z.1%})")
    worst = f", the worst of {figure.worst_of} layers" if figure.worst_of > 1 else ""
    return f"{figure.data}{worst}: {'; '.join(parts)}"


def add_placements(parser: ArgumentParser) -> None:
    """List the placements, and say when vLLM runs another one than was asked for."""
    add_output(parser)


def run_placements(arguments: Namespace) -> None:
    from sim.placement import LINEAR_BACKENDS, ROUND_ROBIN_BACKENDS, STRATEGIES

    if print_rows(({"placement": name, "about": text} for name, text in STRATEGIES.items()), arguments):
        return
    if arguments.markdown:
        print_lines("", ["placement", "about"], list(map(list, STRATEGIES.items())), markdown=True, align="<<")
        return
    for name, text in STRATEGIES.items():
        say(text, f"{name:<15}", " " * 15)
    print()
    for text in (
        "With N redundant slots, copies of experts: eplb+N and eplb_refined+N copy the hot ones; linear+N is vLLM's layout "
        "before the first rebalance (slot p holds expert p % n_experts). All slots must divide by the EP size. In a sweep eplb "
        "is fitted on other tokens than those that are scored (--fit-tokens, --fit-on); epsim export writes maps for engines.",
        "eplb_budget+N spends N x layers copies where they pay: by the load of the busiest rank; in gain, step, advise and with "
        "export --gpu by the predicted time of the largest step. Only vllm-ascend loads a map whose layers differ in slots.",
        "More ranks than experts need redundant slots that fill them: --ep 320 --placement eplb+64 on 256 experts.",
        "",
        "vLLM 0.33 falls back to linear where round_robin is asked for, with a warning in its log, when the EP size is 1; the "
        "router has no expert groups (n_group <= 1); there are redundant experts; EPLB is on; or data, prefill context or "
        f"sequence parallelism runs on an all2all backend other than {' or '.join(ROUND_ROBIN_BACKENDS)}, so also on the "
        f"default. These are linear: {', '.join(LINEAR_BACKENDS)}. moonep refuses to start with round_robin.",
    ):
        say(text)


def add_columns(parser: ArgumentParser) -> None:
    """List the columns of the tables that verbs write, and print as --csv and --json, with units and meaning."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="a column, or a table: summary, tail, capacity, gain, advice, "
        "depends, steps, replay, claims, decay, traffic (default: all)")  # fmt: skip
    add_output(parser)


def run_columns(arguments: Namespace) -> None:
    tables = tomllib.loads(resources.files("sim.cli").joinpath("columns.toml").read_text(encoding="utf-8"))
    abouts = {table: columns.pop("_about") for table, columns in tables.items()}
    rows = [
        {"table": table, "column": name, "unit": unit, "meaning": meaning}
        for table, columns in tables.items() for name, (unit, meaning) in columns.items()
    ]  # fmt: skip
    if arguments.name is not None:
        asked = arguments.name.removesuffix(".csv")
        column = asked.removesuffix("_low").removesuffix("_high")
        names = [asked, column, f"{column}_mean", column.removeprefix("baseline_")]
        wanted = {asked, "keys"} if asked in tables else set()
        rows = [row for row in rows if row["table"] in wanted or row["column"] in names]
        if not rows:
            raise unknown("table or column", asked, [*tables, *(name for of in tables.values() for name in of)])
    if print_rows(rows, arguments):
        return
    if arguments.markdown:
        print_lines("", list(rows[0]), [list(row.values()) for row in rows], markdown=True, align="<<<<")
        return
    say("NAME_low and NAME_high are the ends of the 95 % interval of NAME, or of NAME_mean, in its unit.")
    for i, row in enumerate(rows):
        if not i or row["table"] != rows[i - 1]["table"]:
            print()
            say(abouts[row["table"]], "" if row["table"] == "keys" else f"{row['table']}.csv: ", "    ")
        unit = f"({row['unit']}) " if row["unit"] else ""
        say(f"{row['column']:<25} {unit}{row['meaning']}", "  ", " " * 28)


def add_gpus(parser: ArgumentParser) -> None:
    """List GPUs and kinds of exchange, with the sources of their numbers; or check predicted times against published ones."""
    add = parser.add_argument
    add("--check", action="store_true", help="how far predicted times are from published ones instead")
    figure = NewFile(endings=(".png", ".svg"))
    add("--plot", type=figure, metavar="FILE", help="with --check: draw them too, as .png or .svg")
    add_output(parser)


def run_gpus(arguments: Namespace) -> None:
    from sim.cost import gpu_names, load_gpu
    from sim.cost.exchange import BACKENDS, KINDS, REFUSED
    from sim.cost.gpu import DTYPES
    from sim.cost.tables import exchange_profiles, grouped_gemm_profile

    if arguments.check:
        _check(arguments)
        return
    if arguments.plot is not None:
        raise InputError("--plot goes with --check")
    gpus = [load_gpu(name) for name in gpu_names()]
    if print_rows(map(vars, gpus), arguments):
        return
    columns: dict[str, Any] = {
        "gpu": "name", "HBM TB/s": "hbm_tb_per_s:g", "BF16 TFLOPS": "bf16_tflops:g", "FP8 TFLOPS": "fp8_tflops:g",
        "FP4 TFLOPS": "fp4_tflops:g", "NVLink GB/s": "scale_up_gb_per_s:g", "network GB/s": "scale_out_gb_per_s:g",
        "not verified": lambda row: ", ".join(row.unverified) or "-",
    }  # fmt: skip
    title = "Peaks are dense; links are per GPU and direction"
    print_table(title, gpus, columns, arguments.markdown, align="<>>>>>><")
    if arguments.markdown:
        return
    print("\nSources:")
    for gpu in gpus:
        say(f"{gpu.name}: {gpu.source}", "  ", "    ")
    kernels = "; ".join(f"{dtype}, {grouped_gemm_profile(dtype).name}" for dtype in DTYPES)
    say(f"Expert times: {kernels}.")
    own = {name: [gpu for of in exchange_profiles() if of.kind == name for gpu in of.gpus] for name in BACKENDS}
    own = {name: gpus for name, gpus in own.items() if gpus}
    print("Exchanges (--exchange), by kind or backend:")
    for kind, about in KINDS.items():
        backends = [backend + ("*" if backend in own else "") for backend, of in BACKENDS.items() if of == kind]
        say(f"{kind}: {about}" + (f" ({', '.join(backends)})" if backends else ""), "  ", "    ")
    listed = "; ".join(f"{name} on {', '.join(of)}" for name, of in own.items())
    say(f"* has times of its own, {listed}; all others are taken to have those of their kind.")
    say(f"Not among them: {'; '.join(f'{name}: {why}' for name, why in REFUSED.items())}.")
    say(
        "Your own GPU: a .toml file with hbm_tb_per_s, bf16_tflops, scale_up_gb_per_s, and fp8_tflops, fp4_tflops, "
        "scale_out_gb_per_s where it has them."
    )


def _check(arguments: Namespace) -> None:
    import pandas as pd

    from sim.cost.refit import exchanges_of_others, predicted_against_measured

    check, others = predicted_against_measured(), exchanges_of_others()
    if not print_rows(pd.concat([check, others.assign(fitted=False)], ignore_index=True), arguments):
        _print_check(check, others, arguments.markdown)
    if arguments.plot is not None:
        from sim.figures import save
        from sim.figures.measured import published_kernels

        save(published_kernels(check[check.source == "moe_decode"]), arguments.plot)
        say_written(f"written to {arguments.plot}", arguments)


def _print_check(check: Any, others: Any, markdown: bool) -> None:
    from sim.cost.tables import measured

    keys = ["part", "gpu", "dtype", "source"]
    lines = [
        [*of, str(len(rows)), *_errors(rows.error[rows.fitted]), *_errors(rows.held_out_error.dropna())]
        for of, rows in check.groupby(keys, sort=False)
    ]
    heads = ["part", "gpu", "type", "published table", "rows", "fitted: median", "worst", "held out: median", "worst"]
    title = (
        "Predicted against published times of DeepSeek-V3, absolute errors.\n"
        "Fitted: by the constants that epsim uses. Held out: by a fit without the row's\n"
        "EP size (experts) or tokens per rank (exchange); moe_decode: no fit saw it"
    )
    print_lines(title, heads, lines, markdown, align="<<<<>>>>>", keys=4)
    lines = [
        [*of, str(len(rows)), *(f"{rows.error.quantile(q):+.0%}" for q in (0, 0.5, 1))]
        for of, rows in others.groupby(keys, sort=False)
    ]
    print()
    title = "Predicted against exchange times of other versions, backends and shapes, which no fit saw"
    heads = ["part", "gpu", "type", "published table", "rows", "least", "median", "most"]
    print_lines(title, heads, lines, markdown, align="<<<<>>>>", keys=4)
    if not markdown:
        print()
        say(
            "pair: DeepEP low latency as launched from Python, an upper bound for decode in CUDA graphs; its kernels alone "
            "take 0.2 to 0.55 of that within a node (low_latency_kernels, both ways together)."
        )
        print("\nHeld out by more than 25 %, so take such cells as extrapolated:")
        for row in check[check.held_out_error.abs() > 0.25].itertuples():
            print(
                f"  {row.part} {row.gpu} {row.dtype}: EP {row.ep_size}, {row.tokens} tokens, {row.held_out_error:+.0%}"
            )
        print("\nPublished tables:")
        for source in (*check.source.unique(), *others.source.unique()):
            say(f"{source}: {measured()[source]['source']}", "  ", "    ")
        say(
            "Not in them, so not verified: h20. In bf16, and token, gather and reduce: epsim measure --show, results/measured"
        )


def _errors(values: Any) -> list[str]:
    """Median and largest of some errors, absolute."""
    return [f"{values.abs().median():.1%}", f"{values.abs().max():.1%}"] if len(values) else ["-", "-"]
