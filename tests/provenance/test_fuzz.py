"""Whatever a release holds, auditing it ends with a report, in bounded time and memory: every reader, fed at random."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import json
import resource
import shutil
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_release import Place

from meddiff_steps.audit import explain as story
from meddiff_steps.audit.page import as_html, as_text
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import write_json
from meddiff_steps.imaging import encoding
from meddiff_steps.provenance import lineage, verify

#: Time of one audit, which takes a tenth of a second on an idle machine, and memory beyond what is loaded already.
SECONDS, MEMORY = 20, 2 << 30
WHOLE = settings(
    max_examples=40,
    deadline=timedelta(seconds=SECONDS),
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
SMALL = settings(max_examples=200, deadline=timedelta(seconds=2))

#: Values that programs stumble over, beside those that hypothesis thinks of.
ODD = st.sampled_from(
    [None, True, -1, 0, 1 << 53, 1 << 62, 10**30, 1e308, -0.0, "", "a\0b", "\x1b[2J", "../x", "0" * 64, [], {}, [[]]]
)
JSON = st.recursive(
    ODD | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def flat(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("flat"), dims=2, limit=3)


@pytest.fixture(scope="module", params=["volumes", "pictures"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a release that each example changes and puts back."""
    place: Place = request.getfixturevalue("place" if request.param == "volumes" else "flat")
    return Path(shutil.copytree(place.release, tmp_path_factory.mktemp("fuzz") / "release"))


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """No more memory than `MEMORY` beyond what this process has."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextlib.contextmanager
def changed(release: Path, name: str, content: bytes, sealed: bool) -> Iterator[None]:
    """A release with another content of one file, for whose digest root.json may stand."""
    root, path = release / verify.ROOT, release / name
    kept = {root: root.read_bytes(), path: path.read_bytes()}
    try:
        path.write_bytes(content)
        if sealed and name != verify.ROOT:
            told = json.loads(kept[root])
            if name in told["files"]:
                told["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
                write_json(root, told)
        yield
    finally:
        for one, before in kept.items():
            one.write_bytes(before)


def look(release: Path) -> None:
    """Both programs, all that they print, and the commands beside them."""
    with bounded():
        report = audit(Request(release))
        assert {check.outcome for check in report.checks} <= {"pass", "finding", "note", "not run"}
        assert report.found or report.stopped or report.passed
        as_text(report).encode()
        as_html(report).encode()
        json.dumps(report.to_json(), allow_nan=False)
        json.dumps([vars(check) for check in verify.verify(release)])
        for command in (lambda: story.explain(release, "syn000000"), lambda: story.compare(release, release)):
            with contextlib.suppress(UserError):
                command()


def names(release: Path) -> list[str]:
    return sorted(path.relative_to(release).as_posix() for path in release.rglob("*") if path.is_file())


def replaced(value: Any, data: st.DataObject) -> Any:
    """A JSON value in which something is another value, is missing, or is there too much."""
    value = copy.deepcopy(value)
    place = value
    while isinstance(place, (dict, list)) and place:
        key = data.draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
        inner = place[key]
        if not isinstance(inner, (dict, list)) or not inner or data.draw(st.integers(0, 3)) == 0:
            what = data.draw(st.sampled_from(["another", "missing", "more"]))
            if what == "missing":
                del place[key]
            elif what == "more" and isinstance(place, dict):
                place[data.draw(st.text(max_size=8))] = data.draw(JSON)
            else:
                place[key] = data.draw(JSON)
            return value
        place = inner
    return data.draw(JSON)


@WHOLE
@given(data=st.data())
def test_any_value_in_any_json_file(release, data):
    name = data.draw(st.sampled_from([name for name in names(release) if name.endswith((".json", ".jsonl"))]))
    content = (release / name).read_bytes()
    if name == verify.LINES:
        lines = content.splitlines()
        number = data.draw(st.integers(0, len(lines) - 1))
        row = replaced(json.loads(lines[number]), data)
        lines[number] = json.dumps(row, sort_keys=True, separators=(",", ":")).encode()
        content = b"\n".join(lines) + b"\n"
    else:
        readable = name.endswith(verify.DESCRIPTION)
        try:
            content = verify.json_bytes(replaced(json.loads(content), data), ascii_only=not readable)
        except ValueError:  # half a character
            return
    with changed(release, name, content, sealed=data.draw(st.booleans())):
        look(release)


@WHOLE
@given(data=st.data())
def test_any_bytes_in_any_file(release, data):
    name = data.draw(st.sampled_from(names(release)))
    content = bytearray((release / name).read_bytes())
    start = data.draw(st.integers(0, len(content)))
    end = data.draw(st.integers(start, min(len(content), start + 50)))
    content[start:end] = data.draw(
        st.binary(max_size=50) | st.sampled_from([b"[" * 10**5, b"\n" * 10**5, bytes(10**6)])
    )
    with changed(release, name, bytes(content), sealed=data.draw(st.booleans())):
        look(release)


@SMALL
@given(st.binary(max_size=300) | JSON.map(lambda value: json.dumps(value).encode()))
def test_json_is_read_or_refused(content):
    with contextlib.suppress(ValueError):
        value = verify.load_json(content)
        with contextlib.suppress(ValueError):
            assert verify.load_json(verify.json_bytes(value)) == value


@SMALL
@given(JSON)
def test_forms_take_any_value(value):
    for form in (verify.ROOT_FORM, verify.ENVELOPE_FORM):
        assert list(verify.unlike(value, form))
    assert verify.row_problem(value)
    assert not verify.proven(value, "0" * 64)
    with pytest.raises((UserError, TypeError)):
        lineage.check_record(value, "x")


@SMALL
@given(st.text(max_size=40))
def test_paths_stay_in_the_release(name):
    if verify.safe(name):
        assert not name.startswith("/") and ".." not in name.split("/") and "\0" not in name and "\n" not in name


@SMALL
@given(st.binary(max_size=10), st.binary(max_size=64))
def test_no_bytes_pass_for_a_signature(message, signed):
    key = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")  # RFC 8032
    assert not verify.ed25519_valid(key, message, signed)


@SMALL
@given(st.binary(max_size=400), st.sampled_from([(8, 8, 8), (8, 8)]))
def test_images_are_decoded_or_refused(tmp_path_factory, content, shape):
    path = tmp_path_factory.getbasetemp() / ("x.nii.gz" if len(shape) == 3 else "x.png")
    head = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" if len(shape) == 3 else b"\x89PNG\r\n\x1a\n"
    for whole in (content, head + content):
        path.write_bytes(whole)
        with pytest.raises(encoding.Undecodable):
            encoding.decode(path, encoding.Grid(shape, 20.0 if len(shape) == 3 else None))
