# What jobs ask for, and how a step is run.
import math
import shlex
from functools import partial

from meddiff_steps.core.code_digest import code_digest
from meddiff_steps.core.folders import folders_of
from meddiff_steps.core.registries import DETECTORS
from meddiff_steps.operations.rates import extraction_mb
from meddiff_steps.privacy.size import BYTES_PER_VALUE, batch_size

VOXELS = math.prod(STUDY.preprocess.shape)
# Attempts up to which requests grow; a training that is preempted twenty times must not ask for 3000 times the memory.
MOST_GROWTH = 4
# Minutes beyond which no further attempt goes: what trainings ask for, which partitions must allow in any case.
MOST_MINUTES = 2880
# Bytes per voxel that the copy detectors need for as many images as they look at together, and a shard that is drawn as
# well.
DETECTING = BYTES_PER_VALUE * batch_size(STUDY.preprocess.shape)
DRAWING_AND_DETECTING = max(DETECTING, 600 * STUDY.generate.batch_size)
# Directions of training scans are taken from their latents, where the detector `latent` is chosen.
DETECTED_LATENTS = "latent" in (STUDY.privacy.detectors or DETECTORS.names())
GPUS = 0 if STUDY.compute.device == "cpu" else STUDY.compute.devices


def memory(base_mb, bytes_per_voxel=0, images=1):
    """mem_mb of a job: a base for Python and its libraries plus bytes per voxel of the images it holds; half as much
    again at attempts 2 to 4.
    """
    return lambda wildcards, attempt: int(
        (base_mb + bytes_per_voxel * images * VOXELS / 2**20) * 1.5 ** (min(attempt, MOST_GROWTH) - 1)
    )


def minutes(value):
    """runtime of a job in minutes; twice as long at each further attempt, up to MOST_MINUTES. A training, which goes on
    where it stopped, asks for the same at every attempt.
    """
    return lambda wildcards, attempt: min(value * 2 ** (attempt - 1), MOST_MINUTES)


def passing(kind, path):
    """The output of a stage whose shards are deleted when nobody needs them any more, where the study says so
    (storage.temporary).
    """
    return temp(path) if kind in STUDY.storage.temporary else path


def lasting(path):
    """An output that a later run must not replace by itself (storage.protect): Snakemake deletes outputs before it
    makes them again.
    """
    return protected(path) if STUDY.storage.protect else path


def arguments(step, extra, wildcards, input, output):
    """`--name value` for every named input and output of a job of `step`, and for what `extra` adds, quoted.

    A name is that of the step's option; a list is given one by one, but for the files of a folder (`core.folders`),
    which are given as the folder.  Inputs whose names begin with `after` are only waited for, and outputs `also` lie
    beside another.
    """
    words = []

    def add(name, value):
        several = [value] if isinstance(value, (str, Path, int)) else list(value)
        files = folders_of(step).get(name)
        if several and files:
            several = [several[0].removesuffix(files[0]).rstrip("/")]
        words.extend(f"--{name.replace('_', '-')} {shlex.quote(str(one))}" for one in several)

    for name, value in [*input.items(), *output.items()]:
        if not name.startswith(("after", "also")):
            add(name, value)
    for name, value in extra.items():
        add(name, value(wildcards) if callable(value) else value)
    return " ".join(words)


def run_step(step, study=STUDY, **extra):
    """What a job of a step is given: its frozen config, the digest of the code that it reaches, and its options."""
    frozen = settings(step, study)
    return {
        "step": step,
        "config": frozen,
        "code": code_digest(step, json.loads(Path(frozen).read_text())),
        "options": partial(arguments, step, extra),
    }


def BY_SHARD(wildcards):
    """Of a job, the shard that its step is asked for."""
    return wildcards.shard


# What every step is run by.
STEP = "python -m meddiff_steps {params.step} --config {params.config:q} {params.options} 2>&1 | tee {log:q}"
STEP_WITH_THREADS = STEP.replace(" 2>&1", " --threads {threads} 2>&1")
