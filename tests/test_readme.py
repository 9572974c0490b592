"""What the READMEs show is what their commands print, and what they link to is there."""

import re

import pytest
from readme import PATHS, ROOT, printed, tables

SLOW = ("claims", "workloads")  # verbs that compute what they print


def cases():
    for path, command, shown in tables():
        marks = [pytest.mark.slow] if command.split()[0] in SLOW else []
        yield pytest.param(command, shown, id=f"{path.relative_to(ROOT)}: {command[:60]}", marks=marks)


def test_there_are_tables():
    assert tables()


@pytest.mark.parametrize(("command", "shown"), list(cases()))
def test_tables_are_what_their_commands_print(command, shown):
    assert printed(command) == shown


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files_that_are_there(path):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if not link.startswith(("https:", "http:")):
            assert (path.parent / link).exists(), link
