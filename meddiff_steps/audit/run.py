"""Audit of a release: what can be checked of a synthetic cohort, level by level.

L0 form, L1 integrity and signature, L2 completeness (these three are mostly `verify`, which needs Python alone), L3
lineage (`chain`), L4 consistency of recipes and statements, L5 content; with the models L6 makes images again, with the
real scans L7 compares with them again. Every level says what it found, or that it did not run and why.  The checks take
no statement of the release on trust that they can compute themselves; what this version of the package cannot check,
because another one made it, is a note that says so.
"""

from __future__ import annotations

from collections.abc import Iterator

from meddiff_steps.audit import chain, content, form, integrity, recipes, statements
from meddiff_steps.audit.private import check_private
from meddiff_steps.audit.progress import progress
from meddiff_steps.audit.request import Report, Request
from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance import signature, verify
from meddiff_steps.provenance.verify import Check
from meddiff_steps.release import seal, versions
from meddiff_steps.release.sealed import Sealed


def audit(request: Request) -> Report:
    """Run every level that can run.

    Raises
    ------
    UserError
        There is no release with provenance, or the key cannot be read.
    """
    if not (request.release / seal.FOLDER).is_dir():
        raise UserError(
            f"{request.release}: no folder `{seal.FOLDER}`. Give the root of a release; one that was made without a"
            " ledger cannot be audited."
        )
    key = signature.load_public(request.key) if request.key else None
    report = Report(str(request.release))
    try:
        checks, root, read = verify.check_form(request.release)
    except verify.Unreadable as error:
        report.checks = [Check(0, "root-form", "finding", str(error))]
        report.skip(range(1, 8), "the ledger or root.json cannot be read")
        return report
    release = Sealed(request.release, root)
    report.sha256 = release.sha256
    report.checks += [*checks, *form.check_twins(release)]
    sound = not report.found
    report.checks += verify.check_integrity(
        request.release, root, read, request.hash_images, lambda items, total: progress(items, total, "hash")
    )
    report.checks.append(integrity.check_signature(release, key))
    report.checks += verify.check_completeness(request.release, root, read)
    if not sound:
        report.skip(range(3, 8), "L0 found the ledger, the config or the records malformed")
        return report
    report.checks += chain.check_lineage(release)
    if release.study is None:
        report.stopped = True
        report.skip(range(4, 8), f"the config cannot be read; {versions.advice(release.version, 'to check it')}")
        return report
    report.checks += _rows_and_statements(release, request)
    if request.hash_images:
        report.checks += content.check_content(release)
    else:
        report.skip(range(5, 6), "the images were not to be read")
    report.checks += _heavy(release, request)
    return report


def _rows_and_statements(release: Sealed, request: Request) -> Iterator[Check]:
    """L4."""
    checks, tally = recipes.check_recipes(release)
    yield from checks
    yield statements.check_verdict(release, tally)
    yield statements.check_settings(release)
    yield check_private(release, request.private, tally.outcomes)
    yield statements.check_metadata(release)
    yield statements.check_described(release)


def _heavy(release: Sealed, request: Request) -> Iterator[Check]:
    """L6 and L7, which need torch, models and real scans."""
    if request.models is None:
        yield Check(6, "all", "not run", "no models: give --models, a folder with autoencoder/ and diffusion/")
    else:
        from meddiff_steps.audit.reexecution import check_reexecution

        yield from check_reexecution(release, request.models, request.sample, request.seed, request.threads)
    if request.results is None:
        yield Check(7, "all", "not run", "no real scans: give --results, the study's folder")
    else:
        from meddiff_steps.audit.privacy import check_privacy

        yield from check_privacy(release, request.results, request.sample, request.seed)
