"""The space `embedder`: what the privacy stage learnt, without labels, from real training scans."""

from __future__ import annotations

from meddiff_steps.core.files import read_json
from meddiff_steps.core.folders import CARD
from meddiff_steps.instruments.embedder import load_embedder
from meddiff_steps.instruments.feature_spaces.base import Context, FeatureSpace, digest_of

ENTRY = {
    "order": 3,
    "title": "coarse shape",
    "summary": (
        "The network of the learned copy detector: sees the coarse shape that tells subjects apart; misses sharpness,"
        " since it looks at reduced images and was taught to ignore noise and blur."
    ),
    "source": "SimCLR (Chen et al. 2020), trained without labels on this study's training scans",
    "spatial_dims": [2, 3],
    "needs": "the study's instruments/embedder",
}


def build(context: Context) -> FeatureSpace | None:
    """The space `embedder`, float32 (b, 64) of norm 1; None where the context has no embedder."""
    if context.embedder is None:
        return None
    return FeatureSpace(
        "embedder",
        digest_of("embedder", read_json(context.embedder / CARD)["weights_sha256"]),
        "embedding learnt without labels from real training scans",
        load_embedder(context.embedder),
    )
