"""A blind test: who is shown, in which order, and what readers' answers are worth.

People see what no feature space was made for, and miss what all of them see.  A reader who cannot tell is right half of
the time; how far from half an interval reaches depends on how many images were judged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binom, binomtest

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox
from meddiff_steps.imaging.selection import Images
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, figure, rounded
from meddiff_steps.statistics.measures import auc, mean_of, smaller_side

#: Columns of the answers; `certainty` runs from 0 (surely real) to 100 (surely synthetic), 50 is "cannot tell".
ANSWERS = ("lineup", "reader", "image", "certainty")
UNDECIDED = 50.0
RESAMPLES = 2000


def choose(real: Images, synthetic: Images, count: int, seed: str) -> pd.DataFrame:
    """Whom to show, drawn from a keyed stream, without a look at the images.

    Parameters
    ----------
    real, synthetic
        Candidates; of a real subject with several scans one is shown at most.
    count
        Of each; fewer where there are fewer.
    seed
        Root of the stream.

    Returns
    -------
    pandas.DataFrame
        A row per place on the page, in order: `image` (1, 2, ...), `kind` (`real`, `synthetic`), `id` and `row`, its
        row of the shards.

    Raises
    ------
    UserError
        There are fewer than two of a kind.
    """
    sides = {}
    for kind, images in (("real", real), ("synthetic", synthetic)):
        table = images.table.sort_values(images.key, kind="stable").drop_duplicates(images.unit)
        order = philox(seed, f"lineup {kind}").permutation(len(table))
        sides[kind] = table.iloc[order].assign(id=table[images.key].iloc[order], kind=kind)[["kind", "id", "row"]]
    most = min(count, *map(len, sides.values()))
    if most < 2:
        found = ", ".join(f"{len(side)} {kind}" for kind, side in sides.items())
        raise UserError(f"lineup: {found} images to choose from, at least 2 of each are needed. Make more.")
    shown = pd.concat([side[:most] for side in sides.values()], ignore_index=True)
    shown = shown.iloc[philox(seed, "lineup order").permutation(len(shown))].reset_index(drop=True)
    return shown.assign(image=np.arange(1, len(shown) + 1))[["image", "kind", "id", "row"]]


def score(key: Mapping[str, Any], answers: pd.DataFrame) -> dict[str, Any]:
    """What answers are worth.

    Parameters
    ----------
    key
        Content of key.json: `lineup`, and `images` with `image` and `kind` each.
    answers
        Columns `ANSWERS`, a row per reader and image; images may be left out.

    Returns
    -------
    dict
        `readers`: per reader `answered`, `undecided`, `accuracy` of the others (Wilson interval), the number of right
        answers that `chance` alone gives in 95 of 100 cases, the two-sided exact `p_value` of guessing, and `auc`: how
        often a synthetic image got the higher certainty than a real one (interval over images).  `all`: accuracy and
        `auc` over all answers, intervals over images, each with all its readers.

    Raises
    ------
    UserError
        Answers of another line-up, of images that it does not have, twice, or not numbers from 0 to 100.
    """
    kinds = {int(entry["image"]): entry["kind"] == "synthetic" for entry in key["images"]}
    table = _checked(key, answers, kinds)
    truth = table["image"].map(kinds).to_numpy(dtype=bool)
    certainty = table["certainty"].to_numpy(dtype=float)
    table = table.assign(truth=truth, decided=certainty != UNDECIDED, right=(certainty > UNDECIDED) == truth)
    out: dict[str, Any] = {"lineup": key["lineup"], "images": len(kinds), "readers": {}}
    for reader, part in table.groupby("reader", sort=True):
        decided = part[part["decided"]]
        out["readers"][str(reader)] = {
            "answered": len(part),
            "undecided": int((~part["decided"]).sum()),
            **_accuracy(int(decided["right"].sum()), len(decided)),
            "auc": _auc(part),
        }
    decided = table[table["decided"]]
    weighed = Bootstrap(decided["image"].to_numpy(), RESAMPLES, key["lineup"], "lineup accuracy")
    right = decided["right"].to_numpy(dtype=float)
    out["all"] = {
        "answered": len(table),
        "accuracy": weighed.figure(mean_of(right), weighed.n),
        "auc": _auc(table),
    }
    return out


def _accuracy(right: int, answers: int) -> dict[str, Any]:
    """Share of right answers with Wilson's interval, and what guessing would give."""
    if answers == 0:
        return {"accuracy": figure(np.nan, np.full(1, np.nan), 0), "chance": None, "p_value": None}
    test = binomtest(right, answers, 0.5)
    ends = test.proportion_ci(method="wilson")
    value: Figure = {
        "value": rounded(right / answers),
        "low": rounded(float(ends.low)),
        "high": rounded(float(ends.high)),
        "n": answers,
    }
    guessed = [int(binom.ppf(share, answers, 0.5)) for share in (0.025, 0.975)]
    return {"accuracy": value, "right": right, "chance": guessed, "p_value": rounded(float(test.pvalue))}


def _auc(part: pd.DataFrame) -> Figure:
    boot = Bootstrap(part["image"].to_numpy(), RESAMPLES, "lineup", "auc")
    truth = part["truth"].to_numpy()
    return boot.figure(auc(truth, part["certainty"].to_numpy(dtype=float)), smaller_side(truth, part["image"]))


def _checked(key: Mapping[str, Any], answers: pd.DataFrame, kinds: Mapping[int, bool]) -> pd.DataFrame:
    missing = [name for name in ANSWERS if name not in answers]
    if missing:
        raise UserError(
            f"answers: no column {missing[0]}, found {', '.join(map(str, answers.columns))}. Expected are"
            f" {', '.join(ANSWERS)}; the page writes them."
        )
    if answers.empty:
        raise UserError("answers: no row. Copy what the page shows below its images into the file.")
    others = sorted(set(answers["lineup"].astype(str)) - {str(key["lineup"])})
    if others:
        raise UserError(
            f"answers: of line-up {others[0]}, the key is of {key['lineup']}. Give the key of the page that was read."
        )
    numbers = {name: pd.to_numeric(answers[name], errors="coerce") for name in ("image", "certainty")}
    strange = ~numbers["image"].isin(list(kinds))
    if strange.any():
        raise UserError(
            f"answers: no image {answers['image'][strange].iloc[0]} on the page, which has 1 to {len(kinds)}. Correct"
            " the row."
        )
    wrong = ~numbers["certainty"].between(0, 100)
    if wrong.any():
        raise UserError(
            f"answers: certainty {answers['certainty'][wrong].iloc[0]} of image {answers['image'][wrong].iloc[0]},"
            " expected a number from 0 (surely real) to 100 (surely synthetic). Correct the row."
        )
    table = answers.assign(image=numbers["image"].astype(int), certainty=numbers["certainty"])
    twice = table[table.duplicated(["reader", "image"])]
    if len(twice):
        raise UserError(
            f"answers: reader {twice['reader'].iloc[0]} judged image {twice['image'].iloc[0]} more than once. Keep one"
            " row of them."
        )
    return table
