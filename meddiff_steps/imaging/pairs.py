"""Images of the same scan, some given and some wanted, as a network takes them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.channels import Kind, channels_of
from meddiff_steps.imaging.shards import Shards


@dataclass(frozen=True)
class Pairs:
    """Sources and targets of preprocessed scans.

    Attributes
    ----------
    shards
        Preprocessed.
    source, target
        Columns.
    kind
        Of the target.  Several columns of contrasts are the channels of one image; several masks or label maps are
        those of several readers, of which one is looked at.
    labels
        That a label map may have, 0 first; empty for other kinds.
    missing
        Any of the sources may be missing.  What is 0 everywhere is not there.
    """

    shards: Shards
    source: tuple[str, ...]
    target: tuple[str, ...]
    kind: Kind
    labels: tuple[int, ...] = ()
    missing: bool = False

    @classmethod
    def of(
        cls,
        shards: Shards,
        source: Sequence[str],
        target: Sequence[str],
        train: Sequence[int] | np.ndarray,
        key: str,
        missing: bool = False,
    ) -> Self:
        """What a section `key` of the study names, among the columns of shards.

        Parameters
        ----------
        train
            Rows of training scans: labels that they have are those that can be drawn.

        Raises
        ------
        UserError
            There is no such channel, kinds do not go together, or no training scan has anything marked.
        """
        kinds: dict[str, Kind] = {"image": "contrast", **channels_of(shards)}
        for name, wanted in (("source", source), ("target", target)):
            absent = [one for one in wanted if one not in kinds]
            if absent:
                raise UserError(
                    f"{key}.{name}: {absent[0]!r} is no image of the scans, which have {', '.join(kinds)}. Declare it"
                    " under preprocess.channels."
                )
        told = [name for name in source if kinds[name] == "labels"]
        if told:
            raise UserError(f"{key}.source: {told[0]} is a label map; give contrasts and masks (kind: mask)")
        found = {kinds[name] for name in target}
        if len(found) > 1:
            raise UserError(f"{key}.target: {', '.join(sorted(found))} together, expected channels of one kind")
        masks = [name for name in source if kinds[name] != "contrast"]
        if missing and masks:
            raise UserError(
                f"{key}.source: {masks[0]} is no contrast, so nothing says whether it is missing or empty. Leave it"
                f" out, or {key}.missing."
            )
        made = cls(shards, tuple(source), tuple(target), found.pop(), missing=missing)
        if made.kind == "contrast":
            return made
        labels = sorted({int(v) for row in train for name in target for v in np.unique(shards.tensor(name, row))})
        if labels in ([], [0]):
            raise UserError(
                f"{key}.target: nothing is marked in {', '.join(target)} of any of {len(train)} training scans. Check"
                " the path pattern of the channel, and preprocessed/qc.parquet."
            )
        return cls(shards, made.source, made.target, made.kind, (0, *(v for v in labels if v)))

    @property
    def readers(self) -> int:
        """Who marked each scan; 1 of contrasts."""
        return 1 if self.kind == "contrast" else len(self.target)

    @property
    def channels(self) -> int:
        """Of a target: one of a mask, one per label of a label map, as many as contrasts."""
        if self.kind == "contrast":
            return len(self.target)
        return 1 if self.kind == "mask" else len(self.labels)

    def of_sources(self) -> Self:
        """The sources themselves as what is to be drawn, from nothing: all that can be learnt without labels."""
        return type(self)(self.shards, (), self.source, "contrast")

    def sources(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What is given, float32 (n, s, *spatial) in [0, 1]; s may be 0."""
        if not self.source:
            return np.zeros((len(rows), 0, *self.shards.shape("image")[1:]), np.float32)
        return np.concatenate([self.shards.tensors(name, rows) for name in self.source], axis=1)

    def there(self, rows: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Which sources and which targets scans have, bool (n, s) and (n, targets): all, where none may be missing."""
        if not self.missing:
            return np.ones((len(rows), len(self.source)), bool), np.ones((len(rows), self.channels), bool)
        axes = tuple(range(2, 2 + self._dims))
        return np.any(self.sources(rows), axis=axes), np.any(self.truths(rows), axis=axes)

    @property
    def _dims(self) -> int:
        return len(self.shards.shape("image")) - 1

    def patterns(self) -> np.ndarray:
        """Which sources there may be, bool (k, s), the fewest first: all, or, where any may be missing, every choice of
        some that leaves something to be drawn.
        """
        if not self.missing:
            return np.ones((1, len(self.source)), bool)
        choices = [np.array(one) for one in itertools.product([False, True], repeat=len(self.source))]
        found = [one for one in choices if one.any() and self.asked(one).any()]
        return np.array(sorted(found, key=lambda one: one.sum()))

    def asked(self, present: np.ndarray) -> np.ndarray:
        """Which targets, bool (targets,), are to be drawn where sources (s,) are there: those that are not given."""
        given = {name for name, one in zip(self.source, present, strict=True) if one}
        if self.kind != "contrast":
            return np.ones(self.channels, bool)
        return np.array([name not in given for name in self.target])

    def hidden(self, sources: np.ndarray, present: np.ndarray) -> np.ndarray:
        """Sources (n, s, *spatial) with NaN in place of those that are not present (n, s)."""
        if not self.missing:
            return sources
        return np.where(present.reshape(*present.shape, *[1] * self._dims), sources, np.float32(np.nan))

    def truths(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What is wanted as it is stored: contrasts (n, c, *spatial) in [0, 1]; masks and label maps (n, readers,
        *spatial), whole numbers.
        """
        if self.kind == "contrast":
            return np.concatenate([self.shards.tensors(name, rows) for name in self.target], axis=1)
        return np.concatenate([self.shards.tensors(name, rows, None) for name in self.target], axis=1).astype(np.int16)

    def encoded(self, truths: np.ndarray) -> np.ndarray:
        """Targets as they are drawn, float32 (n, channels, *spatial) from -1 to 1; labels one-hot.

        Parameters
        ----------
        truths
            Contrasts (n, c, *spatial), or masks of one reader each (n, 1, *spatial).
        """
        if self.kind == "contrast":
            return (truths * 2.0 - 1.0).astype(np.float32)
        if self.kind == "mask":
            return np.where(truths > 0, np.float32(1), np.float32(-1))
        labels = np.asarray(self.labels).reshape(-1, *[1] * (truths.ndim - 2))
        return np.where(truths == labels, np.float32(1), np.float32(-1))

    def decoded(self, drawn: np.ndarray) -> np.ndarray:
        """What was drawn, as of `truths`: contrasts in [0, 1], masks and label maps (n, 1, *spatial) int16.

        Parameters
        ----------
        drawn
            (n, channels, *spatial) from -1 to 1, or logits.
        """
        if self.kind == "contrast":
            return ((drawn + 1.0) / 2.0).clip(0.0, 1.0).astype(np.float32)
        if self.kind == "mask":
            return (drawn > 0).astype(np.int16)
        return np.asarray(self.labels, np.int16)[drawn.argmax(1)][:, None]
