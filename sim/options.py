"""Options, each declared once: its name, type, range, default, unit and help.

A class of options is a frozen dataclass whose fields are made by `option`. From it derive

- the options of the command line: `add_options(parser, SweepOptions)`, and `given(arguments, SweepOptions)` to read them back;
- the keys of a TOML file (`--config`): the options without their dashes (`config_words`);
- the checks of a Python call: `SweepOptions(**keywords)` raises InputError for what is out of range;
- signature and docstring of the functions that take them: `@takes(SweepOptions)`;
- what identifies a result in its provenance: `identity(values)`.

To add an option, add a field. To add a verb, write sim/cli/NAME.py with `add_arguments(parser)` and `run(arguments)`, and its
line in `sim.cli.VERBS`; it takes the classes that it needs, and gives `type=` one of the kinds below to options of its own.
A message about a parameter names it in backquotes, as in "`ep_sizes` 300: ...". The command line writes the option in its place.
"""

import inspect
import textwrap
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from sim.errors import InputError, shown, unknown
from sim.files import is_there, read_toml

MAX_TOKENS = 2**24
MAX_TRIALS = 10**9
MAX_RANKS_PER_NODE = 2**15
MAX_SEED = 2**63 - 1
MAX_THREADS = 4096
THRESHOLDS = (1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0)
"""Imbalance thresholds of tail.csv."""
DEFAULT_TRIALS = 10_000
DEFAULT_MAX_TRIALS = 1_000_000
_MAX_VALUES = 10_000
_UNITS_S = {"s": 1, "m": 60, "h": 3600}


# Kinds of values. Called with a text, a kind reads it, as argparse's `type=` wants it; `check` is for values from Python.


@dataclass(frozen=True)
class Kind:
    """Text as it is: a name, or a path that another module opens."""

    metavar: str = field(default="NAME", kw_only=True)
    python = "str"

    def __call__(self, text: str) -> Any:
        """The value that a text of the command line stands for. Raises ArgumentTypeError."""
        value = self.read(text)
        if (problem := self.problem(value)) is not None:
            raise ArgumentTypeError(f"{shown(value)}: {problem}")
        return value

    def check(self, name: str, value: Any) -> Any:
        """The value of a parameter. Raises InputError that names the parameter."""
        if (problem := self.problem(value)) is not None:
            raise InputError(f"`{name}` {shown(value)}: {problem}")
        return value

    def read(self, text: str) -> Any:
        """The value, before its range is looked at. Raises ArgumentTypeError."""
        return text

    def problem(self, value: Any) -> str | None:
        """What is wrong with a value, None if nothing is."""
        return None


@dataclass(frozen=True)
class Whole(Kind):
    """A whole number from `least` to `most`; without them any, and a later check knows the range."""

    least: int | None = None
    most: int | None = None
    metavar: str = field(default="N", kw_only=True)
    python = "int"

    def read(self, text: str) -> int:
        """See `Kind`."""
        try:
            return int(text)
        except ValueError:
            raise ArgumentTypeError(f"'{text}': expected a whole number") from None

    def check(self, name: str, value: Any) -> Any:
        """See `Kind`; what is no whole number is left to the later check, where there is one."""
        return int(super().check(name, value)) if self.least is not None else value

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        if self.least is None or self.most is None:
            return None
        fits = not isinstance(value, bool) and isinstance(value, Integral) and self.least <= int(value) <= self.most
        return None if fits else f"must be a whole number from {self.least} to {self.most}"


@dataclass(frozen=True)
class Number(Kind):
    """A number from `least` to `most`, times `scale` where the command line has another unit than Python."""

    least: float = 0.0
    most: float = 1e15
    metavar: str = field(default="X", kw_only=True)
    scale: float = 1.0
    python = "float"

    def __call__(self, text: str) -> float:
        """See `Kind`."""
        return self.scale * float(super().__call__(text))

    def read(self, text: str) -> float:
        """See `Kind`."""
        try:
            return float(text)
        except ValueError:
            raise ArgumentTypeError(f"'{text}': expected a number") from None

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        fits = not isinstance(value, bool) and isinstance(value, Real) and self.least <= float(value) <= self.most
        return None if fits else f"must be a number from {self.least:g} to {self.most:g}"


@dataclass(frozen=True)
class Share(Kind):
    """A share, as in 1% or 0.01."""

    metavar: str = field(default="SHARE", kw_only=True)
    python = "float"

    def read(self, text: str) -> float:
        """See `Kind`."""
        try:
            return float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
        except ValueError:
            raise ArgumentTypeError(f"'{text}': expected a share as in 1% or 0.01") from None


@dataclass(frozen=True)
class Precision(Share):
    """A relative half-width that can be reached."""

    def check(self, name: str, value: Any) -> float:
        """See `Kind`."""
        return float(super().check(name, value))

    def problem(self, value: Any) -> str | None:
        """See `Kind`."""
        fits = not isinstance(value, bool) and isinstance(value, Real) and 1e-6 <= float(value) < 1
        return None if fits else "must be a share from 0.0001% to below 100%, as in 1% or 0.01"


@dataclass(frozen=True)
class Seconds(Kind):
    """A time, as in 90s, 10m or 2h."""

    metavar: str = field(default="TIME", kw_only=True)
    python = "float"

    def read(self, text: str) -> float:
        """See `Kind`."""
        number, unit = (text[:-1], text[-1]) if text[-1:] in _UNITS_S else (text, "s")
        try:
            value = float(number) * _UNITS_S[unit]
        except ValueError:
            value = 0.0
        if not 0 < value < float("inf"):
            raise ArgumentTypeError(f"'{text}': expected a time as in 90s, 10m or 2h")
        return value


@dataclass(frozen=True)
class Choice(Kind):
    """One of some names."""

    names: tuple[str, ...] = ()

    def __call__(self, text: str) -> str:
        """See `Kind`."""
        return str(self.check("", text))

    def check(self, name: str, value: Any) -> str:
        """See `Kind`."""
        if value in self.names:
            return str(value)
        error = unknown(f"`{name}`" if name else "", shown(value), self.names)
        raise error if name else ArgumentTypeError(str(error).strip())


@dataclass(frozen=True)
class Folder(Kind):
    """Name of a folder that is there or can be made."""

    metavar: str = field(default="DIR", kw_only=True)

    def read(self, text: str) -> Path:
        """See `Kind`."""
        if not text.strip() or "\0" in text:
            raise ArgumentTypeError("must be the name of a folder")
        if is_there(Path(text)) and not Path(text).is_dir():
            raise ArgumentTypeError(f"{text} is a file, not a folder")
        return Path(text)


@dataclass(frozen=True)
class Listed(Kind):
    """One value or several of a kind, without repetitions."""

    metavar: str = field(default="LIST", kw_only=True)
    of: Kind = Kind()

    @property
    def python(self) -> str:  # type: ignore[override]
        """Type in Python."""
        return f"{self.of.python} or list of {self.of.python}"

    def __call__(self, text: str) -> list[Any]:
        """See `Kind`. Whole numbers take ranges: `8..64` doubles; `2..12:2` counts up by 2."""
        if isinstance(self.of, Whole):
            values = [value for part in text.split(",") for value in _range(part.strip())]
        else:
            values = self._parts(text)
        if len(values) > _MAX_VALUES:
            raise ArgumentTypeError(f"{text}: more than {_MAX_VALUES} values")
        for value in values:
            if (problem := self.of.problem(value)) is not None:
                raise ArgumentTypeError(f"{shown(value)}: {problem}")
        return values

    def _parts(self, text: str) -> list[Any]:
        parts = [part.strip() for part in text.split(",")]
        if isinstance(self.of, Number):
            try:
                return [float(part) for part in parts]
            except ValueError:
                raise ArgumentTypeError(f"'{text}': expected numbers as in 1.5,2") from None
        if not all(parts):
            raise ArgumentTypeError(f"'{text}': expected names with commas between them")
        return parts

    def check(self, name: str, value: Any) -> list[Any]:
        """See `Kind`."""
        several = isinstance(value, Iterable) and not isinstance(value, str) and getattr(value, "ndim", 1) > 0
        listed = list(dict.fromkeys(value)) if several else [value]
        if not listed:
            raise InputError(f"`{name}` needs at least one value")
        return [self.of.check(name, item) for item in listed]


def _range(part: str) -> list[int]:
    ends, _, step = part.partition(":")
    first, dots, last = ends.partition("..")
    try:
        start, stop = int(first), int(last) if dots else int(first)
        width = int(step) if step else 0
    except ValueError:
        raise ArgumentTypeError(
            f"'{part}': expected whole numbers as in 1,8,64, or a range as in 8..64 (doubling) or 2..12:2"
        ) from None
    if not dots:
        if step:
            raise ArgumentTypeError(f"'{part}': a step goes with a range, as in 2..12:2")
        return [start]
    if start < 1 or stop < start or width < 0 or (step and width == 0):
        raise ArgumentTypeError(f"'{part}': a range goes up from at least 1, by a step of at least 1")
    if width and (stop - start) // width >= _MAX_VALUES:
        raise ArgumentTypeError(f"'{part}': more than {_MAX_VALUES} values")
    if width:
        return list(range(start, stop + 1, width))
    values = [start]
    while values[-1] * 2 <= stop:
        values.append(values[-1] * 2)
    return values


@dataclass(frozen=True)
class PerRank(Listed):
    """`tokens_per_rank`: True in Python; on the command line the list that stands in the place of --tokens."""

    of: Kind = Whole(1, MAX_TOKENS)
    python = "bool"

    def check(self, name: str, value: Any) -> bool:  # type: ignore[override]
        """See `Kind`."""
        return bool(value)


NAME, FILE, NAMES, WHOLE_NUMBERS = Kind(), Kind(metavar="FILE"), Listed(), Listed(of=Whole())
"""Kinds without a range of their own: what they name or number is checked where it is known."""
SEED, THREADS = Whole(0, MAX_SEED), Whole(1, MAX_THREADS)


# Declarations


@dataclass(frozen=True)
class Option:
    """What one field declares.

    Attributes
    ----------
    kind : Kind
        Type and range.
    help : str
        For `--help` and for docstrings.
    flag : str
        On the command line; empty for the field's own name.
    line : str, optional
        Default on the command line, where Python has none: as it would be typed.
    also : tuple of str
        Parameters of other functions that the flag stands for.
    identifies : bool
        Whether the value as it is belongs to what identifies a result.
    """

    kind: Kind
    help: str
    flag: str = ""
    line: str | None = None
    also: tuple[str, ...] = ()
    identifies: bool = False


_ALSO: dict[str, str] = {}


def option(kind: Kind, help: str, *, default: Any = MISSING, **more: Any) -> Any:
    """A field of a class of options; without a default it must be given in Python. `more` as in `Option`."""
    declared = Option(kind, help, **more)
    return field(default=default, metadata={"option": declared})


class Options:
    """Base of all classes of options: what is given is checked, and converted."""

    def __post_init__(self) -> None:
        for name, (declared, default) in declarations(type(self)).items():
            value = getattr(self, name)
            if value is not None or default is not None:
                object.__setattr__(self, name, declared.kind.check(name, value))


Group = TypeVar("Group", bound=type[Options])


def declarations(group: type[Options]) -> dict[str, tuple[Option, Any]]:
    """Of each field its declaration and its default (MISSING without one)."""
    return {field.name: (field.metadata["option"], field.default) for field in fields(group)}  # type: ignore[arg-type]


def identity(group: type[Options], holder: Any) -> dict[str, Any]:
    """Values of the options that identify a result, of an object that has them as attributes."""
    return {name: getattr(holder, name) for name, (declared, _) in declarations(group).items() if declared.identifies}


_TRAFFIC_HELP = "preset (epsim workloads), file:TRACE of recorded routing, or a .toml file (a preset's keys, or a fit)"


@dataclass(frozen=True, kw_only=True)
class TrafficOptions(Options):
    """The model, and what comes in: arguments of `load_model` and `load_workload`."""

    model: str = option(NAME, "preset (epsim models) or path of a Hugging Face config.json", default="deepseek-v3")
    workload: str = option(NAME, _TRAFFIC_HELP, default="chat")
    phase: str | None = option(NAME, "of recorded or fitted routing: decode (default) or prefill", default=None)
    dummy_tokens: int | None = option(
        Whole(), "padding tokens per step, as idle data-parallel ranks run them (default: 0)", default=None
    )


@dataclass(frozen=True, kw_only=True)
class CellOptions(Options):
    """The cells of a grid, and the random stream."""

    ep_sizes: list[int] = option(
        WHOLE_NUMBERS, "EP sizes, each from 1 to the number of experts", flag="--ep", also=("ep_size",)
    )
    tokens: list[int] = option(
        Listed(of=Whole(1, MAX_TOKENS)), "tokens per step over the whole EP group (per rank with `tokens_per_rank`)"
    )
    tokens_per_rank: bool = option(PerRank(), "instead of `tokens`: tokens per step and rank", default=False)
    ranks_per_node: int = option(
        Whole(1, MAX_RANKS_PER_NODE),
        "ranks joined by NVLink, for node_aware placement and for nodes per token",
        default=8,
        identifies=True,
    )
    seed: int = option(SEED, "same seed, same rows, on any number of threads", default=0, identifies=True)


@dataclass(frozen=True, kw_only=True)
class SweepOptions(CellOptions):
    """What `sim.sweep` takes beside model and workload, and what decides its rows."""

    placements: list[Any] = option(
        NAMES,
        "placements (epsim placements); changes are given against the first",
        flag="--placement",
        also=("placement", "strategy"),
    )
    trials: int | None = option(
        Whole(1, MAX_TRIALS),
        f"steps scored in each cell (default: {DEFAULT_TRIALS}); not with a precision",
        default=None,
        identifies=True,
    )
    draws: int | None = option(
        Whole(),
        "independent layer draws that the trials come from (default: a fresh layer for every step; of recorded traffic its "
        "layers). Intervals rest on the variation between draws",
        default=None,
    )
    precision: float | None = option(
        Precision(),
        "instead of `trials`: go on until the 95% interval of each mean imbalance has at most this relative half-width, as in 1%",
        default=None,
    )
    precision_tail: float | None = option(
        Precision(),
        "the same for each P(imbalance >= x) that is not shown to be below 1e-3, as in 10%",
        default=None,
    )
    max_trials: int | None = option(
        Whole(1, MAX_TRIALS), f"the most trials under a precision (default: {DEFAULT_MAX_TRIALS})", default=None
    )
    thresholds: Sequence[float] = option(
        Listed(of=Number(1, 2**15)), "imbalance thresholds of the tail", default=THRESHOLDS
    )
    bound_layers: int | None = option(
        Whole(0, 4096),
        "layers used for analytic tail bounds (default: up to 32, none where that takes long; 0: no bounds)",
        default=None,
        identifies=True,
    )
    fit_tokens: int | None = option(
        Whole(1, MAX_TOKENS),
        "of synthetic traffic: tokens of each layer draw, other than those scored, that eplb is fitted on (default: 16384)",
        default=None,
    )
    fit_on: Any = option(
        FILE,
        "of recorded or fitted traffic: other traffic of the same layers to fit eplb on (default: every second sequence)",
        default=None,
    )
    replica_choice: str = option(
        NAME,
        "copy of a replicated expert that a token goes to: even, or vllm_hash of the token's index in the step",
        default="even",
    )


@dataclass(frozen=True, kw_only=True)
class RunOptions(Options):
    """Where and how long a sweep runs: nothing that changes its rows."""

    time_limit: float | None = option(
        Seconds(),
        "stop a precision run after this time (not before 1024 trials), as in 90s or 10m; the same command goes on",
        default=None,
    )
    threads: int | None = option(
        THREADS, "default: all processors of this process; of a local cluster, its workers", default=None
    )
    executor: str = option(
        Choice(names=("threads", "dask")),
        "threads, or dask: a local cluster, or the one of `scheduler` (extra: epsim[cluster])",
        default="threads",
    )
    scheduler: str | None = option(
        Kind(metavar="ADDRESS"), "address of a Dask scheduler, as in tcp://HOST:8786", default=None
    )


@dataclass(frozen=True, kw_only=True)
class StepOptions(CellOptions):
    """Whole steps through all layers: what `sim.predict_gain` and `sim.predict_steps` sample."""

    layer_sets: int = option(Whole(1, 4096), "independent sets of the model's layers, of synthetic traffic", default=32)
    most_steps: int = option(
        Whole(1, 10**6), "steps of each size, fewer where they are large", flag="--steps", default=512
    )
    threads: int | None = option(THREADS, "default: all processors of this process", default=None)


@dataclass(frozen=True, kw_only=True)
class TimeOptions(Options):
    """What turns loads into times."""

    exchange: str = option(
        NAME, "dispatch and combine: deepep_low_latency, deepep_high_throughput or none", default="deepep_low_latency"
    )
    dtype: str = option(NAME, "type of weights and inputs: fp8, bf16 or fp4", default="fp8")
    network_gb_per_s: float | None = option(
        Number(1e-9, 1e6, metavar="GB/S"),
        "network bandwidth of a GPU per direction (default: the GPU's; 50 if it has none)",
        flag="--network-gb",
        default=None,
    )


@dataclass(frozen=True, kw_only=True)
class RestOptions(Options):
    """What a step does beside routed experts and their exchange: one of the two."""

    moe_share: float | None = option(Share(), "share of a step that experts and exchange take, as in 40%", default=None)
    step_us: float | None = option(
        Number(1e-9, 1e6, scale=1e3, metavar="MS"),
        "instead of `moe_share`: the baseline's measured step time",
        flag="--step-ms",
        default=None,
    )


GROUPS = (TrafficOptions, SweepOptions, RunOptions, StepOptions, TimeOptions, RestOptions)
_ALSO.update(
    {other: name for group in GROUPS for name, (declared, _) in declarations(group).items() for other in declared.also}
)


# The command line


def flag_of(name: str, declared: Option) -> str:
    """--NAME."""
    return declared.flag or f"--{name.replace('_', '-')}"


def add_options(
    parser: ArgumentParser, group: type[Options], *, only: Sequence[str] | None = None, **lines: str | None
) -> None:
    """Add options of a class to a parser; `lines` are defaults of this verb, as they would be typed, None for none."""
    chosen = {name: found for name, found in declarations(group).items() if only is None or name in only}
    flags = {name: flag_of(name, declared) for name, (declared, _) in declarations(group).items()}
    tokens = parser.add_mutually_exclusive_group() if "tokens_per_rank" in chosen else None
    for name, (declared, default) in chosen.items():
        value = lines.get(name, None if default is MISSING else default)
        if isinstance(declared.kind, PerRank):
            value = lines.get(name)
        typed = ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else value
        text = declared.help if typed is None or "default:" in declared.help else f"{declared.help} (default: {typed})"
        add = (
            tokens.add_argument if tokens is not None and name in ("tokens", "tokens_per_rank") else parser.add_argument
        )
        add(
            flags[name],
            dest=name,
            type=declared.kind,
            default=typed,
            metavar=declared.kind.metavar if declared.kind.metavar != "NAME" else flags[name][2:].upper(),
            help=named(text, flags).replace("%", "%%"),
        )


def given(arguments: Namespace, group: type[Options]) -> dict[str, Any]:
    """Keyword arguments that the options of a class stand for; those that the verb has."""
    values = {name: getattr(arguments, name) for name in declarations(group) if hasattr(arguments, name)}
    if "tokens_per_rank" in values:
        per_rank = values["tokens_per_rank"]
        values |= {"tokens_per_rank": per_rank is not None}
        values |= {} if per_rank is None else {"tokens": per_rank}
    return values


def named(text: str, flags: dict[str, str]) -> str:
    """A text with the options in the place of the parameters that it names in backquotes."""
    parts = text.split("`")
    for i in range(1, len(parts) - 1, 2):
        name = parts[i]
        flag = flags.get(name) or flags.get(_ALSO.get(name, ""))
        parts[i] = flag or (name if name.isidentifier() else f"`{name}`")
    return "".join(parts)


def flags_of(parser: ArgumentParser) -> dict[str, str]:
    """The option of each parameter of a parser."""
    return {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}


def config_words(path: str, parser: ArgumentParser) -> list[str]:
    """The options of a TOML file as words of a command line; keys are the options, with - or _."""
    flags = [flag for flag in flags_of(parser).values() if flag not in ("--help", "--config")]
    words = []
    for key, value in read_toml(Path(path), f"--config {path}").items():
        flag = f"--{key.replace('_', '-')}"
        if flag not in flags:
            raise unknown(f"--config {path}: key", key, [flag[2:] for flag in flags])
        items = value if isinstance(value, list) else [value]
        if not items or not all(isinstance(item, str | int | float) and not isinstance(item, bool) for item in items):
            raise InputError(f"--config {path}: {key} must be a number, a string or a list of them")
        words.append(f"{flag}={','.join(str(item) for item in items)}")
    return words


# Python


def takes(group: type[Options]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function that passes `**options` on the signature and the parameters' texts of a class of options.

    The texts stand in the docstring where it says `**options`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(function)
        before = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        declared = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
            )
            for name, (_, default) in declarations(group).items()
        ]
        function.__signature__ = own.replace(parameters=[*before, *declared])  # type: ignore[attr-defined]
        texts = []
        for name, (found, default) in declarations(group).items():
            texts.append(f"    {name} : {found.kind.python}{', optional' if default is None else ''}")
            texts.append(textwrap.indent(textwrap.fill(f"{found.help[0].upper()}{found.help[1:]}.", 112), " " * 8))
        function.__doc__ = (function.__doc__ or "").replace("    **options", "\n".join(texts))
        return function

    return decorate
