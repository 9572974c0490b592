"""Progress of long work: what works announces how far it is, and who watches shows it. By default nobody does.

Work is cut into parts, and a part into parts of its own; each has a size relative to those beside it, so that one share
of the whole, from 0 to 1, holds for all phases.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, as_completed
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")
Show = Callable[[float, str], None]


@dataclass
class _Watch:
    show: Show
    low: float = 0.0  # shares of the whole between which the present part lies
    high: float = 1.0
    name: str = ""


_watch: ContextVar[_Watch | None] = ContextVar("watch", default=None)


@contextmanager
def watching(show: Show) -> Iterator[None]:
    """Call `show(share of the whole, name of the present part)` at every announcement inside the block; who watches already goes
    on to.
    """
    outer = _watch.get()

    def show_all(share: float, name: str) -> None:
        show(share, name)
        if outer is not None:
            outer.show(outer.low + share * (outer.high - outer.low), name)

    token = _watch.set(_Watch(show_all))
    try:
        yield
    finally:
        _watch.reset(token)


@contextmanager
def phase(name: str, sizes: Mapping[str, float]) -> Iterator[None]:
    """The block is the part `name` of the parts that `sizes` lists in their order."""
    watch, names = _watch.get(), list(sizes)
    if watch is None:
        yield
        return
    before, whole = sum(sizes[other] for other in names[: names.index(name)]), sum(sizes.values()) or 1.0
    with _part(watch, before / whole, (before + sizes[name]) / whole, name):
        yield
        watch.show(watch.high, watch.name)


@contextmanager
def _part(watch: _Watch, start: float, stop: float, name: str) -> Iterator[None]:
    low, high, outer = watch.low, watch.high, watch.name
    watch.low, watch.high = low + start * (high - low), low + stop * (high - low)
    watch.name = ": ".join(filter(None, (outer, name)))
    watch.show(watch.low, watch.name)
    try:
        yield
    finally:
        watch.low, watch.high, watch.name = low, high, outer


def advance(share: float) -> None:
    """Say that this share of the present part is done."""
    watch = _watch.get()
    if watch is not None:
        watch.show(watch.low + min(max(share, 0.0), 1.0) * (watch.high - watch.low), watch.name)


def track(items: Iterable[T], sizes: Sequence[float], names: Sequence[str] = ()) -> Iterator[T]:
    """Yield items, each a part of its size: what makes it, and what is done with it before the next one is asked for."""
    watch, left = _watch.get(), iter(items)
    if watch is None:
        yield from left
        return
    whole, done = sum(sizes) or 1.0, 0.0
    for i, size in enumerate(sizes):
        with _part(watch, done / whole, (done + size) / whole, names[i] if names else ""):
            try:
                yield next(left)
            except StopIteration:
                return
        done += size
    watch.show(watch.high, watch.name)


def map_on(pool: Executor, work: Callable[[S], T], items: Iterable[S], sizes: Sequence[float]) -> list[T]:
    """What `work` makes of each item, in their order. What is done is announced by size, whatever ends first; after an error
    nothing that waits is begun.
    """
    futures = [pool.submit(work, item) for item in items]
    size_of, whole, done = dict(zip(futures, sizes, strict=True)), sum(sizes) or 1.0, 0.0
    try:
        for future in as_completed(futures):
            future.result()
            done += size_of[future]
            advance(done / whole)
    except BaseException:
        pool.shutdown(cancel_futures=True)
        raise
    return [future.result() for future in futures]
