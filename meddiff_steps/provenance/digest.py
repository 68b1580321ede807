"""What a step's code is: a digest over its own module and every module of this package that it imports."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from importlib.util import find_spec
from pathlib import Path

PACKAGE = "meddiff_steps"

#: Modules whose edits do not make a step run again: the values of the config reach a step through its frozen file.
EXEMPT = {f"{PACKAGE}.config", f"{PACKAGE}.errors", f"{PACKAGE}.__main__"}


@cache
def source_of(module: str) -> Path | None:
    """File of a module of this package, or None for anything else."""
    if module != PACKAGE and not module.startswith(f"{PACKAGE}."):
        return None
    try:
        spec = find_spec(module)
    except ModuleNotFoundError:
        return None
    return Path(spec.origin) if spec and spec.origin else None


@cache
def _parsed(source: Path) -> ast.Module:
    return ast.parse(source.read_text(encoding="utf-8"))


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
            digest.update(f"{module}\0{ast.dump(_parsed(source))}\0".encode())
            # Text beside the code that it renders.
            for template in sorted(source.parent.glob("*.jinja")):
                digest.update(template.read_bytes())
    return digest.hexdigest()[:16]
