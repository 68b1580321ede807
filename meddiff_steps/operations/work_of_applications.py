"""How much work the applications are that train networks of their own, counted as `operations.work` counts the rest."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from meddiff_steps.applications.shape_completion import HELD_OUT
from meddiff_steps.config import ImageToImage, PairRegistration, ShapeCompletion, Study
from meddiff_steps.core.registries import evaluations
from meddiff_steps.models.deformation import RegistrationNetwork
from meddiff_steps.models.image_to_image import ImageToImage as Network
from meddiff_steps.models.image_to_image import sampler
from meddiff_steps.models.points import PointDenoiser, told
from meddiff_steps.operations.counting import TRAINING, Work, added, counted, times, validations
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


def pass_of_images(settings: ImageToImage, shape: Sequence[int], sources: int, targets: int) -> float:
    """Operations of one pass of a network that draws images from images, per image."""
    with torch.device("meta"):
        model = Network(settings, shape, sources, targets)
        given, state = torch.empty(1, sources, *shape), torch.empty(1, *model.blocks_shape)
        return counted(lambda: model(given, state, torch.empty(1)))


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


def _trained(study: Study, settings: ImageToImage, val: float, networks: Sequence[tuple[int, int]]) -> Work:
    """Trainings of networks of so many sources and targets, one after the other."""
    optimiser, voxels = settings.optimiser, math.prod(study.preprocess.shape)
    images = optimiser.steps * optimiser.batch_size
    looked_at = validations(optimiser) * min(VALIDATION_SCANS, val)
    passes = sum(pass_of_images(settings, study.preprocess.shape, *each) for each in networks)
    return Work(
        "applications",
        1,
        {"denoiser trained": passes * (images * TRAINING + looked_at)},
        {
            "voxel read": (images + looked_at) * voxels * sum(sum(each) for each in networks),
            "normal number": (images + looked_at) * voxels * sum(targets for _, targets in networks),
        },
        networks=len(networks),
        training=True,
    )


def _drawn(study: Study, settings: ImageToImage, test: float, draws: float, ways: int, sources: int) -> Work:
    """So many evaluations per scan, and ways that are judged."""
    scans = len(settings.scans) or min(settings.most_scans, test)
    voxels, targets = math.prod(study.preprocess.shape), _channels(study, settings.target)
    written = min(settings.most_images, scans) * (settings.samples + 3)
    return Work(
        "applications",
        1,
        {"denoiser": scans * draws * pass_of_images(settings, study.preprocess.shape, sources, targets)},
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
    draws = 1 + settings.samples * (whole + round(settings.start * whole))
    return {
        "segmentation_model": _trained(study, settings, val, 2 * [(sources, targets)]),
        "segmentation": _drawn(study, settings, test, draws, 4 + 2 * settings.samples, sources),
    }


def _translation(study: Study, val: float, test: float) -> dict[str, Work]:
    settings = study.translation
    if not settings.wanted:
        return {}
    sources, targets = len(settings.source), len(settings.target)
    networks = 2 * [(sources, targets)]
    if settings.lesion is not None:
        networks.append((targets, 1))
    if settings.cycle:
        networks.append((targets, sources))
    draws = 1 + settings.samples * evaluations(sampler(), settings.num_inference_steps)
    # Copies of the sources, the regression on patches, the network without noise, draws and their mean
    ways = sources + 3 + settings.samples
    drawn = _drawn(study, settings, test, draws, ways, sources)
    if settings.lesion is not None:
        scans = len(settings.scans) or min(settings.most_scans, test)
        asked = scans * (ways + 1) * pass_of_images(settings, study.preprocess.shape, targets, 1)
        drawn = Work("applications", 1, added(drawn.flops, {"denoiser": asked}), drawn.units, networks=3)
    return {"translation_model": _trained(study, settings, val, networks), "translation": drawn}


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
            {"denoiser trained": (score + plain) * (pairs * TRAINING + looked_at)},
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
            {"denoiser": judged * (OF_SCORE * score + OF_PLAIN * plain)},
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
            {"denoiser trained": learnt * each},
            {"normal number": optimiser.steps * optimiser.batch_size * 3 * settings.drawn},
            networks=1,
            training=True,
        ),
        "shape_completion": Work("applications", 1, {"denoiser": drawn * each}, networks=1),
    }
