"""The `epsim` command: verbs by subject, a module imported only when one of its verbs is asked for.

A verb NAME is `add_NAME(parser)`, which adds its options and whose docstring is the description of its help, and
`run_NAME(arguments)`, in the module that VERBS names. A verb with verbs of its own (`epsim traffic show`) adds these by
`add_verbs`. Options are declared in `sim.options`.
"""

import contextlib
import difflib
import inspect
import io
import os
import sys
import textwrap
from argparse import ArgumentError, ArgumentParser, HelpFormatter, Namespace
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from sim.errors import InputError, RunError, unknown

_SUBJECTS = {
    "How uneven, and how often": {
        "sweep": ("sweep", "sample routed tokens, score placements by EP size and tokens per step"),
        "show": ("finished", "print an answer again: of sweep (or its worst cases), gain, step, capacity, claims"),
        "plot": ("finished", "draw the figures of sweeps"),
        "report": ("finished", "write a page to explore sweeps and advice in a browser"),
        "combine": ("finished", "add sweeps of different seeds or machines"),
    },
    "What it costs": {
        "gain": ("gain", "time that a placement saves on a GPU, by tokens per step"),
        "depends": ("depends", "which of these savings hold for all kinds of traffic"),
        "step": ("step", "balancedness and time of whole steps, beside your own log"),
        "capacity": ("capacity", "room that buffers need at a given risk"),
        "claims": ("claims", "published performance claims: computed figure and verdict"),
        "measure": ("measure", "the same on real GPUs: one rank's experts, or whole layers"),
    },
    "Your own traffic": {
        "advise": ("advise", "should I turn it on? A verdict for each step size"),
        "traffic": ("traffic", "show recorded routing, fit a workload to it, or make some"),
        "export": ("export", "write a placement as a file of a serving engine"),
    },
    "Lists": {
        "models": ("lists", "model presets"),
        "workloads": ("lists", "traffic presets, and how uneven each is"),
        "placements": ("lists", "placements, and when vLLM runs another one"),
        "gpus": ("lists", "GPUs and kinds of exchange that times can be computed for"),
        "columns": ("lists", "columns of the tables, with units and meaning"),
    },
}
VERBS = {verb: about for verbs in _SUBJECTS.values() for verb, about in verbs.items()}
"""Module and help of each verb."""


class _Help(HelpFormatter):
    """Help in paragraphs, whose lines do not break inside the name of an option."""

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        parts = text.split("\n\n")
        return "\n\n".join("\n".join(self._split_lines(" ".join(part.split()), width)) for part in parts)


class _Parser(ArgumentParser):
    """A parser whose errors are one line, raised as InputError, and whose usage names what must be given."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, exit_on_error=False, formatter_class=_Help, **options)

    def error(self, message: str) -> NoReturn:
        required = message.partition("the following arguments are required: ")[2]
        raise InputError(f"needs {required}; see {self.prog} --help" if required else message)

    def format_help(self) -> str:
        words = []
        for action in self._actions:
            if not action.option_strings:
                words.append({"+": "{} ...", "*": "[{} ...]"}.get(str(action.nargs), "{}").format(action.metavar))
            elif action.required:
                words.append(f"{action.option_strings[-1]} {action.metavar}")
        self.usage = " ".join([self.prog.replace("%", "%%"), *words, "[options]"])
        return super().format_help()


def add_verbs(parser: ArgumentParser, verbs: dict[str, tuple[Callable[..., None], Callable[..., None]]]) -> None:
    """Give a verb verbs of its own, each by its two functions; `arguments.run` is that of the one that is asked for."""
    parser.set_defaults(verbs=tuple(verbs))
    several = parser.add_subparsers(title="verbs", metavar="|".join(verbs), required=True)
    for name, (add, run) in verbs.items():
        text = inspect.getdoc(add) or ""
        of_verb = several.add_parser(name, help=text.partition(".")[0], description=text)
        add(of_verb)
        of_verb.set_defaults(run=run, parser=of_verb)


def main(arguments: list[str] | None = None) -> int:
    """Run the command.

    Returns
    -------
    int
        Exit status: 0; 2 for bad usage and for an input file that is missing, unreadable or invalid; 1 for a failed write
        or run; 130 after an interrupt.
    """
    words = sys.argv[1:] if arguments is None else arguments
    _open_streams()
    prog, flags = "epsim", dict[str, str]()
    try:
        for word in words:
            if any(0xD800 <= ord(letter) < 0xE000 for letter in word):
                raise InputError(f"argument {word!r} is not UTF-8")
        if words and words[0] == "help":
            words = [*words[1:2], "--help"]
        if not words or words[0] in ("-h", "--help"):
            print(_help())
            return 0 if words else 2
        if words[0] == "--version":
            print(f"epsim {version('epsim')}")
            return 0
        if words[0].startswith("-"):
            raise InputError(f"{words[0]} is no option; the verb comes first, as in epsim sweep --help")
        if words[0] not in VERBS:
            raise unknown("verb", words[0], VERBS)
        from sim.cli.terminal import drop_notes, say_notes
        from sim.options.declare import config_words, flags_of

        prog = f"epsim {words[0]}"
        module = import_module(f"sim.cli.{VERBS[words[0]][0]}")
        add = getattr(module, f"add_{words[0]}")
        parser = _Parser(prog=prog, description=inspect.getdoc(add))
        add(parser)
        if len(words) > 1 and words[1] in (parser.get_default("verbs") or ()):
            prog += f" {words[1]}"
        parsed = _parse(parser, words[1:])
        if getattr(parsed, "config", None) is not None:
            parsed = _parse(parser, [*config_words(parsed.config, parser), *words[1:]])  # the command line wins
        flags = flags_of(getattr(parsed, "parser", parser))
        drop_notes()
        run = parsed.run if "run" in parsed else getattr(module, f"run_{words[0]}")
        run(parsed)
        sys.stdout.flush()
        say_notes()
    except InputError as error:
        from sim.options.declare import named

        return _fail(prog, named(str(error), flags), 2)
    except RunError as error:
        return _fail(prog, str(error), 1)
    except BrokenPipeError:  # the reader of a pipe has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        return _fail(prog, f"cannot write {error.filename or 'the output'}: {error.strerror or error}", 1)
    except MemoryError:
        return _fail(prog, "out of memory; take fewer cells or fewer --tokens", 1)
    except KeyboardInterrupt:
        kept = "; finished chunks are kept, and the same command goes on from them" if prog == "epsim sweep" else ""
        return _fail(prog, f"interrupted{kept}", 130)
    except SystemExit as stop:  # argparse leaves so after --help
        return stop.code if isinstance(stop.code, int) else 0
    return 0


def _parse(parser: ArgumentParser, words: list[str]) -> Namespace:
    verbs = parser.get_default("verbs")
    if verbs and words and words[0] not in verbs and not words[0].startswith("-"):
        raise unknown("verb", words[0], verbs, f"; its verbs: {', '.join(verbs)}")
    try:
        parsed, rest = parser.parse_known_args(words)
    except ArgumentError as error:
        if error.argument_name is None:
            parser.error(error.message)
        message = error.message.replace("not allowed with argument", "does not go with")
        raise InputError(f"{error.argument_name} {message.replace('expected one argument', 'needs a value')}") from None
    if rest:
        from sim.options.declare import flags_of

        parser = getattr(parsed, "parser", parser)
        near = difflib.get_close_matches(rest[0], flags_of(parser).values(), n=1, cutoff=0.75)
        hint = f"did you mean {near[0]}?" if near else f"see {parser.prog} --help"
        raise InputError(f"{rest[0]} does not go with {parser.prog}; {hint}")
    return parsed


def _open_streams() -> None:
    """Standard streams that can be written: a closed one goes nowhere, a terminal without ± or ≥ shows a ? for them."""
    sys.stdout = sys.stdout or Path(os.devnull).open("w")  # noqa: SIM115
    sys.stderr = sys.stderr or Path(os.devnull).open("w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _fail(prog: str, message: str, status: int) -> int:
    with contextlib.suppress(OSError):
        print(f"{prog}: error: {' '.join(message.split())[:1000]}", file=sys.stderr)
    return status


def _help() -> str:
    parts = ["\n".join([f"{subject}:", *(f"  {verb:<12}{text}" for verb, (_, text) in verbs.items())])
             for subject, verbs in _SUBJECTS.items()]  # fmt: skip
    return "\n\n".join([
        "usage: epsim VERB [options]",
        "Monte-Carlo simulation of expert-parallel load imbalance: how uneven are the ranks of a\n"
        "MoE layer, how often, and what does another placement of its experts buy?",
        "A first answer:  epsim sweep --ep 8,32 --tokens 8,64,4096 --trials 5000\n"
        "On your traffic: epsim advise --demo",
        *parts,
        "epsim VERB --help shows the options of a verb; epsim --version the version.\n"
        "Exit status: 0; 2 for bad usage and for an input file that is missing, unreadable or invalid;\n"
        "1 for a failed write or run; 130 after an interrupt (the same epsim sweep goes on from there).",
    ])  # fmt: skip
