import errno
import os
import stat
import subprocess
import sys

import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import LARGEST_JSON, atomic_path, hold, read_json, write_atomic


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "a.txt", b"old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_writers_of_one_file_with_equal_process_numbers_do_not_meet(tmp_path):
    path = tmp_path / "shared.json"
    with atomic_path(
        path
    ) as first:  # this process stands for two containers, both with process 17, that share a folder
        first.write_text("one")
        with atomic_path(path) as second:
            second.write_text("two")
        assert first.name.startswith(".partial-") and first.suffix == ".json"
    assert path.read_text() == "one" and os.listdir(tmp_path) == ["shared.json"]


def test_files_get_the_usual_access_also_where_a_library_is_stricter(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "strict") as path:
        path.touch(mode=0o600)
    assert stat.filemode((tmp_path / "strict").stat().st_mode) == stat.filemode((tmp_path / "plain").stat().st_mode)


HOLDER = (
    "import sys; from meddiff_steps.core.files import hold; stream = hold(sys.argv[1]); print('held', flush=True);"
    " sys.stdin.read()"
)


def test_a_held_file_is_refused_to_others_until_its_holder_dies(tmp_path):
    path = tmp_path / "results" / ".lock"
    first = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"another run works here .process {first.pid} on "):
        hold(path)
    hold(tmp_path / "other" / ".lock").close()
    first.kill()
    first.wait()
    hold(path).close()


def test_where_locks_are_unknown_work_goes_on(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    hold(tmp_path / ".lock").close()
    assert "only one run works here" in caplog.text


def test_json_that_no_step_wrote_is_not_read(tmp_path):
    path = tmp_path / "card.json"
    with open(path, "wb") as file:
        file.truncate(LARGEST_JSON + 1)  # takes no space
    with pytest.raises(UserError, match=r"card\.json: not readable as JSON \(134,217,729 bytes"):
        read_json(path)
    path.write_text("[" * 100_000)
    with pytest.raises(UserError, match="not readable as JSON"):
        read_json(path)
