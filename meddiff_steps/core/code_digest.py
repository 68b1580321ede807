"""What a step's code is, a digest over its own module and every module of this package that it imports; and what
weights are.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT.name

#: Modules whose edits do not make a step run again: the values of the config reach a step through its frozen file.
EXEMPT = {f"{PACKAGE}.config", f"{PACKAGE}.errors", f"{PACKAGE}.__main__"}


@cache
def source_of(module: str) -> Path | None:
    """File of a module of this package, or None for anything else.

    Looked for by name: Python's own search would import the packages above it, and with them torch, whenever a workflow
    starts.
    """
    package, *parts = module.split(".")
    if package != PACKAGE:
        return None
    place = ROOT.joinpath(*parts)
    return next((path for path in (place / "__init__.py", place.with_suffix(".py")) if path.is_file()), None)


@cache
def _parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


@cache
def _content(source: Path) -> bytes:
    """A source without comments and layout."""
    return ast.dump(_parsed(source)).encode()


@cache
def imports_of(module: str) -> frozenset[str]:
    """Modules of this package that `module` imports, also inside functions."""
    source = source_of(module)
    if source is None:
        return frozenset()
    found = set()
    for node in ast.walk(_parsed(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(name for name in found if source_of(name) is not None)


@cache
def code_digest(step: str) -> str:
    """Digest of all sources that step `step` runs, 16 hexadecimal digits; comments and layout do not count."""
    reached: set[str] = set()
    waiting = [f"{PACKAGE}.steps.{step}"]
    while waiting:
        module = waiting.pop()
        if module not in reached | EXEMPT:
            reached.add(module)
            waiting += imports_of(module)
    digest = hashlib.sha256()
    for module in sorted(reached):
        source = source_of(module)
        if source is not None:
            digest.update(module.encode() + b"\0" + _content(source) + b"\0")
            # Text beside the code that it renders.
            for template in sorted(source.parent.glob("*.jinja")):
                digest.update(template.read_bytes())
    return digest.hexdigest()[:16]
