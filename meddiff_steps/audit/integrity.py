"""L1 of an audit, beside what `verify` does: who sealed the release."""

from __future__ import annotations

import rfc8785

from meddiff_steps.provenance import signature, verify
from meddiff_steps.provenance.verify import Check
from meddiff_steps.release.sealed import Sealed


def check_signature(release: Sealed, key: bytes | None) -> Check:
    """Who sealed the release: as `verify` reads it, by another program for the arithmetic, and to the byte."""
    found = verify.check_signature(release.folder, release.root, key, signature.valid)
    if found.outcome == "finding" or not release.root["signer"]:
        return found
    payload = verify.read_envelope(release.folder)[2]
    if rfc8785.dumps(verify.load_json(payload)) != payload:
        return Check(1, found.name, "finding", "the statement that was signed is not written canonically (RFC 8785)")
    return found
