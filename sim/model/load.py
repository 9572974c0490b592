"""Models by name, from a table of presets, or from a published config."""

import re
import tomllib
from dataclasses import replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from sim.errors import InputError, shown, unknown
from sim.files import is_folder, is_there
from sim.model.config import caveat_of, read_config
from sim.model.layers import moe_layers
from sim.model.reader import Reader
from sim.model.spec import ModelSpec

# What follows a model's name on Hugging Face when the router and the experts stay as they are: a quantised or converted
# copy, a training stage, a date.
_ENDING = re.compile(
    r"[-._](fp8|fp4|nvfp4|mxfp4|mxfp8|awq|gptq|gguf|bf16|fp16|int4|int8|w4a16|w4a8|w8a8|w8a16|w4afp8|w4afp4|[2348]-?bit|mlx|dwq|bnb"
    r"|autoround|dynamic|block|channel|tensor|quantized|compressed|marlin|mixed|unsloth|qat|hf|original"
    r"|instruct|inst|chat|base|thinking|reasoning|it|pt|preview|exp|terminus|speciale|zero|\d{4}|v0\.\d)$|(?<=fp4)-v\d$"
)

_OF_THE_HUB = re.compile(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/(?=[^/]+/[^/]+/?$)|(?<=\w)/$", re.IGNORECASE)


@cache
def _presets() -> dict[str, dict[str, Any]]:
    text = resources.files("sim.model").joinpath("presets.toml").read_text(encoding="utf-8")
    return tomllib.loads(text)["models"]


def model_names() -> list[str]:
    """Names of the presets, in the order of the table."""
    return list(_presets())


def load_model(name_or_path: str | Path | ModelSpec) -> ModelSpec:
    """Describe a model by preset name, Hugging Face id, or the path of its config.

    Parameters
    ----------
    name_or_path : str, Path or ModelSpec
        A preset (`epsim models`); a Hugging Face id, with or without its organisation and with the usual endings
        (-FP8, -NVFP4, -AWQ, -Instruct-2507, -0528, ...); a config.json or params.json, or the folder that it is in. A
        ModelSpec is returned as it is, so that functions can take any of these.

    Returns
    -------
    ModelSpec

    Raises
    ------
    InputError
        The name is no preset and no file, or the file does not describe a mixture-of-experts model.

    Examples
    --------
    >>> load_model("deepseek-ai/DeepSeek-V3-0324").name
    'deepseek-v3'
    >>> model = load_model("nvidia/Kimi-K2-Thinking-NVFP4")
    >>> model.name, model.n_layers, model.n_moe_layers, model.moe_layer_ids[0]
    ('kimi-k2', 61, 60, 1)
    """
    if isinstance(name_or_path, ModelSpec):
        return name_or_path
    if not isinstance(name_or_path, str | Path):
        raise InputError(f"`model` {shown(name_or_path)}: must be a name, a path or a ModelSpec")
    name = _OF_THE_HUB.sub("", str(name_or_path))
    exact = next((key for key, row in _presets().items() if name.lower() in (key, row["hf_id"].lower())), None)
    if exact:
        return _from_preset(exact)
    path = Path(name)
    path = next((path / file for file in ("config.json", "params.json") if is_there(path / file)), path)
    if path.suffix == ".gguf":
        raise InputError(
            f"`model` {name}: GGUF files are not read; give the config.json of the original model, or its name"
        )
    if name and is_folder(path):
        raise InputError(f"`model` {name} is a folder without a config.json or params.json")
    if name and (path.suffix == ".json" or is_there(path) or name.count("/") > 1 or name.startswith((".", "/", "~"))):
        return read_config(path)
    preset, assumed = _by_name(name)
    if preset:
        model = _from_preset(preset, assumed)
        return replace(model, routed_dtype=_stored_as(name) or model.routed_dtype)
    more = " (or the path of a config.json; `epsim models` lists the presets)"
    if path.parent.is_dir() and path.parent.name:
        more = " (or the path of a config.json: there is no such file or folder)"
    elif name.count("/") == 1:
        more = f" (another model: `hf download {name} config.json --local-dir DIR`, then --model DIR)"
    raise unknown("`model`", name.rpartition("/")[2], _presets(), more)


def _by_name(name: str) -> tuple[str, str]:
    """The preset that a Hugging Face id means, '' if none; and the id, if it is only assumed to be like the preset."""
    own = name.lower().rpartition("/")[2]
    if not own or len(own) > 200:
        return "", ""
    return _names().get(own) or _names().get(_stem(own)) or ("", "")


@cache
def _names() -> dict[str, tuple[str, str]]:
    """(preset, id that was only assumed to be it) of each name, without organisation, as it is and without endings."""
    names: dict[str, tuple[str, str]] = {}
    for preset, row in _presets().items():
        names |= {preset: (preset, ""), _stem(preset): (preset, "")}
        for known in (row["hf_id"], *row.get("also", []), *row.get("assumed", [])):
            own, meant = known.lower().rpartition("/")[2], (preset, known if known in row.get("assumed", []) else "")
            names.setdefault(own, meant)
            names.setdefault(_stem(own), meant)
    return names


def _stem(name: str) -> str:
    """A lower-case name without the endings that leave the router as it is."""
    while (shorter := _ENDING.sub("", name)) not in (name, ""):
        name = shorter
    return name


def _stored_as(name: str) -> str:
    """The type of the weights that a name's ending says, '' if none does: a copy's is not the preset's."""
    own = name.lower().rpartition("/")[2]
    endings = "" if own in _names() else own[len(_stem(own)) :]
    found = re.search(r"nvfp4|mxfp4|mxfp8|w4a(?=\d|f)|fp8|fp4|bf16|awq|gptq|gguf|int[48]|w8a8|[2348]-?bit", endings)
    return found[0].replace("w4a", "int4").replace("w8a8", "8-bit") if found else ""


def _from_preset(name: str, assumed: str = "") -> ModelSpec:
    row = _presets()[name]
    n_layers, ids = moe_layers(Reader(row, f"preset {name}"), {})
    assumption = (f"that {assumed} has the router and sizes of {row['hf_id']}",) if assumed else ()
    fields: dict[str, Any] = {"n_layers": n_layers, "moe_layer_ids": ids, "expert_hidden_size": row["hidden_size"]}
    fields |= {field: row[field] for field in ModelSpec.__dataclass_fields__ if field in row}
    fields["group_score"] = "top2_sum" if row.get("has_bias") else "max"
    fields["unverified"], fields["source"] = (*row.get("unverified", ()), *assumption), tuple(row["source"])
    fields["caveat"] = caveat_of(row.get("zero_expert_num", 0), row.get("num_hash_layers", 0), row["top_k"])
    return ModelSpec(name, **fields)
