"""Grouped top-k: from logits to expert ids by the exact upstream rule, and routed tokens of a workload by the thousand."""

from sim.router.draw import check_pair, draw_loads, draw_trials, model_for, route_layers, routing_law, score_law
from sim.router.topk import route

__all__ = ["check_pair", "draw_loads", "draw_trials", "model_for", "route", "route_layers", "routing_law", "score_law"]
