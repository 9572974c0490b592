"""A model from a published config: Hugging Face's config.json of any family, Mistral's params.json, DeepSeek's own."""

import re
from collections import deque
from itertools import islice
from pathlib import Path
from typing import Any

from sim.errors import InputError, shown
from sim.files import is_there, read_json
from sim.model.keys import KEYS, PER_LAYER, WIDTH_OF_ALL, Type, speaks, type_of
from sim.model.layers import moe_layers
from sim.model.reader import Reader
from sim.model.spec import MAX_LAYERS, ModelSpec

_PREFERRED = ("text_config", "language_config", "llm_config", "language_model", "thinker_config", "text_model", "llm")
_NOT_THE_DECODER = re.compile(
    r"vision|visual|image|video|audio|speech|talker|code2wav|vocoder|quant|compress|draft|mtp|nextn|speculat|eagle|rope|encoder|projector"
)
_EXPERT_PARTS = re.compile(r"^(moe|ffn|experts?|router|routing|mlp)(_(config|args|cfg|params))?$")  # DBRX, Mistral
_MOST_OBJECTS, _MOST_INHERITED, _MOST_NOTES, _MOST_NAMES = 1000, 200, 20, 100_000
_MOST_EXPERTS = 2**15 - 1  # the largest int16 expert id
_MOST_SETS = 3  # a longer list has the experts of each layer
# Sizes of a parent are not those of its parts.
_OWN = ("hidden", "width", "any_width", "latent", "activation", "layers")
_KNOWN = {key for spellings in KEYS.values() for key in spellings}
_INHERITED = {key for field in KEYS if field not in _OWN for key in KEYS[field]} | {"model_type", "architectures"}
_UNGATED = ("relu2", "relu_squared", "squared_relu", "relu^2")
_GATED = ("silu", "swish", "swiglu", "swigluoai", "situ", "geglu", "reglu", "glu", "quick_geglu")


def read_config(path: Path) -> ModelSpec:
    """Describe the model of a config.json or params.json; the language model may lie in it at any depth.

    `unverified` names what was assumed because the file does not say it, and each key that speaks of MoE, experts, routing,
    sparse or dense layers and was not understood. Raises InputError where the file is missing, unreadable, or describes no
    mixture of experts, a value of a known key is out of range, or layers have different numbers of experts (not modelled).
    """
    where = f"model config {path}"
    content = read_json(path, where)
    if not isinstance(content, dict):
        raise InputError(f"{where} is not a JSON object")
    _refuse_known(content, where)
    read = Reader(_language_model(content, where), where)
    name, implied = type_of(read.config)
    known = implied or Type()
    if (
        name.startswith("longcat") and "num_layers" in read.config
    ):  # num_hidden_layers counts its attentions, two in each
        read.use("num_hidden_layers")
        read.config = {key: value for key, value in read.config.items() if key != "num_hidden_layers"}
    if read.flag("switch") is False:
        raise read.error(f"has no experts: {read.take('switch')[0]} is false")
    n_experts, expert_mask = _experts(read)
    top_k = read.whole("top_k", 1, _MOST_EXPERTS) or known.top_k
    if top_k is None:
        raise read.error(f"has no top-k: no {_spellings('top_k')}")
    scoring, has_bias = _scoring(read, known, name if implied else "")
    n_group, topk_group = _groups(read, known, name, n_experts)
    n_zero, n_hash = read.whole("n_zero"), _hash_layers(read, known)
    hidden, width = read.whole("hidden") or 0, _width(read, name not in WIDTH_OF_ALL)
    sizes = {"hidden_size": hidden, "moe_intermediate_size": width}
    if missing := ", ".join(field for field, size in sizes.items() if not size):
        read.notes.append(f"{missing} (not in config.json)")
    matrices, n_shared = _matrices(read, known), _shared_experts(read, known)
    read.use(*KEYS["logit_bias"])
    if read.config.get("router_type") == "topN":  # Ling: one router
        read.use("router_type")
    n_layers, ids = moe_layers(read, None if implied is None else known.layers, name, expert_mask)
    strange = read.left_over()
    read.notes += [f"{shown(key)} {shown(read.config[key])} (not understood)" for key in strange[:_MOST_NOTES]]
    if len(strange) > _MOST_NOTES:
        read.notes.append(f"{len(strange) - _MOST_NOTES} more keys (not understood)")
    return ModelSpec(
        name=str(path),
        n_experts=n_experts,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scoring=scoring,
        group_score="top2_sum" if has_bias else "max",
        has_bias=has_bias,
        n_layers=n_layers,
        moe_layer_ids=ids,
        hidden_size=hidden,
        expert_hidden_size=read.whole("latent") or hidden,
        moe_intermediate_size=width,
        expert_matrices=matrices,
        n_shared_experts=n_shared,
        routed_dtype=routed_dtype(read, path.with_name("hf_quant_config.json")),
        unverified=tuple(dict.fromkeys(read.notes)),
        source=(str(path),),
        caveat=caveat_of(known.n_zero if n_zero is None else n_zero, n_hash, top_k, known.caveat),
    )


def _refuse_known(content: dict[str, Any], where: str) -> None:
    """Refuse by name what stands beside a model's config and is none."""
    metadata = content.get("metadata")
    if "general.architecture" in content | (metadata if isinstance(metadata, dict) else {}):
        raise InputError(
            f"{where}: GGUF metadata are not read; give the config.json of the original model, or its name"
        )
    if content.get("speculators_model_type"):
        raise InputError(f"{where}: a draft model of speculators; give the config.json of the model that verifies")
    if content.get("peft_type"):
        base = shown(content.get("base_model_name_or_path"))
        raise InputError(f"{where}: an adapter of {base}; give the config.json of that model, or its name")


def caveat_of(n_zero: int, n_hash: int, top_k: int, more: str = "") -> str:
    """What a simulation leaves out of a model with zero-compute experts or hash-routed layers, and more."""
    told = []
    if n_zero:
        some = "zero-compute expert is" if n_zero == 1 else f"{n_zero} zero-compute experts are"
        told.append(
            f"its {some} not modelled: a token's top {top_k} are all taken to be real ones, so loads come out too high"
        )
    if n_hash:
        told.append(f"its first {n_hash} MoE layers route by a hash of the token, which is not modelled")
    return "; ".join([*told, more] if more else told)


def _language_model(content: dict[str, Any], where: str) -> dict[str, Any]:
    """The object that describes the decoder: the nearest to the top that has experts, with what its parents say besides."""
    waiting: deque[tuple[dict[str, Any], dict[str, Any]]] = deque([({}, content)])
    for _ in range(_MOST_OBJECTS):
        if not waiting:
            break
        said, config = waiting.popleft()
        flat = said | config
        for key, part in config.items():
            if _EXPERT_PARTS.match(key) and isinstance(part, dict):
                del flat[key]
                left_out = ("moe_model_type", "model_type", *KEYS["hidden"])
                own = {
                    k if k in _KNOWN or speaks(k, v) else f"moe_{k}": v for k, v in part.items()
                }  # "start_layer", of moe
                flat = {k: v for k, v in own.items() if k not in left_out} | flat
                if key == "moe" and "dim" in config and not flat.get("model_type"):  # Mistral's params.json
                    flat["model_type"] = "mistral"
        if any(flat.get(key) is not None for key in KEYS["n_experts"]):
            return flat
        told = (key for key, value in config.items() if key in _INHERITED or speaks(key, value))
        said = said | {key: config[key] for key in islice(told, _MOST_INHERITED)}
        inside = [
            key for key, part in config.items() if isinstance(part, dict) and not _NOT_THE_DECODER.search(key.lower())
        ]
        for key in sorted(inside, key=lambda key: _PREFERRED.index(key) if key in _PREFERRED else len(_PREFERRED)):
            waiting.append((said, config[key]))
    raise InputError(f"{where} has no experts: no {_spellings('n_experts')}")


def _spellings(field: str) -> str:
    return f"{', '.join(KEYS[field][:5])} or key of that kind"


def _experts(read: Reader) -> tuple[int, list[int]]:
    """Experts of a MoE layer, and of each layer where that is said ([] where it is not)."""
    key, value = read.take("n_experts")
    counts: list[Any] = []
    for name, other in [(key, value), *_per_layer(read)]:
        if isinstance(other, dict):
            other = [*other.values()]
        if not isinstance(other, list):
            continue
        if len(other) > MAX_LAYERS:
            raise read.error(f"{name} has {len(other)} values, more than {MAX_LAYERS} layers")
        counts = [read.checked(name, len(item) if isinstance(item, list) else item or 0, 0, 2**15) for item in other]
        if len(counts) <= _MOST_SETS and name == key:  # ERNIE's multimodal models
            read.notes.append(f"{name} {shown(other)} (sets of experts: one is modelled)")
        several = sorted({count for count in counts if count})
        if len(several) > 1:
            raise read.error(
                f"{name}: layers have {several[0]} to {several[-1]} experts; models with one number of experts are simulated"
            )
        key, value = name, several[0] if several else 0
    if not isinstance(value, bool) and value in (0, 1):
        raise read.error(f"is not a mixture of experts: {key} is {value}")
    return read.checked(key, value, 2, _MOST_EXPERTS), counts


def _per_layer(read: Reader) -> list[tuple[str, Any]]:
    """Keys of the config and of the objects in it that count the experts of each layer."""
    parts = [read.config, *(part for part in read.config.values() if isinstance(part, dict))]
    items = [item for part in parts for item in part.items()]
    found = [(key, value) for key, value in items if PER_LAYER.search(key) and isinstance(value, list | dict)]
    read.use(*(key for key, _ in found))
    return found


def _scoring(read: Reader, known: Type, name: str) -> tuple[str, bool]:
    """Scoring and whether there is a correction bias; those of the router of the type where the file does not say."""
    key, scoring = read.take("scoring")
    if scoring is not None and not isinstance(scoring, str):
        raise read.error(f"{key}: the scoring function must be a name, not {shown(scoring)}")
    sigmoid, softmax = read.flag("sigmoid"), read.flag("softmax")
    sigmoid = sigmoid if softmax is None else not softmax
    if not scoring and sigmoid is not None:
        scoring = "sigmoid" if sigmoid else "softmax"
    has_bias = read.flag("has_bias")
    key, method = read.take("method")
    if scoring == "noaux_tc":  # dots.llm1: the method stands under the scoring
        method, scoring = method or scoring, None
    if method not in (None, "noaux_tc", "greedy", "group_limited_greedy"):
        read.notes.append(f"{key} {shown(method)} (not understood)")
    if has_bias is None and method:
        has_bias = method == "noaux_tc"
    missing = [field for field, value in (("scoring", scoring), ("has_bias", has_bias)) if value in (None, "")]
    scoring, has_bias = scoring or known.scoring, known.has_bias if has_bias is None else has_bias
    if missing:
        router = f"{scoring} with{'' if has_bias else 'out'} a bias {f'as {name} has' if name else 'assumed'}"
        read.notes.append(f"{', '.join(missing)} (not in config.json; {router})")
    return scoring.lower(), has_bias


def _groups(read: Reader, known: Type, name: str, n_experts: int) -> tuple[int, int]:
    """Groups and kept groups; those of the type's config class where the file has no key for them."""
    said = any(key in read.config for key in (*KEYS["n_group"], *KEYS["topk_group"]))
    n_group, topk_group = read.whole("n_group", 0, n_experts), read.whole("topk_group", 0, n_experts)
    key, each = read.take("each_group")
    if known.of_each_group or (isinstance(each, int) and each > 1):
        rule = f"{key} {each}" if key else f"model_type {name}"
        raise read.error(f"{rule}: a token takes equally many experts from each group, which is not simulated")
    if read.take("method")[1] == "greedy":  # DeepSeek-V2's name for plain top-k, whatever n_group says
        return 1, 1
    if not said and known.groups != (1, 1):
        n_group, topk_group = known.groups
        if n_experts % n_group or n_experts // n_group < 2:
            n_group = topk_group = 1
        read.notes.append(
            f"n_group, topk_group (not in config.json; {n_group} and {topk_group} as {name} has by default)"
        )
    elif n_group and n_group > 1 and topk_group is None and "moe_router_num_groups" in read.config:
        read.notes.append("topk_group (not in config.json; Megatron limits no groups without moe_router_group_topk)")
        return 1, 1
    elif n_group and n_group > 1 and topk_group is None:
        is_default = n_group == known.groups[0]
        topk_group, why = (known.groups[1], f"as {name} has by default") if is_default else (1, "assumed")
        read.notes.append(f"topk_group (not in config.json; {topk_group} {why})")
    if not n_group or n_group == 1:
        return 1, topk_group or 1
    return n_group, topk_group or 0


def _width(read: Reader, is_assumed: bool) -> Any:
    """Intermediate size of one expert."""
    (key, value), (other, any_width) = read.take("width"), read.take("any_width")
    if value is None and any_width is not None:
        key, value = other, any_width
        if is_assumed:
            read.notes.append(f"moe_intermediate_size (not in config.json; {key} taken)")
    if isinstance(value, list) and value and len(value) <= MAX_LAYERS:  # ERNIE's multimodal models: text, then vision
        if any(item != value[0] for item in value):
            read.notes.append(f"{key} {shown(value)} (the first was taken)")
        value = next((item for item in value if item), 0)
    return 0 if value is None else read.checked(key, value, 0, 2**40)


def _matrices(read: Reader, known: Type) -> int:
    """3 where experts have a gate, 2 where they do not."""
    gated = read.flag("gated")
    _, value = read.take("activation")
    if isinstance(value, dict):  # DBRX
        value = value.get("name")
    act = value.lower() if isinstance(value, str) else ""
    if gated is not None or act in _UNGATED:
        return 3 if gated else 2
    return 3 if act in _GATED or act.startswith("gated") else known.matrices


def _shared_experts(read: Reader, known: Type) -> int:
    """Experts that every token takes; one where only its size is said."""
    n_shared, (key, size) = read.whole("n_shared"), read.take("shared_width")
    if n_shared is not None:
        return n_shared
    if size in (None, []):
        return known.n_shared
    sizes = size if isinstance(size, list) else [size or 0]  # of each layer
    return int(any([read.checked(key, one, 0, 2**40) for one in sizes]))


def _hash_layers(read: Reader, known: Type) -> int:
    """Leading MoE layers that route by a hash of the token."""
    (_, types), said = read.take("types"), read.whole("n_hash", most=MAX_LAYERS)
    hashed = sum(isinstance(word, str) and "hash" in word for word in types) if isinstance(types, list) else 0
    return hashed or (known.layers.get("num_hash_layers", 0) if said is None else said)


_PLAIN = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


def routed_dtype(read: Reader, beside: Path) -> str:
    """How the routed experts are stored, in the words of the presets; 'unknown' where no known key says it.

    `beside` is the file in which NVIDIA's ModelOpt describes a checkpoint whose config.json does not.
    """
    (_, experts), (key, quantization), (_, plain) = (
        read.take(field) for field in ("expert_dtype", "quantization", "dtype")
    )
    stored = _PLAIN.get(str(plain).removeprefix("torch."), "unknown")
    if quantization is None and is_there(beside):
        key, content = beside.name, read_json(beside, f"model config {beside}")
        quantization = content.get("quantization") if isinstance(content, dict) else content
    if not experts and quantization in (None, {}):
        return stored
    found = _PLAIN.get(experts) or _named_type(experts) if isinstance(experts, str) else ""
    if not found and isinstance(quantization, dict):
        found = _quantized(quantization, stored)
    if not found:
        read.notes.append(f"routed_dtype ({key} not understood)")
    return found or "unknown"


def _quantized(said: dict[str, Any], plain: str) -> str:
    """Type of the routed experts by a quantization config; '' where it is not understood."""
    left = ("ignore", "modules_to_not_convert", "exclude_modules", "ignored_layers")
    if any(_all_experts(name) for key in left for name in _listed(said.get(key))):
        return plain
    block = "_e4m3_block128" if said.get("weight_block_size") == [128, 128] else ""
    layers, groups, whole = (said.get(key) for key in ("quantized_layers", "config_groups", "global_quant_config"))
    for name, layer in islice(layers.items(), _MOST_NAMES) if isinstance(layers, dict) else ():
        if _is_of_experts(name) and isinstance(layer, dict):  # ModelOpt, mixed
            return _named_type(str(layer.get("quant_algo")))
    rows = [row for row in groups.values() if isinstance(row, dict)] if isinstance(groups, dict) else []
    for row in sorted(rows, key=lambda row: not any(map(_is_of_experts, _listed(row.get("targets"))))):
        weights = row.get("weights")  # compressed-tensors, ModelOpt
        if isinstance(weights, dict) and isinstance(bits := weights.get("num_bits"), int):
            size = weights.get("group_size")
            if weights.get("type") == "float":
                return {8: "fp8", 4: "nvfp4" if size == 16 else "mxfp4_group32"}.get(bits, "")
            return _whole_type(bits, size)
    if isinstance(whole, dict) and isinstance(weight := whole.get("weight"), dict):  # Quark
        return _named_type(f"{'mx' if weight.get('group_size') == 32 else ''}{weight.get('dtype')}")
    names = ("moe_quant_algo", "quant_algo", "qformat_weight", "quant_method", "mode")  # mode: MLX, as is none of them
    method = str(next((said[name] for name in names if said.get(name)), "affine"))
    bits, size = said.get("bits"), said.get("group_size")
    if isinstance(bits, int) and re.match(r"awq|gptq|auto.?round|affine", method.lower()):
        return _whole_type(bits, size)
    if said.get("load_in_4bit") or said.get("load_in_8bit"):  # bitsandbytes
        return "int8" if said.get("load_in_8bit") else "nf4" if said.get("bnb_4bit_quant_type") == "nf4" else "fp4"
    found = _named_type(method) or _named_type(f"{said.get('quant_type')} {said.get('weights')}")  # torchao, EETQ
    return found + block if found == "fp8" else found


def _whole_type(bits: int, size: Any) -> str:
    group = f"_group{size}" if isinstance(size, int) and 0 < size <= 2**15 else ""
    return f"int{bits}{group}" if 1 < bits <= 16 else ""


def _named_type(text: str) -> str:
    kinds = ("nvfp4", "mxfp4", "mxfp8", "w4a", "fp8", "fp4", "int8", "int4")
    return next((kind.replace("w4a", "int4") for kind in kinds if kind in text.lower()), "")


def _listed(value: Any) -> list[Any]:
    return value[:_MOST_NAMES] if isinstance(value, list) else []


def _is_of_experts(name: Any) -> bool:
    return isinstance(name, str) and "expert" in name and not re.search(r"share|gate$|bias|mtp|nextn", name)


def _all_experts(name: Any) -> bool:
    """Whether a pattern of modules that are left as they are is of the routed experts, and not of one layer alone."""
    return _is_of_experts(name) and not re.search(r"\d", name)
