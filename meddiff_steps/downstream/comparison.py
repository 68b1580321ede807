"""Figures of classifiers and of their differences, with intervals over subjects and seeds, and the verdict.

An arm's figure is the mean over its classifiers: every classifier seed with every generator seed.  Its interval is made
of parts that vary independently: subjects are resampled with all of their images, classifier seeds are resampled, and
generator seeds scatter as far as they were seen to.  The same draws serve all arms, so differences are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from scipy.stats import norm
from scipy.stats import t as student

from meddiff_steps.core.random_streams import philox
from meddiff_steps.statistics.bootstrap import Bootstrap, Figure, Side, Statistic, figure
from meddiff_steps.statistics.measures import auc, average_precision, brier, calibration_error

Verdict = Literal["helps", "no evidence", "harms", "not evaluated"]


# ------------------------------------------------------------------------------------------------- figures


#: Figures of one classifier by name.
FIGURES: dict[str, Callable[[np.ndarray, np.ndarray], Statistic]] = {
    "auc": auc,
    "auprc": average_precision,
    "brier": brier,
    "ece": calibration_error,
}


@dataclass(frozen=True)
class Draws:
    """A figure of all rows and seeds, and of each resample (resamples,).

    Attributes
    ----------
    draws
        Over subjects and classifier seeds.
    by_generator, deviations
        The figure with each generator seed (generators,), and how far the mean over them deviates in each resample
        (resamples,), as if their spread were known.
    """

    value: float
    draws: np.ndarray
    n: int
    by_generator: np.ndarray = field(default_factory=lambda: np.zeros(1))
    deviations: np.ndarray = field(default_factory=lambda: np.zeros(1))

    def widened(self) -> np.ndarray:
        """All parts together, (resamples,), widened from a normal to a t distribution as far as the spread of
        generators is uncertain.

        Its degrees of freedom are Satterthwaite's (1946): g - 1 where g generators are all that varies, many where they
        hardly matter. Two generators alone would multiply the interval by 6.5; taken for a part among others, they do
        so only where they are most of it.
        """
        count = len(self.by_generator)
        spread = float(np.var(self.by_generator, ddof=1)) / count if count > 1 else 0.0
        finite = self.draws[np.isfinite(self.draws)]
        if not spread > 0 or len(finite) == 0:
            return self.draws
        rest = float(np.var(finite))
        freedom = (count - 1) * ((rest + spread) / spread) ** 2
        return self.value + (self.draws + self.deviations - self.value) * (
            student.ppf(0.975, freedom) / norm.ppf(0.975)
        )

    def figure(self, lowest: float = -1.0, share_of: int | Side = 0) -> Figure:
        """With its interval, which ends at `lowest` and at 1: the sum of the parts may step beyond what is possible."""
        return figure(self.value, np.clip(self.widened(), lowest, 1.0), self.n, share_of)

    def minus(self, other: Draws) -> Draws:
        return Draws(
            self.value - other.value,
            self.draws - other.draws,
            self.n,
            self.by_generator - other.by_generator,
            self.deviations - other.deviations,
        )

    def p_value(self) -> float:
        """Two-sided, of no difference: the level at which the percentile interval begins to leave 0 out; nan of a
        difference that no resample changes.
        """
        draws = self.widened()
        finite = draws[np.isfinite(draws)]
        if not math.isfinite(self.value) or len(finite) == 0 or (self.value != 0 and np.ptp(finite) < 1e-9):
            return math.nan
        return min(1.0, 2.0 * (1 + min((finite <= 0).sum(), (finite >= 0).sum())) / (1 + len(finite)))


class Resampling:
    """Resamples of subjects and of both kinds of seeds that all arms share.

    Resampling both at once (the pigeonhole bootstrap, Owen 2007) counts the noise of single predictions three times,
    and a bootstrap of five seeds is too narrow: in simulated studies without a difference the error of a nominal 5 %
    was between 0.3 % and 14 %, and of subjects alone up to 62 %.  So the deviations from both are added, and those of
    seeds are widened from a normal to a t distribution with one degree of freedom fewer than seeds: between 1 % and 4 %
    in the same studies.  Generators are crossed with the seeds, and too few to be resampled (two give three different
    means), so their deviations are normal draws.

    Parameters
    ----------
    units
        Subject of each row.
    seeds, generators
        Classifiers per arm and generator, and generators.
    """

    def __init__(
        self, units: Sequence[Any] | np.ndarray, seeds: int, resamples: int, root: str, label: str, generators: int = 1
    ) -> None:
        self.subjects = Bootstrap(units, resamples, root, f"augment|{label}")
        drawn = (
            philox(root, f"augment|{label}|seeds").multinomial(seeds, np.full(seeds, 1 / seeds), size=resamples) / seeds
        )
        widened = math.sqrt(seeds / (seeds - 1)) * student.ppf(0.975, seeds - 1) / norm.ppf(0.975)
        self.seeds, self.generators = seeds, generators
        self.seed_deviations = widened * (drawn - 1 / seeds)
        normals = philox(root, f"augment|{label}|generators").standard_normal((resamples, generators))
        self.generator_deviations = normals / math.sqrt(max(1, generators * (generators - 1)))

    def draws(self, statistics: Mapping[str, Sequence[Statistic]]) -> dict[str, Draws]:
        """Every named figure, given its statistics for each seed of the first generator, then of the second, and so on.

        A figure that no generator enters has as many statistics as there are seeds.  The resamples of subjects are
        drawn once for all.
        """
        if self.subjects.rows == 0:
            empty = np.full(self.subjects.resamples, math.nan)
            return dict.fromkeys(statistics, Draws(math.nan, empty, 0))
        out = {}
        everyone = np.ones((1, self.subjects.rows))
        with np.errstate(divide="ignore", invalid="ignore"):
            parts: dict[str, list[np.ndarray]] = {name: [] for name in statistics}
            for weights in self.subjects.weights():
                for name, of_seeds in statistics.items():
                    parts[name].append(np.stack([statistic(weights) for statistic in of_seeds], axis=1))
            for name, of_seeds in statistics.items():
                each = np.array([statistic(everyone)[0] for statistic in of_seeds]).reshape(-1, self.seeds)
                draws = np.concatenate(parts[name]).mean(1) + self.seed_deviations @ each.mean(0)
                by_generator = np.broadcast_to(each.mean(1), self.generators)
                deviations = self.generator_deviations @ (by_generator - by_generator.mean())
                out[name] = Draws(float(each.mean()), draws, self.subjects.n, by_generator, deviations)
        return out


# -------------------------------------------------------------------------------------------------- DeLong


# ------------------------------------------------------------------------------------------------- verdict


def verdict(difference: Figure, margin: float) -> tuple[Verdict, bool | None]:
    """What the interval of the primary difference (arm minus reference) says, and whether the arm is non-inferior.

    `helps` where the whole interval is above 0, `harms` where it is below, else `no evidence`.  Non-inferior: a loss
    larger than `margin` is excluded.
    """
    low, high = difference["low"], difference["high"]
    if low is None or high is None:
        return "not evaluated", None
    return ("helps" if low > 0 else "harms" if high < 0 else "no evidence"), low > -margin


#: What a gain of arms that learn from a share of the real scans may be.
TRANSFER = (
    "The generator learnt from all training scans, these arms from a share of them: the gain can be what it took from"
    " scans that they were not given."
)


def verdict_text(
    word: Verdict, non_inferior: bool | None, arm: str, reference: str, margin: float, share: float = 1.0
) -> str:
    """The verdict in words; `share` of the real training subjects is what the reference arm learns from."""
    if word == "helps":
        better = f"Arm {arm} tells the classes apart better than {reference}."
        return better if share == 1 else f"{better} {TRANSFER}"
    if word == "not evaluated":
        return (
            f"The difference of {arm} and {reference} has no interval: the test split holds too few subjects of one"
            " class, or so few that no resample changes it."
        )
    loss = f"a loss of more than {margin:g} {'is' if non_inferior else 'cannot be'} excluded"
    if word == "harms":
        return f"Arm {arm} tells the classes apart worse than {reference}; {loss}."
    return f"{arm} and {reference} do not differ measurably; {loss}."
