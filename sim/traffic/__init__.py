"""What recorded routing and measured loads look like, and traffic by law fitted to them."""

from sim.traffic.fit import Fit, fit_text, fit_traffic
from sim.traffic.holdout import hold_out

__all__ = ["Fit", "fit_text", "fit_traffic", "hold_out"]
