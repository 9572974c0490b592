"""Ways to split traffic into what load-aware placements are fitted on and what all placements are scored on."""

from typing import NamedTuple

from sim.errors import InputError
from sim.fit import fit_traffic
from sim.model import ModelSpec
from sim.sweeps.placements import check_same_layers
from sim.traffic import LoadCounts, RecordedTraffic, Workload
from sim.traffic.split import MeasuredTraffic, halves_of_counts

_ONE_TABLE = (
    "both halves of one table of counts are the same traffic: how a placement does on later or other traffic does not show "
    "(--fit-on)"
)


class Split(NamedTuple):
    """One way: no token is in both parts."""

    about: str
    scored: Workload
    fitted_on: MeasuredTraffic | None  # None for synthetic traffic: other tokens of the layers that are scored
    notes: tuple[str, ...] = ()  # remarks of the fit, where load counts are scored as synthetic traffic


def splits_of(
    model: ModelSpec,
    traffic: Workload | LoadCounts,
    other: MeasuredTraffic | None,
    seed: int,
    threads: int | None = None,
) -> list[Split]:
    """The splits of some traffic, the main one first.

    Another file, if there is one, is what is fitted. Else recorded sequences are split in turn, the other way round, and
    by their order in the file; steps of load counts by their order and the other way round; one table of counts at random.
    Load counts are scored as tokens of synthetic traffic that is fitted to them (`fit_traffic`). Raises InputError for one
    sequence, and for counts that cannot be split, or that no router of the model gives.
    """
    if isinstance(traffic, LoadCounts):
        if other is None:
            return _of_counts(model, traffic, seed, threads)
        check_same_layers(
            f"`fit_on` {other.name.removeprefix('file:')}", other.n_layers, other.layer_ids.tolist(), traffic, model
        )
        return [_synthetic(model, f"fitted on {other.name.removeprefix('file:')}", traffic, other, seed, threads)]
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


def _synthetic(
    model: ModelSpec, about: str, scored: LoadCounts, fitted_on: MeasuredTraffic, seed: int, threads: int | None
) -> Split:
    """Counts scored as tokens of the synthetic traffic that is fitted to them."""
    if scored.digest == fitted_on.digest:
        raise InputError(f"`fit_on` {fitted_on.name.removeprefix('file:')} is the traffic that is scored")
    fit = fit_traffic(model, scored, seed=seed, threads=threads)
    return Split(about, fit.decode, fitted_on, tuple(fit.notes))


def _of_counts(model: ModelSpec, counts: LoadCounts, seed: int, threads: int | None) -> list[Split]:
    """First and second half of the steps, or halves of one table split at random, both ways round."""
    (one, two), names = halves_of_counts(counts, seed)
    splits = [
        _synthetic(model, f"fitted on {names[0]}, scored on {names[1]}", two, one, seed, threads),
        _synthetic(model, f"fitted on {names[1]}, scored on {names[0]}", one, two, seed, threads),
    ]
    return splits if len(counts.counts) > 1 else [of._replace(notes=(*of.notes, _ONE_TABLE)) for of in splits]
