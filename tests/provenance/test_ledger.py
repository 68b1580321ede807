"""The ledger and what is released with it."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import rfc8785
from tiny_release import AGAIN, DOUBLE, GIVEN_UP, LATER_FIELDS, LIMITS, Place, schema_of

from meddiff_steps.audit import explain as story
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.config import CategoricalCovariate, ContinuousCovariate
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import noise, seed_key
from meddiff_steps.privacy.calibration import Thresholds
from meddiff_steps.provenance import ledger, verify
from meddiff_steps.release.sealed import open_release


def lines(release: Path) -> dict[str, dict]:
    return {row["sample_id"]: row for _, row in ledger.read_lines(release)}


def test_the_clean_release_passes_every_level_that_can_run(place):
    report = audit(Request(place.release, key=Path(f"{place.key}.pub"), private=place.private))
    assert [(check.name, check.text, check.examples) for check in report.checks if check.outcome == "finding"] == []
    assert [report.status(level) for level in range(8)] == ["PASS"] * 6 + ["NOT RUN"] * 2
    assert "signed by key" in next(check.text for check in report.checks if check.name == "signature")
    assert {check.name for check in report.checks if check.outcome == "not run"} == {"all"}, "L6 and L7 say why"


def test_a_row_for_everybody_who_was_planned(place):
    rows = lines(place.release)
    assert list(rows) == sorted(place.plan["sample_id"]) and len(rows) == 10
    assert rows[GIVEN_UP]["privacy"] == {"decision": "rejected", "attempts": 2} and rows[DOUBLE]["privacy"] == {
        "decision": "duplicate",
        "attempts": 1,
    }
    for name in (GIVEN_UP, DOUBLE):
        assert [rows[name][key] for key in ("attempt", "seed_key", "noise_sha256", "image")] == [None] * 4
    assert rows[AGAIN]["attempt"] == 1 and rows[AGAIN]["privacy"]["attempts"] == 2
    assert (
        rows["cf000001"]["covariates"].items() >= {"age": 70.5, "sex": "F"}.items()
        and rows["cf000001"]["noise_index"] == 0
    )
    assert rows["cf000000"]["seed_key"] == rows["cf000001"]["seed_key"] != rows["cf000002"]["seed_key"]
    card = json.loads((place.results / "diffusion/card.json").read_text())
    assert (
        rows[AGAIN]["recipe"]["diffusion"] == card["weights_sha256"]
        and rows[AGAIN]["recipe"]["num_inference_steps"] == 2
    )


def test_both_files_hold_the_same_rows(place):
    table = list(ledger.read_parquet(place.release / "provenance/ledger.parquet"))
    assert [rfc8785.dumps(row) for row in table] == (
        place.release / "provenance/ledger.jsonl"
    ).read_bytes().splitlines()
    assert pd.read_parquet(place.release / "provenance/ledger.parquet")["sample_id"].tolist() == sorted(
        place.plan["sample_id"]
    )


def test_the_private_ledger_stays_private_and_its_root_is_published(place):
    rows = list(ledger.read_parquet(place.private))
    assert len(rows) == 12 and [(row["sample_id"], row["attempt"]) for row in rows] == sorted(
        (row["sample_id"], row["attempt"]) for row in rows
    )
    assert rows[0]["limit"] == LIMITS and set(rows[0]["nearest"]) == set(LIMITS)
    root = json.loads((place.release / "provenance/root.json").read_text())
    assert (
        root["private_ledger"]["root"] == verify.merkle_root(verify.leaf_hash(rfc8785.dumps(row)) for row in rows).hex()
    )
    published = b"".join(path.read_bytes() for path in place.release.rglob("*") if path.is_file())
    assert b"similarity" not in (place.release / "provenance/ledger.jsonl").read_bytes()
    rejected = [row["seed_key"].encode() for row in rows if row["decision"] == "rejected"]
    assert len(rejected) == 3 and not any(key in published for key in rejected), "nor the keys of what was rejected"
    assert not list(place.release.rglob("*private*"))


def test_nothing_of_this_machine_is_published(place, tmp_path):
    texts = {
        path: path.read_bytes()
        for path in place.release.rglob("*")
        if path.is_file() and path.suffix in (".json", ".jsonl", "")
    }
    root = str(place.results.parents[1]).encode()
    assert [path for path, text in texts.items() if root in text] == []
    study = json.loads((place.release / "provenance/config.json").read_text())
    assert study["cohort"]["root"] == study["release"]["signing_key"] == study["results"] == "(path)"


def test_sealing_again_gives_the_same_bytes(place, tmp_path):
    folder = shutil.copytree(place.results, tmp_path / "results/tiny")
    before = {path.relative_to(place.release): path.read_bytes() for path in place.release.rglob("*") if path.is_file()}
    again = object.__new__(Place)
    again.__dict__ |= place.__dict__ | {
        "results": folder,
        "release": folder / "release",
        "private": folder / "privacy/ledger-private.parquet",
    }
    again.tables = [folder / table.relative_to(place.results) for table in place.tables]
    again.complete(), again.seal()
    assert {
        path.relative_to(again.release): path.read_bytes() for path in again.release.rglob("*") if path.is_file()
    } == before


def fixed_tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Six subjects with everything that a row can hold: gaps, whole, tiny and long numbers, letters beyond ASCII,
    rejected ones and doubles.
    """
    index = list(range(6))
    ids = [f"a{i:06d}" for i in index]
    plan = pd.DataFrame(
        {
            "sample_id": ids,
            "group": "a",
            "index": index,
            "noise_index": index,
            "cohort_root": "golden/a",
            "shard": [0, 0, 0, 1, 1, 1],
        }
    )
    plan = plan.assign(
        age=[40.0, 1 / 3, np.nan, 1e-7, 5e-324, 1e15], site=["Köln", 'a "b"\\', None, "plain", "tab\t", "\U0001f9e0"]
    )
    tries = [
        (0, 0, "accepted"),
        (1, 0, "rejected"),
        (1, 1, "accepted"),
        (2, 0, "rejected"),
        (3, 0, "duplicate"),
        (4, 0, "accepted"),
        (5, 0, "accepted"),
    ]
    rows = [
        {"sample_id": ids[i], "attempt": n, "seed_key": seed_key("golden/a", i, n, "noise"), "decision": what}
        for i, n, what in tries
    ]
    decisions = pd.DataFrame(rows).assign(reason=["learned" if what == "rejected" else "" for *_, what in tries])
    for detector in LIMITS:
        decisions[f"similarity_{detector}"], decisions[f"nearest_{detector}"] = (
            [0.5, 0.95, 0.25, np.nan, 1.0, 1e-5, 0.1 + 0.2],
            range(7),
        )
    made = [ids[i] for i, _, what in tries if what == "accepted"]
    images = pd.DataFrame(
        {
            "sample_id": made,
            "path": [f"{name}.png" for name in made],
            "bytes": range(1, 5),
            "sha256": "1" * 64,
            "voxel_sha256": "2" * 64,
        }
    )
    return plan, decisions, images


def test_golden_roots(tmp_path):
    """Roots that were published must come out again from the same tables, whatever becomes of the program that writes
    them.
    """
    plan, decisions, images = fixed_tables()
    covariates = {
        "age": ContinuousCovariate(unit="year", range=(0, 1e30)),
        "site": CategoricalCovariate(levels=["x", "y"]),
    }
    public, private = ledger.public_schema(covariates), ledger.private_schema(sorted(LIMITS))
    recipe = ledger.Recipe("a" * 64, "d" * 64, "ddim", 20, 1.5, 4, "32-true", "e" * 64)
    rows = [
        row for table in ledger.public_tables(plan, decisions, images, covariates, recipe) for row in table.to_pylist()
    ]
    for row in rows:  # as they were before there were decoders and grey levels
        row["recipe"] = {key: value for key, value in row["recipe"].items() if key not in LATER_FIELDS}
    before = schema_of(rows, covariates)
    old = ledger.write_ledger(ledger.as_tables(rows, before), before, tmp_path / "old.parquet", tmp_path / "old.jsonl")
    assert old.root == "3468d3129cc3114819cfb6751754045417fb1341ff99340cef580df18ecde923"
    lines = (tmp_path / "old.jsonl").read_text().replace('"path":"', '"path":"images/').splitlines()
    assert [verify.row_problem(json.loads(line)) for line in lines] == [None] * len(rows)
    drawn = replace(recipe, decoder="f" * 64, drawing_steps=10, guidance_interval=[0.1, 2.5])
    tables = ledger.public_tables(plan, decisions, images, covariates, drawn)
    candidates = ledger.private_tables(plan, decisions, Thresholds(dict(LIMITS), {}, 0.05, 99), None)
    written = ledger.write_ledger(tables, public, tmp_path / "a.parquet", tmp_path / "a.jsonl")
    assert written.root == "d210d68bb80108c1ac54e347aa5ae858cf43709925b7cf59a32d317377f42ebc"
    assert (
        ledger.write_ledger(candidates, private, tmp_path / "b.parquet").root
        == "6f97a6d017293f652a7d34960e693581198e892a4bee7eef72f0833be613fc4b"
    )
    assert [rfc8785.dumps(row) for row in ledger.read_parquet(tmp_path / "a.parquet")] == (
        tmp_path / "a.jsonl"
    ).read_bytes().splitlines()


def test_the_root_does_not_depend_on_shards_or_their_order(place, tmp_path):
    plan, decisions = (
        pd.read_parquet(place.results / "plan.parquet"),
        pd.read_parquet(place.results / "privacy/decisions.parquet"),
    )
    tables = [pd.read_parquet(path) for path in place.tables]
    recipe = ledger.Recipe("a", "d", "ddim", 2, 1.0, 4, "32-true", "e")
    roots = {}
    for count in (1, 2, 7):
        shard = [i * count // len(plan) for i in range(len(plan))]
        mixed = plan.assign(shard=shard).sample(frac=1, random_state=count)
        rows = ledger.public_tables(
            mixed, decisions.sample(frac=1, random_state=count), pd.concat(tables[::-1]), place.study.covariates, recipe
        )
        written = ledger.write_ledger(
            rows,
            ledger.schema_of(place.study.covariates, tables[0].columns.tolist()),
            tmp_path / f"{count}.parquet",
            tmp_path / f"{count}.jsonl",
        )
        shards = ledger.shard_roots(written, dict(zip(plan["sample_id"], shard, strict=True)))
        assert len(shards) == count and sum(entry["rows"] for entry in shards) == len(plan)
        for entry in shards:
            mine = [written.leaves[i] for first, end in entry["ranges"] for i in range(first, end)]
            assert verify.merkle_root(mine).hex() == entry["root"] and len(mine) == entry["rows"]
        roots[count] = written.root
        if count == 1:
            assert shards == [{"shard": 0, "rows": 10, "ranges": [[0, 10]], "root": written.root}]
    assert len(set(roots.values())) == 1
    assert len({(tmp_path / f"{count}.jsonl").read_bytes() for count in roots}) == 1


@pytest.mark.parametrize("drawing", [True, False])
def test_rows_name_the_parts_that_made_the_image(place, tmp_path, drawing):
    if not drawing:
        place = Place(tmp_path, drawing=False)
    (recipe,) = {json.dumps(row["recipe"]) for row in open_release(place.release).released()}
    found = json.loads(recipe)
    cards = {"autoencoder": "autoencoder/card", "diffusion": "diffusion/card", "tone": "diffusion/tone"}
    cards |= {"decoder": "decoder/card"} if drawing else {}
    digests = {
        kind: json.loads((place.results / f"{name}.json").read_text())["weights_sha256"] for kind, name in cards.items()
    }
    assert {kind: found[kind] for kind in cards} == digests
    assert (found["decoder"] is not None) == drawing and found["drawing_steps"] == (2 if drawing else None)
    report = audit(Request(place.release, models=place.results, private=place.private))
    assert report.passed and report.status(6) == "PASS"
    assert ("by `decoder`" in "\n".join(story.explain(place.release, AGAIN))) == drawing


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tone": None}, "recipe.tone is NoneType"),
        ({"decoder": 1}, "recipe.decoder is int"),
        ({"guidance_interval": "x"}, "recipe.guidance_interval is str"),
        ({"something": 1}, "fields of recipe are missing or unknown"),
    ],
)
def test_what_rows_may_hold_beside_what_they_always_held(place, change, problem):
    row = next(open_release(place.release).released())
    assert verify.row_problem(row) is None
    assert verify.row_problem(row | {"recipe": row["recipe"] | change}) == problem
    old = {key: value for key, value in row["recipe"].items() if key not in LATER_FIELDS}
    assert verify.row_problem(row | {"recipe": old}) is None
    assert verify.row_problem(row | {"recipe": {**old, "sampler": 1}}) == "recipe.sampler is int"


def test_a_release_of_pictures(tmp_path):
    place = Place(tmp_path, dims=2, sign=False)
    report = audit(Request(place.release, private=place.private))
    assert [(check.name, check.text, check.examples) for check in report.checks if check.outcome == "finding"] == []
    assert next(check for check in report.checks if check.name == "signature").text.startswith("UNSIGNED")
    assert not (place.release / ".bidsignore").exists()


def test_bids_validator(place, bids_report):
    issues = bids_report(place.release)["issues"]["issues"]
    # Authors are in CITATION.cff, and must not be in the description, too (an error), which the validator then misses.
    assert {issue["code"] for issue in issues} <= {"TOO_FEW_AUTHORS", "SINGLE_SOURCE_CITATION_FIELDS"}


def test_tables_that_do_not_fit_are_refused(place):
    plan = pd.read_parquet(place.results / "plan.parquet")
    decisions = pd.read_parquet(place.results / "privacy/decisions.parquet")
    images = pd.concat([pd.read_parquet(path) for path in place.tables])
    recipe = ledger.Recipe("a", "d", "ddim", 2, 1.0, 4, "32-true", "e")

    def rows(plan=plan, decisions=decisions, images=images):
        return [
            row
            for table in ledger.public_tables(plan, decisions, images, place.study.covariates, recipe)
            for row in table.to_pylist()
        ]

    assert len(rows()) == 10
    with pytest.raises(UserError, match=r"1 accepted subject\(s\) have no image"):
        rows(images=images.iloc[1:])
    with pytest.raises(UserError, match="more than one image"):
        rows(images=pd.concat([images, images.iloc[:1]]))
    with pytest.raises(UserError, match="no decision"):
        rows(decisions=decisions[decisions["sample_id"] != "syn000000"])
    with pytest.raises(UserError, match="not accepted"):
        rows(
            decisions=decisions.assign(
                decision=decisions["decision"].where(decisions["sample_id"] != "syn000000", "rejected")
            )
        )


def test_the_noise_digest_is_of_the_noise_that_generation_draws():
    key, other = seed_key("seed/syn", 5, 0, "noise"), seed_key("seed/syn", 6, 0, "noise")
    for _ in range(2):  # one digest leaves nothing for the next
        for one in (key, other, "f" * 32, "0" * 32):
            latent = noise(one, (3, 8, 4, 4)).ravel()[: ledger.NOISE_NUMBERS]
            assert ledger.noise_digest(one) == hashlib.sha256(latent.astype("<f4").tobytes()).hexdigest()
    assert (
        ledger.noise_digest(seed_key("demo/cohort", 0, 0, "noise"))
        == "86b0dd1d5579bd0af8301097fb3b63b52ddb9af6ef1fbafab1d16336b6240e2b"
    )
