"""Which layers of a decoder are MoE: one answer from every way in which published configs say it."""

import re
from collections.abc import Mapping
from itertools import islice
from typing import Any

from sim.errors import shown
from sim.model.keys import KEYS, LAYER_FIELDS, MOE_WORD, of_layers, says_moe, speaks
from sim.model.reader import Reader
from sim.model.spec import MAX_LAYERS

_MOST_KEYS = 3  # that one note names
_DENSE_WORDS = {"dense", "mlp", "ffn", "none", "identity", "linear", "no", "op", "swiglu", "gated", "glu"}


def moe_layers(
    read: Reader, implied: Mapping[str, Any] | None = None, type_name: str = "", counts: list[int] | None = None
) -> tuple[int, tuple[int, ...]]:
    """Layers of the decoder without draft layers, 0 if unknown, and which of them are MoE, ascending, () if unknown: from every
    way of saying it that is in use. What is assumed, contradicted or not understood goes to the `notes` of `read`.

    `implied` are keys that the config class of the type has by default, None for a type that is not known; `counts` the experts
    of each layer, 0 for a dense one. Raises InputError where a value is malformed or out of range, or no layer is MoE.

    Rules of vLLM 0.33.0 and transformers 5.24.0: lists name layers; leading dense layers, steps, periods and masks each
    take layers away. `moe_layer_freq` counts from layer 0 (layer % n == 0), steps from 1 ((layer + 1) % n == 0).
    """
    asked = [field for field in LAYER_FIELDS if read.has(field)]
    for field in LAYER_FIELDS:
        read.use(*KEYS[field])
    _imply(read, implied or {}, type_name)
    n_layers = read.whole("layers", 1, MAX_LAYERS) or 0
    drafts = read.whole("drafts", 0, MAX_LAYERS) or 0
    n_layers, named, by = _named(read, n_layers, drafts, counts or [])
    if not n_layers and named is None:
        read.notes.append("moe_layer_ids (the number of layers is not in config.json)")
        return 0, ()
    needed = [key for key, value in (implied or {}).items() if value is None]
    if needed and not asked:
        read.notes.append(f"moe_layer_ids (unknown: no {needed[0]} in config.json)")
        return n_layers, ()
    left = set(range(n_layers)) if n_layers else set(named or ())
    rules = _taken_away(read, n_layers, drafts, type_name)
    for key, taken in rules:
        if named is None:
            left &= taken
        elif not named <= taken:
            read.notes.append(f"{key} {shown(read.config.get(key))} ({by} says otherwise and was taken)")
    left = left if named is None else named
    if not left:
        told = by or " and ".join(f"{key} {shown(read.config[key])}" for key, _ in rules)
        raise read.error(f"no layer has experts, by {told}")
    strange = [key for key in read.left_over() if of_layers(key)]
    if strange and named is None and len(left) == n_layers:
        told = " and ".join(shown(key) for key in strange[:_MOST_KEYS])
        read.notes.append(f"moe_layer_ids (unknown, as {told} may say them)")
        return n_layers, ()
    if not asked and implied is None and named is None:
        read.notes.append("moe_layer_ids (config.json names no dense layers; all were taken)")
    return n_layers, tuple(sorted(left))


def _imply(read: Reader, implied: Mapping[str, Any], type_name: str) -> None:
    """Add the layer keys that a type has by default, where the config has no key of that kind and names no layers."""
    if any(read.has(field) for field in ("moe_ids", "pattern", "blocks")) or _words(read) is not None:
        return
    for key, value in implied.items():
        field = next(field for field, keys in KEYS.items() if key in keys)
        if field != "n_hash" and value is not None and not read.has(field):
            read.config = read.config | {key: value}
            text = shown(value) if isinstance(value, int) else f"{value[0]} to {value[-1]}"
            read.notes.append(f"{key} (not in config.json; {text} as {type_name} has by default)")


def _words(read: Reader) -> tuple[str, list[str]] | None:
    """The list with a word for each layer that tells MoE layers from others, if there is one."""
    n_layers = [read.config.get(key) for key in KEYS["layers"]]
    others = [
        key for key, value in read.config.items() if says_moe(value) and speaks(key, value) and len(value) in n_layers
    ]
    for key in dict.fromkeys((*KEYS["types"], *others)):
        words = read.config.get(key)
        if not isinstance(words, list) or len(words) > MAX_LAYERS or not all(isinstance(word, str) for word in words):
            if words is not None and key in KEYS["types"]:
                read.odd(key)
        elif _is_of_mlps(key, words) or any(_is_moe(word, False) for word in words):
            return key, words
    return None


def _is_of_mlps(key: str, words: list[str]) -> bool:
    """Whether the words are kinds of MLP, not of attention: 'sparse' then means MoE."""
    return key.startswith(("mlp", "ffn", "feed")) or any(word.lower() == "dense" for word in words)


def _is_moe(word: str, mlp: bool) -> bool:
    return word == "E" or bool(MOE_WORD.search(word)) or (mlp and "sparse" in re.split(r"[^a-z0-9]+", word.lower()))


def _named(read: Reader, n_layers: int, drafts: int, counts: list[int]) -> tuple[int, set[int] | None, str]:
    """Number of layers, the MoE layers where a list names them, and the key of that list."""
    said: list[tuple[str, set[int]]] = []

    def say(key: str, flags: list[bool]) -> None:
        """What a list with a value for each layer says; it also tells how many there are."""
        nonlocal n_layers
        n_layers = _fit(read, key, len(flags), n_layers, drafts)
        said.append((key, {i for i, is_moe in enumerate(flags[:n_layers]) if is_moe}))

    key, ids = read.take("moe_ids")
    if ids == [] or (isinstance(ids, int) and not isinstance(ids, bool)):
        read.odd(key)  # no layer, or a number of them, does not tell which
    elif ids is not None:
        said.append((key, _ids(read, key, ids, n_layers, drafts)))
    if words := _words(read):
        key, listed = words
        read.use(key)
        mlp = _is_of_mlps(key, listed)
        for word in sorted({word for word in listed if mlp and not _is_moe(word, mlp)}):
            if not set(re.split(r"[^a-z0-9]+", word.lower())) & _DENSE_WORDS:
                read.notes.append(f"{key} {shown(word)} (not understood; taken as a dense layer)")
        say(key, [_is_moe(word, mlp) for word in listed])
    key, pattern = read.take("pattern")
    is_text = isinstance(pattern, list) and all(isinstance(letter, str) and len(letter) == 1 for letter in pattern)
    if isinstance(pattern, str) or (is_text and pattern):
        letters = "".join(pattern).split("/")[0].replace("|", "")  # Megatron: / begins draft layers, | a pipeline stage
        odd = "".join(sorted(set(letters) - set("ME*-+GDW")))
        if odd:
            read.notes.append(f"{key} {shown(odd)} (letters not understood; only E was taken as MoE)")
        say(key, [letter == "E" for letter in letters])
    elif isinstance(pattern, list) and "moe" in key:
        said.append((key, _mask(read, key, pattern, n_layers, drafts)))
    elif (
        pattern
        and key not in dict(said)
        and (not isinstance(pattern, list) or any(flag not in (0, 1) for flag in pattern))
    ):  # else of attention
        read.odd(key)
    key, blocks = read.take("blocks")
    flags = _of_blocks(read, key, blocks) if isinstance(blocks, list) and len(blocks) <= MAX_LAYERS else []
    if any(flags):
        say(key, flags)
    elif blocks:
        read.odd(key)
    if len(counts) > 1 and 0 in counts and len(counts) in (n_layers, n_layers + drafts):
        said.append(("experts of each layer", {i for i, count in enumerate(counts[:n_layers]) if count}))
    for other, layers in said[1:]:
        if layers != said[0][1]:
            read.notes.append(f"{other} ({said[0][0]} says otherwise and was taken)")
    return (n_layers, said[0][1], said[0][0]) if said else (n_layers, None, "")


def _taken_away(read: Reader, n_layers: int, drafts: int, type_name: str) -> list[tuple[str, set[int]]]:
    """For each key that takes layers away: the key, and the layers that it leaves."""
    every_layer = range(n_layers or MAX_LAYERS)
    rules: list[tuple[str, set[int]]] = []
    for field in ("dense_first", "dense_ids"):  # a number of leading layers, or the layers themselves
        key, dense = read.take(field)
        if dense is not None and (field == "dense_ids" or (key == "dense_mlp_idx" and isinstance(dense, list))):
            rules.append((key, set(every_layer) - _ids(read, key, dense, n_layers, drafts)))
        elif dense is not None:
            rules.append((key, set(every_layer[read.checked(key, dense) :])))
    for field in ("every", "step"):
        key, n = read.take(field)
        n = int(n) if isinstance(n, str) and re.fullmatch("[0-9]{1,4}", n) else n  # Megatron's command line
        if isinstance(n, str | list):
            rules.append((key, _mask(read, key, n, n_layers, drafts)))
        elif n is not None:
            least = 0 if key == "interleave_moe_layer_step" else 1  # 0: Llama 4 without experts
            n = read.checked(key, n, least)
            from_1 = key == "moe_every_n_layers" or type_name == "switch_transformers"
            phase = 0 if field == "every" else 1 if from_1 else n - 1
            rules.append((key, {i for i in every_layer if n and i % n == phase % n}))
    (key, period), (offset_key, offset) = read.take("period"), read.take("offset")
    if period is None and offset:
        read.odd(offset_key)
    elif period is not None:
        period = read.checked(key, period, 1)
        offset = read.checked(offset_key or key, 0 if offset is None else offset, 0, period - 1)
        rules.append((key, {i for i in every_layer if i % period == offset}))
    (key, start), (last_key, end) = read.take("start"), read.take("end")
    if start is not None:  # lists in ERNIE's multimodal models: text, vision
        start = min(read.checked(key, i) for i in _some(start))
        rules.append((key, set(every_layer[start:])))
    if end is not None:
        ends = [read.checked(last_key, i, -1) for i in _some(end)]
        if -1 not in ends:
            rules.append((last_key, set(every_layer[: max(ends) + 1])))
    return rules


def _some(value: Any) -> list[Any]:
    return value if isinstance(value, list) and value else [value]


def _fit(read: Reader, key: str, length: int, n_layers: int, drafts: int) -> int:
    """Number of layers, by a list that has a value for each (and perhaps for draft layers behind them)."""
    if length > MAX_LAYERS or not length:
        raise read.error(f"{key} has {length} values; a model has 1 to {MAX_LAYERS} layers")
    if n_layers and length not in (n_layers, n_layers + drafts):
        read.notes.append(f"n_layers ({n_layers} in config.json, {length} by {key})")
        return length
    return n_layers or length


def _mask(read: Reader, key: str, value: Any, n_layers: int, drafts: int) -> set[int]:
    """Layers whose flag is 1, of a list or of Megatron's text such as ([0]*3+[1]*58)."""
    if isinstance(value, str):
        text = "".join(value.split()) if len(value) <= MAX_LAYERS else ""
        parts = re.findall(r"\[([01,]*)\](?:\*(\d{1,4}))?", text)
        if not parts or re.sub(r"\[[01,]*\](\*\d{1,4})?", "", text).strip("()+"):
            raise read.error(f"{key} must be a whole number or a 0 or 1 for each layer, not {shown(value)}")
        each = (int(flag) for flags, n in parts for flag in re.findall("[01]", flags) * int(n or 1))
        value = list(islice(each, MAX_LAYERS + 1))
    if len(value) > MAX_LAYERS or any(not isinstance(flag, int) or flag not in (0, 1) for flag in value):
        raise read.error(f"{key} must have a 0 or 1 for each of at most {MAX_LAYERS} layers, not {shown(value)}")
    if n_layers and len(value) not in (n_layers, n_layers + drafts):
        raise read.error(f"{key} has {len(value)} values, the model has {n_layers} layers")
    return {i for i, flag in enumerate(value[: n_layers or None]) if flag}


def _ids(read: Reader, key: str, value: Any, n_layers: int, drafts: int) -> set[int]:
    """Layer numbers of a list or of text such as '3,4,5' or '3-60'; of draft layers none."""
    if isinstance(value, str):
        parts = value.replace(",", " ").split() if len(value) <= 8 * MAX_LAYERS else [""]
        if not all(re.fullmatch(r"\d{1,4}((-|\.\.)\d{1,4})?", part) for part in parts):
            raise read.error(f"{key} must be layer numbers such as 3,4,5, not {shown(value)}")
        ranges = [[int(end) for end in re.split(r"-|\.\.", part)] for part in parts]
        value = list(islice((i for ends in ranges for i in range(ends[0], ends[-1] + 1)), MAX_LAYERS + 1))
    if not isinstance(value, list) or len(value) > MAX_LAYERS:
        raise read.error(f"{key} must be a list of at most {MAX_LAYERS} layer numbers, not {shown(value)}")
    if value and all(isinstance(item, bool) or (len(value) > 2 and item in (0, 1)) for item in value):
        return _mask(read, key, value, n_layers, drafts)
    most = n_layers + drafts if n_layers else MAX_LAYERS
    layers = {read.checked(f"a layer of {key}", item, 0, most - 1) for item in value}
    return {layer for layer in layers if not n_layers or layer < n_layers}


def _of_blocks(read: Reader, key: str, blocks: list[Any]) -> list[bool]:
    """Which of a list of block descriptions are MoE layers; their experts must all be as many."""
    flags, counts = list[bool](), set[int]()
    for block in blocks:
        block = block if isinstance(block, dict) else {}
        ffn = block.get("ffn")
        inside = ffn.get("moe") if isinstance(ffn, dict) else block.get("moe")
        flags.append(isinstance(inside, dict) or _is_moe(str(block.get("block_type", "")), True))
        if flags[-1]:
            part = block | (inside if isinstance(inside, dict) else {})
            counts.update(part[name] for name in KEYS["n_experts"] if isinstance(part.get(name), int))
    if len(counts) > 1:
        raise read.error(
            f"{key}: layers have {min(counts)} to {max(counts)} experts; models with one number of experts are simulated"
        )
    return flags
