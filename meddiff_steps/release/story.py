"""What the texts of a dataset have to tell, and the sentences that several of them share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from meddiff_steps.config import Covariates, Release, Study
from meddiff_steps.imaging.encoding import Grid
from meddiff_steps.privacy.verdict import stopping

#: Version of the dataset; CHANGES tells of it.
VERSION = "1.0.0"


@dataclass(frozen=True)
class Story:
    """What the texts of a dataset say about where it comes from.

    Attributes
    ----------
    study, title
        As in the study file.
    config
        The study's `release` section.
    covariates
        The study's covariates.
    grid
        Shape and spacing of the images.
    sampler
        One phrase, for example "dpmpp, guidance scale 1".
    facts
        See `release.facts`.
    sources
        BIDS SourceDatasets entries, as far as known.
    distilled
        second_model.subjects.
    seed
        The study's, by which the suggested split is drawn.
    structures
        Of label maps, in the order of their labels; none where there are no label maps.
    paired
        Whether images were drawn from these label maps.
    """

    study: str
    title: str
    config: Release
    covariates: Covariates
    grid: Grid
    sampler: str
    facts: Mapping[str, Any]
    sources: Sequence[dict[str, str]] = ()
    distilled: int = 0
    seed: str = ""
    structures: tuple[str, ...] = ()
    paired: bool = False

    @classmethod
    def of(cls, study: Study, facts: Mapping[str, Any], sources: Sequence[dict[str, str]] = ()) -> Self:
        """What a study, and what was measured in it, have to tell."""
        steps = study.generate.num_inference_steps
        return cls(
            study=study.study,
            title=study.title,
            config=study.release,
            covariates=study.covariates,
            grid=Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm),
            sampler=(
                f"{study.generate.sampler}{f', {steps} steps' if steps else ''}, guidance scale"
                f" {study.generate.guidance_scale:g}"
            ),
            facts=facts,
            sources=sources,
            distilled=study.second_model.subjects,
            seed=study.seed,
            structures=study.structures,
            paired=study.pairs is not None,
        )

    @property
    def card(self) -> Mapping[str, Any]:
        return self.facts["cohort"]

    @property
    def source(self) -> str:
        """What the scans are that the model learnt from and is compared with, in a word."""
        return "simulated" if self.card.get("simulated") else "real"

    @property
    def privacy(self) -> Mapping[str, Any] | None:
        return self.facts["privacy"]

    @property
    def models(self) -> Mapping[str, Any]:
        return {one["name"]: one for one in self.facts["models"]}

    @property
    def metrics(self) -> Mapping[str, Any] | None:
        return self.facts["metrics"]


@dataclass(frozen=True)
class Part:
    """One of several datasets of a release: its folder, and how many subjects the release has."""

    folder: str
    total: int


def origin(story: Story) -> str:
    what = "simulated images (no real person was ever imaged)" if story.card.get("simulated") else "real images"
    if learnt := story.card.get("learnt_from"):
        held_out = story.card["scans"] - learnt["scans"]
        return (
            f"The model learnt from {learnt['scans']} {what} of {learnt['subjects']} subjects. {held_out} more of the"
            " same cohort were held out for evaluation."
        )
    return (
        f"The model learnt from a cohort of {story.card['scans']} {what} of {story.card['subjects']} subjects, of which"
        " a part was held out for evaluation."
    )


def privacy(story: Story) -> str:
    if story.privacy is None:
        return "What these images reveal about the subjects that the model learnt from was not tested."
    calibration = story.privacy["calibration"]
    text = f"Verdict: {story.privacy['verdict']}."
    if calibration["status"] == "CALIBRATED":
        text += (
            f" Every image was compared with every training scan by {_counted(calibration['detectors'])}, and"
            f" drawn again if one of them found it nearer than {100 * (1 - calibration['level']):g} % of"
            f" {calibration['subjects']} unseen {story.source} subjects come."
        )
    else:
        text += (
            f" The filter had no thresholds and rejected nothing: {calibration['needed']} unseen {story.source}"
            f" subjects are needed for its level and there were {calibration['subjects']}."
        )
    if bad := stopping(story.privacy.get("gates", [])):
        why = "it failed" if story.privacy["verdict"] == "FAIL" else f"the filter is none ({bad[0]['name']})"
        text += (
            f" This dataset was written although {why}, because its study says so (privacy.enforce: report). It must"
            " not be treated as anonymous."
        )
    if any(one.get("base") for one in story.models.values()):
        text += " It says nothing of the people whose images the given weights were made from (see the model)."
    return text + " A verdict is the outcome of stated tests, not a proof of anonymity."


def _counted(detectors: Sequence[str]) -> str:
    return f"the detector {detectors[0]}" if len(detectors) == 1 else f"{len(detectors)} detectors"
