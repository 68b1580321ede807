"""From figures to one word, by limits that are stated beforehand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from meddiff_steps.statistics.bootstrap import Figure

Outcome = Literal["PASS", "CONDITIONAL", "FAIL", "NOT_EVALUATED"]

#: From best to worst; no gate makes up for another.
SEVERITY: tuple[Outcome, ...] = ("PASS", "CONDITIONAL", "NOT_EVALUATED", "FAIL")


#: Gates on the filter itself: where one of them could not be evaluated, there was no filter that filters.
FILTER_GATES = ("calibrated", "planted copies are found")


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
#: Gates on plain conditions; the outcome of every other one follows from its interval and limit.
PLAIN = frozenset(["calibrated", "planted copies are found", STRANGERS, "planned subjects are filled"])


def at_most(name: str, figure: Figure, limit: float, meaning: str) -> Gate:
    """A gate on a figure that should be small."""
    return Gate(name, figure, limit, within(figure, limit), meaning)


def within(figure: Mapping[str, Any], limit: float) -> Outcome:
    """Whether the interval of a figure is within a limit."""
    low, high = figure.get("low"), figure.get("high")
    if low is None or high is None:
        return "NOT_EVALUATED"
    return "PASS" if high <= limit else "FAIL" if low > limit else "CONDITIONAL"


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
