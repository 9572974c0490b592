"""Traffic that is made: synthetic routing token by token, and the popularity that has a wanted imbalance.

Popularity is scaled about the mean of its layer: logits mu become scale * mu. Scale 1 is the workload as it is, 0 has all
experts alike.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from sim.errors import InputError, whole_number
from sim.model import ModelSpec, load_model
from sim.placement import check_ep_size, place_fixed
from sim.progress import track
from sim.router import check_pair, draw_trials
from sim.scoring import score
from sim.stats import student_quantile
from sim.streams import stream_key
from sim.traffic import FittedLayers, SyntheticTraffic, Workload, load_workload
from sim.traffic.presets import Published, published_figures
from sim.traffic.recorded import RecordedTraffic, build_record

LARGE_STEP = 16_384
"""Tokens per step where nobody says: so many that imbalance is that of the popularity."""
_LAYERS = 64  # of a workload that has none of its own, where an imbalance is a mean over layers
_MISFIT_TOKENS = 2**20  # sampled for each published figure
_MOST_SCALE = 8.0
_SEARCHES = 12
_CLOSE = 0.002
_MOST_IDS = 2**29


class Imbalance(NamedTuple):
    """A mean imbalance with the half-width of its 95 % interval over layers."""

    mean: float
    half: float


@dataclass(frozen=True)
class Match:
    """A workload whose popularity is scaled to a wanted imbalance.

    Attributes
    ----------
    name : str
    unscaled, unscaled_half : float
        Mean imbalance of the workload as it is, and the half-width of its 95 % interval over layers.
    scale : float
        Popularity scale that comes nearest.
    reached : float
        Mean imbalance with it.
    """

    name: str
    unscaled: float
    unscaled_half: float
    scale: float
    reached: float


def scaled(
    workload: SyntheticTraffic, model: ModelSpec, n_layers: int, scale: float, seed: int = 0
) -> SyntheticTraffic:
    """A workload with layers of its own, its popularity scaled; where popularity is drawn, `n_layers` layers are drawn.

    Raises
    ------
    InputError
        The workload does not go with the model.
    """
    check_pair(model, workload)
    n_layers = workload.n_layers or n_layers
    key = stream_key(seed, f"popularity of {workload.name}")
    mu = workload.draw_popularity(key, np.arange(n_layers), model.n_experts)
    mu = scale * (mu - mu.mean(axis=1, keepdims=True))
    layers = workload.layers or FittedLayers.of(mu)
    return replace(workload, popularity="fitted", sigma=0.0, layers=replace(layers, mu=np.clip(mu, -50, 50)))


def mean_imbalances(
    workload: Workload,
    model: ModelSpec,
    ep_sizes: list[int],
    tokens: int = LARGE_STEP,
    n_layers: int = _LAYERS,
    seed: int = 0,
    worst_of: int = 1,
) -> list[Imbalance]:
    """Mean over layers of max / mean rank load of a step under linear placement, a step of each layer, at several EP sizes.

    With `worst_of` the mean of the largest of so many layers. Intervals are over layers, or over sets of `worst_of`.

    Raises
    ------
    InputError
        The workload or an EP size does not go with the model.
    """
    check_pair(model, workload)
    for ep_size in ep_sizes:
        check_ep_size(model, ep_size)
    n = workload.n_layers or n_layers
    counts, _ = draw_trials(model, workload, seed, range(n), n, np.array([whole_number("`tokens`", tokens, 1, 2**24)]))
    found = []
    for size in ep_sizes:
        of_layer = score(place_fixed("linear", model, size, 8), counts[:, 0]).imbalance
        of_set = of_layer[: n - n % worst_of].reshape(-1, worst_of).max(axis=1)
        half = (
            student_quantile(len(of_set) - 1) * of_set.std(ddof=1) / np.sqrt(len(of_set)) if len(of_set) > 1 else np.nan
        )
        found.append(Imbalance(float(of_set.mean()), float(half)))
    return found


def misfits(preset: str) -> list[tuple[Published, list[Imbalance]]]:
    """Of each published figure of a preset what the preset has there, on the model that it is fitted to."""
    workload = load_workload(preset)
    assert isinstance(workload, SyntheticTraffic)
    found = []
    for figure in published_figures(preset):
        n_layers = max(_MISFIT_TOKENS // figure.tokens // figure.worst_of, 2) * figure.worst_of
        model = load_model(workload.fitted_to)
        about = (figure.ep_sizes, figure.tokens, n_layers, 0, figure.worst_of)
        found.append((figure, mean_imbalances(workload, model, *about)))
    return found


def match(
    workload: SyntheticTraffic,
    model: ModelSpec,
    imbalance: float,
    ep_size: int,
    tokens: int = LARGE_STEP,
    n_layers: int = _LAYERS,
    seed: int = 0,
) -> Match:
    """The popularity scale for which a workload has a wanted mean imbalance under linear placement.

    Parameters
    ----------
    imbalance : float
        Mean over layers of max / mean rank load of a step, from 1 to `ep_size`.
    tokens : int
        Tokens per step.

    Returns
    -------
    Match
        With the nearest scale from 0 to 8, also where the wanted imbalance is out of reach: `reached` tells.

    Raises
    ------
    InputError
        An imbalance that no load has.
    """
    if not 1 <= imbalance <= ep_size:
        raise InputError(f"`imbalance` {imbalance:g}: max / mean rank load lies from 1 to `ep_sizes` {ep_size}")

    def imbalance_at(scale: float) -> Imbalance:
        own = scaled(workload, model, n_layers, scale, seed)
        return mean_imbalances(own, model, [ep_size], tokens, n_layers, seed)[0]

    def reached(scale: float) -> float:
        return imbalance_at(scale).mean

    unscaled, half = imbalance_at(1.0)
    found = {1.0: unscaled}
    low, high = 0.0, 1.0
    if unscaled >= imbalance:
        found[low] = reached(low)
    while found[high] < imbalance and high < _MOST_SCALE:  # doubled, as steep popularity takes long to sample
        low, high = high, 2 * high
        found[high] = reached(high)
    for _ in range(_SEARCHES):
        if not found[low] < imbalance < found[high]:
            break
        share = (imbalance - found[low]) / (found[high] - found[low])
        scale = low + (high - low) * min(max(share, 0.1), 0.9)  # a secant, kept from the ends
        found[scale] = reached(scale)
        if abs(found[scale] / imbalance - 1) < _CLOSE:
            break
        low, high = (scale, high) if found[scale] < imbalance else (low, scale)
    scale = min(found, key=lambda scale: (abs(found[scale] - imbalance), abs(scale - 1)))
    return Match(workload.name, unscaled, half, scale, found[scale])


def make_traffic(
    workload: SyntheticTraffic, model: ModelSpec, n_tokens: int, n_sequences: int, seed: int = 0, scale: float = 1.0
) -> RecordedTraffic:
    """Routing of tokens of some sequences in all MoE layers of a model, as an engine would record it.

    Each sequence is a request: where the workload has a request effect, its tokens share it in each layer. Layers are
    independent of each other.

    Parameters
    ----------
    workload : SyntheticTraffic
    model : ModelSpec
    n_tokens, n_sequences : int
        Sequences are as equally long as can be.
    seed : int
    scale : float
        Of the popularity; see `scaled`.

    Returns
    -------
    RecordedTraffic

    Raises
    ------
    InputError
        Numbers out of range, or a model of which the number of MoE layers is not known.
    """
    whole_number("`tokens`", n_tokens, 1, 2**24)
    whole_number("`sequences`", n_sequences, 1, n_tokens)
    n_layers = workload.n_layers or model.n_moe_layers
    if not n_layers:
        raise InputError(f"model {model.name}: a trace needs the number of MoE layers, which is not known")
    if n_tokens * n_layers * model.top_k > _MOST_IDS:
        raise InputError(
            f"`tokens` {n_tokens}: a trace holds at most {_MOST_IDS // n_layers // model.top_k} tokens of this model"
        )
    if workload.dummy_tokens:
        raise InputError("`dummy_tokens` are of steps, and a trace has none")
    own = scaled(workload, model, n_layers, scale, seed)
    lengths = np.full(n_sequences, n_tokens // n_sequences)
    lengths[: n_tokens % n_sequences] += 1
    longest = int(lengths[0])
    if own.request_sigma:
        own = replace(own, tokens_per_request=longest)
    parts = []
    for i in track(range(n_sequences), [1.0] * n_sequences):
        trials = range(
            i * n_layers, (i + 1) * n_layers
        )  # a trial is a sequence in a layer; they run through the layers in turn
        _, ids = draw_trials(model, own, seed, trials, n_layers, np.array([longest]), longest)
        parts.append(ids[:, : lengths[i]].transpose(1, 0, 2))
    layer_ids = model.moe_layer_ids if len(model.moe_layer_ids) == n_layers else range(n_layers)
    ids = np.concatenate(parts)
    return build_record(
        workload.name, f"made of {workload.name}", ids, lengths, "decode", workload.name, np.array(layer_ids)
    )


def trace_imbalance(trace: RecordedTraffic, model: ModelSpec, ep_size: int) -> float:
    """Mean over layers of max / mean rank load of all tokens of a trace, under linear placement."""
    check_ep_size(model, ep_size)
    counts = np.stack([np.bincount(layer.reshape(-1), minlength=model.n_experts) for layer in trace.topk_ids])
    return float(score(place_fixed("linear", model, ep_size, 8), counts).imbalance.mean())
