"""Sampling: seconds per volume at equal realism, decoding and guidance included.

One trained model serves both sides, so that what differs is how it is sampled: ours with DPM-Solver++ on its own noise
levels, one pass per step at a guidance scale of 1 and decoding in batches; the peers' with MONAI's DDIMScheduler, both
passes at any scale, and decoding one by one.  Realism is the Frechet distance, and the kernel distance beside it, to
held-out scans in the features of a network with fixed random weights.  All samplers start from the same noise and
covariates.  Ours counts with the fewest steps whose Frechet distance is not above the peer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import measure, peer
from benchmarks.places import Place, Setting
from benchmarks.training import our_model
from meddiff_steps import config
from meddiff_steps.core.random_streams import batch_noise, seed_key
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.evaluation.realism.base import Scale
from meddiff_steps.evaluation.realism.frechet import frechet_distance
from meddiff_steps.evaluation.realism.kid import kernel_distance
from meddiff_steps.instruments.feature_spaces.base import Context
from meddiff_steps.instruments.feature_spaces.random import build as random_space
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.statistics.bootstrap import rounded
from meddiff_steps.synthesis.generate import CohortGenerator

#: Our steps and DDIM's whose images are judged, images judged, and seconds of training before, by size.
PLANS: dict[str, dict[str, Any]] = {
    "32x40x32": {"ours": (4, 6, 8, 12, 16, 24), "peer": (50, 200), "images": 32, "training": 45.0},
    "64x64x64": {"ours": (8, 16), "peer": (50,), "images": 16, "training": 60.0},
}
QUICK_PLAN = {"ours": (2, 3), "peer": (2, 4), "images": 10, "training": 0.2}
#: Volumes sampled at once by both sides; the peers' scripts sample one.
BATCH = 8
#: Guidance at which realism is compared: the product's default, and 1.5 for the time of two passes on both sides.
PLAIN, GUIDED = 1.0, 1.5


class Adapter(nn.Module):
    """Our denoiser under the names by which MONAI's inferers call a network; NaN is its null condition."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return self.denoiser(x, timesteps.expand(len(x)), Condition(context[:, 0]))


class Samplers:
    """Both ways of sampling one trained model."""

    def __init__(self, place: Place, model: TrainedModel) -> None:
        self.place, self.settings, self.model = place, place.study.diffusion, model
        self.adapter = Adapter(model.denoiser)
        self.covariates = place.covariates[place.rows("test")]

    def noise(self, rows: Sequence[int]) -> np.ndarray:
        return batch_noise([seed_key("benchmarks/syn", int(row), 0, "noise") for row in rows], self.place.latent_shape)

    def ours(self, rows: Sequence[int], steps: int, guidance_scale: float = PLAIN) -> np.ndarray:
        """Images (len(rows), 1, *shape) by `synthesis.generate`."""
        settings = config.Generate(num_inference_steps=steps, guidance_scale=guidance_scale, batch_size=len(rows))
        generator = CohortGenerator(self.model, settings)
        subjects = [("benchmarks/syn", int(row), 0) for row in rows]
        condition = Condition(torch.from_numpy(self.covariates[rows]))
        return generator.decode(generator.latents(self.noise(rows), condition, subjects), subjects)

    def theirs(self, rows: Sequence[int], steps: int, guidance_scale: float = PLAIN, passes: int = 2) -> np.ndarray:
        """Images by MONAI's inferer; with `passes=1` without the unconditional pass, which at a scale of 1 cancels (for
        judging only).
        """
        scheduler = peer.peer_ddim(self.settings, steps, "cpu", self.settings.prediction_type)
        context = torch.from_numpy(self.covariates[rows])[:, None]
        noise = torch.from_numpy(self.noise(rows))
        scale = guidance_scale if passes == 2 else None
        return peer.peer_sample(self.adapter, self._decode, scheduler, noise, context, scale, null=float("nan")).numpy()

    def _decode(self, latent: Tensor) -> Tensor:
        return self.model.first_stage.decode(self.model.denoiser.latents(latent)).clamp(0.0, 1.0)


def sampling(setting: Setting) -> dict[str, Any]:
    """Sampling: seconds per volume at equal Frechet distance, ours beside DDIM-50 and DDIM-200 with two passes."""
    rows, curves = [], []
    for size in setting.sizes:
        plan = QUICK_PLAN if setting.quick else PLANS[size.name]
        place = setting.place(size)
        samplers = Samplers(place, our_model(place, plan["training"]))
        judged = _judge(samplers, plan)
        curves.append(
            {
                "name": f"sampling {size.name}",
                "x_label": "network evaluations per volume (one pass each)",
                "y_label": "Frechet distance to held-out scans",
                "series": [
                    {"label": side, "side": side, "x": list(found), "y": [found[steps]["frechet"] for steps in found]}
                    for side, found in judged.items()
                ],
            }
        )
        for steps in (50, 200) if not setting.quick else plan["peer"]:
            rows.append(_row(samplers, setting, judged, steps))
        if size is setting.sizes[0]:
            rows.append(_guided(samplers, setting, judged))
    return {"rows": rows, "curves": curves}


def _judge(samplers: Samplers, plan: dict[str, Any]) -> dict[str, dict[int, dict[str, float | None]]]:
    """Frechet and kernel distance to held-out scans by side and steps."""
    place = samplers.place
    extract = random_space(Context(3)).extract
    train, real = (_features(extract, place.tensors(split).numpy()) for split in ("train", "test"))
    scale = Scale.of(train, min(plan["images"], len(real)))
    reference = scale.standard(real)
    chosen = np.arange(min(plan["images"], len(real)))
    found: dict[str, dict[int, dict[str, float | None]]] = {"ours": {}, "peer": {}}
    for side in ("ours", "peer"):
        for steps in plan[side]:
            run = samplers.ours if side == "ours" else lambda rows, n: samplers.theirs(rows, n, passes=1)
            images = np.concatenate([run(part, steps) for part in np.split(chosen, range(BATCH, len(chosen), BATCH))])
            made = scale.standard(_features(extract, images))
            frechet = frechet_distance(scale.components(made), scale.components(reference))
            found[side][steps] = {"frechet": rounded(frechet), "kid": rounded(kernel_distance(made, reference))}
    return found


@torch.inference_mode()
def _features(extract: Any, images: np.ndarray) -> np.ndarray:
    return np.concatenate([extract(torch.from_numpy(image[None].astype(np.float32))).numpy() for image in images])


def _enough(judged: dict[str, dict[int, dict[str, float | None]]], steps: int) -> tuple[int, str]:
    """Our fewest steps with a Frechet distance not above that of DDIM with `steps`, and what must be said with it."""
    compared = steps if steps in judged["peer"] else max(judged["peer"])
    level = judged["peer"][compared]["frechet"]
    good = [n for n, found in judged["ours"].items() if found["frechet"] <= level]  # type: ignore[operator]
    notes = [] if compared == steps else [f"realism of DDIM-{compared}: DDIM-{steps} was timed only"]
    if not good:
        notes.append("none of our step counts reached its Frechet distance: the time is that of the most steps")
    return (min(good) if good else max(judged["ours"])), "; ".join(notes)


def _row(samplers: Samplers, setting: Setting, judged: Any, steps: int) -> dict[str, Any]:
    size = samplers.place.size.name
    chosen, note = _enough(judged, steps)
    # The longer sampling, the fewer volumes and turns; seconds are per volume.
    small = size == "32x40x32"
    volumes, turns = (
        (2, 1) if setting.quick else ((BATCH, 3) if small else (2, 2)) if steps <= 50 else ((4, 2) if small else (1, 1))
    )
    many, few = np.arange(min(BATCH, samplers.place.size.test)), np.arange(volumes)

    def ours() -> float:
        samplers.ours(many, chosen)
        return len(many)

    def theirs() -> float:
        samplers.theirs(few, steps)
        return len(few)

    timed = measure.take_turns(ours, theirs, turns, warm_up=False)  # both have just been judged
    more = {
        "steps": {"ours": chosen, "peer": steps},
        "realism": {"ours": judged["ours"][chosen], "peer": judged["peer"].get(steps)},
        "note": note,
    }
    return timed.row(f"sampling beside DDIM-{steps}, equal Frechet distance", size, "volumes/s", **more)


def _guided(samplers: Samplers, setting: Setting, judged: Any) -> dict[str, Any]:
    """The same beside DDIM with the fewest steps judged, with two passes on both sides."""
    steps = min(judged["peer"])
    chosen, note = _enough(judged, steps)
    rows = np.arange(min(BATCH, samplers.place.size.test))

    def ours() -> float:
        samplers.ours(rows, chosen, GUIDED)
        return len(rows)

    def theirs() -> float:
        samplers.theirs(rows, steps, GUIDED)
        return len(rows)

    timed = measure.take_turns(ours, theirs, setting.either(2, 1), warm_up=False)
    said = "; ".join(filter(None, [f"guidance scale {GUIDED}: two passes on both sides, steps as above", note]))
    return timed.row(
        f"guided sampling beside DDIM-{steps}",
        samplers.place.size.name,
        "volumes/s",
        steps={"ours": chosen, "peer": steps},
        note=said,
    )
