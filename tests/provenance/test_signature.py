"""Signatures: ours are read by others, and others' test vectors by us."""

from __future__ import annotations

import base64
import hashlib
import json
import stat

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1
from cryptography.hazmat.primitives.asymmetric.ec import generate_private_key as generate_ec

from meddiff_steps.core.errors import UserError
from meddiff_steps.provenance import signature, verify


@pytest.fixture(scope="module")
def key(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "key.pem"
    signature.generate(path)
    return path


ROOT = {
    "inputs": {"plan.parquet": "cd" * 32},
    "files": {verify.LINES: {"sha256": "ef" * 32}, verify.CONFIG: {"sha256": "01" * 32}},
    "software": {"version": "0.1"},
}
STATEMENT = verify.statement(ROOT, "ab" * 32, {"seed": "x", "count": 2**53 - 1, "scale": 1.5})


def test_securesystemslib_accepts_the_envelope_and_refuses_a_changed_one(key):
    dsse = pytest.importorskip("securesystemslib.dsse")
    signer = pytest.importorskip("securesystemslib.signer")
    private = signature.load_private(key)
    content = signature.sign(STATEMENT, private)
    public = signer.SSlibKey.from_crypto(private.public_key(), keyid=signature.key_id(private.public_key()))
    envelope = dsse.Envelope.from_dict(json.loads(json.dumps(content)))
    assert list(envelope.verify([public], 1)) == [public.keyid]
    assert json.loads(envelope.payload) == STATEMENT
    broken = content | {
        "payload": base64.b64encode(base64.b64decode(content["payload"]).replace(b"ab", b"ac", 1)).decode()
    }
    with pytest.raises(Exception, match="threshold|signatures"):
        dsse.Envelope.from_dict(broken).verify([public], 1)


def test_the_pre_authentication_encoding_of_the_dsse_protocol():
    # https://github.com/secure-systems-lab/dsse/blob/master/protocol.md
    assert verify.pre_authentication(b"hello world") == b"DSSEv1 28 application/vnd.in-toto+json 11 hello world"


def test_the_statement_has_the_form_of_in_toto_and_slsa():
    assert (
        STATEMENT["_type"] == "https://in-toto.io/Statement/v1"
        and STATEMENT["predicateType"] == "https://slsa.dev/provenance/v1"
    )
    assert STATEMENT["subject"][0] == {"name": "provenance/root.json", "digest": {"sha256": "ab" * 32}}
    predicate = STATEMENT["predicate"]
    assert set(predicate) == {"buildDefinition", "runDetails"} and predicate["runDetails"]["builder"]["id"]
    assert set(predicate["buildDefinition"]) == {"buildType", "externalParameters", "resolvedDependencies"}


def test_signing_is_deterministic_and_both_programs_accept_it(key):
    private = signature.load_private(key)
    envelope = signature.sign(STATEMENT, private)
    assert envelope == signature.sign(STATEMENT, private)
    public, signed = signature.load_public(key.with_name("key.pem.pub")), envelope["signatures"][0]["sig"]
    message = verify.pre_authentication(base64.b64decode(envelope["payload"]))
    for valid in (signature.valid, verify.ed25519_valid):
        assert valid(public, message, base64.b64decode(signed))
        assert not valid(public, message + b"x", base64.b64decode(signed))
        assert not valid(public, message, b"")


def test_a_key_is_private_and_never_overwritten(key):
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    with pytest.raises(UserError, match="never overwritten"):
        signature.generate(key)


def test_what_is_no_key_is_refused(tmp_path, key):
    with pytest.raises(UserError, match="keygen"):
        signature.load_private(tmp_path / "none.pem")
    with pytest.raises(UserError, match="not usable"):
        signature.load_private(key.with_name("key.pem.pub"))
    with pytest.raises(UserError, match="public key"):
        signature.load_public(key)
    other = generate_ec(SECP256R1())
    pem = other.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ec.pem").write_bytes(pem)
    with pytest.raises(UserError, match="expected an ed25519 key"):
        signature.load_private(tmp_path / "ec.pem")
    (tmp_path / "ec.pub").write_bytes(
        other.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    with pytest.raises(UserError, match="not an ed25519 public key"):
        signature.load_public(tmp_path / "ec.pub")
    with pytest.raises(verify.Unreadable, match="not an ed25519 public key"):
        verify.read_public_key(tmp_path / "ec.pub")


@pytest.mark.parametrize(
    ("public", "message", "signed"),
    [
        (  # RFC 8032, section 7.1, tests 1 to 3
            "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
            "",
            "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b",
        ),
        (
            "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
            "72",
            "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00",
        ),
        (
            "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
            "af82",
            "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027beceea1ec40a",
        ),
    ],
)
def test_the_verifier_knows_ed25519_without_a_library(public, message, signed):
    key, content, good = bytes.fromhex(public), bytes.fromhex(message), bytes.fromhex(signed)
    assert verify.ed25519_valid(key, content, good)
    assert not verify.ed25519_valid(key, content + b"x", good)
    assert not verify.ed25519_valid(key, content, good[:-1] + bytes([good[-1] ^ 1]))
    assert not verify.ed25519_valid(key[::-1], content, good)
    order = 2**252 + 27742317777372353535851937790883648493
    malleable = good[:32] + (int.from_bytes(good[32:], "little") + order).to_bytes(32, "little")
    assert not verify.ed25519_valid(key, content, malleable), "a second signature from the first is refused"
    assert not verify.ed25519_valid(key, content, good[:63])


def test_both_implementations_name_a_key_alike(key):
    public = key.with_name("key.pem.pub")
    raw = verify.read_public_key(public)
    assert (
        verify.key_id(signature.load_public(public))
        == hashlib.sha256(bytes.fromhex("302a300506032b6570032100") + raw).hexdigest()
    )
