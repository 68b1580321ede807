"""Sampling: seconds per volume, decoding included, with the same guidance on both sides.

One trained model serves both sides, so that what differs is how it is sampled: ours with DPM-Solver++ on its own noise
levels and decoding in batches; the peers' with MONAI's DDIMScheduler, or with RFlowScheduler as MAISI has it, and
decoding one by one.  Guidance is the same on both sides: none, one pass per step; or some, and two.  All samplers start
from the same noise and covariates.

Realism is the Frechet distance, and the kernel distance beside it, to held-out scans in the features of a network with
fixed random weights; each with its interval over images, and with its floor: what as many training scans get.  Where
a row says "at equal Frechet distance", ours counts with the fewest steps from which on its distance is not above the
peer's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import measure, peer
from benchmarks.places import SEED, Place, Setting
from benchmarks.training import our_decoder, our_model
from meddiff_steps import config
from meddiff_steps.core.random_streams import batch_noise, seed_key
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.evaluation.realism import frechet, kid
from meddiff_steps.evaluation.realism.base import Draws, Sample, Scale
from meddiff_steps.instruments.feature_spaces.base import Context
from meddiff_steps.instruments.feature_spaces.random import build as random_space
from meddiff_steps.models.trained import TrainedModel
from meddiff_steps.statistics.bootstrap import Figure
from meddiff_steps.synthesis.generate import CohortGenerator

#: Images whose realism is judged, on either side.
JUDGED = 64
#: Our steps that are tried, the peers' by scheduler, and the same with guidance.
OUR_STEPS, OUR_GUIDED_STEPS = (4, 6, 8, 12, 16), (8, 12, 16)
PEER_STEPS = {"DDIM": (50, 200), "RFlow": (30,)}
PEER_GUIDED_STEPS = {"DDIM": (50,), "RFlow": (30,)}
QUICK_STEPS = (2, 3)
QUICK_PEER_STEPS = {"DDIM": (2,), "RFlow": (2,)}
#: Seconds of training before: of the denoiser, and of the drawing decoder.
TRAINING, DRAWING = 45.0, 45.0
#: Volumes sampled at once by both sides; the peers' scripts sample one.
BATCH = 8
#: Resamples behind the interval of a distance, and permutations of a test that is not read here.
RESAMPLES, PERMUTATIONS = 200, 9


class Adapter(nn.Module):
    """Our denoiser under the names by which MONAI's inferers call a network; NaN is its null condition."""

    def __init__(self, denoiser: nn.Module) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        return self.denoiser(x, timesteps.expand(len(x)), Condition(context[:, 0]))


class FlowAdapter(Adapter):
    """The same denoiser as the velocity of a rectified flow, noise to image as MONAI has it.

    The flow's state (1 - t) x0 + t noise is alpha x0 + sigma noise, divided by alpha + sigma, where sigma / alpha =
    t / (1 - t): the same levels by other names, so that any denoiser can be sampled either way.
    """

    def __init__(self, denoiser: Any, flow_timesteps: int) -> None:
        super().__init__(denoiser)
        self.process, self.flow_timesteps = denoiser.process, flow_timesteps

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor) -> Tensor:
        share = (timesteps.double() / self.flow_timesteps).clamp(1e-9, 1.0 - 1e-9)
        level = self.process.timesteps_at(torch.logit(share).cpu().numpy())
        own = torch.from_numpy(np.asarray(level)).to(x.device).float()
        alpha, sigma = (a.float() for a in self.process.alpha_sigma(own))
        state = x * (alpha + sigma).reshape(-1, *[1] * (x.ndim - 1))
        made = super().forward(state, own, context)
        own = own.expand(len(x))
        return self.process.to_x0(made, state, own) - self.process.to_noise(made, state, own)


@dataclass
class Samplers:
    """Both ways of sampling one trained model.

    Attributes
    ----------
    model
        Without drawing decoder, which the peers have not.
    shipped
        The same with it: what a study generates with.
    """

    place: Place
    model: TrainedModel
    shipped: TrainedModel | None = None
    covariates: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.settings, self.covariates = self.place.study.diffusion, self.place.covariates[self.place.rows("test")]

    def noise(self, rows: Sequence[int]) -> np.ndarray:
        return batch_noise([seed_key("benchmarks/syn", int(row), 0, "noise") for row in rows], self.place.latent_shape)

    def ours(
        self, rows: Sequence[int], steps: int, guidance_scale: float | None = None, drawn: bool = False
    ) -> np.ndarray:
        """Images (len(rows), 1, *shape) by `synthesis.generate`; `drawn` with the drawing decoder."""
        settings = config.Generate(
            num_inference_steps=steps, guidance_scale=guidance_scale or 1.0, batch_size=len(rows)
        )
        model = self.shipped if drawn else self.model
        assert model is not None, "no drawing decoder was trained"
        generator = CohortGenerator(model, settings)
        subjects = [("benchmarks/syn", int(row), 0) for row in rows]
        condition = Condition(torch.from_numpy(self.covariates[rows]))
        return generator.decode(generator.latents(self.noise(rows), condition, subjects), subjects)

    def theirs(
        self, rows: Sequence[int], steps: int, guidance_scale: float | None = None, scheduler: str = "DDIM"
    ) -> np.ndarray:
        """Images by MONAI's inferer: `DDIM` or `RFlow`; one pass per step without guidance, else two."""
        context = torch.from_numpy(self.covariates[rows])[:, None]
        noise = torch.from_numpy(self.noise(rows))
        count = self.settings.num_train_timesteps
        if scheduler == "RFlow":
            network: nn.Module = FlowAdapter(self.model.denoiser, count)
            chosen: Any = peer.peer_flow(self.settings, steps)
        else:
            network = Adapter(self.model.denoiser)
            chosen = peer.peer_ddim(self.settings, steps, self.settings.prediction_type)
        null = float("nan")
        return peer.peer_sample(network, self._decode, chosen, noise, context, guidance_scale, null=null).numpy()

    def _decode(self, latent: Tensor) -> Tensor:
        return self.model.first_stage.decode(self.model.denoiser.latents(latent)).clamp(0.0, 1.0)


def sampling(setting: Setting) -> dict[str, Any]:
    """Sampling: seconds per volume beside DDIM and rectified flow, with the same guidance on both sides, and how real
    the volumes are.
    """
    small, *larger = setting.sizes
    samplers = _samplers(setting.place(small))
    judge = Judge(samplers.place, setting.either(JUDGED, 10))
    scale = samplers.place.study.generate.guidance_scale
    rows: list[dict[str, Any]] = []
    for guidance in (None, scale):
        rows += _equal_realism(samplers, judge, guidance, setting)
    rows.append(_as_shipped(samplers, setting, judge))
    # Time does not depend on weights, so that little training will do where nobody judges.
    rows += [_as_shipped(_samplers(setting.place(size), seconds=1.0), setting) for size in larger]
    return {"rows": rows, "curves": judge.curves(), "realism": judge.table()}


def _samplers(place: Place, seconds: float | None = None) -> Samplers:
    seconds = 0.2 if place.setting.quick else seconds
    model = our_model(place, seconds or TRAINING)
    decoder = our_decoder(place, model.first_stage, seconds or DRAWING)
    shipped = TrainedModel(model.first_stage, model.denoiser, model.card, place.fabric, decoder=decoder)
    return Samplers(place, model, shipped)


class Judge:
    """Frechet and kernel distance to held-out scans, each with its interval, beside their floor."""

    def __init__(self, place: Place, images: int) -> None:
        self.size = place.size.name
        self.extract = random_space(Context(3)).extract
        train, real = (self._features(place.tensors(split).numpy()) for split in ("train", "test"))
        self.count = min(images, len(real), len(train))
        self.chosen = np.arange(self.count)
        self.scale = Scale.of(train, self.count)
        self.reference = self._sample(real, "scan")
        #: By guidance, side and steps.
        self.found: dict[tuple[str, str, int], dict[str, Figure]] = {}
        self.floor = self._figures(self._sample(train[: self.count], "training"), "floor")

    def look(
        self, guidance: float | None, side: str, steps: int, make: Callable[[np.ndarray], np.ndarray]
    ) -> dict[str, Figure]:
        """Judge what `make` gives for the rows that are judged, in batches."""
        images = np.concatenate([make(part) for part in np.split(self.chosen, range(BATCH, self.count, BATCH))])
        key = (_guided(guidance), side, steps)
        self.found[key] = self._figures(self._sample(self._features(images), "made"), " ".join(map(str, key)))
        return self.found[key]

    def table(self) -> list[dict[str, Any]]:
        """All that was judged, the floor first."""
        floor = {"size": self.size, "what": "as many training scans (the floor)", "images": self.count} | self.floor
        rest = [
            {"size": self.size, "what": f"{side}, {steps} steps, {guidance}", "images": self.count} | figures
            for (guidance, side, steps), figures in self.found.items()
        ]
        return [floor, *rest]

    def curves(self) -> list[dict[str, Any]]:
        """Distance against steps, one picture per guidance."""
        pictures = []
        for guidance in dict.fromkeys(key[0] for key in self.found):
            sides = dict.fromkeys(side for found, side, _ in self.found if found == guidance)
            series = []
            for side in sides:
                steps = [steps for found, name, steps in self.found if (found, name) == (guidance, side)]
                values = [self.found[guidance, side, n]["frechet"]["value"] for n in steps]
                series.append({"label": side, "x": steps, "y": values})
            level = self.floor["frechet"]["value"]
            reach = [min(x for line in series for x in line["x"]), max(x for line in series for x in line["x"])]
            series.append({"label": "training scans (floor)", "x": reach, "y": [level, level]})
            pictures.append(
                {
                    "name": f"sampling {self.size}, {guidance}",
                    "x_label": "steps",
                    "y_label": "Frechet distance to held-out scans",
                    "series": series,
                }
            )
        return pictures

    def _sample(self, features: np.ndarray, unit: str) -> Sample:
        rows = self.scale.standard(features[: self.count])
        return Sample(rows, np.array([f"{unit} {row}" for row in range(len(rows))]))

    def _figures(self, sample: Sample, label: str) -> dict[str, Figure]:
        draws = Draws(RESAMPLES, RESAMPLES, PERMUTATIONS, SEED, label)
        made = {"frechet": frechet, "kid": kid}
        return {name: metric.figure(sample, self.reference, self.scale, draws) for name, metric in made.items()}

    @torch.inference_mode()
    def _features(self, images: np.ndarray) -> np.ndarray:
        return np.concatenate(
            [self.extract(torch.from_numpy(image[None].astype(np.float32))).numpy() for image in images]
        )


def _guided(guidance: float | None) -> str:
    return "unguided" if guidance is None else f"guided by {guidance:g}"


def _equal_realism(samplers: Samplers, judge: Judge, guidance: float | None, setting: Setting) -> list[dict[str, Any]]:
    """A row per scheduler and number of steps of the peers', ours with the fewest steps that are as real; neither has a
    drawing decoder.
    """
    own = setting.either(OUR_STEPS if guidance is None else OUR_GUIDED_STEPS, QUICK_STEPS)
    others = setting.either(PEER_STEPS if guidance is None else PEER_GUIDED_STEPS, QUICK_PEER_STEPS)
    mine = {n: judge.look(guidance, "ours", n, lambda rows, n=n: samplers.ours(rows, n, guidance)) for n in own}
    rows = []
    for scheduler, counts in others.items():
        for steps in counts:
            theirs = judge.look(
                guidance,
                scheduler,
                steps,
                lambda rows, n=steps, s=scheduler: samplers.theirs(rows, n, guidance, s),
            )
            chosen = as_real(
                {n: figures["frechet"]["value"] for n, figures in mine.items()}, theirs["frechet"]["value"]
            )
            what = f"{_guided(guidance)} sampling beside {scheduler}-{steps}, at equal Frechet distance"
            note = "" if chosen else f"ours is less real with {max(mine)} steps, whose time this is"
            chosen = chosen or max(mine)
            many, few = (np.arange(min(n, judge.count)) for n in (BATCH, BATCH if steps <= 50 else 4))
            timed = measure.take_turns(
                lambda rows=many, n=chosen: _count(samplers.ours(rows, n, guidance)),
                lambda rows=few, n=steps, s=scheduler: _count(samplers.theirs(rows, n, guidance, s)),
                setting.either(5 if steps <= 50 else 3, 1),
                warm_up=False,  # both have just been judged
            )
            rows.append(
                timed.row(
                    what,
                    samplers.place.size.name,
                    "volumes/s",
                    steps={"ours": chosen, "peer": steps},
                    realism={"ours": mine[chosen], "peer": theirs, "floor": judge.floor},
                    note=note,
                )
            )
    return rows


def as_real(distances: dict[int, float], level: float) -> int | None:
    """The fewest steps from which on all distances are at most `level`, so that no lucky number of steps counts; None
    if there are none.
    """
    found = None
    for steps in sorted(distances, reverse=True):
        if distances[steps] > level:
            break
        found = steps
    return found


def _as_shipped(samplers: Samplers, setting: Setting, judge: Judge | None = None) -> dict[str, Any]:
    """What a study gets, drawing decoder and all, beside guided DDIM; judged where there is a judge."""
    generate = samplers.place.study.generate
    steps, scale = setting.either(generate.num_inference_steps, 2), generate.guidance_scale
    other = setting.either(50, 2)
    many = np.arange(setting.either(BATCH, 2))
    few = np.arange(2 if samplers.place.size is not setting.sizes[0] or setting.quick else BATCH)
    timed = measure.take_turns(
        lambda: _count(samplers.ours(many, steps, scale, drawn=True)),
        lambda: _count(samplers.theirs(few, other, scale)),
        setting.either(3 if judge else 1, 1),
        warm_up=False,
    )
    more: dict[str, Any] = {"steps": {"ours": steps, "peer": other}, "note": "realism was not compared at this size"}
    if judge is not None:
        made = judge.look(
            scale, "ours with drawing decoder", steps, lambda rows: samplers.ours(rows, steps, scale, drawn=True)
        )
        theirs = judge.found[_guided(scale), "DDIM", other]
        more |= {"realism": {"ours": made, "peer": theirs, "floor": judge.floor}, "note": ""}
    what = f"guided by {scale:g}, ours as the demo generates, with drawing decoder, beside DDIM-{other}"
    return timed.row(what, samplers.place.size.name, "volumes/s", **more)


def _count(images: np.ndarray) -> float:
    return float(len(images))
