"""The house: imports go one way, no two things share a name, and a file is one subject."""

import ast
import pkgutil
from importlib import import_module
from types import ModuleType

import pytest
from conftest import ROOT

import sim

# From the ground floor up, in the order of their rows in the design; a room may import its own row and those above.
ROOMS = [
    *("errors", "files", "options", "kernels", "streams", "stats", "progress"),
    *("model", "traffic", "router", "placement", "copies", "scoring", "theory", "fit"),
    *("figures", "results", "sweeps", "cost", "verdicts", "advice", "measure"),
    *("report", "cli"),
]
PATHS = sorted(path for path in (ROOT / "sim").rglob("*.py") if path.name != "__main__.py")


def room_of(path):
    return path.relative_to(ROOT / "sim").parts[0].removesuffix(".py")


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name and name.split(".")[0] == "sim")


@pytest.fixture(scope="module")
def modules():
    """Every module of the package that can be imported here, by name."""
    found = {}
    for info in pkgutil.walk_packages(sim.__path__, "sim."):
        try:
            found[info.name] = import_module(info.name)
        except ModuleNotFoundError as error:
            if error.name not in ("torch", "triton"):
                raise
    return found


def test_every_file_is_in_a_known_room():
    assert {room_of(path) for path in PATHS} - {"__init__"} <= set(ROOMS)


def test_a_room_imports_only_rooms_above_it():
    for path in PATHS:
        room = room_of(path)
        for name in imports_of(path) if room != "__init__" else ():
            target = name.split(".")[1] if "." in name else "errors"
            assert ROOMS.index(target) <= ROOMS.index(room), (
                f"{path.relative_to(ROOT)} imports {name}, which stands below it"
            )


def test_public_names_are_all_there_and_documented():
    assert set(sim.__all__) <= set(dir(sim))
    for name in sim.__all__:
        assert getattr(sim, name).__doc__ or name == "Workload", name


def test_a_users_type_checker_sees_the_public_names():
    """The package says that it is typed, and exports by `import NAME as NAME` what is imported on first use."""
    assert (ROOT / "sim" / "py.typed").is_file()
    imports = [
        node for node in ast.walk(ast.parse((ROOT / "sim/__init__.py").read_text())) if isinstance(node, ast.ImportFrom)
    ]
    exported = {(alias.asname, node.module) for node in imports for alias in node.names if alias.asname}
    assert exported == {(name, f"sim.{room}") for name, room in sim._ROOM_OF.items()}


def test_no_room_or_module_has_the_name_of_a_public_function(modules):
    """Import order would decide which one a name is. Files of `cli` have the names of verbs."""
    for name in modules:
        assert name.split(".")[-1] not in sim.__all__ or name.startswith("sim.cli."), name
    for name in sim.__all__:
        assert not isinstance(getattr(sim, name), ModuleType), name


def test_no_name_that_a_room_offers_is_a_module(modules):
    for name, module in modules.items():
        for offered in getattr(module, "__all__", ()):
            assert not isinstance(getattr(module, offered), ModuleType), f"{name}.{offered}"


def test_a_file_is_one_subject():
    """Of at most 500 lines."""
    assert not {path.name: n for path in PATHS if (n := len(path.read_text().splitlines())) > 500}
