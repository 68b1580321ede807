"""The sources of a package as definitions that refer to one another; they are parsed, never imported.

An *item* is a pair of a module and what it defines at its top: a function, a class, a name that is assigned to; or a
method, "Class.method", where one is asked for alone. `TOP` stands for what a module does when it is imported beside
binding names, `WHOLE` for all of it, `FILE` for its text. A template is an item of the package that it lies in.
"""

from __future__ import annotations

import ast
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeGuard

from meddiff_steps.core.errors import UserError

Item = tuple[str, str]
#: What an import binds a name to: a module, and the names behind it: ("a.b", ()) or ("a.b", ("f",)).
Target = tuple[str, tuple[str, ...]]
#: Names that functions bind: to parts of this package, or, by an empty list, to something else.
Names = Mapping[str, Sequence[Target]]
Method = ast.FunctionDef | ast.AsyncFunctionDef
Function = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
NAMED = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
Comprehension = ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
TARGETS = (ast.Tuple, ast.List, ast.Starred)

TOP, WHOLE, FILE = "<module>", "*", "__file__"
TEMPLATE = ".jinja"


@dataclass(frozen=True)
class Definition:
    """An item: its text without comments, layout, documentation and annotations, and what it refers to."""

    text: str
    uses: frozenset[Item] = frozenset()
    attributes: frozenset[str] = frozenset()  # names behind a dot, whatever object is before it
    loads: frozenset[str] = frozenset()  # texts that something's `load` is called with


class Module:
    """A file: what it defines and imports at its top, and what it does beside."""

    def __init__(self, name: str, path: Path, text: str) -> None:
        self.name, self.path, self.text = name, path, text
        self.is_package = path.name == "__init__.py"
        self.definitions: dict[str, list[ast.AST]] = defaultdict(list)
        self.imports: dict[str, list[Target]] = defaultdict(list)  # from this package
        self.foreign: dict[str, list[str]] = defaultdict(list)  # from others, by their full names
        self.effects: list[ast.AST] = []
        self.imported: set[str] = set()
        try:
            self._index(ast.parse(text).body, ())
        except SyntaxError as error:
            raise UserError(f"{path}: not readable as Python ({error}). Correct it.") from None

    def _index(self, body: Sequence[ast.stmt], guards: tuple[ast.AST, ...]) -> None:
        """Sort statements; `guards` are the conditions that they stand under, and count with them."""
        for node in body:
            if isinstance(node, ast.If):
                within = self._head([node.test], guards)
                self._index([] if _never_runs(node.test) else node.body, within)
                self._index(node.orelse, within)
            elif isinstance(node, (ast.Try, ast.TryStar)):
                within = (*guards, *(handler.type for handler in node.handlers if handler.type))
                for block in (node.body, *(handler.body for handler in node.handlers), node.orelse, node.finalbody):
                    self._index(block, within)
            elif isinstance(node, ast.With):
                self._index(node.body, self._head(node.items, guards))
            elif isinstance(node, IMPORTS):
                self._import(node, guards)
            elif isinstance(node, NAMED):
                self._define([node], [node.name], guards)
            elif isinstance(node, (ast.Assign, ast.AnnAssign, ast.AugAssign)):
                self._define([node], _stored([node]), guards)
                if _writes_elsewhere(node):
                    self.effects += [*guards, node]
            elif not (isinstance(node, ast.Pass) or _is_text(node)):
                self._define([node], _stored([node]), guards)
                self.effects += [*guards, node]
                for inner in ast.walk(node):
                    if isinstance(inner, IMPORTS):
                        self._import(inner, guards)

    def _head(self, nodes: Sequence[ast.AST], guards: tuple[ast.AST, ...]) -> tuple[ast.AST, ...]:
        """The guards of what stands under a condition or in a `with`; a call in it is done whatever is below."""
        self._define(nodes, _stored(nodes), guards)
        if any(isinstance(inner, ast.Call) for node in nodes for inner in ast.walk(node)):
            self.effects += [*guards, *nodes]
        return (*guards, *nodes)

    def _define(self, nodes: Sequence[ast.AST], names: Iterable[str], guards: tuple[ast.AST, ...]) -> None:
        for name in names:
            self.definitions[name] += [*guards, *nodes]

    def _import(self, node: ast.Import | ast.ImportFrom, guards: tuple[ast.AST, ...]) -> None:
        for name, (module, path) in self.bound_by(node):
            if self._is_ours(module):
                self.imports[name].append((module, path))
            else:
                self.foreign[name].append(".".join((module, *path)))
            if guards:
                self._define([], [name], guards)
        self.imported.update(self.run_by(node))

    def bound_by(self, node: ast.Import | ast.ImportFrom) -> Iterator[tuple[str, Target]]:
        """Names that an import binds, and what each stands for."""
        base = self._base(node)
        for alias in node.names:
            if alias.name == "*":
                raise UserError(
                    f"{self.path}, line {node.lineno}: `from ... import *` hides what the code of a step is, "
                    "and is not allowed in this package. Name what you import."
                )
            if base is None:
                top = alias.name.partition(".")[0]
                yield (alias.asname, (alias.name, ())) if alias.asname else (top, (top, ()))
            elif base == self.name:  # `from . import part` in a package
                yield alias.asname or alias.name, (f"{base}.{alias.name}", ())
            else:
                yield alias.asname or alias.name, (base, (alias.name,))

    def run_by(self, node: ast.Import | ast.ImportFrom) -> set[str]:
        """Modules of this package that an import runs, if they are any."""
        base = self._base(node)
        names = {alias.name if base is None else f"{base}.{alias.name}" for alias in node.names} | {base or self.name}
        return {name for name in names if self._is_ours(name)}

    def _base(self, node: ast.Import | ast.ImportFrom) -> str | None:
        """The module that something is imported from, by its full name; None for a plain `import`."""
        if isinstance(node, ast.Import):
            return None
        parts = self.name.split(".")
        above = parts[: len(parts) - node.level + self.is_package] if node.level else []
        return ".".join([*above, *([node.module] if node.module else [])])

    def _is_ours(self, name: str) -> bool:
        return name.partition(".")[0] == self.name.partition(".")[0]

    def methods(self, owner: str, name: str | None = None) -> list[Method]:
        """Methods of a class, or those of one name: a property may have a setter."""
        classes = [node for node in self.definitions.get(owner, ()) if isinstance(node, ast.ClassDef)]
        found = [
            node for one in classes for node in one.body if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        ]
        return [node for node in found if name in (None, node.name)]

    def registered(self) -> Iterator[str]:
        """Definitions under a decorator of this package: it may put them where they are found without their name."""
        for name, nodes in self.definitions.items():
            for node in nodes:
                for decorator in getattr(node, "decorator_list", ()) if isinstance(node, NAMED) else ():
                    root = root_of(decorator)
                    if root in self.definitions or root in self.imports:
                        yield name


class Sources:
    """Files of the package `package` in the folder `root`; `overrides` has texts to take instead of some files' own."""

    def __init__(self, root: Path, package: str, overrides: Mapping[Path, str] | None = None) -> None:
        self.root, self.package, self.overrides = Path(root), package, dict(overrides or {})
        self._modules: dict[str, Module | None] = {}
        self._definitions: dict[Item, Definition] = {}
        self._templates: dict[Path, list[Path]] = {}

    def path(self, module: str) -> Path | None:
        """File of a module of this package, or None for anything else."""
        top, *parts = module.split(".")
        place = self.root.joinpath(*parts)
        if top != self.package:
            return None
        return next(
            (p for p in (place / "__init__.py", place.with_suffix(".py")) if p.is_file() or p in self.overrides), None
        )

    def module(self, name: str) -> Module | None:
        """A module of this package, parsed, or None for anything else."""
        if name not in self._modules:
            path = self.path(name)
            self._modules[name] = None if path is None else Module(name, path, self._text(path))
        return self._modules[name]

    def definition(self, item: Item) -> Definition:
        """An item's text, and what it refers to; empty for what there is not."""
        if item not in self._definitions:
            self._definitions[item] = self._define(item)
        return self._definitions[item]

    def file_of(self, item: Item) -> Path | None:
        """Where an item is written."""
        path = self.path(item[0])
        return path.parent / item[1] if path is not None and item[1].endswith(TEMPLATE) else path

    def _read(self, module: Module, nodes: Sequence[ast.AST]) -> Definition:
        reader = _Reader(self, module)
        for node in nodes:
            reader.visit(node, {})
        text = "\n".join([*map(_text_of, nodes), *sorted(reader.meanings)])
        return Definition(text, frozenset(reader.uses), frozenset(reader.attributes), frozenset(reader.loads))

    def _define(self, item: Item) -> Definition:
        name, what = item
        module = self.module(name)
        if module is None:
            return Definition("")
        if what == TOP:
            found = self._read(module, module.effects)
            ran = {(other, TOP) for other in (*module.imported, *_above(name))}
            return replace(found, uses=found.uses | ran | {(name, other) for other in module.registered()})
        if what == WHOLE:
            passed_on = [target for targets in module.imports.values() for target in targets if module.is_package]
            uses = {item for target in passed_on for item in self.named(*target)}
            return Definition("", frozenset(uses | {(name, other) for other in (*module.definitions, TOP)}))
        if what == FILE:
            return Definition(module.text)
        if what.endswith(TEMPLATE):
            text = self._text(module.path.parent / what)
            return Definition(text, frozenset((name, other) for other in self.templates_in(module, text)))
        owner, _, method = what.partition(".")
        found = self._read(module, module.methods(owner, method) if method else module.definitions.get(what, ()))
        return replace(found, uses=found.uses | {(name, TOP)})

    def named(self, module: str, path: tuple[str, ...]) -> Iterator[Item]:
        """What the names in `path` lead to, one behind another from a module."""
        found = self.module(module)
        if found is None:
            return
        if not path:
            yield module, WHOLE
            return
        yield module, TOP
        first, rest = path[0], path[1:]
        for target, names in found.imports.get(first, ()):
            yield from self.named(target, (*names, *rest))
        if first in found.definitions:
            yield module, first
        elif first not in found.imports:
            if self.path(f"{module}.{first}"):
                yield from self.named(f"{module}.{first}", rest)
            elif first in (FILE, "__doc__"):
                yield module, FILE
            elif first != "__name__":
                yield module, WHOLE  # nobody sees where it comes from

    def templates_in(self, module: Module, text: str) -> Iterator[str]:
        """Templates beside a module that a text names, also with a part of their file's name."""
        folder = module.path.parent
        if folder not in self._templates:
            self._templates[folder] = sorted(folder.glob(f"*{TEMPLATE}"))
        return (path.name for path in self._templates[folder] if path.name in text or text in path.name)

    def _text(self, path: Path) -> str:
        return self.overrides[path] if path in self.overrides else path.read_text(encoding="utf-8")


class _Reader:
    """Goes through a definition: notes what it refers to, and strips what is not code."""

    def __init__(self, sources: Sources, module: Module) -> None:
        self.sources, self.module = sources, module
        self.uses: set[Item] = set()
        self.attributes: set[str] = set()
        self.loads: set[str] = set()
        self.meanings: set[str] = set()  # of names that are imported: another import of the same name is other code

    def visit(self, node: ast.AST, local: Names) -> None:
        """`local` has the names that functions around `node` bind."""
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load):
                self._name(node.id, (), local)
        elif isinstance(node, ast.Attribute):
            self._attribute(node, local)
        elif isinstance(node, ast.Constant):
            if isinstance(node.value, str) and TEMPLATE in node.value:
                self._templates(node.value)
        elif isinstance(node, FUNCTIONS):
            self._function(node, local)
        elif isinstance(node, ast.ClassDef):
            self._class(node, local)
        elif isinstance(node, COMPREHENSIONS):
            self._comprehension(node, local)
        elif isinstance(node, IMPORTS):
            self.uses |= {(name, TOP) for name in self.module.run_by(node)}
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
            self._inside(node, local)
        elif _is_skipped(node):
            node.body = []
            self._inside(node, local)
        else:
            if isinstance(node, ast.Call):
                self._call(node)
            if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name):  # a `global` one is read as well
                self._name(node.target.id, (), local)
            self._inside(node, local)

    def _inside(self, node: ast.AST, local: Names, besides: tuple[str, ...] = ()) -> None:
        for name in node._fields:
            value = getattr(node, name, None)
            if name in besides or isinstance(value, ast.expr_context):
                continue
            for inner in value if isinstance(value, list) else (value,):
                if isinstance(inner, ast.AST):
                    self.visit(inner, local)

    def _function(self, node: Function, local: Names) -> None:
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        arguments += [extra for extra in (node.args.vararg, node.args.kwarg) if extra]
        for argument in arguments:
            argument.annotation = None
        if not isinstance(node, ast.Lambda):
            node.returns = None
            node.body = [inner for inner in node.body if not _is_text(inner)]
        body: list[ast.AST] = [node.body] if isinstance(node, ast.Lambda) else list(node.body)
        bound, shared = _bound(self.module, body)
        names = {**local, **{argument.arg: [] for argument in arguments}, **bound}
        for name in shared:
            names.pop(name, None)
        self._inside(node, local, besides=("body",))
        for inner in body:
            self.visit(inner, names)

    def _class(self, node: ast.ClassDef, local: Names) -> None:
        """Names of a class body are not seen in its methods; but what it imports is taken as seen there."""
        node.body = [inner for inner in node.body if not _is_text(inner)]
        imported = {name: targets for name, targets in _bound(self.module, node.body)[0].items() if targets}
        self._inside(node, local, besides=("body",))
        for inner in node.body:
            if isinstance(inner, ast.AnnAssign):  # a field: its type counts as text, and is not followed
                self._inside(inner, {**local, **imported}, besides=("annotation",))
            else:
                self.visit(inner, {**local, **imported})

    def _comprehension(self, node: Comprehension, local: Names) -> None:
        """Its first iterable is evaluated outside; all else sees its own names."""
        first = node.generators[0]
        names = {**local, **{name: [] for name in _stored([one.target for one in node.generators])}}
        self.visit(first.iter, local)
        self._inside(first, names, besides=("iter",))
        for inner in node.generators[1:]:
            self.visit(inner, names)
        self._inside(node, names, besides=("generators",))

    def _attribute(self, node: ast.Attribute, local: Names) -> None:
        path: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            path.insert(0, inner.attr)
            inner = inner.value
        self.attributes.update(path)
        if isinstance(inner, ast.Name):
            self._name(inner.id, tuple(path), local)
        else:
            self.visit(inner, local)

    def _name(self, name: str, path: tuple[str, ...], local: Names) -> None:
        if name in local:
            for target, names in local[name]:
                self.uses.update(self.sources.named(target, (*names, *path)))
            return
        if name in self.module.definitions or name in self.module.imports:
            found = set(self.sources.named(self.module.name, (name, *path)))
            self.uses |= found
            if name in self.module.imports:
                self.meanings.update(f"{name} is {module}:{what}" for module, what in found if what != TOP)
        elif name == "globals":
            self.uses.add((self.module.name, WHOLE))
        self.meanings.update(f"{name} is {foreign}" for foreign in self.module.foreign.get(name, ()))

    def _call(self, node: ast.Call) -> None:
        """A module that is imported by a text counts whole; where nobody can tell which it is, that is refused."""
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
        given = node.args[0] if node.args else None
        text = given.value if isinstance(given, ast.Constant) and isinstance(given.value, str) else None
        if called == "load" and text is not None:
            self.loads.add(text)
        elif called in ("import_module", "__import__"):
            if text is None:
                raise UserError(
                    f"{self.module.path}, line {node.lineno}: {called} of a name that only a run knows, so that nobody "
                    "can tell what the code of a step is. Write the name as text, or make a registry of the variants "
                    "(core/registries.py)."
                )
            if self.sources.module(text):
                self.uses.add((text, WHOLE))

    def _templates(self, text: str) -> None:
        package = self.module.name if self.module.is_package else self.module.name.rpartition(".")[0]
        self.uses |= {(package, name) for name in self.sources.templates_in(self.module, text)}


def _text_of(node: ast.AST) -> str:
    """A syntax tree as text, the same in every version of Python: unlike `ast.dump`, which is also slower."""
    words: list[str] = []

    def write(node: ast.AST) -> None:
        if isinstance(node, ast.Constant):
            words.append(repr(node.value))
            return
        words.extend((node.__class__.__name__, "("))
        for name in node._fields:
            value = getattr(node, name, None)
            if value is None or value == [] or isinstance(value, ast.expr_context):
                continue
            words.append(name)
            for inner in value if isinstance(value, list) else (value,):
                if isinstance(inner, ast.AST):
                    write(inner)
                else:
                    words.append(repr(inner))
        words.append(")")

    write(node)
    return " ".join(words)


def _bound(module: Module, body: Iterable[ast.AST]) -> tuple[dict[str, list[Target]], set[str]]:
    """Names that the body of a function binds, with what they are imported from; and those that are `global` in it.

    Names that `:=` binds may be missing: at worst one is taken for a name of the module, so that too much counts.
    """
    bound: dict[str, list[Target]] = {}
    shared: set[str] = set()
    waiting = list(body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, IMPORTS):
            for name, target in module.bound_by(node):
                bound.setdefault(name, []).append(target)
        elif isinstance(node, NAMED):
            bound.setdefault(node.name, [])
        elif isinstance(node, ast.Name):
            if not isinstance(node.ctx, ast.Load):
                bound.setdefault(node.id, [])
        elif isinstance(node, ast.Global):
            shared.update(node.names)
        elif isinstance(node, TARGETS) or not (isinstance(node, ast.expr) or _is_skipped(node)):
            waiting += ast.iter_child_nodes(node)
    return bound, shared


def _stored(nodes: Iterable[ast.AST]) -> list[str]:
    """Names that statements bind, also inside; at most too many, such as those of a comprehension."""
    inner = [node for root in nodes for node in ast.walk(root)]
    names = [node.id for node in inner if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
    return list(dict.fromkeys([*names, *(node.name for node in inner if isinstance(node, NAMED))]))


def _writes_elsewhere(node: ast.AST) -> bool:
    """Whether an assignment changes an object rather than binds a name: `torch.backends.x = 1`, `TABLE["a"] = f`."""
    return any(isinstance(n, (ast.Attribute, ast.Subscript)) and isinstance(n.ctx, ast.Store) for n in ast.walk(node))


def _never_runs(test: ast.expr) -> bool:
    """Whether a condition is only true for type checkers, or where the file is run as a script."""
    if isinstance(test, ast.Compare):
        return getattr(test.left, "id", None) == "__name__" and isinstance(test.ops[0], ast.Eq)
    return "TYPE_CHECKING" in (getattr(test, "id", None), getattr(test, "attr", None))


def _is_skipped(node: ast.AST) -> TypeGuard[ast.If]:
    return isinstance(node, ast.If) and _never_runs(node.test)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def root_of(node: ast.AST) -> str | None:
    """The name that a dotted name or a call begins with."""
    while not isinstance(node, ast.Name):
        inner = getattr(node, "value", None) or getattr(node, "func", None)
        if not isinstance(inner, ast.AST):
            return None
        node = inner
    return node.id


def _above(module: str) -> list[str]:
    """Packages that a module lies in; importing it runs them."""
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]
