"""Finished chunks of an unfinished sweep, on disk, so that a stopped sweep goes on where it was."""

import contextlib
import json
import os
import shutil
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from sim.errors import InputError
from sim.files import read_json, whole_files
from sim.results import digest_of
from sim.sweeps.chunk import CPU_CHUNKS, ChunkSize, Stage, stage_chunks
from sim.sweeps.plan import Plan
from sim.sweeps.tally import Tally

_HEAD = "sweep.json"
_TRIES = 3
_FOLD = 128
"""So many files of consecutive chunks become one, and so many of these again: the number of files grows with the logarithm of
the number of chunks.
"""


class Journal:
    """The folder `.partial` of a result folder: a file per run of consecutive chunks, written whole or not at all.

    Sums are integers and chunks are fixed by the plan, so it does not matter which process wrote a file, nor when: a
    killed sweep loses the chunks in flight and nothing else, and two runs of one sweep do not disturb each other. Every
    file carries the digest of its sweep, so that files are of use even where the head, which says what sweep it is, is
    damaged. `notes` say what was found damaged, `goes_on` whether chunks of the sweep were there.
    """

    def __init__(self, folder: Path, plan: Plan, chunk_size: ChunkSize = CPU_CHUNKS) -> None:
        """Open the journal of a plan in a result folder, of chunks of some size.

        Raises InputError if another unfinished sweep is in it, be it running or stopped; OSError.
        """
        self._folder, self._plan, self._chunk_size = folder / ".partial", plan, chunk_size
        self._digest = digest_of(plan.identity)
        self._chunks: dict[Stage, list[range]] = {}
        self.notes: list[str] = []
        self._claim()
        found = self._read_head()
        if found is None:
            aside = self._folder / f"{_HEAD}.damaged"
            (self._folder / _HEAD).replace(aside)
            self.notes.append(
                f"{self._folder / _HEAD} was damaged: it is set aside as {aside.name}, and the sweep goes on"
            )
            self._claim()
        elif found != self._digest:
            raise InputError(
                f"`out` {folder} holds another unfinished sweep, or one of an earlier version; choose another folder, or "
                f"delete {self._folder}"
            )
        self.goes_on = any(self._folder.glob("*.npz"))

    def _read_head(self) -> str | None:
        """Digest of the sweep that the head names; None where it is damaged."""
        try:
            head: Any = read_json(self._folder / _HEAD, _HEAD)
        except InputError:
            return None
        if isinstance(head, dict) and "schema" in head:  # of an earlier version
            return ""
        sound = isinstance(head, dict) and digest_of(head.get("sweep")) == head.get("sha256")
        return str(head["sha256"]) if sound else None

    def _claim(self) -> None:
        """Write the head, unless one is there: of two processes one is first, and the other sees it whole."""
        self._folder.mkdir(parents=True, exist_ok=True)
        mine = self._folder / f".{_HEAD}.{os.getpid()}.tmp"
        mine.write_text(json.dumps({"sweep": self._plan.identity, "sha256": self._digest}))
        with contextlib.suppress(FileExistsError):
            os.link(mine, self._folder / _HEAD)
        mine.unlink(missing_ok=True)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if error is not None and not any(self._folder.glob("*.npz")):
            self.clear()  # nothing was done: leave nothing

    def finished(self, stage: Stage) -> Iterator[tuple[range, Tally | None]]:
        """Draws of a stage with their sums: runs of chunks that are kept, and, with None, single chunks that are missing."""
        chunks, width = self._chunks_of(stage), 1
        while width < len(chunks):
            width *= _FOLD
        yield from self._finished(stage, 0, width)

    def _finished(self, stage: Stage, first: int, width: int) -> Iterator[tuple[range, Tally | None]]:
        chunks = self._chunks_of(stage)
        draws = _joined(chunks[first : first + width])
        kept = self.read(stage, draws) if self._path(stage, draws).exists() else None
        if kept is not None or width == 1:
            yield draws, kept
            return
        part, complete = width // _FOLD, True
        for start in range(first, min(first + width, len(chunks)), part):
            for run, tally in self._finished(stage, start, part):
                complete &= tally is not None
                yield run, tally
        if complete:  # it was stopped before it folded them
            self._fold(stage, first, part)

    def add(self, stage: Stage, draws: range, tally: Tally) -> None:
        """Keep the sums of a finished chunk, and fold it with its neighbours once they are all there. Raises OSError."""
        self._write(stage, draws, tally)
        chunks = self._chunks_of(stage)
        place, part = chunks.index(draws), 1
        while part < len(chunks) and self._fold(stage, place // (part * _FOLD) * part * _FOLD, part):
            part *= _FOLD

    def _fold(self, stage: Stage, first: int, part: int) -> bool:
        """Put the files of runs of `part` chunks into one, if all are there; whether it is done."""
        chunks = self._chunks_of(stage)
        stop = min(first + part * _FOLD, len(chunks))
        runs = [_joined(chunks[start : min(start + part, stop)]) for start in range(first, stop, part)]
        if len(runs) == 1:
            return True  # the last one, which has no neighbours: its file has the name of the sum
        if len(runs) < _FOLD or not all(self._path(stage, run).exists() for run in runs):
            return False
        total: Tally | None = None
        for run in runs:
            if (tally := self.read(stage, run)) is None:  # another process has just folded them
                return False
            if total is None:
                total = tally
            else:
                total.add(tally)
        assert total is not None
        total.compact()
        self._write(stage, _joined(chunks[first:stop]), total)
        for run in runs:
            self._path(stage, run).unlink(missing_ok=True)
        return True

    def finish(self, stage: Stage, total: Tally) -> None:
        """Keep the sums of a whole stage, in one file in the place of those of its chunks. Raises OSError."""
        draws = _joined(self._chunks_of(stage))
        whole = self._path(stage, draws)
        if not whole.exists():
            self._write(stage, draws, total)
            for path in self._folder.glob(f"trials-{stage.trials.start}-{stage.trials.stop}-draws-*.npz"):
                if path != whole:
                    path.unlink(missing_ok=True)

    def _write(self, stage: Stage, draws: range, tally: Tally) -> None:
        arrays = {field.name: getattr(tally, field.name) for field in fields(Tally)}
        for _ in range(_TRIES):
            try:
                with whole_files(self._path(stage, draws)) as (path,), path.open("wb") as file:
                    np.savez(file, sweep=np.array(self._digest), **arrays)
                return
            except FileNotFoundError:  # another process has finished this sweep, and the folder is gone
                with contextlib.suppress(FileNotFoundError):
                    self._claim()

    def read(self, stage: Stage, draws: range) -> Tally | None:
        """Sums of a run of chunks, None if it is not there (or its file is damaged: it is computed again)."""
        names = {field.name for field in fields(Tally)}
        try:
            with self._path(stage, draws).open("rb") as file, np.load(file, allow_pickle=False) as arrays:
                if set(arrays.files) != {"sweep", *names} or str(arrays["sweep"]) != self._digest:
                    return None
                if all(arrays[name].dtype == np.int64 for name in names):
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

    def _chunks_of(self, stage: Stage) -> list[range]:
        if stage not in self._chunks:
            self._chunks = {stage: stage_chunks(self._plan, stage, self._chunk_size)}
        return self._chunks[stage]

    def _path(self, stage: Stage, draws: range) -> Path:
        return self._folder / f"trials-{stage.trials.start}-{stage.trials.stop}-draws-{draws.start}-{draws.stop}.npz"


def _joined(chunks: list[range]) -> range:
    return range(chunks[0].start, chunks[-1].stop)
