"""Advice on placements for one's own traffic: what is worth a trial, and what an engine makes of it."""

from sim.advice.compare import LEAST_SAVED, Advice, advise, candidates, rule_text
from sim.advice.words import changes, not_run, verdict_text

__all__ = [
    "LEAST_SAVED",
    "Advice",
    "advise",
    "candidates",
    "changes",
    "not_run",
    "rule_text",
    "verdict_text",
]
