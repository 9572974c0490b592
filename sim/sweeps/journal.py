"""Finished chunks of an unfinished sweep, on disk, so that a stopped sweep goes on where it was."""

import contextlib
import json
import os
import shutil
import zipfile
from dataclasses import fields
from pathlib import Path

import numpy as np

from sim.errors import InputError
from sim.files import read_json
from sim.results import whole_files
from sim.sweeps.chunk import Stage
from sim.sweeps.plan import Plan
from sim.sweeps.tally import Tally

_IDENTITY = "sweep.json"
_TRIES = 3


class Journal:
    """The folder `.partial` of a result folder: a file per chunk, written whole or not at all.

    Sums are integers and chunks are fixed by the plan, so it does not matter which process wrote a file, nor when: a
    killed sweep loses the chunks in flight and nothing else, and two runs of one sweep do not disturb each other.
    """

    def __init__(self, folder: Path, plan: Plan) -> None:
        """Open the journal of a plan in a result folder.

        Raises InputError if another unfinished sweep is in it, be it running or stopped; OSError.
        """
        self._folder, self._about = folder / ".partial", json.dumps(plan.identity)
        self._claim()
        if read_json(self._folder / _IDENTITY, f"{self._folder / _IDENTITY} (delete {self._folder})") != plan.identity:
            raise InputError(
                f"--out {folder} holds another unfinished sweep; choose another folder, or delete {self._folder}"
            )

    def _claim(self) -> None:
        """Write the identity, unless one is there: of two processes one is first, and the other sees it whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = self._folder / f".{_IDENTITY}.{os.getpid()}.tmp"
        mine.write_text(self._about)
        with contextlib.suppress(FileExistsError):
            os.link(mine, self._folder / _IDENTITY)
        mine.unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None and not any(self._folder.glob("*.npz")):
            self.clear()  # nothing was done: leave nothing

    def add(self, stage: Stage, draws: range, tally: Tally) -> None:
        """Keep the sums of a finished chunk. Raises OSError."""
        for _ in range(_TRIES):
            try:
                with whole_files(self._path(stage, draws)) as (path,), path.open("wb") as file:
                    np.savez(file, **vars(tally))
                return
            except FileNotFoundError:  # another process has finished this sweep, and the folder is gone
                with contextlib.suppress(FileNotFoundError):
                    self._claim()

    def read(self, stage: Stage, draws: range) -> Tally | None:
        """Sums of a chunk, None if it was not finished (or its file is damaged: it is computed again)."""
        names = {field.name for field in fields(Tally)}
        try:
            with self._path(stage, draws).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                if set(arrays.files) == names and all(arrays[name].dtype == np.int64 for name in names):
                    return Tally(**{name: arrays[name] for name in names})
        except (OSError, ValueError, EOFError, zipfile.BadZipFile):
            pass
        return None

    def clear(self) -> None:
        """Forget the chunks, once the result is written; aside first, so that nobody writes into what is being removed."""
        aside = self._folder.with_name(f".partial.{os.getpid()}.old")
        with contextlib.suppress(OSError):
            self._folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)

    def _path(self, stage: Stage, draws: range) -> Path:
        return self._folder / f"trials-{stage.trials.start}-{stage.trials.stop}-draws-{draws.start}-{draws.stop}.npz"
