"""The table of methods, written by hand: a new one is a file and a line."""

from model.objectives.base import Objective, Outcome
from model.objectives.daae import DAAE
from model.objectives.mae import MAE

OBJECTIVES: dict[str, type[Objective]] = {"mae": MAE, "daae": DAAE}

__all__ = ["OBJECTIVES", "Objective", "Outcome"]
