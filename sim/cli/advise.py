"""Should I turn it on for my traffic? Compare placements on recorded routing or measured loads, and judge them."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.text import estimate, note, print_table
from sim.cli.timed import EXTRAPOLATED_TEXT, KNEE_TEXT, identity_of, say_about_times, step_options
from sim.errors import InputError
from sim.options import Folder, RestOptions, Share, StepOptions, TimeOptions, TrafficOptions, Whole, add_options, given


def add_arguments(parser: ArgumentParser) -> None:
    """Add the options of `epsim advise`."""
    add = parser.add_argument
    add(
        "--traffic",
        required=True,
        metavar="FILE",
        help="recorded routing or load counts (as epsim traffic reads them), or a workload: preset or .toml",
    )
    add(
        "--fit-on",
        metavar="FILE",
        help="other traffic of the same layers to fit eplb on (default: a part of --traffic)",
    )
    add("--gpu", default="h20", metavar="GPU", help="a GPU (epsim gpus), or a .toml file of your own (default: h20)")
    add(
        "--backend",
        default="allgather_reducescatter",
        help="all2all backend: allgather_reducescatter (default, as in vLLM), deepep_low_latency, deepep_high_throughput "
        "or nixl_ep",
    )
    add("--data-parallel", type=Whole(), metavar="N", help="data-parallel ranks (default: the EP size)")
    add(
        "--redundant",
        type=Whole(),
        metavar="R",
        help="compare eplb with 0, R and 2R redundant slots (default: the EP size)",
    )
    add(
        "--worth",
        dest="least_saved",
        type=Share(),
        default="2%",
        metavar="SHARE",
        help="saved share of the step that is worth a trial (default: 2%%)",
    )
    add_options(parser, RestOptions)
    add_options(parser, TrafficOptions, only=("model", "phase", "dummy_tokens"))
    add_options(parser, StepOptions, ep_sizes="16", tokens=None, most_steps="128", layer_sets="8")
    add_options(parser, TimeOptions, only=("dtype", "network_gb_per_s"))
    add("--markdown", action="store_true", help="print the table alone, as Markdown")
    add("--out", type=Folder(), metavar="DIR", help="write advice.csv, advice.json and the figure there")


def run(arguments: Namespace) -> None:
    """Run `epsim advise`."""
    if arguments.tokens is None and arguments.tokens_per_rank is None:
        arguments.tokens_per_rank = [1, 8, 64, 512]
    options = step_options(arguments)
    sizes = options.pop("ep_sizes")
    if len(sizes) > 1:
        raise InputError(f"`ep_sizes` {','.join(map(str, sizes))}: advice is for one EP size")
    chosen = {name: getattr(arguments, name) for name in ("backend", "data_parallel", "redundant", "least_saved")}
    chosen |= given(arguments, RestOptions)
    folder = arguments.out
    from sim.cost import load_gpu
    from sim.model import load_model

    model, gpu = load_model(arguments.model), load_gpu(arguments.gpu)
    traffic, other = _read(arguments, model)
    _say_about_steps(traffic, 2 if other is None else 1, sizes[0], options)
    from sim.advice import BACKENDS, advise

    exchange = BACKENDS.get(arguments.backend, "none")
    say_about_times(options | {"model": model, "workload": traffic, "exchange": exchange}, [gpu])
    advice = advise(model, traffic, gpu, ep_size=sizes[0], fit_on=other, **chosen, **options)
    for text in advice.notes:
        note(text)
    _print(advice, arguments)
    if folder is not None:
        chosen |= {"ep_size": sizes[0], "fit_on": None if other is None else other.digest}
        identity = identity_of(options | {"model": model, "workload": traffic}, [gpu], **chosen)
        _write(advice, folder, identity)


def _read(arguments: Namespace, model: Any) -> tuple[Any, Any]:
    """Traffic that is scored, and other traffic to fit on or None."""
    from sim.traffic import LoadCounts, load_workload, read_traffic
    from sim.traffic.read import names_file

    def read(name: str) -> Any:
        found = read_traffic(
            Path(name.removeprefix("file:")), model, "decode" if arguments.phase is None else arguments.phase
        )
        for text in found.notes:
            note(text)
        return found

    name, dummies = arguments.traffic, arguments.dummy_tokens
    if not names_file(name):
        traffic = load_workload(name, phase=arguments.phase, dummy_tokens=dummies)
    elif dummies is not None:
        raise InputError("--dummy-tokens goes with traffic by law, not with a file of recorded traffic")
    else:
        traffic = read(name)
    if isinstance(traffic, LoadCounts) and arguments.phase is not None:
        raise InputError(f"--phase goes with recorded tokens, not with load counts ({name})")
    return traffic, None if arguments.fit_on is None else read(arguments.fit_on)


def _say_about_steps(traffic: Any, parts: int, ep_size: int, options: dict[str, Any]) -> None:
    """A remark where steps have more tokens than there are sequences to take them from."""
    from sim.traffic import RecordedTraffic

    largest = max(options["tokens"]) * (ep_size if options["tokens_per_rank"] else 1)
    if not isinstance(traffic, RecordedTraffic) or traffic.phase != "decode":
        return
    n_sequences = (len(traffic.starts) - 1) // parts
    if largest > n_sequences:
        note(
            f"what is scored of {traffic.name} has {n_sequences} sequences: larger decode steps take several tokens of each, "
            "and are as uneven as these sequences together, not as so many requests"
        )


def _print(advice: Any, arguments: Namespace) -> None:
    from sim.advice import changes, rule_text, verdict_text

    least = arguments.least_saved
    _print_table(advice, arguments.markdown)
    if arguments.markdown:
        return
    if advice.gains.extrapolated.any():
        print(EXTRAPOLATED_TEXT)
    if advice.gains.knee.any():
        print(f"{KNEE_TEXT}; the crossover lies at {advice.gains.crossover_tokens.iloc[0]:.0f} tokens")
    row = advice.gains.iloc[0]
    print(f"\nVerdict: {verdict_text(advice)}\nRule: {rule_text(least)}")
    print(f"Splits: {'; '.join(dict.fromkeys(advice.gains.split))}.")
    if arguments.moe_share is None and arguments.step_us is None:
        print(f"The share {row.moe_share:.0%} is an assumption: give --moe-share, or --step-ms as you measured it.")
    print("\nWhat the engine does:")
    for name, text in advice.engines.items():
        print(f"  {name}: {text}")
    print("\nWhat would change the verdict:")
    for text in changes(advice, least):
        print(f"  - {text}")


def _print_table(advice: Any, markdown: bool) -> None:
    main = advice.gains[advice.gains.split == advice.gains.split.iloc[0]]
    row = main.iloc[0]
    title = (
        f"{row.model} in {row['dtype']}, EP {row.ep_size} on {row.gpu}, {row.workload}, {_exchange_text(row)}\n"
        f"eplb is {row.split}{_of_splits(advice)}; saved: against linear, 95 % over {row.layer_draws} layers;\n"
        "step: weakest lower to strongest upper end over all splits of the traffic, of a step of which experts"
        f"{'' if row.exchange == 'none' else ' and exchange'} take {row.moe_share:.0%}"
    )
    heads = ["tokens", "placement", "imbalance", "idle ranks", "ranks /token", "nodes /token", "layer us"]
    heads += ["layer saved", "step saved", "GB /GPU", "verdict"]
    judged = {(row.placement, row.tokens): row for row in advice.verdicts.itertuples()}
    cells = []
    for tokens, rows in main.groupby("tokens", sort=False):
        first = rows.iloc[0]
        layer = _layer_us(first.baseline_layer_us, first)
        cells.append([str(tokens), "linear", *_loads(first, "baseline_"), layer, "", "", "", ""])
        cells += [_candidate(row, judged.get((row.placement, tokens))) for row in rows.itertuples()]
    print_table(title, heads, cells, markdown, align=">" + "<" + ">" * 8 + "<")


def _exchange_text(row: Any) -> str:
    if row.exchange == "none":
        return "layer: experts of the slowest rank (the exchange does not depend on the placement)"
    return f"layer: experts of the slowest rank, dispatch and combine ({row.exchange})"


def _of_splits(advice: Any) -> str:
    n = advice.gains.split.nunique()
    return f" (the hardest of {n} splits)" if n > 1 else ""


def _candidate(row: Any, judged: Any) -> list[str]:
    """Cells of a candidate, or of perfect balance, which is not judged."""
    return [
        str(row.tokens),
        row.placement,
        *_loads(row, ""),
        _layer_us(row.layer_us, row),
        estimate(row.layer_saved, row.layer_saved_high, "+z.1%") + ("~" if row.knee else " "),
        "" if judged is None else _ends(judged),
        f"{row.redundant_bytes / 1e9:.2f}" if row.redundant_bytes else "",
        _verdict(judged),
    ]


def _layer_us(value: float, row: Any) -> str:
    return f"{value:.0f}" + ("*" if row.extrapolated else "")


def _ends(row: Any) -> str:
    """Ends of the step's saved share; - where one layer has no interval."""
    if row.step_saved_low != row.step_saved_low:
        return "-"
    return f"{row.step_saved_low:+z.1%} to {row.step_saved_high:+z.1%}"


def _verdict(row: Any) -> str:
    """The verdict as a cell, or why there is none."""
    if row is None:
        return ""
    if row.runs_as != row.placement:
        return f"vLLM runs {row.runs_as}" if row.runs_as else "no engine's option"
    return row.verdict + (
        f" (worth it in {row.splits_worth} of {row.splits} splits)" if 0 < row.splits_worth < row.splits else ""
    )


def _loads(row: Any, prefix: str) -> list[str]:
    """Imbalance with its interval, idle ranks and fan-out, as cells; of perfect balance the imbalance alone."""
    imbalance = estimate(getattr(row, f"{prefix}imbalance"), getattr(row, f"{prefix}imbalance_high"), ".2f")
    others = [getattr(row, prefix + name) for name in ("idle_ranks", "ranks_per_token", "nodes_per_token")]
    texts = ["" if value != value else f"{value:.2f}" for value in others]
    return ["1" if not any(texts) else imbalance, *texts]


def _write(advice: Any, folder: Path, identity: dict[str, Any]) -> None:
    from sim.cost.gain import PERFECT
    from sim.figures import save
    from sim.figures.advice import advice_by_tokens
    from sim.results import writable_folder, write_table

    with writable_folder(folder):
        write_table(advice.table(), folder, "advice", identity)
        for suffix in ("png", "svg"):
            save(advice_by_tokens(advice.gains, PERFECT), folder / f"advice.{suffix}")
    print(f"\nwritten to {folder}: advice.csv, advice.json (what made it), advice.png and .svg")
