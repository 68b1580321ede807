"""L4 of an audit, row by row: what each row of the ledger says could be so.

Keys and noise are computed again; no model is needed.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from meddiff_steps import config
from meddiff_steps.audit.progress import progress
from meddiff_steps.cohort.texts import COLUMN as TEXT
from meddiff_steps.core.random_streams import SCHEME as SEED_SCHEME
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.provenance import ledger
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release.sealed import Sealed
from meddiff_steps.synthesis.plan import planned_text
from meddiff_steps.synthesis.size import group_rows

#: Attempt and key of a subject's released image (None if there is none), the number of its attempts, and its subgroup
#: of the filter.
Outcome = tuple[int | None, str | None, int, str]
#: What each check says if nothing is wrong, and after the number of wrong things.
SAID = {
    "seed-keys": ("all keys of {rows} rows follow from the seed", "key(s) do not follow from the seed"),
    "unique": ("no two subjects share a key or noise", "subject(s) share a key or noise with another"),
    "noise": ("every key gives the noise whose digest the ledger holds", "key(s) give other noise than recorded"),
    "recipe": ("sampler, steps, guidance and batch size are those of the config", "row(s) differ from the config"),
    "covariates": ("all covariates are what the plan allows", "covariate(s) are not what the plan allows"),
    "groups": ("{groups} group(s) have their planned size", "problem(s) with groups"),
    "measured": ("measurements are of the study's covariates, within what they can be", "problem(s) with measurements"),
    "attempts": ("attempts and decisions fit together", "row(s) whose attempts and decisions do not fit"),
}


class Tally:
    """Rows looked at one by one: what is wrong with them, and what they add up to.

    Attributes
    ----------
    wrong
        What is wrong, by check.
    decisions
        Rows by decision of the privacy filter.
    outcomes
        By subject.
    """

    def __init__(self, study: config.Study) -> None:
        self.study = study
        self.groups = {group.name: group for group in study.plan}
        self._fixed = {group.name: fixed_values(group) for group in study.plan}
        self.wrong: dict[str, list[str]] = {name: [] for name in SAID}
        self.decisions: Counter[str] = Counter()
        self.outcomes: dict[str, Outcome] = {}
        self.measured = False
        self._counts: Counter[str] = Counter()
        self._usual: dict[str, Any] | None = None
        #: Which subject a key or noise was first seen of: name, group and number.
        self._owners: dict[str, dict[str, tuple[str, str, int]]] = {"key": {}, "noise": {}}

    def look(self, row: ledger.Row) -> None:
        """Add a row."""
        name, group, subgroup = row["sample_id"], self.groups.get(row["group"]), self.study.privacy.subgroup
        self._counts[row["group"]] += 1
        self.measured |= bool(row.get("measured"))
        self.decisions[row["privacy"]["decision"]] += 1
        held = str(row["covariates"].get(subgroup)) if subgroup else "all"
        self.outcomes[name] = (row["attempt"], row["seed_key"], row["privacy"]["attempts"], held)
        if group is None:
            self.wrong["groups"].append(f"{name}: group {row['group']!r} is not in the plan")
            return
        self._look_at_recipe(row)
        problems = {
            "measured": measured_problems(row, self.study),
            "covariates": [
                *covariate_problems(row, group, self.study, self._fixed[group.name]),
                *(text_problems(row, group) if self.study.text.column is not None else ()),
            ],
            "attempts": _attempt_problems(row, self.study.privacy.max_attempts),
        }
        for check, found in problems.items():
            self.wrong[check] += [f"{name}: {problem}" for problem in found]
        self._look_at_key(row, group)

    def _look_at_recipe(self, row: ledger.Row) -> None:
        if row["recipe"] == self._usual:  # all share one, as a rule
            return
        if (expected := config_recipe(self.study, row["recipe"])) != row["recipe"]:
            self.wrong["recipe"].append(f"{row['sample_id']}: {difference(row['recipe'], expected)}")
        else:
            self._usual = expected

    def _look_at_key(self, row: ledger.Row, group: config.PlanGroup) -> None:
        name = row["sample_id"]
        points = len(next(iter(group.grid.values()))) or 1 if group.covariates == "counterfactual" else 1
        if (
            row["cohort_root"] != f"{self.study.seed}/{row['group']}"
            or row["noise_index"] != row["index"] // points
            or name != f"{row['group']}{row['index']:06d}"
        ):
            self.wrong["seed-keys"].append(
                f"{name}: root {row['cohort_root']!r}, number {row['index']}, noise {row['noise_index']} do not follow"
                " from seed and plan"
            )
        if row["seed_key"] is None:
            return
        if row["seed_key"] != seed_key(row["cohort_root"], row["noise_index"], row["attempt"], "noise"):
            self.wrong["seed-keys"].append(f"{name}: the key does not follow from root, number and attempt")
        # The rows of one counterfactual subject share their noise on purpose; nobody else may.
        origin = (name, row["group"], row["noise_index"] if points > 1 else row["index"])
        for kind, value in (("key", row["seed_key"]), ("noise", row["noise_sha256"])):
            other = self._owners[kind].setdefault(value, origin)
            if other[1:] != origin[1:]:
                self.wrong["unique"].append(f"{name} and {other[0]} share their {kind}")
        if row["noise_sha256"] != ledger.noise_digest(row["seed_key"]):
            self.wrong["noise"].append(f"{name}: this key gives other noise here")

    def close(self, seed: Mapping[str, Any]) -> None:
        """When all rows are there: the groups have their size, and the seed is the study's."""
        for name, group in self.groups.items():
            if self._counts[name] != (size := group_rows(group)):
                self.wrong["groups"].append(f"group {name}: {self._counts[name]} rows, planned {size}")
        expected = {"scheme": SEED_SCHEME, "root": self.study.seed, "numbers": ledger.NOISE_NUMBERS}
        if any(seed.get(key) != value for key, value in expected.items()):
            self.wrong["seed-keys"].append(
                f"root.json: seed {seed}, expected scheme {SEED_SCHEME} and root {self.study.seed!r}"
            )


def check_recipes(release: Sealed) -> tuple[list[Check], Tally]:
    """Checks of the rows, and what these add up to."""
    study, rows = release.study, release.root["ledger"]["rows"]
    assert study is not None
    tally = Tally(study)
    for row in progress(release.rows(), rows, "recipes", "row"):
        tally.look(row)
    tally.close(release.root["seed"])
    if release.instrument("predictors") is not None and not tally.measured and tally.decisions["released"]:
        tally.wrong["measured"].append("by its records images were measured, but no row says what was found")
    checks = [
        judged(4, name, tally.wrong[name], good.format(rows=rows, groups=len(tally.groups)), bad)
        for name, (good, bad) in SAID.items()
    ]
    return checks, tally


# ------------------------------------------------------------------------------------------------ a row


def config_recipe(study: config.Study, recipe: Mapping[str, Any]) -> dict[str, Any]:
    """The recipe that the config asks for; what it leaves open (weights, a sampler's usual steps) as the row has it."""
    wanted = study.generate
    # What rows of older versions lack is not asked for.
    later = {
        "guidance": wanted.guidance,
        "guidance_interval": list(wanted.guidance_interval) if wanted.guidance_interval else None,
        "drawing_steps": wanted.drawing_steps if study.decoder.network else None,
        **{
            name: (recipe.get(name) or "the weights of a model of label maps") if study.pairs else None
            for name in ("mask_autoencoder", "mask_diffusion")
        },
        "decoder": (recipe.get("decoder") or "the weights of a decoder") if study.decoder.network else None,
    }
    return {
        **recipe,
        "sampler": wanted.sampler,
        "num_inference_steps": wanted.num_inference_steps or recipe["num_inference_steps"],
        "guidance_scale": wanted.guidance_scale,
        "batch_size": wanted.batch_size,
        "precision": study.compute.precision,
        **{key: value for key, value in later.items() if key in recipe},
    }


def difference(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The fields that differ, with both values."""
    return ", ".join(
        f"{key} {found.get(key)!r} instead of {expected.get(key)!r}"
        for key in sorted({*found, *expected})
        if found.get(key) != expected.get(key)
    )


class Values:
    """Values that a plan fixes, in the order in which one is found quickly among many."""

    def __init__(self, values: Sequence[config.Scalar]) -> None:
        self._texts = {value if isinstance(value, str) else f"{value:g}" for value in values}
        self._numbers = sorted({float(value) for value in values if not isinstance(value, str)})

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, str):
            return value in self._texts
        place = bisect_left(self._numbers, value)
        return any(_same(value, wanted) for wanted in self._numbers[max(0, place - 1) : place + 1])


def fixed_values(group: config.PlanGroup) -> dict[str, Values]:
    """By covariate, what a group of the plan allows of it."""
    fixed = {name: [value] for name, value in group.base.items()} | group.grid
    return {name: Values(values) for name, values in fixed.items()}


def covariate_problems(
    row: ledger.Row, group: config.PlanGroup, study: config.Study, fixed: Mapping[str, Values]
) -> Iterator[str]:
    """Which covariates of a row the study could not have asked for; `fixed` is `fixed_values` of its group."""
    values, covariates = row["covariates"], study.covariates
    expected = {*covariates, *([TEXT] if study.text.column is not None else [])}
    if set(values) != expected:
        yield f"covariates {sorted(values)}, declared {sorted(expected)}"
        return
    for name, covariate in covariates.items():
        value, categorical = values[name], isinstance(covariate, config.CategoricalCovariate)
        if not _is_allowed(value, name, covariate, group):
            yield f"{name} = {value!r}"
            continue
        if name in group.where and not _fulfils(value, group.where[name], categorical):
            yield f"{name} = {value!r}, asked for {group.where[name]}"
        if name in fixed and value not in fixed[name]:
            yield f"{name} = {value!r}, which is not what the plan fixes"


def text_problems(row: ledger.Row, group: config.PlanGroup) -> Iterator[str]:
    """Whether the text of a row is another than the plan asks for; that of a table's row is the table's to say."""
    values = row["covariates"]
    if group.covariates != "table" and values.get(TEXT) != (wanted := planned_text(group, row["index"], values)):
        yield f"text {values.get(TEXT)!r}, planned {wanted!r}"


def measured_problems(row: ledger.Row, study: config.Study) -> Iterator[str]:
    """What cannot have been measured in the image of a row; whether it was, content and re-execution find."""
    if row["image"] is None:
        return
    segmented = set(study.structures)
    if (row.get("labels") is not None) != bool(segmented) and "measured" in row:
        yield f"{'no' if segmented else 'a'} label map, but the study has {'such' if segmented else 'none'}"
    for column, value in (row.get("measured") or {}).items():
        name = column.removesuffix(ledger.MEASURED).removesuffix(ledger.SEGMENTED)
        covariate = study.covariates.get(name)
        if covariate is None or (column.endswith(ledger.SEGMENTED) and name not in segmented):
            yield f"{column} is no measurement of this study"
        elif ledger.is_text(column, study.covariates):
            if not isinstance(covariate, config.CategoricalCovariate) or value not in covariate.levels:
                yield f"{column} = {value!r}"
        elif isinstance(value, str) or value is None or value != float(f"{value:.6g}"):
            yield f"{column} = {value!r}, not a number of six digits"


def _is_allowed(value: Any, name: str, covariate: Any, group: config.PlanGroup) -> bool:
    """Whether a covariate can have a value at all, or can have none in this group."""
    if value is None:
        return group.covariates == "table" or not any(name in asked for asked in (group.where, group.grid, group.base))
    if isinstance(covariate, config.CategoricalCovariate):
        return value in covariate.levels
    return isinstance(value, (int, float)) and covariate.range[0] <= value <= covariate.range[1]


def _same(value: Any, wanted: Any) -> bool:
    if isinstance(value, str):
        return value == (wanted if isinstance(wanted, str) else f"{wanted:g}")
    return not isinstance(wanted, str) and abs(value - wanted) <= 1e-9 * max(1.0, abs(wanted))


def _fulfils(value: Any, condition: Any, categorical: bool) -> bool:
    if not isinstance(condition, list):
        return _same(value, condition)
    if categorical:
        return any(_same(value, wanted) for wanted in condition)
    return len(condition) == 2 and condition[0] <= value <= condition[1]


def _attempt_problems(row: ledger.Row, most: int) -> Iterator[str]:
    made = row["privacy"]["attempts"]
    if not 1 <= made <= most:
        yield f"{made} attempts, allowed {most}"
    elif row["privacy"]["decision"] == "released" and row["attempt"] != made - 1:
        yield f"released at attempt {row['attempt']} of {made}"
    elif row["privacy"]["decision"] == "rejected" and made != most:
        yield f"given up after {made} of {most} attempts"
