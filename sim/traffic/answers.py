"""Experts of single tokens as engines answer them and trace sets hold them: JSON and arrays, a request at a time.

vLLM and SGLang return `routed_experts` [tokens, layers, top_k] with each answer; the public trace sets have a list of steps
{layer: [[expert ids] of each token]} for each request.
"""

import base64
import binascii
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, groupby
from pathlib import Path
from typing import IO, Any

import numpy as np

from sim.errors import InputError, shown
from sim.files import first_line, numbered_lines, open_stream, reading, unique
from sim.model import ModelSpec
from sim.traffic.arrays import array_of_bytes, narrow_ids
from sim.traffic.tables import depth_of, layer_of_key

TOKEN_NAMES = (
    "routed_experts", "topk_ids", "rollout_routed_experts", "selected_experts", "expert_ids", "topk_indices", "topk_idx",
)  # fmt: skip
"""Names that arrays of expert ids [tokens, layers, top_k] go by."""
BY_LAYER = "topk_ids_of_layer"
"""The same as SGLang's recorder has it, [layers, tokens, top_k]."""
PROMPT = "prompt_routed_experts"
_WHOLE = ("routed_experts", "completion_routed_experts")
_START = "routed_experts_start_len"
_IDENTITIES = ("id", "request_id", "rid")
_DTYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64")
MAX_LINE = 256 << 20
_MOST_IDS = 2**31  # 4 GiB as int16
_DEEPEST = 6  # levels of JSON that are searched for `routed_experts`
_MOST_LAYERS = 4096


@dataclass
class Requests:
    """Expert ids of requests, collected one by one; how many had none is counted."""

    where: str  # begins the message of an error
    model: ModelSpec | None = None  # tells the shape of ids that come without one
    arrays: list[np.ndarray] = field(default_factory=list)  # int16 [tokens, layers, top_k]
    lengths: list[np.ndarray] = field(default_factory=list)  # of the sequences in each array, int64
    layer_ids: list[int] | None = None  # decoder layers, where the file names them
    form: str = ""  # what the last file was recognised as
    passes: set[Any] = field(default_factory=set)  # forward passes, where the file numbers them
    torn: list[str] = field(default_factory=list)  # notes on files that end within a line
    is_by_shape: bool = False  # whether their shape alone tells which axis of an array is tokens, and which layers
    n_repeated: int = 0
    n_same_id: int = 0
    n_null_tokens: int = 0
    n_later: int = 0
    n_untold: int = 0
    n_ids: int = 0
    _of_key: dict[Any, int] = field(default_factory=dict)
    _other_phase: dict[Any, int] = field(default_factory=dict)
    _without: set[Any] = field(default_factory=set)
    _choices: set[Any] = field(default_factory=set)

    def add(self, ids: np.ndarray, here: str, key: Any = None, lengths: np.ndarray | None = None) -> None:
        """Take a request's ids [tokens, layers, top_k], and the lengths of its sequences if it has several.

        Of parts with the same key, where one begins with the ids of another, the longer counts: of a streamed answer, or of
        ranks with the same tokens.
        """
        if ids.ndim != 3:
            raise InputError(f"{here}: ids must have the shape [tokens, layers, top_k], not {list(ids.shape)}")
        if self.arrays and ids.shape[1:] != self.arrays[0].shape[1:]:
            found, first = "x".join(map(str, ids.shape[1:])), "x".join(map(str, self.arrays[0].shape[1:]))
            raise InputError(
                f"{here}: request {len(self.arrays)} has layers x top_k {found}, the first one {first}: another model, or layers "
                "before tokens?"
            )
        lengths, at = np.array([len(ids)]) if lengths is None else lengths, self._of_key.get(key)
        if at is not None:
            earlier = self.arrays[at]
            n = min(len(ids), len(earlier))
            if np.array_equal(ids[:n], earlier[:n]):
                self.n_repeated += 1
                if len(ids) > n:
                    self.arrays[at], self.lengths[at] = ids, lengths
                    self.n_ids += ids.size - earlier.size
                return
            self.n_same_id += 1
        if key is not None:
            self._of_key[key] = len(self.arrays)
        self.arrays.append(ids)
        self.lengths.append(lengths)
        self.n_ids += ids.size
        if self.n_ids > _MOST_IDS:
            raise InputError(f"{self.where} holds more than {_MOST_IDS} expert ids; keep a part of it")

    def without(self, key: Any = None) -> None:
        """Count a request that has no routing, unless more of its answer brings some."""
        self._without.add(object() if key is None else key)

    def share(self, choices: "list[Choice]") -> None:
        """Count the requests that have several choices, each of them with the prompt."""
        found: dict[Any, np.ndarray] = {}
        for key, ids, n_prompt in choices:
            if key is not None and not n_prompt and np.array_equal(found.setdefault(key[0], ids)[:1], ids[:1]):
                self._choices |= {key[0]} if found[key[0]] is not ids else set()

    def leave(self, n_tokens: int, key: Any = None) -> None:
        """Count a request's tokens of the phase that is not read; of parts with the same key the most."""
        key = object() if key is None else key
        self._other_phase[key] = max(self._other_phase.get(key, 0), n_tokens)

    @property
    def n_other_phase(self) -> int:
        """Tokens of the phase that is not read."""
        return sum(self._other_phase.values())

    @property
    def notes(self) -> list[str]:
        """What was left out."""
        n = len(self._without - set(self._of_key))
        found = [*self.torn, *([f"{n} requests without routing (null, or aborted) are left out"] if n else [])]
        if self._choices:
            found.append(
                f"{len(self._choices)} requests have several choices and no token counts (usage): the tokens of their prompts "
                "count once for each choice"
            )
        if self.n_repeated:
            found.append(
                f"{self.n_repeated} parts of streamed answers, or of ranks, that others hold too are counted once"
            )
        if self.n_same_id:
            found.append(f"{self.n_same_id} have the id of another, and other routing: each is a sequence of its own")
        if self.n_later:
            found.append(f"answers without the first ids of their prompts, by token counts (usage): {self.n_later}")
        if self.n_null_tokens:
            found.append(f"{self.n_null_tokens} tokens without routing (null) are left out")
        return found

    def joined(self) -> tuple[np.ndarray, np.ndarray]:
        """Ids [tokens, layers, top_k] and lengths [sequences] of all requests."""
        if not any(map(len, self.arrays)):
            raise InputError(f"{self.where} holds no tokens" + (f": {self.notes[0]}" if self.notes else ""))
        ids = self.arrays[0] if len(self.arrays) == 1 else np.concatenate(self.arrays)
        lengths = np.concatenate(self.lengths).astype(np.int64)
        return ids, lengths[lengths > 0]


def json_values(path: Path, where: str, torn: list[str]) -> Iterator[tuple[Any, str]]:
    """Values of a file of JSON lines, a line at a time, or the one value of a JSON file; each with where it stands.

    A line may be one of a stream of server-sent events (`data: {...}`, the last one `data: [DONE]`). The last line, where it is
    torn off, is left out; `torn` gets a note on that.
    """
    with reading(where, "JSON"), open_stream(path, where) as file:
        is_first = True
        for number, text, is_whole in _lines(file, where):
            try:
                value = json.loads(text, object_pairs_hook=unique)
            except (ValueError, RecursionError) as error:
                if is_first:  # a JSON text over several lines, or none
                    break
                if not is_whole:
                    torn.append(f"line {number}, the last one, is torn off and left out")
                    return
                raise InputError(f"{where}, line {number} is not JSON: {first_line(error)}") from None
            is_first = False
            yield value, f"{where}, line {number}"
        else:
            return
    with reading(where, "JSON"), open_stream(path, where) as file:
        data = file.read(MAX_LINE + 1)
        if len(data) > MAX_LINE:
            raise InputError(f"{where}: a JSON text of more than {MAX_LINE >> 20} MiB; write each request on a line")
        try:
            value = json.loads(data, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}, line {number} is not JSON, nor is the file as a whole: {first_line(error)}"
            ) from None
    yield value, where


def _lines(file: IO[bytes], where: str) -> Iterator[tuple[int, bytes, bool]]:
    """Lines that hold something, with their numbers, and whether they end; of server-sent events only the data."""
    for number, line in numbered_lines(file, where, MAX_LINE):
        text = line.removeprefix(b"\xef\xbb\xbf").strip().removeprefix(b"data:").strip()
        if text and text != b"[DONE]" and not text.startswith((b"event:", b"id:", b"retry:", b": ")):
            yield number, text, line.endswith(b"\n")


def add_answer(requests: Requests, held: Any, here: str, phase: str) -> bool:
    """Take the requests of an engine's answer: an object with `routed_experts` somewhere in it (or a list of such objects),
    or the nested list [tokens][layers][top_k] of a request. Says whether there was the key, or a list.

    Where the answer counts its tokens, and its ids are those of prompt and completion, the tokens of the phase are taken.
    """
    if isinstance(held, list) and not any(isinstance(value, dict) for value in held):
        requests.add(_nested(held, f"{here}: a list", requests), here)
        return True
    if not isinstance(held, dict | list):
        raise InputError(
            f"{here}: a request is an object with 'routed_experts', or whole numbers [tokens][layers][top_k]"
        )
    n_found = 0
    for _, group in groupby(_parts(held, None, None, _DEEPEST), lambda found: id(found[2])):
        request, choices = list(group), list[Choice]()
        for key, parts, _ in request:
            n_found += 1
            ids = [_ids(value, beside, here, requests) for value, beside in parts if value not in (None, "")]
            n_prompt = len(ids[0]) if len(ids) > 1 and parts[0][0] is parts[0][1].get(PROMPT) else 0
            ids = [part for part in ids if part.size]
            if not ids:
                requests.without(key)
            elif any(part.shape[1:] != ids[0].shape[1:] for part in ids):
                raise InputError(f"{here}: the prompt has other layers x top_k than the completion")
            else:
                choices.append((key, np.concatenate(ids) if len(ids) > 1 else ids[0], n_prompt))
        prompts = _prompts(choices, request[0][2], [parts[-1][1] for _, parts, _ in request], requests)
        if not prompts:
            requests.share(choices)
            requests.n_untold += bool(choices)
        for place, (key, whole, _) in enumerate(choices):
            taken, left = whole, 0
            if prompts:
                prompt, made = whole[: prompts[place] if place == 0 else 0], whole[prompts[place] :]
                taken, left = (prompt, len(made)) if phase == "prefill" else (made, len(prompt))
            if left:
                requests.leave(left, key)
            if len(taken):
                requests.add(taken, here, key)
    if not n_found:
        requests.without()
    return n_found > 0


Choice = tuple[Any, np.ndarray, int]
"""Of one of a request's choices: what tells it, its ids, and how many of them are of a prompt that stands by itself."""


def _prompts(
    choices: list[Choice], counted: dict[str, Any] | None, beside: list[dict[str, Any]], requests: Requests
) -> list[int]:
    """Tokens of the prompt at the head of each choice's ids, where an engine's counts are of these ids; else none. Choices
    repeat the prompt, but for one that stands by itself; SGLang leaves its first `routed_experts_start_len` tokens out, vLLM the
    first `routed_experts_prompt_start`, which only the number of ids tells. The last token that was made is not routed, but for
    engines that route one ahead.
    """
    prompt, made = ((counted or {}).get(name) for name in ("prompt_tokens", "completion_tokens"))
    if not choices or not (type(prompt) is type(made) is int and prompt > 0 < made):
        return []
    start = max((n for n in (held.get(_START) for held in beside) if type(n) is int), default=0)
    if not 0 <= start <= prompt:
        return []
    heads, n_left = [n for _, _, n in choices], len(choices[0][1]) - (made - 1)
    if not any(heads) and len(choices) == 1 and not start and 0 <= n_left < prompt:  # vLLM does not say its start
        start, requests.n_later = prompt - n_left, requests.n_later + 1
        heads = [n_left]
    elif not any(heads):
        heads = [prompt - start] * len(choices)
    if any(not np.array_equal(ids[:n], choices[0][1][:n]) for (_, ids, _), n in zip(choices, heads, strict=True)):
        return []
    n_last = sum(heads) + made - sum(len(ids) for _, ids, _ in choices)
    return heads if max(heads) == prompt - start and 0 <= n_last <= len(choices) else []


Part = tuple[Any, dict[str, Any]]


def _parts(
    held: Any, identity: Any, counted: dict[str, Any] | None, depth: int
) -> Iterator[tuple[Any, list[Part], dict[str, Any] | None]]:
    """Each request's parts, prompt and completion, with the object that each stands in; what tells the request; and the
    object that counts its tokens.
    """
    if isinstance(held, dict):
        own_id = next((held[name] for name in _IDENTITIES if isinstance(held.get(name), str)), None)
        identity = own_id or identity
        usage = held.get("usage")
        counted = usage if isinstance(usage, dict) else held if "prompt_tokens" in held else counted
        prompt: list[Part] = [(held[PROMPT], held)] if held.get(PROMPT) is not None else []
        own = [name for name in _WHOLE if name in held] or [name for name in TOKEN_NAMES if name in held][:1]
        if own:
            key = None if identity is None else (identity, str(held.get("index", 0)))
            yield key, [*prompt, *((held[name], held) for name in own)], counted
            return
        below = (_parts(value, identity, counted, depth - 1) for value in held.values() if depth > 0)
        for key, parts, counts in chain.from_iterable(below):
            yield key, [*prompt, *parts], counts
            prompt = []  # the choices of a request share its prompt
        if prompt:
            yield None if identity is None else (identity, "prompt"), prompt, counted
    elif isinstance(held, list):
        for value in held:
            if isinstance(value, dict | list) and depth > 0:
                yield from _parts(value, identity, counted, depth - 1)


def _ids(value: Any, beside: dict[str, Any], here: str, requests: Requests) -> np.ndarray:
    """Ids int16 [tokens, layers, top_k] of a nested list, of base64, or of an object {data, shape, dtype}."""
    name = next((key for key in beside if beside[key] is value), "routed_experts")
    shape, dtype = (beside.get(f"routed_experts_{key}", beside.get(key)) for key in ("shape", "dtype"))
    here = f"{here}: {name}"
    if isinstance(value, dict):
        shape, dtype = value.get("shape", shape), value.get("dtype", dtype)
        if "data" not in value:
            raise InputError(f"{here} is an object without 'data': it has {shown(', '.join(map(str, value)))}")
        value = value["data"]
    if isinstance(value, str):
        return narrow_ids(_of_base64(value, shape, dtype, here, requests.model), here)
    if shape is not None and depth_of(value) == 1 and set(map(type, value)) == {int}:
        return narrow_ids(_reshaped(np.array(value), shape, here), here)
    return _nested(value, here, requests)


def _nested(value: Any, here: str, requests: Requests) -> np.ndarray:
    """Ids of a nested list; a token or a layer may be null."""
    depth = depth_of(value)
    what = f"{here} must be whole numbers [tokens][layers][top_k]" + (
        f", not {depth} levels of lists" if depth != 3 else ""
    )
    if not isinstance(value, list) or not all(isinstance(token, list | None) for token in value):
        raise InputError(what)
    tokens = [token for token in value if token is not None]
    requests.n_null_tokens += len(value) - len(tokens)
    rows = list(chain.from_iterable(tokens))
    listed = [row for row in rows if isinstance(row, list)]
    if not listed and all(row is None for row in rows):
        return np.empty((0, 0, 0), np.int16)
    if len(listed) < len(rows) - rows.count(None) or set(map(type, chain.from_iterable(listed))) - {
        int
    }:  # booleans too
        raise InputError(what)
    if len(listed) < len(rows):
        tokens = [[[-1] * len(listed[0]) if row is None else row for row in token] for token in tokens]
    try:
        ids = np.asarray(tokens)
    except (ValueError, OverflowError):
        raise InputError(f"{here} is not a regular list [tokens][layers][top_k]") from None
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or 0 in ids.shape:
        raise InputError(what)
    return narrow_ids(ids, here)


def _of_base64(text: str, shape: Any, dtype: Any, here: str, model: ModelSpec | None) -> np.ndarray:
    """Ids from base64 of a whole .npy file, or of little-endian numbers, int32 unless `dtype` says what they are."""
    try:
        data = base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError):
        raise InputError(f"{here} is not base64") from None
    if data.startswith(b"\x93NUMPY"):
        ids = array_of_bytes(data, f"{here}, base64 of a .npy file")
        if ids.ndim != 3:
            raise InputError(f"{here} must have shape [tokens, layers, top_k], not {list(ids.shape)}")
        return ids
    if dtype is None and shape is not None:  # the bytes of an id follow
        dtype = {1: "uint8", 2: "uint16", 4: "int32", 8: "int64"}.get(len(data) // _size(shape, here))
    if dtype is None and model is not None:  # as SGLang has it; narrower where only that gives experts of the model
        fits = (kind for kind in ("int32", "uint16", "uint8") if _largest(data, kind) < model.n_experts)
        dtype = next(fits, None)
    kind = "int32" if dtype is None else str(dtype).rpartition(".")[2].strip("'|=")
    plain = kind.lstrip("<>")
    if plain not in _DTYPES and not re.fullmatch("[iu][1248]", plain):
        raise InputError(f"{here} of dtype {shown(dtype)}: must be one of {', '.join(_DTYPES)}")
    found = np.dtype(plain).newbyteorder(">" if kind.startswith(">") else "<")
    if len(data) % found.itemsize or not data:
        raise InputError(f"{here} is cut off: {len(data)} bytes are not whole {kind} ids")
    flat = np.frombuffer(data, found)
    if shape is not None:
        return _reshaped(flat, shape, here)
    if model is None or not model.n_moe_layers:
        raise InputError(
            f"{here}: base64 ids need --model, which says how many layers and experts per token they have (or a key 'shape')"
        )
    return _shaped(flat, here, model)


def _largest(data: bytes, kind: str) -> int:
    width = np.dtype(kind).itemsize
    return 2**32 if not data or len(data) % width else int(np.frombuffer(data, f"<{np.dtype(kind).str[1:]}").max())


def _size(shape: Any, here: str) -> int:
    """How many ids a shape from a file has."""
    if not isinstance(shape, list) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in shape):
        raise InputError(f"{here}: shape must be a list [tokens, layers, top_k], not {shown(shape)}")
    return shape[0] * shape[1] * shape[2]


def _reshaped(flat: np.ndarray, shape: Any, here: str) -> np.ndarray:
    if _size(shape, here) != flat.size:
        raise InputError(f"{here}: {flat.size} ids do not fill the shape {shown(shape)}")
    return flat.reshape(shape)


def _shaped(flat: np.ndarray, here: str, model: ModelSpec) -> np.ndarray:
    """Flat ids as [tokens, layers, top_k]: as many layers as leave the model's MoE layers once those of zeros are dense."""
    n_moe, top_k = model.n_moe_layers, model.top_k
    n_rows, rest = divmod(flat.size, top_k)
    n_decoder, moe = model.n_layers, list(model.moe_layer_ids)
    tried = [n for n in (n_decoder, *range(n_moe, min(n_rows, _MOST_LAYERS) + 1)) if n >= n_moe and n_rows % n == 0]
    best: tuple[int, np.ndarray] | None = None  # fewest tokens without routing
    for n_layers in dict.fromkeys(tried) if not rest else ():
        ids = flat.reshape(-1, n_layers, top_k)
        if top_k == 1:  # 0 is an expert too: only the model tells which layers are dense
            if moe and n_layers == n_decoder and not np.delete(ids, moe, axis=1).any():
                return ids
            if n_layers == n_moe:
                return ids
            continue
        zero = (ids == ids[..., :1]).all(axis=2)  # or -1: no routing
        routed = ~zero.all(axis=1)
        if routed.any() and zero[routed][0].sum() == n_layers - n_moe and (zero[routed] == zero[routed][0]).all():
            n_without = int((~routed).sum())
            best = (n_without, ids) if best is None or n_without < best[0] else best
            if n_layers == n_decoder or n_without == 0:
                return ids
    if best is not None:
        return best[1]
    raise InputError(
        f"{here}: {flat.size} ids are no whole tokens of {n_moe} MoE layers with {top_k} experts each (model {model.name}), "
        "however many dense layers of zeros lie between"
    )


def is_trace(held: Any) -> bool:
    """Whether this is a request of a trace set: a list of objects, of which the first is a step."""
    return isinstance(held, list) and bool(held) and all(isinstance(step, dict) for step in held) and is_step(held[0])


def is_step(held: Any) -> bool:
    """Whether this is a step of a trace set: {layer: [[expert ids] of each token]}, null for dense layers."""
    if not isinstance(held, dict) or not held or None in map(layer_of_key, held):
        return False
    return all(value in (None, []) or depth_of(value) == 2 for value in held.values())


def add_trace(requests: Requests, steps: list[Any], here: str, phase: str) -> None:
    """Take a request of a trace set: its step 0, the prefill, or the steps after it, the decode."""
    layers: list[int] | None = None
    chosen: list[list[list[Any]]] = []
    for number, step in enumerate(steps):
        if not is_step(step):
            raise InputError(f"{here}: step {number} is no object {{layer: [[expert ids] of each token]}}")
        of_layer = {layer_of_key(key) or 0: rows for key, rows in step.items() if rows is not None}
        if not of_layer:
            continue
        routed = sorted(of_layer.items())
        layers = layers or [layer for layer, _ in routed]
        if [layer for layer, _ in routed] != layers:
            raise InputError(
                f"{here}: step {number} has routing in {len(routed)} layers, the first one in {len(layers)}, or others"
            )
        if (phase == "prefill") == (number == 0):
            chosen.append([rows for _, rows in routed])
        else:
            requests.leave(len(routed[0][1]))
    if layers is None:
        requests.without()
        return
    if requests.layer_ids is not None and layers != requests.layer_ids:
        raise InputError(
            f"{here} has routing in {len(layers)} layers ({layers[0]} to {layers[-1]}), the files before it in "
            f"{len(requests.layer_ids)} ({requests.layer_ids[0]} to {requests.layer_ids[-1]}): mixed models in one folder?"
        )
    requests.layer_ids = layers
    if chosen:
        joined = [list(chain.from_iterable(parts)) for parts in zip(*chosen, strict=True)]
        requests.add(_nested(joined, f"{here}: its experts", requests).transpose(1, 0, 2), here)
