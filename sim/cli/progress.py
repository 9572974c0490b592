"""A line on the terminal that says how far the work is, and how long all that is left of it will take."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from sim.progress import watching


def time_left_s(elapsed_s: float, share: float) -> float:
    """Seconds left where `share` of the work took `elapsed_s`; inf where nothing is known."""
    return elapsed_s * (1 - share) / share if share > 0 else float("inf")


def _clock(seconds: float) -> str:
    if seconds == float("inf"):
        return "--:--"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"


@contextmanager
def shown_progress() -> Iterator[None]:
    """Show what is announced inside the block (`sim.progress`), on stderr if that is a terminal; then wipe it out."""
    if not sys.stderr.isatty():
        yield
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
    from rich.table import Column

    from sim.kernels import is_cold

    cold, started_s, start_share = is_cold(), time.monotonic(), 0.0
    columns = (
        TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)),
        BarColumn(20),
        TaskProgressColumn(),
        TextColumn("{task.fields[left]} left"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, redirect_stdout=False, expand=True) as bar:
        task = bar.add_task("compiling" if cold else "starting", total=1.0, left="--:--")

        def show(share: float, name: str) -> None:
            nonlocal cold, started_s, start_share
            now_s = time.monotonic()
            if cold and share > 0:  # kernels are compiled in the first part: its time tells nothing of the others
                cold, started_s, start_share = False, now_s, share
            done = (share - start_share) / (1 - start_share) if start_share < 1 else 1.0
            left = _clock(time_left_s(now_s - started_s, done))
            bar.update(task, completed=share, description=name or "working", left=left)

        with watching(show):
            yield
