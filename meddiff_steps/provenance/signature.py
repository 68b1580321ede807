"""Signatures: ed25519 over a DSSE envelope that holds an in-toto statement with SLSA provenance.

A signature says that the holder of a key published this release.  It does not say that the run took place, nor when.

Sources: DSSE 1.0.2 (https://github.com/secure-systems-lab/dsse, protocol.md), in-toto Statement v1, SLSA provenance v1.
Written by hand because the libraries for it turn 64-bit integers into floats; `securesystemslib` reads it (tested).
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meddiff_steps import __version__
from meddiff_steps.core.canonical import canonical_bytes
from meddiff_steps.core.errors import UserError

PAYLOAD_TYPE = "application/vnd.in-toto+json"
STATEMENT_TYPE = "https://in-toto.io/Statement/v1"
PREDICATE_TYPE = "https://slsa.dev/provenance/v1"
#: Names of a kind of build, not addresses of pages.
BUILD_TYPE = "urn:meddiff-steps:synthetic-cohort:v1"
BUILDER = "urn:meddiff-steps:workflow"


def pre_authentication(payload_type: str, payload: bytes) -> bytes:
    """What is signed: DSSE's PAE, "DSSEv1" and both parts, each after its length in bytes."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)


def statement(
    subjects: Mapping[str, str], parameters: Mapping[str, Any], dependencies: Mapping[str, str]
) -> dict[str, Any]:
    """An in-toto statement: these files (SHA-256 by name) were made with these parameters from these dependencies."""
    return {
        "_type": STATEMENT_TYPE,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in subjects.items()],
        "predicateType": PREDICATE_TYPE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": dict(parameters),
                "resolvedDependencies": [
                    {"name": name, "digest": {"sha256": digest}} for name, digest in dependencies.items()
                ],
            },
            "runDetails": {"builder": {"id": BUILDER, "version": {"meddiff_steps": __version__}}},
        },
    }


def sign(content: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """A DSSE envelope around a statement; the same content and key give the same envelope."""
    payload = canonical_bytes(dict(content))
    return {
        "payloadType": PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [
            {
                "keyid": key_id(key.public_key()),
                "sig": base64.b64encode(key.sign(pre_authentication(PAYLOAD_TYPE, payload))).decode(),
            }
        ],
    }


def verify(envelope: Any, key: Ed25519PublicKey) -> dict[str, Any]:
    """The statement in an envelope that `key` signed.

    Raises
    ------
    UserError
        It is no envelope, was signed by another key, or was changed after it was signed.
    """
    try:
        payload_type, payload = envelope["payloadType"], base64.b64decode(envelope["payload"], validate=True)
        signatures = [
            (entry.get("keyid"), base64.b64decode(entry["sig"], validate=True)) for entry in envelope["signatures"]
        ]
        content = json.loads(payload)
    except (KeyError, TypeError, ValueError, AttributeError, binascii.Error) as error:
        raise UserError(f"not a DSSE envelope ({type(error).__name__}: {error})") from None
    if payload_type != PAYLOAD_TYPE or not isinstance(content, dict):
        raise UserError(f"the envelope holds {payload_type!r}, expected {PAYLOAD_TYPE!r}")
    for _, signed in signatures:  # the key id is a hint that anybody can write
        try:
            key.verify(signed, pre_authentication(payload_type, payload))
        except InvalidSignature:
            continue
        return content
    named = ", ".join(str(name)[:16] for name, _ in signatures) or "nobody"
    raise UserError(
        f"no valid signature by key {key_id(key)[:16]} (it names {named}): signed by another key, or changed after it"
        " was signed"
    )


# ----------------------------------------------------------------------------------------------------- keys


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the public key in its standard form (SubjectPublicKeyInfo, DER), as hex."""
    return hashlib.sha256(
        key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    ).hexdigest()


def generate(path: Path) -> tuple[Path, str]:
    """Make a key: the private one at `path` (PEM, readable by its owner alone), the public one beside it as .pub.

    Returns
    -------
    (Path, str)
        The public key's file and its id.

    Raises
    ------
    UserError
        One of the two files exists; a key is never overwritten.
    """
    public_path = path.with_name(f"{path.name}.pub")
    for place in (path, public_path):
        if place.exists():
            raise UserError(
                f"{place}: exists already, and a key is never overwritten. Give another name, or move the old key away."
            )
    key = Ed25519PrivateKey.generate()
    path.parent.mkdir(parents=True, exist_ok=True)
    content = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as stream:
        stream.write(content)
    public_path.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    return public_path, key_id(key.public_key())


def load_private(path: Path) -> Ed25519PrivateKey:
    """The key that `keygen` wrote.

    Raises
    ------
    UserError
        The file is missing or holds no unencrypted ed25519 private key.
    """
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"release.signing_key {path}: not usable ({error}). Make one: python -m meddiff_steps keygen --out KEY.pem"
        ) from None
    if not isinstance(key, Ed25519PrivateKey):
        raise UserError(
            f"release.signing_key {path}: expected an ed25519 key, found {type(key).__name__}. Make one: python -m"
            " meddiff_steps keygen --out KEY.pem"
        )
    return key


def load_public(path: Path) -> Ed25519PublicKey:
    """A public key in PEM.

    Raises
    ------
    UserError
        The file is missing or holds no ed25519 public key.
    """
    try:
        key = serialization.load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UserError(
            f"--key {path}: not a public key in PEM ({error}). Ask the publisher for the .pub file that `keygen` wrote."
        ) from None
    if not isinstance(key, Ed25519PublicKey):
        raise UserError(
            f"--key {path}: expected an ed25519 key, found {type(key).__name__}. Ask the publisher for the .pub file"
            " that `keygen` wrote."
        )
    return key
