"""List the model presets: their router, and whether every field was read from the checkpoint."""

from argparse import ArgumentParser, Namespace

from sim.cli.text import table
from sim.model import load_model, model_names


def add_arguments(parser: ArgumentParser) -> None:
    """`epsim models` takes no options."""


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."


def run(arguments: Namespace) -> None:
    """Run `epsim models`."""
    rows = []
    for model in map(load_model, model_names()):
        groups = f"{model.topk_group} of {model.n_group}" if model.is_grouped else "no"
        rows.append(
            [
                model.name,
                groups,
                model.group_score if model.is_grouped else "-",
                model.scoring,
                "yes" if model.has_bias else "no",
                str(model.n_experts),
                str(model.top_k),
                str(model.n_moe_layers),
                _short("; ".join(model.unverified) or "-"),
            ]
        )
    heads = ["model", "groups kept", "group score", "scoring", "bias", "experts", "top_k", "MoE layers", "not verified"]
    print(table(heads, rows, align="<<<<<>>><"))
