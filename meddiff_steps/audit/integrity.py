"""L1 of an audit, beside what `verify` does: who sealed the release."""

from __future__ import annotations

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import read_json, sha256_file
from meddiff_steps.provenance import signature, verify
from meddiff_steps.provenance.verify import Check
from meddiff_steps.release import seal
from meddiff_steps.release.sealed import Sealed


def check_signature(release: Sealed, key: signature.Ed25519PublicKey | None) -> Check:
    """Who sealed the release; the same rules as `verify.check_signature`, by another program for the arithmetic."""
    if key is None or not (release.folder / seal.SIGNATURE).is_file():
        return verify.check_signature(release.folder, release.root, b"no key" if key else None)
    digest = sha256_file(release.folder / seal.ROOT)
    try:
        statement = signature.verify(read_json(release.folder / seal.SIGNATURE), key)
        subjects = {entry["name"]: entry["digest"]["sha256"] for entry in statement["subject"]}
    except (UserError, KeyError, TypeError) as error:
        return Check(1, "signature", "finding", f"{seal.SIGNATURE}: {error}")
    if subjects.get(seal.ROOT) != digest:
        named = str(subjects.get(seal.ROOT))
        return Check(
            1,
            "signature",
            "finding",
            f"the signature is valid, but of another release: it names root.json {named[:16]}, here it is"
            f" {digest[:16]}",
        )
    return Check(1, "signature", "pass", f"root.json, SHA-256 {digest}, is signed by key {signature.key_id(key)[:16]}")
