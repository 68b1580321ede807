"""How much work every stage of a study is, counted from the study alone.

Networks are counted in floating-point operations, by torch, on networks without data (`flops`), so that the largest
are counted in seconds.  What a processor does beside them is counted in units that grow with it: voxels that are read,
numbers that are drawn, voxels that are packed.  How long a unit takes is in `operations.rates`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from monai.networks.nets import PatchDiscriminator

from meddiff_steps.audit.request import Request
from meddiff_steps.config import Adversarial, CategoricalCovariate, FewStep, Study
from meddiff_steps.core.choice import chosen
from meddiff_steps.core.registries import DETECTORS, default_steps, evaluations
from meddiff_steps.diffusion.conditioning import Condition
from meddiff_steps.diffusion.guidance import is_within
from meddiff_steps.diffusion.sampling import levels_of
from meddiff_steps.diffusion.schedules import NoiseProcess
from meddiff_steps.evaluation.metrics import MAX_HELD_OUT, MAX_SYNTHETIC
from meddiff_steps.evaluation.reconstructions import MAX_RECONSTRUCTIONS
from meddiff_steps.imaging.signed_distances import channels as distances_of
from meddiff_steps.instruments.embedder import DIM, Embedder
from meddiff_steps.instruments.predictors import MAX_TRAINING_SCANS
from meddiff_steps.models.denoiser.base import Denoiser
from meddiff_steps.models.denoiser.effects import feature_count
from meddiff_steps.models.denoiser.student import Distilled
from meddiff_steps.models.drawing.base import build as build_decoder
from meddiff_steps.models.first_stage.base import build
from meddiff_steps.models.latent_statistics import FOLDS, MAX_READOUT_ROWS
from meddiff_steps.operations.counting import RECOMPUTED, TRAINING, Work, added, counted, times, validations
from meddiff_steps.operations.work_of_applications import of_applications
from meddiff_steps.privacy.assessment import LOSS_SCANS, LOSS_TIMES, MAX_IMAGES, MAX_PEOPLE
from meddiff_steps.privacy.detectors.aligned import ALIGNED_SIDE, CANDIDATES, SHORTLIST, reach, searched
from meddiff_steps.privacy.duplicates import COARSE_SIDE
from meddiff_steps.privacy.reference import CONTROL_SCANS, encodes_mirrors
from meddiff_steps.privacy.size import reduction
from meddiff_steps.synthesis.grey_levels import IMAGES as TONE_IMAGES
from meddiff_steps.synthesis.showcase import ROWS as SHOWCASE_ROWS
from meddiff_steps.synthesis.size import plan_shards, planned_subjects
from meddiff_steps.training.rehearsal import SAMPLER
from meddiff_steps.training.tasks import autoencoder as autoencoder_task
from meddiff_steps.training.tasks import decoder as decoder_task
from meddiff_steps.training.tasks import few_step as few_step_task
from meddiff_steps.training.tasks.diffusion import VALIDATION_LATENTS

#: Voxels of a scan as it is stored, where only the cohort knows: a head at 1 mm, a radiograph.
HEAD_VOXELS = {2: 2**20, 3: 2**23}
#: Ways in which the scans of the positive controls are copied.
CONTROL_COPIES = 8
#: Images that an audit makes again, and as many that it looks at with the copy detectors.
AUDITED = Request.sample
#: Kinds of images that evaluation compares, and ways in which it spoils scans.
KINDS, SPOILT = 4, 5


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of one pass forward, per image (a multiplication and an addition are two)."""

    encoder: float
    decoder: float
    denoiser: float
    drawing: float
    embedder: float
    discriminator: float


def covariate_levels(study: Study) -> list[int]:
    """Per covariate: the number of levels, or 0 for a continuous one."""
    return [len(c.levels) if isinstance(c, CategoricalCovariate) else 0 for c in study.covariates.values()]


def forward_flops(study: Study, channels: int = 1) -> Flops:
    """What one pass of each of a study's networks takes; of images of so many channels."""
    sections = (study.preprocess.shape, study.autoencoder, study.diffusion, study.decoder, covariate_levels(study))
    key = repr((*sections, channels))
    if key not in _COUNTED:
        _COUNTED[key] = _forward_flops(study, channels)
    return _COUNTED[key]


#: Networks that were counted, which takes a second or two for large ones.
_COUNTED: dict[str, Flops] = {}


def _forward_flops(study: Study, channels: int) -> Flops:
    dims, shape, levels = study.spatial_dims, study.preprocess.shape, covariate_levels(study)
    adversarial = study.autoencoder.adversarial

    with torch.device("meta"):
        image, scan = (torch.empty(1, count, *shape) for count in (channels, 1))
        first_stage = build(study.autoencoder, dims, channels)
        latent = first_stage.encode(image).mode()
        denoiser = Denoiser(study.diffusion, latent.shape[1:], levels, names=list(study.covariates))
        return Flops(
            encoder=counted(lambda: first_stage.encode(image)),
            decoder=counted(lambda: first_stage.decode(latent)),
            denoiser=counted(lambda: denoiser(latent, torch.empty(1), Condition(torch.empty(1, len(levels))))),
            drawing=counted(lambda: build_decoder(study.decoder, (1, *shape)).step(scan))
            if study.decoder.network
            else 0.0,
            embedder=counted(lambda: Embedder(shape)(scan)),
            discriminator=counted(
                lambda: PatchDiscriminator(
                    dims, adversarial.channels, in_channels=1, num_layers_d=adversarial.layers, norm="INSTANCE"
                )(scan)
            )
            if adversarial.weight
            else 0.0,
        )


def passes_per_sample(study: Study) -> float:
    """Passes of the denoiser for one image; guidance takes a second one at the levels where it acts."""
    settings = study.generate
    if study.student_draws:
        return settings.num_inference_steps or study.few_step.num_inference_steps
    steps = settings.num_inference_steps or default_steps(settings.sampler, study.diffusion.num_train_timesteps)
    count = evaluations(settings.sampler, steps)
    if settings.guidance_scale in (0, 1):
        return count
    levels = levels_of(settings.sampler, NoiseProcess.of(study.diffusion), steps)
    ratios = [s / a if a else math.inf for a, s in zip(levels.alpha[:-1], levels.sigma[:-1], strict=True)]
    return count * (1 + float(np.mean([is_within(settings.guidance_interval, ratio) for ratio in ratios])))


class Counter:
    """Counts a study.

    Parameters
    ----------
    study
        The study.
    scans
        In its cohort.
    channels
        Of its images.
    """

    def __init__(self, study: Study, scans: int, channels: int = 1) -> None:
        self.study, self.scans = study, scans
        shape, dims = study.preprocess.shape, study.spatial_dims
        self.voxels = channels * math.prod(shape)
        self.shards, self.planned = plan_shards(study.plan, study.generate.shard_size), planned_subjects(study.plan)
        self.latent = study.autoencoder.latent_channels * math.prod(shape) / study.autoencoder.downsampling**dims
        self.flops = forward_flops(study, channels)
        splits = study.splits
        self.train, self.val, self.calibration, self.test = (
            share * scans for share in (splits.train, splits.val, splits.calibration, splits.test)
        )
        self.coarse = _reduced(shape, ALIGNED_SIDE[dims])
        small = [n // side for n, side in zip(shape, reduction(shape), strict=True)]
        self.compared = math.prod(small)
        #: Shifts of an image and of its mirror image at which the nearest are searched, and those that are tried.
        self.searches = 2 * math.prod(len(along) for along in searched(small))
        self.shifts = 2 * math.prod(2 * most + 1 for most in reach(small))
        #: Numbers of the directions of an image, of all detectors.
        self.directions = self.latent + DIM + self.coarse
        #: One image as `generate` makes it, and as the autoencoder gives it back.
        draws = study.generate.drawing_steps if study.decoder.network else 0
        self.image = {"denoiser": passes_per_sample(study) * self.flops.denoiser, **self._decoded(draws)}
        self.returned = {"encoder": self.flops.encoder, "decoder": self.flops.decoder}
        #: What comes with an image that is drawn: its noise, and that it is stored.
        drawn = self.latent + (self.voxels if study.decoder.network else 0)
        self.made = {"normal number": drawn, "voxel stored": self.voxels}

    def _decoded(self, draws: int) -> dict[str, float]:
        return {"decoder": self.flops.decoder, **({"drawing": draws * self.flops.drawing} if draws else {})}

    def stages(self) -> dict[str, Work]:
        """Every stage that takes long, by the name that its benchmarks have."""
        found = {
            **self._before(),
            **self._trainings(),
            **self._latents(),
            **self._generation(),
            **self._privacy(),
            **self._release(),
            **self._label_maps(),
            **of_applications(self.study, self.scans),
        }
        order = (
            "simulate cohort preprocess masks/maps autoencoder decoder latents scale"
            " masks/autoencoder masks/latents masks/scale masks/diffusion diffusion few_step tone embedder calibrate"
            " plan generate filter privacy predictors evaluate showcase images describe ledger report neighbours audit"
            " segmentation_model segmentation_beside segmentation_few_labels segmentation translation_model translation"
            " registration/train registration shape_completion/train shape_completion"
        ).split()
        return {name: found[name] for name in order if name in found}

    # --------------------------------------------------------------------------------------- before and trainings

    def _before(self) -> dict[str, Work]:
        study, scans = self.study, self.scans
        stored = (
            math.prod(study.cohort.shape) if study.cohort.source == "simulated" else HEAD_VOXELS[study.spatial_dims]
        )
        prepared = {"voxel unpacked": scans * stored, "voxel resampled": scans * self.voxels}
        if study.preprocess.registration is not None:
            prepared["scan registered"] = scans
        if study.preprocess.brain_extraction is not None:
            prepared["scan extracted"] = scans
        if study.preprocess.bias_field is not None:
            prepared["scan corrected"] = scans
        found = {
            "cohort": Work("preparation", 1, units={"scan listed": scans, "voxel hashed": scans * stored}),
            "preprocess": Work(
                "preparation",
                study.preprocess.shards,
                units=prepared,
                bytes=2.0 * scans * self.voxels,
                folder="preprocessed",
            ),
        }
        if study.cohort.source == "simulated":
            voxels = scans * math.prod(study.cohort.shape)
            found["simulate"] = Work(
                "preparation", 1, units={"voxel simulated": voxels}, bytes=0.6 * voxels, folder="cohort"
            )
        return found

    def _trainings(self) -> dict[str, Work]:
        study, flops, voxels = self.study, self.flops, self.voxels
        settings, second = study.autoencoder, study.diffusion
        first, third, contrast = settings.optimiser, study.decoder.optimiser, study.privacy.embedder.optimiser
        coarse = 2**-study.spatial_dims if settings.equivariance_weight else 0
        images = first.steps * first.batch_size
        trained = {"encoder trained": flops.encoder, "decoder trained": flops.decoder * (1 + coarse)}
        held_out = min(MAX_RECONSTRUCTIONS, self.val + self.test)
        looked_at = validations(first) * min(autoencoder_task.VALIDATION_SCANS, self.val) + held_out
        # A judge is asked with the reconstruction, through which gradients go back, and learns from both images.
        judged = max(0, first.steps - settings.adversarial.start_step) * first.batch_size * (2 + 2 * TRAINING)
        steps = default_steps(SAMPLER, second.num_train_timesteps)
        rehearsed = second.rare.preserved * evaluations(SAMPLER, steps) if second.rare else 0
        found = {
            "autoencoder": Work(
                "training",
                1,
                added(
                    times(images * (RECOMPUTED if settings.gradient_checkpointing else TRAINING), trained),
                    times(looked_at, self.returned),
                    {"discriminator trained": judged * flops.discriminator} if settings.adversarial.weight else {},
                ),
                {"voxel read": (images + looked_at) * voxels},
                networks=2 + bool(settings.adversarial.weight),
                training=True,
                bytes=4.0 * held_out * voxels,
                folder="autoencoder",
            ),
            "diffusion": Work(
                "training",
                1,
                {
                    "denoiser trained": flops.denoiser
                    * (
                        second.optimiser.steps
                        * second.optimiser.batch_size
                        * (RECOMPUTED if second.gradient_checkpointing else TRAINING)
                        + validations(second.optimiser) * min(VALIDATION_LATENTS, self.val)
                    ),
                    **({"denoiser": flops.denoiser * rehearsed} if rehearsed else {}),
                },
                {"normal number": second.optimiser.steps * second.optimiser.batch_size * self.latent},
                networks=1,
                training=True,
            ),
            "embedder": Work(
                "training",
                1,
                {"embedder trained": 2 * TRAINING * contrast.steps * contrast.batch_size * flops.embedder},
                {
                    "voxel read": contrast.steps * min(contrast.batch_size, self.train) * voxels,
                    "voxel augmented": 2
                    * contrast.steps
                    * min(contrast.batch_size, self.train)
                    * _reduced(study.preprocess.shape, 32 if study.spatial_dims == 3 else 64),
                },
            ),
        }
        if study.decoder.network:
            crops = third.steps * third.batch_size
            share = math.prod(min(study.decoder.crop, n) for n in study.preprocess.shape) / voxels
            of_image = decoder_task.CROPS_PER_IMAGE
            checks = validations(third) * min(decoder_task.VALIDATION_SCANS, self.val)
            measured = min(decoder_task.MEASURED_SCANS, self.train) + checks
            drawn = min(decoder_task.GREY_LEVEL_SCANS, self.train) + held_out
            found["decoder"] = Work(
                "training",
                1,
                added(
                    {"drawing trained": TRAINING * crops * share * flops.drawing},
                    times(crops / of_image + measured + drawn, self.returned),
                    {
                        "drawing": (drawn * decoder_task.RECONSTRUCTION_STEPS + checks * of_image * share)
                        * flops.drawing
                    },
                ),
                {
                    "voxel read": (crops / of_image + measured + drawn) * voxels,
                    "normal number": (crops * share + drawn) * voxels,
                },
                networks=1,
                training=True,
                bytes=4.0 * held_out * voxels,
                folder="decoder",
            )
        if study.few_step.method:
            found["few_step"] = self._distillation(study.few_step, Distilled.of(study.few_step, study.generate))
        return found

    def _distillation(self, settings: FewStep, distilled: Distilled) -> Work:
        """Trainings one after the other; a teacher that is a student itself has its guidance in its weights."""
        trainings, guided = len(few_step_task.stages(settings, distilled)), 1 + (distilled.guidance_scale not in (0, 1))
        taught = 2 * guided + 2 * (trainings - 1) if distilled.method == "progressive" else trainings * (guided + 1)
        latents = self.flops.denoiser * settings.optimiser.steps * settings.optimiser.batch_size
        return Work(
            "training",
            1,
            {"denoiser trained": latents * trainings * TRAINING, "denoiser": latents * taught},
            {"normal number": trainings * settings.optimiser.steps * settings.optimiser.batch_size * self.latent},
            networks=2,
            training=True,
        )

    def _label_maps(self) -> dict[str, Work]:
        """Networks of label maps, which are those of images for as many channels as there are distances; no judge looks
        at these, and nothing draws their detail.
        """
        study, pairs = self.study, self.study.pairs
        if pairs is None:
            return {}
        count = distances_of(len(pairs.structures))
        unjudged = study.autoencoder.model_copy(update={"adversarial": Adversarial()})
        alone = {"pairs": None, "autoencoder": unjudged, "decoder": study.decoder.model_copy(update={"network": None})}
        maps = Counter(study.model_copy(update=alone), self.scans, count)
        made = {**maps._trainings(), **maps._latents()}
        found = {
            f"masks/{name}": replace(made[name], folder=made[name].folder and f"masks/{made[name].folder}")
            for name in ("autoencoder", "latents", "scale", "diffusion")
        }
        voxels = self.scans * maps.voxels
        found["masks/maps"] = Work(
            "preparation",
            study.preprocess.shards,
            units={"voxel distanced": voxels, "voxel stored": voxels},
            bytes=2.0 * voxels,
            folder="masks/maps",
        )
        return found

    # ------------------------------------------------------------------------------------------ latents, generation

    def _latents(self) -> dict[str, Work]:
        study, flops = self.study, self.flops
        count = self.scans * study.variants.count
        columns = 2 if study.autoencoder.network == "kl" else 1
        features = feature_count(covariate_levels(study))
        rows = min(self.train, MAX_READOUT_ROWS)
        # The image half of the readout looks at half the resolution.
        width = self.latent + self.voxels / 2**study.spatial_dims
        return {
            "latents": Work(
                "after_training",
                study.preprocess.shards,
                {"encoder": flops.encoder * count},
                {"voxel read": count * self.voxels, "voxel stored": count * columns * self.latent},
                networks=1,
                bytes=2.0 * columns * count * self.latent,
                folder="latents",
            ),
            "scale": Work(
                "after_training",
                1,
                {"decoder trained": flops.decoder * (1 + (FOLDS + 1) * features)},
                {
                    "voxel read": 3 * self.train * self.latent + rows * self.voxels,
                    "product": 2 * rows**2 * width + 2 * (FOLDS + 1) * features * rows * width,
                    "voxel copied": (FOLDS + 1) * rows * width,
                },
            ),
            "tone": Work(
                "after_training",
                1,
                times(self._padded(min(TONE_IMAGES, self.train)), self.image),
                added(times(min(TONE_IMAGES, self.train), self.made), {"voxel read": TONE_IMAGES * self.voxels}),
                networks=self._sampled,
            ),
        }

    @property
    def _sampled(self) -> int:
        """Networks that images are made with."""
        return 2 + bool(self.study.decoder.network)

    def _padded(self, images: float) -> float:
        """Images that are made for so many: batches are filled."""
        size = self.study.generate.batch_size
        return math.ceil(images / size) * size

    def _generation(self) -> dict[str, Work]:
        study = self.study
        tiles = SHOWCASE_ROWS * (
            study.evaluate.sweep_steps + sum(n or study.evaluate.sweep_steps for n in covariate_levels(study))
        )
        whole, rest = divmod(self.planned, study.generate.shard_size)
        padded = whole * self._padded(study.generate.shard_size) + self._padded(rest)
        return {
            "plan": Work("after_training", 1, units={"subject planned": self.planned}),
            "generate": Work(
                "after_training",
                self.shards,
                times(padded, self.image),
                {**times(self.planned, self.made), "subject handled": 2 * self.planned},
                networks=self._sampled,
                bytes=2.0 * self.planned * self.voxels,
                folder="generated",
            ),
            "showcase": Work(
                "after_training",
                1,
                times(self._padded(tiles), self.image),
                times(tiles, self.made),
                networks=self._sampled,
            ),
        }

    # --------------------------------------------------------------------------------------------------- privacy

    def _looked_at(self, images: float, judged: bool) -> tuple[dict[str, float], dict[str, float]]:
        """What the copy detectors do for images: their directions, and where they are `judged` also those of their
        mirror images, the search for the nearest scan and the comparison with the candidates.
        """
        names = chosen(DETECTORS, self.study.privacy.detectors, "privacy.detectors")
        mirrors = 1 + (judged and encodes_mirrors(self.study.variants.flip, names))
        flops = {
            "encoder": images * mirrors * self.flops.encoder * ("latent" in names),
            "embedder": images * (1 + judged) * self.flops.embedder * ("learned" in names),
        }
        units = {"voxel read": images * self.voxels, "voxel reduced": images * self.voxels}
        if judged:
            directions = self.latent + DIM + self.searches * self.coarse
            units |= {
                "product": 2.0 * images * (self.train * directions + SHORTLIST * self.shifts * self.coarse),
                "voxel compared": images * CANDIDATES * self.compared,
            }
        return flops, units

    def _privacy(self) -> dict[str, Work]:
        study, planned, voxels = self.study, self.planned, self.voxels
        unseen, copied = self.calibration + self.test, CONTROL_SCANS * CONTROL_COPIES
        flops, units = self._looked_at(unseen + copied, judged=True)
        found = {
            "calibrate": Work(
                "after_training",
                1,
                added(flops, {"embedder": self.train * self.flops.embedder}, times(CONTROL_SCANS, self._decoded(0))),
                added(
                    units,
                    {
                        "voxel read": self.train * (2 * voxels + self.latent),
                        "voxel reduced": self.train * voxels,
                        "voxel augmented": copied * voxels,
                    },
                ),
                bytes=4.0 * self.train * self.directions + 2.0 * self.train * self.compared,
                folder="privacy",
            )
        }
        # The level is the share of images that the filter takes for copies of nobody.
        again = study.privacy.level * planned
        flops, units = self._looked_at(planned + again, judged=True)
        found["filter"] = Work(
            "after_training",
            self.shards,
            added(flops, times(again, self.image)),
            added(
                units, times(again, self.made), {"voxel stored": planned * voxels, "voxel reduced": planned * voxels}
            ),
            networks=self._sampled,
            bytes=2.0 * planned * voxels,
            folder="filtered",
        )
        released = min(MAX_IMAGES, planned)
        ways = 1 + encodes_mirrors(study.variants.flip, chosen(DETECTORS, study.privacy.detectors, "privacy.detectors"))
        flops, units = self._looked_at(unseen + 2 * ways * released, judged=False)
        scans = min(LOSS_SCANS, self.train) + min(LOSS_SCANS, self.test)
        members = self.test + max(self.test, min(self.train, 4 * self.test))
        pairs = ways * released * (min(self.train, MAX_PEOPLE) + min(unseen, MAX_PEOPLE) + self.train + members)
        pairs += self.train**2 + self.test * self.train
        coarse = _reduced(study.preprocess.shape, COARSE_SIDE[study.spatial_dims])
        found["privacy"] = Work(
            "after_training",
            1,
            added(
                flops,
                {"encoder": scans * self.flops.encoder, "denoiser": scans * len(LOSS_TIMES) * self.flops.denoiser},
            ),
            added(
                units,
                {
                    "voxel read": (scans + unseen) * voxels + self.train * self.compared,
                    "product": 2 * 2 * pairs * self.directions + planned**2 * coarse,
                    "subject attacked": planned,
                    "resample": 12.0 * study.privacy.bootstrap,
                },
            ),
            networks=1,
        )
        return found

    # --------------------------------------------------------------------------- evaluation, release and audit

    def _release(self) -> dict[str, Work]:
        study, planned, voxels = self.study, self.planned, self.voxels
        evaluate = study.evaluate
        learnt = min(self.train, MAX_TRAINING_SCANS)
        compared = min(evaluate.max_images, planned, self.train)
        measured = min(planned, MAX_SYNTHETIC) + min(self.val + self.calibration + self.test, MAX_HELD_OUT)
        shown = min(MAX_RECONSTRUCTIONS, self.val + self.test)
        spoilt = SPOILT * min(evaluate.sanity_images, shown)
        flops, units = self._looked_at(AUDITED, judged=True)
        return {
            "predictors": Work(
                "preparation",
                1,
                units={
                    "voxel measured": 2 * learnt * voxels,
                    "product": 2.0 * (2 * learnt) ** 2 * min(1e5, voxels) + 40.0 * (2 * learnt) ** 3,
                },
            ),
            "evaluate": Work(
                "after_training",
                1,
                {"embedder": (KINDS * compared + spoilt) * self.flops.embedder},
                {
                    "voxel measured": measured * voxels,
                    "voxel described": (KINDS * compared + spoilt) * voxels,
                    "voxel blurred": KINDS * len(evaluate.cutoffs) * compared * voxels,
                    "resample": 12.0 * (evaluate.realism_bootstrap + evaluate.permutations),
                },
                folder="evaluation",
            ),
            "images": Work(
                "after_training",
                self.shards,
                units={
                    "voxel packed": planned * voxels,
                    "voxel measured": planned * voxels,
                    "subject handled": planned,
                },
                bytes=0.6 * planned * voxels,
                folder="release",
            ),
            "describe": Work("after_training", 1, units={"subject described": planned}),
            "ledger": Work("after_training", 1, units={"subject sealed": planned}),
            "report": Work("after_training", 1, units={"page drawn": 1, "voxel read": 500.0 * voxels}),
            "neighbours": Work("after_training", 1, units={"voxel read": 100.0 * voxels}),
            "audit": Work(
                "after_training",
                1,
                added(flops, times(self._padded(AUDITED) * 2, self.image)),
                added(
                    units,
                    {"voxel checked": planned * voxels, "subject sealed": planned, "subject handled": planned},
                ),
                networks=1 + self._sampled,
            ),
        }


def _reduced(shape: tuple[int, ...], longest: int) -> int:
    """Whole blocks, as large as it takes for the longest side to have at most `longest` of them."""
    side = -(-max(shape) // longest)
    return math.prod(max(1, n // side) for n in shape)


def work(study: Study, scans: int) -> dict[str, Work]:
    """The work of every stage that takes long, by the name that its benchmarks have; `scans` are in the cohort."""
    return Counter(study, scans).stages()
