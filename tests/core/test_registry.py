"""Variants say what they are in their own file, and are read without being run."""

from __future__ import annotations

import subprocess
import sys
from itertools import count
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import BaseModel, ValidationError

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.registries import REGISTRIES
from meddiff_steps.core.registry import Choice, Registry

SOLVER = """
raise_when_run = 1 / {zero}
ENTRY = {{"summary": "{summary}", "default_steps": {steps}, "processes": ["epsilon", "flow"]{more}}}

def sample(x):
    return x * 2
"""
FIELDS = {"default_steps": int, "processes": list}
NUMBER = count()


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Folder of a package of samplers, importable under a name that no other test has."""
    folder = tmp_path / f"variants{next(NUMBER)}" / "samplers"
    folder.mkdir(parents=True)
    for path in (folder.parent, folder):
        (path / "__init__.py").write_text("raise ImportError('a parent was imported')\n" if path == folder else "")
    write(folder, "ddim")
    write(folder, "ddpm", steps=1000, more=', "order": 2')
    write(folder, "heun", summary="of | order 2", more=', "order": 1')
    (folder / "_common.py").write_text('ENTRY = {"summary": "helps others"}\n')
    (folder / "tables.py").write_text("NUMBERS = [1, 2]\n")
    monkeypatch.syspath_prepend(tmp_path)
    return folder


def write(
    folder: Path, name: str, summary: str = "A solver", steps: object = 20, more: str = "", zero: int = 0
) -> None:
    (folder / f"{name}.py").write_text(SOLVER.format(summary=summary, steps=steps, more=more, zero=zero))


def registry(folder: Path, *keys: str) -> Registry:
    return Registry("sampler", f"{folder.parent.name}.samplers", keys, FIELDS)


def test_variants_are_listed_by_order_then_name_and_nothing_is_imported(package):
    found = registry(package)
    assert found.names() == ("heun", "ddpm", "ddim")
    assert found.entry("ddpm")["default_steps"] == 1000
    assert not [name for name in sys.modules if name.startswith(package.parent.name)]


def test_only_load_imports(package):
    (package / "__init__.py").write_text("")
    write(package, "ddim", zero=1)
    assert registry(package).load("ddim").sample(2) == 4


def test_an_unknown_name_is_answered_with_those_that_there_are(package):
    with pytest.raises(UserError, match="no sampler 'ddimm'. Did you mean 'ddim'. Known are heun, ddpm, ddim"):
        registry(package).entry("ddimm")
    with pytest.raises(UserError, match="no sampler '_common'"):
        registry(package).load("_common")


@pytest.mark.parametrize(
    ("steps", "more", "said"),
    [
        ('"20"', "", "'default_steps'.*of type int, found '20'"),
        ("True", "", "'default_steps'.*of type int, found True"),
        ("20", ', "order": "first"', "'order'.*of type int, found 'first'"),
    ],
)
def test_a_wrong_field_is_named_with_its_file(package, steps, more, said):
    write(package, "ddim", steps=steps, more=more)
    with pytest.raises(UserError, match=rf"ddim\.py: ENTRY.{said}"):
        registry(package).names()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('ENTRY = {"summary": "x"}', r"ddim\.py: ENTRY.'default_steps'.*of type int, it is missing"),
        ('A = 1\nENTRY = {"summary": A}', r"ddim\.py, line 2: ENTRY must be a dictionary of plain text"),
        ('ENTRY: dict = ["summary"]', r"ddim\.py, line 1: ENTRY must be a dictionary"),
        ("ENTRY = {", r"ddim\.py: not readable as Python"),
    ],
)
def test_an_entry_that_says_too_little_or_is_computed_is_refused(package, text, said):
    (package / "ddim.py").write_text(text)
    with pytest.raises(UserError, match=said):
        registry(package).names()


def test_a_package_that_has_no_variants_or_is_not_there_is_an_error(package):
    with pytest.raises(UserError, match="no sampler here"):
        Registry("sampler", f"{package.parent.name}.nowhere").names()
    with pytest.raises(UserError, match="no package nothing_of_this_name"):
        Registry("sampler", "nothing_of_this_name.samplers").names()


def test_a_new_registry_sees_what_was_edited_and_added(package):
    assert registry(package).entry("ddim")["default_steps"] == 20
    write(package, "ddim", steps=75)
    write(package, "unipc")
    assert registry(package).entry("ddim")["default_steps"] == 75
    assert "unipc" in registry(package).names()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"generate": {"sampler": "ddim"}}, ("ddim",)),
        ({"generate": {"sampler": "ddim"}, "sampler_study": {"samplers": ["ddpm", "ddim"]}}, ("ddpm", "ddim")),
        ({"sampler_study": {"samplers": None}}, ("heun", "ddpm", "ddim")),
        ({"sampler_study": None, "generate": {"batch_size": 4}}, ()),
        ({}, ()),
    ],
)
def test_what_a_frozen_study_chooses(package, content, expected):
    assert registry(package, "generate.sampler", "sampler_study.samplers").chosen(content) == expected


def test_a_frozen_study_that_names_an_unknown_variant_is_refused(package):
    with pytest.raises(UserError, match="no sampler 'euler'"):
        registry(package, "generate.sampler").chosen({"generate": {"sampler": "euler"}})


def test_nothing_is_read_where_nothing_is_chosen():
    assert Registry("sampler", "nothing_of_this_name.samplers", ("generate.sampler",)).chosen({"seed": "x"}) == ()


def test_the_table_has_a_row_per_variant(package):
    assert registry(package).table() == (
        "| sampler | summary | default steps | processes |\n"
        "| --- | --- | --- | --- |\n"
        "| `heun` | of \\| order 2 | 20 | epsilon, flow |\n"
        "| `ddpm` | A solver | 1000 | epsilon, flow |\n"
        "| `ddim` | A solver | 20 | epsilon, flow |\n"
    )


def test_a_choice_is_a_literal_of_the_names(package):
    Sampler = Annotated[str, Choice(registry(package))]

    class Generate(BaseModel):
        sampler: Sampler = "ddim"  # type: ignore[valid-type]
        others: list[Sampler] | None = None  # type: ignore[valid-type]
        other: Sampler | None = None  # type: ignore[valid-type]

    assert Generate(sampler="heun", others=["ddpm"]).model_dump() == {
        "sampler": "heun",
        "others": ["ddpm"],
        "other": None,
    }
    with pytest.raises(ValidationError, match="'heun', 'ddpm' or 'ddim'"):
        Generate(sampler="euler")
    schema = Generate.model_json_schema()["properties"]["sampler"]
    assert schema == {"default": "ddim", "enum": ["heun", "ddpm", "ddim"], "title": "Sampler", "type": "string"}


def test_kinds_are_told_apart_and_need_no_heavy_library():
    assert len({one.kind for one in REGISTRIES}) == len({one.package for one in REGISTRIES}) == len(REGISTRIES)
    heavy = "[m for m in ('torch', 'pydantic', 'numpy') if m in sys.modules]"
    code = f"import sys; from meddiff_steps.core import code_digest, registries; print({heavy})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
