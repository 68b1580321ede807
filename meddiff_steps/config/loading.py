"""Reading a study, and telling what is wrong with one."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from meddiff_steps.config.base import Keys, fields_of
from meddiff_steps.config.renamed import before_renaming, keys_gone, old_names, translated, without_gone
from meddiff_steps.config.study import Study, other_contrast
from meddiff_steps.config.yaml_files import read_yaml, where_is
from meddiff_steps.core.errors import UserError

log = logging.getLogger(__name__)

#: Parts of the places that pydantic names which are no keys: kinds of a section, and how a value was tried.
_NO_KEYS = re.compile(r"(continuous|categorical|simulated|bids|table)$|(tuple|function)\b")
_KEY_AT_THE_START = re.compile(r"\w+(\.\w+)*")
_NO_KEY_AT_THE_END = re.compile(r"(bool|int|float|str|none|constrained-\w+)$|(literal|list|dict|nullable)\[")


def load_study(path: Path) -> Study:
    """Read and validate a study.

    Raises
    ------
    UserError
        The file is missing, is no YAML mapping, or breaks a rule; every problem is listed with its key and line.
    """
    return parse_study(read_yaml(path), str(path), [path])


def parse_study(raw: Any, origin: str, files: Sequence[Path] = ()) -> Study:
    """Validate an already parsed study; `origin` names it in error messages, and `files` are where its keys stand.

    Keys that are gone change nothing: somebody's own `files` may still hold them, which is told. Of what this package
    wrote itself they are refused. Names of contrasts that contradict each other are refused in somebody's own files.

    Raises
    ------
    UserError
        It breaks a rule, or has keys of an earlier version; every problem is listed with its key.
    """
    if not isinstance(raw, dict):
        raise UserError(f"{origin}: expected a mapping of sections, found {type(raw).__name__}. See config/README.md.")
    gone = list(keys_gone(raw))
    for line in gone if files else ():
        log.warning("%s: %s", origin, line)
    if files and gone:
        raw = without_gone(raw)
    problems = [*old_names(raw), *([] if files else gone)]
    if isinstance(raw.get("release"), str):
        raw = {name: section for name, section in raw.items() if name != "release"}
    try:
        study = Study.model_validate(translated(raw) if problems else raw)
        problems += other_contrast(study) if files else ()
    except ValidationError as error:
        problems += _listed(error.errors(include_url=False), files)
    if problems:
        listed = "".join(f"\n  {problem}" for problem in problems)
        raise UserError(f"{origin}: {len(problems)} problem(s) in the study:{listed}")
    return study


def parse_published(content: Any, origin: str, version: str) -> Study:
    """Validate the study in a release that some version of this package sealed.

    Keys that had other names then are read as those of today; all values stay.  `content` itself is not changed:
    digests are of it.

    Raises
    ------
    UserError
        It breaks a rule; every problem is listed with its key of today.
    """
    old = before_renaming(version) and isinstance(content, dict)
    return parse_study(translated(content) if old else content, origin)


def _listed(problems: Sequence[ErrorDetails], files: Sequence[Path]) -> Iterator[str]:
    """Every problem in words, once: a key that is missing because it was misspelt is told where it was misspelt, and
    a value that is none of several things, with all that it could be.
    """
    misspelt = {
        (*where[:-1], meant)
        for where in (_where(problem) for problem in problems if problem["type"] == "extra_forbidden")
        if (meant := _beside(_keys(where)))
    }
    alternatives: dict[tuple[str, ...], list[str]] = {}
    for problem in problems:
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        alternatives.setdefault(_where(problem), []).append(message)
    told: set[tuple[str, ...]] = set()
    for problem in problems:
        where = _where(problem)
        if where and (where in told or (problem["type"] == "missing" and where in misspelt)):
            continue
        told.add(where)
        yield from _explained(problem, where, " or: ".join(dict.fromkeys(alternatives[where])), files)


def _where(problem: ErrorDetails) -> tuple[str, ...]:
    """The names and numbers that lead to what a problem is about."""
    parts = [str(part) for i, part in enumerate(problem["loc"]) if not (i and _NO_KEYS.match(str(part)))]
    if len(parts) > 1 and problem["type"] != "covariate_kind" and _NO_KEY_AT_THE_END.match(parts[-1]):
        parts.pop()
    return tuple(parts)


def _keys(where: Sequence[str]) -> Keys:
    """The same without places in lists."""
    return tuple(part for part in where if not part.isdigit())


def _explained(problem: ErrorDetails, where: tuple[str, ...], message: str, files: Sequence[Path]) -> Iterator[str]:
    """A problem in words, after the key that it is about, and where that stands."""
    if not where:  # a relation between sections, which names its keys itself
        for line in problem["msg"].removeprefix("Value error, ").split("\n"):
            key = _KEY_AT_THE_START.match(line)
            yield line + _place(key[0].split(".") if key else (), files)
        return
    found = problem.get("input")
    if problem["type"] == "extra_forbidden":
        message = f"unknown key. {_meant(_keys(where))}config/keys.md lists all keys"
    elif problem["type"] in ("union_tag_not_found", "union_tag_invalid"):
        found = found.get("source") if isinstance(found, dict) else found
        message = f"set `source` to bids, table or simulated{_near(found, ('bids', 'table', 'simulated'))}"
    elif problem["type"] == "missing":
        message = "is missing, and has no default"
    elif problem["type"] == "literal_error":
        message += _near(found, re.findall(r"'(\w+)'", message))
    elif problem["type"] == "string_type":
        message += f'. Put it in quotes, as it is to be read: {where[-1]}: "..."'
    shown = problem["type"] not in ("missing", "union_tag_not_found", "extra_forbidden") and isinstance(
        found, (str, int, float, bool, type(None))
    )
    yield f"{'.'.join(where)}: {message}{f' (found {found!r})' if shown else ''}{_place(where, files)}"


def _place(where: Sequence[str], files: Sequence[Path]) -> str:
    """Where a key, or the section that it belongs to, stands, to be put behind what is said of it."""
    place = where_is(where, files)
    return f" [{place}]" if place else ""


def _near(found: Any, choices: Sequence[str]) -> str:
    """Which of some values was probably meant; `dpm++` is written so in papers."""
    close = difflib.get_close_matches(str(found).lower().replace("+", "p"), choices, 1)
    return f". Did you mean `{close[0]}`?" if close else ""


def _beside(where: Keys) -> str | None:
    """The key of the same section that is written most like one that is unknown."""
    beside = {
        keys[-1]
        for keys, _ in fields_of(Study)
        if len(keys) == len(where) and all(a in ("*", b) for a, b in zip(keys[:-1], where[:-1], strict=True))
    }
    close = difflib.get_close_matches(where[-1], beside, 1)
    return close[0] if close else None


def _meant(where: Keys) -> str:
    """What an unknown key was probably to be: one of its section that is written alike, or its name elsewhere."""
    close = _beside(where)
    if close:
        return f"Did you mean `{close}`? "
    known = [keys for keys, _ in fields_of(Study)]
    elsewhere = [".".join(keys) for keys in known if keys[-1] == where[-1] and "*" not in keys]
    return f"Did you mean `{elsewhere[0]}`? " if len(elsewhere) == 1 else ""
