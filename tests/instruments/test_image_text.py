"""The judge of pairs of image and text, and the figures it gives, on images that show what is known."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.evaluation.text import KINDS, Images, finding_levels, finding_table, text_figures
from meddiff_steps.instruments.image_text import fit_scorer, right_above_wrong
from meddiff_steps.instruments.predictors import fit_predictors

FINDINGS = {"mass": ["mass"], "effusion": ["effusion*"], "rare": ["rare"]}


def pairs(n: int, seed: int) -> tuple[np.ndarray, list[str], list[str]]:
    """Images with a bright spot for a mass, left or right, and a bright floor for an effusion."""
    rng = np.random.default_rng(seed)
    images, texts = rng.uniform(0.2, 0.4, (n, 1, 16, 16)), []
    for image in images[:, 0]:
        side, mass, effusion = rng.choice(["left", "right"]), rng.random() < 0.5, rng.random() < 0.5
        image[6:10, slice(2, 6) if side == "left" else slice(10, 14)] += 0.5 * mass
        image[12:] += 0.4 * effusion
        texts.append(f"{f'Mass {side}' if mass else 'No mass'}. {'Effusions' if effusion else 'No effusion'}.")
    return images.astype(np.float32), texts, [f"{seed}-{i}" for i in range(n)]


@pytest.fixture(scope="module")
def known():
    return pairs(80, 0)


def test_the_judge_knows_the_right_text_of_new_images_and_none_of_noise(known):
    scorer = fit_scorer(*known, min_subjects=3)
    images, texts, subjects = pairs(30, 1)
    said = scorer.features(texts)
    told = right_above_wrong(scorer(images, texts), np.arange(30), np.array(subjects), said)
    assert np.nanmean(told) > 0.85
    other = right_above_wrong(scorer(images, texts), np.arange(30)[::-1], np.array(subjects), said)
    assert 0.3 < np.nanmean(other) < 0.7


def test_other_texts_of_a_person_do_not_count_as_wrong():
    scores = np.array([[0.5, 0.9, 0.1, 0.5]])
    assert right_above_wrong(scores, np.array([0]), np.array(["a", "a", "b", "c"])).tolist() == [0.75]
    assert np.isnan(right_above_wrong(scores, np.array([0]), np.array(["a"] * 4))).all()


def test_figures_tell_images_that_follow_their_text_from_those_that_do_not(known):
    images, texts, subjects = known
    scorer = fit_scorer(*known, min_subjects=3)
    predictors = fit_predictors([images], finding_table(texts, FINDINGS), subjects, finding_levels(FINDINGS))
    held, asked, who = pairs(30, 1)
    held_out = pd.DataFrame({"subject_id": who, "text": asked})
    rows, noise = np.arange(30), np.random.default_rng(3)
    follow = held + noise.normal(0, 0.05, held.shape).astype(np.float32)
    blind = noise.permutation(follow)
    kinds = dict(zip(KINDS, (Images(held, rows), Images(follow, rows), Images(blind, rows)), strict=True))
    found = text_figures(kinds, held_out, scorer, predictors, FINDINGS, 100, "seed")
    retrieval, mass = found["retrieval"], found["findings"]["mass"]
    assert retrieval["with_text"]["value"] > 0.8 > retrieval["covariates_alone"]["high"]
    assert retrieval["gain"]["low"] > 0 and retrieval["chance"] == 0.5
    assert mass["scans"]["value"] > 0.95 and mass["gain"]["low"] > 0.1
    assert mass["texts_naming_it"] == sum("Mass" in text for text in asked)
    assert "same value" in found["findings"]["rare"]["not_measured"]
    same = text_figures(
        {**kinds, "covariates_alone": kinds["with_text"]}, held_out, scorer, None, FINDINGS, 100, "seed"
    )
    assert same["retrieval"]["gain"]["value"] == 0 and same["findings"] == {}


def test_too_few_pairs_are_refused(known):
    images, texts, subjects = known
    with pytest.raises(UserError, match="19 training subjects have a text"):
        fit_scorer(images[:19], texts[:19], subjects[:19], 3)
