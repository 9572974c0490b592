"""Advice on placements for one's own traffic: what is worth a trial, and what an engine makes of it."""

from sim.advice.compare import advise

__all__ = ["advise"]
