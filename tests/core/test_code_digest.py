"""An edit changes the digests of exactly those steps that can run what was edited."""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest

from meddiff_steps.__main__ import STEPS
from meddiff_steps.config import freeze, parse_study
from meddiff_steps.core import code_digest as analysis
from meddiff_steps.core.code_digest import Code
from meddiff_steps.core.errors import UserError

# ------------------------------------------------------------------------------------- a small package of steps

PACKAGE = {
    "__init__": '__version__ = "1"\n',
    "steps/__init__": "",
    "steps/train": """
        '''Trains.'''
        from toy.domain import fit
        from toy import tables

        def run(config, steps: int = 3) -> None:
            '''Train.'''
            fit(config.downsampling, steps)
            return tables.WIDTH
        """,
    "steps/sample": """
        import toy.tables
        from toy.core.registries import SAMPLERS

        def run(config):
            return SAMPLERS.load(config.generate.sampler).sample(toy.tables.WIDTH)
        """,
    "steps/show": """
        from toy.report import render

        def run(config):
            return render()
        """,
    "domain/__init__": "from toy.domain.fitting import fit as fit\nfrom .other import aside\n",
    "domain/fitting": """
        from toy.core.errors import UserError

        RATE = 0.1

        def fit(x, steps):
            # Small steps.
            if steps < 0:
                raise UserError("no")
            return RATE * x

        def not_used():
            return 1
        """,
    "domain/other": "def aside():\n    return 2\n",
    "tables": "WIDTH = 8\nHEIGHT = 9\n",
    "config": """
        from pydantic import BaseModel, field_validator

        FACTOR = 2

        def twice(x):
            return FACTOR * x

        class Section(BaseModel):
            levels: int = 3

            @field_validator("levels")
            @classmethod
            def checked(cls, value):
                return value

            @property
            def downsampling(self):
                return twice(self.levels)

            @property
            def elsewhere(self):
                return 1
        """,
    "core/__init__": "",
    "core/errors": "class UserError(Exception):\n    pass\n",
    "core/registries": """
        from toy.core.registry import Registry

        SAMPLERS = Registry("sampler", "toy.samplers", keys=("generate.sampler", "sampler_study.samplers"))
        METRICS = Registry("metric", "toy.metrics", ("evaluate.metrics",))
        """,
    "core/registry": "class Registry:\n    pass\n",
    "samplers/__init__": "",
    "samplers/_common": "ORDER = 1\n",
    "samplers/ddim": """
        from toy.samplers._common import ORDER
        ENTRY = {"summary": "x", "default_steps": 75}

        def sample(x):
            return _step(x) ** ORDER

        def _step(x):
            return x + 1
        """,
    "samplers/heun": 'ENTRY = {"summary": "y", "default_steps": 18}\n\n\ndef sample(x):\n    return x\n',
    "report/__init__": "",
    "report/page": """
        from pathlib import Path

        def render(kind="page"):
            return Path(__file__).with_name(f"{kind}.html.jinja").read_text()
        """,
}
PACKAGE["report/__init__"] = "from toy.report.page import render\n"
DDIM = {"generate": {"sampler": "ddim"}}


def dedent(text: str) -> str:
    """A text without the indentation that it has in this file."""
    lines = text.strip("\n").split("\n")
    indent = len(lines[0]) - len(lines[0].lstrip())
    return "\n".join(line[indent:] if not line[:indent].strip() else line for line in lines).rstrip() + "\n"


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    """Root of the small package."""
    for name, text in PACKAGE.items():
        write(tmp_path / "toy", name, text)
    (tmp_path / "toy/report/page.html.jinja").write_text("<p>{{ title }}</p>")
    (tmp_path / "toy/report/other.jinja").write_text("other")
    return tmp_path / "toy"


def write(root: Path, name: str, text: str) -> None:
    path = root / f"{name}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dedent(text))


def edit(root: Path, name: str, old: str, new: str) -> None:
    path = root / name if "." in name else root / f"{name}.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


def digests(root: Path, content: dict[str, Any] | None = None) -> dict[str, str]:
    code = Code(root, "toy")
    return {step: code.digest(step, content) for step in ("train", "sample", "show")}


def changed(root: Path, name: str, old: str, new: str, content: dict[str, Any] | None = None) -> set[str]:
    """Steps whose digest an edit changes."""
    before = digests(root, content)
    edit(root, name, old, new)
    after = digests(root, content)
    return {step for step in before if before[step] != after[step]}


def reaches(tmp_path: Path, body: str, **files: str) -> frozenset[str]:
    """What a package whose one step is `body` reaches, in its module `other` with f, g, h and CONSTANT."""
    root = tmp_path / "toy"
    for folder in ("", "steps/"):
        write(root, f"{folder}__init__", "")
    write(
        root,
        "other",
        "CONSTANT = 1\nTABLE = {}\n\n\ndef f():\n    return CONSTANT\n\n\ndef g():\n    pass\n\n\ndef h():\n    pass\n",
    )
    for name, text in files.items():
        write(root, name, text)
    write(root, "steps/one", body)
    return frozenset(name.removeprefix("toy.") for name in Code(root, "toy").reached("one"))


# ------------------------------------------------------------------------------------------------ what counts


@pytest.mark.parametrize(
    ("name", "old", "new", "steps"),
    [
        ("domain/fitting", "return RATE * x", "return RATE + x", {"train"}),
        ("domain/fitting", "RATE = 0.1", "RATE = 0.2", {"train"}),
        ("domain/fitting", "def not_used():\n    return 1", "def not_used():\n    return 2", set()),
        ("domain/other", "return 2", "return 3", set()),
        ("domain/__init__", "import aside", "import aside as again", set()),
        ("domain/fitting", "# Small steps.", "# Others.", set()),
        ("domain/fitting", "def fit(x, steps):", "def fit(x: int, steps: int) -> float:", set()),
        ("domain/fitting", "def fit(x, steps):", "def fit(x, steps=1):", {"train"}),
        ("steps/train", "'''Train.'''", "'''Trains very well.'''", set()),
        ("steps/train", "    '''Train.'''\n", "", set()),
        ("steps/train", "'''Trains.'''", "'''Other.'''", set()),
        ("steps/train", "steps: int = 3", "steps: int = 4", {"train"}),
        ("tables", "WIDTH = 8", "WIDTH = 9", {"train", "sample"}),
        ("tables", "HEIGHT = 9", "HEIGHT = 10", set()),
        ("__init__", '"1"', '"2"', set()),
        ("core/errors", "pass", "code = 1", set()),
        ("core/registry", "pass", "code = 1", set()),
    ],
)
def test_an_edit_counts_for_the_steps_that_reach_it(toy, name, old, new, steps):
    assert changed(toy, name, old, new) == steps


@pytest.mark.parametrize(
    ("old", "new", "steps"),
    [
        ("levels: int = 3", "levels: int = 4", set()),
        ("levels: int = 3", 'levels: int = Field(3, description="of detail")', set()),
        ("return value", "return value + 1", set()),
        ("return twice(self.levels)", "return twice(self.levels) + 1", {"train"}),
        ("FACTOR = 2", "FACTOR = 3", {"train"}),
        ("return 1", "return 2", set()),
    ],
)
def test_of_the_config_only_properties_that_a_step_asks_for_count(toy, old, new, steps):
    assert changed(toy, "config", old, new) == steps


def test_a_config_of_several_modules_is_treated_as_one(toy):
    whole = Code(toy, "toy").reached("train")
    (toy / "config").mkdir()
    (toy / "config.py").rename(toy / "config/sections.py")
    (toy / "config/__init__.py").write_text("from toy.config.sections import Section\n")
    found = Code(toy, "toy").reached("train")
    assert {name.replace("config.sections:", "config:") for name in found} == whole
    assert "toy.config.sections:Section.downsampling" in found and "toy.config.sections:twice" in found
    assert changed(toy, "config/sections", "FACTOR = 2", "FACTOR = 3") == {"train"}
    assert changed(toy, "config/sections", "= 3", "= 4", None) == {"train"}


# ------------------------------------------------------------------------------------------------- registries


@pytest.mark.parametrize(
    ("name", "old", "new", "content", "steps"),
    [
        ("samplers/ddim", "x + 1", "x + 2", DDIM, {"sample"}),
        ("samplers/_common", "ORDER = 1", "ORDER = 2", DDIM, {"sample"}),
        ("samplers/ddim", '"default_steps": 75', '"default_steps": 50', DDIM, set()),
        ("samplers/heun", "return x", "return -x", DDIM, set()),
        ("samplers/heun", "return x", "return -x", {"sampler_study": {"samplers": None}}, {"sample"}),
        ("samplers/heun", "return x", "return -x", {"sampler_study": {"samplers": ["heun"]}}, {"sample"}),
        ("samplers/ddim", "x + 1", "x + 2", {"seed": "x"}, set()),
        ("core/registries", '"evaluate.metrics"', '"evaluate.others"', DDIM, set()),
    ],
)
def test_variants_count_where_the_study_chooses_them(toy, name, old, new, content, steps):
    assert changed(toy, name, old, new, content) == steps


def test_another_choice_is_other_code(toy):
    code = Code(toy, "toy")
    assert code.digest("sample", DDIM) != code.digest("sample", {"generate": {"sampler": "heun"}})
    assert code.digest("train", DDIM) == code.digest("train", {"generate": {"sampler": "heun"}})
    assert code.digest("sample", None) == code.digest("sample", {})


def test_a_variant_that_code_loads_by_its_name_counts_whatever_the_study_chooses(toy):
    edit(toy, "steps/sample", "SAMPLERS.load(config.generate.sampler)", 'SAMPLERS.load("heun")')
    found = Code(toy, "toy").reached("sample", {})
    assert "toy.samplers.heun:sample" in found and "toy.samplers.ddim:sample" not in found


def test_a_part_counts_where_the_study_has_its_section(toy):
    (toy / "extra.py").write_text("SHARE = 0.5\n\n\ndef draw():\n    return SHARE\n")
    edit(toy, "core/registries", "SAMPLERS =", 'EXTRA = Part("training.extra", "toy.extra")\nSAMPLERS =')
    edit(toy, "steps/sample", "import SAMPLERS", "import EXTRA, SAMPLERS")
    edit(toy, "steps/sample", "return SAMPLERS", "return EXTRA.load().draw() or SAMPLERS")
    has, lacks = DDIM | {"training": {"extra": {"share": 1}}}, DDIM | {"training": {"extra": None}}
    assert changed(toy, "extra", "0.5", "0.4", has) == {"sample"}
    assert changed(toy, "extra", "0.4", "0.3", lacks) == set()
    assert "toy.samplers.heun:sample" not in Code(toy, "toy").reached("sample", has), "no variant by it"


def test_a_study_that_chooses_what_there_is_not_is_refused(toy):
    with pytest.raises(UserError, match="no sampler 'euler'"):
        Code(toy, "toy").digest("sample", {"generate": {"sampler": "euler"}})


# -------------------------------------------------------------------------------------------------- templates


def test_a_template_counts_where_code_beside_it_names_it(toy):
    assert changed(toy, "report/page.html.jinja", "<p>", "<b>") == {"show"}
    assert changed(toy, "report/other.jinja", "other", "another") == set()
    assert changed(toy, "report/page.html.jinja", "<b>", '{% include "other.jinja" %}') == {"show"}
    assert changed(toy, "report/other.jinja", "another", "other") == {"show"}
    names = {path.relative_to(toy).as_posix() for path in Code(toy, "toy").files("show")}
    assert names == {"steps/show.py", "report/page.py", "report/page.html.jinja", "report/other.jinja"}


# ------------------------------------------------------------------------------------- ways to refer to something

F = "from toy.other import f\n"
REFERENCES = {
    "import in a function": "def run():\n    from toy.other import f as local\n    local()",
    "module in a function": "def run():\n    import toy.other\n    return toy.other.f()",
    "module by another name": "import toy.other as o\ndef run():\n    return o.f()",
    "module of a package": "from toy import other\ndef run():\n    return other.f()",
    "relative import": "from ..other import f\ndef run():\n    return f()",
    "relative module": "from .. import other\ndef run():\n    return other.f()",
    "base class": "import toy.other\nclass A(toy.other.f):\n    pass\ndef run():\n    return A()",
    "metaclass": F + "class A(metaclass=f):\n    pass\ndef run():\n    return A()",
    "decorator": F + "@f\ndef inner():\n    pass\ndef run():\n    inner()",
    "decorator of a method": F + "class A:\n    @f\n    def m(self): ...\ndef run():\n    A().m()",
    "default": F + "def run(x=f):\n    pass",
    "keyword default": F + "def run(*, x=f()):\n    pass",
    "value": F + "def run():\n    return map(f, [1])",
    "f-string": F + "def run():\n    return f'{f():>{f}}'",
    "lambda": F + "key = lambda x: f()\ndef run():\n    return key(1)",
    "comprehension": F + "def run():\n    return [f() for x in range(2) if f]",
    "first iterable": F + "def run():\n    return {f: 1 for f in f()}",
    "match": "from toy import other\ndef run(x):\n    match x:\n        case other.f:\n            return 1",
    "match class": F + "def run(x):\n    match x:\n        case f(a=1):\n            return 1",
    "except": F + "def run():\n    try:\n        pass\n    except f:\n        pass",
    "nested function": F + "def run():\n    def inner():\n        return f()\n    return inner()",
    "outer import": "def run():\n    from toy.other import f\n    def inner():\n        return f()\n    return inner()",
    "class in a function": "def run():\n    class A:\n        from toy.other import f\n        x = f()\n    return A",
    "global": F + "def run():\n    def f(): ...\n    def g():\n        global f\n        return f()",
    "changed global": F + "A = f()\ndef run():\n    global A\n    A += 1",
    "other scope": F + "def run():\n    def inner():\n        f = 1\n        return f\n    return f()",
    "constant of a constant": F + "A = {1: f}\nB = A[1]\ndef run():\n    return B",
    "added to": F + "A = []\nA += [f]\ndef run():\n    return A",
    "unpacked": F + "a, (b, *c) = f()\ndef run():\n    return c",
    "walrus": F + "if (a := f()):\n    pass\ndef run():\n    return a",
    "put in a table": F + "TABLE = {}\nTABLE['f'] = f\ndef run():\n    return TABLE['f']()",
    "loop at the top": F + "for x in (f,):\n    y = x\ndef run():\n    return y",
    "with at the top": F + "with f() as opened:\n    y = opened\ndef run():\n    return y",
    "condition": F + "if f():\n    A = 1\nelse:\n    A = 2\ndef run():\n    return A",
    "call in a condition": F + "if f():\n    pass\ndef run(): ...",
    "import on a condition": F + "if f():\n    import numpy as np\ndef run():\n    return np",
    "fallback": "try:\n    import g\nexcept ImportError:\n    from toy.other import f as g\ndef run():\n    g()",
    "getattr": "from toy import other\ndef run(name):\n    return getattr(other, name)",
    "namespace": "from toy import other\ndef run(name):\n    return other.__dict__[name]",
    "module passed on": "from toy import other\ndef run(name):\n    return run(other)",
    "by text": "from importlib import import_module\ndef run():\n    return import_module('toy.other').f()",
    "globals": F + "def own():\n    f()\ndef run():\n    return globals()['own']()",
    "call at the top": F + "f()\ndef run():\n    pass",
    "assert at the top": F + "assert f()\ndef run():\n    pass",
    "registered": F + "from toy.other import g\n@g\ndef mine():\n    f()\ndef run():\n    pass",
    "async": F + "async def a():\n    async for x in f():\n        yield await x\ndef run():\n    a()",
    "starred": F + "def run():\n    print(*f(), **f())",
    "name like an argument elsewhere": F + "def other(f): ...\ndef run():\n    other(f())",
    "field default": "from dataclasses import dataclass, field\n"
    + F
    + "@dataclass\nclass A:\n    x: int = field(default_factory=f)\ndef run():\n    A()",
}


@pytest.mark.parametrize("body", REFERENCES.values(), ids=REFERENCES.keys())
def test_every_way_to_refer_to_something_is_followed(tmp_path, body):
    assert {"steps.one:run", "other:f", "other:CONSTANT"} <= reaches(tmp_path, body)


@pytest.mark.parametrize(
    "body",
    [
        F + "def run(f):\n    return f()",
        "from toy import other\ndef run():\n    other = 1\n    return other",
        "from toy import other\ndef run(rows):\n    return [other.x for other in rows]",
        "from toy import other\ndef run(rows):\n    for other in rows:\n        print(other)",
        "if TYPE_CHECKING:\n    from toy.other import f\ndef run(x: f) -> f:\n    y: f = 1",
        "def run():\n    import typing\n    if typing.TYPE_CHECKING:\n        from toy.other import f\n        f()",
        F + "if __name__ == '__main__':\n    f()\ndef run(): ...",
        F + "class A:\n    x: f\n    f: int = 1\ndef run():\n    A()",
        F + "def aside():\n    f()\ndef run(): ...",
        F + "__all__ = ['run']\ndef run():\n    'f'",
    ],
)
def test_what_only_looks_like_a_reference_is_not_followed(tmp_path, body):
    assert not any(name.startswith("other:") for name in reaches(tmp_path, body))


def test_a_module_used_by_attribute_counts_in_part_and_otherwise_whole(tmp_path):
    part = reaches(tmp_path, "from toy import other\ndef run():\n    other.g()")
    assert part == {"steps.one:run", "other:g"}
    whole = reaches(tmp_path, "from toy import other\ndef run():\n    print(other)")
    assert whole == {"steps.one:run", "other:CONSTANT", "other:TABLE", "other:f", "other:g", "other:h"}


def test_what_a_package_passes_on_counts_where_the_package_counts_whole(tmp_path):
    body = "import toy.parts as parts\ndef run(name):\n    return getattr(parts, name)"
    files = {
        "parts/__init__": "from . import a\nfrom .b import f\n",
        "parts/a": "def x(): ...\n",
        "parts/b": "def f(): ...\n",
    }
    found = reaches(tmp_path, body, **files)
    assert {"parts.a:x", "parts.b:f"} <= found


def test_what_an_imported_module_does_on_its_own_counts(tmp_path):
    body = "from toy.acting import g\ndef run():\n    g()"
    acting = "import toy.deeper\ndef g(): ...\ndef h(): ...\n"
    found = reaches(tmp_path, body, acting=acting, deeper="from toy.other import f\nf()\ndef aside(): ...\n")
    assert found >= {"acting:g", "deeper:<module>", "other:f"} and not found & {"acting:h", "deeper:aside"}
    assert "deeper:<module>" in reaches(tmp_path, "def run():\n    import toy.deeper")
    (tmp_path / "toy/__init__.py").write_text("from toy.other import h\nh()\n")
    assert {"toy:<module>", "toy.other:h"} <= Code(tmp_path / "toy", "toy").reached("one")


def test_the_text_of_a_file_counts_where_it_is_read(tmp_path):
    body = "from pathlib import Path\nfrom toy import other\ndef run():\n    return Path(other.__file__).read_bytes()"
    assert "other:__file__" in reaches(tmp_path, body)
    before = Code(tmp_path / "toy", "toy").digest("one")
    edit(tmp_path / "toy", "other", "CONSTANT = 1", "CONSTANT = 1  # a comment")
    assert Code(tmp_path / "toy", "toy").digest("one") != before


def test_the_same_name_from_elsewhere_is_other_code(tmp_path):
    digest = {}
    for source in ("from numpy import zeros as z", "from torch import zeros as z", "from toy.other import g as z"):
        reaches(tmp_path, f"{source}\ndef run():\n    return z(1)")
        digest[source] = Code(tmp_path / "toy", "toy").digest("one")
    swapped = []
    for names in ("f as a, g as b", "g as a, f as b"):
        reaches(tmp_path, f"from toy.other import {names}\ndef run():\n    return a() - b()")
        swapped.append(Code(tmp_path / "toy", "toy").digest("one"))
    assert len({*digest.values(), *swapped}) == 5


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("from toy.other import *\ndef run(): ...", r"one\.py, line 1: .*is not allowed in this package"),
        (
            "def run():\n    from importlib import import_module\n    import_module(f'toy.{run}')",
            r"one\.py, line 3: .*registry",
        ),
        ("def run(:", r"one\.py: not readable as Python"),
        ("def walk(): ...", r"one\.py: there is no such step"),
    ],
)
def test_what_cannot_be_followed_is_refused(tmp_path, body, said):
    with pytest.raises(UserError, match=said):
        reaches(tmp_path, body)


def test_a_text_may_take_the_place_of_a_file(toy):
    path = toy / "tables.py"
    edited = Code(toy, "toy", {path: "WIDTH = 9\n"})
    assert edited.digest("sample") != Code(toy, "toy").digest("sample")
    assert edited.digest("show") == Code(toy, "toy").digest("show")


# ------------------------------------------------------------------------------------------- the package itself

SEGMENTER = analysis.ROOT / "instruments/segmenter.py"


def test_every_step_has_a_digest():
    found = {step: analysis.code_digest(step) for step in STEPS}
    assert len(set(found.values())) == len(found)
    assert all(len(digest) == 16 for digest in found.values())


def test_an_edit_of_the_segmenter_is_for_those_who_train_or_use_it():
    text = SEGMENTER.read_text(encoding="utf-8")
    assert "LONGEST_SIDE = 96" in text
    edited = Code(analysis.ROOT, "meddiff_steps", {SEGMENTER: text.replace("LONGEST_SIDE = 96", "LONGEST_SIDE = 95")})
    other = {step: edited.digest(step) != analysis.code_digest(step) for step in STEPS}
    users = {
        step
        for step in STEPS
        if any(name.startswith("meddiff_steps.instruments.segmenter:") for name in analysis.reached(step))
    }
    print("\nedit of a constant in instruments/segmenter.py:")
    for step in STEPS:
        print(f"  {step:<16}{'runs again' if other[step] else ''}")
    assert {step for step, differs in other.items() if differs} == users
    assert users == {"segmenter", "evaluate", "images", "regenerate", "audit"}


# What is executed must be among what is reached.


@contextmanager
def executed() -> Iterator[set[CodeType]]:
    """Code of the package that this process runs meanwhile, in all its threads; its modules are imported already."""
    found: set[CodeType] = set()
    root = str(analysis.ROOT)

    def note(frame: FrameType, event: str, argument: object) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(root):
            found.add(frame.f_code)

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        yield found
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]


def definitions_of(codes: set[CodeType]) -> set[str]:
    """The top-level functions and classes that code belongs to, without the modules that are exempt."""
    names = set()
    for code in codes:
        parts = Path(code.co_filename).relative_to(analysis.ROOT).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        if not (module.startswith("config") or module in analysis.EXEMPT or code.co_name == "<module>"):
            names.add(f"meddiff_steps.{module}:{code.co_qualname.partition('.')[0]}")
    return names


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[set[str], frozenset[str]]]:
    """What the first steps of a tiny study execute, and what they are said to reach."""
    folder = tmp_path_factory.mktemp("tiny")
    study = parse_study(
        {
            "study": "tiny",
            "cohort": {"source": "simulated", "subjects": 90, "shape": [8, 10, 8], "spacing_mm": 20},
            "covariates": {"age": {"unit": "year", "range": [0, 120]}, "sex": {"levels": ["F", "M"]}},
            "preprocess": {"shape": [8, 12, 8], "spacing_mm": 20, "shards": 1},
            "autoencoder": {"channels": [8], "norm_num_groups": 4},
            "plan": [
                {"name": "syn", "subjects": 3},
                {"name": "ages", "subjects": 1, "covariates": "grid", "grid": {"age": [50, 60]}},
            ],
        },
        "test",
    )
    table, manifest = folder / "bids/participants.tsv", folder / "manifest.parquet"
    runs: dict[str, Callable[[Callable[..., None], Path], None]] = {
        "simulate": lambda run, config: run(config, table, 2),
        "cohort": lambda run, config: run(config, manifest, folder / "card.json", table.parent, 2),
        "preprocess": lambda run, config: run(config, manifest, 0, folder / "s.arrow", folder / "qc.parquet"),
        "quality": lambda run, config: run(config, [folder / "qc.parquet"], folder / "all.parquet"),
        "plan": lambda run, config: run(config, manifest, folder / "plan.parquet"),
    }
    found = {}
    for step, start in runs.items():
        config, reached = freeze(study, step, folder / "frozen"), analysis.reached(step)
        for name in reached:  # what is called while a module is imported is not of interest
            importlib.import_module(name.partition(":")[0])
        run = importlib.import_module(f"meddiff_steps.steps.{step}").run
        with executed() as codes:
            start(run, config)
        found[step] = definitions_of(codes), reached
    return found


@pytest.mark.parametrize("step", ["simulate", "cohort", "preprocess", "quality", "plan"])
def test_all_that_a_step_executes_is_reached(tiny, step):
    ran, reached = tiny[step]
    assert f"meddiff_steps.steps.{step}:run" in ran and len(ran) > 2
    assert ran - reached == set()
