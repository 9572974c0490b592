"""The house: imports go one way, and what a room needs stands above it."""

import ast

from conftest import ROOT

ROOMS = [
    "errors",
    "files",
    "options",
    "progress",
    "kernels",
    "streams",
    "stats",
    "model",
    "traffic",
    "router",
    "placement",
    "scoring",
    "theory",
    "fit",
    "figures",
    "results",
    "sweeps",
    "cost",
    "verdicts",
    "advice",
    "measure",
    "report",
    "cli",
]


def _room(path):
    return path.relative_to(ROOT / "sim").parts[0].removesuffix(".py")


def _imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (name for name in names if name and name.startswith("sim"))


def test_a_room_imports_only_rooms_above_it():
    for path in (ROOT / "sim").rglob("*.py"):
        if path.parent == ROOT / "sim" and path.name in ("__init__.py", "__main__.py"):
            continue
        room = _room(path)
        assert room in ROOMS, f"{path} is in no known room"
        for name in _imports(path):
            target = name.split(".")[1] if "." in name else "errors"
            assert ROOMS.index(target) <= ROOMS.index(room), (
                f"{path.relative_to(ROOT)} imports {name}, which stands below it"
            )


def test_public_names_are_all_there_and_documented():
    import sim

    for name in sim.__all__:
        assert getattr(sim, name).__doc__ or name == "Workload", name


def test_files_keep_one_purpose():
    long = {p.name: n for p in (ROOT / "sim").rglob("*.py") if (n := len(p.read_text().splitlines())) > 500}
    assert not long
