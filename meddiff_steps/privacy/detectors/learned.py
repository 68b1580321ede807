"""The detector `learned`: cosine in an embedding that was trained to tell subjects apart."""

from __future__ import annotations

from meddiff_steps.privacy.detectors.base import Context, Detector
from meddiff_steps.privacy.detectors.embedding import Embedding

ENTRY = {
    "order": 2,
    "summary": (
        "What a network learnt to tell subjects apart by: finds copies that were moved, mirrored, cropped or"
        " re-contrasted."
    ),
    "source": "SimCLR (Chen et al. 2020); Dar et al. 2025",
    "misses": (
        "copies by what it did not learn to look at: it sees reduced images, and training on few scans may not teach"
        " what matters."
    ),
}


def build(context: Context) -> Detector:
    """`Embedding` by the study's embedder."""
    return Embedding("learned", context.embedder(), context.directions.get("learned"), context.device)
