"""What README shows is what its commands print."""

import re
import shlex

from conftest import ROOT

from sim.cli import main

README = (ROOT / "README.md").read_text()


def test_tables_are_what_their_commands_print(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"<!-- table: epsim (.*?) -->\n(.*?)<!-- end -->", README, flags=re.DOTALL)
    assert blocks
    for command, shown in blocks:
        assert main(shlex.split(command)) == 0
        assert capsys.readouterr().out == shown, command


def test_pictures_exist():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / path).exists(), path
