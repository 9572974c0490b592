"""`epsim depends`: what placements save under every kind of traffic, and which conclusions hold for all of it."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from sim.cli.gain import SEVERAL_EXCHANGES
from sim.cli.inputs import check_there, law_of, rows_of, say_about_times, step_options
from sim.cli.terminal import add_output, answer, estimate, note, pivoted, print_lines, say, shown_progress
from sim.errors import InputError, counted
from sim.options import GpuOptions, StepOptions, TimeOptions, TrafficOptions
from sim.options.declare import add_options, section_of
from sim.options.kinds import NAMES, WHOLE_NUMBERS, Choice

_EP_SIZES, _TOKENS = "8,16,32,64", "64,16384"


def add_depends(parser: ArgumentParser) -> None:
    """What placements save under every kind of traffic, and which conclusions hold for all of it.

    One kind of traffic at one EP size takes some ten seconds, all presets several minutes.
    """
    add_options(parser, GpuOptions, only=("gpu", "baseline", "least_saved"), least_saved="1%",
        helps={"least_saved": "smallest change that counts: of a layer's time, or of the busiest rank's load"})  # fmt: skip
    add = section_of(parser, GpuOptions.title).add_argument
    add("--placement", dest="placements", type=NAMES, metavar="LIST", help="placements that are compared with it; +R is one "
        "redundant slot on each rank (default: round_robin,eplb,eplb+R)")  # fmt: skip
    add_options(parser, TrafficOptions, only=("model",))
    add = section_of(parser, TrafficOptions.title).add_argument
    add("--workload", type=NAMES, metavar="LIST", help="presets or .toml files (default: all presets)")
    add("--trace", dest="traces", nargs="+", action="append", default=[], metavar=("MODEL FILE", "FIT_ON"),
        help="also recorded routing or load counts of a model, and optionally another file to fit eplb on; left out, with a "
        "note, where a file is not there (may be repeated)")  # fmt: skip
    steps = {"ep_sizes": _EP_SIZES, "tokens": _TOKENS, "most_steps": "64", "layer_sets": "16"}
    add_options(parser, StepOptions, without="tokens_per_rank", **steps,
        helps={"tokens": "tokens per step over the whole EP group"})  # fmt: skip
    add_options(parser, TimeOptions, only=("exchange", "network_gb_per_s"), exchange="pair,token",
        helps={"exchange": SEVERAL_EXCHANGES})  # fmt: skip
    add = section_of(parser, TimeOptions.title).add_argument
    add("--dtype", default="fp8", help="type of weights and inputs, of all models: fp8, bf16 or fp4 (default: fp8)")
    add_output(parser, "depends.csv and the figure", figures=True)
    add = section_of(parser, "output").add_argument
    add("--show", type=Path, metavar="DIR", help="compute nothing; print what --out wrote (of --ep, --tokens ...)")
    add("--table", type=Choice(names=("conclusions", "saved")), default="conclusions", help="conclusions (default), or "
        "saved: the numbers")  # fmt: skip


def run_depends(arguments: Namespace) -> None:
    if arguments.show is None:
        table, identity = _compute(arguments)
    elif arguments.out is not None:
        raise InputError("`out` goes without `show`: what was computed is only read")
    else:
        table, identity = _read(arguments), {}

    def show() -> None:
        if arguments.table == "saved":
            _print_saved(table, arguments.markdown)
        else:
            _print_conclusions(table, arguments.least_saved, arguments.markdown)

    def figures() -> dict[str, Any]:
        from sim.figures.gain import gain_by_traffic

        return {"depends": gain_by_traffic(table)}

    answer(arguments.out, arguments, show, {"depends": table}, identity, figures)


def _compute(arguments: Namespace) -> tuple[Any, dict[str, Any]]:
    """The table, and all that it depends on as JSON values."""
    from dataclasses import asdict

    from sim.advice.dependence import PLACEMENTS, Subject, saved_by_traffic
    from sim.cost import load_gpu
    from sim.model import load_model
    from sim.router import model_for
    from sim.traffic import load_workload, workload_names

    gpu, asked = load_gpu(arguments.gpu), load_model(arguments.model)
    options = step_options(arguments, asked, [gpu])
    options["exchange"] = options["exchange"].split(",")
    workloads = [load_workload(name) for name in arguments.workload or workload_names()]
    subjects = [Subject(model_for(workload, asked), workload) for workload in workloads]
    subjects += [subject for words in arguments.traces if (subject := _of_trace(words)) is not None]
    for subject in subjects:
        say_about_times(subject.model, subject.traffic, [gpu], options)
    chosen = {"placements": arguments.placements or list(PLACEMENTS), "baseline": arguments.baseline}
    with shown_progress():
        table = saved_by_traffic(subjects, gpu, **chosen, **options)
    about = [
        {"workload": subject.name, "model": subject.model.name, "law": law_of(subject.traffic)} for subject in subjects
    ]
    identity = {name: value for name, value in options.items() if name != "threads"} | chosen
    return table, identity | {"gpu": asdict(gpu), "traffic": about}


def _of_trace(words: list[str]) -> Any:
    """A subject of --trace MODEL FILE [FIT_ON]; None, and a note, where a file is not there."""
    from sim.advice.dependence import Subject
    from sim.files import is_there
    from sim.model import load_model
    from sim.traffic import read_traffic

    if not 2 <= len(words) <= 3:
        raise InputError(f"--trace {' '.join(words)}: takes MODEL FILE, or MODEL FILE FIT_ON")
    try:
        model = load_model(words[0])
    except InputError as error:
        raise InputError(f"--trace {' '.join(words)}: {str(error).replace('`', '')}") from None
    paths = [Path(word.removeprefix("file:")) for word in words[1:]]
    for path in paths:
        if not is_there(path):
            note(f"{path} is not there: left out")
            return None
    traffic, *other = (read_traffic(path, model) for path in paths)
    for text in traffic.notes:
        note(f"{traffic.name}: {text}")
    return Subject(model, traffic, *other)


def _read(arguments: Namespace) -> Any:
    """Rows of a folder, those that are asked for."""
    from sim.results import read_table

    table, _ = read_table(arguments.show, "depends", "depends")
    path = arguments.show / "depends.csv"
    for column in ("workload", "ep_size", "tokens", "placement", "measure", "baseline", "of", "saved", "low", "high"):
        if column not in table:
            raise InputError(f"{path} has no column '{column}'")
    chosen = {"workload": arguments.workload, "placement": arguments.placements}
    for column, wanted, default in (("ep_size", arguments.ep_sizes, _EP_SIZES), ("tokens", arguments.tokens, _TOKENS)):
        chosen[column] = None if wanted == WHOLE_NUMBERS(default) else wanted  # by default all that is there
    check_there(table, chosen, str(arguments.show))
    return rows_of(table, chosen)


def _print_saved(table: Any, markdown: bool) -> None:
    row = table.iloc[0]
    title = (
        f"Saved over {row.baseline}: share of the busiest rank's load (imbalance), and of a layer's time by exchange ({row.gpu}, "
        f"{row['dtype']}); ± 95 %, paired, over layers. {row.baseline}: its imbalance"
    )
    keys = ["tokens", "workload", "ep_size"]
    before = table[table.measure == "imbalance"].drop_duplicates(keys)
    before = before[keys].assign(before=before.of.map("{:.2f}".format))
    pairs, lines = pivoted(
        table.merge(before, on=keys).sort_values("tokens", kind="stable"), [*keys, "before"], ["measure", "placement"],
        lambda row: estimate(row.saved, row.high, "+z.1%") + ("~" if row.knee else ""),
    )  # fmt: skip
    measures = [f"{'' if measure == 'imbalance' else 'time, '}{measure}: {name}" for measure, name in pairs]
    print_lines(title, ["tokens", "workload", "EP", row.baseline, *measures], lines, markdown, align="><", keys=3)


def _print_conclusions(table: Any, least: float, markdown: bool) -> None:
    from sim.advice.dependence import conclusions

    cells = []
    for one in conclusions(table, least):
        does = _words(one.measure)
        what = "the mean imbalance" if one.measure == "imbalance" else f"layer time ({one.measure})"
        n = len(one.holds)
        if one.effect == "level" and n:
            what += f" by less than {100 * least:g} %"
        said = f"{one.placement} {does[one.effect]} {what}" if n else f"{one.placement}, {what}"
        verdict = (
            f"holds for {'all ' if n == one.n_traffic > 1 else f'{n} of '}{one.n_traffic}" if n else "no conclusion"
        )
        span = " to ".join(dict.fromkeys(f"{end:+z.1%}" for end in one.range)) if n else "-"
        elsewhere = [
            f"{does[instead]}{f' less than {100 * least:g} %' if instead == 'level' else ''}: {_traffic(found)}"
            for instead, found in one.others.items()
        ]
        cells.append([str(one.tokens), said, verdict, span, "; ".join(elsewhere)])
    if markdown:
        print_lines("", ["tokens", "conclusion", "verdict", "saved there", "elsewhere"], cells, markdown, align="><<<<")
        return
    row, sizes = table.iloc[0], ", ".join(map(str, sorted(table.ep_size.unique())))
    say(
        f"Against {row.baseline}, {counted(table.workload.nunique(), 'kind')} of traffic, EP {sizes}, times on {row.gpu} in "
        f"{row['dtype']}. A conclusion holds for traffic where at every EP size the whole 95 % interval is beyond "
        f"{100 * least:g} %, or within it where it says so; elsewhere: what is shown there instead, undecided where an interval "
        "crosses that line."
    )
    for tokens, conclusion, verdict, span, others in cells:
        saved = "" if span == "-" else f", {span} saved"
        elsewhere_text = f". Elsewhere {others}" if others else ""
        say(f"{counted(int(tokens), 'token')}: {conclusion}: {verdict}{saved}{elsewhere_text}", "  ", "    ")
    print("\nThe numbers: --table saved")


def _words(measure: str) -> dict[str, str]:
    """What a placement does to a measure, in words, by what is shown."""
    saves, costs = ("lowers", "raises") if measure == "imbalance" else ("saves", "costs")
    return {"saves": saves, "costs": costs, "level": "changes", "undecided": "undecided"}


def _traffic(found: dict[str, list[int]]) -> str:
    """Traffic with the EP sizes where something is shown, without them where that is all."""
    return ", ".join(name + (f" (EP {', '.join(map(str, sizes))})" if sizes else "") for name, sizes in found.items())
