"""The detector `learned`: cosine in an embedding that was trained to tell subjects apart."""

from __future__ import annotations

from meddiff_steps.privacy.detectors.base import Context, Detector
from meddiff_steps.privacy.detectors.embedding import Embedding

ENTRY = {
    "order": 2,
    "summary": (
        "What a network learnt to tell subjects apart by: finds copies that were mirrored, cropped, re-contrasted or"
        " slightly rotated."
    ),
    "source": "SimCLR (Chen et al. 2020); Dar et al. 2025",
    "misses": (
        "copies that were moved by more than a voxel (of the demo's by 2 voxels, 0 to 1 of 20) or rotated by 6 degrees"
        " and more (10 of 20), and whatever it did not learn to look at: it sees reduced images."
    ),
}


def build(context: Context) -> Detector:
    """`Embedding` by the study's embedder."""
    return Embedding("learned", context.embedder(), context.directions.get("learned"), context.device)
