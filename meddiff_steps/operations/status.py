"""How far a study is, seen from its results folder alone: no scheduler is asked, so it works for every way of
running.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from meddiff_steps.config import Study, load_study, parse_study
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.folders import MANIFEST
from meddiff_steps.operations.machine import this_machine
from meddiff_steps.synthesis.size import plan_shards

#: Stages that run once per shard of the cohort and of the plan, by the names of their folders under logs/.
COHORT_STAGES = ("preprocess", "latents")
PLAN_STAGES = ("generate", "filter", "images", "export", "regenerate", "teacher/generate", "teacher/filter")
#: Stages whose jobs have a GPU each (`compute.devices` of them for the trainings of both models), where the study does
#: not say `compute.device: cpu`.
GPU_STAGES = frozenset(
    "autoencoder decoder latents scale diffusion tone calibrate generate filter privacy text_fidelity sampler_study"
    " showcase audit segmenter few_step few_step/tone counterfactual inpainting normative reconstruction anomaly"
    " segmentation_model segmentation_beside segmentation_few_labels segmentation"
    " translation_model translation_unpaired translation registration/train registration"
    " harmonisation_model harmonisation"
    " shape_completion/train shape_completion segmentation_study"
    " masks/autoencoder masks/latents masks/scale masks/diffusion"
    " downstream/train downstream/neighbours regenerate teacher/generate teacher/filter teacher/privacy"
    " second_model/latents second_model/scale second_model/diffusion second_model/tone"
    " downstream/generate downstream/filter downstream/diffusion downstream/tone".split()
)
TRAININGS = (
    *("autoencoder", "decoder", "diffusion", "few_step", "second_model/diffusion", "downstream/diffusion"),
    *("segmentation_model", "segmentation_beside", "segmentation_few_labels"),
    *("translation_model", "translation_unpaired", "harmonisation_model"),
    *("registration/train", "shape_completion/train"),
    *("masks/autoencoder", "masks/diffusion"),
)
#: Below the results: how many jobs of the last `meddiff run` are done, and how many there are (JSON).
JOBS = "logs/jobs.json"
#: How a log ends whose step has given up, and whose was asked to stop; a step that was killed says nothing.
GAVE_UP = re.compile(r"^(error: |Traceback |[\w.]+Error\b)", re.M)
ASKED_TO_STOP = re.compile(r"^\w+: asked to stop; saved |^KeyboardInterrupt\b", re.M)
#: How the last line of a log says what the step took of the processor (`command.ending`).
COST = re.compile(r": ([\d.]+) s of the processor, ([\d.]+) MB at most$", re.M)
#: What a job can be that has begun and is not done.
NOT_DONE = ("running", "stopped", "failed")
#: Bytes at the end of a log in which last words are looked for.
TAIL = 4096


@dataclass
class Stage:
    """Jobs of one stage by state, each as (time of its last sign of life, log); hours of those that are done, and the
    GPUs that each has.
    """

    name: str
    expected: int | None = None
    done: int = 0
    hours: float = 0.0
    gpus: int = 0
    running: list[tuple[float, Path]] = field(default_factory=list)
    stopped: list[tuple[float, Path]] = field(default_factory=list)
    failed: list[tuple[float, Path]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return max(self.expected or 0, self.done + sum(len(getattr(self, state)) for state in NOT_DONE))

    @property
    def gpu_hours(self) -> float:
        """Used by the jobs that are done."""
        return self.hours * self.gpus

    def expected_gpu_hours(self, estimated: float | None = None) -> float | None:
        """Of all its jobs: at the mean of those that are done, else as estimated (hours of all jobs); None where
        neither says anything.
        """
        if self.done:
            return self.gpu_hours / self.done * self.total
        return None if estimated is None else estimated * self.gpus


def read_stages(results: Path, active: bool) -> list[Stage]:
    """Stages of a study in the order in which they were begun.

    Snakemake writes a job's benchmark when it has succeeded, after the last line of its log; a log without a younger
    benchmark is that of a job that runs, was stopped from outside, or has failed.

    Parameters
    ----------
    results
        `results/<study>`.
    active
        Whether a run works there; where none does, nothing is running.

    Raises
    ------
    UserError
        There is no study in the folder.
    """
    study = newest_study(results)
    expected = dict.fromkeys(COHORT_STAGES, study.preprocess.shards) | dict.fromkeys(
        PLAN_STAGES, plan_shards(study.plan, study.generate.shard_size)
    )
    stages: dict[str, Stage] = {}
    for log in sorted((results / "logs").rglob("*.log"), key=lambda path: path.stat().st_mtime):
        name = stage_of(log.relative_to(results / "logs"))
        stage = stages.setdefault(name, Stage(name, expected.get(name), gpus=gpus_of(name, study)))
        benchmark = results / "benchmarks" / log.relative_to(results / "logs").with_suffix(".tsv")
        changed = log.stat().st_mtime
        if benchmark.exists():
            stage.hours += seconds(benchmark) / 3600
        if benchmark.exists() and benchmark.stat().st_mtime >= changed:
            stage.done += 1
        else:
            getattr(stage, state_of(tail(log), active)).append((changed, log))
    return list(stages.values())


def state_of(end: str, active: bool) -> str:
    """One of `NOT_DONE`, by the end of a job's log, and whether a run works there."""
    if ASKED_TO_STOP.search(end):
        return "stopped"
    if GAVE_UP.search(end):
        return "failed"
    return "running" if active else "stopped"


def jobs_of_run(results: Path) -> tuple[int, int] | None:
    """Jobs of the last `meddiff run` that are done, and all; None where Snakemake was started by itself."""
    try:
        said = json.loads((results / JOBS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return said["done"], said["of"]


def gpus_of(stage: str, study: Study) -> int:
    """GPUs of one job of a stage."""
    if study.compute.device == "cpu" or stage not in GPU_STAGES:
        return 0
    return study.compute.devices if stage in TRAININGS else 1


def ran_without_gpu(results: Path) -> bool:
    """Whether the training of the autoencoder, by its run record, ran on a processor; while it has none, whether this
    machine has no GPU.
    """
    try:
        record = json.loads((results / "records/autoencoder/model.safetensors.json").read_text(encoding="utf-8"))
    except OSError:
        return this_machine().gpus == 0
    return "gpu" not in record["environment"]["torch"]


def results_of(study: Path) -> Path:
    """The folder of a study's results: itself, or what its file says."""
    if study.suffix not in (".yaml", ".yml"):
        return study
    content = load_study(study)
    return Path(content.results, content.study)


def another_cohort(study: Study) -> tuple[Literal["warning", "fail"], str] | None:
    """What differs where results of this study's name were made of a cohort of another kind or from another place.

    A cohort may have been moved, so that another place alone is a warning.
    """
    results = Path(study.results, study.study)
    frozen = _frozen(results)
    if not frozen or not (results / MANIFEST).is_file():
        return None
    before = json.loads(frozen[-1].read_text(encoding="utf-8"))
    now = study.model_dump(mode="json")
    was, here = (_place(content["cohort"]) for content in (before, now))
    if was == here:
        return None
    told = f"{results} holds results of {{}} ({', '.join(was)}; this study: {', '.join(here)})."
    if was[0] == here[0] and before.get("title") == now["title"]:
        return "warning", told.format("a cohort that lay elsewhere") + (
            " If it was moved, go on; if it is another one, give this study another name (`study`), or its results will"
            " replace those."
        )
    return "fail", told.format("another cohort") + (
        " They would be replaced. Give this study another name (`study`), or move the folder away."
    )


def _place(cohort: Mapping[str, Any]) -> list[str]:
    """The kind of a cohort, and where it lies."""
    paths = [cohort[key] for key in ("table", "root") if cohort.get(key)]
    return [cohort["source"], *(str(Path(path).resolve()) for path in paths)]


def _frozen(results: Path) -> list[Path]:
    """Whole studies as runs froze them, the newest last."""
    return sorted((results / "config").glob("study-*.json"), key=lambda path: path.stat().st_mtime)


def newest_study(results: Path) -> Study:
    """The study as the last run froze it."""
    frozen = _frozen(results)
    if not frozen:
        raise UserError(
            f"{results}: no study was started here (no config/study-*.json). `meddiff run` starts one; give its folder"
            " results/STUDY, or its file."
        )
    return parse_study(json.loads(frozen[-1].read_text(encoding="utf-8")), str(frozen[-1]))


def stage_of(log: Path) -> str:
    """Name of the stage of a log: `generate/0003.log` and `downstream/train/0.log` are one job of many,
    `downstream/data.log` is a stage.
    """
    many = log.parent.as_posix() in (
        *COHORT_STAGES,
        *PLAN_STAGES,
        *("second_model/latents", "masks/maps", "masks/latents", "registration/train"),
        *("segmentation_beside", "segmentation_few_labels"),
        *(f"downstream/{name}" for name in ("train", "plan", "generate", "filter", "diffusion", "tone")),
    )
    return (log.parent if many else log.with_suffix("")).as_posix()


def seconds(benchmark: Path, column: str = "s") -> float:
    """Wall time of a job, or another column of Snakemake's benchmark in seconds; 0 where it cannot be read."""
    try:
        names, *rows = (line.split("\t") for line in benchmark.read_text(encoding="utf-8").splitlines())
        return sum(float(row[names.index(column)]) for row in rows)
    except (OSError, ValueError, IndexError):
        return 0.0


def tail(log: Path) -> str:
    with open(log, "rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL))
        return stream.read().decode(errors="replace")


def last_line(log: Path) -> str:
    """The last line of a log that says something, but what the job took; of a progress bar, its last state."""
    lines = [line for line in tail(log).replace("\r", "\n").splitlines() if line.strip() and not COST.search(line)]
    return lines[-1].strip() if lines else "(empty)"


def table(
    stages: list[Stage], now: float, estimated: Mapping[str, float] | None = None, *, without_gpu: bool = False
) -> Iterator[str]:
    """A line per stage, and one per job that has begun and is not done.

    Parameters
    ----------
    stages, now
        Of `read_stages`, and the time.
    estimated
        Hours of all jobs of a stage, by name, for stages of which nothing is done yet.
    without_gpu
        Leave out the columns of GPU-hours.
    """
    estimated = estimated or {}
    width = max([len(stage.name) for stage in stages], default=5) + 2
    widths = (6, 6, 9, 9, 8, 9) if without_gpu else (6, 6, 9, 9, 8, 9, 11, 10)

    def line(name: str, *cells: object) -> str:
        return f"{name:<{width}}" + "".join(f"{cell:>{n}}" for cell, n in zip(cells, widths, strict=False))

    yield line("stage", "done", "of", "running", "stopped", "failed", "hours", "GPU-hours", "expected")
    expected = {stage.name: stage.expected_gpu_hours(estimated.get(stage.name)) for stage in stages}
    for stage in stages:
        ahead = expected[stage.name]
        counts = (stage.done, stage.total, *(len(getattr(stage, state)) for state in NOT_DONE))
        hours = (f"{stage.hours:.2f}", f"{stage.gpu_hours:.2f}", "?" if ahead is None else f"{ahead:.2f}")
        yield line(stage.name, *counts, *hours)
    whole = sum(hours or 0.0 for hours in expected.values())
    sums = tuple(f"{sum(getattr(stage, name) for stage in stages):.2f}" for name in ("hours", "gpu_hours"))
    at_least = ">" if None in expected.values() else ""
    yield line("together", sum(stage.done for stage in stages), "", "", "", "", *sums, f"{at_least}{whole:.2f}")
    for state in NOT_DONE:
        for stage in stages:
            for changed, log in getattr(stage, state):
                yield f"{state}: {log}, last line {max(0, now - changed) / 60:.0f} min ago: {last_line(log)[-160:]}"
