"""Variants: samplers, first stages, detectors and the like, each one file that says at its top what it is.

A variant is a module of its kind's package with a literal `ENTRY = {"summary": ..., ...}`. It is read without running
the module: a workflow is parsed in every job of a cluster, and must not import torch for it. Only `load` imports.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from meddiff_steps.core.errors import UserError

ENTRY = "ENTRY"


@dataclass(frozen=True)
class Registry:
    """All variants of one kind. What it has read stays; a new object sees files that were edited or added since.

    Every method raises UserError, with file and field, where an ENTRY is no literal or lacks what it must say.
    """

    kind: str  # as messages call it: "sampler"
    package: str  # where its variants are: "meddiff_steps.diffusion.samplers"
    keys: tuple[str, ...] = ()  # of a study that name variants; the value is a name, a list of names, or None for all
    fields: Mapping[str, type] = field(default_factory=dict, hash=False)  # what an ENTRY must say beside `summary`
    root: Path | None = None  # folder of the top package, where it is not the one that Python imports
    _entries: dict[str, Mapping[str, Any]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def names(self) -> tuple[str, ...]:
        """All variants, by their ENTRY's `order` where it has one, then by name."""
        if not self._entries:
            self._entries.update(self._read())
        return tuple(self._entries)

    def entry(self, name: str) -> Mapping[str, Any]:
        """What a variant says of itself."""
        known = self.names()
        if name not in known:
            close = difflib.get_close_matches(str(name), known, 1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"there is no {self.kind} {name!r}.{hint} Known are {', '.join(known)}.")
        return self._entries[name]

    def load(self, name: str) -> ModuleType:
        """The module of a variant, imported."""
        self.entry(name)
        return importlib.import_module(f"{self.package}.{name}")

    def chosen(self, content: Mapping[str, Any]) -> tuple[str, ...]:
        """Variants that a frozen study, or a stage's part of one, names; keys that it lacks name none."""
        named: set[str] = set()
        for key in self.keys:
            value = _value(content, key)
            named.update(self.names() if value is None else [value] if isinstance(value, str) else value)
        for name in sorted(named):
            self.entry(name)
        return tuple(name for name in self.names() if name in named) if named else ()

    def table(self) -> str:
        """All variants as a Markdown table: a row each, a column per field."""
        columns = ["summary", *self.fields]
        rows = [[self.kind, *(column.replace("_", " ") for column in columns)], ["---"] * (1 + len(columns))]
        rows += [[f"`{name}`", *(_cell(self.entry(name)[column]) for column in columns)] for name in self.names()]
        return "".join(f"| {' | '.join(row)} |\n" for row in rows)

    def _read(self) -> dict[str, Mapping[str, Any]]:
        folder = self._folder()
        entries = {}
        for path in sorted(folder.glob("[!_]*.py")):
            entry = _entry_of(path)
            if entry is not None:
                self._check(path, entry)
                entries[path.stem] = entry
        if not entries:
            raise UserError(f"{folder}: no {self.kind} here. Expected a file per {self.kind} with `{ENTRY} = {{...}}`.")
        return dict(sorted(entries.items(), key=lambda item: (item[1].get("order", math.inf), item[0])))

    def _folder(self) -> Path:
        """Where the variants are, by name: Python's own search would import the packages above them, and torch."""
        top, *parts = self.package.split(".")
        if self.root is not None:
            return self.root.joinpath(*parts)
        found = importlib.util.find_spec(top)
        if found is None or not found.submodule_search_locations:
            raise UserError(f"there is no package {top}, where the {self.kind} variants should be. Install it.")
        return Path(found.submodule_search_locations[0], *parts)

    def _check(self, path: Path, entry: Mapping[str, Any]) -> None:
        for name, kind in {"summary": str, **self.fields, **({"order": int} if "order" in entry else {})}.items():
            if type(entry.get(name)) is not kind:
                found = f"found {entry[name]!r}" if name in entry else "it is missing"
                raise UserError(
                    f"{path}: {ENTRY}[{name!r}] must be of type {kind.__name__}, {found}. Correct the entry."
                )


def _entry_of(path: Path) -> dict[str, Any] | None:
    """What a file's ENTRY says; None where it has none."""
    try:
        body = ast.parse(path.read_text(encoding="utf-8")).body
    except (SyntaxError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as Python ({error}). Correct it.") from None
    for statement in body:
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)):
            continue
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        if any(isinstance(target, ast.Name) and target.id == ENTRY for target in targets):
            try:
                entry = ast.literal_eval(statement.value or ast.Constant(None))
            except (ValueError, TypeError):
                entry = None
            if not isinstance(entry, dict):
                raise UserError(
                    f"{path}, line {statement.lineno}: {ENTRY} must be a dictionary of plain text, numbers and lists, "
                    "for it is read without running the module. Write its values out."
                )
            return entry
    return None


def _value(content: Mapping[str, Any], key: str) -> Any:
    """What a study says at a key with dots; () where it lacks it."""
    value: Any = content
    for part in key.split("."):
        value = value.get(part, ()) if isinstance(value, Mapping) else ()
    return value


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.replace("|", "\\|").split())


@dataclass(frozen=True)
class Part:
    """A module that is code of those studies alone that have a section; others import and count nothing of it."""

    section: str  # of a study: "diffusion.rare"
    module: str  # "meddiff_steps.training.rehearsal"

    def load(self) -> ModuleType:
        """The module, imported."""
        return importlib.import_module(self.module)

    def is_in(self, content: Mapping[str, Any]) -> bool:
        """Whether a frozen study, or a stage's part of one, has the section."""
        return bool(_value(content, self.section))


@dataclass(frozen=True)
class Choice:
    """`Annotated[str, Choice(SAMPLERS)]`: a field of a pydantic model that takes the name of a variant."""

    registry: Registry

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        return core_schema.literal_schema(list(self.registry.names()))

    def __get_pydantic_json_schema__(self, schema: Any, handler: Any) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.registry.names())}
