"""The audit's heavy levels, its reports, and the commands that read a release."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from test_tampering import Target
from tiny_release import AGAIN, GIVEN_UP, UNTROUBLED, Place

from meddiff_steps.audit import explain as story
from meddiff_steps.audit.page import as_html, as_text
from meddiff_steps.audit.reexecution import most_bad
from meddiff_steps.audit.request import Report, Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_json
from meddiff_steps.provenance import lineage, verify
from meddiff_steps.provenance.verify import Check


def checks(report: Report, level: int) -> dict[str, Check]:
    return {check.name: check for check in report.checks if check.level == level}


# -------------------------------------------------------------------------------------------- re-execution


def test_every_released_image_can_be_made_again_bit_by_bit(place):
    found = checks(audit(Request(place.release, models=place.results, seed="audit")), 6)
    assert found["models"].outcome == found["images"].outcome == "pass"
    assert "of 8 images made again (seed 'audit') 8 are the same bit by bit" in found["images"].text
    assert "at most 0.0 % of the 8 differ" in found["images"].text


def test_an_edited_covariate_is_seen_by_making_the_image_again(place, copied):
    """The one attack that no other level sees without the key; what changes an image less than rounding may, this one
    does not either.
    """
    target = Target(place, copied)
    rows = target.rows()
    row = next(row for row in rows if row["sample_id"] == UNTROUBLED)
    row["covariates"]["age"] = 85.5 if row["covariates"]["age"] < 60 else 30.5
    target.seal(rows)
    found = checks(audit(Request(copied, models=place.results)), 6)
    assert found["images"].outcome == "finding"
    assert [example.split(":")[0] for example in found["images"].examples] == [UNTROUBLED]


def test_other_models_are_refused(place, tmp_path):
    other = Path(shutil.copytree(place.results / "autoencoder", tmp_path / "autoencoder")).parent
    shutil.copytree(place.results / "diffusion", other / "diffusion")
    path = other / "diffusion/model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    found = checks(audit(Request(place.release, models=other)), 6)
    assert found["models"].outcome == "finding" and "no diffusion with weights" in found["models"].text
    content[-1] ^= 1
    path.write_bytes(content)
    found = checks(audit(Request(place.release, models=other)), 6)
    assert found["models"].outcome == "finding" and "no decoder with weights" in found["models"].text
    shutil.copytree(place.results / "decoder", other / "decoder")
    assert checks(audit(Request(place.release, models=other)), 6)["models"].outcome == "pass"
    (other / "diffusion/tone.json").unlink()
    found = checks(audit(Request(place.release, models=other)), 6)
    assert found["models"].outcome == "finding" and "no tone with weights" in found["models"].text
    found = checks(audit(Request(place.release, models=tmp_path / "none")), 6)
    assert "no model.safetensors with card.json there" in found["models"].text


def test_the_bound_is_the_exact_one():
    # Of 20 with 3 bad, 12 drawn are all good with probability C(17, 12) / C(20, 12) = 0.049.
    assert most_bad(20, 12) == 2 / 20
    assert most_bad(10, 10) == 0
    assert most_bad(100_000, 59) < 0.05 < most_bad(100_000, 58)
    assert most_bad(100_000, 299) < 0.01 < most_bad(100_000, 296)
    assert np.isclose(most_bad(10**6, 20), 1 - 0.05 ** (1 / 20), atol=1e-4)


# ------------------------------------------------------------------------------------------------- privacy


def test_without_what_the_filter_used_the_privacy_level_says_that_it_did_not_run(place):
    found = checks(audit(Request(place.release, results=place.results)), 7)
    assert [check.outcome for check in found.values()] == ["note", "not run"]
    assert "lacks what the filter used" in found["images"].text


# ------------------------------------------------------------------------------------------------- reports


def test_another_privacy_report_than_the_sealed_one_is_seen(place, copied, tmp_path):
    """Whoever has the study's folder compares the report itself."""
    report = json.loads((place.results / "privacy/report.json").read_text())
    (tmp_path / "privacy").mkdir()
    (tmp_path / "privacy/report.json").write_text(json.dumps(report | {"verdict": "CONDITIONAL"}))
    assert checks(audit(Request(copied, results=tmp_path)), 7)["inputs"].outcome == "finding"
    root = json.loads((copied / "provenance/root.json").read_text())
    root["privacy"]["verdict"] = "CONDITIONAL"
    write_json(copied / "provenance/root.json", root)
    assert checks(audit(Request(copied, results=place.results)), 7)["inputs"].outcome == "finding"


def test_reports_name_every_level_and_what_did_not_run(place, copied):
    (copied / "README.md").write_text("<script>alert(1)</script>")
    (copied / "<b>.txt").write_text("x")
    report = audit(Request(copied))
    text, page, content = as_text(report), as_html(report), report.to_json()
    assert [level["status"] for level in content["levels"]] == [
        "PASS",
        "FINDINGS",
        "FINDINGS",
        "PASS",
        "FINDINGS",
        "PASS",
        "NOT RUN",
        "NOT RUN",
    ]
    assert content["passed"] is False and content["root_sha256"] == report.sha256
    assert text.splitlines()[-1] == "3 finding(s); L6, L7 did not run"
    assert "UNSIGNED as far as can be told" in text
    assert "&lt;b&gt;.txt" in page and "<b>.txt" not in page
    assert json.dumps(content, allow_nan=False)


def test_without_reading_images_the_audit_says_so(place):
    report = audit(Request(place.release, hash_images=False))
    assert checks(report, 1)["image-digests"].outcome == "not run"
    assert report.status(5) == "NOT RUN" and report.passed


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "meddiff_steps", *map(str, arguments)], capture_output=True, text=True)


def test_exit_codes(place, copied, tmp_path):
    done = run("audit", place.release, "--json", tmp_path / "audit.json", "--html", tmp_path / "audit.html")
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        json.loads((tmp_path / "audit.json").read_text())["passed"] is True
        and (tmp_path / "audit.html").stat().st_size > 1000
    )
    (copied / "LICENSE").unlink()
    assert run("audit", copied).returncode == 1
    done = run("audit", tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and "no folder `provenance`" in done.stderr


# ---------------------------------------------------------------------------------- explain, diff and prove


def test_explain_leads_from_the_image_to_the_cohort(place):
    lines = story.explain(place.release, f"sub-{AGAIN}")
    text = "\n".join(lines)
    row = story.find(place.release, AGAIN)[2]
    assert lines[0] == f"{AGAIN}: released after 2 attempt(s)"
    assert row["image"]["sha256"] in text and row["seed_key"] in text and row["recipe"]["diffusion"] in text
    for step in (
        "images",
        "gate",
        "privacy",
        "filter",
        "generate",
        "plan",
        "tone",
        "diffusion",
        "decoder",
        "autoencoder",
        "preprocess",
        "cohort",
    ):
        assert f"by `{step}`" in text
    assert text.count("by `cohort`") == 1
    assert story.explain(place.release, GIVEN_UP)[0] == f"{GIVEN_UP}: rejected after 2 attempt(s)"
    with pytest.raises(UserError, match="no subject 'nobody' among 10"):
        story.explain(place.release, "nobody")
    for release, subject, said in (
        (Path("nobody"), str(place.release), "The subject comes first, then the release."),
        (place.release.parent, "nobody", f"Did you mean {place.release}?"),
        (place.release / "provenance", "nobody", "Give the root of a release"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            story.explain(release, subject)


def test_a_proof_leads_to_the_root_and_another_row_does_not(place, tmp_path):
    root = verify.read_root(place.release)["ledger"]["root"]
    proof = story.prove(place.release, AGAIN)
    assert proof["root"] == root and verify.proven(proof, root)
    assert not verify.proven(proof | {"record": proof["record"].replace('"attempt":1', '"attempt":0')}, root)
    assert not verify.proven(proof | {"index": proof["index"] + 1}, root)
    assert not verify.proven(proof | {"path": proof["path"][1:]}, root)
    assert not verify.proven({}, root)
    (tmp_path / "proof.json").write_text(json.dumps(proof))
    command = [
        sys.executable,
        "-I",
        "-S",
        str(place.release / "provenance/verify.py"),
        "--proof",
        str(tmp_path / "proof.json"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "leads from syn000001 to the ledger's root" in done.stdout


def test_diff_names_the_field_that_differs(place, tmp_path):
    assert story.compare(place.release, place.release) == []
    other = Place(tmp_path, seed="other seed")
    lines = story.compare(place.release, other.release)
    assert 'config seed: "seed" and "other seed"' in lines
    assert any(line.startswith("seed_key: ") for line in lines) and any(
        line.startswith("image.voxel_sha256: ") for line in lines
    )
    assert not any(line.startswith(("recipe.", "config generate")) for line in lines)


def test_diff_sees_what_lies_on_disk_whatever_the_ledgers_say(place, tmp_path):
    other = tmp_path / "release"
    shutil.copytree(place.release, other)
    image = next(other.rglob("*_T1w.nii.gz"))
    image.write_bytes(image.read_bytes()[:-1] + b"x")
    (other / "README.md").unlink()
    (other / "more").mkdir()
    (other / "more" / "notes\x1b[2J.txt").touch()
    (other / "LICENSE").unlink()
    (other / "LICENSE").symlink_to("CHANGES")
    lines = story.compare(place.release, other)
    shared = sum(path.is_file() for path in place.release.rglob("*")) - 1
    assert lines == [
        "files: 1 in the first alone (README.md)",
        "files: 1 in the second alone (more/notes\x1b[2J.txt)",
        f"files: 2 of {shared} in both differ on disk (LICENSE, {image.relative_to(other).as_posix()})",
    ]


def test_what_a_release_says_cannot_act_on_a_terminal(place, tmp_path):
    other = tmp_path / "release"
    shutil.copytree(place.release, other)
    (other / "a\x1b]0;title\x07b\u202e").touch()
    config = other / "provenance/config.json"
    write_json(config, json.loads(config.read_text()) | {"title": "t\x1b[31m\r"})
    for arguments in (["diff", place.release, other], ["explain", "sub-nobody\x1b[1m", other]):
        done = subprocess.run(
            [sys.executable, "-m", "meddiff_steps", *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parents[2],
        )
        shown = done.stdout + done.stderr
        assert all(c.isprintable() or c == "\n" for c in shown), shown
        assert r"\x1b" in shown


# ------------------------------------------------------------------------------------------------- lineage


def made(step: str, inputs: dict[str, str], outputs: dict[str, str]) -> dict:
    return {
        "step": step,
        "inputs": {
            "config" if path.startswith("config/") else path: [{"path": path, "sha256": digest}]
            for path, digest in inputs.items()
        },
        "outputs": {"y": [{"path": path, "sha256": digest} for path, digest in outputs.items()]},
    }


def test_trace_finds_gaps_old_files_and_circles():
    a = made("a", {"config/a-0123456789abcdef.json": "0"}, {"a": "1"})
    b = made("evaluate", {"a": "1", "external/z": "9"}, {"b": "2"})
    c = made("c", {"b": "2", "a": "other", "nowhere": "5"}, {"c": "3"})
    records = {"a": a, "b": b, "c": c}
    found = lineage.trace({"c": "3"}, records.get)
    assert [record["step"] for record in found.steps()] == ["a", "c", "evaluate"]
    assert found.missing == ["nowhere"] and found.stale == [("a", "other", "1")] and found.cyclic == []
    records["b"] = made("generate", {"a": "1", "external/z": "9", "config/a-0123456789abcdef.json": "0"}, {"b": "2"})
    assert lineage.trace({"c": "3"}, records.get).missing == ["config/a-0123456789abcdef.json", "external/z", "nowhere"]
    records["a"] = made("a", {"c": "3"}, {"a": "1"})
    assert lineage.trace({"c": "3"}, records.get).cyclic != []


def test_a_long_chain_needs_no_deep_stack():
    records = {str(i): made(f"s{i}", {str(i - 1): "d"} if i else {}, {str(i): "d"}) for i in range(5000)}
    assert len(lineage.trace({"4999": "d"}, records.get).steps()) == 5000
