"""How much work the applications are that train networks of their own, counted as `operations.work` counts the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from meddiff_steps.applications.shape_completion import HELD_OUT
from meddiff_steps.config import ImageToImage, PairRegistration, ShapeCompletion, Study
from meddiff_steps.core.registries import evaluations
from meddiff_steps.models.deformation import RegistrationNetwork
from meddiff_steps.models.image_to_image import ImageToImage as Network
from meddiff_steps.models.image_to_image import sampler
from meddiff_steps.models.points import PointDenoiser, told
from meddiff_steps.models.slices import Slices
from meddiff_steps.operations.counting import TRAINING, Work, counted, times, validations
from meddiff_steps.training.tasks.image_to_image import VALIDATION_SCANS
from meddiff_steps.training.tasks.registration import VALIDATION_PAIRS

#: Of a label map that is drawn: nothing, and one label. How many there are only its scans know, and a channel more of
#: a network costs little.
LABELS = 2
#: How often each way moves a scan: onto another one, and onto itself after a known deformation; networks also for the
#: parts of the way.
TRIES, OF_PLAIN, OF_SCORE = 2, 3, 4


def of_applications(study: Study, scans: int) -> dict[str, Work]:
    """The work of the applications that a study asks for, by stage; `scans` are in its cohort, and stand for shapes
    where these are completed.
    """
    val, test = study.splits.val * scans, study.splits.test * scans
    return {
        **_segmentation(study, val, test),
        **_translation(study, val, test),
        **_registration(study, val, test),
        **_shapes(study, scans),
    }


@dataclass(frozen=True)
class Images:
    """A network that draws images from images: its settings, with those of its training, and all else as of
    `models.image_to_image.ImageToImage`.
    """

    settings: ImageToImage
    sources: int
    targets: int
    marks: int = 0
    missing: bool = False
    slices: Slices | None = None
    mean: Images | None = None

    def steps(self, count: int) -> Images:
        """The same, trained for so many steps."""
        optimiser = self.settings.optimiser.model_copy(update={"steps": count})
        return replace(self, settings=self.settings.model_copy(update={"optimiser": optimiser}))

    def one_pass(self, shape: Sequence[int]) -> float:
        """Operations of one pass, per image of a shape, but for those of `mean`."""
        with torch.device("meta"):
            model = self.built(shape)
            told = model.told(torch.empty(1, self.targets if self.marks else self.sources, *shape))
            if self.marks:
                return counted(lambda: model(told))
            state = torch.empty(1, *model.blocks_shape)
            return counted(lambda: model(told, state, torch.empty(1)))

    def built(self, shape: Sequence[int]) -> Network:
        """The network, for images of a shape."""
        mean = None if self.mean is None else self.mean.built(shape)
        kind = (self.sources, self.targets, self.marks, self.missing, self.slices, mean)
        return Network(self.settings, shape, *kind)


def pass_of_registration(settings: PairRegistration, shape: Sequence[int], score: bool) -> float:
    """Operations of one pass of a registration network, per pair."""
    with torch.device("meta"):
        model = RegistrationNetwork(settings, (1, *shape), score)
        image = torch.empty(1, 1, *(n // settings.reduce for n in shape))
        return counted(lambda: model(image, image))


def pass_of_points(settings: ShapeCompletion) -> float:
    """Operations of one pass of the diffusion of points, per shape, of as many missing points as in training."""
    with torch.device("meta"):
        model = PointDenoiser(settings)
        left = torch.empty(1, 3, settings.known)
        return counted(lambda: model(torch.empty(1, 3, settings.drawn), torch.empty(1), told(left)))


def _channels(study: Study, names: Sequence[str]) -> int:
    """Of a target: masks of several readers are one."""
    kinds = {study.preprocess.channels[name].kind if name != "image" else "contrast" for name in names}
    if kinds == {"contrast"}:
        return len(names)
    return 1 if kinds == {"mask"} else LABELS


def _trained(study: Study, val: float, networks: Sequence[Images], jobs: int = 1) -> Work:
    """Trainings of networks, one after the other in each of as many jobs."""
    shape = study.preprocess.shape
    voxels, flops, read, numbers = math.prod(shape), 0.0, 0.0, 0.0
    for one in networks:
        optimiser, patch = one.settings.optimiser, one.settings.patch or shape
        images = optimiser.steps * optimiser.batch_size
        looked_at = validations(optimiser) * min(VALIDATION_SCANS, val)
        flops += one.one_pass(patch) * images * TRAINING + one.one_pass(shape) * looked_at
        if one.mean is not None:
            flops += one.mean.one_pass(patch) * images + one.mean.one_pass(shape) * looked_at
        read += (images + looked_at) * voxels * (one.sources + one.targets + one.marks)
        numbers += (images * math.prod(patch) + looked_at * voxels) * one.targets
    units = {"voxel read": read, "normal number": numbers}
    count = math.ceil(len(networks) / jobs)
    return Work("applications", jobs, {"image to image trained": flops}, units, networks=count, training=True)


def _drawn(study: Study, settings: ImageToImage, test: float, asked: Sequence[tuple[float, Images]], ways: int) -> Work:
    """So many evaluations of each network per scan, and ways that are judged."""
    scans, shape = len(settings.scans) or min(settings.most_scans, test), study.preprocess.shape
    voxels, sources, targets = math.prod(shape), len(settings.source), _channels(study, settings.target)
    written = min(settings.most_images, scans) * (settings.samples + 3)
    return Work(
        "applications",
        1,
        {"image to image": scans * sum(count * one.one_pass(shape) for count, one in asked)},
        {
            "voxel read": scans * voxels * (sources + targets),
            "normal number": scans * settings.samples * voxels * targets,
            "voxel measured": scans * ways * voxels,
            "voxel packed": written * voxels,
        },
        networks=2,
    )


def _segmentation(study: Study, val: float, test: float) -> dict[str, Work]:
    settings = study.segmentation_ensemble
    if not settings.wanted:
        return {}
    sources, targets = len(settings.source), _channels(study, settings.target)
    whole = evaluations(sampler(), settings.num_inference_steps)
    network, few = Images(settings, sources, targets), Images(settings, 0, sources, targets)
    asked = [(1.0 + settings.samples * (whole + round(settings.start * whole)), network)]
    found = {"segmentation_model": _trained(study, val, 2 * [network])}
    if settings.beside:
        others = [settings.compared(name, study.preprocess.shape) for name in settings.beside]
        trained = [Images(one, sources, targets) for one in others for _ in range(2)]
        found["segmentation_beside"] = _trained(study, val, trained, len(others))
        asked += [(1.0 + settings.samples * whole, Images(one, sources, targets)) for one in others]
    if settings.few_labels:
        trained = len(settings.few_labels) * [few]
        if settings.pretraining_steps:
            trained.append(Images(settings, 0, sources).steps(settings.pretraining_steps))
        found["segmentation_few_labels"] = _trained(study, val, trained, len(trained))
        asked.append((float(len(settings.few_labels)), few))
    ways = 4 + 2 * settings.samples + len(settings.few_labels) + len(settings.beside) * (1 + settings.samples)
    return found | {"segmentation": _drawn(study, settings, test, asked, ways)}


def _translation(study: Study, val: float, test: float) -> dict[str, Work]:
    settings = study.translation
    if not settings.wanted:
        return {}
    sources, targets, more = len(settings.source), len(settings.target), settings.volume_steps
    slices: Slices | None = "alone" if more else None
    regression = Images(settings, sources, targets, missing=settings.missing, slices=slices)
    network = replace(regression, mean=regression)
    volumes = [replace(network, slices="joined"), replace(network, slices="solid")] if more else []
    networks = [regression, network]
    if more:
        networks += [volumes[0].steps(more), volumes[1].steps(settings.optimiser.steps + more)]
    finder = Images(settings, targets, 1, slices=slices)
    if settings.lesion is not None:
        networks.append(finder)
    if settings.cycle:
        networks.append(Images(settings, targets, sources))
    # Where any may be missing, every choice of what is there
    given_all = 2 ** (sources - targets) if set(settings.target) <= set(settings.source) else 0
    choices = 2**sources - 1 - given_all if settings.missing else 1
    draws = choices * settings.samples * evaluations(sampler(), settings.num_inference_steps)
    # Copies of the sources, the regression on patches, the network without noise, draws and their mean
    ways = choices * (sources + 2 + (1 + len(volumes)) * (1 + settings.samples))
    asked = [(float(draws), network), *((float(draws), one) for one in volumes)]
    asked.append((float(choices * (2 + len(volumes))), regression))  # as it is, and under the draws of each
    if settings.lesion is not None:
        asked.append((float(ways + 1), finder))
    drawn = replace(_drawn(study, settings, test, asked, ways), networks=2 + len(volumes) + bool(settings.lesion))
    return {"translation_model": _trained(study, val, networks), "translation": drawn}


def _registration(study: Study, val: float, test: float) -> dict[str, Work]:
    settings, shape = study.registration, study.preprocess.shape
    if not settings.pairs:
        return {}
    optimiser, voxels = settings.optimiser, math.prod(shape)
    score, plain = (pass_of_registration(settings, shape, score) for score in (True, False))
    pairs = optimiser.steps * optimiser.batch_size
    looked_at = validations(optimiser) * min(VALIDATION_PAIRS, val)
    reduced = voxels / settings.reduce**study.spatial_dims
    judged = min(settings.pairs, test)
    # Each of five ways and each share of the way of both networks is a deformation that is judged.
    deformed = judged * (2 * 5 + 2 * len(settings.shares) + 1)
    return {
        "registration/train": Work(
            "applications",
            2,
            {"registration trained": (score + plain) * (pairs * TRAINING + looked_at)},
            times(
                2,
                {
                    "voxel read": 2 * (pairs + looked_at) * voxels,
                    "normal number": pairs * reduced / 2,
                    "voxel deformed": (pairs * TRAINING + looked_at) * reduced,
                },
            ),
            networks=1,
            training=True,
        ),
        "registration": Work(
            "applications",
            1,
            {"registration": judged * (OF_SCORE * score + OF_PLAIN * plain)},
            {
                "voxel read": judged * voxels,
                "voxel matched": judged * TRIES * voxels,
                "voxel deformed": deformed * voxels,
                "voxel measured": deformed * voxels,
                "voxel packed": judged * (len(settings.shares) + 2) * voxels,
            },
            networks=2,
        ),
    }


def _shapes(study: Study, shapes: int) -> dict[str, Work]:
    settings = study.shape_completion
    if settings.points is None:
        return {}
    optimiser, each = settings.optimiser, pass_of_points(settings)
    test = math.ceil(shapes / settings.test_every)
    watched = math.ceil((shapes - test) / HELD_OUT)
    learnt = optimiser.steps * optimiser.batch_size * TRAINING + validations(optimiser) * watched
    drawn = test * settings.samples * settings.num_inference_steps
    return {
        "shape_completion/train": Work(
            "applications",
            1,
            {"points trained": learnt * each},
            {"normal number": optimiser.steps * optimiser.batch_size * 3 * settings.drawn},
            networks=1,
            training=True,
        ),
        "shape_completion": Work("applications", 1, {"points": drawn * each}, networks=1),
    }
