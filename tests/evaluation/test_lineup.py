"""The blind test: who is shown and in which order, and what answers are worth."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from meddiff_steps.core.errors import UserError
from meddiff_steps.core.random_streams import philox
from meddiff_steps.evaluation.lineup import choose, score
from meddiff_steps.imaging.selection import Images
from meddiff_steps.imaging.shards import Shards, ShardWriter, TensorColumn


def images(folder: Path, key: str, unit: str, names: list[str], units: list[str]) -> Images:
    path = folder / f"{key}.arrow"
    with ShardWriter(path, {key: pa.string(), "image": TensorColumn("float16", (1, 2, 2))}) as shard:
        for name in names:
            shard.append(**{key: name}, image=np.zeros((1, 2, 2)))
    return Images.of(Shards([path]), key, unit, pd.DataFrame({key: names, unit: units}), "table")


def sides(folder: Path) -> tuple[Images, Images]:
    real = images(folder, "scan_id", "subject_id", [f"scan{i}" for i in range(14)], [f"sub{i // 2}" for i in range(14)])
    made = images(folder, "sample_id", "seed_key", [f"syn{i}" for i in range(9)], [f"key{i}" for i in range(9)])
    return real, made


def test_as_many_of_each_of_one_subject_each_in_keyed_order(tmp_path: Path) -> None:
    real, made = sides(tmp_path)
    shown = choose(real, made, 5, "a")
    assert shown["image"].tolist() == list(range(1, 11))
    assert shown["kind"].value_counts().to_dict() == {"real": 5, "synthetic": 5}
    subjects = real.table.set_index("scan_id")["subject_id"][shown["id"][shown["kind"] == "real"]]
    assert subjects.is_unique
    table = pd.concat([real.table.rename(columns={"scan_id": "id"}), made.table.rename(columns={"sample_id": "id"})])
    assert (table.set_index("id")["row"][shown["id"]].to_numpy() == shown["row"].to_numpy()).all()
    pd.testing.assert_frame_equal(shown, choose(real, made, 5, "a"))
    assert shown["id"].tolist() != choose(real, made, 5, "b")["id"].tolist()
    assert len(choose(real, made, 50, "a")) == 14  # seven subjects
    orders = {tuple(choose(real, made, 5, str(i))["kind"]) for i in range(8)}
    assert len(orders) > 6
    with pytest.raises(UserError, match=r"lineup: 7 real, 1 synthetic images.*at least 2"):
        choose(real, made.taken([0]), 5, "a")


KEY: dict[str, Any] = {
    "lineup": "abc",
    "images": [{"image": i + 1, "kind": "synthetic" if i % 2 else "real", "id": f"x{i}"} for i in range(40)],
}


def answered(reader: str, certainty: Any) -> pd.DataFrame:
    return pd.DataFrame({"lineup": "abc", "reader": reader, "image": range(1, 41), "certainty": certainty})


def test_readers_who_know_guess_or_cannot_tell() -> None:
    truth = np.arange(40) % 2 * 100
    guess = philox("test", "lineup guess").permutation(truth)
    right = int((guess == truth).sum())
    found = score(KEY, pd.concat([answered("knows", truth), answered("guesses", guess), answered("nothing", 50)]))
    knows, guesses, nothing = (found["readers"][name] for name in ("knows", "guesses", "nothing"))
    assert knows["accuracy"]["value"] == knows["auc"]["value"] == 1.0
    assert knows["accuracy"]["low"] == pytest.approx(40 / (40 + 1.96**2), abs=1e-3)  # Wilson 1927
    assert knows["p_value"] < 1e-9
    assert guesses["right"] == right
    assert guesses["accuracy"]["low"] < 0.5 < guesses["accuracy"]["high"]
    assert guesses["chance"] == [14, 26]
    assert guesses["p_value"] > 0.05
    assert (nothing["undecided"], nothing["chance"], nothing["accuracy"]["value"]) == (40, None, None)
    assert nothing["auc"]["value"] == 0.5
    assert found["all"]["answered"] == 120
    assert found["all"]["accuracy"]["value"] == pytest.approx((40 + right) / 80)
    assert found["all"]["accuracy"]["low"] < found["all"]["accuracy"]["value"] < found["all"]["accuracy"]["high"]
    assert found["all"]["auc"]["n"] == 40


def test_certainty_counts_in_the_auc() -> None:
    """Right in what is surer, though every answer says real."""
    certainty = 10 + np.arange(40) % 2 * 20
    one = score(KEY, answered("careful", certainty))["readers"]["careful"]
    assert one["accuracy"]["value"] == 0.5
    assert one["auc"]["value"] == 1.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="certainty"), "no column certainty"),
        (lambda t: t[:0], "no row"),
        (lambda t: t.assign(lineup="xyz"), "of line-up xyz, the key is of abc"),
        (lambda t: t.assign(image=t["image"] + 1), "no image 41 on the page, which has 1 to 40"),
        (lambda t: t.assign(certainty="maybe"), "certainty maybe of image 1, expected a number from 0"),
        (lambda t: t.assign(certainty=101), "certainty 101"),
        (lambda t: pd.concat([t, t[:1]]), "reader r judged image 1 more than once"),
    ],
)
def test_answers_that_cannot_be_scored_are_refused(change: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(KEY, change(answered("r", 0)))
