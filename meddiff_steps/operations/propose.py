"""A commented study for a BIDS dataset, for its owner to edit."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from meddiff_steps import __version__
from meddiff_steps.cohort.bids import EXTENSIONS, BidsName, read_columns
from meddiff_steps.config import BidsSource, CategoricalCovariate, ContinuousCovariate, Release, Study, parse_study
from meddiff_steps.config.yaml_files import as_written, parse_yaml
from meddiff_steps.core.errors import UserError
from meddiff_steps.operations.expected import expected, hours
from meddiff_steps.operations.machine import Machine
from meddiff_steps.operations.proposal import (
    Column,
    Division,
    Heads,
    affordable,
    columns,
    division,
    grid,
    heads,
)
from meddiff_steps.operations.survey import read_header, spread
from meddiff_steps.privacy.size import FEW_TRAINING_SUBJECTS
from meddiff_steps.release.licences import spdx

log = logging.getLogger(__name__)

#: Scans of one job of preprocessing, and synthetic subjects that are proposed at most.
SCANS_PER_SHARD, MOST_SUBJECTS = 200, 1000
#: What sides of the grid are divisible by; the networks need half of it.
DIVISOR = 8
#: Trainings are made shorter than the preset by this factor at most; longer only for more training scans than the
#: preset was measured with, and by no more than this factor.
SHORTEST, LONGEST, MEASURED_WITH = 0.25, 4.0, 125


@dataclass(frozen=True)
class Preset:
    """Networks and trainings that worked, and the voxels (mm) that they are for, the finest first."""

    spacings: tuple[float, ...]
    autoencoder: int
    """Steps, as of the two others."""
    autoencoder_batch: int
    diffusion: int
    diffusion_batch: int
    channels: int
    blocks: int
    decoder: int
    decoder_batch: int
    hours: float | None
    """On `cores` at the finest voxels, as measured on brains of 160 x 192 x 160 mm."""
    cores: int = 2


#: The shipped studies of IXI: at 4 mm on two cores (config/README.md), at 2 mm on a GPU.
ON_CORES = Preset((4, 5, 6), 8000, 1, 6000, 4, 96, 4, 16000, 4, 1.0)
ON_GPU = Preset((2, 3, 4), 8000, 8, 20000, 32, 192, 6, 12000, 16, None)


def propose(
    root: Path,
    name: str,
    machine: Machine,
    allowed: float,
    suffix: str | None = None,
    entities: dict[str, Any] | None = None,
    measured: Path | None = None,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> str:
    """The text of a study (YAML), which loads as it is.

    Parameters
    ----------
    root
        Of the BIDS dataset.
    name
        Of the study.
    machine, allowed
        What it will run on, and hours that it may take.
    suffix, entities
        Which images are meant, where the dataset has several.
    measured
        Results of a finished study on such a machine.
    told
        Called with how many scans of how many were looked at.

    Raises
    ------
    UserError
        The dataset cannot be read, holds several kinds of images, or has too few subjects or no covariate.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder. Give the root of a BIDS dataset.")
    table = root / "participants.tsv"
    if not table.is_file():
        raise UserError(
            f"{root}: no participants.tsv here. A study is proposed for a BIDS dataset: images under sub-*/anat/, and"
            " this table with a row per subject and what is to be learnt of it, age or sex, say. For other images:"
            " `meddiff init`, and cohort.source: table (docs/own-cohort.md)."
        )
    suffix = suffix or _suffix(root)
    source = BidsSource.model_validate(
        {"source": "bids", "root": str(root), "suffix": suffix, "entities": entities or {}}
    )
    frame, cells = read_columns(source)
    found = columns(cells, _json(root / "participants.json") | _json(root / "sessions.json"))
    if not any(one.why_not is None for one in found):
        raise UserError(
            f"{table}: no column can be a covariate: {'; '.join(f'{one.column} {one.why_not}' for one in found)}. Add"
            " one, age or sex, say."
        )
    parts = division(frame["subject_id"].tolist(), name)
    found = affordable(found, parts.counts["train"])
    says = _json(root / "dataset_description.json")
    lie = heads(frame["path"].tolist(), told, suffix == "T1w")
    native = [header.spacing for header in map(read_header, spread(frame["path"].tolist(), 20)) if header.spacing]
    edge = float(np.median([max(spacing) for spacing in native])) if native else 1.0
    preset = ON_GPU if machine.gpus else ON_CORES

    def written(spacing: float, factor: float, told_hours: str) -> str:
        return _text(name, source, len(frame), found, parts, lie, spacing, preset, factor, machine, told_hours, says)

    spacings = [spacing for spacing in preset.spacings if spacing >= 0.95 * edge] or [float(round(edge))]
    for spacing in spacings:
        whole = _expected(written(spacing, 1.0, ""), len(frame), machine, preset, measured)
        if whole is None or whole * SHORTEST <= allowed:
            break
    most = min(LONGEST, max(1.0, parts.counts["train"] / MEASURED_WITH))
    factor = most if whole is None else min(most, max(SHORTEST, allowed / whole))
    said = "how long it takes is not known before something was measured on such a GPU (meddiff plan-cost)"
    if whole is not None:
        whole = _expected(written(spacing, factor, ""), len(frame), machine, preset, measured) or 0.0
        said = f"about {whole:.1f} hours on {machine.cores} cores like those here; {allowed:g} were allowed"
        if whole > 1.1 * allowed:
            said += ":\n# these are the shortest trainings, on the coarsest voxels, that are proposed"
    text = written(spacing, factor, said)
    parse_study(parse_yaml(text), "proposal")
    return text


def _expected(text: str, scans: int, machine: Machine, preset: Preset, measured: Path | None) -> float | None:
    """Hours that a proposal takes: by plan-cost where it can tell, else by the preset's own."""
    study: Study = parse_study(parse_yaml(text), "proposal")
    if not machine.gpus or measured is not None:
        found = expected(study, scans, machine.cores, measured)
        if found:
            return hours(found)
    if preset.hours is None:
        return None
    shape = study.preprocess.shape
    size = float(np.prod(shape)) / (40 * 48 * 40)
    steps = study.decoder.optimiser.steps / preset.decoder
    return preset.hours * steps * size * preset.cores / min(machine.cores, 8)


# ------------------------------------------------------------------------------------------------------- text


def _text(
    name: str,
    source: BidsSource,
    scans: int,
    found: Sequence[Column],
    parts: Division,
    lie: Heads,
    spacing: float,
    preset: Preset,
    factor: float,
    machine: Machine,
    said: str,
    says: dict[str, Any],
) -> str:
    shape = grid(lie.extent, spacing, DIVISOR)
    given = says.get("Name")
    called = " ".join(given.split()) if isinstance(given, str) and given.strip() else Path(source.root).resolve().name

    def steps(count: int) -> int:
        return max(500, round(count * factor / 500) * 500)

    kinds = f", entities: {flow(source.entities)}" if source.entities else ""
    lines = [
        f"# Proposed by meddiff {__version__} from {scans} scans. Read it, change what is wrong, then:",
        f"#   meddiff check {name}.yaml",
        f"#   meddiff run {name}.yaml quality      # reads and preprocesses scans, trains nothing",
        f"#   meddiff run {name}.yaml",
        "# Lines marked with <-- are yours to decide. What is left out keeps its default (config/keys.md).",
        f"study: {flow(name)}",
        f"title: {flow(f'{source.suffix} images of {called}')}          # <--",
        f"seed: {flow(parts.seed)}      # root of every random number; published with the cohort",
        "",
        "cohort:",
        "  source: bids",
        f"  root: {flow(source.root)}",
        f"  suffix: {flow(source.suffix)}",
        *([f"  entities: {flow(source.entities)}"] if kinds else []),
        "",
        "# What images are conditioned on, from the tables. Ranges are those of the data and a little more;",
        "# values outside are refused. <-- Which of them matter?",
        "covariates:",
        *[_covariate(one, "  ") for one in found if one.why_not is None],
    ]
    left = [one for one in found if one.why_not is not None]
    if left:
        lines.append("  # Not taken; take one instead of another if it matters more:")
        lines += [_covariate(one, "  # ") if one.covariate else f"  # {one.column}: {one.why_not}" for one in left]
    counts = ", ".join(f"{count} {split}" for split, count in parts.counts.items())
    lines += ["", f"# {sum(parts.counts.values())} subjects come out as {counts}."]
    if parts.counts["train"] < FEW_TRAINING_SUBJECTS:
        lines += [
            f"# {parts.counts['train']} to learn from are few: images may come out nearer to them than to strangers,",
            "# and a gate of the privacy report then lets nothing out. It did so with 32 (docs/own-cohort.md). <--",
        ]
    lines.append(f"splits: {flow(parts.splits.model_dump())}")
    lines += _privacy(parts)
    lines += [
        "",
        f"# {lie.looked_at} scans were looked at; a box of {_by(lie.extent)} mm holds all.",
        *_pose(lie),
        "preprocess:",
        f"  shape: {flow(list(shape))}      # times spacing_mm: {_by([n * spacing for n in shape])} mm",
        f"  spacing_mm: {flow(spacing)}",
        "  center: foreground",
        *(
            ["  foreground: ct", "  window: [0, 80]      # <-- Hounsfield units that become 0 and 1: those of brain"]
            if lie.ct
            else []
        ),
        *(["  brain_extraction: deepbet"] if lie.extract else []),
        *(["  registration: {template: mni152}"] if lie.to_register else []),
        f"  shards: {max(2 if scans > 50 else 1, round(scans / SCANS_PER_SHARD))}      # jobs",
        "",
        f"# Mirrored copies {'are not for' if lie.ct else 'suit brains; not'} images in which left and right differ."
        + (" <--" if lie.ct else ""),
        "variants: {count: 4, flip: true, max_shift_voxels: 1}",
        "",
        f"# For {machine.gpus} GPU(s) and {machine.cores} cores: {said or '...'}.",
        *(
            ()
            if machine.gpus
            else ("# On a cluster without GPUs say cpu, or jobs wait for one.", "compute: {device: auto}", "")
        ),
        "autoencoder:",
        "  latent_channels: 16",
        f"  optimiser: {{steps: {steps(preset.autoencoder)}, batch_size: {preset.autoencoder_batch}, validate_every:"
        " 1000}",
        "",
        "diffusion:",
        f"  channels: [{preset.channels}]",
        f"  num_res_blocks: {preset.blocks}",
        f"  optimiser: {{steps: {steps(preset.diffusion)}, batch_size: {preset.diffusion_batch}, validate_every:"
        " 1000}",
        "",
        "decoder:",
        f"  optimiser: {{steps: {steps(preset.decoder)}, batch_size: {preset.decoder_batch}, validate_every: 2000}}",
        "",
        "plan:                               # <-- who is to be made",
        f"  - {{name: syn, subjects: {min(MOST_SUBJECTS, scans)}}}",
        "",
        "generate: {sampler: dpmpp, guidance_scale: 1.5}",
        "",
        "release:",
        f"  name: {flow(f'Synthetic {source.suffix} images learnt from {called}')}     # <--",
        "  authors: []                       # <-- names of its publishers",
        _licence(says),
        *_released(source.suffix),
        *([] if lie.brains else ["  skull_stripped: false"]),
        _acknowledgements(says),
        "",
    ]
    return "\n".join(lines)


def _by(numbers: Sequence[float]) -> str:
    return " x ".join(f"{number:.4g}" for number in numbers)


def _released(suffix: str) -> list[str]:
    """`release.suffix`: that of the images, or one to be chosen where a release cannot have it."""
    try:
        Release.model_validate({"suffix": suffix})
    except ValidationError:
        return [f"  suffix: T1w      # <-- choose one (config/keys.md): a release cannot have {suffix}"]
    return [] if suffix == "T1w" else [f"  suffix: {suffix}"]


def _covariate(one: Column, indent: str) -> str:
    covariate = one.covariate
    said: dict[str, Any] = {}
    if isinstance(covariate, ContinuousCovariate):
        said = {"unit": covariate.unit, "range": list(covariate.range)}
    elif isinstance(covariate, CategoricalCovariate):
        said = {"levels": covariate.levels}
    if covariate is not None and covariate.column:
        said["column"] = covariate.column
    if covariate is not None and covariate.description:
        said["description"] = covariate.description
    notes = [note for note in (one.why_not, f"<-- {one.unsure}" if one.unsure else None) if note]
    return f"{indent}{one.name}: {flow(said)}" + (f"      # {'; '.join(notes)}" if notes else "")


def _privacy(parts: Division) -> list[str]:
    count = parts.counts["calibration"]
    if parts.level is None:
        return [
            f"# {count} calibration subjects are too few for any threshold: the filter rejects nothing, and the",
            "# release says so. Do not publish images of real people that were made like this.",
            "privacy: {enforce: report}",
        ]
    if parts.level == 0.05:
        return [f"# With {count} calibration subjects the filter has a threshold at {parts.level:.0%}, the default."]
    return [
        f"# {count} calibration subjects are few: the filter has a threshold from {parts.level:.0%} on, where it takes",
        "# so many strangers for copies, and draws those images anew. It is the stricter for it, and the less exact;",
        "# with more subjects lower the level to 5% (docs/own-cohort.md).",
        f"privacy: {{level: {parts.level:g}}}",
    ]


def _pose(lie: Heads) -> list[str]:
    if lie.ct:
        return [
            "# They are CT in Hounsfield units (air near -1000). What is denser than air counts, a head rest, too, and",
            "# heads are learnt as they lie, with their faces: is that meant? If not, give masks as",
            "# preprocess.brain_mask (docs/preprocessing.md). <--",
        ]
    lay = f"turned by {lie.turned:.0f} degrees in the median, scattered by {lie.scattered:.0f} mm"
    if lie.skulls and not lie.extract:
        return [
            f"# {lie.skulls} of them show a head with its skull. Brains were not taken out: that is for T1w scans,",
            "# and needs pip install 'meddiff-steps[brain-extraction]' (then remove this file and propose again), or",
            "# masks of another tool as preprocess.brain_mask. As it is, heads are learnt as they lie, and",
            "# faces with them: is that meant? <--",
        ]
    extracted = [f"# {lie.skulls} of them show a head with its skull: deepbet, made for adults, takes the brain out."]
    taken = extracted if lie.extract else []
    if not lie.brains:
        return [
            *taken,
            f"# They do not look like brains without skull (correlation with one after registration:"
            f" {lie.correlation:.2f}).",
            "# If they are heads, give masks as preprocess.brain_mask (docs/own-cohort.md). <--",
        ]
    if lie.registered:
        return [
            *taken,
            f"# They look like brains (correlation with a template {lie.correlation:.2f}) in one pose already, so they",
            f"# are not registered again ({lay}).",
        ]
    return [
        *taken,
        f"# They look like brains (correlation with a template {lie.correlation:.2f}) at different places and angles,",
        f"# so they are brought into one pose ({lay}).",
    ]


def _licence(says: dict[str, Any]) -> str:
    given = says.get("License")
    if isinstance(given, str) and given.strip():
        line = f"  licence: {flow(' '.join(given.split()))}      # <-- that of the source; what do its terms allow?"
        return line if spdx(given.strip()) else f"{line}\n  # licence_text:                   # <-- its full text"
    return "  licence: CC0                      # <-- what the terms of the source data allow; they do not say"


def _acknowledgements(says: dict[str, Any]) -> str:
    given = [says.get(key) for key in ("Acknowledgements", "HowToAcknowledge")]
    texts = [" ".join(text.split()) for text in given if isinstance(text, str) and text.strip()]
    if texts:
        return f"  acknowledgements: {flow(' '.join(texts))}"
    return "  # acknowledgements: what the source data ask for"


def flow(value: Any) -> str:
    """A value on one line of YAML, read back as it is.

    >>> flow({"levels": ["F", "no", "1"], "range": [0.5, 90.0], "column": "a: b"})
    '{levels: [F, no, "1"], range: [0.5, 90], column: "a: b"}'
    """
    if isinstance(value, dict):
        return "{" + ", ".join(f"{flow(key)}: {flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(flow, value)) + "]"
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z/][\w ./()+-]*", value, re.ASCII) and value == value.strip()
        return value if plain and as_written(value) == value else json.dumps(value, ensure_ascii=False)
    if isinstance(value, float):
        return repr(int(value)) if value.is_integer() else repr(value)
    return json.dumps(value)


# ----------------------------------------------------------------------------------------------------- reading


def _suffix(root: Path) -> str:
    """The suffix of the images that most of the first subjects have under anat/; T1w where they have it."""
    found: set[str] = set()
    for subject in sorted(root.glob("sub-*"))[:20]:
        for file in [*subject.glob("anat/*"), *subject.glob("ses-*/anat/*")]:
            name = BidsName.parse(file.name)
            if name is not None:
                found.add(name.suffix)
    if not found or "T1w" in found:
        return "T1w"
    if len(found) > 1:
        raise UserError(
            f"{root}: images of several kinds under anat/: {', '.join(sorted(found))} ({' or '.join(EXTENSIONS)}). Say"
            " which with --suffix."
        )
    return found.pop()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        log.warning("%s: not readable (%s); units and descriptions are left out", path, error)
        return {}
    return content if isinstance(content, dict) else {}
