"""AdaInf: generated images beside real ones, and weaker augmentation. Wang et al. 2024, arXiv 2403.12448.

A recipe and no method: the loss is that of a method that compares two views. `daae inflate` makes the images,
--inflate.data mixes them in (pipeline/inflated.py), and the presets that end in -weak have the augmentation below.
"""

from __future__ import annotations

from dataclasses import replace

from model.objectives.two_views import TwoViews

NAME = "adainf"
IDEA = "generated images beside real ones, augmented less: for simclr, mocov2 and byol"
PAPER = "Wang et al. 2024, arXiv 2403.12448"
BASES = ("simclr", "mocov2", "byol")


def weaker(method: TwoViews) -> TwoViews:
    """Crops from a fifth of the image up; colours change half as often, and at most half as much as SimCLR's, which
    MoCo v2's and BYOL's do to begin with. Grayscale, blur and solarisation stay."""
    jitter = tuple(min(each) for each in zip(method.jitter, (0.4, 0.4, 0.4, 0.1), strict=True))
    return replace(method, area=(0.2, 1.0), jitter=jitter, jitter_p=0.4)
