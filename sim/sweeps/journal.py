"""Finished chunks of an unfinished sweep, on disk, so that a stopped sweep goes on where it was."""

import contextlib
import json
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from sim.errors import InputError
from sim.files import is_there, read_json
from sim.results import whole_files
from sim.sweeps.plan import Plan
from sim.sweeps.tally import Tally

_IDENTITY = "sweep.json"


class Journal:
    """The folder `.partial` of a result folder: a file per chunk, written whole or not at all.

    Sums are integers and chunks are fixed by the plan, so it does not matter which process wrote a file, nor when: a
    killed sweep loses the chunks in flight and nothing else, and two runs of one sweep do not disturb each other.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Open the journal of a plan in a result folder. Raises InputError if it belongs to another sweep."""
        self._folder, self._identity = folder / ".partial", plan.identity
        held = self._folder / _IDENTITY
        if is_there(held) and read_json(held, str(held)) != self._identity:
            raise InputError(
                f"--out {folder} holds another unfinished sweep; choose another folder, or delete {self._folder}"
            )

    def add(self, draws: range, tally: Tally) -> None:
        """Keep the sums of a finished chunk. Raises OSError."""
        self._folder.mkdir(parents=True, exist_ok=True)
        identity = self._folder / _IDENTITY
        if not identity.exists():
            with whole_files(identity) as (path,):
                path.write_text(json.dumps(self._identity))
        with whole_files(self._path(draws)) as (path,), path.open("wb") as file:
            np.savez(file, **vars(tally))

    def read(self, draws: range) -> Tally | None:
        """Sums of a chunk, None if it was not finished (or its file is damaged: it is computed again)."""
        names = {field.name for field in fields(Tally)}
        try:
            with self._path(draws).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                if set(arrays.files) == names and all(arrays[name].dtype == np.int64 for name in names):
                    return Tally(**{name: arrays[name] for name in names})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            pass
        return None

    def clear(self) -> None:
        """Forget the chunks, once the result is written."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._folder)

    def _path(self, draws: range) -> Path:
        return self._folder / f"draws-{draws.start}-{draws.stop}.npz"
