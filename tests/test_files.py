import os
import stat

import pytest

from meddiff_steps.files import atomic_path, write_atomic


def test_a_failed_writer_leaves_the_old_file_and_nothing_else(tmp_path):
    write_atomic(tmp_path / "a.txt", b"old")
    with pytest.raises(RuntimeError), atomic_path(tmp_path / "a.txt") as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert (tmp_path / "a.txt").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_files_get_the_usual_access_also_where_a_library_is_stricter(tmp_path):
    (tmp_path / "plain").touch()
    with atomic_path(tmp_path / "strict") as path:
        path.touch(mode=0o600)
    assert stat.filemode((tmp_path / "strict").stat().st_mode) == stat.filemode((tmp_path / "plain").stat().st_mode)
