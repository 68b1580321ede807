"""What each figure would say of real scans that were spoilt in a known way: which figure sees what, in this cohort.

A figure that is at its floor says little unless it would leave it for a fault that matters.  So held-out scans are
spoilt and measured as if they were synthetic images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from meddiff_steps.config import Evaluate
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.evaluation import spectrum
from meddiff_steps.evaluation.diversity import kernel_width, variety
from meddiff_steps.evaluation.likeness import Kind, Measured, originals
from meddiff_steps.evaluation.realism.base import MIN_IMAGES, Draws, Sample
from meddiff_steps.evaluation.realism.measure import judge
from meddiff_steps.evaluation.spoiling import Grain, blocky, blurred, hazy, with_blur
from meddiff_steps.imaging.selection import Images
from meddiff_steps.instruments.feature_spaces.base import Change, FeatureSpace
from meddiff_steps.statistics.bootstrap import Figure

logger = logging.getLogger(__name__)

#: Scores: high is good.  All other figures are distances, but the Vendi score and power, which should be as they are.
SCORES = frozenset({"precision", "recall", "density", "coverage"})
BOTH_SIDES = frozenset({"vendi", *spectrum.BANDS})
#: Ways to spoil an image, in words.
WORDS = {
    "blur": "finest detail lost: a Gaussian of half a voxel",
    "blur_and_grain": "the same, hidden under noise of the strength and spectrum that was lost",
    "reconstruction_and_grain": "what the decoder lost, hidden under noise of its strength and spectrum",
    "blocks": "a small offset in every block of four voxels a side",
    "haze": "clouds of 3 % grey where it is darker",
}


def verdict(name: str, found: Figure, real: Figure) -> str:
    """`worse`, `better` or `alike`: whether the interval of a figure lies apart from that of real scans, and on which
    side; `unknown` without intervals.
    """
    ends = [figure[end] for figure in (found, real) for end in ("low", "high")]
    if any(end is None for end in ends):
        return "unknown"
    above, below = ends[0] > ends[3], ends[1] < ends[2]
    if not above and not below:
        return "alike"
    return "worse" if name in BOTH_SIDES or below == (name in SCORES) else "better"


def ways(pairs: Images, seed: str) -> dict[str, tuple[str, Change | None]]:
    """Per way to spoil, the column of `pairs` that it begins with and what is done to it."""

    def each(column: str) -> Callable[[], Any]:
        return lambda: (batch[0, 0] for batch in _one_by_one(pairs, column))

    def both() -> Any:
        return zip(each("image")(), each("reconstruction")(), strict=True)

    softened, decoded = Grain.fit(lambda: with_blur(each("image")())), Grain.fit(both)
    ids = dict(zip(pairs.rows.tolist(), pairs.ids, strict=True))

    def of(way: str, spoil: Callable[[np.ndarray, str], np.ndarray]) -> Change:
        def change(images: np.ndarray, rows: np.ndarray) -> np.ndarray:
            keys = [seed_key(f"{seed}/sanity/{ids[int(row)]}", 0, 0, way) for row in rows]
            return np.stack([spoil(image[0], key)[None] for image, key in zip(images, keys, strict=True)])

        return change

    return {
        "blur": ("image", of("blur", lambda image, _: blurred(image))),
        "blur_and_grain": ("image", of("blur_and_grain", lambda image, key: softened.drawn_on(blurred(image), key))),
        "reconstruction_and_grain": ("reconstruction", of("reconstruction_and_grain", decoded.drawn_on)),
        "blocks": ("image", of("blocks", blocky)),
        "haze": ("image", of("haze", hazy)),
    }


def _one_by_one(images: Images, column: str) -> Any:
    values = images.column(column)
    return (values[start : start + 1] for start in range(len(images)))


def sanity(
    spaces: Sequence[FeatureSpace],
    kinds: Mapping[str, Kind],
    found: Sequence[Measured],
    settings: Evaluate,
    *,
    seed: str,
) -> dict[str, Any]:
    """Every figure of realism, diversity and sharpness, of held-out scans that were spoilt.

    Parameters
    ----------
    spaces, kinds, found
        As for realism and diversity (`likeness`).
    settings
        `sanity_images` scans at most are spoilt; 0: nothing is measured.
    seed
        Of all that is drawn.

    Returns
    -------
    dict
        `ways` (in words), `images`, and `figures`: per space (and `power`) and figure `real`, what the same scans give
        unspoilt, and per way a figure with `verdict`: `worse` than real scans (it sees the fault), `better`
        (it praises it), `alike` or `unknown`.  `sees`: ways by which it is worse.  Only `skipped` where there is
        nothing to measure.
    """
    pairs = kinds["reconstructions"].images.at_most(settings.sanity_images) if "reconstructions" in kinds else None
    if settings.sanity_images == 0:
        return {"skipped": "evaluate.sanity_images is 0"}
    if not found or pairs is None or len(pairs) < MIN_IMAGES:
        return {
            "skipped": f"fewer than {MIN_IMAGES} reconstructions of held-out scans, or nothing to compare them with"
        }
    draws = Draws(settings.bootstrap, settings.realism_bootstrap, settings.permutations, seed, "sanity")
    power = _Powers(kinds, seed, settings.bootstrap)
    real = {
        one.space.name: _figures(one, originals(one.samples["held_out"], kinds, pairs), draws, settings)
        for one in found
    } | {"power": power.of(Kind(pairs), None)}
    out: dict[str, Any] = {
        space: {name: {"real": figure} for name, figure in figures.items()} for space, figures in real.items()
    }
    chosen = ways(pairs, seed)
    for way, (column, change) in chosen.items():
        spoilt = Kind(pairs, column)
        features = spoilt.features(spaces, f"spoilt ({way})", change)
        judged = {
            one.space.name: _figures(one, one.sample(features, pairs.units), draws, settings) for one in found
        } | {"power": power.of(spoilt, change)}
        for space, figures in judged.items():
            for name, figure in figures.items():
                out[space][name][way] = figure | {"verdict": verdict(name, figure, real[space][name])}
    for space, entries in out.items():
        for name, entry in entries.items():
            entry["sees"] = [way for way in chosen if entry[way]["verdict"] == "worse"]
            logger.info("%s %s sees %s", space, name, ", ".join(entry["sees"]) or "nothing")
    return {"ways": {way: WORDS[way] for way in chosen}, "images": len(pairs), "figures": out}


def _figures(one: Measured, sample: Sample, draws: Draws, settings: Evaluate) -> dict[str, Figure]:
    """Realism and diversity of a sample against held-out scans."""
    reference, width = one.samples["held_out"], kernel_width(one.samples["training"].features)
    found = variety(
        sample,
        reference,
        width,
        neighbours=settings.neighbours,
        resamples=draws.resamples,
        seed=draws.seed,
        label=draws.label,
    )
    return judge(sample, reference, one.scale, draws, settings.metrics) | found


class _Powers:
    """Power in three bands over that of held-out scans."""

    def __init__(self, kinds: Mapping[str, Kind], seed: str, resamples: int) -> None:
        self.reference, self.seed, self.resamples = kinds["held_out"].images, seed, resamples
        self.power = self._radial(kinds["held_out"], None)

    def _radial(self, some: Kind, change: Change | None) -> np.ndarray:
        rows = some.images.rows
        values = some.images.column(some.column)
        return np.concatenate(
            [
                spectrum.radial_power(
                    values[i : i + 1] if change is None else change(values[i : i + 1], rows[i : i + 1])
                )
                for i in range(len(some))
            ]
        )

    def of(self, some: Kind, change: Change | None) -> dict[str, Figure]:
        found = spectrum.band_power_ratio(
            self._radial(some, change),
            self.power,
            paired=False,
            units=some.images.units.tolist(),
            reference_units=self.reference.units.tolist(),
            resamples=self.resamples,
            seed=self.seed,
        )
        return {
            band: {key: value for key, value in figure.items() if key != "ceiling"} for band, figure in found.items()
        }
