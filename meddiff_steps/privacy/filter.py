"""The filter: a synthetic image that is too near to a training scan is drawn again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from meddiff_steps.imaging.signed_distances import LABELS
from meddiff_steps.privacy.calibration import Thresholds
from meddiff_steps.privacy.detectors.base import Detector, score
from meddiff_steps.privacy.label_maps import LabelMapDetector
from meddiff_steps.privacy.size import batch_size
from meddiff_steps.synthesis.plan import redraw

#: sample_id, image (1, *spatial), and where it has one its label map (*spatial).
Drawn = tuple[str, np.ndarray] | tuple[str, np.ndarray, np.ndarray | None]
#: Draws the images of planned subjects, in any order.
Draw = Callable[[pd.DataFrame], Iterable[Drawn]]


@dataclass(frozen=True)
class Candidate:
    """One image that was drawn, and what became of it.

    Attributes
    ----------
    decision
        `accepted`, or `rejected` for the reason given: the detectors that fired, or `not an image` (constant or not
        finite).
    similarity, nearest
        Per detector: to the nearest training scan, and its number.  Private.
    image, labels
        (1, *spatial), and its label map (*spatial) where it has one.
    """

    sample_id: str
    attempt: int
    seed_key: str
    decision: str
    reason: str
    similarity: Mapping[str, float]
    nearest: Mapping[str, int]
    image: np.ndarray
    labels: np.ndarray | None = None

    def row(self) -> dict[str, object]:
        """Without the image, for a table."""
        front = {
            "sample_id": self.sample_id,
            "attempt": self.attempt,
            "seed_key": self.seed_key,
            "decision": self.decision,
            "reason": self.reason,
        }
        return (
            front
            | {f"similarity_{k}": v for k, v in self.similarity.items()}
            | {f"nearest_{k}": v for k, v in self.nearest.items()}
        )


def judge(
    subjects: pd.DataFrame,
    images: Iterable[Drawn],
    groups: Mapping[str, str],
    detectors: list[Detector],
    thresholds: Thresholds | None,
    of_labels: LabelMapDetector | None = None,
) -> Iterator[Candidate]:
    """Judge the images of `subjects`, a batch at a time; without thresholds nothing but non-images is rejected.

    A pair is rejected where its image or its label map is too near.

    Raises
    ------
    ValueError
        An image is of none of the subjects or comes twice, a subject has none, or a label map is missing.
    """
    waiting = {
        key[0]: key for key in zip(subjects["sample_id"], subjects["attempt"], subjects["seed_key"], strict=True)
    }
    pending: list[tuple[tuple[str, int, str], np.ndarray, np.ndarray | None]] = []

    def flush() -> Iterator[Candidate]:
        stack = np.stack([image for _, image, _ in pending]).astype(np.float32, copy=False)
        values = tuple(range(1, stack.ndim))
        low, high = stack.min(values), stack.max(values)  # not finite where one value is not
        with np.errstate(invalid="ignore"):
            real = np.isfinite(low) & np.isfinite(high) & (high - low > 1e-6)
        stack[~real] = 0
        similarity, nearest = score(detectors, torch.from_numpy(stack))
        if of_labels is not None:
            of_maps = of_labels.similarity(np.stack([labels for _, _, labels in pending if labels is not None]))
            similarity, nearest = similarity | {LABELS: of_maps[0]}, nearest | {LABELS: of_maps[1]}
        owners = np.array([groups[key[0]] for key, _, _ in pending])
        flags = thresholds.flags(similarity, owners) if thresholds else {}
        for i, ((sample_id, attempt, key), image, labels) in enumerate(pending):
            reason = ", ".join(name for name, values in flags.items() if values[i]) if real[i] else "not an image"
            yield Candidate(
                str(sample_id),
                int(attempt),
                str(key),
                "rejected" if reason else "accepted",
                reason,
                {name: float(values[i]) for name, values in similarity.items()},
                {name: int(values[i]) for name, values in nearest.items()},
                image,
                labels,
            )
        pending.clear()

    for sample_id, image, *more in images:
        if sample_id not in waiting:
            raise ValueError(f"the image of {sample_id} was not asked for, or came twice")
        labels = more[0] if more else None
        if of_labels is not None and labels is None:
            raise ValueError(f"the image of {sample_id} has no label map, which would have to be compared, too")
        pending.append((waiting.pop(sample_id), image, labels))
        if len(pending) == batch_size(image.shape):
            yield from flush()
    if pending:
        yield from flush()
    if waiting:
        raise ValueError(f"no image of {next(iter(waiting))}, and of {len(waiting)} subjects in all")


def fill(
    subjects: pd.DataFrame,
    first: Iterable[Drawn],
    draw: Draw,
    groups: Mapping[str, str],
    detectors: list[Detector],
    thresholds: Thresholds | None,
    max_attempts: int,
    of_labels: LabelMapDetector | None = None,
) -> Iterator[Candidate]:
    """Every candidate until each planned subject has an accepted image or `max_attempts` were rejected.

    A subject's attempts depend on its own keys alone, so that a larger cohort rejects the same ones.

    Parameters
    ----------
    subjects
        Planned subjects with distinct sample ids.
    first
        Their images at the planned attempt.
    draw
        Draws redrawn subjects.
    groups
        Subgroup per sample id.
    of_labels
        What compares label maps, where images come with such.
    """
    images = first
    for attempt in range(max_attempts):
        rejected = []
        for candidate in judge(subjects, images, groups, detectors, thresholds, of_labels):
            if candidate.decision == "rejected":
                rejected.append(candidate.sample_id)
            yield candidate
        subjects = redraw(subjects[subjects["sample_id"].isin(rejected)], attempt + 1)
        if subjects.empty:
            return
        if attempt + 1 < max_attempts:
            images = draw(subjects)
