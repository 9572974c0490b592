"""`epsim advise`: placements compared on your own traffic, and a verdict."""

from argparse import ArgumentParser, Namespace
from typing import Any

from sim.cli.gain import EXTRAPOLATED_TEXT, knee_text, layer_saved, say_break_even
from sim.cli.inputs import identity_of, read_file, say_about_maps, say_about_times, step_options
from sim.cli.terminal import (
    add_output,
    answer,
    cells,
    estimate,
    is_alone,
    note,
    note_compiling,
    print_lines,
    say,
    shown_progress,
)
from sim.errors import InputError, counted
from sim.files import model_label
from sim.options import GpuOptions, PlacedOptions, RestOptions, StepOptions, TimeOptions, TrafficOptions
from sim.options.declare import add_options, given, section_of
from sim.options.kinds import NAMES, Whole

_DEMO = "gpt-oss-20b"
_DEMO_TOKENS, _DEMO_SEQUENCES = 32_768, 256
_RECORD_TEXT = """How to record your own traffic, a few hundred requests of it:
  vLLM    vllm serve MODEL --enable-return-routed-experts
          append each answer, which has routed_experts, as a line to trace.jsonl
  SGLang  python -m sglang.launch_server --model-path MODEL \\
            --enable-return-routed-experts
          ask with "return_routed_experts": true, and append answers likewise
  SGLang, load counts alone: --expert-distribution-recorder-mode stat, then POST
          /start_expert_distribution_record and /dump_expert_distribution_record
Then: epsim advise --model MODEL --workload file:trace.jsonl --ep R --gpu GPU"""


def add_advise(parser: ArgumentParser) -> None:
    """Should I turn it on for my traffic? Compare placements on recorded routing or measured loads, and judge them.

    For one EP size.
    """
    add_options(parser, TrafficOptions, only=("model", "phase", "dummy_tokens"))
    add = section_of(parser, TrafficOptions.title).add_argument
    add("--workload", metavar="WORKLOAD", help="file:TRACE of recorded routing or load counts (as epsim traffic reads them), a "
        ".toml file, or a preset")  # fmt: skip
    add("--demo", action="store_true", help=f"instead of --workload: a trace that is made from the preset {_DEMO}")
    add_options(parser, GpuOptions, only=("gpu", "least_saved"), least_saved="2%")
    add = section_of(parser, GpuOptions.title).add_argument
    add("--placement", dest="placements", type=NAMES, default="linear", metavar="LIST", help="the baseline, as in file:CURRENT "
        "for the map that runs now; then those that are compared with it (default: linear, and round_robin, random, eplb with 0, "
        "R and 2R redundant slots, and eplb_budget+R; with copies also in_step, the best split of each step's pairs over those "
        "of the placement that has the most)")  # fmt: skip
    add("--redundant", type=Whole(), metavar="R", help="compare eplb with 0, R and 2R redundant slots, and a budget of R for "
        "each layer (default: the EP size)")  # fmt: skip
    add_options(parser, PlacedOptions, only=("fit_on",))
    add_options(parser, StepOptions, ep_sizes="16", tokens=None, most_steps="128", layer_sets="8", helps={
        "tokens": "tokens per step over the whole EP group (default: 1, 8, 64 and 512 on each rank)"})  # fmt: skip
    add = section_of(parser, TimeOptions.title).add_argument
    add("--exchange", dest="backend", default="allgather_reducescatter", metavar="NAME", help="all2all backend, or a kind of "
        "exchange (epsim gpus; default: allgather_reducescatter, as in vLLM)")  # fmt: skip
    add("--data-parallel", type=Whole(), metavar="N", help="data-parallel ranks (default: the EP size)")
    add_options(parser, TimeOptions, only=("dtype", "network_gb_per_s"))
    add_options(parser, RestOptions)
    add_output(parser, "advice.csv and the figure", figures=True)


def run_advise(arguments: Namespace) -> None:
    from sim.advice import advise
    from sim.cost import load_gpu
    from sim.model import load_model

    if arguments.tokens is None and arguments.tokens_per_rank is None:
        arguments.tokens_per_rank = [1, 8, 64, 512]
    sizes = arguments.ep_sizes
    if len(sizes) > 1:
        raise InputError(f"`ep_sizes` {','.join(map(str, sizes))}: advice is for one EP size; run it for each")
    if arguments.demo and arguments.workload is not None:
        raise InputError("`demo` makes its own traffic: it does not go with `workload`")
    if not arguments.demo and arguments.workload is None:
        raise InputError("epsim advise needs --workload file:TRACE; --demo advises on a trace that it makes")
    names = ("placements", "backend", "data_parallel", "redundant", "least_saved")
    chosen = {name: getattr(arguments, name) for name in names}
    chosen |= given(arguments, RestOptions)
    model, gpu = load_model(_DEMO if arguments.demo else arguments.model), load_gpu(arguments.gpu)
    options = step_options(arguments, model, [gpu])
    del options["ep_sizes"]
    traffic = _demo_trace(model, arguments.seed) if arguments.demo else _read(arguments, model)
    other = None if arguments.fit_on is None else read_file(arguments.fit_on, model, arguments.phase)
    say_about_maps(arguments.placements, model, sizes, arguments.ranks_per_node)
    _say_about_steps(traffic, 2 if other is None else 1, sizes[0], options)
    exchange = "none" if arguments.data_parallel == 1 else arguments.backend
    say_about_times(model, traffic, [gpu], options | {"exchange": exchange})
    with shown_progress():
        advice = advise(model, traffic, gpu, ep_size=sizes[0], fit_on=other, **chosen, **options)
    note(*advice.notes)
    if is_alone(arguments) and advice.why:  # without the words
        note(f"{advice.verdict}: {advice.why}")
    chosen |= {"ep_size": sizes[0], "fit_on": None if other is None else other.digest}
    identity = identity_of(model, traffic, options, [gpu], **chosen)

    def figures() -> dict[str, Any]:
        from sim.advice.words import not_run, perfect_text
        from sim.cost.gain import PERFECT
        from sim.figures.gain import advice_by_tokens

        drawn = advice.gains[~advice.gains.placement.isin(list(not_run(advice)))]
        return {"advice": advice_by_tokens(drawn, PERFECT, perfect_text(drawn))}

    tables = {"advice": advice.table()}
    answer(arguments.out, arguments, lambda: _print(advice, arguments), tables, identity, figures)
    if arguments.demo and not is_alone(arguments):
        print(f"\n{_RECORD_TEXT}")


def _demo_trace(model: Any, seed: int) -> Any:
    """Routing of synthetic requests, of the preset that is fitted to recorded ones."""
    from sim.fit.made import make_traffic
    from sim.traffic import load_workload

    note_compiling()
    workload = load_workload(_DEMO, phase="prefill")  # tokens of a request share its effect, in answers too
    with shown_progress():
        trace = make_traffic(workload, model, _DEMO_TOKENS, _DEMO_SEQUENCES, seed)  # type: ignore[arg-type]
    sizes = f"--tokens {_DEMO_TOKENS} --sequences {_DEMO_SEQUENCES} --seed {seed}"
    note(
        f"--demo: {_DEMO_TOKENS} tokens of {_DEMO_SEQUENCES} requests, made from the preset {_DEMO}. To have them as a file: "
        f"epsim traffic make --model {_DEMO} --workload {_DEMO} --phase prefill {sizes} --out TRACE.npz"
    )
    return trace


def _read(arguments: Namespace, model: Any) -> Any:
    """Traffic that is scored."""
    from sim.traffic import LoadCounts, load_workload
    from sim.traffic.read import names_file

    name, dummies = arguments.workload, arguments.dummy_tokens
    if not names_file(name):
        return load_workload(name, phase=arguments.phase, dummy_tokens=dummies)
    if dummies is not None:
        raise InputError("--dummy-tokens goes with synthetic traffic, not with a file of recorded traffic")
    traffic = read_file(name, model, arguments.phase)
    if isinstance(traffic, LoadCounts) and arguments.phase is not None:
        raise InputError(f"--phase goes with recorded tokens, not with load counts ({name})")
    return traffic


def _say_about_steps(traffic: Any, parts: int, ep_size: int, options: dict[str, Any]) -> None:
    """A remark where steps have more tokens than the record, or than it has sequences to take them from."""
    from sim.traffic import RecordedTraffic

    largest = max(options["tokens"]) * (ep_size if options["tokens_per_rank"] else 1)
    if not isinstance(traffic, RecordedTraffic) or traffic.n_sequences < parts:  # which is an error
        return
    n_tokens, n_sequences = traffic.n_tokens // parts, traffic.n_sequences // parts
    if largest > n_tokens or (largest > n_sequences and traffic.phase == "decode"):
        take = "tokens more than once" if largest > n_tokens else "several tokens of each"
        note(
            f"{traffic.name}: {counted(n_sequences, 'sequence')} scored, of {counted(n_tokens, 'token')}; larger steps "
            f"take {take}, and are as uneven as these sequences together, not as so many requests"
        )


def _print(advice: Any, arguments: Namespace) -> None:
    from sim.advice.compare import rule_text
    from sim.advice.words import changes, not_run, verdict_text

    least, row = arguments.least_saved, advice.gains.iloc[0]
    if arguments.markdown:
        _print_table(advice, arguments)
        return
    say(
        f"{model_label(row.model)} in {row['dtype']}, EP {row.ep_size} on {row.gpu}, {row.workload}, against {row.baseline}"
    )
    first, *lines = verdict_text(advice).splitlines()
    say(f"Verdict: {first}")
    is_assumed = arguments.moe_share is None and arguments.step_us is None
    assumed = " (assumed: give --moe-share, or --step-ms as you measured it)" if is_assumed else ""
    take = "take" if row.exchange == "none" else "and exchange take"
    say(
        f"Saved share of the step by tokens per step; experts {take} {row.moe_share:.0%} of a step"
        f"{assumed}, and from {least:.1%} on a placement is worth a trial:"
    )
    for line in lines:
        say(line, "  ", "      ")
    print()
    _print_table(advice, arguments)
    refused = not_run(advice)
    if refused:
        print("\nNot run, so without a gain:")
        for name, text in refused.items():
            say(f"{name}: {text}", "  ", "    ")
    print()
    held = advice.gains[(advice.gains.redundant_bytes > 0) & (advice.gains.copies_of == "")].drop_duplicates(
        "placement"
    )
    if len(held):
        listed = [
            f"{row.redundant_bytes / 1e9:.2f} GB ({row.placement}{', at most' if 'budget' in row.placement else ''})"
            for row in held.itertuples()
        ]
        say(f"Memory of redundant slots on each GPU: {', '.join(listed)}.")
    say_break_even(advice.gains[advice.gains.split == advice.gains.split.iloc[0]])
    if advice.gains.extrapolated.any():
        say(EXTRAPOLATED_TEXT)
    if advice.gains.knee.any():
        first = advice.gains.iloc[0]
        say(f"{knee_text(first['dtype'])}; the crossover lies at {first.crossover_tokens:.0f} tokens")
    say(f"Rule: {rule_text(least)}")
    say(f"Splits: {'; '.join(dict.fromkeys(advice.gains.split))}.")
    print("\nWhat the engine does:")
    for names, text in advice.engines.items():
        if not set(names.split(", ")) <= set(refused):
            say(f"{names}: {text}", "  ", "    ")
    print("\nWhat would change the verdict:")
    for text in changes(advice, least):
        say(text, "  - ", "    ")


_IN_FILE = ("idle ranks", "ranks /token", "nodes /token", "GB /GPU", "verdict")
"""Columns that the terminal leaves to advice.csv: memory, and who is not run, stand below the table."""


def _print_table(advice: Any, arguments: Namespace) -> None:
    from sim.advice.words import perfect_text
    from sim.cost.gain import PERFECT

    main = advice.gains[advice.gains.split == advice.gains.split.iloc[0]]
    row = main.iloc[0]
    title = (
        f"{_exchange_text(row, arguments)}\n"
        f"{_split_text(advice)}; saved: against {row.baseline}, 95 % over {counted(row.layer_draws, 'layer')};\n"
        "step: weakest lower to strongest upper end over all splits of the traffic, of a step of which experts"
        f"{'' if row.exchange == 'none' else ' and exchange'} take {row.moe_share:.0%}"
    )
    if (text := perfect_text(main)) != PERFECT:
        title += f"\n{text}: a placement whose ranks receive fewer can save more"
    columns: dict[str, Any] = {
        "tokens": "tokens",
        "placement": "placement",
        "imbalance": lambda row: (
            "1" if row.placement == PERFECT else estimate(row.imbalance, row.imbalance_high, ".2f")
        ),
        "idle ranks": "idle_ranks:.2f",
        "ranks /token": "ranks_per_token:.2f",
        "nodes /token": "nodes_per_token:.2f",
        "layer us": lambda row: f"{row.layer_us:.0f}" + ("*" if row.extrapolated else ""),
        "layer saved": layer_saved,
        "step saved": _ends,
        "GB /GPU": lambda row: f"{row.redundant_bytes / 1e9:.2f}" if row.redundant_bytes > 0 else "-",
        "verdict": _verdict,
    }
    rows = _with_baseline(main).merge(advice.verdicts, how="left", on=["placement", "tokens"], suffixes=("_here", ""))
    is_run = (rows.runs_as.isna() | (rows.runs_as == rows.placement)).tolist()
    if arguments.markdown:
        heads, lines = cells(rows.itertuples(), columns)
        lines = [line if run else [*line[:2], *["-"] * 8, line[-1]] for line, run in zip(lines, is_run, strict=True)]
    else:
        shown = {head: what for head, what in columns.items() if head not in _IN_FILE}
        heads, lines = cells(rows[is_run].itertuples(), shown)
        lines = [["" if i and lines[i - 1][0] == line[0] else line[0], *line[1:]] for i, line in enumerate(lines)]
    print_lines(title, heads, lines, arguments.markdown, align="><" + ">" * 8 + "<", keys=2)


def _with_baseline(gains: Any) -> Any:
    """Gains with a row for the baseline above those of each number of tokens."""
    import pandas as pd

    first = gains.drop_duplicates("tokens")
    own = {name.removeprefix("baseline_"): first[name] for name in first if name.startswith("baseline_")}
    nothing = dict.fromkeys(["layer_saved", "redundant_bytes"], float("nan"))
    baseline = first.assign(placement=first.baseline, knee=False, **own, **nothing)
    return pd.concat([baseline, gains]).sort_values("tokens", kind="stable")


def _exchange_text(row: Any, arguments: Namespace) -> str:
    """What a layer's time is, and whose times the exchange has."""
    from sim.cost.exchange import exchange_kind
    from sim.cost.tables import exchange_profile

    if row.exchange == "none":
        return "layer: experts of the slowest rank (the exchange does not depend on the placement)"
    kernels = exchange_profile(exchange_kind(row.exchange), row.gpu, row.exchange).kernels
    asked = row.exchange if arguments.data_parallel == 1 else arguments.backend
    name = row.exchange if asked == row.exchange else f"{asked}, as {row.exchange}"
    return f"layer: experts of the slowest rank, dispatch and combine ({name}: times of {kernels})"


def _split_text(advice: Any) -> str:
    n, name = advice.gains.split.nunique(), advice.gains.split.iloc[0]
    fitted = advice.gains.placement.str.startswith("eplb").any() or advice.gains.baseline.str.startswith("eplb").any()
    return (f"eplb is {name}" if fitted else f"traffic {name}") + (f" (the hardest of {n} splits)" if n > 1 else "")


def _ends(row: Any) -> str:
    """Ends of the step's saved share; - where one layer has no interval, and of what is not judged."""
    if row.step_saved_low != row.step_saved_low:
        return "-"
    return f"{row.step_saved_low:+z.1%} to {row.step_saved_high:+z.1%}"


def _verdict(row: Any) -> str:
    """The verdict as a cell, or why there is none."""
    if row.verdict != row.verdict:
        return "-"
    if row.runs_as != row.placement:
        return f"vLLM runs {row.runs_as}" if row.runs_as else "no engine's option"
    worth_in = f" (worth it in {row.splits_worth:.0f} of {row.splits:.0f} splits)"
    return row.verdict + (worth_in if 0 < row.splits_worth < row.splits else "")
