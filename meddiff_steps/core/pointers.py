"""Files that stand for content which is elsewhere: links of git-annex and DataLad, pointers of Git LFS."""

from __future__ import annotations

import os
import re
from pathlib import Path

#: What a pointer begins with.  Where links cannot be had, git-annex and git write them as text.
_ANNEX = re.compile(rb"[./\\]*(?:\.git)?[/\\]annex[/\\]objects[/\\]")
_LFS = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/")
#: Bytes that are looked at.
_HEAD = 1024


def not_fetched(path: Path | str, content: bytes | None = None) -> str | None:
    """Why a file that is there has no content, and the command that brings it; None for any other file.

    Parameters
    ----------
    path
        The file.
    content
        What it begins with, if it was read already.
    """
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to nothing: with git-annex or DataLad, run `datalad get {path}` first"
    if content is None:
        try:
            with open(path, "rb") as stream:
                content = stream.read(_HEAD)
        except OSError:
            return None
    if _ANNEX.match(content[:_HEAD]):
        return f"a pointer of git-annex, not its content: run `datalad get {path}` first"
    if _LFS.match(content[:_HEAD]):
        return "a pointer of Git LFS, not its content: run `git lfs pull` first"
    return None
