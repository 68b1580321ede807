"""Files that stand for content which is elsewhere: links of git-annex and DataLad, pointers of Git LFS."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

#: What a pointer begins with.  Where links cannot be had, git-annex and git write them as text.
_ANNEX = re.compile(rb"[./\\]*(?:\.git)?[/\\]annex[/\\]objects[/\\]")
_LFS = re.compile(rb"version https://(?:git-lfs|hawser)\.github\.com/spec/")
#: Bytes that are looked at.
_HEAD = 1024


def not_fetched(path: Path | str) -> str | None:
    """Why a file that is there has no content, and the command that brings it; None of any other file, and of none."""
    quoted = shlex.quote(str(path))
    if os.path.islink(path) and not os.path.exists(path):
        return f"a link to nothing: with git-annex or DataLad, run `datalad get {quoted}` first"
    if not os.path.isfile(path):
        return None
    try:
        with open(path, "rb") as stream:
            head = stream.read(_HEAD)
    except OSError:
        return None
    if _ANNEX.match(head):
        return f"a pointer of git-annex, not its content: run `datalad get {quoted}` first"
    if _LFS.match(head):
        return "a pointer of Git LFS, not its content: run `git lfs pull` first"
    return None
