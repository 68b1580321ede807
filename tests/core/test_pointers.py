"""Files whose content is elsewhere are told from files, and from what is not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from meddiff_steps.core.pointers import not_fetched


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"/annex/objects/MD5E-s6747706--db99fa634eb92335.nii.gz\n", "run `datalad get"),
        (b"../../.git/annex/objects/6k/q0/MD5E-s6--db/MD5E-s6--db.nii.gz", "run `datalad get"),
        (b"..\\..\\.git\\annex\\objects\\6k\\q0\\MD5E-s6--db.nii.gz", "run `datalad get"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n", "run `git lfs pull`"),
        (b"version https://hawser.github.com/spec/v1\noid sha256:00\nsize 12345\n", "run `git lfs pull`"),
    ],
)
def test_pointers(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "a.nii.gz").write_bytes(content)
    assert said in (not_fetched(tmp_path / "a.nii.gz") or "")


def test_links_that_lead_nowhere_and_somewhere(tmp_path: Path) -> None:
    (tmp_path / "my scan.nii").symlink_to(".git/annex/objects/nowhere")
    assert (not_fetched(tmp_path / "my scan.nii") or "").endswith(f"`datalad get '{tmp_path}/my scan.nii'` first")
    (tmp_path / "content").write_bytes(b"\x1f\x8b")
    (tmp_path / "b.nii").symlink_to("content")
    assert not_fetched(tmp_path / "b.nii") is None


@pytest.mark.parametrize("content", [b"", b"participant_id\tage\n", b"\x1f\x8b\x08", b"notes on /annex/objects/"])
def test_other_files_and_what_is_not_there(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a").write_bytes(content)
    assert not_fetched(tmp_path / "a") is None
    assert not_fetched(tmp_path) is None and not_fetched(tmp_path / "none") is None
