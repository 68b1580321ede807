from itertools import combinations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_curve

from meddiff_steps.config import Privacy
from meddiff_steps.privacy import assessment, attacks
from meddiff_steps.privacy.calibration import conformal_threshold
from meddiff_steps.privacy.search import unit_rows
from meddiff_steps.privacy.verdict import RARE


def test_with_no_hit_the_interval_ends_at_the_rule_of_three():
    low, high = attacks.wilson(0, 100)
    assert low == 0
    assert high == pytest.approx(norm.ppf(0.975) ** 2 / (100 + norm.ppf(0.975) ** 2))
    assert attacks.wilson(0, 1000)[1] == pytest.approx(norm.ppf(0.975) ** 2 / (1000 + norm.ppf(0.975) ** 2))
    assert attacks.wilson(0, 2)[1] == 1.0
    assert attacks.wilson(0, 0) == (0.0, 1.0)


def test_excess_copies_are_those_beyond_the_base_rate():
    held_out = np.arange(200) < 10
    assert attacks.excess_risk(np.arange(200) < 10, held_out)["value"] == 0
    assert attacks.excess_risk(np.ones(200, bool), held_out)["value"] == 1
    figure = attacks.excess_risk(np.arange(200) < 105, held_out)
    assert figure["value"] == pytest.approx((0.525 - 0.05) / 0.95, abs=1e-5)
    assert 0.3 < figure["low"] < figure["value"] < figure["high"] < 0.7


def test_excess_copies_cover_the_truth():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(300):
        figure = attacks.excess_risk(rng.random(150) < 0.2, rng.random(150) < 0.1)
        covered += figure["low"] <= 0.1 / 0.9 <= figure["high"]
    assert covered / 300 > 0.9


def test_nearer_to_training_is_half_where_nothing_leaked():
    rng = np.random.default_rng(0)
    figure = attacks.nearer_to_training(rng.random((300, 90)), rng.random((300, 30)), 200, rng)
    assert figure["low"] < 0.5 < figure["high"]
    assert attacks.nearer_to_training(np.ones((10, 4)), np.ones((10, 3)), 20, rng)["value"] == 0.5
    assert attacks.nearer_to_training(np.ones((10, 4)), np.zeros((10, 3)), 20, rng)["value"] == 1
    few = attacks.nearer_to_training(1 + rng.random((10, 40)), rng.random((10, 30)), 500, rng)
    assert (few["value"], few["low"], few["high"]) == (1, pytest.approx(0.7, abs=0.1), 1), "10 images of many people"


def test_few_people_who_are_told_apart_perfectly_leave_much_open():
    found = attacks.membership(np.arange(13) < 8, -np.arange(13.0), [str(i) for i in range(13)], 100, "s", "few")
    assert found["auc"]["value"] == 1 and found["auc"]["low"] < 0.5, "of 5 people on the smaller side"
    found = attacks.membership(np.arange(12) < 8, -np.arange(12.0), [str(i) for i in range(12)], 100, "s", "few")
    assert found["auc"]["low"] is None and found["auc"]["too_few"] == 4
    assert found["tpr_at_0.01"]["value"] == 1 and found["tpr_at_0.01"]["low"] < 0.7
    none = attacks.membership(np.arange(12) < 8, np.arange(12.0), [str(i) for i in range(12)], 100, "s", "few")
    assert none["tpr_at_0.01"]["value"] == 0 and none["tpr_at_0.01"]["high"] > 0.3


def test_the_interval_of_nearer_to_training_knows_that_people_were_drawn():
    """40 people on either side, whom all images see alike: who is near is a matter of who was drawn."""
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        near = rng.random((1, 80))
        figure = attacks.nearer_to_training(*np.split(near + 0.05 * rng.random((200, 80)), 2, axis=1), 200, rng)
        covered += figure["low"] <= 0.5 <= figure["high"]
    assert covered > 50


def test_the_interval_of_nearer_to_training_is_no_wider_than_it_need_be():
    """150 images between 300 training people and 40 strangers, in six dimensions, and nothing leaked."""
    found = []
    for seed in range(80):
        rng = np.random.default_rng(seed)
        images, people = (unit_rows(rng.normal(size=(count, 7))) for count in (150, 340))
        figure = attacks.nearer_to_training(images @ people[:300].T, images @ people[300:].T, 200, rng)
        found.append([figure["value"], figure["low"], figure["high"]])
    value, low, high = np.array(found).T
    assert 0.88 < ((low <= 0.5) & (high >= 0.5)).mean() < 1
    assert (high - low).mean() < 1.3 * 2 * 1.96 * value.std()


def test_the_larger_side_counts_as_the_mean_over_all_choices_of_as_many():
    rng = np.random.default_rng(0)
    training, held_out = np.round(rng.random((30, 6)), 1), np.round(rng.random((30, 3)), 1)  # with ties
    best, other = held_out.max(1), [training[:, list(some)].max(1) for some in combinations(range(6), 3)]
    expected = np.mean([(one > best) + 0.5 * (one == best) for one in other])
    assert attacks.nearer_to_training(training, held_out, 20, rng)["value"] == pytest.approx(expected)
    assert attacks.nearer_to_training(held_out, training, 20, rng)["value"] == pytest.approx(1 - expected)


def test_copies_are_not_authentic():
    among = np.array([0.5, 0.6, 0.7])
    assert attacks.authenticity(np.array([0.99, 0.2]), np.array([0, 2]), among)["value"] == 0.5


def test_the_true_positive_rate_is_that_of_the_roc_curve():
    rng = np.random.default_rng(0)
    members = rng.random(300) < 0.5
    scores = np.round(rng.normal(size=300) + members, 1)  # with ties
    false, true, _ = roc_curve(members, scores, drop_intermediate=False)
    for rate in (0.01, 0.05, 0.1, 0.5):
        value = attacks.true_positive_rate(members, scores, rate)(np.ones((1, 300)))[0]
        assert value == pytest.approx(true[false <= rate + 1e-9].max())


def test_an_attack_that_knows_nothing_and_one_that_knows_all():
    rng = np.random.default_rng(0)
    members = np.arange(200) < 100
    subjects = [str(i) for i in range(200)]
    nothing = attacks.membership(members, rng.random(200), subjects, 200, "seed", "a")
    assert nothing["auc"]["low"] < 0.5 < nothing["auc"]["high"]
    everything = attacks.membership(members, members.astype(float), subjects, 200, "seed", "a")
    assert everything["auc"]["value"] == 1
    assert everything["tpr_at_0.01"]["value"] == 1
    assert everything["exposed_members"] == 100


def test_the_density_ratio_finds_what_a_generator_has_learnt_by_heart():
    rng = np.random.default_rng(0)
    members, others, reference = rng.normal(size=(3, 60, 6))
    overfitted = np.repeat(members, 5, axis=0) + 0.05 * rng.normal(size=(300, 6))
    ratio = attacks.density_ratio(np.concatenate([members, others]), overfitted, reference)
    assert (ratio[:60, None] > ratio[None, 60:]).mean() > 0.8
    fresh = attacks.density_ratio(np.concatenate([members, others]), rng.normal(size=(300, 6)), reference)
    assert 0.35 < (fresh[:60, None] > fresh[None, 60:]).mean() < 0.65


def test_a_flag_rate_far_above_the_level_is_not_nominal():
    assert attacks.flagged_as_expected(7, 100, 0.05, 99)
    assert not attacks.flagged_as_expected(20, 100, 0.05, 99)
    assert not attacks.flagged_as_expected(0, 0, 0.05, 99)


@pytest.mark.parametrize("calibrated_on", [19, 59, 99])
def test_the_test_of_strangers_knows_that_the_threshold_was_drawn(calibrated_on):
    """Nobody differs: at 1 % one test in a hundred fails; of a fixed threshold's, up to a quarter would."""
    rng = np.random.default_rng(0)
    failed = 0
    for _ in range(1000):
        limit = conformal_threshold(rng.random(calibrated_on), 0.05)
        failed += not attacks.flagged_as_expected(int((rng.random(300) > limit).sum()), 300, 0.05, calibrated_on)
    assert failed / 1000 <= 0.02


@pytest.mark.parametrize("released", [1, 2])
def test_a_cohort_of_one_or_two_images_is_attacked_and_little_is_said(released):
    rng = np.random.default_rng(0)

    def people(count):
        return assessment.RealScans({"learned": unit_rows(rng.normal(size=(count, 4)))}, np.arange(count).astype(str))

    train, held, test = people(20), people(8), people(8)
    found = assessment.attack(
        {"learned": train.directions["learned"][:released]}, assessment.RealSplits(train, held, test), 100, "s"
    )
    assert ("density ratio, learned" in found["membership"]) == (released > 1)
    near = found["nearer_to_training"]["learned"]
    assert near["high"] - near["low"] > 0.5


def test_the_few_of_a_rare_level_are_found_where_images_copy_them_and_are_not_where_none_do():
    rng = np.random.default_rng(0)

    def people(count):
        return assessment.RealScans({"learned": unit_rows(rng.normal(size=(count, 16)))}, np.arange(count).astype(str))

    real = assessment.RealSplits(people(60), people(40), people(40))
    few, level = np.arange(60) < 8, np.arange(40) < 20
    copies = np.repeat(real.train.directions["learned"][few], 6, axis=0) + 0.05 * rng.normal(size=(48, 16))
    fresh = rng.normal(size=(48, 16))
    asked = np.arange(96) < 48
    for images, low, high in ((copies, 0.9, 1.0), (fresh, 0.3, 0.7)):
        synthetic = {"learned": unit_rows(np.concatenate([images, rng.normal(size=(48, 16))]))}
        rare = assessment.RareLevel(few, level, level, asked)
        found = assessment.attack_rare(rare, synthetic, real, 100, "s")
        assert (found["subjects"], found["images"], found["strangers"]) == (8, 48, "of that level")
        assert low <= found["nearer_to_training"]["learned"]["value"] <= high
    alone = assessment.RareLevel(few, np.zeros(40, bool), level, asked)
    assert assessment.attack_rare(alone, synthetic, real, 20, "s")["strangers"] == "all"
    twice = assessment.RealSplits(real.train, people(40), people(40))
    twice.test.subjects[:20] = "the same person"
    assert not assessment.RareLevel(few, level, level, asked).has_strangers(twice), "two scans are not two people"
    nobody = assessment.RareLevel(few, level, level, np.zeros(96, bool))
    assert "nearer_to_training" not in assessment.attack_rare(nobody, synthetic, real, 20, "s")


def test_people_of_another_level_are_no_measure_of_what_leaked():
    """Images are fresh draws of the level's own population; nobody of the level is unseen."""
    rng = np.random.default_rng(0)

    def people(count, of_level):
        vectors = unit_rows(rng.normal(size=(count, 16)) + of_level * np.r_[4.0, 4.0, np.zeros(14)])
        return assessment.RealScans({"learned": vectors}, np.arange(count).astype(str))

    real = assessment.RealSplits(people(12, True), people(60, False), people(60, False))
    images = people(50, True)
    nobody = np.zeros(60, bool)
    rare = assessment.RareLevel(np.ones(12, bool), nobody, nobody, np.ones(50, bool))
    found = assessment.attack_rare(rare, images.directions, real, 200, "s")
    assert found["nearer_to_training"]["learned"]["low"] > 0.6, "told apart by the level alone"
    card = {"status": "CALIBRATED", "level": 0.05, "detectors": ["learned"], "needed": 19, "subjects": 60}
    controls = {"positive": {"noised": {"value": 1.0}}, "negative": {"value": 0.0, "n": 60, "nominal": True}}
    counts = {"planned": 50, "failed": 0, "duplicates": 0}
    gates = assessment.gates(Privacy(), [], card | {"controls": controls}, None, {}, {}, counts, found)
    of_level = [gate for gate in gates if gate.name.startswith(RARE)]
    assert len(of_level) == 3 and {gate.outcome for gate in of_level} == {"NOT_EVALUATED"}
    assert all("of the level" in gate.meaning for gate in of_level)
    fair = assessment.gates(
        Privacy(), [], card | {"controls": controls}, None, {}, {}, counts, found | {"strangers": "of that level"}
    )
    assert "FAIL" in {gate.outcome for gate in fair}


def test_what_was_learnt_from_mirrored_scans_is_found_in_mirror_images():
    """Images look like some training people mirrored; of strangers and of fresh images nothing is told."""
    rng = np.random.default_rng(0)

    def people(count):
        return assessment.RealScans({"learned": unit_rows(rng.normal(size=(count, 16)))}, np.arange(count).astype(str))

    real = assessment.RealSplits(people(60), people(40), people(40))
    fresh, other = (unit_rows(rng.normal(size=(60, 16))) for _ in range(2))
    copies = unit_rows(real.train.directions["learned"] + 0.05 * rng.normal(size=(60, 16)))
    found = {}
    for name, flipped in (("unlooked", None), ("copies", copies), ("fresh", other)):
        mirrored = None if flipped is None else {"learned": flipped}
        found[name] = assessment.attack({"learned": fresh}, real, 100, "s", mirrored=mirrored)
    for name in ("unlooked", "fresh"):
        assert 0.3 < found[name]["nearer_to_training"]["learned"]["value"] < 0.7, name
        assert 0.35 < found[name]["membership"]["distance, learned"]["auc"]["value"] < 0.65, name
    assert found["copies"]["nearer_to_training"]["learned"]["value"] > 0.75
    assert found["copies"]["membership"]["distance, learned"]["auc"]["value"] == 1
    assert found["copies"]["authenticity"]["learned"]["synthetic"]["value"] < 0.1
    rare = assessment.RareLevel(np.arange(60) < 8, np.ones(40, bool), np.ones(40, bool), np.arange(60) < 8)
    few = assessment.attack_rare(rare, {"learned": fresh}, real, 100, "s", mirrored={"learned": copies})
    assert few["nearer_to_training"]["learned"]["value"] > 0.9
