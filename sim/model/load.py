"""Models by preset name or from a Hugging Face config.json."""

import tomllib
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sim.errors import InputError, unknown
from sim.files import is_there, read_json
from sim.model.spec import ModelSpec

_MAX_LAYERS = 10_000

# Key variants of the published configs, in order of preference.
_KEYS = {
    "n_experts": ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts"),
    "top_k": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k", "top_k_experts"),
    "n_group": ("n_group", "num_expert_group"),
    "topk_group": ("topk_group",),
    "scoring": ("scoring_func", "score_function", "moe_router_activation_func"),
    "moe_intermediate_size": ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size"),
}
# Scoring and correction bias of model types whose config.json leaves them out (transformers 5.23.0, vLLM 0.33.0).
_BY_TYPE = {
    "deepseek_v3": ("sigmoid", True),
    "glm4_moe": ("sigmoid", True),
    "dots1": ("sigmoid", True),
    "minimax_m2": ("sigmoid", True),
    "bailing_moe_v2": ("sigmoid", True),
    "llama4_text": ("sigmoid", False),
    "llama4": ("sigmoid", False),
}


@cache
def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files("sim.model").joinpath("presets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["models"]


def model_names() -> list[str]:
    """Names of the presets, in the order of the table."""
    return list(_presets())


def load_model(name_or_path: str | Path) -> ModelSpec:
    """Describe a model by preset name, Hugging Face name, or the path of a Hugging Face config.json.

    Raises
    ------
    InputError
        The name is no preset and no file, or the file does not describe a mixture-of-experts model.
    """
    name = str(name_or_path)
    preset = next((key for key, row in _presets().items() if name.lower() in (key, row["hf_id"].lower())), None)
    if preset:
        return _from_preset(preset, _presets()[preset])
    path = Path(name)
    if is_there(path / "config.json"):
        path = path / "config.json"
    if name and (path.suffix == ".json" or is_there(path)):
        return _from_config(path)
    raise unknown(
        "--model",
        name.rpartition("/")[2],
        _presets(),
        " (or the path of a config.json; `epsim models` lists the presets)",
    )


def _from_preset(name: str, row: dict[str, Any]) -> ModelSpec:
    caveat = ""
    if row.get("zero_expert_num"):
        n_zero, top_k = row["zero_expert_num"], row["num_experts_per_tok"]
        caveat = f"its {n_zero} zero-compute experts are not modelled: a token is taken to use {top_k} real ones, which is more"
    if row.get("num_hash_layers"):
        caveat = f"its first {row['num_hash_layers']} MoE layers route by a hash of the token, which is not modelled"
    return ModelSpec(
        name=name,
        n_experts=row["n_routed_experts"],
        top_k=row["num_experts_per_tok"],
        n_group=row["n_group"],
        topk_group=row["topk_group"],
        scoring=row["scoring_func"],
        group_score="top2_sum" if row["correction_bias"] else "max",
        has_bias=row["correction_bias"],
        n_moe_layers=row["num_moe_layers"],
        hidden_size=row["hidden_size"],
        expert_hidden_size=row["expert_hidden_size"],
        moe_intermediate_size=row["moe_intermediate_size"],
        expert_matrices=row["expert_matrices"],
        routed_dtype=row["routed_dtype"],
        unverified=tuple(row["unverified"]),
        source=tuple(row["source"]),
        caveat=caveat,
    )


def _from_config(path: Path) -> ModelSpec:
    config = read_json(path, f"model config {path}")
    if not isinstance(config, dict):
        raise InputError(f"model config {path} is not a JSON object")
    # Multimodal configs keep the language model's keys one level down.
    for key in ("text_config", "language_config", "llm_config"):
        if isinstance(config.get(key), dict) and _find(config, "n_experts") is None:
            config = config[key]
    unverified = []
    n_experts, top_k = _find(config, "n_experts"), _find(config, "top_k")
    if n_experts is None:
        keys = ", ".join(_KEYS["n_experts"])
        raise InputError(f"model config {path} has no experts: none of the keys {keys}")
    if top_k is None:
        raise InputError(f"model config {path} has no top-k: none of the keys {', '.join(_KEYS['top_k'])}")
    model_type, method = str(config.get("model_type", "")), config.get("topk_method")
    scoring, has_bias = _find(config, "scoring"), method == "noaux_tc"
    if model_type in _BY_TYPE and (scoring is None or method is None):
        scoring, has_bias = scoring or _BY_TYPE[model_type][0], has_bias or _BY_TYPE[model_type][1]
    if scoring is None:
        scoring = "softmax"
        unverified.append("scoring (no scoring_func in config.json; softmax assumed)")
    n_group, topk_group = _find(config, "n_group") or 1, _find(config, "topk_group") or 1
    if n_group > 1 and _find(config, "topk_group") is None:
        unverified.append("topk_group (not in config.json; 1 assumed)")
    if method == "greedy":  # DeepSeek-V2's name for plain top-k, whatever n_group says
        n_group = topk_group = 1
    if not isinstance(scoring, str):
        raise InputError(f"model config {path}: the scoring function must be a name, not {scoring!r}")
    hidden = _whole(config, "hidden_size")
    return ModelSpec(
        name=str(path),
        n_experts=n_experts,
        top_k=top_k,
        n_group=n_group,
        topk_group=topk_group,
        scoring=scoring,
        group_score="top2_sum" if has_bias else "max",
        has_bias=has_bias,
        n_moe_layers=_count_moe_layers(config),
        hidden_size=hidden,
        expert_hidden_size=_whole(config, "routed_expert_hidden_size") or _whole(config, "moe_latent_size") or hidden,
        moe_intermediate_size=_find(config, "moe_intermediate_size") or 0,
        unverified=tuple(unverified),
        source=(str(path),),
    )


def _find(config: dict[str, Any], field: str) -> Any:
    """Value of the first key variant of a field that is present; the list forms that some configs use must be constant."""
    for key in _KEYS[field]:
        value = config.get(key)
        if isinstance(value, list) and value and all(item == value[0] for item in value):
            value = value[0]
        if value is not None:
            return value
    return None


def _whole(config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else 0


def _count_moe_layers(config: dict[str, Any]) -> int:
    """MoE layers by the keys of the common configs: leading dense layers, every n-th layer, listed dense layers."""
    layers = _whole(config, "num_hidden_layers") or _whole(config, "num_layers")
    step = _whole(config, "interleave_moe_layer_step") or _whole(config, "decoder_sparse_step")
    step = step or _whole(config, "moe_layer_freq") or 1
    if layers > _MAX_LAYERS:
        raise InputError(f"model config: {layers} layers, more than {_MAX_LAYERS}")
    dense = config.get("mlp_only_layers")
    dense = set(dense) if isinstance(dense, list) and all(isinstance(i, int) for i in dense) else set()
    first = _whole(config, "first_k_dense_replace")
    return sum(1 for i in range(first, layers) if (i + 1) % step == 0 and i not in dense)
