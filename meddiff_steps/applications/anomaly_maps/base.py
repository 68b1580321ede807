"""What all anomaly maps share: a scan and a trained model in, a map and the scan made healthy out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from meddiff_steps import config
from meddiff_steps.core.registries import ANOMALY_MAPS
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import Guidance
from meddiff_steps.diffusion.samplers import ddim, flow
from meddiff_steps.models.trained import TrainedModel

if TYPE_CHECKING:
    from lightning_fabric import Fabric


#: Healthy validation scans that methods are given, at most.
REFERENCE_SCANS = 48


@dataclass(frozen=True)
class Scan:
    """One scan whose map is wanted.

    Attributes
    ----------
    image
        Preprocessed, float32 (1, *spatial) in [0, 1].
    subject
        Its covariates, one row; those that tell whether it is healthy are empty.
    root
        Of its random numbers.
    contrasts
        Its others, which `translation` draws, float32 (t, *spatial) in [0, 1]; None where no method needs them.
    """

    image: np.ndarray
    subject: pd.DataFrame
    root: str
    contrasts: np.ndarray | None = None


@dataclass(frozen=True)
class Finding:
    """What a method makes of a scan.

    Attributes
    ----------
    difference
        What is there less what the method expects, in grey values, float32 (*spatial); signed.
    healed
        The scan as the method expects it, (1, *spatial) in [0, 1].
    """

    difference: np.ndarray
    healed: np.ndarray


#: A method at work: findings by variant, of which "" is the method's own; the others show what goes into it.
Mapper = Callable[[Scan], Mapping[str, Finding]]


@dataclass(frozen=True)
class Translations:
    """Folders of what `translation_model` learnt of healthy scans, there and back, and where it runs."""

    forward: Path
    back: Path
    fabric: Fabric


@dataclass(frozen=True)
class Context:
    """What methods can use.

    Attributes
    ----------
    trained
        The study's model, for methods that need it.
    settings
        The study's section.
    reference
        Healthy validation scans, `REFERENCE_SCANS` of them at most.
    guides
        Guidance of the sampler towards the value of `settings.healthy`, for methods that need it.
    translations
        Networks of other contrasts, for methods that need them.
    """

    trained: TrainedModel | None
    settings: config.Anomaly
    reference: Sequence[Scan] = ()
    guides: tuple[Guidance, ...] = ()
    translations: Translations | None = None

    @property
    def model(self) -> TrainedModel:
        """The trained one."""
        assert self.trained is not None, "ENTRY's `needs` say `a trained model` of a method that uses it"
        return self.trained

    def healthy(self, subject: pd.DataFrame, count: int = 1) -> Condition:
        """What the model is asked for: a healthy scan of this subject, `count` times."""
        wanted = subject.assign(**{k: pd.Series([v], index=subject.index) for k, v in self.settings.healthy.items()})
        return self.model.condition(pd.concat([wanted] * count))

    def sampler(self, guidance_scale: float = 1.0) -> config.Generate:
        """How latents are drawn: deterministically, so that noise enters at the start alone."""
        name = (flow if self.model.process.is_flow else ddim).__name__.rpartition(".")[2]
        return config.Generate(
            sampler=name, num_inference_steps=self.settings.num_inference_steps, guidance_scale=guidance_scale
        )

    def timestep(self, depth: float) -> float:
        """Of a share of the noise process."""
        return depth * self.model.process.last_timestep

    @torch.no_grad()
    def finding(self, latents: Tensor, healed: Tensor) -> Finding:
        """The scan's latents (1, c, *spatial) against draws of healthy ones (b, c, *spatial).

        Both are decoded, so that what the first stage loses of any scan is no finding.
        """
        own = self.model.decode(latents)[0].cpu().numpy()
        mean = self.model.decode(healed).mean(0).cpu().numpy()
        return Finding((own - mean)[0].astype(np.float32), mean.astype(np.float32))


def mean_of(findings: Sequence[Finding]) -> Finding:
    """Their mean."""
    differences, healed = ([each.difference for each in findings], [each.healed for each in findings])
    return Finding(np.stack(differences).mean(0, dtype=np.float32), np.stack(healed).mean(0, dtype=np.float32))


def build(name: str, context: Context) -> Mapper:
    """The method of this name.

    Raises
    ------
    UserError
        The study lacks what the method needs.
    """
    made: Mapper = ANOMALY_MAPS.load(name).build(context)
    return made
