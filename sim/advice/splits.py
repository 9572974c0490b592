"""Ways to part traffic into what load-aware placements are fitted on and what all placements are scored on."""

from typing import NamedTuple

from sim.model import ModelSpec
from sim.workload import LoadCounts, RecordedTraffic, Workload

Source = RecordedTraffic | LoadCounts


class Split(NamedTuple):
    """One way: no token is in both parts."""

    about: str
    scored: Workload
    fitted_on: Source | None  # None for a law: other tokens of the layers that are scored


def splits_of(model: ModelSpec, traffic: Workload, other: Source | None, seed: int) -> list[Split]:
    """The splits of some traffic, the main one first.

    Another file, if there is one, is what is fitted. Else recorded sequences are parted in turn, the other way round, and
    by their order in the file.
    """
    if other is not None:
        return [Split(f"fitted on {other.name.removeprefix('file:')}", traffic, other)]
    if not isinstance(traffic, RecordedTraffic):
        return [Split("fitted on other tokens of the same layers", traffic, None)]
    even, odd = traffic.halves()
    first, second = traffic.halves(in_order=True)
    return [
        Split("fitted on even sequences, scored on odd ones", odd, even),
        Split("fitted on odd sequences, scored on even ones", even, odd),
        Split("fitted on the first half of the file, scored on the second", second, first),
    ]
