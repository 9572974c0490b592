"""What is routed: the shape of a model's router and experts, from a table of presets or a Hugging Face config.json."""

from sim.model.load import load_model, model_names
from sim.model.spec import ModelSpec

__all__ = ["ModelSpec", "load_model", "model_names"]
