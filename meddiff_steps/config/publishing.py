"""What of a study is published: everything but where things lie on the user's machine."""

from __future__ import annotations

from typing import Any

from meddiff_steps.config.base import PATH, marked, replaced
from meddiff_steps.config.preprocess import MNI152
from meddiff_steps.config.stages import STAGES, part_of, resolved
from meddiff_steps.config.study import Study

#: Keys whose values are paths on the user's machine; `without_paths` blanks them in everything that is published.
PATH_KEYS = marked(Study, PATH)
#: Names that can stand where else a path does.
NAMES = frozenset([MNI152])
#: What stands in the place of all others.
BLANK = "(path)"


def without_paths(content: dict[str, Any]) -> dict[str, Any]:
    """A study, or the part of it that a stage may read, as published: paths of the user's machine are BLANK."""
    return replaced(content, PATH_KEYS, BLANK, but=NAMES)


def published(study: Study) -> dict[str, Any]:
    """A study as a release holds it."""
    return without_paths(part_of(resolved(study.model_dump(mode="json")), STAGES["ledger"]))
