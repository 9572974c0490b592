"""What an option declares, and what derives from a class of options: command line, TOML keys, checks, signatures."""

import functools
import inspect
import textwrap
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

from sim.errors import InputError, unknown
from sim.files import read_toml
from sim.options.kinds import Flag, Kind, Measured, PerRank


@dataclass(frozen=True)
class Option:
    """What one field declares."""

    kind: Kind  # type and range
    help: str  # for `--help` and for docstrings
    flag: str = ""  # on the command line; empty for the field's own name
    identifies: bool = False  # whether the value as it is belongs to what identifies a result
    is_last: bool = False  # stands behind the others in a help, as few need it
    alias: str = ""  # another name of it on the command line


def option(kind: Kind, help: str, *, default: Any = MISSING, **more: Any) -> Any:
    """A field of a class of options; without a default it must be given in Python. `more` as in `Option`."""
    declared = Option(kind, help, **more)
    return field(default=default, metadata={"option": declared})


def optional(kind: Kind, help: str, **more: Any) -> Any:
    """An option that may be left out: None stands for that."""
    return option(kind, help, default=None, **more)


class Options:
    """Base of all classes of options: what is given is checked, and converted. `title` stands above them in a help."""

    title = ""

    def __post_init__(self) -> None:
        for name, (declared, default) in declarations(type(self)).items():
            value = getattr(self, name)
            if value is not None or default is not None:
                object.__setattr__(self, name, declared.kind.check(name, value))


def declarations(group: type[Options]) -> dict[str, tuple[Option, Any]]:
    """Of each field its declaration and its default (MISSING without one)."""
    return {field.name: (field.metadata["option"], field.default) for field in fields(group)}  # type: ignore[arg-type]


def check(group: type[Options], **values: Any) -> None:
    """Check some values of a class of options, for a function that takes only these. Raises InputError."""
    for name, value in values.items():
        declarations(group)[name][0].kind.check(name, value)


def identity(group: type[Options], holder: Any) -> dict[str, Any]:
    """Values of the options that identify a result, of an object that has them as attributes."""
    return {name: getattr(holder, name) for name, (declared, _) in declarations(group).items() if declared.identifies}


def flag_of(name: str, declared: Option) -> str:
    """--NAME."""
    return declared.flag or f"--{name.replace('_', '-')}"


def section_of(parser: ArgumentParser, title: str) -> Any:
    """The options of a parser that its help has under a title; the parser itself without one."""
    there = {section.title: section for section in parser._action_groups}
    return parser if not title else there.get(title) or parser.add_argument_group(title)


def add_options(
    parser: ArgumentParser,
    group: type[Options],
    *,
    only: Sequence[str] | None = None,
    without: str = "",
    helps: Mapping[str, str] | None = None,
    **lines: str | None,
) -> None:
    """Add options of a class to a parser, `only` some or all `without` one; `helps` are texts and `lines` defaults of this verb,
    these as they would be typed, None for none. What has no default must be given.
    """
    there = declarations(group)
    flags = {name: flag_of(name, declared) for name, (declared, _) in there.items()}
    chosen = {name: there[name] for name in (there if only is None else only) if name != without}
    section = section_of(parser, group.title)
    tokens = section.add_mutually_exclusive_group() if "tokens_per_rank" in chosen else section
    for name, (declared, default) in sorted(chosen.items(), key=lambda item: item[1][0].is_last):
        value = lines.get(name, None if default is MISSING or isinstance(declared.kind, PerRank) else default)
        typed = ",".join(f"{item:g}" for item in value) if isinstance(value, tuple) else value
        typed = f"{value:g}" if isinstance(value, float) else typed
        text = (helps or {}).get(name, declared.help)
        if typed is not None and "default:" not in text:
            text = f"{text[:-1]}; default: {typed})" if text.endswith(")") else f"{text} (default: {typed})"
        if isinstance(declared.kind, Flag):
            section.add_argument(flags[name], dest=name, action="store_true", help=named(declared.help, flags))
            continue
        more: dict[str, Any] = {"dest": name, "help": named(text, flags).replace("%", "%%")}
        more |= {"required": True} if default is MISSING and name not in lines else {}
        if isinstance(declared.kind, Measured):
            more |= {"nargs": "?", "const": declared.kind.alone}
        metavar = declared.kind.metavar
        if metavar == "NAME" and "-" not in flags[name][2:]:
            metavar = flags[name][2:].upper()
        add = (tokens if name in ("tokens", "tokens_per_rank") else section).add_argument
        add(*filter(None, (declared.alias, flags[name])), type=declared.kind, default=typed, metavar=metavar, **more)


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
        spellings = [name, f"{name}s", name.removesuffix("s")]  # a function of one EP size calls --ep `ep_size`
        spellings += ["placements", "placement"] if name == "strategy" else []  # as `sim.place` calls it
        flag = next((flags[spelling] for spelling in spellings if spelling in flags), None)
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


def takes(group: type[Options], *more: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Give a function that passes `**options` on the signature and the parameters' texts of a class of options, and `more`
    parameters that its docstring has; what it does not take, or lacks, is an InputError that names the parameter.

    The texts stand in the docstring where it says `**options`.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(function)
        before = [item for item in own.parameters.values() if item.kind is not inspect.Parameter.VAR_KEYWORD]
        declared = [
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=inspect.Parameter.empty if default is MISSING else default
            )
            for name, (_, default) in declarations(group).items()
        ]
        declared += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
        signature = own.replace(parameters=[*before, *declared])
        texts = []
        for name, (found, default) in declarations(group).items():
            texts.append(f"    {name} : {found.kind.python}{', optional' if default is None else ''}")
            texts.append(textwrap.indent(textwrap.fill(f"{found.help[0].upper()}{found.help[1:]}.", 112), " " * 8))

        @functools.wraps(function)
        def checked(*values: Any, **named: Any) -> Any:
            for name in named:
                if name not in signature.parameters:
                    more = f"; see help(sim.{function.__name__})"
                    raise unknown(f"sim.{function.__name__}: parameter", name, signature.parameters, more)
            try:
                signature.bind(*values, **named)
            except TypeError as error:
                raise InputError(f"sim.{function.__name__}: {str(error).replace(chr(39), '`')}") from None
            return function(*values, **named)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        checked.__doc__ = (function.__doc__ or "").replace("    **options", "\n".join(texts))
        return checked

    return decorate
