"""Words of the report and what they mean; docs/glossary.md has the same table, and a test compares."""

from __future__ import annotations

import re
from collections.abc import Mapping

#: By word, in the order of the alphabet.  A word with a capital letter is looked for as it is written, any other one
#: also at the beginning of a sentence; both in the plural, too.
TERMS: Mapping[str, str] = {
    "accepted": "Of a candidate: no detector found it too near to a training scan.",
    "arm": "One training set of the downstream study, for example all real scans plus as many synthetic ones.",
    "AUC": (
        "Area under the ROC curve: the chance that one of each kind is put in the right order. 1 is always, 0.5 is"
        " guessing."
    ),
    "AUPRC": "Area under the curve of precision over recall of a classifier; guessing gives the share of cases.",
    "autoencoder": "The network between images and latents, both ways.",
    "bias": "Mean of measured minus requested; for held-out scans of measured minus true.",
    "Brier": "Mean squared distance of predicted probabilities from what was the case; 0 is perfect.",
    "calibration": (
        "Finding the limits of the copy detectors from real people who were not trained on. Also the split with these"
        " people."
    ),
    "calibration error": "How far predicted probabilities are from observed shares, on average.",
    "candidate": "A synthetic image that was drawn, before the filter decides.",
    "ceiling": (
        "What a score reaches on held-out real scans. A synthetic cohort is not expected to score higher; figures above"
        " it come from chance, or from requests that are wider spread."
    ),
    "CONDITIONAL": "Outcome of a test whose limit lies inside the 95 % interval, so that the data do not say.",
    "contrast": "Difference of two arms of the downstream study; the one that decides is declared beforehand.",
    "covariate": (
        "A variable that images are conditioned on: a number with a unit, or a label with levels. May be missing."
    ),
    "coverage": "Share of real scans with a synthetic image in their neighbourhood.",
    "DeLong": "A test of two AUCs of the same subjects, which takes the classifiers as given.",
    "density": "How many neighbourhoods of real scans a synthetic image lies in, over their number of neighbours.",
    "detector": "A way to measure how near an image comes to its nearest training scan.",
    "Dice": "Twice the overlap of two areas over the sum of both; 1 where they are the same.",
    "diffusion model": "The network that turns noise into latents, step by step, as covariates say.",
    "downstream study": "Trains classifiers with and without synthetic images and asks whether these help.",
    "drawing decoder": "A small diffusion that draws what a decoded image leaves open.",
    "feature space": "A map from images to rows of numbers in which realism and diversity are measured.",
    "filter": "What draws an image again that a detector finds too near to a training scan.",
    "floor": ("What a distance is between two sets of real scans. A synthetic cohort is not expected to come nearer."),
    "Frechet distance": (
        "Squared distance between the bell curves fitted to the features of two sets of images; low is good, its floor"
        " is what real scans give."
    ),
    "held-out": "Of real scans: of subjects that the generator never saw.",
    "Holm": "A correction of p for several tests at once.",
    "interval": "Range of 95 % of resamples of subjects; of shares, Wilson's.",
    "KID": "Kernel distance between two sets of images, without bias: 0 on average for two sets of real scans.",
    "latent": "What a scan becomes in the autoencoder: a smaller grid with several numbers per cell.",
    "mean absolute error": "Mean distance of measured from requested, or of two images voxel by voxel.",
    "membership": "Whether a given person was trained on. An attack tries to tell it from the released images.",
    "MS-SSIM": "Similarity of two images over several scales, 1 where they are the same.",
    "near duplicate": "A released image that is nearly another one; left out.",
    "Nyquist": "The highest spatial frequency that a grid can hold: half a cycle per voxel.",
    "p": "Chance of a difference like this where there is none. A small one does not say that the difference matters.",
    "planted copy": "A training scan, changed a little, that the detectors must find.",
    "power": "Square of the amplitude at a spatial frequency. Blur lowers it in fine detail, noise raises it.",
    "precision": "Share of synthetic images that lie where real ones do.",
    "predictor": "A regression, learnt from real training scans, that reads a covariate from an image.",
    "PSNR": "Peak signal-to-noise ratio of a decoded scan to the scan, in dB; high is good.",
    "r": "Pearson's correlation: 1 where measured follows requested along a line, 0 where it does not follow.",
    "recall": "Share of real scans that lie where synthetic ones do; low where kinds of images are missing.",
    "reconstruction": "A real scan, encoded and decoded: the best that can be expected behind this decoder.",
    "released": "Accepted and not left out as a near duplicate: part of the release.",
    "segmenter": "A network that learns from label maps of the cohort and measures volumes.",
    "simulated": "Made by a simulator, not taken of a person.",
    "slope": "Of the line of measured over requested: 1 is followed in full, below is followed in part.",
    "split": "Which part a real subject belongs to: train, val, calibration or test. By subject, never by scan.",
    "SSIM": "Similarity of two images in small windows, 1 where they are the same.",
    "subgroup": "The images of one level of a covariate.",
    "test split": "Subjects on which the downstream study is judged, opened once.",
    "unseen": "Of real subjects: not trained on.",
    "Vendi score": "Effective number of different images: 1 if all are the same; above its ceiling it is noise.",
    "verdict": (
        "PASS, CONDITIONAL, FAIL or NOT_EVALUATED of privacy, the worst of its tests; helps, no evidence or harms of"
        " the downstream study."
    ),
}


def used_in(text: str) -> dict[str, str]:
    """The words that a text uses, and those that their meanings use, with their meanings."""
    found: set[str] = set()
    left = {word for word in TERMS if _occurs(word, text)}
    while left:
        found |= left
        left = {word for word in TERMS for known in left if _occurs(word, TERMS[known])} - found
    return {word: TERMS[word] for word in TERMS if word in found}


def _occurs(word: str, text: str) -> bool:
    flags = 0 if word != word.lower() or len(word) == 1 else re.IGNORECASE
    return re.search(rf"(?<![\w-]){re.escape(word)}(?:s|es)?(?![\w-])", text, flags) is not None


def table() -> str:
    """All words as a Markdown table, for docs/glossary.md."""
    return "| word | meaning |\n|---|---|\n" + "".join(f"| {word} | {meaning} |\n" for word, meaning in TERMS.items())
