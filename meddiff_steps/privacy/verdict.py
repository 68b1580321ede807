"""From figures to one word, by limits that are stated beforehand."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from meddiff_steps.config import Privacy
from meddiff_steps.statistics.bootstrap import Figure

Outcome = Literal["PASS", "CONDITIONAL", "FAIL", "NOT_EVALUATED"]

#: From best to worst; no gate makes up for another.
SEVERITY: tuple[Outcome, ...] = ("PASS", "CONDITIONAL", "NOT_EVALUATED", "FAIL")


CALIBRATED, COPIES_FOUND = "calibrated", "planted copies are found"
#: Gates on the filter itself: where one of them could not be evaluated, there was no filter that filters.
FILTER_GATES = (CALIBRATED, COPIES_FOUND)
#: Detectors whose directions the density ratio may be taken in, the first that is chosen: those of few numbers.
DENSITY_DETECTORS = ("learned", "aligned")


@dataclass(frozen=True)
class Gate:
    """One condition of the verdict.

    Attributes
    ----------
    name, figure, limit
        What was measured and what it was held against.
    outcome
        `FAIL` where the whole interval is beyond the limit, `PASS` where all of it is within, `CONDITIONAL` where the
        limit lies inside the interval: the data do not say.
    meaning
        What a failure would mean, in plain words.
    """

    name: str
    figure: Figure | dict[str, Any]
    limit: float
    outcome: Outcome
    meaning: str

    @property
    def passed(self) -> bool:
        return self.outcome == "PASS"

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


#: The gate that passes where a test finds no more strangers flagged than the level says.
STRANGERS = "strangers are not flagged"
COPIES_BEFORE, FILLED = "copies before the filter", "planned subjects are filled"
SINGLING_OUT, WEIGHTS = "singling out by covariates", "training scans told from the weights, AUC"
#: Before names of gates on the images of a rare level.
RARE = "rare level: "
#: Gates on plain conditions; the outcome of every other one follows from its interval and limit.
PLAIN = frozenset([*FILTER_GATES, STRANGERS, FILLED])
#: How names begin of gates on figures that are a half where nothing leaked.  A filter that rejects what is near
#: training subjects leaves holes about them: then figures are small, and tell as much.
AROUND_HALF = ("nearer to training, ", "membership, ", WEIGHTS)


def nearer(detector: str, rare: bool = False) -> str:
    """The name of a gate on images that lie nearer to training subjects than to others."""
    return f"{RARE if rare else ''}nearer to training, {detector}"


def membership(attack: str, rare: bool = False) -> str:
    """The name of a gate on an attack that tells members from others."""
    return f"{RARE if rare else ''}membership, {attack}"


def inference(covariate: str) -> str:
    """The name of a gate on guesses of a covariate."""
    return f"inference of {covariate}"


def limits_of(
    settings: Privacy, covariates: Collection[str], calibration: Mapping[str, Any], rare: bool
) -> dict[str, float]:
    """The limit of every gate that a verdict has, by its name, whether or not it can be evaluated.

    Parameters
    ----------
    covariates
        Their names.
    calibration
        The calibration card: status, level, needed, detectors.
    rare
        Whether a rare level was learnt.
    """
    detectors = calibration["detectors"]
    attacked = [f"distance, {name}" for name in detectors]
    attacked += [f"density ratio, {name}" for name in DENSITY_DETECTORS if name in detectors][:1]
    found: dict[str, float] = {CALIBRATED: calibration["needed"]}
    if calibration["status"] == "CALIBRATED":
        found |= {COPIES_FOUND: settings.min_recall, STRANGERS: calibration["level"]}
        found[COPIES_BEFORE] = settings.max_excess_copies
    for of_level in (False, True) if rare else (False,):
        found |= {nearer(name, of_level): settings.max_nearer_to_training for name in detectors}
        found |= {membership(name, of_level): settings.max_membership_auc for name in attacked}
    guessed = covariates if len(covariates) > 1 else ()
    found |= dict.fromkeys((SINGLING_OUT, *(inference(one) for one in guessed)), settings.max_table_risk)
    return found | {FILLED: settings.max_failed_share}


def shown_name(name: str) -> str:
    """The name of a gate as people read it beside its figure; releases and audits keep the name itself.

    >>> shown_name("planned subjects are filled")
    'planned subjects left without an image'
    """
    return "planned subjects left without an image" if name == FILLED else name


def bounds(name: str, limit: float) -> tuple[float, float]:
    """Lowest and highest figure within the limit of a gate."""
    return (1 - limit if name.removeprefix(RARE).startswith(AROUND_HALF) else -math.inf), limit


def bounds_text(name: str, limit: float) -> str:
    """The limit of a gate in words: `0.1`, or `0.4 to 0.6`."""
    low, high = bounds(name, limit)
    return f"{high:g}" if low == -math.inf else f"{low:g} to {high:g}"


def measured(name: str, figure: Figure | None, limit: float, meaning: str) -> Gate:
    """A gate on a figure with an interval; None: it could not be measured."""
    figure = figure or {"value": None, "low": None, "high": None}
    return Gate(name, figure, limit, within(name, figure, limit), meaning)


def within(name: str, figure: Mapping[str, Any], limit: float) -> Outcome:
    """Whether the interval of a gate's figure is within its limit."""
    low, high = figure.get("low"), figure.get("high")
    if low is None or high is None:
        return "NOT_EVALUATED"
    least, most = bounds(name, limit)
    return "PASS" if least <= low and high <= most else "FAIL" if low > most or high < least else "CONDITIONAL"


def holds(
    name: str, condition: bool | None, figure: dict[str, Any], limit: float, meaning: str, otherwise: Outcome = "FAIL"
) -> Gate:
    """A gate on a plain condition; None means that it could not be evaluated."""
    return Gate(
        name, figure, limit, "NOT_EVALUATED" if condition is None else "PASS" if condition else otherwise, meaning
    )


def stopping(gates: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The gates of a report for which nothing is released: those that failed, and those that say that the filter is
    none.
    """
    return [
        gate
        for gate in gates
        if gate["outcome"] == "FAIL" or (gate["outcome"] == "NOT_EVALUATED" and gate["name"] in FILTER_GATES)
    ]


def verdict(gates: Iterable[Gate]) -> Outcome:
    """The worst outcome of all gates; `NOT_EVALUATED` without gates."""
    outcomes = [gate.outcome for gate in gates]
    return max(outcomes, key=SEVERITY.index) if outcomes else "NOT_EVALUATED"
