"""Features of all kinds of images that realism and diversity compare, in every space, on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from meddiff_steps.evaluation.realism.base import MIN_IMAGES, Sample, Scale
from meddiff_steps.imaging.selection import Images
from meddiff_steps.instruments.feature_spaces.base import Change, FeatureSpace, extract


@dataclass(frozen=True)
class Kind:
    """Some images of one kind.

    Attributes
    ----------
    images
        Which.
    column
        Of their shards.
    """

    images: Images
    column: str = "image"

    def __len__(self) -> int:
        return len(self.images)

    def features(
        self, spaces: Sequence[FeatureSpace], name: str, change: Change | None = None
    ) -> dict[str, np.ndarray]:
        """`extract` of these; `name` stands at the progress bar."""
        chosen = self.images
        return extract(
            spaces, chosen.shards, chosen.rows, f"features of {name} images", column=self.column, change=change
        )


def kinds_of(synthetic: Images, training: Images, held_out: Images, paired: Images, most: int) -> dict[str, Kind]:
    """Which images are compared, `most` of each kind at most.

    As many training scans as synthetic images stand in for these, so that a floor has the bias of its figure: one of
    each subject, since synthetic images are of nobody twice, and no more synthetic images than there are such subjects.
    Reconstructions, no more than these, are those of `paired` whose scans are among the held-out ones; they are left
    out where there are fewer than `MIN_IMAGES`.
    """
    training = training.one_of_each()
    count = min(len(synthetic), len(training), most)
    kinds = {
        "synthetic": Kind(synthetic.at_most(count)),
        "training": Kind(training.at_most(count)),
        "held_out": Kind(held_out.at_most(most)),
    }
    decoded = paired.taken(np.flatnonzero(np.isin(paired.ids, kinds["held_out"].images.ids)).tolist()).at_most(count)
    return kinds | ({"reconstructions": Kind(decoded, "reconstruction")} if len(decoded) >= MIN_IMAGES else {})


@dataclass(frozen=True)
class Measured:
    """One feature space of all kinds of images.

    Attributes
    ----------
    space
        Which.
    scale
        Learnt from the held-out scans.
    samples
        By kind, in standard deviations; `originals`: the held-out scans that reconstructions are of.
    """

    space: FeatureSpace
    scale: Scale
    samples: Mapping[str, Sample]

    def sample(self, features: Mapping[str, np.ndarray], units: np.ndarray) -> Sample:
        """Features in every space, as `extract` gives them, as a sample of this one."""
        return Sample(self.scale.standard(features[self.space.name]), units)

    def card(self, kinds: Mapping[str, Kind]) -> dict[str, Any]:
        """What stands beside every figure of the space."""
        return space_card(self.space, kinds) | {
            "features": len(self.scale.mean),
            "components": self.scale.basis.shape[1],
            "explained": [float(f"{x:.4g}") for x in self.scale.explained[:2]],
        }


def space_card(space: FeatureSpace, kinds: Mapping[str, Kind]) -> dict[str, Any]:
    """What defines a space, and how many images it was measured on."""
    counts = {kind: len(some) for kind, some in kinds.items()}
    return {"digest": space.digest, "description": space.description, "images": counts}


def smallest(kinds: Mapping[str, Kind]) -> int:
    """Subjects of the kind of which there are fewest, reconstructions aside; of synthetic images each is one."""
    return min(len(np.unique(kinds[name].images.units)) for name in ("synthetic", "training", "held_out"))


def originals(held_out: Sample, kinds: Mapping[str, Kind], decoded: Images) -> Sample:
    """Those rows of the held-out scans that some reconstructions are of, in the same order."""
    place = {name: row for row, name in enumerate(kinds["held_out"].images.ids)}
    rows = [place[name] for name in decoded.ids]
    return Sample(held_out.features[rows], held_out.units[rows])


def measured(spaces: Sequence[FeatureSpace], kinds: Mapping[str, Kind], change: Change | None = None) -> list[Measured]:
    """Every space of all kinds, changed before they are looked at; none where there are fewer than `MIN_IMAGES` of one
    kind.
    """
    if not spaces or smallest(kinds) < MIN_IMAGES:
        return []
    words = {"reconstructions": "reconstructed"}
    found = {kind: some.features(spaces, words.get(kind, kind), change) for kind, some in kinds.items()}
    out = []
    for space in spaces:
        scale = Scale.of(found["held_out"][space.name], smallest(kinds))
        samples = {
            kind: Sample(scale.standard(features[space.name]), kinds[kind].images.units)
            for kind, features in found.items()
        }
        if "reconstructions" in samples:
            samples["originals"] = originals(samples["held_out"], kinds, kinds["reconstructions"].images)
        out.append(Measured(space, scale, samples))
    return out
