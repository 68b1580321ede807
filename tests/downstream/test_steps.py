"""The steps of the downstream study on a tiny cohort of discs: hygiene, equal budgets, determinism, what is written."""

import ast
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from safetensors.numpy import load_file

from meddiff_steps.cohort.manifest import write_manifest
from meddiff_steps.config import Study, Variants, freeze, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.downstream import classifier
from meddiff_steps.downstream.images import reduce
from meddiff_steps.downstream.opening import frozen_digest
from meddiff_steps.imaging.perturbations import augment
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn
from meddiff_steps.models.first_stage.base import build as build_first_stage
from meddiff_steps.models.weights import save_model
from meddiff_steps.report.names import Names
from meddiff_steps.report.page import render
from meddiff_steps.report.sections import downstream_section
from meddiff_steps.steps import (
    downstream_data,
    downstream_design,
    downstream_plan,
    downstream_test,
    downstream_train,
)

SHAPE, STEPS = (16, 16), 16
STAGES = ("downstream_design", "downstream_plan", "downstream_data", "downstream_train", "downstream_test")
ARMS: list[dict[str, Any]] = [
    {"name": "real"},
    {"name": "real_synthetic", "synthetic": 1},
    {"name": "raw", "synthetic": 1, "source": "generated", "balance": "weights"},
    {"name": "control", "synthetic": 1, "source": "reconstruction", "balance": "oversample"},
    {"name": "half", "real": 0.5, "classical": True, "mixup": 0.3},
    {"name": "trts", "test": "synthetic"},
]


def image(case: bool, rng: np.random.Generator) -> np.ndarray:
    """Noise, with a bright disc in cases."""
    y, x = np.mgrid[: SHAPE[0], : SHAPE[1]] - 7.5
    return np.clip(0.3 + 0.3 * case * (x**2 + y**2 < 16) + rng.normal(0, 0.15, SHAPE), 0, 1)[None].astype(np.float16)


class Tiny:
    """Inputs and outputs of the five steps under one directory."""

    def __init__(
        self, root: Path, arms: list[dict[str, Any]] = ARMS, subjects: int = 120, synthetic: int = 160, **changes: Any
    ) -> None:
        self.root = root
        root.mkdir(parents=True, exist_ok=True)
        rng = np.random.default_rng(3)
        settings = {
            "channels": [4, 4, 8, 8],
            "longest_side": 8,
            "optimiser": {"steps": STEPS, "batch_size": 8, "learning_rate": 0.01, "warmup_steps": 2},
        }
        settings["optimiser"] |= {"ema_decay": 0.8, "validate_every": 8}  # type: ignore[operator]
        section = {
            "target": "diagnosis",
            "subgroup": "sex",
            "arms": arms,
            "seeds": 2,
            "bootstrap": 200,
            "jobs": 2,
            "classifier": settings,
        }
        self.study: Study = parse_study(
            {
                "study": "tiny",
                "cohort": {"source": "simulated"},
                "covariates": {
                    "diagnosis": {"levels": ["control", "case"]},
                    "sex": {"levels": ["F", "M"]},
                    "site": {"levels": ["A", "B"]},
                },
                "preprocess": {"shape": list(SHAPE), "spacing_mm": None},
                "plan": [{"name": "syn", "subjects": synthetic}],
                "compute": {"device": "cpu"},
                "downstream": section | changes,
            },
            "test",
        )
        self.stage = {name: freeze(self.study, name, root) for name in STAGES}
        n = np.arange(subjects)
        table = pd.DataFrame(
            {
                "scan_id": [f"sub-{i:03d}" for i in n],
                "subject_id": [f"sub-{i:03d}" for i in n],
                "session_id": None,
                "path": "x",
                "sha256": "0",
            }
        )
        table["content_sha256"] = "0"
        table["split"] = np.array(["train", "train", "train", "val", "test", "test"])[n % 6]
        table["diagnosis"] = np.where(rng.random(subjects) < 0.4, "case", "control")
        table["sex"], table["site"] = (
            np.where(rng.random(subjects) < 0.5, "F", "M"),
            np.where(rng.random(subjects) < 0.3, "B", "A"),
        )
        self.table = table
        self.images = [image(case == "case", rng) for case in table["diagnosis"]]
        self.write_cohort()
        plan = pd.DataFrame({"sample_id": [f"syn{i:03d}" for i in range(synthetic)], "group": "syn"})
        plan["diagnosis"] = np.where(np.arange(synthetic) % 2, "case", "control")
        plan["sex"], plan["site"] = "F", np.where(np.arange(synthetic) % 3, "A", "B")
        plan.to_parquet(root / "plan.parquet", index=False)
        for name in ("filtered", "generated"):
            with ShardWriter(
                root / f"{name}.arrow", {"sample_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE))}
            ) as shard:
                for row in plan.itertuples():
                    shard.append(sample_id=row.sample_id, image=image(row.diagnosis == "case", rng))
        torch.manual_seed(0)
        first_stage = self.study.autoencoder.model_copy(update={"channels": [16], "latent_channels": 4})
        card = {"settings": first_stage.model_dump(mode="json"), "image_shape": [1, *SHAPE]}
        save_model(build_first_stage(first_stage, 2), root / "autoencoder", card)

    def write_cohort(self) -> None:
        write_manifest(self.table, self.root / "manifest.parquet")
        with ShardWriter(
            self.root / "real.arrow", {"scan_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE))}
        ) as shard:
            for name, picture in zip(self.table["scan_id"], self.images, strict=True):
                shard.append(scan_id=name, image=picture)

    def design(self) -> dict[str, Any]:
        r = self.root
        downstream_design.run(
            self.stage["downstream_design"], r / "manifest.parquet", r / "plan.parquet", r / "design.json"
        )
        return json.loads((r / "design.json").read_text())

    def data(self, **changes: Any) -> pd.DataFrame:
        r = self.root
        options: dict[str, Any] = {
            "config": self.stage["downstream_data"],
            "design": r / "design.json",
            "manifest": r / "manifest.parquet",
            "images": [r / "real.arrow"],
            "plan": r / "plan.parquet",
            "filtered": [r / "filtered.arrow"],
            "generated": [r / "generated.arrow"],
            "autoencoder": r / "autoencoder",
            "samples": r / "samples.parquet",
            "out": r / "images.arrow",
        }
        downstream_data.run(**options | changes)
        return pd.read_parquet(r / "samples.parquet")

    def train(self, threads: int = 1, tag: str = "") -> None:
        r = self.root
        for job in range(self.study.downstream.jobs):
            out = r / f"{job}{tag}.safetensors", r / f"{job}{tag}.parquet"
            downstream_train.run(
                self.stage["downstream_train"],
                r / "design.json",
                r / "samples.parquet",
                r / "images.arrow",
                job,
                *out,
                threads,
            )

    def test(self, tag: str = "", **changes: Any) -> dict[str, Any]:
        r, jobs = self.root, range(self.study.downstream.jobs)
        options: dict[str, Any] = {
            "config": self.stage["downstream_test"],
            "design": r / "design.json",
            "samples": r / "samples.parquet",
            "reduced": r / "images.arrow",
            "weights": [r / f"{job}.safetensors" for job in jobs],
            "validation": [r / f"{job}.parquet" for job in jobs],
            "manifest": r / "manifest.parquet",
            "images": [r / "real.arrow"],
            "ledger": r / "state/openings.jsonl",
            "opened": r / f"opened{tag}.json",
            "predictions": r / f"predictions{tag}.parquet",
            "out": r / f"results{tag}.json",
        }
        downstream_test.run(**options | changes)
        return json.loads((r / f"results{tag}.json").read_text())

    def weights(self, tag: str = "") -> dict[str, np.ndarray]:
        return {
            k: v
            for job in range(self.study.downstream.jobs)
            for k, v in load_file(self.root / f"{job}{tag}.safetensors").items()
        }

    def everything(self) -> dict[str, Any]:
        self.design()
        self.data()
        self.train()
        return self.test()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    made = Tiny(tmp_path_factory.mktemp("downstream"))
    made.everything()
    return made


def results(tiny: Tiny) -> dict[str, Any]:
    return json.loads((tiny.root / "results.json").read_text())


# -------------------------------------------------------------------------------------------------- hygiene


def test_training_does_not_depend_on_anything_of_the_test_split(tiny: Tiny, tmp_path: Path) -> None:
    """Test images are made unreadable (not finite) and their labels turned round: all that comes before the test stays
    the same.
    """
    other = Tiny(tmp_path / "other")
    hidden = (other.table["split"] == "test").to_numpy()
    assert hidden.any()
    other.images = [
        np.full_like(picture, np.nan) if closed else picture
        for picture, closed in zip(other.images, hidden, strict=True)
    ]
    flipped = other.table["diagnosis"].map({"case": "control", "control": "case"})
    other.table["diagnosis"] = np.where(hidden, flipped, other.table["diagnosis"])
    other.write_cohort()
    other.design()
    other.data()
    other.train()
    for name in (
        "design.json",
        "samples.parquet",
        "images.arrow",
        "0.safetensors",
        "0.parquet",
        "1.safetensors",
        "1.parquet",
    ):
        assert (tiny.root / name).read_bytes() == (other.root / name).read_bytes(), name


def test_no_test_row_is_read_before_the_test(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every read of a preprocessed image goes through `Shards.tensor`; here it refuses rows of the test split."""
    closed = set(np.flatnonzero((tiny.table["split"] == "test").to_numpy()))
    read: set[int] = set()
    original = Shards.tensor

    def guarded(self: Shards, column: str, row: int) -> np.ndarray:
        if "scan_id" in self.schema.names:
            assert row not in closed, f"row {row} is of the test split"
            read.add(row)
        return original(self, column, row)

    monkeypatch.setattr(Shards, "tensor", guarded)
    tiny.design()
    tiny.data()
    tiny.train(tag="-guarded")
    assert len(read) == int(tiny.table["split"].isin(["train", "val"]).sum())
    with pytest.raises(AssertionError, match="test split"):
        tiny.test("-guarded")


def test_only_one_step_and_one_rule_are_given_the_test_split() -> None:
    """The word for the split occurs in one step's code, and training rules have no preprocessed image among their
    inputs.
    """
    root = Path(downstream_train.__file__).parents[2]
    naming = set()
    for path in [
        *(root / "meddiff_steps/downstream").glob("*.py"),
        *(root / "meddiff_steps/steps").glob("downstream*.py"),
    ]:
        comparisons = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare)]
        if any("scans['split'] == 'test'" in ast.unparse(node) for node in comparisons):
            naming.add(path.stem)
    assert naming == {"downstream_test"}
    rules = (root / "rules/downstream.smk").read_text()
    training = rules.split("rule downstream_train:")[1].split("output:")[0]
    assert "PREPROCESSED" not in training
    assert "MANIFEST" not in training


def test_samples_of_another_split_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    table = pd.read_parquet(tiny.root / "samples.parquet")
    bad = tmp_path / "samples.parquet"
    table.assign(split="test").to_parquet(bad)
    out = tmp_path / "w.safetensors", tmp_path / "v.parquet"
    with pytest.raises(UserError, match="holds scans of the split test"):
        downstream_train.run(
            tiny.stage["downstream_train"], tiny.root / "design.json", bad, tiny.root / "images.arrow", 0, *out
        )
    table.iloc[::-1].to_parquet(bad)
    with pytest.raises(UserError, match="its rows are not those of"):
        downstream_train.run(
            tiny.stage["downstream_train"], tiny.root / "design.json", bad, tiny.root / "images.arrow", 0, *out
        )
    assert not out[0].exists()


def test_the_record_of_openings_counts_designs_and_not_reruns(tiny: Tiny) -> None:
    first = json.loads((tiny.root / "opened.json").read_text())
    assert (first["designs"], first["opened"]["scans"]) == (1, 40)
    tiny.test("-again")
    assert json.loads((tiny.root / "opened-again.json").read_text()) == first
    assert (tiny.root / "results-again.json").read_bytes() == (tiny.root / "results.json").read_bytes()
    ledger = tiny.root / "ledger-other.jsonl"
    ledger.write_text((tiny.root / "state/openings.jsonl").read_text().replace(first["frozen_sha256"], "0" * 64))
    assert tiny.test("-later", ledger=ledger)["opened"]["designs"] == 2
    ledger.write_text("not a record\n")
    with pytest.raises(UserError, match="record of openings"):
        tiny.test("-damaged", ledger=ledger)


def test_other_test_scans_are_another_design(tiny: Tiny, tmp_path: Path) -> None:
    """Who leaves out scans, or says something else of them, has seen the result."""
    ledger = tmp_path / "openings.jsonl"
    first = tiny.test("-scans", ledger=ledger)["opened"]
    test = tiny.table["split"] == "test"
    given = {"manifest": tmp_path / "manifest.parquet", "ledger": ledger}
    changes = [
        tiny.table[~test | (np.cumsum(test) > 1)],
        tiny.table.assign(sex=tiny.table["sex"].where(~test, "F")),
        tiny.table.assign(content_sha256=np.where(test, "1", "0")),
    ]
    for number, table in enumerate(changes):
        write_manifest(table, given["manifest"])
        found = tiny.test("-scans", **given)["opened"]
        assert found["designs"] == number + 2 and found["frozen_sha256"] != first["frozen_sha256"]
    write_manifest(tiny.table.iloc[::-1], given["manifest"])
    assert tiny.test("-scans", **given)["opened"] == first | {"designs": 4}, "their order says nothing"


def test_a_record_from_before_scans_were_recorded_goes_on(tiny: Tiny, tmp_path: Path) -> None:
    ledger = tmp_path / "openings.jsonl"
    entry = json.loads((tiny.root / "state/openings.jsonl").read_text())
    del entry["frozen"]["test"]
    old = entry | {"frozen_sha256": frozen_digest(entry["frozen"]), "time": "2026-01-01T00:00:00+00:00"}
    ledger.write_text(json.dumps(old) + "\n")
    found = tiny.test("-old", ledger=ledger)["opened"]
    assert found["designs"] == 1 and found["frozen_sha256"] != old["frozen_sha256"]
    (line,) = ledger.read_text().splitlines()
    assert json.loads(line)["time"] == old["time"] and "test" in json.loads(line)["frozen"]
    ledger.write_text(json.dumps(old | {"opened": old["opened"] | {"scans": 41}}) + "\n")
    assert tiny.test("-old", ledger=ledger)["opened"]["designs"] == 2, "it was of other scans"


def test_a_changed_design_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    other = Tiny(tmp_path, margin=0.2)
    with pytest.raises(UserError, match="of another design"):
        tiny.test("-bad", config=other.stage["downstream_test"])
    with pytest.raises(UserError, match="no weights of recipe"):
        tiny.test("-bad", validation=[tiny.root / "0.parquet"])
    with pytest.raises(UserError, match="no weights of the configured classifier"):
        tiny.test("-bad", weights=[tiny.root / "plan.parquet"] * 2)


# --------------------------------------------------------------------------------------- training and results


def test_equal_budgets_and_the_same_bits_with_any_number_of_workers(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[tuple[str, int], list[int]] = {}
    original = classifier.draw_batch

    def counted(task: Any, *rest: Any) -> np.ndarray:
        rows = original(task, *rest)
        seen.setdefault((task.recipe, task.number), []).append(len(rows))
        return rows

    monkeypatch.setattr(classifier, "draw_batch", counted)
    tiny.train(threads=3, tag="-parallel")
    assert len(seen) == 5 * 2  # `trts` trains nothing of its own
    assert all(sizes == [8] * STEPS for sizes in seen.values())  # whatever the size of the training set

    one, many = tiny.weights(), tiny.weights("-parallel")
    assert one.keys() == many.keys()
    assert all(np.array_equal(one[name], many[name]) for name in one)
    recipe = next(iter(one)).split("/")[0]
    assert not np.array_equal(one[f"{recipe}/0/conv1.weight"], one[f"{recipe}/1/conv1.weight"])


@pytest.mark.parametrize("flip", [False, True])
def test_classical_arms_mirror_only_where_the_study_does(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flip: bool
) -> None:
    """Else a heart would be learnt on the right."""
    lit = torch.zeros(40, 1, *SHAPE)
    lit[..., :5] = 1.0
    sides = augment(lit, np.random.default_rng(0), None, flip).unflatten(-1, (2, -1)).mean(dim=(1, 2, 4))
    assert (sides[:, 0] < sides[:, 1]).any() == flip

    asked = set()
    monkeypatch.setattr(classifier, "perturb", lambda images, _, spacing, mirror: asked.add(mirror) or images)
    study = tiny.study.model_copy(update={"variants": Variants(flip=flip)})
    monkeypatch.setitem(tiny.stage, "downstream_train", freeze(study, "downstream_train", tmp_path))
    tiny.train(tag=f"-flip{flip}")
    assert asked == {flip}


def test_results_say_what_a_reader_needs(tiny: Tiny) -> None:
    found = results(tiny)
    arms = {arm["name"]: arm for arm in found["arms"]}
    train = tiny.table[tiny.table["split"] == "train"]["diagnosis"].value_counts().to_dict()
    assert arms["real"]["images"] == {"real": train, "added": {"control": 0, "case": 0}}
    assert arms["real_synthetic"]["images"]["added"] == train
    assert arms["control"]["images"] == {"real": train, "added": train}
    for name, arm in arms.items():
        on = arm["figures"]["synthetic" if name == "trts" else "test"]
        assert ("test" in arm["figures"]) == (name != "trts")
        assert {"value", "low", "high", "n"} <= on["auc"].keys()
        assert on["auc"]["value"] == pytest.approx(np.mean(on["seeds"]), abs=1e-5)
        assert on["auc"]["n"] == (160 if name == "trts" else 40)
    assert arms["real"]["figures"]["test"]["auc"]["value"] > 0.8  # a bright disc is easily seen
    assert arms["trts"]["figures"]["synthetic"]["auc"]["value"] > 0.8
    assert set(arms["real"]["figures"]["test"]["groups"]) == {"F", "M"}
    gap = arms["real"]["figures"]["test"]
    assert gap["gap"]["value"] == pytest.approx(
        abs(gap["groups"]["F"]["value"] - gap["groups"]["M"]["value"]), abs=1e-5
    )
    assert found["contrasts"][0]["p_holm"] is None
    assert found["primary"]["difference"]["value"] == pytest.approx(
        arms["real_synthetic"]["figures"]["test"]["auc"]["value"] - arms["real"]["figures"]["test"]["auc"]["value"],
        abs=1e-5,
    )
    assert found["contrasts"][0]["delong"]["difference"]["value"] == pytest.approx(
        found["primary"]["difference"]["value"], abs=1e-5
    )
    assert found["verdict"] in ("helps", "no evidence", "harms")
    predictions = pd.read_parquet(tiny.root / "predictions.parquet")
    assert predictions.groupby(["arm", "set", "seed"]).size().to_dict() == {
        (name, "synthetic" if name == "trts" else "test", seed): 160 if name == "trts" else 40
        for name in arms
        for seed in (0, 1)
    }
    np.testing.assert_allclose(predictions[["probability_control", "probability_case"]].sum(axis=1), 1.0)


def test_a_kept_out_group_is_tested_on_its_own(tmp_path: Path) -> None:
    made = Tiny(tmp_path, [ARMS[0], ARMS[1]], shift={"covariate": "site", "levels": ["B"]}, jobs=1)
    found = made.everything()
    north = made.table[(made.table["site"] == "B")]
    assert found["shift"]["subjects_that_the_generator_saw"] == int((north["split"] == "train").sum())
    assert found["n"]["test_subjects"] == 40 - int((north["split"] == "test").sum())
    assert found["arms"][0]["figures"]["shifted"]["auc"]["n"] == int((north["split"] == "test").sum())
    samples = pd.read_parquet(tmp_path / "samples.parquet")
    assert not set(samples["image_id"]) & set(north["scan_id"])
    page = downstream_section(found, json.loads((tmp_path / "opened.json").read_text()), Names())
    assert any("did see" in line for line in page.text)


def test_losses_of_the_filter_are_noticed_before_training(tmp_path: Path) -> None:
    made = Tiny(tmp_path, [ARMS[0], ARMS[1]], jobs=1)
    made.design()
    with ShardWriter(
        tmp_path / "few.arrow", {"sample_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE))}
    ) as shard:
        for i in range(5):
            shard.append(sample_id=f"syn{i:03d}", image=made.images[0])
    with pytest.raises(UserError, match=r"there are [23]"):
        made.data(filtered=[tmp_path / "few.arrow"])
    assert not (tmp_path / "samples.parquet").exists()


def test_missing_inputs_are_named(tmp_path: Path) -> None:
    made = Tiny(tmp_path)
    made.design()
    with pytest.raises(UserError, match="--generated"):
        made.data(generated=None)
    with pytest.raises(UserError, match="--autoencoder"):
        made.data(autoencoder=None)


def test_the_plan_is_checked_before_any_image_exists(tmp_path: Path) -> None:
    made = Tiny(tmp_path, [{"name": "real"}, {"name": "real_synthetic", "synthetic": 8}])
    (tmp_path / "real.arrow").unlink()
    with pytest.raises(UserError, match="Plan about"):
        made.design()


def test_the_report_shows_verdict_arms_and_curve(tiny: Tiny) -> None:
    section = downstream_section(results(tiny), json.loads((tiny.root / "opened.json").read_text()), Names())
    page = render(title="t", study="s", lead="l", simulated=True, sections=[section]).decode()
    assert f"Verdict: {results(tiny)['verdict']}" in page
    assert "opened once" in page
    assert page.count("<svg") == 3
    for arm in ARMS:
        assert str(arm["name"]) in page
    twice = downstream_section(results(tiny), {"designs": 3}, Names())
    assert any("3 different designs" in line for line in twice.text)


def test_generator_seeds_are_crossed_with_classifier_seeds(tmp_path: Path) -> None:
    """Two cohorts of the same requests: arms that learn from them have twice the classifiers, and figures have both."""
    made = Tiny(tmp_path, [ARMS[0], ARMS[1], {"name": "trts", "test": "synthetic"}], generator_seeds=2)
    planned = pd.read_parquet(tmp_path / "plan.parquet")
    planned["index"] = planned["noise_index"] = np.arange(len(planned))
    planned = planned.assign(
        attempt=0,
        cohort_root="tiny/syn",
        shard=0,
        seed_key=[seed_key("tiny/syn", i, 0, "noise") for i in range(len(planned))],
    )
    planned.to_parquet(tmp_path / "plan.parquet", index=False)
    assert made.design()["generator_seeds"] == 2
    downstream_plan.run(
        made.stage["downstream_plan"],
        tmp_path / "design.json",
        tmp_path / "manifest.parquet",
        tmp_path / "plan.parquet",
        1,
        tmp_path / "other.parquet",
    )
    other = pd.read_parquet(tmp_path / "other.parquet")
    assert 0.5 * len(planned) > len(other) > (made.table["split"] == "train").sum()
    same = planned.set_index("sample_id").loc[other["sample_id"]].reset_index()
    changed = ["cohort_root", "seed_key"]
    pd.testing.assert_frame_equal(other.drop(columns=changed), same[other.columns].drop(columns=changed))
    assert not set(other["seed_key"]) & set(planned["seed_key"])

    rng = np.random.default_rng(9)
    with ShardWriter(
        tmp_path / "more.arrow", {"sample_id": pa.string(), "image": TensorColumn("float16", (1, *SHAPE))}
    ) as shard:
        for row in other.itertuples():
            shard.append(sample_id=row.sample_id, image=image(row.diagnosis == "case", rng))
    with pytest.raises(UserError, match="1 further seeds, and 0"):
        made.data()
    samples = made.data(more_filtered=[tmp_path / "more.arrow"])
    assert samples.groupby("generator")["kind"].unique().map(set).to_dict() == {
        0: {"real", "filtered"} | {"generated"},
        1: {"filtered"},
    }
    made.train()
    found = made.test()
    arms = {arm["name"]: arm for arm in found["arms"]}
    assert found["n"]["generators"] == 2
    assert {name: len(arm["validation"]["steps"]) for name, arm in arms.items()} == {
        "real": 2,
        "real_synthetic": 4,
        "trts": 2,
    }
    figures = arms["real_synthetic"]["figures"]["test"]
    assert len(figures["seeds"]) == 4
    assert figures["generators"] == pytest.approx(
        [np.mean(figures["seeds"][:2]), np.mean(figures["seeds"][2:])], abs=1e-5
    )
    assert figures["auc"]["value"] == pytest.approx(np.mean(figures["seeds"]), abs=1e-5)
    assert "generators" not in arms["real"]["figures"]["test"]
    predictions = pd.read_parquet(tmp_path / "predictions.parquet")
    assert predictions.groupby("arm")["generator"].unique().map(list).to_dict() == {
        "real": [0],
        "real_synthetic": [0, 1],
        "trts": [0],
    }
    by_cell = predictions[predictions["arm"] == "real_synthetic"].pivot_table(
        index="image_id", columns=["generator", "seed"], values="probability_case"
    )
    assert not np.allclose(by_cell[0], by_cell[1])  # the same start and order of batches, other images
    page = downstream_section(found, json.loads((tmp_path / "opened.json").read_text()), Names())
    assert any("2 generator seeds" in line for line in page.text)


def test_three_levels_are_compared_one_versus_rest(tmp_path: Path) -> None:
    """More than two classes: macro figures, no DeLong."""
    from meddiff_steps.downstream.results import summarise

    arms = [{"name": "real"}, {"name": "real_synthetic", "synthetic": 1}]
    section = Tiny(tmp_path, arms).study.downstream
    rng = np.random.default_rng(1)
    levels, truth = ["a", "b", "c"], rng.integers(0, 3, 60)
    parts = []
    for arm, sure in (("real", 1.0), ("real_synthetic", 3.0)):
        for seed in range(5):
            logits = rng.normal(size=(60, 3)) + sure * np.eye(3)[truth]
            probability = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            facts = {
                "arm": arm,
                "generator": 0,
                "seed": seed,
                "image_id": [f"i{i:02d}" for i in range(60)],
                "subject_id": [f"i{i}" for i in range(60)],
                "set": "test",
            }
            table = pd.DataFrame(facts | {"level": [levels[i] for i in truth], "subgroup": None})
            parts.append(table.assign(**{f"probability_{level}": probability[:, i] for i, level in enumerate(levels)}))
    listed = [
        {"name": a.name} | {"recipe": a.name, "images": {"real": {"a": 1}, "added": {"a": 0}}} for a in section.arms
    ]
    validation = pd.DataFrame(
        {"arm": ["real", "real_synthetic"], "auc": 0.5, "log_loss": 1.0, "step": 1, "subjects": 9}
    )
    found = summarise(section, levels, pd.concat(parts), validation, listed, "real_synthetic", "seed")
    assert found["verdict"] == "helps"
    assert found["contrasts"][0]["delong"] is None
    assert found["n"]["prevalence"] is None
    assert "groups" not in found["arms"][0]["figures"]["test"]


def test_reduction_is_the_mean_of_blocks() -> None:
    images = np.random.default_rng(0).random((2, 1, 7, 4, 6)).astype(np.float32)
    small = reduce(images, 4)
    assert small.shape == (2, 1, 3, 2, 3)
    np.testing.assert_allclose(small[1, 0, 2, 1, 0], images[1, 0, 4:6, 2:4, 0:2].mean(), rtol=1e-6)
    assert reduce(images, 7) is images
    assert reduce(np.ones((1, 1, 1, 64), np.float32), 16).shape == (1, 1, 1, 16)
