"""Signatures: ed25519 over a DSSE envelope that holds an in-toto statement with SLSA provenance.

A signature says that the holder of a key published this release.  It does not say that the run took place, nor when.

Sources: DSSE 1.0.2 (https://github.com/secure-systems-lab/dsse, protocol.md), in-toto Statement v1, SLSA provenance v1.
Written by hand because the libraries for it turn 64-bit integers into floats; `securesystemslib` reads it (tested).
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import rfc8785
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance import verify


def sign(content: Mapping[str, Any], key: Ed25519PrivateKey) -> dict[str, Any]:
    """A DSSE envelope around a statement (`verify.statement`); the same content and key give the same envelope."""
    payload = rfc8785.dumps(dict(content))
    signed = key.sign(verify.pre_authentication(payload))
    return {
        "payloadType": verify.PAYLOAD_TYPE,
        "payload": base64.b64encode(payload).decode(),
        "signatures": [{"keyid": key_id(key.public_key()), "sig": base64.b64encode(signed).decode()}],
    }


def valid(key: bytes, message: bytes, signed: bytes) -> bool:
    """`verify.ed25519_valid` by another program for the arithmetic."""
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signed, message)
    except (InvalidSignature, ValueError):
        return False
    return True


# ----------------------------------------------------------------------------------------------------- keys


def key_id(key: Ed25519PublicKey) -> str:
    """SHA-256 of the public key in its standard form (SubjectPublicKeyInfo, DER), as hex."""
    return verify.key_id(key.public_bytes_raw())


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


def load_public(path: Path) -> bytes:
    """A public key in PEM, 32 bytes.

    Raises
    ------
    UserError
        The file is missing, or holds no ed25519 public key or a weak one.
    """
    try:
        return verify.read_public_key(path)
    except verify.Unreadable as error:
        raise UserError(f"{error}. Ask the publisher for the .pub file that `keygen` wrote.") from None
