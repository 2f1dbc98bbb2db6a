"""The table of methods, written by hand: a new one is a file and a line."""

from model.objectives.base import Objective, Outcome
from model.objectives.byol import BYOL
from model.objectives.can import CAN
from model.objectives.clsa import CLSA
from model.objectives.daae import DAAE
from model.objectives.mae import MAE
from model.objectives.mixedae import MixedAE
from model.objectives.mocov2 import MoCoV2
from model.objectives.mocov3 import MoCoV3
from model.objectives.selfcon import SelfCon
from model.objectives.simclr import SimCLR
from model.objectives.supcon import SupCon
from model.objectives.swav import SwAV

OBJECTIVES: dict[str, type[Objective]] = {
    "mae": MAE, "daae": DAAE, "can": CAN, "mixedae": MixedAE, "swav": SwAV, "clsa": CLSA, "simclr": SimCLR,
    "mocov2": MoCoV2, "mocov3": MoCoV3, "byol": BYOL, "supcon": SupCon, "selfcon": SelfCon,
}  # fmt: skip

__all__ = ["OBJECTIVES", "Objective", "Outcome"]
