"""What the busiest rank costs on a real device: sampled steps, measured experts, and the model beside them."""

from sim.measure.compare import constants, errors, gains, with_predictions
from sim.measure.experts import Backend, BackendError, NumpyExperts, Shape, Timing
from sim.measure.run import measure
from sim.measure.steps import Measurement, plan_measurement
from sim.measure.table import read_measured

__all__ = [
    "Backend",
    "BackendError",
    "Measurement",
    "NumpyExperts",
    "Shape",
    "Timing",
    "constants",
    "errors",
    "gains",
    "measure",
    "plan_measurement",
    "read_measured",
    "with_predictions",
]
