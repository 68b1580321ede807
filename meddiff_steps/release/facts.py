"""What the texts of a release tell of what was measured: figures of groups, from the cards and reports of the steps.

They are published in dataset_description.json, so that an audit can write the texts again; whatever else cards and
reports hold is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from meddiff_steps.config import InitFrom
from meddiff_steps.privacy.verdict import Outcome

Word = Annotated[str, Field(max_length=100)]
Text = Annotated[str, Field(max_length=2000)]
Count = Annotated[int, Field(ge=0)]


class Told(BaseModel):
    """A part of the facts: what it has no name for is not told."""

    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)


class Figure(Told):
    value: float | None = None
    low: float | None = None
    high: float | None = None


class Compared(Figure):
    ceiling: Figure | None = None
    floor: Figure | None = None


class Covariate(Told):
    kind: Word
    r: Compared | None = None
    auc: Compared | None = None


class Space(Told):
    classifier_auc: Compared | None = None


class Spectrum(Told):
    synthetic: dict[Word, Compared] = {}


class Metrics(Told):
    covariates: dict[Word, Covariate] = {}
    spectrum: Spectrum = Spectrum()
    realism: dict[Word, Space] = {}


class Tested(Figure):
    n: Count | None = None


class Gate(Told):
    name: Word
    figure: Tested
    limit: float
    outcome: Outcome


class Calibration(Told):
    status: Word
    detectors: list[Word] = []
    level: float | None = None
    subjects: Count | None = None
    needed: Count | None = None


class Privacy(Told):
    verdict: Word
    counts: dict[Word, Count] = {}
    calibration: Calibration
    gates: list[Gate] = []


class Scans(Told):
    train: Count | None = None


class Base(Told):
    """Weights that were given, from which a training started."""

    kind: Word
    weights_sha256: Word
    source_sha256: Word | None = None
    file_sha256: Word | None = None
    name: Text | None = None
    version: Text | None = None
    source: Text | None = None
    licence: Text | None = None
    trained: Word | None = None


class Model(Told):
    name: Word
    parameters: Count
    weights_sha256: Word
    scans: Scans | None = None
    base: Base | None = None


class Counts(Told):
    scans: Count
    subjects: Count


class Cohort(Counts):
    """What could be used of the cohort, and of that the training part."""

    simulated: bool = False
    learnt_from: Counts | None = None


class Facts(Told):
    """All of it; see `facts_of`."""

    cohort: Cohort
    privacy: Privacy | None
    models: list[Model]
    metrics: Metrics | None


def facts_of(
    cohort: Mapping[str, Any],
    privacy: Mapping[str, Any] | None,
    models: Mapping[str, Mapping[str, Any]],
    metrics: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """The facts as JSON.

    Parameters
    ----------
    cohort
        The cohort's card, with the counts of what could be used, and under `learnt_from` of its training part.
    privacy
        The privacy report. None: not tested.
    models
        Cards of the models by name, in the order in which they are told.
    metrics
        The evaluation's metrics. None: not measured.
    """
    if privacy is not None:
        counts = {name: count for name, count in privacy.get("counts", {}).items() if isinstance(count, int)}
        privacy = {**privacy, "counts": counts}
    named = [{**card, "name": name} for name, card in models.items()]
    return _told({"cohort": cohort, "privacy": privacy, "models": named, "metrics": metrics})


def with_base(card: Mapping[str, Any], given: InitFrom | None) -> dict[str, Any]:
    """A model's card with what the study says of the weights that it started from; if these were not trained on, it
    learnt from no scan.
    """
    found = dict(card)
    if "base" not in card or given is None:
        return found
    said = {
        "licence": given.licence or card["base"].get("license"),
        "source": given.source or None,
        "trained": _trained(card["settings"]),
    }
    found["base"] = {key: value for key, value in (card["base"] | said).items() if value is not None}
    if card["settings"]["optimiser"]["steps"] == 0:
        found.pop("scans", None)
    return found


def _trained(settings: Mapping[str, Any]) -> str | None:
    """What of a network a training left as it was given, in words."""
    if settings["optimiser"]["steps"] == 0:
        return None
    if settings.get("trains") == "adapters":
        return f"adapters of rank {settings['adapter_rank']} alone were trained"
    if settings.get("trains") == "decoder":
        return "the decoder alone was trained"
    return f"pulled back to them by {settings['towards_base']:g}" if settings.get("towards_base") else None


def are_facts(content: Any) -> bool:
    """Whether JSON is what `facts_of` gives: nothing is hidden in it."""
    try:
        return bool(_told(content) == content)
    except ValidationError:
        return False


def _told(content: Any) -> dict[str, Any]:
    return Facts.model_validate(content).model_dump(mode="json", exclude_unset=True)
