from types import MappingProxyType

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from meddiff_steps.config import Privacy, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_json
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.privacy import assessment as audit
from meddiff_steps.privacy.attacks import excess_risk
from meddiff_steps.privacy.calibration import Thresholds
from meddiff_steps.privacy.duplicates import near_duplicates
from meddiff_steps.privacy.filter import fill
from meddiff_steps.privacy.search import unit_rows
from meddiff_steps.privacy.verdict import bounds_text, holds, limits_of, measured, verdict, within
from meddiff_steps.steps import gate

THRESHOLDS = Thresholds({"brightness": 0.5}, {}, 0.05, 100)


class Brightness:
    """Similarity is the mean intensity: enough to see what the filter does with a similarity."""

    name = "brightness"

    def vectors(self, images):
        return images.flatten(1).numpy()

    def similarity(self, images):
        return images.flatten(1).mean(1).numpy(), np.zeros(len(images), np.int64)


def plan(count):
    return pd.DataFrame(
        {
            "sample_id": [f"s{i}" for i in range(count)],
            "cohort_root": "root",
            "noise_index": np.arange(count),
            "attempt": 0,
            "seed_key": [seed_key("root", i, 0, "noise") for i in range(count)],
            "age": np.linspace(20, 80, count),
            "subgroup": ["F", "M"] * (count // 2),
        }
    )


def image(brightness):
    picture = np.full((1, 4, 4), brightness, np.float32)
    picture[0, 0, 0] += 0.01
    return picture


def drawn(subjects):
    """Subject 1 is too bright at its first two attempts, subject 2 always, subject 3 is no image at first."""
    for name, attempt in zip(subjects["sample_id"], subjects["attempt"], strict=True):
        bad = (name == "s1" and attempt < 2) or name == "s2"
        yield (
            name,
            np.full((1, 4, 4), np.nan, np.float32) if name == "s3" and attempt == 0 else image(0.9 if bad else 0.1),
        )


def candidates(count=8, max_attempts=4, thresholds=THRESHOLDS):
    subjects = plan(count)
    groups = dict(zip(subjects["sample_id"], subjects["subgroup"], strict=True))
    return list(fill(subjects, drawn(subjects), drawn, groups, [Brightness()], thresholds, max_attempts))


def test_what_is_too_near_is_drawn_again_with_the_next_attempt_and_the_same_covariates():
    found = candidates()
    first = [c for c in found if c.sample_id == "s1"]
    assert [(c.attempt, c.decision) for c in first] == [(0, "rejected"), (1, "rejected"), (2, "accepted")]
    assert first[2].seed_key == seed_key("root", 1, 2, "noise")
    assert [c.decision for c in found if c.sample_id == "s2"] == ["rejected"] * 4
    assert [(c.decision, c.reason) for c in found if c.sample_id == "s3"] == [
        ("rejected", "not an image"),
        ("accepted", ""),
    ]
    assert sum(c.decision == "accepted" for c in found) == 7


def test_a_larger_cohort_makes_the_same_decisions_for_the_smaller_one():
    small, large = ({(c.sample_id, c.attempt): c.decision for c in candidates(n)} for n in (6, 40))
    assert small.items() <= large.items()


def test_without_thresholds_only_what_is_no_image_is_rejected():
    found = candidates(thresholds=None)
    assert {c.sample_id for c in found if c.decision == "rejected"} == {"s3"}


def test_counts_add_up():
    found = candidates()
    table = pd.DataFrame([c.row() for c in found])
    counts = audit.count(table, plan(8), ["s5"])
    assert counts["planned"] == counts["released"] + counts["duplicates"] + counts["failed"] == 8
    assert counts["failed"] == 1
    assert counts["candidates"] == counts["rejected"] + counts["released"] + counts["duplicates"]
    assert counts["rejected"] == sum(counts["rejected_by_reason"].values())
    for key in ("planned", "released", "failed", "rejected", "candidates"):
        assert sum(group[key] for group in counts["subgroups"].values()) == counts[key]


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [(0.0, 0.04, "PASS"), (0.02, 0.2, "CONDITIONAL"), (0.06, 0.2, "FAIL"), (None, None, "NOT_EVALUATED")],
)
def test_a_gate_follows_the_interval_and_not_the_figure(low, high, outcome):
    assert measured("x", {"value": 0.03, "low": low, "high": high, "n": 9}, 0.05, "").outcome == outcome


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (0.42, 0.58, "PASS"),
        (0.35, 0.55, "CONDITIONAL"),
        (0.55, 0.65, "CONDITIONAL"),
        (0.61, 0.7, "FAIL"),
        (0.1, 0.39, "FAIL"),
    ],
)
def test_members_that_are_avoided_are_told_as_well_as_members_that_are_met(low, high, outcome):
    """An attacker turns the sign: a filter that rejects what is near training subjects leaves holes about them."""
    for name in ("membership, distance, latent", "rare level: nearer to training, learned"):
        assert within(name, {"low": low, "high": high}, 0.6) == outcome
        assert bounds_text(name, 0.6) == "0.4 to 0.6"
    assert within("copies before the filter", {"low": 0.0, "high": 0.1}, 0.6) == "PASS"


def test_no_gate_makes_up_for_another():
    good, bad = holds("a", True, {}, 0, ""), holds("b", False, {}, 0, "")
    unknown = holds("c", None, {}, 0, "")
    assert verdict([good, good]) == "PASS"
    assert verdict([good] * 9 + [unknown]) == "NOT_EVALUATED"
    assert verdict([good] * 9 + [unknown, bad]) == "FAIL"
    assert verdict([]) == "NOT_EVALUATED"


def calibrated(recall=1.0, nominal=True):
    figure = {"value": recall, "low": 0.9, "high": 1.0, "n": 24}
    controls = {
        "positive": {"rotated": figure, "noised": figure | {"value": 1.0}},
        "negative": {"value": 0.05, "n": 90, "nominal": nominal},
    }
    said = {"status": "CALIBRATED", "subjects": 90, "needed": 59, "level": 0.05, "detectors": ["learned"]}
    return said | {"controls": controls}


HALF = {"value": 0.5, "low": 0.45, "high": 0.55, "n": 200}
NOTHING_LEAKED = {
    "nearer_to_training": {"learned": HALF},
    "membership": {"distance, learned": {"auc": HALF}, "density ratio, learned": {"auc": HALF}},
}
FEW = {"value": 0.0, "low": 0.0, "high": 0.02, "n": 200}
ALL_FILLED = {"failed": 0, "duplicates": 0, "planned": 200}


def outcome(
    calibration, before=FEW, counts=ALL_FILLED, after=NOTHING_LEAKED, table=MappingProxyType({"singling_out": FEW})
):
    found = audit.gates(Privacy(), ["age"], calibration, before, after, table, counts)
    assert [gate.name for gate in found] == list(limits_of(Privacy(), ["age"], calibration, False))
    return verdict(found), {gate.name: gate.outcome for gate in found}


def test_what_could_not_be_tried_is_not_passed():
    found, outcomes = outcome(calibrated(), after={}, table={})
    assert found == "NOT_EVALUATED"
    untried = {name for name, told in outcomes.items() if told == "NOT_EVALUATED"}
    attacks = {"membership, distance, learned", "membership, density ratio, learned", "nearer to training, learned"}
    assert untried == attacks | {"singling out by covariates"}
    card = calibrated()
    card["controls"]["negative"] = {"value": None, "n": 0, "nominal": False}
    assert outcome(card)[1]["strangers are not flagged"] == "NOT_EVALUATED"
    nothing = excess_risk(np.ones(100, dtype=bool), np.zeros(0, dtype=bool))
    assert (nothing["value"], outcome(calibrated(), before=nothing)[0]) == (None, "NOT_EVALUATED")


def test_the_verdict_of_a_model_that_copies_is_fail():
    assert outcome(calibrated())[0] == "PASS"
    assert outcome(calibrated(), before={"value": 0.9, "low": 0.85, "high": 0.95, "n": 200})[0] == "FAIL"
    assert outcome(calibrated(), counts={"failed": 20, "duplicates": 0, "planned": 200})[0] == "FAIL"


def test_a_weak_detector_or_too_few_subjects_never_pass():
    found, outcomes = outcome(calibrated(recall=0.8))
    assert found == "NOT_EVALUATED"
    assert [name for name, told in outcomes.items() if told != "PASS"] == ["planted copies are found"]
    few = {"status": "NOT_CALIBRATED", "subjects": 10, "needed": 59, "level": 0.05, "detectors": ["learned"]}
    found, outcomes = outcome(few, before=None)
    assert found == "NOT_EVALUATED" and "copies before the filter" not in outcomes
    assert outcome(calibrated(nominal=False))[0] == "CONDITIONAL"


def test_near_duplicates_are_found_but_not_among_counterfactuals(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.random((6, 1, 8, 8)).astype(np.float32)
    images[4] = images[0] + 1e-3
    images[5] = images[1]
    with ShardWriter(
        tmp_path / "x.arrow", {"sample_id": pa.string(), "image": TensorColumn("float32", (1, 8, 8))}
    ) as shard:
        for i, picture in enumerate(images):
            shard.append(sample_id=f"s{i}", image=picture)
    planned = plan(6).assign(noise_index=[0, 1, 2, 3, 4, 1])
    assert near_duplicates(Shards([tmp_path / "x.arrow"]), planned, 0.99) == ["s4"]


def test_a_group_of_many_points_does_not_hide_whose_duplicate_it_is(tmp_path):
    """All of a counterfactual group of 13 are duplicates of an image of other noise, and nearer to each other."""
    rng = np.random.default_rng(0)
    one = rng.random((1, 1, 8, 8))
    group = one + 0.02 * rng.random((1, 1, 8, 8)) + 1e-4 * rng.random((13, 1, 8, 8))
    with ShardWriter(
        tmp_path / "x.arrow", {"sample_id": pa.string(), "image": TensorColumn("float32", (1, 8, 8))}
    ) as shard:
        for i, picture in enumerate(np.concatenate([one, group]).astype(np.float32)):
            shard.append(sample_id=f"s{i}", image=picture)
    planned = plan(14).assign(noise_index=[0] + [1] * 13)
    assert near_duplicates(Shards([tmp_path / "x.arrow"]), planned, 0.99) == sorted(f"s{i}" for i in range(1, 14))


def test_of_many_that_are_the_same_the_first_of_the_plan_remains_in_whatever_shards_they_lie(tmp_path):
    """More copies than neighbours that are looked at, and more images than are compared at once, stored in another
    order than planned.
    """
    rng = np.random.default_rng(2)
    images = np.concatenate(
        [np.repeat(rng.random((1, 1, 6, 6)), 60, 0) + 1e-3 * rng.random((60, 1, 6, 6)), rng.random((540, 1, 6, 6))]
    ).astype(np.float32)
    names = [f"s{i}" for i in rng.permutation(600)]
    order = rng.permutation(600)
    for number, part in enumerate(np.array_split(order, 3)):
        with ShardWriter(
            tmp_path / f"{number}.arrow", {"sample_id": pa.string(), "image": TensorColumn("float32", (1, 6, 6))}
        ) as shard:
            for i in part:
                shard.append(sample_id=names[i], image=images[i])
    copies = sorted(names[:60], key=lambda name: int(name[1:]))
    found = near_duplicates(Shards([tmp_path / f"{number}.arrow" for number in range(3)]), plan(600), 0.99)
    assert found == sorted(copies[1:])


@pytest.mark.parametrize("scans", [1, 4])
def test_several_scans_of_a_person_do_not_look_like_a_leak(scans):
    """Images that know nothing of anybody, 150 training and 40 other people; scans of a person resemble each other (r =
    0.95).
    """
    rng = np.random.default_rng(3)

    def people(count, name):
        faces = rng.standard_normal((count, 1, 24)) * 0.95**0.5 + rng.standard_normal((count, scans, 24)) * 0.05**0.5
        return audit.RealScans(
            {"learned": unit_rows(faces.reshape(-1, 24))}, np.repeat([f"{name}{i}" for i in range(count)], scans)
        )

    shares = []
    for seed in range(6):
        images = {"learned": unit_rows(rng.standard_normal((400, 24)))}
        real = audit.RealSplits(people(150, "t"), people(20, "c"), people(20, "e"))
        found = audit.attack(images, real, 20, str(seed))
        shares.append(found["nearer_to_training"]["learned"]["value"])
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("shape", [(1, 40, 36), (1, 26, 20, 18)])
def test_duplicates_found_by_block_means_are_those_of_all_voxels(tmp_path, shape):
    """Smooth images, so that some are alike by block means alone; some with a copy that is near, some with one just too
    far.
    """
    rng = np.random.default_rng(1)
    images = np.stack(
        [np.kron(rng.random([-(-n // 4) for n in shape[1:]]), np.ones([4] * (len(shape) - 1))) for _ in range(40)]
    )
    images = images[(slice(None), *(slice(n) for n in shape[1:]))][:, None]
    noise = rng.standard_normal((40, *shape)) * images.std()
    images = np.concatenate(
        [images, images + noise * np.linspace(0.05, 0.3, 40).reshape(-1, *[1] * len(shape))]
    ).astype(np.float32)
    with ShardWriter(
        tmp_path / "x.arrow", {"sample_id": pa.string(), "image": TensorColumn("float32", shape)}
    ) as shard:
        for i, picture in enumerate(images):
            shard.append(sample_id=f"s{i}", image=picture)
    correlation = np.corrcoef(images.reshape(80, -1))
    expected = sorted(f"s{i}" for i in range(80) if (correlation[i, :i] >= 0.99).any())
    assert 5 < len(expected) < 35
    assert near_duplicates(Shards([tmp_path / "x.arrow"]), plan(80), 0.99) == expected


@pytest.mark.parametrize("name", ["calibrated", "planted copies are found"])
def test_without_a_filter_that_filters_nothing_is_released_by_accident(tmp_path, name):
    missing = {"name": name, "figure": {"value": 7}, "limit": 59, "outcome": "NOT_EVALUATED", "meaning": "why"}
    other = missing | {"name": "membership, latent"}
    plan(2).to_parquet(tmp_path / "plan.parquet")
    accepted = pd.DataFrame({"sample_id": ["s0", "s1"], "attempt": 0, "seed_key": ["a", "b"], "decision": "accepted"})
    accepted.to_parquet(tmp_path / "decisions.parquet")

    def run(gates: list, **privacy: str) -> int:
        study = {
            "study": "x",
            "cohort": {"source": "simulated"},
            "covariates": {"age": {"unit": "year", "range": [0, 100]}},
            "plan": [{"name": "syn", "subjects": 2}],
            "privacy": privacy,
        }
        write_json(tmp_path / "report.json", {"verdict": "NOT_EVALUATED", "gates": gates})
        out = tmp_path / "released.parquet"
        frozen = freeze(parse_study(study, "a"), "gate", tmp_path)
        gate.run(frozen, tmp_path / "report.json", tmp_path / "decisions.parquet", tmp_path / "plan.parquet", out)
        return len(pd.read_parquet(out))

    with pytest.raises(UserError, match=rf"NOT_EVALUATED, {name}: 7 against 59; why(.|\n)*splits.calibration"):
        run([missing])
    assert run([missing], enforce="report") == 2
    assert run([other]) == 2, "what could not be measured otherwise is told, and stops nothing"


def test_doubles_do_not_fill_the_plan():
    from meddiff_steps.config import Privacy

    decisions = pd.DataFrame({"sample_id": [f"s{i}" for i in range(10)], "decision": "accepted", "reason": ""})
    counts = audit.count(decisions, plan(10).assign(subgroup="all"), [f"s{i}" for i in range(1, 10)])
    assert (counts["released"], counts["duplicates"], counts["failed"]) == (1, 9, 0)
    card = {"status": "NOT_CALIBRATED", "subjects": 3, "needed": 59, "detectors": ["learned"]}
    found = audit.gates(Privacy(), ["age"], card, None, {}, {}, counts)
    filled = next(gate for gate in found if gate.name == "planned subjects are filled")
    assert filled.outcome == "FAIL" and filled.figure["value"] == 0.9


def test_a_fail_stops_the_release_and_says_why(tmp_path):
    minimal = {
        "study": "x",
        "cohort": {"source": "simulated"},
        "covariates": {"age": {"unit": "year", "range": [0, 100]}},
        "plan": [{"name": "syn", "subjects": 2}],
    }
    bad = {
        "name": "copies before the filter",
        "figure": {"value": 0.9},
        "limit": 0.05,
        "outcome": "FAIL",
        "meaning": "learnt by heart",
    }
    write_json(tmp_path / "report.json", {"verdict": "FAIL", "gates": [bad]})
    subjects = plan(2)
    subjects.to_parquet(tmp_path / "plan.parquet")
    accepted = pd.DataFrame(
        {
            "sample_id": ["s0", "s1", "s1"],
            "attempt": [0, 0, 1],
            "seed_key": ["a", "b", "c"],
            "decision": ["rejected", "rejected", "accepted"],
        }
    )
    accepted.to_parquet(tmp_path / "decisions.parquet")
    files = [
        tmp_path / "report.json",
        tmp_path / "decisions.parquet",
        tmp_path / "plan.parquet",
        tmp_path / "released.parquet",
    ]
    with pytest.raises(
        UserError, match=r"verdict is FAIL(.|\n)*copies before the filter: 0.9 against 0.05; learnt by heart"
    ):
        gate.run(freeze(parse_study(minimal, "a"), "gate", tmp_path), *files)
    assert not files[3].exists()
    gate.run(freeze(parse_study(minimal | {"privacy": {"enforce": "report"}}, "a"), "gate", tmp_path), *files)
    released = pd.read_parquet(files[3])
    assert released[["sample_id", "attempt", "seed_key"]].to_numpy().tolist() == [["s1", 1, "c"]]
    accepted.assign(decision="rejected").to_parquet(files[1])
    with pytest.raises(UserError, match="no candidate was accepted"):
        gate.run(freeze(parse_study(minimal | {"privacy": {"enforce": "report"}}, "a"), "gate", tmp_path), *files)
