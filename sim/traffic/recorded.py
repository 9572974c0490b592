"""Recorded traffic: the experts of real tokens, replayed in steps."""

import hashlib
from dataclasses import dataclass, field, replace

import numpy as np

from sim.errors import InputError, shown
from sim.kernels import kernel
from sim.streams import REPLAY, word_at

PHASES = ("decode", "prefill")
MOST_LAYERS = 256
"""No decoder has more layers: what has is tokens, on an axis that is exchanged."""
STEP_PHASES = ("continuous", "together", "independent")
"""Phases of whole steps, in which trial t is layer t % n_layers of step t // n_layers: see `RecordedTraffic`."""


@dataclass(frozen=True, eq=False)
class RecordedTraffic:
    """Routing that was recorded from a model; each layer of the record is a draw.

    Attributes
    ----------
    name : str
        'file:' and the file's name.
    phase : str
        'decode': each token of a step (each run of `tokens_per_request`) comes from another sequence, from a random place;
        sequences are reused once all have given one.
        'prefill': consecutive tokens of one sequence, from a random place where it is longer than the step; a step longer
        than the sequence takes all of it and goes on with another.
        'continuous': whole steps under continuous batching, all layers of the same tokens: each of a step's slots gives the
        next token of its sequence to each step, at first a random token of the record, and goes on with another sequence from
        its first token. 'together': the same, but all slots begin with a first token, as when a benchmark starts all requests
        at once. 'independent': as many tokens, any of the record, others in each layer and step.
    topk_ids : int16 [layers, tokens, top_k]
    starts : int64 [sequences + 1]
        First token of each sequence, and the number of tokens.
    digest : str
        Digest of the recorded ids and lengths.
    layer_ids : int64 [layers]
        Ids of the decoder layers, where the file or the model tells them, else 0, 1, ...
    n_experts : int
        Experts of a layer, by the model where it is known, else the largest id + 1.
    n_steps : int, optional
        Forward passes that the tokens were recorded in; None where the file has none.
    notes : tuple of str
        What the file was recognised as, and what was left out.
    tokens_per_request : int
        Of decode: consecutive tokens that a sequence gives to a step.
    """

    name: str
    phase: str
    topk_ids: np.ndarray = field(repr=False)
    starts: np.ndarray = field(repr=False)
    digest: str
    about: str = "recorded routing"
    source: str = ""
    fitted_to: str = ""
    dummy_tokens: int = 0
    layer_ids: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64), repr=False)
    n_experts: int = 0
    n_steps: int | None = None
    notes: tuple[str, ...] = ()
    tokens_per_request: int = 1

    def __post_init__(self) -> None:
        if self.whole_requests and self.phase != "decode":
            raise InputError(
                f"`tokens_per_request` {self.tokens_per_request}: only decode takes so many tokens of each request, not `phase` "
                f"{self.phase}"
            )
        if self.layer_ids.size == 0:
            object.__setattr__(self, "layer_ids", np.arange(len(self.topk_ids)))
        if not self.n_experts and self.topk_ids.size:
            object.__setattr__(self, "n_experts", int(self.topk_ids.max()) + 1)

    @property
    def n_layers(self) -> int:
        """Layers to draw from."""
        return len(self.topk_ids)

    @property
    def n_tokens(self) -> int:
        """Tokens of all sequences."""
        return self.topk_ids.shape[1]

    @property
    def n_sequences(self) -> int:
        """Sequences: requests, or what a file has of each."""
        return len(self.starts) - 1

    @property
    def expert_counts(self) -> np.ndarray:
        """Tokens that take each expert, int64 [layers, n_experts]."""
        return self.count_experts(self.n_experts)

    def count_experts(self, n_experts: int) -> np.ndarray:
        """Tokens that take each expert of a model with `n_experts`, int64 [layers, n_experts]."""
        return np.stack([np.bincount(layer.ravel(), minlength=n_experts) for layer in self.topk_ids])

    @property
    def law(self) -> dict[str, str | int]:
        """Everything that changes the distribution, and nothing else."""
        law: dict[str, str | int] = {"recorded": self.digest, "phase": self.phase}
        return law | ({"tokens_per_request": self.tokens_per_request} if self.whole_requests else {})

    @property
    def whole_requests(self) -> bool:
        """Whether a step must hold all tokens of its requests, which have several each."""
        return self.tokens_per_request > 1

    def with_runs(self, tokens_per_request: int) -> "RecordedTraffic":
        """Decode in which each sequence gives a step so many consecutive tokens, as speculative decoding does.

        Shorter sequences are left out, with a note. Raises InputError for other phases, and where no sequence is as long.
        """
        long_enough = np.diff(self.starts) >= tokens_per_request
        n_short = int((~long_enough).sum())
        if not long_enough.any():
            raise InputError(
                f"`tokens_per_request` {tokens_per_request}: no sequence of {self.name} has as many tokens"
            )
        mine = self.only_sequences(np.flatnonzero(long_enough)) if n_short else self
        left_out = f"{n_short} sequences of fewer than {tokens_per_request} tokens are left out"
        return replace(mine, tokens_per_request=tokens_per_request, notes=self.notes + ((left_out,) if n_short else ()))

    def without_shared(self, n_experts: int, top_k: int) -> "RecordedTraffic":
        """The record without shared experts that an engine fused in: ids above the routed ones, as many for each token."""
        n_more, shared = self.topk_ids.shape[2] - top_k, self.topk_ids >= n_experts
        if n_more < 1 or not (shared.sum(axis=2) == n_more).all():
            return self
        ids = self.topk_ids[~shared].reshape(*self.topk_ids.shape[:2], top_k)
        note = (
            f"{n_more} of each token's experts, from id {n_experts} on, are left out: shared experts that were fused in"
        )
        return replace(self, topk_ids=ids, digest=_digest(ids, self.starts), n_experts=0, notes=(*self.notes, note))

    def check_model(self, n_experts: int, top_k: int, model_name: str) -> None:
        """Refuse a model that cannot have made this record."""
        if self.topk_ids.shape[2] != top_k:
            raise InputError(
                f"workload {self.name} has {self.topk_ids.shape[2]} experts per token, model {model_name} has top_k {top_k}"
            )
        largest = int(self.topk_ids.max())
        if largest >= n_experts:
            raise InputError(
                f"workload {self.name} has expert id {largest}, model {model_name} has ids 0 to {n_experts - 1}: "
                "another model?"
            )

    def halves(self, *, in_order: bool = False) -> tuple["RecordedTraffic", "RecordedTraffic"]:
        """Sequences 0, 2, 4, ... and 1, 3, 5, ...: what a balancer is fitted on, and what it is scored on. Or, `in_order`,
        the first half of the file's sequences and the second.
        """
        n = len(self.starts) - 1
        if n < 2:
            raise InputError(f"workload {self.name} has one sequence: none is left to score what is fitted on it")
        names = ("first half", "second half") if in_order else ("even sequences", "odd sequences")
        is_first = np.arange(n) < n // 2 if in_order else np.arange(n) % 2 == 0
        one, other = (
            self.only_sequences(np.flatnonzero(mine), f"{self.name} [{name}]")
            for mine, name in zip((is_first, ~is_first), names, strict=True)
        )
        if one.digest == other.digest:
            raise InputError(
                f"workload {self.name}: its {names[0]} and its {names[1]} hold the same tokens: what is fitted on one would be "
                "scored on itself"
            )
        return one, other

    def only_sequences(self, chosen: np.ndarray, name: str = "") -> "RecordedTraffic":
        """The record of some of its sequences: chosen int64, ascending; its digest is that of what is left."""
        mine = np.zeros(len(self.starts) - 1, bool)
        mine[chosen] = True
        lengths = np.diff(self.starts)
        ids = np.ascontiguousarray(self.topk_ids[:, np.repeat(mine, lengths)])
        starts = np.concatenate([[0], np.cumsum(lengths[mine])])
        return replace(self, name=name or self.name, topk_ids=ids, starts=starts, digest=_digest(ids, starts))

    def in_phase(self, phase: str) -> "RecordedTraffic":
        """The same record in another phase, of PHASES or STEP_PHASES."""
        return replace(self, phase=phase)

    def sample(
        self, key: np.ndarray, trials: np.ndarray, tokens: np.ndarray, counts: np.ndarray, ids: np.ndarray
    ) -> None:
        """Replay trials, int64; trial t runs layer t % n_layers. Output as `router.sampler.sample_trials`."""
        if self.phase in STEP_PHASES:
            way = STEP_PHASES.index(self.phase)
            _replay_steps(trials, key, self.topk_ids, self.starts, way, tokens, counts, ids)
        elif self.phase == "decode":
            run = self.tokens_per_request
            _replay_decode(trials, key, self.topk_ids, self.starts, run, tokens, counts, ids)
        else:
            _replay_prefill(trials, key, self.topk_ids, self.starts, tokens, counts, ids)


def check_shapes(where: str, ids: np.ndarray, lengths: np.ndarray) -> None:
    """Refuse ids that are not [tokens, layers, top_k], or lengths of sequences that do not add up to their tokens."""
    if ids.ndim != 3 or 0 in ids.shape:
        raise InputError(f"{where}: topk_ids must have shape [tokens, layers, top_k], not {list(ids.shape)}")
    if lengths.ndim != 1 or lengths.size == 0 or lengths.min() < 1:
        raise InputError(f"{where}: sequence_lengths must be a list of whole numbers of at least 1")
    if int(lengths.max()) > len(ids) or int(lengths.sum(dtype=np.int64)) != len(ids):
        raise InputError(f"{where}: sequence_lengths must add up to the {len(ids)} tokens of topk_ids")


def build_record(
    where: str,
    name: str,
    ids: np.ndarray,
    lengths: np.ndarray,
    phase: str,
    source: str,
    layer_ids: np.ndarray | None = None,
) -> RecordedTraffic:
    """A record of checked ids [tokens, layers, top_k] and lengths [sequences].

    A router takes a token's experts once each, so a row of ids that are all one (or a lone -1) is no routing. Left out, with a
    note: columns that are -1 throughout; tokens without routing in any layer (padding; a prefix that was cached, or the last
    token of a request, which is not fed to the model); dense layers, which have none for any token; tokens that lack a layer.
    Raises InputError for shapes or ids that no router gives; `where` begins the message.
    """
    check_shapes(where, ids, lengths)
    if ids.min() < -1 or ids.max() > 2**15 - 1:
        raise InputError(f"{where}: expert ids must lie from 0 to 32767, found {ids.min()} to {ids.max()}")
    if ids.shape[1] > MOST_LAYERS:
        raise InputError(
            f"{where} has the shape {list(ids.shape)}, that is {ids.shape[1]} layers: are the axes exchanged? They must be "
            "[tokens, layers, top_k]"
        )
    notes = []
    unused = (ids == -1).all(axis=(0, 1)) if ids.min() < 0 else np.zeros(ids.shape[2], bool)
    if unused.any() and not unused.all():
        ids = ids[..., ~unused]
        notes.append(f"{unused.sum()} columns of ids that are unused (-1) are left out")
    top_k = ids.shape[2]
    empty = (ids == ids[..., :1]).all(axis=2) if top_k > 1 else ids[..., 0] == -1
    if ids.shape[1] == 1:  # one id alone, several times, is a slip; of several layers it is what fills them
        empty &= ids[..., 0] <= 0
    alone, dummy = empty.all(axis=1), _dummies(ids, empty)
    if dummy.any():
        same = f"experts 0 to {top_k - 1}" if top_k > 1 else "expert 0"
        notes.append(f"{dummy.sum()} tokens that take {same} in every layer, as padding does, are left out")
    if alone.all():
        raise InputError(f"{where} holds no tokens with routing: {_fillers(ids[..., 0])}")
    if alone.any():
        notes.append(f"{alone.sum()} tokens without routing ({_fillers(ids[alone, :, 0])}) are left out")
    alone |= dummy
    routed = ids[~alone] if alone.any() else ids
    dense = empty[~alone].all(axis=0)
    dense[dense] = (routed[:, dense] == routed[:1, dense, :1]).all(axis=(0, 2))
    if dense.any():
        notes.append(f"{dense.sum()} dense layers ({_fillers(routed[0, dense, 0])}) are left out")
        routed = routed[:, ~dense]
    lacking = (routed == -1).any(axis=(1, 2)) if routed.min(initial=0) < 0 else np.zeros(len(routed), bool)
    if 2 * lacking.sum() > len(routed):
        raise InputError(
            f"{where}: {lacking.sum()} of {len(routed)} tokens lack an expert in some layer (-1): zero-compute experts, "
            "or dropped pairs? The others alone are other traffic"
        )
    if lacking.any():
        notes.append(f"{lacking.sum()} tokens that lack an expert in a layer (-1) are left out")
        routed = routed[~lacking]
    if len(routed) < len(ids):
        kept = ~alone
        kept[kept] = ~lacking
        lengths = np.add.reduceat(kept, np.cumsum(lengths) - lengths, dtype=np.int64)
        n_empty = int((lengths == 0).sum())
        notes += [f"{n_empty} sequences of such tokens alone are left out"] if n_empty else []
        lengths = lengths[lengths > 0]
    if not len(routed):
        raise InputError(f"{where} holds no tokens with routing in all layers")
    by_layer = np.ascontiguousarray(routed.transpose(1, 0, 2).astype(np.int16, copy=False))
    numbers = (np.arange(ids.shape[1]) if layer_ids is None else np.asarray(layer_ids))[~dense]
    for layer, number in zip(by_layer, numbers, strict=True):
        ordered = np.sort(layer, axis=1)
        repeated = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
        if repeated.any():
            token = int(repeated.argmax())
            raise InputError(
                f"{where}: token {token} has the same expert id twice in one layer ({number}): {shown(layer[token].tolist())}"
            )
    starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
    return RecordedTraffic(
        name, phase, by_layer, starts, _digest(by_layer, starts), source=source, layer_ids=numbers, notes=tuple(notes)
    )


def _dummies(ids: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Tokens with experts 0, 1, ..., top_k - 1 in all layers that have routing, bool [tokens]: what routing replay pads with
    (SkyRL's `replay_padding_row`), and what a router gives where all logits are equal. None where other tokens may come to that
    by chance, or take the same experts in all layers too, as simulated routing does.
    """
    top_k, dummy = ids.shape[2], np.zeros(len(ids), bool)
    first = (ids[..., 0] == 0) & (ids[..., -1] == top_k - 1)
    found = np.flatnonzero((first | empty).all(axis=1) & first.any(axis=1))
    found = found[((ids[found] == np.arange(top_k)).all(axis=2) | empty[found]).all(axis=1)]
    layers, others = first[found].all(axis=0), np.logical_not(empty.all(axis=1))
    others[found] = False
    if not found.size or layers.sum() < 2 or not others.any():
        return dummy
    n_others, others_ids = others.sum(), ids[others][:, layers]
    by_chance = n_others * ((first[others][:, layers].sum(axis=0) + 1) / (n_others + 1)).prod()
    is_alike = (others_ids == others_ids[:, :1]).all(axis=(1, 2)).mean() > 0.1
    dummy[found] = not is_alike and len(found) > 20 * by_chance
    return dummy


def _fillers(ids: np.ndarray) -> str:
    """What rows without routing are filled with, by their first ids."""
    return f"all {shown(' or '.join(map(str, np.unique(ids))))}"


def _digest(by_layer: np.ndarray, starts: np.ndarray) -> str:
    return hashlib.sha256(by_layer.tobytes() + starts.tobytes()).hexdigest()[:32]


@kernel
def _below(n, index, row, trial, key):
    """Whole number from 0 to n - 1, from word `index` of a row of the trial's replay stream."""
    return np.int64(np.uint64(word_at(index, row, trial, REPLAY, key[0], key[1])) * np.uint64(n) >> np.uint64(32))


@kernel
def _next_sequence(place, trial, key, order):
    """Sequence at `place` of an endless series of shuffles: within a shuffle each comes once; `order` is its state."""
    n = order.size
    i = place % n
    j = i + _below(n - i, 2 * place, 0, trial, key)
    order[i], order[j] = order[j], order[i]
    return order[i]


@kernel
def _replay_decode(trials, key, topk_ids, starts, run, tokens, counts, ids):
    order = np.arange(starts.size - 1)
    running = np.empty(counts.shape[2], np.int32)
    for t in range(counts.shape[0]):
        trial = trials[t]
        layer = topk_ids[trial % topk_ids.shape[0]]
        running[:] = 0
        snapshot = 0
        for i in range(order.size):
            order[i] = i
        token = np.int64(0)
        for i in range(tokens[-1]):
            request = i // run
            if i == request * run:
                s = _next_sequence(request, trial, key, order)
                token = starts[s] + _below(starts[s + 1] - starts[s] - run + 1, 2 * request + 1, 0, trial, key)
            else:
                token += 1
            for k in range(layer.shape[1]):
                running[layer[token, k]] += 1
            if i < ids.shape[1]:
                ids[t, i] = layer[token]
            if i + 1 == tokens[snapshot]:
                counts[t, snapshot] = running
                snapshot += 1


@kernel
def _in_flight(slot, step, way, starts, key):
    """Token that a slot gives to a step: the stream's row 1 + slot has its sequences, one after the other."""
    n = starts.size - 1
    if way == 0:
        token = _below(starts[n], 0, 1 + slot, 0, key)
        s = np.searchsorted(starts, token, side="right") - 1
        place = token - starts[s] + step
    else:
        s, place = _below(n, 0, 1 + slot, 0, key), step
    index = 1
    while place >= starts[s + 1] - starts[s]:
        place -= starts[s + 1] - starts[s]
        s = _below(n, index, 1 + slot, 0, key)
        index += 1
    return starts[s] + place


@kernel
def _replay_steps(trials, key, topk_ids, starts, way, tokens, counts, ids):
    n_layers, last = topk_ids.shape[0], -1
    at = np.empty(tokens[-1], np.int64)
    running = np.empty(counts.shape[2], np.int32)
    for t in range(counts.shape[0]):
        trial = trials[t]
        step, layer = trial // n_layers, topk_ids[trial % n_layers]
        if way == 2 or step != last:
            for i in range(at.size):
                at[i] = _below(starts[-1], i, 0, trial, key) if way == 2 else _in_flight(i, step, way, starts, key)
        last = step
        running[:] = 0
        snapshot = 0
        for i in range(at.size):
            for k in range(layer.shape[1]):
                running[layer[at[i], k]] += 1
            if i < ids.shape[1]:
                ids[t, i] = layer[at[i]]
            if i + 1 == tokens[snapshot]:
                counts[t, snapshot] = running
                snapshot += 1


@kernel
def _replay_prefill(trials, key, topk_ids, starts, tokens, counts, ids):
    order = np.arange(starts.size - 1)
    counts[:] = 0
    for t in range(counts.shape[0]):
        trial = trials[t]
        layer = topk_ids[trial % topk_ids.shape[0]]
        for j in range(tokens.size):
            for i in range(order.size):
                order[i] = i
            missing, place = tokens[j], 0
            while missing > 0:
                s = _next_sequence(place, trial, key, order)
                length = starts[s + 1] - starts[s]
                n = min(length, missing)
                first = starts[s] + _below(length - n + 1, 2 * place + 1, 0, trial, key)
                for token in range(first, first + n):
                    for k in range(layer.shape[1]):
                        counts[t, j, layer[token, k]] += 1
                missing -= n
                place += 1
        for q in range(order.size):
            order[q] = q
        s = _next_sequence(0, trial, key, order)  # the token of the step of one token, for the fan-out
        ids[t, 0] = layer[starts[s] + _below(starts[s + 1] - starts[s], 1, 0, trial, key)]
