"""Audit of a release: what can be checked of a synthetic cohort, level by level.

L0 form, L1 integrity and signature, L2 completeness (these three are mostly `verify`, which needs Python alone), L3
lineage (`chain`), L4 consistency of recipes and statements, L5 content; with the models L6 makes images again, with the
real scans L7 compares with them again. Every level says what it found, or that it did not run and why.  The checks take
no statement of the release on trust that they can compute themselves; what this version of the package cannot check,
because the auditor says that another one made it, is a note that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from meddiff_steps.audit import chain, content, form, integrity, recipes, statements
from meddiff_steps.audit.private import check_private
from meddiff_steps.audit.progress import progress
from meddiff_steps.audit.request import Report, Request
from meddiff_steps.audit.verdict import check_verdict
from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance import signature, verify
from meddiff_steps.provenance.verify import Check
from meddiff_steps.release import seal, versions
from meddiff_steps.release.sealed import Sealed


def audit(request: Request) -> Report:
    """Run every level that can run.

    Whatever a release holds, this ends with a report: a level that stops at something that no release has says so, and
    the report has not passed.

    Raises
    ------
    UserError
        There is no release with provenance, or the key cannot be read.
    """
    if not (request.release / seal.FOLDER).is_dir():
        below = request.release / "release"  # of the results of a study
        raise UserError(
            f"{request.release}: no folder `{seal.FOLDER}`. Give the root of a release; one that was made without a"
            " ledger cannot be audited." + (f" Did you mean {below}?" if (below / seal.FOLDER).is_dir() else "")
        )
    key = signature.load_public(request.key) if request.key else None
    report = Report(str(request.release))
    try:
        checks, root, read = verify.check_form(request.release)
    except verify.Unreadable as error:
        report.checks = [Check(0, "root-form", "finding", str(error))]
        report.skip(range(1, 8), "the ledger or root.json cannot be read")
        return report
    release = Sealed(request.release, root, request.version)
    report.sha256 = release.sha256
    report.checks += checks
    _run(report, 0, lambda: form.check_twins(release))
    sound = not report.found and not report.stopped
    report.checks += _version(release, request)
    _run(report, 1, lambda: _integrity(release, read, request, key))
    _run(report, 2, lambda: verify.check_completeness(request.release, root, read))
    if not sound:
        report.skip(range(3, 8), "L0 found the ledger, the config or the records malformed")
        return report
    _run(report, 3, lambda: chain.check_lineage(release))
    if release.study is None:
        report.stopped = True
        report.skip(range(4, 8), f"the config cannot be read; {versions.advice(release.version, 'to check it')}")
        return report
    _run(report, 4, lambda: _rows_and_statements(release, request))
    if request.hash_images:
        _run(report, 5, lambda: content.check_content(release, request.threads))
    else:
        report.skip(range(5, 6), "the images were not to be read")
    _run(report, 6, lambda: _re_execution(release, request))
    _run(report, 7, lambda: _privacy(release, request))
    return report


def _run(report: Report, level: int, checks: Callable[[], Iterable[Check]]) -> None:
    """Add the checks of a level to a report, as far as they come."""
    try:
        for check in checks():
            report.checks.append(check)
    except Exception as error:  # noqa: BLE001 what a stranger wrote can end in anything, but must not end the audit
        report.stopped = True
        reason = f"stopped at what no release has ({type(error).__name__}: {error})"
        report.checks.append(Check(level, "all", "not run", reason))


def _version(release: Sealed, request: Request) -> Iterator[Check]:
    """The version is the auditor's to judge: what a release says of it changes no other check."""
    stated = versions.stated(release.root["software"]["version"])
    if stated != request.version:
        text = f"{versions.advice(stated, 'to audit it')}. This audit goes by version {request.version}; give --version"
        yield Check(0, "version", "finding", f"{text} if you know from elsewhere that the publisher used another")


def _integrity(release: Sealed, read: verify.Ledger, request: Request, key: bytes | None) -> Iterator[Check]:
    """L1."""
    found = verify.check_integrity(
        request.release,
        release.root,
        read,
        request.hash_images,
        lambda items, total: progress(items, total, "hash"),
    )
    for check in found:
        if check.name == "verifier" and check.outcome == "finding" and release.is_other:
            yield Check(1, check.name, "note", f"{check.text}; {versions.advice(release.version, 'to compare it')}")
        else:
            yield check
    yield integrity.check_signature(release, key)


def _rows_and_statements(release: Sealed, request: Request) -> Iterator[Check]:
    """L4."""
    checks, tally = recipes.check_recipes(release)
    yield from checks
    yield check_verdict(release, tally)
    yield statements.check_settings(release)
    yield check_private(release, request.private, tally.outcomes)
    yield statements.check_metadata(release)
    yield statements.check_described(release)


def _re_execution(release: Sealed, request: Request) -> Iterator[Check]:
    """L6, which needs torch and models."""
    if request.models is None:
        yield Check(6, "all", "not run", "no models: give --models, a folder with autoencoder/ and diffusion/")
    else:
        from meddiff_steps.audit.measurements import check_measurements
        from meddiff_steps.audit.reexecution import check_reexecution

        yield from check_reexecution(release, request.models, request.sample, request.seed, request.threads)
        yield from check_measurements(release, request.models, request.sample, request.seed, request.threads)


def _privacy(release: Sealed, request: Request) -> Iterator[Check]:
    """L7, which needs torch and real scans."""
    if request.results is None:
        yield Check(7, "all", "not run", "no real scans: give --results, the study's folder")
    else:
        from meddiff_steps.audit.privacy import check_privacy

        yield from check_privacy(release, request.results, request.sample, request.seed, request.threads)
