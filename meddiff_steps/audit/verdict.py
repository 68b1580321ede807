"""L4 of an audit: the verdict on privacy and its counts follow from the ledger, from the study's limits and from the
figures that the release publishes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from meddiff_steps.audit.recipes import Tally
from meddiff_steps.config import Study
from meddiff_steps.core.choice import chosen
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.privacy.attacks import flagged_as_expected
from meddiff_steps.privacy.size import subjects_needed
from meddiff_steps.privacy.verdict import (
    CALIBRATED,
    COPIES_FOUND,
    FILLED,
    PLAIN,
    SEVERITY,
    STRANGERS,
    limits_of,
    within,
)
from meddiff_steps.provenance import lineage, verify
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release.sealed import Sealed


def check_verdict(release: Sealed, tally: Tally) -> Check:
    """Verdict and counts of the privacy report are those of the ledger and the description."""
    wrong = [*_verdict_problems(release), *_count_problems(release, tally)]
    return judged(4, "verdict", wrong, f"counts and verdict ({_verdict(release)}) fit", "problem(s)")


def _verdict(release: Sealed) -> str:
    """The verdict as it can be shown: a stranger wrote it."""
    said = release.root["privacy"]["verdict"]
    return said if said in SEVERITY else repr(said[:40])


def _verdict_problems(release: Sealed) -> Iterator[str]:
    study, said = release.study, release.root["privacy"]
    assert study is not None
    if said["verdict"] == "FAIL" and study.privacy.enforce == "stop":
        yield "the verdict is FAIL and privacy.enforce is stop, but there is a release"
    described = lineage.read_strictly(release.folder, verify.DESCRIPTION, ascii_only=False)
    if f"Verdict: {said['verdict']}." not in str(described.get("Description")):
        yield f"{verify.DESCRIPTION} does not say the verdict that root.json says, {said['verdict'][:40]!r}"
    if release.is_other:
        return
    facts = described["Facts"]
    if {name: facts["privacy"][name] for name in ("verdict", "counts")} != said:
        yield f"{verify.DESCRIPTION} tells another verdict or other counts than root.json"
    yield from _gate_problems(study, facts["privacy"])
    worst = max((SEVERITY.index(gate["outcome"]) for gate in facts["privacy"]["gates"]), default=None)
    if worst is not None and SEVERITY[worst] != said["verdict"]:
        yield f"the worst outcome of its tests is {SEVERITY[worst]}"
    told = {card["weights_sha256"] for card in facts["models"]}
    named = {digest for kind, digest in release.weights if kind != "tone"}
    if told != named:
        yield f"{verify.DESCRIPTION} tells of other models than the rows name"


def _gate_problems(study: Study, facts: Mapping[str, Any]) -> Iterator[str]:
    """A verdict has all its tests, each is held to the study's own limit, and each outcome follows from its figure."""
    said, counts = facts["calibration"], facts["counts"]
    for name in sorted({*chosen(DETECTORS, study.privacy.detectors, "privacy.detectors")} - {*said["detectors"]}):
        yield f"calibration: {name} is a detector of the study, and did not judge"
    level, sharing = study.privacy.level, len(said["detectors"]) + (study.pairs is not None)
    wanted = {"level": level, "needed": subjects_needed(level, sharing)}
    for name, value in wanted.items():
        if said.get(name) != value:
            yield f"calibration: {name} is {said.get(name)}, by the study {value:g}"
    limits = limits_of(study.privacy, study.covariates, said | wanted, study.diffusion.rare is not None)
    names = [gate["name"] for gate in facts["gates"]]
    for name in sorted({*limits} ^ {*names}):
        yield f"{name}: " + ("is missing from the tests" if name in limits else "is no test of such a study")
    if len(names) > len(set(names)):
        yield "a test is told twice"
    plain = {
        CALIBRATED: said["status"] == "CALIBRATED" and said.get("subjects", 0) >= wanted["needed"],
        FILLED: counts["failed"] + counts["duplicates"] <= study.privacy.max_failed_share * max(1, counts["planned"]),
    }
    for gate in facts["gates"]:
        name, figure, limit = gate["name"], gate["figure"], gate["limit"]
        if limit != limits.get(name, limit):
            yield f"{name}: is held to {limit:g}, and the study says {limits[name]:g}"
        if name not in PLAIN and (found := within(name, figure, limit)) != gate["outcome"]:
            yield f"{name}: {gate['outcome']}, by its interval and limit {found}"
        if name == COPIES_FOUND:
            plain[name] = (figure.get("value") or 0.0) >= limit
        elif name == STRANGERS:
            people = figure.get("n") or 0
            flagged = round((figure.get("value") or 0.0) * people)
            plain[name] = flagged_as_expected(flagged, people, limit, said.get("subjects", 0))
        if name in plain and (gate["outcome"] == "PASS") != plain[name]:
            yield f"{name}: {gate['outcome']}, which does not follow from {figure.get('value')} and its limit {limit:g}"


def _count_problems(release: Sealed, tally: Tally) -> Iterator[str]:
    decisions = tally.decisions
    candidates = sum(made for _, _, made, _ in tally.outcomes.values())
    found = {
        "planned": sum(decisions.values()),
        "released": decisions["released"],
        "duplicates": decisions["duplicate"],
        "failed": decisions["rejected"],
        "candidates": candidates,
        "rejected": candidates - decisions["released"] - decisions["duplicate"],
    }
    counts = release.root["privacy"]["counts"]
    for name in sorted({*found, *counts}):
        if found.get(name) != counts.get(name):
            yield f"{found.get(name)} {name} by the ledger, {counts.get(name)} by the privacy report"
    if release.root["study"] != release.config["study"]:
        yield f"root.json is of study {release.root['study'][:40]!r}, the config of {release.config['study']!r}"
