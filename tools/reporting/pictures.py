"""What the encoder saw and repainted, for `daae report`."""

from __future__ import annotations

from html import escape

from tools.comparing.records import Study, Trial
from tools.page import picture

PICTURE_BYTES = 1_500_000  # of all pictures together, before base64 adds a third: the page stays under 3 MB


def section(study: Study) -> str:
    """HTML, a picture for each arm; nothing where no run has drawn one."""
    shown = []
    for group in study.groups:
        trial = next((each for each in reversed(group.trials) if each.gallery is not None), None)
        if trial is not None:
            shown.append(trial)
    figures = []
    for trial in shown:
        source = picture(trial.gallery, PICTURE_BYTES // len(shown)) if trial.gallery else None
        if source is not None:
            caption = f"<b>{escape(trial.arm)}</b>, seed {trial.seed}. {escape(_rows_of(trial))}"
            image = f'<img src="{source}" alt="views and repainted pictures of {escape(trial.arm)}">'
            figures.append(f'<figure class="gallery">{image}<figcaption>{caption}</figcaption></figure>')
    if not figures:
        return ""
    return (
        "<section><h2>What the encoder sees, and what it repaints</h2><p>The first images of the training set, one "
        f"column each, cut and coloured as in training.</p>{''.join(figures)}</section>"
    )


def _rows_of(trial: Trial) -> str:
    """What the rows of a gallery are, by the method's settings."""
    settings = trial.settings
    if settings.get("objective") not in ("mae", "daae"):
        return "A row per view; masked views also with their holes and, where there is a decoder, repainted."
    kept = 1 - float(settings.get("method.mask_ratio", 0.75))
    rows = ["the full-size view", f"what the encoder sees of it ({kept:.0%} of the patches)"]
    if settings.get("method.reconstruct_weight", 1.0) > 0:
        rows.append("the holes repainted by the decoder")
    if settings.get("objective") == "daae":
        crop = "the same" if settings.get("method.share_crop") else "its own"
        rows.append(f"the downsampled view, from {crop} crop")
    words = "Rows from the top: " + "; ".join(rows) + "."
    if settings.get("method.norm_pix") and settings.get("method.reconstruct_weight", 1.0) > 0:
        words += " The decoder predicts a patch relative to its mean and contrast, which are taken from the true patch."
    return words
