"""How fast a machine does what `operations.work` counts.

Processors: two cores of an Intel Xeon (Sapphire Rapids, AMX), networks in bf16.  Voxels, numbers and products are as
`python -m benchmarks.units` measures them; brain extraction and bias field as docs/preprocessing.md has them;
registration, simulation, resamples, pictures of a report and networks that are trained as the stages of the demo took
them (`tests/operations/test_cost.py` compares all of it with these); single subjects as `make scale` did 100,000
(docs/cluster.md).  Distances of label maps, affine transform and demons, and deformations were timed once, on a brain
of 48 x 60 x 48 voxels; networks of applications as committed studies took them.  A GPU is one number, the rate that it
sustains; nobody has measured these networks on one, and a sceptic gives a low one with `--tflops`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from meddiff_steps.config import Study
from meddiff_steps.privacy.size import BYTES_PER_VALUE, batch_size

#: Seconds that a job takes before it begins to work, with networks (torch and MONAI are loaded) and without.
START_S, LIGHT_START_S = 4.0, 1.5
#: Seconds that it takes on a GPU to compile a network, the first time and with what an earlier job compiled. Assumed:
#: nobody has measured either on a GPU.
COMPILE_S, COMPILED_BEFORE_S = 60.0, 20.0


@dataclass(frozen=True)
class Unit:
    """What a processor needs for one unit of work.

    Attributes
    ----------
    seconds
        Of one core.
    shared
        Whether the cores of a job share the work; else one does it and the others wait.
    """

    seconds: float
    shared: bool = False


#: By the names that `work` counts with.
PROCESSOR: dict[str, Unit] = {
    "scan listed": Unit(3e-4, shared=True),
    "voxel hashed": Unit(2e-9, shared=True),
    "scan registered": Unit(0.45, shared=True),
    "scan extracted": Unit(4.0, shared=True),
    "scan corrected": Unit(9.0, shared=True),
    "voxel unpacked": Unit(2.6e-8, shared=True),
    "voxel resampled": Unit(3.4e-8, shared=True),
    "voxel simulated": Unit(4.6e-7, shared=True),
    "voxel read": Unit(5e-10),
    "voxel stored": Unit(1.2e-8),
    "voxel copied": Unit(4e-10),
    "voxel augmented": Unit(1.1e-7, shared=True),
    "voxel reduced": Unit(1.9e-8, shared=True),
    "voxel compared": Unit(8e-8, shared=True),
    "voxel measured": Unit(3e-8, shared=True),
    "voxel described": Unit(1.1e-6),
    "voxel blurred": Unit(3.2e-7),
    "voxel packed": Unit(4.9e-8),
    "voxel checked": Unit(6e-8, shared=True),
    "voxel distanced": Unit(1.3e-7),
    "voxel matched": Unit(1.2e-5),
    "voxel deformed": Unit(1e-7, shared=True),
    "normal number": Unit(1.3e-8),
    "product": Unit(8e-12, shared=True),
    "resample": Unit(1.1e-3),
    "page drawn": Unit(9.0),
    "subject planned": Unit(1e-4),
    "subject attacked": Unit(1e-3),
    "subject described": Unit(1e-4),
    "subject sealed": Unit(1e-4),
    "subject handled": Unit(1e-3),
}
#: FLOP/s of one core in bf16, by network, in passes forward and while it is trained (batches of 1 to 4): small networks
#: wait for memory.
CORE_FLOPS: dict[str, float] = {
    "encoder": 3.4e11,
    "decoder": 3.0e11,
    "denoiser": 2.6e11,
    "drawing": 4.0e11,
    "embedder": 2.4e10,
    "encoder trained": 9.3e10,
    "decoder trained": 9.3e10,
    "denoiser trained": 2.2e11,
    "drawing trained": 2.5e11,
    "embedder trained": 1.2e10,
    "discriminator trained": 9.3e10,
    "image to image": 1.1e11,
    "image to image trained": 1.6e11,
    "registration": 7.8e10,
    "registration trained": 7.8e10,
    "points": 6.0e9,
    "points trained": 3.1e10,
}


@dataclass(frozen=True)
class Request:
    """What a job of a stage asks a scheduler for at its first attempt; the rules ask for the same (a test compares).

    Attributes
    ----------
    cores
        `threads` of the rule.
    minutes
        `runtime`.
    megabytes
        Whatever the images.
    bytes_per_voxel
        Of all images that it holds at a time.
    more_megabytes
        For what a study may switch on.
    """

    cores: int
    minutes: int
    megabytes: int
    bytes_per_voxel: Callable[[Study], float] = lambda study: 0.0
    more_megabytes: Callable[[Study], int] = lambda study: 0

    def memory(self, study: Study) -> int:
        """Megabytes (of 2**20 bytes) for a study, as `mem_mb`."""
        whole = self.megabytes + self.more_megabytes(study)
        return int(whole + self.bytes_per_voxel(study) * math.prod(study.preprocess.shape) / 2**20)


def extraction_mb(study: Study) -> int:
    """Megabytes that the networks of brain extraction add to a job of preprocessing, which has two workers."""
    return 2 * 1200 if study.preprocess.brain_extraction else 0


def _detecting(study: Study) -> float:
    return BYTES_PER_VALUE * batch_size(study.preprocess.shape)


def _drawing(study: Study) -> float:
    return 600 * study.generate.batch_size


def _either(study: Study) -> float:
    return max(_detecting(study), _drawing(study))


REQUESTS: dict[str, Request] = {
    "simulate": Request(2, 60, 3000),
    "cohort": Request(8, 120, 2000),
    "preprocess": Request(2, 120, 2000, lambda study: 64 * 4, extraction_mb),
    "autoencoder": Request(8, 2880, 2500, lambda study: 2000 * study.autoencoder.optimiser.batch_size),
    "decoder": Request(8, 2880, 2500, lambda study: 600 * study.decoder.optimiser.batch_size),
    "latents": Request(8, 240, 2000, lambda study: 600 * study.latents.batch_size),
    "scale": Request(8, 120, 6000, lambda study: 2000),
    "diffusion": Request(8, 4320, 4000, lambda study: 200 * study.diffusion.optimiser.batch_size),
    "few_step": Request(8, 2880, 4000, lambda study: 200 * study.few_step.optimiser.batch_size),
    "tone": Request(8, 240, 2500, _drawing),
    "embedder": Request(8, 720, 2000, lambda study: 40 * study.privacy.embedder.optimiser.batch_size),
    "calibrate": Request(8, 720, 4000, lambda study: _detecting(study) + 1200),
    "plan": Request(1, 30, 1500),
    "generate": Request(8, 480, 2500, _drawing),
    "filter": Request(8, 720, 4000, _either),
    "privacy": Request(8, 720, 8000, _detecting),
    "predictors": Request(8, 240, 6000, lambda study: 100),
    "evaluate": Request(8, 720, 6000, lambda study: 100),
    "showcase": Request(8, 60, 2500, _drawing),
    "images": Request(1, 120, 2500, lambda study: 64 * 4),
    "describe": Request(1, 30, 1500),
    "ledger": Request(1, 60, 2000),
    "report": Request(1, 30, 3000),
    "neighbours": Request(1, 30, 3000),
    "audit": Request(8, 240, 4000, _either),
    "masks/maps": Request(1, 120, 1500, lambda study: 100),
    "segmentation_model": Request(8, 2880, 3000, lambda study: 2400 * study.segmentation_ensemble.optimiser.batch_size),
    "segmentation": Request(8, 240, 3000, lambda study: 2400 * study.segmentation_ensemble.samples),
    "translation_model": Request(8, 2880, 3000, lambda study: 2400 * study.translation.optimiser.batch_size),
    "translation": Request(8, 240, 3000, lambda study: 2400 * study.translation.samples),
    "registration/train": Request(8, 720, 3000, lambda study: 600 * study.registration.optimiser.batch_size),
    "registration": Request(8, 240, 4000, lambda study: 100 * study.registration.pairs),
    "shape_completion/train": Request(8, 480, 3000),
    "shape_completion": Request(8, 120, 3000),
}
#: Those of label maps are the rules of images with other files.
REQUESTS |= {f"segmentation_{name}": REQUESTS["segmentation_model"] for name in ("beside", "few_labels")}
REQUESTS |= {f"masks/{name}": REQUESTS[name] for name in ("autoencoder", "latents", "scale", "diffusion")}
#: Rules of stages whose names they have not.
RULES: dict[str, str] = {
    "masks/maps": "masks",
    **{f"masks/{name}": f"mask_{name}" for name in ("autoencoder", "latents", "scale", "diffusion")},
    **{f"{name}/train": f"{name}_train" for name in ("registration", "shape_completion")},
}
