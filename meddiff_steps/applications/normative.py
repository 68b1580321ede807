"""A scan beside the reference population: draws that share its coarse anatomy, and how far it is from their mean.

A scan's latents are noised to a state where only coarse anatomy is left, and drawn from there several times with the
covariates of the reference: what this head might look like, were it one of them.  The scan less the mean of the draws
is no deviation yet: subjects of the reference differ from their own draws, too, in some places more than in others.
How much is measured on held-out subjects of the reference (`statistics.norms`), voxel by voxel.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import ndimage
from tqdm import tqdm

from meddiff_steps import config
from meddiff_steps.applications.neighbours import neighbours
from meddiff_steps.applications.scans import one_a_session
from meddiff_steps.cohort.texts import without_text
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.selection import Images
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.statistics.norms import Norm, NormSums

ENTRY = {
    "order": 5,
    "summary": "How far a scan is from a reference population of its covariates, as a calibrated z map",
    "source": "Marquand et al. 2016 (normative models); Meng et al. 2022 (SDEdit, the way to the draws)",
    "needs": ["a trained model", "subjects of the reference in the calibration split"],
}

#: The two ways to a map; the first is that of the derivatives.
COUNTERFACTUAL, REGRESSION = "counterfactual", "regression"
#: Subjects that say what is normal, at least: two degrees of freedom.
LEAST_SUBJECTS = 3
#: Full width at half maximum of a Gaussian, in standard deviations.
FWHM = float(np.sqrt(8 * np.log(2)))


def reference_draws(
    model: TrainedModel, image: np.ndarray, subject: pd.DataFrame, settings: config.Normative, root: str
) -> np.ndarray:
    """Draws of the reference that share the coarse anatomy of one scan, float32 (samples, 1, *spatial).

    Parameters
    ----------
    image
        Preprocessed scan, float32 (1, *spatial) in [0, 1].
    subject
        Its covariates, one row; those of the reference are replaced.
    root
        Of its random numbers.
    """
    return neighbours(
        model,
        image,
        of_reference(subject, settings, model.encoding.covariates),
        root,
        samples=settings.samples,
        depth=settings.depth,
        guidance_scale=settings.guidance_scale,
        num_inference_steps=settings.num_inference_steps,
    )


def matched(subjects: pd.DataFrame, settings: config.Normative, covariates: config.Covariates) -> pd.DataFrame:
    """Subjects of whom only the covariates that are matched, and those of the reference, are told; no report."""
    kept = {*(settings.matched or covariates), *settings.reference}
    hidden = {
        name: pd.Series([None] * len(subjects), subjects.index, object) for name in covariates if name not in kept
    }
    return without_text(subjects).assign(**hidden)


def of_reference(subject: pd.DataFrame, settings: config.Normative, covariates: config.Covariates) -> pd.DataFrame:
    """A subject as one of the reference."""
    levels = {name: pd.Series([level], index=subject.index) for name, level in settings.reference.items()}
    return matched(subject, settings, covariates).assign(**levels)


def is_reference(subjects: pd.DataFrame, settings: config.Normative) -> np.ndarray:
    """Which subjects have all levels of the reference, bool (n,)."""
    found = np.ones(len(subjects), dtype=bool)
    for name, level in settings.reference.items():
        found &= (subjects[name] == level).to_numpy(dtype=bool, na_value=False)
    return found


def smoothed(image: np.ndarray, settings: config.Normative, spacing_mm: tuple[float, ...]) -> np.ndarray:
    """An image (*spatial) through the study's Gaussian, float32."""
    sigma = [settings.smoothing_mm / FWHM / size for size in spacing_mm]
    return ndimage.gaussian_filter(image.astype(np.float32), sigma)


def design_of(model: TrainedModel, subjects: pd.DataFrame) -> np.ndarray:
    """Columns of a normative model by regression, (n, p): 1, standardised numbers, and levels but the first; NaN where
    a value is missing.
    """
    encoded = model.encoding.encode(subjects)
    columns = [np.ones((len(subjects), 1))]
    for k, name in enumerate(model.encoding.names):
        found = encoded[:, [k]]
        if name not in model.encoding.means:
            codes = np.arange(1, len(model.encoding.levels[name]))
            found = np.where(np.isnan(found), np.nan, found == codes)
        columns.append(found)
    return np.concatenate(columns, axis=1)


def known_means(designs: np.ndarray) -> np.ndarray:
    """What a missing value is taken for, (p,): the mean of each column (n, p) of training subjects where it is known,
    which of a level is the share of those who have it; 0 where nobody's is known.
    """
    known = np.isfinite(designs)
    return np.where(known, designs, 0.0).sum(0) / np.maximum(known.sum(0), 1)


class NormativeMaps:
    """z maps of scans, by draws and by regression, once it is known what is normal.

    Scans are read one at a time, so memory does not grow with the cohort.  What is normal is learnt from one scan of
    each subject, that of `one_a_session`: the maps of other scans of a session may be of other places.

    Attributes
    ----------
    count, training
        Subjects of the reference in the calibration split, and subjects of the training split.

    Raises
    ------
    UserError
        Fewer than `LEAST_SUBJECTS` subjects of the reference are in the calibration split.
    """

    def __init__(self, study: config.Study, model: TrainedModel, cohort: Images) -> None:
        self.study, self.settings, self.model, self.shards = study, study.normative, model, cohort.shards
        shape = cohort.shards.shape("image")[1:]
        self.shape = shape
        self.spacing = study.preprocess.voxel_mm or (1.0,) * len(shape)
        calibration = one_a_session(cohort.of_splits(["calibration"]).table)
        calibration = calibration[is_reference(calibration, self.settings)]
        calibration = calibration.drop_duplicates("subject_id")[: self.settings.calibration_scans]
        self.count = len(calibration)
        if self.count < LEAST_SUBJECTS:
            raise UserError(
                f"normative.reference: {dict(self.settings.reference) or 'everybody'} has {self.count} subjects in the"
                f" calibration split, expected at least {LEAST_SUBJECTS} to know what is normal. Enlarge"
                " splits.calibration, or name another reference."
            )
        training = one_a_session(cohort.of_splits(["train"]).table).drop_duplicates("subject_id")
        self.training = len(training)
        self.by_regression = self._regression(training)
        self.by_draws = self._calibrated(calibration)

    def of(self, image: np.ndarray, subject: pd.DataFrame) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """The draws of one scan (1, *spatial), and its z map (*spatial) by each method."""
        draws, difference = self._difference(image, subject)
        usual = self._design(of_reference(subject, self.settings, self.study.covariates))[0]
        smooth = smoothed(image[0], self.settings, self.spacing)
        return draws, {
            COUNTERFACTUAL: self.by_draws.z(np.ones(1), difference.ravel()).reshape(self.shape),
            REGRESSION: self.by_regression.z(usual, smooth.ravel()).reshape(self.shape),
        }

    def _design(self, subjects: pd.DataFrame) -> np.ndarray:
        designs = design_of(self.model, subjects)
        return np.where(np.isnan(designs), self.means, designs)

    def _difference(self, image: np.ndarray, subject: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        root = f"{self.study.seed}/normative/{subject['scan_id'].iloc[0]}"
        draws = reference_draws(self.model, image, subject, self.settings, root)
        return draws, smoothed(image[0] - draws.mean(0)[0], self.settings, self.spacing)

    def _regression(self, training: pd.DataFrame) -> Norm:
        subjects = matched(training, self.settings, self.study.covariates)
        self.means = known_means(design_of(self.model, subjects))
        designs = self._design(subjects)
        sums = NormSums(designs.shape[1], int(np.prod(self.shape)))
        for design, row in zip(tqdm(designs, "training scans", unit="scan"), training["row"], strict=True):
            image = self.shards.tensors("image", np.array([row]))[0, 0]
            sums.add(design, smoothed(image, self.settings, self.spacing).ravel())
        return sums.norm("training subjects")

    def _calibrated(self, calibration: pd.DataFrame) -> Norm:
        sums = NormSums(1, int(np.prod(self.shape)))
        for i in tqdm(range(len(calibration)), "calibration scans", unit="scan"):
            subject = calibration.iloc[[i]]
            image = self.shards.tensors("image", subject["row"].to_numpy())[0]
            sums.add(np.ones(1), self._difference(image, subject)[1].ravel())
        return sums.norm("calibration subjects of the reference")
