"""Names that people read in place of keys: covariates by the study's descriptions, variants by their registries."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from meddiff_steps.config import Covariates
from meddiff_steps.core.registries import DETECTORS, FEATURE_SPACES, METRICS
from meddiff_steps.core.registry import Registry
from meddiff_steps.privacy.verdict import shown_name

#: Longer descriptions are sentences and no names.
LONGEST = 40


@dataclass(frozen=True)
class Names:
    """Names of a study's covariates by their keys; what has none is named by its key."""

    covariates: Mapping[str, str] = field(default_factory=dict)

    def covariate(self, key: str) -> str:
        """Of a covariate, or of one of its levels as `key = level`."""
        name, equals, level = key.partition(" = ")
        return f"{self.covariates.get(name, spaced(name))}{equals}{level}"

    def pair(self, key: str) -> str:
        """Of two covariates, `one~other`."""
        return " and ".join(map(self.covariate, key.split("~")))

    def gate(self, name: str) -> str:
        """Of a gate of the privacy verdict, which may end in a covariate."""
        return re.sub(r"(?<=^inference of ).+$", lambda found: self.covariate(found[0]), shown_name(name))


def of(covariates: Covariates) -> Names:
    """The beginning of each description, up to the first bracket or stop.

    The key stands where there is no description, where that is longer than a name is, and where two are alike.
    """
    found = {}
    for key, covariate in covariates.items():
        name = re.split(r"\s*[(;:.]", covariate.description, maxsplit=1)[0].strip()
        found[key] = name if 0 < len(name) <= LONGEST else spaced(key)
    often = Counter(name.lower() for name in found.values())
    return Names({key: name if often[name.lower()] == 1 else spaced(key) for key, name in found.items()})


def spaced(key: str) -> str:
    """A key as words."""
    return key.replace("_", " ")


def space(key: str) -> str:
    """Of a feature space; a study's own one is named by its key."""
    return _titled(FEATURE_SPACES, key)


def metric(key: str) -> str:
    """Of a metric of realism."""
    return _titled(METRICS, key)


def detector(key: str) -> str:
    """Of a copy detector, with what it compares."""
    return f"{key}: {DETECTORS.entry(key)['summary']}" if key in DETECTORS.names() else key


def _titled(registry: Registry, key: str) -> str:
    return str(registry.entry(key).get("title", spaced(key))) if key in registry.names() else spaced(key)
