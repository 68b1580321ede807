"""What a step's code is: a digest over exactly those definitions of this package that its `run` can reach.

An edit makes exactly those steps run again that can execute what was edited. Comments, layout, documentation and
annotations are no code. Names are followed, not values: an object's methods count with its class, and a module that is
passed on counts whole.

Beside names
- the variants that a frozen study chooses count where their registry is used; their `ENTRY` does not, for the study has
  what it says of defaults; a `Part` counts where it is used and the study has its section;
- of `config` only the methods and properties of sections count, where something is so called behind a dot: all else
  reaches a step as values, through its frozen study;
- a template counts where a text in code beside it names it.
"""

from __future__ import annotations

import ast
import gc
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registry import ENTRY, Part, Registry
from meddiff_steps.core.sources import TOP, WHOLE, Item, Module, Sources, root_of

ROOT = Path(__file__).resolve().parents[1]
CONFIG, REGISTRIES = "config", "core.registries"
#: Words for people, and what is in a digest by what it decides: which variants, which definitions.
EXEMPT = ("core.errors", "core.registry", REGISTRIES, "core.sources", "core.code_digest", "__main__")
VALIDATORS = {"field_validator", "model_validator"}


def code_digest(step: str, content: Mapping[str, Any] | None = None) -> str:
    """Digest of the code that `step` runs with the frozen study `content` (or its part of it), 16 hexadecimal digits.

    Raises UserError for a step or a variant that there is not, and for code that cannot be followed: star imports, and
    imports of a name that only a run knows.
    """
    return _installed().digest(step, content)


def reached(step: str, content: Mapping[str, Any] | None = None) -> frozenset[str]:
    """What counts for `step`, as "module:definition"; "module:<module>" is what a module does when it is imported."""
    return _installed().reached(step, content)


def files_of(step: str, content: Mapping[str, Any] | None = None) -> tuple[Path, ...]:
    """Files of which something counts for `step`."""
    return _installed().files(step, content)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's search for garbage, which goes through all syntax trees again and again: half of the time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@cache
def _installed() -> Code:
    return Code(ROOT, ROOT.name)


class Code(Sources):
    """The sources of a package of steps. Files are read once: a new object sees what was edited since."""

    def __init__(self, root: Path, package: str, overrides: Mapping[Path, str] | None = None) -> None:
        super().__init__(root, package, overrides)
        self.exempt = {f"{package}.{name}" for name in EXEMPT}
        self._followed: dict[Item, frozenset[Item]] = {}
        self._digests: dict[Item, str] = {}
        self._methods: dict[str, list[Item]] | None = None
        self._known: dict[str, Registry] | None = None

    def digest(self, step: str, content: Mapping[str, Any] | None = None) -> str:
        """As `code_digest`."""
        items = self._closure(step, content)
        lines = sorted(f"{module}:{name} {self._digest_of((module, name))}" for module, name in items)
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]

    def reached(self, step: str, content: Mapping[str, Any] | None = None) -> frozenset[str]:
        """As the function `reached`."""
        return frozenset(f"{module}:{name}" for module, name in self._closure(step, content))

    def files(self, step: str, content: Mapping[str, Any] | None = None) -> tuple[Path, ...]:
        """As `files_of`."""
        return tuple(sorted({path for item in self._closure(step, content) if (path := self.file_of(item))}))

    def _closure(self, step: str, content: Mapping[str, Any] | None) -> list[Item]:
        """Items that count, those without a text left out."""
        start = (f"{self.package}.steps.{step}", "run")
        module = self.module(start[0])
        if module is None or "run" not in module.definitions:
            raise UserError(f"{self.root / 'steps' / step}.py: there is no such step, or it has no function `run`.")
        found: set[Item] = set()
        waiting = [start]
        with _uncollected():
            while waiting:
                item = waiting.pop()
                if item not in found:
                    found.add(item)
                    waiting += (
                        self._follow(item) if item[0] != self._registries else self._chosen(item[1], content or {})
                    )
        return [item for item in found if item[0] not in self.exempt and self.definition(item).text]

    def _follow(self, item: Item) -> frozenset[Item]:
        """Items that one refers to and that may count."""
        if item not in self._followed:
            definition = self.definition(item)
            uses = {use for use in definition.uses if self._counts(use, item)}
            for name in definition.attributes & self._config_methods().keys():
                uses.update(self._config_methods()[name])
            for module, name in definition.uses if definition.loads else ():
                if module == self._registries:
                    for registry in self._registries_at(name):
                        uses.update(self._variants(registry, definition.loads & set(registry.names())))
            self._followed[item] = frozenset(uses)
        return self._followed[item]

    def _counts(self, item: Item, origin: Item) -> bool:
        module, name = item
        if not self._is_config(module):
            return module == self._registries or module not in self.exempt
        # What a method of a section uses of its own floor: no other sections.
        return self._is_config(origin[0]) and name not in (TOP, WHOLE) and not self._classes(item)

    def _classes(self, item: Item) -> list[ast.ClassDef]:
        module = self.module(item[0])
        nodes = module.definitions.get(item[1], ()) if module else ()
        return [node for node in nodes if isinstance(node, ast.ClassDef)]

    def _digest_of(self, item: Item) -> str:
        if item not in self._digests:
            self._digests[item] = hashlib.sha256(self.definition(item).text.encode()).hexdigest()
        return self._digests[item]

    # ---------------------------------------------------------------------------------------------- variants

    @property
    def _registries(self) -> str:
        return f"{self.package}.{REGISTRIES}"

    def _chosen(self, name: str, content: Mapping[str, Any]) -> Iterator[Item]:
        for registry in self._registries_at(name):
            yield from self._variants(registry, registry.chosen(content))
        call = _call_of(self._of_registries().get(name, ()), "Part")
        if call is not None:
            part = Part(*map(ast.literal_eval, call.args))
            if part.is_in(content):
                yield (part.module, WHOLE)

    def _variants(self, registry: Registry, names: Iterable[str]) -> Iterator[Item]:
        """Definitions of some variants, but for their ENTRY."""
        for name in names:
            module = self.module(f"{registry.package}.{name}")
            if module is not None:
                yield from ((module.name, what) for what in (TOP, *module.definitions) if what != ENTRY)

    def _registries_at(self, name: str) -> list[Registry]:
        """The registry that a name of `core.registries` stands for; all of them for a list or a function there."""
        if self._known is None:
            made = {key: _call_of(nodes, "Registry") for key, nodes in self._of_registries().items()}
            self._known = {key: self._registry(call) for key, call in made.items() if call}
        if name in self._known:
            return [self._known[name]]
        of_none = name == TOP or _call_of(self._of_registries().get(name, ()), "Part")
        return [] if of_none else list(self._known.values())

    def _of_registries(self) -> Mapping[str, Iterable[ast.AST]]:
        module = self.module(self._registries)
        return module.definitions if module else {}

    def _registry(self, call: ast.Call) -> Registry:
        given = dict(zip(("kind", "package", "keys"), call.args, strict=False))
        given |= {word.arg: word.value for word in call.keywords if word.arg}
        kind, package, keys = (ast.literal_eval(given.get(name, ast.Tuple([]))) for name in ("kind", "package", "keys"))
        return Registry(kind, package, keys, root=self.root)

    # ------------------------------------------------------------------------------------------------ config

    def _is_config(self, module: str) -> bool:
        return f"{module}.".startswith(f"{self.package}.{CONFIG}.")

    def _config_methods(self) -> dict[str, list[Item]]:
        """Methods and properties of sections by name; no validators, for they run before anything is frozen."""
        if self._methods is None:
            self._methods = defaultdict(list)
            for module in self._config_modules():
                for owner in module.definitions:
                    for method in module.methods(owner):
                        is_validator = VALIDATORS & set(map(root_of, method.decorator_list))
                        if not (is_validator or method.name.startswith("__")):
                            self._methods[method.name].append((module.name, f"{owner}.{method.name}"))
        return self._methods

    def _config_modules(self) -> Iterator[Module]:
        path = self.path(f"{self.package}.{CONFIG}")
        is_package = path is not None and path.name == "__init__.py"
        for file in sorted(path.parent.rglob("*.py")) if path and is_package else filter(None, [path]):
            parts = file.relative_to(self.root).with_suffix("").parts
            module = self.module(".".join((self.package, *(part for part in parts if part != "__init__"))))
            if module is not None:
                yield module


def _call_of(nodes: Iterable[ast.AST], function: str) -> ast.Call | None:
    """The call that a name is assigned, if it is one of `function`."""
    values = (node.value for node in nodes if isinstance(node, (ast.Assign, ast.AnnAssign)))
    return next((value for value in values if isinstance(value, ast.Call) and root_of(value) == function), None)
