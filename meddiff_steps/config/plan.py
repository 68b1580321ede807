"""Section `plan`: which synthetic subjects are made."""

import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from meddiff_steps.config.base import Alphanumeric, Name, NoOrLocalPath, PositiveInt, Scalar, Section

Condition = Scalar | list[Scalar]

_PLACEHOLDER = re.compile(r"\{([A-Za-z][A-Za-z0-9_]*)\}")


def placeholders(text: str) -> list[str]:
    """The covariates that a planned text names in braces, in order.

    >>> placeholders("Woman of {age} years.")
    ['age']
    """
    return _PLACEHOLDER.findall(text)


def filled(text: str, values: Mapping[str, str]) -> str:
    """A planned text with values in the place of their names in braces."""
    return _PLACEHOLDER.sub(lambda found: values[found[1]], text)


class PlanGroup(Section):
    """Synthetic subjects with the same origin of covariates; each group is numbered from 0 on its own."""

    name: Alphanumeric = Field(description="Prefix of the synthetic subject ids.")
    subjects: PositiveInt = Field(
        description="Number of subjects; for `grid` and `counterfactual`, subjects per grid point."
    )
    covariates: Literal["copula", "table", "grid", "counterfactual"] = Field(
        "copula",
        description="Where covariates come from. `copula`: drawn like those of the training subjects; `table`: a "
        "table of yours; `grid`: all combinations of some values; `counterfactual`: the same subjects with one "
        "covariate moved.",
    )
    where: dict[Name, Condition] = Field(
        {},
        description="Copula only. A level, a list of levels, a number, or [low, high]: every subject of the group "
        "fulfils it.",
    )
    table: NoOrLocalPath = Field(
        None, description="Table only. CSV, TSV or Parquet with a column per covariate; empty cells are missing values."
    )
    grid: dict[Name, Annotated[list[Scalar], Field(min_length=1)]] = Field(
        {}, description="Grid and counterfactual. Values per covariate; all combinations are planned."
    )
    base: dict[Name, Scalar] = Field(
        {},
        description="Grid and counterfactual. Values of the covariates that stay fixed; the rest is drawn from the "
        "copula.",
    )
    texts: list[Annotated[str, Field(min_length=1)]] = Field(
        [],
        description="With `text.column`: what images are to show, in words, given to subjects in turn. `{age}` "
        "stands for a covariate. Reports of people are refused. A `table` may have a column `text`.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.covariates == "table") != (self.table is not None):
            raise ValueError("`table` must name a file when covariates is `table`, and only then")
        if (self.covariates in ("grid", "counterfactual")) != bool(self.grid):
            raise ValueError("`grid` must be given when covariates is `grid` or `counterfactual`, and only then")
        if self.where and self.covariates != "copula":
            raise ValueError("`where` belongs to covariates: copula")
        if self.texts and self.covariates == "table":
            raise ValueError("`texts` of a table are its column `text`; leave `texts` out")
        unlike = [text for text in self.texts if text != " ".join(text.split()) or not text.isprintable()]
        if unlike:
            raise ValueError(f"texts have no line breaks, tabs or doubled blanks, found {unlike[0]!r}")
        if self.covariates == "counterfactual" and len(self.grid) != 1:
            raise ValueError("a counterfactual group moves exactly one covariate; `grid` must have one entry")
        return self
