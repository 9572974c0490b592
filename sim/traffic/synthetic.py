"""Synthetic traffic: popularity of experts by layer, drawn or given as tables, request and group effects, Gumbel noise."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
from scipy.special import ndtri

from sim.errors import InputError, shown, whole_number
from sim.kernels import kernel
from sim.streams import CONTEXT, LOCAL, POPULARITY, REQUEST, STRENGTH, fill_words, normals, uniforms
from sim.traffic.fitted import FittedLayers

X0 = -4.0
"""Offset of the logits before the sigmoid."""
POPULARITIES = ("none", "lognormal", "tilted", "fitted")

CONTEXTS = 8
"""Contexts of a request, each with a local effect of its own, where there is one and it has no passages."""
PASSAGES, OF_PASSAGE = 4, 4
"""Passages of a request, where it has any, and contexts of each."""
MOST_KINDS = 8
"""Lengths of contexts that traffic may mix."""

FROM_ARRAYS = "popularity as an array goes through sim.synthetic_traffic(popularity=...)"
_MOST_STRENGTH = 4.0  # standard deviations above the mean, so that no logit leaves the range of floats
_LEAST_POPULARITY = 1e-9  # over the mean of the layer: a zero is never seen, and its logarithm is finite

# The tilted popularity, fitted to DeepSeek-R1 on GPQA: see `_tilted`.
STEEP_TILT, STEEP_SHARE = 1.485, 8 / 58
TILT_MEAN, TILT_SD = 0.566, 0.264
SPREAD_MEAN, SPREAD_SD, SPREAD_RANGE = 0.58, 0.10, (0.40, 0.95)
STUDENT_DF = 6


@dataclass(frozen=True)
class SyntheticTraffic:
    """Traffic whose logits are mu[e] + request_sigma * B[request, e] + group_sigma * A[token, group] + Gumbel noise.

    Fitted layers may add C[kind, e], of the kind that a token draws for itself: what makes experts go together.

    B may decay along the sequence: B = sqrt(1 - local_share) * topic + sqrt(local_share) * local, both standard normal. The
    topic holds for the request. The local effect is that of the token's context, one of CONTEXTS that a request draws for
    itself; in each, B is scaled to a mean square over experts of 1: real contexts differ in the experts that they favour,
    and hardly in how strongly they do. A token is the first of a stretch with probability 1 / (mean length), of whichever
    kind the stretch before is, and then takes a context at random, so two tokens of a request that are `lag` apart have the
    same context with probability `same_context(lag)`, wherever they lie: a mixture of geometric decays.

    The local effect may have two scales: local = sqrt(1 - passage_share) * own + sqrt(passage_share) * passage. A request then
    has PASSAGES with OF_PASSAGE contexts each. A token begins a passage at random with probability 1 / passage_tokens, and its
    context is one of the passage. What all tokens have of the long scale then lies beside what they have of the short one,
    where a mixture of long and short stretches has either.

    Requests may differ in how strongly they favour experts, a few much more than others: B then is times
    exp(strength_sd * (x - 1)), x the request's standard exponential.

    Attributes
    ----------
    name, about, source, fitted_to : str
        Preset name, a line on what it stands for, where its figures come from, and the model that they were taken on.
    popularity : str
        How mu is drawn per layer: 'none' (0), 'lognormal' (normal with sd `sigma`), 'tilted' (falls with the index) or
        'fitted' (the rows of `layers` in turn).
    sigma, group_sigma, request_sigma : float
        Standard deviations of mu, of the group effect of a token and of the expert effect of a request.
    tokens_per_request : int
        Consecutive tokens that share a request; without a request effect every token is a request of its own (decode).
    local_share : float or tuple of float [layers]
        Share of the request effect's variance that is local, 0 (none) to 1; of fitted layers one number, or one for each.
    context_tokens : tuple of float
        Mean length of the stretches of a context, one number for each kind of stretch, at least 1.
    context_shares : tuple of float
        Share of the tokens that lie in stretches of each kind; sums to 1.
    passage_share : float or tuple of float [layers]
        Share of the local variance that a passage's contexts have in common, 0 (no passages) to 1.
    passage_tokens : float
        Mean length of a passage, at least 1.
    strength_sd : float
        Standard deviation, between requests, of the logarithm of the strength of their effect, 0 to 1.5.
    dummy_tokens : int
        Padding tokens per step, as run by idle data-parallel ranks: all take the experts of one token, which is drawn once
        for each layer draw.
    layers : FittedLayers, optional
        Of fitted popularity; its tables also say what B is.
    whole_requests : bool
        Whether a step must hold all tokens of its requests, as a decode step does; a prefill step may end within one.
    """

    name: str
    about: str = ""
    source: str = ""
    fitted_to: str = ""
    popularity: str = "none"
    sigma: float = 0.0
    group_sigma: float = 0.0
    request_sigma: float = 0.0
    tokens_per_request: int = 1024
    local_share: float | tuple[float, ...] = 0.0
    context_tokens: tuple[float, ...] = (2.5, 40.0)
    context_shares: tuple[float, ...] = (0.5, 0.5)
    passage_share: float | tuple[float, ...] = 0.0
    passage_tokens: float = 64.0
    strength_sd: float = 0.0
    dummy_tokens: int = 0
    layers: FittedLayers | None = field(default=None, repr=False)
    whole_requests: bool = field(default=False, repr=False)

    def __post_init__(self) -> None:
        where = f"workload {shown(self.name)}: "
        for name in ("name", "about", "source", "fitted_to"):
            value = getattr(self, name)
            if not isinstance(value, str) or (name == "name" and not value):
                raise InputError(f"{where}{name} must be a string, not {shown(value)}")
        if not isinstance(self.popularity, str):
            raise InputError(f"{where}popularity must be one of {', '.join(POPULARITIES)}; {FROM_ARRAYS}")
        if self.popularity not in POPULARITIES:
            raise InputError(
                f"{where}popularity must be one of {', '.join(POPULARITIES)}, not {shown(self.popularity)}"
            )
        if (self.popularity == "fitted") != isinstance(self.layers, FittedLayers):
            raise InputError(f"{where}popularity 'fitted' and a table mu [layers, n_experts] go together")
        for name, most in (("sigma", 5), ("group_sigma", 5), ("request_sigma", 5), ("strength_sd", 1.5)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= most:
                raise InputError(f"{where}{name} must be a number from 0 to {most}, not {shown(value)}")
        whole_number(f"{where}tokens_per_request", self.tokens_per_request, 1, 2**31)
        self._check_local(where)
        whole_number(f"{where}dummy_tokens", self.dummy_tokens, 0, 2**24)

    def _check_local(self, where: str) -> None:
        """Check what says how a request effect decays, and make tuples of lists."""
        for name in ("local_share", "passage_share"):
            of_name = getattr(self, name)
            shares: Sequence[Any] = of_name if isinstance(of_name, list | tuple) else [of_name]
            for value in shares:
                if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
                    raise InputError(f"{where}{name} must be a number from 0 to 1, not {shown(value)}")
            if isinstance(of_name, list | tuple):
                if self.layers is None or len(shares) != len(self.layers.mu):
                    raise InputError(f"{where}{name} must be one number, or one for each layer of mu")
                object.__setattr__(self, name, tuple(map(float, shares)))
        tokens: Any = self.passage_tokens
        if isinstance(tokens, bool) or not isinstance(tokens, Real) or not 1 <= float(tokens) <= 2**20:
            raise InputError(f"{where}passage_tokens must be a number from 1 to {2**20}, not {shown(tokens)}")
        for name, least, most in (("context_tokens", 1, 2**20), ("context_shares", 0, 1)):
            values: Any = getattr(self, name)
            if not isinstance(values, list | tuple) or not 1 <= len(values) <= MOST_KINDS:
                raise InputError(f"{where}{name} must be a list of 1 to {MOST_KINDS} numbers, not {shown(values)}")
            for value in values:
                if isinstance(value, bool) or not isinstance(value, Real) or not least <= float(value) <= most:
                    raise InputError(f"{where}{name} must be numbers from {least} to {most}, not {shown(value)}")
            object.__setattr__(self, name, tuple(map(float, values)))
        if len(self.context_tokens) != len(self.context_shares) or abs(sum(self.context_shares) - 1) > 1e-3:
            raise InputError(f"{where}context_shares must sum to 1, a share for each of context_tokens")

    @property
    def n_contexts(self) -> int:
        """Contexts of a request that differ in their effect: 1 where its effect does not decay."""
        if self.request_sigma == 0 or not np.any(self.local_share):
            return 1
        return self.n_passages * OF_PASSAGE if self.n_passages else CONTEXTS

    @property
    def n_passages(self) -> int:
        """Passages of a request that differ in their effect; 0 without."""
        return PASSAGES if self.request_sigma > 0 and np.any(self.local_share) and np.any(self.passage_share) else 0

    def same_context(self, lag: Any) -> np.ndarray:
        """Probability that two tokens of a request, `lag` tokens apart, have the same context; float64, of lag's shape."""
        if self.n_passages:
            return same_passage(lag, self.context_tokens, self.context_shares, self.passage_tokens)[1]
        return same_context(lag, self.context_tokens, self.context_shares)

    @property
    def n_layers(self) -> int | None:
        """Layers to draw from: those of the tables; None where each draw has its own popularity."""
        return None if self.layers is None else len(self.layers.mu)

    @property
    def law(self) -> dict[str, Any]:
        """Everything that changes the distribution, and nothing else."""
        law: dict[str, Any] = {"popularity": self.popularity, "group_sigma": self.group_sigma, "x0": X0}
        if self.popularity == "lognormal":
            law["sigma"] = self.sigma
        if self.layers is not None:
            law["layers"] = self.layers.digest
            law |= {} if self.layers.kind_shares is None else {"kinds": self.layers.kind_shares.shape[1]}
        if self.request_sigma > 0:
            law |= {"request_sigma": self.request_sigma, "tokens_per_request": self.tokens_per_request}
            law |= {"strength_sd": self.strength_sd} if self.strength_sd else {}
        if self.n_contexts > 1:
            law |= {"local_share": self.local_share, "contexts": self.n_contexts}
            law |= {"context_tokens": self.context_tokens, "context_shares": self.context_shares}
        if self.n_passages:
            law |= {
                "passages": self.n_passages,
                "passage_share": self.passage_share,
                "passage_tokens": self.passage_tokens,
            }
        if self.dummy_tokens:
            law["dummy_tokens"] = self.dummy_tokens
        return law

    def draw_popularity(self, key: np.ndarray, draws: np.ndarray, n_experts: int) -> np.ndarray:
        """mu of layer draws int64 [draws], float64 [draws, n_experts]."""
        if self.layers is not None:
            return self.layers.mu[draws % len(self.layers.mu)]
        if self.popularity == "none":
            return np.zeros((len(draws), n_experts))
        if self.popularity == "lognormal":
            return self.sigma * ndtri(uniforms(key, POPULARITY, 0, (len(draws), n_experts), draws))
        return _tilted(uniforms(key, POPULARITY, 0, (len(draws), 3 + 4 * n_experts), draws), n_experts)

    def draw_logits(
        self, key: np.ndarray, mu: np.ndarray, trials: np.ndarray, draws: np.ndarray, n_tokens: int
    ) -> np.ndarray:
        """Mean logits of the requests of trials int64 [trials] of the draws given, float64 [trials, requests * contexts,
        n_experts], those of the contexts of a request one after another; mu [trials, n_experts].
        """
        if self.request_sigma == 0:
            return mu[:, None, :]
        n_factors = 0 if self.layers is None else self.layers.request_loadings.shape[1]
        shape = (len(mu), mu.shape[1] + n_factors)
        topics = [
            ndtri(uniforms(key, REQUEST, request, shape, trials))
            for request in range(-(-n_tokens // self.tokens_per_request))
        ]
        if self.n_contexts > 1:
            effects = self._draw_local(key, trials, draws, topics)
        else:
            if self.layers is not None:
                topics = [self.layers.request_effect(topic, draws) for topic in topics]
            effects = np.stack(topics, axis=1)[:, :, None]
        effects *= self.request_sigma
        if self.strength_sd:
            of_request = uniforms(key, STRENGTH, 0, (len(mu), len(topics)), trials)
            effects *= strengths(self.strength_sd, of_request)[:, :, None, None]
        effects += mu[:, None, None, :]
        return effects.reshape(len(mu), -1, mu.shape[1])

    def _draw_local(
        self, key: np.ndarray, trials: np.ndarray, draws: np.ndarray, topics: list[np.ndarray]
    ) -> np.ndarray:
        """B of the contexts of requests, each with a local effect beside the topic, float64 [trials, normals]: float64 [trials,
        requests, contexts, n_experts].
        """
        of_layers = np.resize(self.local_share, self.n_layers or 1), np.resize(self.passage_share, self.n_layers or 1)
        share, in_passage = (x[draws % len(x), None] for x in of_layers)
        n_contexts, n_passages = self.n_contexts, self.n_passages
        if not n_passages:
            in_passage = np.zeros_like(in_passage)
        of_topic, of_local = np.sqrt(1 - share), np.sqrt(share * (1 - in_passage)).astype(np.float32)
        of_passage = np.sqrt(share * in_passage).astype(np.float32)
        variance = 1.0 if self.layers is None else self.layers.request_variance[draws % len(self.layers.mu)]
        n_factors = 0 if self.layers is None else self.layers.request_loadings.shape[1]
        found = np.empty((len(trials), len(topics), n_contexts, topics[0].shape[1] - n_factors))
        for request, topic in enumerate(topics):
            drawn: np.ndarray = np.empty((n_contexts + n_passages, *topic.shape), np.float32)
            for i, effect in enumerate(drawn):
                effect[:] = normals(key, LOCAL, request * len(drawn) + i, topic.shape, trials)
            effects = drawn[:n_contexts]
            effects *= of_local
            effects += (of_topic * topic).astype(np.float32)
            if n_passages:
                effects += of_passage * np.repeat(drawn[n_contexts:], OF_PASSAGE, axis=0)
            if self.layers is not None:
                effects = self.layers.request_effect(effects, draws)
            found[:, request] = of_one_strength(effects, variance).transpose(1, 0, 2)
        return found

    def draw_contexts(self, key: np.ndarray, trials: np.ndarray, n_tokens: int) -> np.ndarray:
        """Context of each token of trials int64 [trials], uint8 [trials, n_tokens]; [trials, 0] where there is but one."""
        if self.n_contexts == 1:
            return np.empty((len(trials), 0), np.uint8)
        contexts = np.empty((len(trials), n_tokens), np.uint8)
        leave, shares = 1 / np.array(self.context_tokens), np.array(self.context_shares)
        chances = np.array([shares, shares * leave])  # of kinds, at a token and at the begin of a stretch
        chances = np.cumsum(chances / chances.sum(axis=1, keepdims=True), axis=1)
        chances[:, -1] = 1.0
        move = _in_words(np.array([1 / self.passage_tokens if self.n_passages else 0.0, 1.0]))[0]
        of_passage = OF_PASSAGE if self.n_passages else CONTEXTS
        sizes = np.array([self.n_contexts, of_passage], np.uint64)
        fill_contexts(key, trials, self.tokens_per_request, _in_words(leave), _in_words(chances), move, sizes, contexts)
        return contexts

    def kinds(self, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """Kinds of the tokens of layer draws int64 [draws]: their cumulated chances in units of 2**-32, uint64 [draws, kinds],
        and what each adds to the logits, float64 [draws, kinds, n_experts]; None where there is but one kind.
        """
        if self.layers is None or self.layers.kind_shares is None or self.layers.kind_effects is None:
            return one_kind(len(draws)), None
        rows = draws % len(self.layers.mu)
        ends = np.cumsum(self.layers.kind_shares[rows], axis=1)
        return _in_words(ends / ends[:, -1:]), self.layers.kind_effects[rows]


def same_context(lag: Any, context_tokens: Sequence[float], context_shares: Sequence[float]) -> np.ndarray:
    """`SyntheticTraffic.same_context` of stretches of given mean lengths, in tokens, and their shares of the tokens."""
    lag = np.asarray(lag, float)[..., None]
    same_stretch = ((1 - 1 / np.array(context_tokens)) ** lag) @ np.array(context_shares)
    return same_stretch + (1 - same_stretch) / CONTEXTS


def same_passage(
    lag: Any, context_tokens: Sequence[float], context_shares: Sequence[float], passage_tokens: float
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities that two tokens of a request, `lag` tokens apart, are of one passage, and of one context, where there are
    passages; float64, of lag's shape.
    """
    lag = np.asarray(lag, float)
    stayed = (1 - 1 / passage_tokens) ** lag
    same_stretch = ((1 - 1 / np.array(context_tokens)) ** lag[..., None]) @ np.array(context_shares)
    in_one = same_stretch + (1 - same_stretch) / OF_PASSAGE
    return stayed + (1 - stayed) / PASSAGES, stayed * in_one + (1 - stayed) / (PASSAGES * OF_PASSAGE)


def of_one_strength(effects: np.ndarray, variance: Any) -> np.ndarray:
    """Effects [..., n_experts], each scaled so that its mean square over experts is `variance` [...]."""
    square = np.einsum("...e,...e->...", effects, effects) / effects.shape[-1]
    return effects * np.sqrt(variance / np.maximum(square, 1e-30))[..., None]


def strengths(strength_sd: float, u: np.ndarray) -> np.ndarray:
    """Strengths of requests from uniforms."""
    return np.exp(strength_sd * np.minimum(-np.log1p(-u) - 1, _MOST_STRENGTH))


def _in_words(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities in units of 2**-32, uint64: a word is below one with that probability."""
    return np.round(probabilities * 2.0**32).astype(np.uint64)


@kernel
def fill_contexts(key, trials, tokens_per_request, leave, chances, move, sizes, contexts):
    """Contexts of the tokens of trials int64 [trials]: contexts uint8 [trials, tokens].

    leave uint64 [kinds] is the chance that a token begins a new stretch, by the kind of the one before; chances uint64
    [2, kinds] are cumulated over kinds, of the stretch that a request begins in and of a later one; `move` is the chance that
    a token begins a new passage; all in units of 2**-32. sizes uint64 [2]: contexts of a request, and of a passage of it.
    """
    words = np.empty((4, 512), np.uint32)
    for t in range(contexts.shape[0]):
        kind, context, place = 0, np.uint64(0), np.int64(0)
        for start in range(0, contexts.shape[1], 512):
            n = min(512, contexts.shape[1] - start)
            fill_words(key, CONTEXT, trials[t], np.arange(start, start + n), words)
            for i in range(n):
                leaves = np.uint64(words[0, i]) < leave[kind]
                if place == 0 or leaves:
                    law = chances[0 if place == 0 else 1]
                    kind = 0
                    while np.uint64(words[1, i]) >= law[kind]:
                        kind += 1
                if place == 0 or np.uint64(words[3, i]) < move:
                    context = (np.uint64(words[2, i]) * sizes[0]) >> np.uint64(32)
                elif leaves:
                    context += ((np.uint64(words[2, i]) * sizes[1]) >> np.uint64(32)) - context % sizes[1]
                contexts[t, start + i] = context
                place = place + 1 if place + 1 < tokens_per_request else 0


def one_kind(n: int) -> np.ndarray:
    """The chances of kinds of n layers whose tokens are all of one, as `SyntheticTraffic.kinds` gives them."""
    return np.full((n, 1), 2**32, np.uint64)


def synthetic_traffic(
    popularity: Any = None,
    *,
    group_sigma: float = 0.0,
    request_sigma: float = 0.0,
    tokens_per_request: int = 1024,
    local_share: float | Sequence[float] = 0.0,
    context_tokens: Sequence[float] = (2.5, 40.0),
    context_shares: Sequence[float] = (0.5, 0.5),
    dummy_tokens: int = 0,
    name: str = "synthetic",
) -> SyntheticTraffic:
    """Traffic with given popularities of experts, as a workload for every function that takes one.

    Parameters
    ----------
    popularity : array [n_experts] or [layers, n_experts], optional
        Relative popularity of each expert, such as its share of the load: not negative, in any unit. The logit of an expert
        is the logarithm of its popularity over the layer's mean; without group and request effects, and in a router without
        groups, tokens are drawn in proportion to it, without replacement. One row is the popularity of every layer. Without
        it all experts are alike.
    group_sigma : float
        Standard deviation of what a token adds to all experts of a group, 0 to 5 (the presets have 0.4).
    request_sigma : float
        Standard deviation of what a request adds to each expert, 0 to 5.
    tokens_per_request : int
        Consecutive tokens that share a request.
    local_share : float or sequence of float [layers]
        Share of the variance of the request effect that holds for a context only, 0 to 1; the rest holds for the request.
    context_tokens : sequence of float
        Mean lengths of a context's stretches, in tokens: one number for each kind of stretch.
    context_shares : sequence of float
        Shares of the tokens that lie in stretches of each kind.
    dummy_tokens : int
        Padding tokens per step, as run by idle data-parallel ranks.
    name : str
        Name of the workload in tables and figures.

    Returns
    -------
    SyntheticTraffic

    Raises
    ------
    InputError
        Popularity that is no table of numbers, is negative or not finite, or is 0 for all experts of a layer; an effect out
        of its range.

    Examples
    --------
    >>> hot = synthetic_traffic([8.0] + 63 * [1.0], name="one hot expert")
    >>> hot.n_layers, hot.layers.mu.shape
    (1, (1, 64))
    >>> float(round(hot.layers.mu[0, 0] - hot.layers.mu[0, 1], 3))  # the logarithm of 8
    2.079
    """
    effects: dict[str, Any] = {"group_sigma": group_sigma, "request_sigma": request_sigma}
    effects |= {"tokens_per_request": tokens_per_request, "dummy_tokens": dummy_tokens, "local_share": local_share}
    effects |= {"context_tokens": context_tokens, "context_shares": context_shares}
    if popularity is None:
        return SyntheticTraffic(name, **effects)
    if isinstance(popularity, str):
        raise InputError(
            f"popularity must be an array [n_experts] or [layers, n_experts], not {shown(popularity)}; load_workload takes names"
        )
    try:
        shares = np.asarray(popularity)
    except ValueError:
        raise InputError(
            "popularity must be an array [n_experts] or [layers, n_experts]: its rows differ in length"
        ) from None
    if shares.dtype.kind not in "fiu" or shares.ndim not in (1, 2) or 0 in shares.shape or shares.shape[-1] < 2:
        raise InputError(
            f"popularity must be numbers [n_experts] or [layers, n_experts], not {shares.dtype} {list(shares.shape)}"
        )
    shares = np.atleast_2d(shares).astype(float)
    if not np.isfinite(shares).all() or shares.min() < 0:
        raise InputError("popularity must be finite and not negative")
    if not shares.any(axis=1).all():
        raise InputError("popularity must not be 0 for all experts of a layer")
    mu = np.log(np.maximum(shares / shares.mean(axis=1, keepdims=True), _LEAST_POPULARITY))
    return SyntheticTraffic(name, popularity="fitted", layers=FittedLayers.of(mu, where="popularity: "), **effects)


def _tilted(u: np.ndarray, n_experts: int) -> np.ndarray:
    """mu = tilt * f + spread * t6 / sqrt(1.5), from uniforms u [draws, 3 + 4 * n_experts].

    f is the centred -ln(v + 0.3), v = (e + 1/2) / n_experts, over its OLS slope on v; the tilt is steep in 8 of 58
    layers and else normal, at least 0; the spread is normal, clipped; t6 is Student's t, of variance 1.5.
    """
    tilt, spread = tilt_and_spread(u[:, 0] < STEEP_SHARE, ndtri(u[:, 1]), ndtri(u[:, 2]))
    z, *chi = np.split(u[:, 3:], 4, axis=1)
    chi_square = -2.0 * np.log(chi[0] * chi[1] * chi[2])  # 6 degrees of freedom: three exponentials
    student = ndtri(z) / np.sqrt(chi_square / STUDENT_DF)
    return tilt[:, None] * tilt_profile(n_experts) + spread[:, None] * student / np.sqrt(1.5)


def tilt_and_spread(steep: np.ndarray, z_tilt: np.ndarray, z_spread: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tilt and spread of layers of tilted popularity: from whether the tilt is steep, and two standard normals."""
    tilt = np.where(steep, STEEP_TILT, np.maximum(0.0, TILT_MEAN + TILT_SD * z_tilt))
    return tilt, np.clip(SPREAD_MEAN + SPREAD_SD * z_spread, *SPREAD_RANGE)


def tilt_profile(n_experts: int) -> np.ndarray:
    """How a tilted popularity falls with the index of the expert, at a tilt of 1: float64 [n_experts], mean 0."""
    v = (np.arange(n_experts) + 0.5) / n_experts
    f = -np.log(v + 0.3)
    f -= f.mean()
    slope = np.dot(v - v.mean(), f) / np.dot(v - v.mean(), v - v.mean()) if n_experts > 1 else 1.0
    return f / abs(slope)
