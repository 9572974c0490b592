"""Options of every verb: what is no value of one is refused in one line that names it, before anything is done."""

from argparse import ArgumentParser, _SubParsersAction
from importlib import import_module
from pathlib import Path

from conftest import fails

from sim.cli import VERBS
from sim.options import kinds


def wrong_values(kind):
    """Texts that are no value of a kind; none where it does not know."""
    of = kind.of if isinstance(kind, kinds.Listed) else kind
    if isinstance(of, kinds.Whole):
        yield from () if of.least is None else (str(of.least - 1), str(of.most + 1))
        yield "1.5"
    elif isinstance(of, kinds.Number):
        yield from (f"{(of.least or -1) - 1e-9}", f"{of.most * 1.01}", "nan", "much")
    elif isinstance(of, kinds.Seconds):
        yield from ("soon", "0", "-1h", "inf")
    elif isinstance(of, kinds.Choice):
        yield "none-of-these"
    elif isinstance(of, kinds.NewFile):
        yield from ("x.wrong", "absent/x" + of.endings[0])
    elif isinstance(of, kinds.Folder):
        yield from ("a.file", " ")


def options():
    """Verb, option and kind of every option of every verb."""
    for verb, (room, _) in VERBS.items():
        parser = ArgumentParser()
        getattr(import_module(f"sim.cli.{room}"), f"add_{verb}")(parser)
        below = [action.choices for action in parser._actions if isinstance(action, _SubParsersAction)]
        parsers = {f"{verb} {name}": of for name, of in below[0].items()} if below else {verb: parser}
        for words, of in parsers.items():
            for action in of._actions:
                if not isinstance(action.type, kinds.Kind):  # a name or a path is checked where it is known
                    assert action.nargs == 0 or action.type in (None, Path), (words, action)
                elif action.option_strings:
                    yield words, action.option_strings[-1], action.type


def test_what_is_no_value_of_an_option_is_one_line_that_names_it_and_status_2(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.file").touch()
    for verb, flag, kind in options():
        for value in wrong_values(kind):
            fails(capsys, [*verb.split(), f"{flag}={value}"], f"epsim {verb}: error: {flag} ")
    assert [path.name for path in tmp_path.iterdir()] == ["a.file"]
