"""How pages are filled in: all text is escaped, nothing that is missing is passed over, and a page names its script."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path

import jinja2


def environment() -> jinja2.Environment:
    """For the templates of this folder."""
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        keep_trailing_newline=True,
    )


def script_digest(script: str) -> str:
    """As a page's Content-Security-Policy names the one script that may run: SHA-256 in base64."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
