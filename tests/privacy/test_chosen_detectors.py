"""A study that chooses some of the detectors: what is calibrated, and each gives what it gives beside the others."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from test_bad_input import SPLITS, Cohort, strangers

from meddiff_steps.config import Privacy
from meddiff_steps.core.errors import UserError
from meddiff_steps.imaging.shards import Shards
from meddiff_steps.privacy import assessment as audit
from meddiff_steps.privacy.calibration import thresholds_of
from meddiff_steps.privacy.detectors.base import directions, score
from meddiff_steps.privacy.reference import ReferenceFiles, load_attackers, load_detectors

EVERY = ["aligned", "learned", "latent"]


class Calibrated(Cohort):
    """A cohort whose images are strangers to each other, calibrated with the detectors that are given."""

    def with_detectors(self, names: list[str] | None, level: float) -> tuple[dict, dict[str, np.ndarray]]:
        changes = self.study.privacy.model_copy(update={"detectors": names, "level": level})
        self.study = self.study.model_copy(update={"privacy": changes})
        return self.calibrate(), load_file(self.folder / "reference.safetensors")

    def files(self, **changes: Path) -> ReferenceFiles:
        f = self.folder
        paths = {
            "autoencoder": f / "autoencoder",
            "scale": f / "scale.safetensors",
            "embedder": f / "embedder",
        }
        return ReferenceFiles(**{"scans": f / "reference-scans.arrow"} | paths | changes)


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    made = Calibrated(tmp_path_factory.mktemp("cohort"), strangers(len(SPLITS)), SPLITS)
    flipped = made.study.variants.model_copy(update={"flip": True})  # `latent` sees mirror images, whoever is beside it
    made.study = made.study.model_copy(update={"variants": flipped})
    made.train_embedder()
    return made


@pytest.fixture(scope="module")
def every(cohort: Calibrated) -> tuple[dict, dict[str, np.ndarray]]:
    return cohort.with_detectors(None, 0.2)


@pytest.mark.parametrize("names", [["learned"], ["latent", "aligned"], ["latent"]])
def test_chosen_detectors_give_what_they_give_beside_the_others(cohort, every, names):
    """At a level that leaves each as much as it has of three, thresholds are the same too."""
    card, reference = cohort.with_detectors(names, 0.2 / 3 * len(names))
    kept = [name for name in EVERY if name in names]
    assert card["detectors"] == kept
    assert card["thresholds"] == {name: every[0]["thresholds"][name] for name in sorted(kept)}
    assert set(reference) == {"mean", "rows", *kept}
    for name in reference:
        np.testing.assert_array_equal(reference[name], every[1][name])
    for kind, figure in card["controls"]["positive"].items():
        before = every[0]["controls"]["positive"][kind]["by_detector"]
        assert figure["by_detector"] == {name: before[name] for name in before if name in names}
    images = torch.from_numpy(Shards([cohort.images]).tensors("image", range(28, 36)))
    mine = score(load_detectors(cohort.files(), reference, card["detectors"]), images)
    theirs = score(load_detectors(cohort.files(), every[1], EVERY), images)
    for found, expected in zip(mine, theirs, strict=True):
        assert list(found) == kept
        for name, values in found.items():
            np.testing.assert_array_equal(values, expected[name])


def test_fewer_detectors_need_fewer_subjects(cohort):
    assert cohort.with_detectors(["learned"], 0.2)[0]["needed"] == 4
    assert cohort.with_detectors(["learned", "latent"], 0.2)[0]["needed"] == 9


def test_a_detector_that_is_not_chosen_loads_nothing(cohort, every, tmp_path):
    nowhere = tmp_path / "nowhere"
    without_first_stage = cohort.files(autoencoder=nowhere, scale=nowhere)
    without_embedder = cohort.files(embedder=nowhere)
    assert len(load_detectors(without_first_stage, every[1], ["aligned", "learned"])) == 2
    assert len(load_detectors(without_embedder, every[1], ["aligned", "latent"])) == 2
    with pytest.raises(UserError, match="nowhere"):
        load_detectors(without_embedder, every[1], ["learned"])


def test_a_detector_without_directions_is_refused_rather_than_finding_nothing(cohort, every):
    reference = {name: values for name, values in every[1].items() if name != "latent"}
    with pytest.raises(UserError, match=r"no directions under the detector latent.*calibrate"):
        load_detectors(cohort.files(), reference, EVERY)
    with pytest.raises(UserError, match=r"privacy.detectors: there is no ssim"):
        load_detectors(cohort.files(), reference | {"ssim": reference["mean"]}, ["ssim"])


@pytest.mark.parametrize(
    ("names", "density"), [(EVERY, "learned"), (["aligned", "latent"], "aligned"), (["latent"], None)]
)
def test_attacks_gates_and_report_are_about_the_chosen_detectors(cohort, every, names, density):
    detectors = load_detectors(cohort.files(), every[1], names)
    shards, splits = Shards([cohort.images]), np.array(SPLITS)

    def scans(split):
        rows = np.flatnonzero(splits == split)
        return audit.RealScans(directions(detectors, shards, rows), rows.astype(str))

    made = directions(detectors, shards, np.arange(20, 60))
    found = audit.attack(made, audit.RealSplits(scans("train"), scans("calibration"), scans("test")), 50, "seed")
    assert list(found["nearer_to_training"]) == list(found["authenticity"]) == names
    attacks = [f"distance, {name}" for name in names] + ([f"density ratio, {density}"] if density else [])
    assert list(found["membership"]) == attacks
    card, _ = cohort.with_detectors(names, 0.2)
    assert card["detectors"] == names
    assert set(thresholds_of(card).overall) == set(names)
    counts = {"failed": 0, "duplicates": 0, "planned": 2}
    few = {"value": 0.0, "low": 0.0, "high": 0.01, "n": 9}
    gates = audit.gates(Privacy(level=0.2), ["age"], card, few, found, {}, counts)
    assert {gate.name for gate in gates} >= {f"nearer to training, {name}" for name in names} | {
        f"membership, {name}" for name in attacks
    }
    assert audit.report(Privacy(), card, gates, found, counts)["calibration"]["detectors"] == names


def test_the_mean_that_attacks_take_off_holds_members_and_strangers_alike(cohort, every):
    """Images of nobody: about a mean of the 30 training scans, these lie farther from them than strangers do."""
    _, reference = every
    shards, split = Shards([cohort.images]), np.array(SPLITS)
    unseen = np.flatnonzero(split != "train")
    made = torch.rand(60, *shards.shape("image"), generator=torch.Generator().manual_seed(0))

    def attacked(detectors, of_training):
        def scans(name):
            rows = np.flatnonzero(split == name)
            known = of_training if name == "train" else directions(detectors, shards, rows)
            return audit.RealScans(known, rows.astype(str))

        real = audit.RealSplits(*(scans(name) for name in ("train", "calibration", "test")))
        found = audit.attack({one.name: one.vectors(made) for one in detectors}, real, 50, "s")
        return found["membership"]["distance, aligned"]["auc"]["value"], found["nearer_to_training"]["aligned"]["value"]

    plain = load_detectors(cohort.files(), reference, ["aligned"])
    assert max(attacked(plain, {"aligned": reference["aligned"]})) < 0.2
    auc, nearer = attacked(*load_attackers(cohort.files(), reference, ["aligned"], shards, unseen))
    assert 0.3 < auc < 0.7 and 0.35 < nearer < 0.65
    others, known = load_attackers(cohort.files(), reference, ["learned"], shards, unseen)
    assert [one.name for one in others] == ["learned"] and known["learned"] is reference["learned"]
