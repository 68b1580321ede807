"""The five sentences that a report begins with: privacy, realism, fidelity, usefulness, limits.

Each has a figure, a grade and what it is held against; words and grade follow from the figures by the limits of this
file, and `RULES` says these limits in words, for the page and for the docs.  Two figures are *apart* where their 95 %
intervals do not meet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from meddiff_steps.privacy.verdict import COPIES_FOUND, PLAIN, STRANGERS, bounds, bounds_text, stopping
from meddiff_steps.report import names
from meddiff_steps.report.names import Names
from meddiff_steps.report.wording import counted, interval, limit, number, percent

Grade = Literal["good", "middling", "bad", "not measured"]
Measured = Mapping[str, Any]

#: AUC from which on images are told by whoever looks; Frechet distance over its floor; precision, recall, density and
#: coverage over their ceiling; how far power is from that of real images.
TOLD, FAR, LACKING, POWER = 0.8, 5.0, 0.5, 0.2
#: Shares of the ceiling of a covariate's r or AUC: good from the first on, bad below the second.
FOLLOWED, LOST = 0.95, 0.8
#: Ceilings of r and AUC below which a covariate can hardly be read from scans.
READABLE = {"r": 0.5, "auc": 0.7}
#: Held-out subjects: bad below the first, good from the second on.
FEW, MANY = 50, 200

RULES: dict[str, str] = {
    "Privacy": (
        "the verdict, which is the worst of all tests: PASS is good, CONDITIONAL middling, FAIL and NOT_EVALUATED bad;"
        " untested is bad"
    ),
    "Realism": (
        "good where every figure was measured and none is apart from what real scans give; bad where a classifier tells"
        f" the images in any feature space with an AUC whose interval begins at {TOLD:g} or above, or a figure is apart"
        f" and a Frechet distance over {FAR:g} times its floor, a precision, recall, density or coverage below"
        f" {LACKING:g} of its ceiling, or a power more than {100 * POWER:.0f} % from that of real images; middling"
        " otherwise"
    ),
    "Fidelity": (
        "by every covariate that could be measured: good where r or AUC is at its ceiling or at"
        f" {100 * FOLLOWED:.0f} % of it, slope and bias are not apart from those of real scans, no subgroup is below"
        " its ceiling and not all of them are too small to tell, and the ceiling is at least"
        f" {READABLE['r']:g} (r) or {READABLE['auc']:g} (AUC); bad where r or AUC is apart and below"
        f" {100 * LOST:.0f} % of its ceiling; middling otherwise, also where r or AUC is below"
        f" {100 * FOLLOWED:.0f} % of its ceiling and not apart, which is undecided"
    ),
    "Usefulness": "the verdict of the downstream study: helps is good, no evidence middling, harms bad",
    "Limits": (
        f"good from {MANY} held-out subjects on where all that was to be measured and made was; bad below {FEW}, where"
        " the training data are simulated, and where there are images that the privacy tests say should not be"
        " released; middling otherwise"
    ),
}
#: Below this p, adjusted for all contrasts but the primary one, an arm is said to lose.
LEVEL = 0.05
_WORST: tuple[Grade, ...] = ("good", "middling", "bad")


@dataclass(frozen=True)
class Sentence:
    """`figure` is the one that stands out, `text` one sentence about it, `also` what else has to be said."""

    topic: str
    grade: Grade
    figure: str
    text: str
    also: tuple[str, ...] = ()


def sentences(
    metrics: Measured,
    privacy: Measured | None,
    downstream: Measured | None,
    opened: Measured | None,
    called: Names,
    *,
    simulated: bool,
    grid: str,
    scans_left_out: int,
) -> list[Sentence]:
    """All five.

    Parameters
    ----------
    metrics, privacy, downstream, opened
        evaluation/metrics.json, privacy/report.json, augmentation/results.json and test-opened.json; None where the
        study has none.
    called
        Names of covariates.
    simulated
        Whether the training scans are.
    grid
        Size of an image, in words.
    scans_left_out
        By preprocessing.
    """
    return [
        privacy_sentence(privacy, called),
        realism_sentence(metrics),
        fidelity_sentence(metrics, called),
        usefulness_sentence(downstream, opened, called),
        limits_sentence(
            metrics,
            privacy,
            downstream,
            opened,
            simulated=simulated,
            grid=grid,
            scans_left_out=scans_left_out,
            called=called,
        ),
    ]


def _sentence(topic: str, grade: Grade, figure: str, clauses: Sequence[str]) -> Sentence:
    text, *also = (f"{clause[:1].upper()}{clause[1:]}." for clause in clauses if clause)
    return Sentence(topic, grade, figure, text, tuple(also))


def _worst(grades: Sequence[Grade]) -> Grade:
    return max(grades, key=_WORST.index, default="good")


def ends(figure: Measured) -> tuple[float, float] | None:
    """The interval, or the value twice where there is none; None where it is not defined, or of too few to tell."""
    value = figure.get("value")
    if value is None or "too_few" in figure:
        return None
    low, high = figure.get("low"), figure.get("high")
    return float(value if low is None else low), float(value if high is None else high)


def apart(figure: Measured, reference: Measured | None) -> int:
    """1 where the interval of a figure lies above that of its reference, -1 where it lies below, 0 where they meet or
    one of them is not defined.
    """
    one, other = ends(figure), ends(reference or {})
    if one is None or other is None:
        return 0
    return 1 if one[0] > other[1] else -1 if one[1] < other[0] else 0


# ------------------------------------------------------------------------------------------------- privacy


#: What was found where a gate on a plain condition was measured and is neither passed nor failed.
_NOT_MET = {
    COPIES_FOUND: "detectors miss planted copies",
    STRANGERS: "strangers are flagged more often than the level says",
}


def _gate(gate: Measured, called: Names) -> str:
    return f"{called.gate(gate['name'])} {_held(gate)}"


def _held(gate: Measured) -> str:
    return f"{interval(gate['figure'])}, limit {bounds_text(gate['name'], gate['limit'])}"


def _not_met(gate: Measured) -> bool:
    """Whether a gate on a plain condition has a figure that says what its outcome means."""
    return gate["name"] in PLAIN and gate["name"] in _NOT_MET and gate["figure"].get("value") is not None


def _unknown(gate: Measured, called: Names) -> str:
    few = gate["figure"].get("too_few")
    return called.gate(gate["name"]) + ("" if few is None else f" ({few} on one side, too few)")


def _beyond(gate: Measured) -> float:
    """How far a gate's interval reaches over its limit; conditions without an interval come first."""
    found = ends(gate["figure"])
    if gate["name"] in PLAIN or found is None:
        return float("inf")
    least, most = bounds(gate["name"], gate["limit"])
    return max(found[1] - most, least - found[0])


def privacy_sentence(report: Measured | None, called: Names) -> Sentence:
    """The verdict, why it is so, and what the filter did."""
    if report is None:
        text = "nobody has tested whether these images give training subjects away: handle them as the cohort itself"
        return _sentence("Privacy", "bad", "not tested", [text])
    gates, counts, verdict = report["gates"], report["counts"], report["verdict"]
    by_outcome = {
        outcome: sorted((gate for gate in gates if gate["outcome"] == outcome), key=_beyond, reverse=True)
        for outcome in ("FAIL", "NOT_EVALUATED", "CONDITIONAL", "PASS")
    }
    failed, passed = by_outcome["FAIL"], by_outcome["PASS"]
    unmet = [gate for outcome in ("NOT_EVALUATED", "CONDITIONAL") for gate in by_outcome[outcome] if _not_met(gate)]
    unknown = [gate for gate in by_outcome["NOT_EVALUATED"] if not _not_met(gate)]
    open_ = [gate for gate in by_outcome["CONDITIONAL"] if not _not_met(gate)]
    total = counted(len(gates), "test")
    clauses = []
    if failed:
        shown = "; ".join(f"{_gate(gate, called)} ({gate.get('meaning') or 'over its limit'})" for gate in failed)
        clauses.append(f"{len(failed)} of {total} failed: {shown}")
    clauses += [f"{_NOT_MET[gate['name']]}: {_held(gate)}" for gate in unmet]
    if unknown:
        shown = ", ".join(_unknown(gate, called) for gate in unknown)
        clauses.append(f"{len(unknown)} of {total} could not be evaluated: {shown}")
    if open_:
        clauses.append(
            f"{len(open_)} of {total} {'is' if len(open_) == 1 else 'are'} undecided, because the limit lies inside"
            f" the 95 % interval (furthest over it: {_gate(open_[0], called)})"
        )
    if not clauses and passed:
        measured = [gate for gate in passed if gate["name"] not in PLAIN]
        nearest = f"; nearest to its limit is {_gate(measured[0], called)}" if measured else ""
        clauses.append(f"all {total} are within their limits{nearest}")
    if report["calibration"]["status"] != "CALIBRATED":
        clauses.append("the filter was not calibrated and rejected nothing for being too near to a training scan")
    else:
        clauses.append(f"the filter rejected {number(counts['rejected'])} of {counted(counts['candidates'], 'image')}")
    loss = report["attacks"].get("denoising_loss")
    if loss and (ends(loss["auc"]) or (0.0, 0.0))[0] > 0.5:
        clauses.append(f"whoever had the weights could tell training subjects with AUC {interval(loss['auc'])}")
    grade: Grade = {"PASS": "good", "CONDITIONAL": "middling"}.get(verdict, "bad")  # type: ignore[assignment]
    return _sentence("Privacy", grade, verdict.replace("_", " "), clauses)


# ------------------------------------------------------------------------------------------------- realism


@dataclass(frozen=True)
class Finding:
    """A figure of realism beside its reference; `step` is how its distance from it counts (larger is worse)."""

    key: str
    space: str
    figure: Measured
    reference: Measured
    apart: bool
    bad: bool
    step: float


#: Figures that fall below their ceiling as images get worse; of these, those that a share of the ceiling is bad for.
_SHARES = ("precision", "recall", "density", "coverage")
_BANDS = {
    "below_quarter": "power below a quarter of Nyquist",
    "quarter_to_half": "power from a quarter to half of Nyquist",
    "above_half": "power above half of Nyquist",
}


def _ratio(figure: Measured, reference: Measured) -> float:
    value, other = figure.get("value"), reference.get("value")
    return float(value) / float(other) if value is not None and other else 1.0


def _with_reference(metrics: Measured) -> Iterator[tuple[str, str, Measured, Measured]]:
    """Every figure of realism, diversity and sharpness that has a floor or ceiling: key, space, figure, and that."""
    for space, entry in metrics["realism"].items():
        for key, figure in {**entry, **metrics["diversity"]["features"].get(space, {})}.items():
            reference = (figure.get("floor") or figure.get("ceiling")) if isinstance(figure, Mapping) else None
            if reference is not None:
                yield key, space, figure, reference
    settings = metrics["diversity"].get("ssim_settings", {})
    pairs = metrics["diversity"].get(settings.get("metric"))
    if pairs and pairs.get("floor"):
        yield settings["metric"], "", pairs, pairs["floor"]
    for band, figure in metrics["spectrum"]["synthetic"].items():
        if figure.get("ceiling"):
            yield band, "", figure, figure["ceiling"]


def realism_findings(metrics: Measured) -> Iterator[Finding | None]:
    """Every figure beside its floor or ceiling; None for one that is not defined itself, or whose reference is not."""
    for key, space, figure, reference in _with_reference(metrics):
        found = ends(figure)
        if found is None or ends(reference) is None:
            yield None
            continue
        side, ratio = apart(figure, reference), _ratio(figure, reference)
        if key == "classifier_auc":
            yield Finding(key, space, figure, reference, side > 0, found[0] >= TOLD, float(figure["value"]))
        elif key in _SHARES:
            yield Finding(key, space, figure, reference, side < 0, side < 0 and ratio < LACKING, -ratio)
        elif key == "vendi":
            yield Finding(key, space, figure, reference, side != 0, False, abs(ratio - 1))
        elif key in _BANDS:
            off = abs(float(figure["value"]) - 1)
            yield Finding(key, space, figure, reference, side != 0, side != 0 and off > POWER, off)
        else:
            bad = key == "frechet" and side > 0 and ratio > FAR
            yield Finding(key, space, figure, reference, side > 0, bad, ratio)


def realism_sentence(metrics: Measured) -> Sentence:
    """How well images are told from real ones, and every kind of figure that is apart from what real scans give."""
    every = list(realism_findings(metrics))
    found = [finding for finding in every if finding is not None]
    unknown = len(every) - len(found)
    skipped = {names.space(key): entry["skipped"] for key, entry in metrics["realism"].items() if "skipped" in entry}
    spaces = [entry for entry in metrics["realism"].values() if "skipped" not in entry]
    off = [finding for finding in found if finding.apart]

    def worst(*keys: str) -> Finding | None:
        return max((one for one in found if one.key in keys), key=lambda one: one.step, default=None)

    clauses = []
    told = worst("classifier_auc")
    if told:
        clauses.append(
            f"a linear classifier tells the images from held-out scans with AUC {interval(told.figure)} by their"
            f" {names.space(told.space)} (0.5: not at all; training scans: {interval(told.reference)})"
        )
    far = worst("frechet")
    if far and far.apart:
        decoded = far.figure.get("reconstructions")
        also = f", reconstructions of real scans {interval(decoded)}" if decoded else ""
        clauses.append(
            f"the Frechet distance is largest beside its floor in {names.space(far.space)}, {interval(far.figure)}"
            f" (floor {interval(far.reference)}{also})"
        )
    for key in ("precision", "recall"):
        low = worst(key)
        if low and low.apart:
            clauses.append(
                f"{key} in {names.space(low.space)} is {interval(low.figure)} (ceiling {interval(low.reference)})"
            )
    power = worst(*_BANDS)
    if power and power.apart:
        clauses.append(f"{_BANDS[power.key]} is {percent(power.figure)} of that of real images")
    alike = worst("ms_ssim", "ssim")
    if alike and alike.apart:
        clauses.append(
            f"images resemble each other more than real ones do, {spelt(alike.key)} {interval(alike.figure)}"
            f" (real pairs {interval(alike.reference)})"
        )
    if found:
        said = "none" if not off else str(len(off))
        clauses.append(f"{said} of {counted(len(found), 'figure')} {_are(len(off))} apart from what real scans give")
    if unknown:
        clauses.append(
            f"not measured: {counted(unknown, 'figure')} where either the figure or what real scans give is not defined"
        )
    if skipped:
        clauses.append(f"not measured: {_listed(skipped)}")
    if not spaces or not found:
        return _sentence("Realism", "bad" if any(one.bad for one in found) else "not measured", "not measured", clauses)
    grade: Grade = "bad" if any(one.bad for one in found) else "middling" if off or skipped or unknown else "good"
    stands = f"AUC {number(told.figure['value'])}" if told else f"{len(off)} of {len(found)} apart"
    return _sentence("Realism", grade, stands, clauses)


def _are(count: int) -> str:
    return "is" if count == 1 else "are"


def _listed(reasons: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({str(reason).rstrip('.')})" for name, reason in reasons.items())


def spelt(key: str) -> str:
    """Name of a similarity of images."""
    return {"ms_ssim": "MS-SSIM", "ssim": "SSIM"}.get(key, key)


# ------------------------------------------------------------------------------------------------ fidelity


def _read(entry: Measured) -> tuple[str, Measured]:
    """The figure that says how well a covariate is followed: r of a number, AUC of a label."""
    key = "auc" if entry["kind"] == "categorical" else "r"
    return key, entry[key]


def _covariate(name: str, entry: Measured) -> tuple[Grade, float, list[str], list[str]]:
    """Grade of a covariate, its share of the ceiling, that its r or AUC is too low, and what else is wrong."""
    key, figure = _read(entry)
    ceiling = figure.get("ceiling")
    if ends(figure) is None or ceiling is None or ends(ceiling) is None:
        return "middling", 0.0, [], [f"{name} could not be compared with held-out scans"]
    grades, low, wrong = list[Grade](["good"]), list[str](), list[str]()
    share = _ratio(figure, ceiling)
    if share < FOLLOWED and apart(figure, ceiling) < 0:
        grades.append("bad" if share < LOST else "middling")
        low.append(f"{name} follows with {_key(key)} {interval(figure)} (ceiling {interval(ceiling)})")
    elif share < FOLLOWED:
        grades.append("middling")
        wrong.append(
            f"whether {name} is followed is undecided: {_key(key)} {interval(figure)} is {percent({'value': share})} of"
            f" its ceiling {interval(ceiling)}, and the intervals meet"
        )
    for part, unit in (("slope", ""), ("bias", f" {entry.get('unit', '')}")):
        other = entry.get(part)
        if other and apart(other, other.get("ceiling")):
            grades.append("middling")
            wrong.append(
                f"the {part} of {name} is {interval(other)}{unit} (held-out scans: {interval(other['ceiling'])})"
            )
    if float(ceiling["value"]) < READABLE[key]:
        grades.append("middling")
        wrong.append(f"{name} can hardly be read even from held-out scans ({_key(key)} {interval(ceiling)})")
    return _worst(grades), share, low, wrong


def _key(key: str) -> str:
    return "AUC" if key == "auc" else "r"


def _below_in_subgroups(metrics: Measured, called: Names) -> str:
    """What falls below its ceiling within a level of a covariate, or that nothing could be measured there."""
    found, total = [], 0
    for label, levels in metrics["subgroups"].items():
        for level, part in levels.items():
            for name, entry in part["covariates"].items():
                key, figure = _read(entry)
                if ends(figure) is None or ends(figure.get("ceiling") or {}) is None:
                    continue
                total += 1
                if apart(figure, figure.get("ceiling")) < 0:
                    where = f"{called.covariate(name)} where {called.covariate(label)} = {level}"
                    shown = f"{_key(key)} {interval(figure)}, ceiling {interval(figure['ceiling'])}"
                    found.append((_ratio(figure, figure["ceiling"]), f"{where}: {shown}"))
    if total == 0 and metrics["subgroups"] and len(metrics["covariates"]) > 1:
        return "no subgroup could be measured: there are too few images of each"
    if not found:
        return ""
    return (
        f"within subgroups {len(found)} of {counted(total, 'figure')} {_are(len(found))} below the ceiling (worst:"
        f" {min(found)[1]})"
    )


def fidelity_sentence(metrics: Measured, called: Names) -> Sentence:
    """The covariate with the worst grade and the lowest share of its ceiling, and whatever else differs from what
    predictors read in real scans.
    """
    covariates = metrics["covariates"]
    skipped = {called.covariate(name): reason for name, reason in metrics["predictors"]["skipped"].items()}
    missing = f"not measured: {_listed(skipped)}" if skipped else ""
    if not covariates:
        return _sentence("Fidelity", "not measured", "not measured", [missing or "no covariate could be measured"])
    judged = {name: _covariate(called.covariate(name), entry) for name, entry in covariates.items()}
    least = min(judged, key=lambda name: (-_WORST.index(judged[name][0]), judged[name][1]))
    key, figure = _read(covariates[least])
    ceiling = figure.get("ceiling")
    told = f"{_key(key)} {interval(figure)} between what was asked for and what is measured"
    if key == "auc":
        told = f"what was asked for is read from the images with AUC {interval(figure)}"
    name = called.covariate(least)
    first = f"of {len(judged)} covariates the weakest is {name}"
    if len(judged) == 1:
        first = f"the one covariate that was measured is {name}"
    clauses = [f"{first}: {told}, {interval(ceiling)} in held-out scans (its ceiling)"]
    clauses += [said for name, (_, _, low, _) in judged.items() if name != least for said in low]
    clauses += [said for _, _, _, wrong in judged.values() for said in wrong]
    grades = [grade for grade, *_ in judged.values()]
    second = (metrics.get("segmentation") or {}).get("covariates", {})
    for name, entry in second.items():
        grade, _, low, wrong = _covariate(f"{called.covariate(name)} (by the segmenter)", entry)
        grades.append(grade)
        clauses += low + wrong
    subgroups = _below_in_subgroups(metrics, called)
    if subgroups or skipped:
        grades.append("middling")
    return _sentence(
        "Fidelity",
        _worst(grades),
        f"{_key(key)} {number(figure['value'])}",
        [*clauses, subgroups, missing],
    )


# ---------------------------------------------------------------------------------------------- usefulness


def usefulness_sentence(results: Measured | None, opened: Measured | None, called: Names) -> Sentence:
    """What a classifier gained, and what it could have gained at all."""
    if results is None:
        text = "whether a model that learns from these images gains anything was not studied: nothing is known of it"
        return _sentence("Usefulness", "not measured", "not studied", [text])
    primary, verdict = results["primary"], results["verdict"]
    grade: Grade = {"helps": "good", "harms": "bad"}.get(verdict, "middling")  # type: ignore[assignment]
    target = called.covariate(results["target"])
    clauses = [
        f"{verdict}: with the synthetic images ({primary['arm']} against {primary['reference']}) the AUC of a"
        f" classifier of {target} changes by {interval(primary['difference'])}, on"
        f" {counted(results['n']['test_subjects'], 'test subject')}"
    ]
    if primary.get("non_inferior") is False and verdict != "harms":
        clauses.append(f"a loss of more than {limit(primary['margin'])} cannot be excluded")
    with_synthetic = {arm["name"] for arm in results["arms"] if arm["settings"]["synthetic"]}
    worse = [
        row
        for row in results["contrasts"]
        if not row["primary"]
        and row["arm"] in with_synthetic
        and row["p_holm"] is not None
        and row["p_holm"] < LEVEL
        and (row["difference"]["value"] or 0.0) < 0
    ]
    if worse:
        shown = ", ".join(f"{row['arm']} against {row['reference']} {interval(row['difference'])}" for row in worse)
        clauses.append(f"other arms lose: {shown}")
    if opened and opened["designs"] > 1:
        clauses.append(f"the test split has been opened with {opened['designs']} designs, which flatters")
    gain = primary["difference"]["value"]
    stands = "not defined" if gain is None else f"{'+' if gain > 0 else ''}{number(gain, 2)} AUC"
    return _sentence("Usefulness", grade, stands, clauses)


# -------------------------------------------------------------------------------------------------- limits


def limits_sentence(
    metrics: Measured,
    privacy: Measured | None,
    downstream: Measured | None,
    opened: Measured | None,
    *,
    simulated: bool,
    grid: str,
    scans_left_out: int,
    called: Names,
) -> Sentence:
    """On how much it all rests, what was not measured or made, and what no interval covers."""
    counts = metrics["n"]
    held_out, grades = int(counts["held_out_subjects"]), list[Grade]()
    clauses = [
        f"all figures rest on {counted(held_out, 'held-out subject')} and"
        f" {counted(counts['synthetic'], 'synthetic image')} of {grid}"
    ]
    grades.append("bad" if held_out < FEW else "middling" if held_out < MANY else "good")
    if simulated:
        grades.append("bad")
        clauses.append("the training data are simulated, so nothing here is about patients")
    beyond = {
        called.covariate(name): entry["extrapolation"]["mae"]["n"]
        for name, entry in metrics["covariates"].items()
        if "extrapolation" in entry
    }
    if beyond:
        shown = ", ".join(f"{name} ({number(count)})" for name, count in beyond.items())
        clauses.append(f"some requests lie beyond what training scans have and count in no figure: {shown}")
    if privacy and stopping(privacy["gates"]):
        grades.append("bad")
        clauses.append("by the privacy tests the images should not be released")
    failed, planned = (int((privacy or {}).get("counts", {}).get(key, 0)) for key in ("failed", "planned"))
    if failed:
        clauses.append(f"{number(failed)} of {counted(planned, 'planned subject')} could not be made")
    if scans_left_out:
        clauses.append(f"{counted(scans_left_out, 'scan')} {_are(scans_left_out)} left out of it all by preprocessing")
    absent = _not_measured(metrics, privacy, downstream)
    if absent:
        clauses.append(f"not measured: {', '.join(absent)}")
    blind, seen = blind_figures(metrics["sanity"])
    if blind:
        clauses.append(
            f"{len(blind)} of {counted(len(blind) + len(seen), 'figure')} see none of the faults that scans were"
            " spoilt with, so that being at their floor says little"
        )
    if beyond or failed or scans_left_out or absent or blind or (opened and opened["designs"] > 1):
        grades.append("middling")
    clauses.append("no interval covers another training of the models: there was one")
    return _sentence("Limits", _worst(grades), counted(held_out, "held-out subject"), clauses)


def _not_measured(metrics: Measured, privacy: Measured | None, downstream: Measured | None) -> list[str]:
    absent = [] if privacy else ["privacy"]
    absent += [] if downstream else ["usefulness"]
    absent += [f"realism by {names.space(key)}" for key, entry in metrics["realism"].items() if "skipped" in entry]
    absent += ["from which detail on images are told"] if "skipped" in metrics["discriminability"] else []
    absent += [] if "figures" in metrics["sanity"] else ["what each figure says of spoilt scans"]
    return absent


def blind_figures(sanity: Measured) -> tuple[list[str], list[str]]:
    """Figures that see none of the ways in which scans were spoilt, and those that see one."""
    found: dict[bool, list[str]] = {True: [], False: []}
    for space, entries in sanity.get("figures", {}).items():
        for key, entry in entries.items():
            found[not entry["sees"]].append(f"{key} in {space}")
    return found[True], found[False]
