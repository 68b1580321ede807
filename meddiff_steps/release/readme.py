"""README.md of a release: what it is, in five lines how good it is, how to load, cite and check it; then its card.

Code in it is run by a test on a release, as it stands there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from meddiff_steps import __version__
from meddiff_steps.config import CategoricalCovariate
from meddiff_steps.imaging.encoding import PICTURE_SCALE, SYNTHETIC, VOLUME_SCALE
from meddiff_steps.privacy.verdict import shown_name
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.ledger import MEASURED
from meddiff_steps.release import card
from meddiff_steps.release.citation import NOBODY
from meddiff_steps.release.layout import image_path
from meddiff_steps.release.story import VERSION, Part, Story, origin, privacy

BIDS_VERSION = "1.10.0"
_CAUTION = """Do not mix these images with scans of people without keeping the mark, and draw no diagnosis from them.
Every image says in its own file that it is synthetic; converting to another format can lose that."""
_READ = 'pd.read_csv("participants.tsv", sep="\\t", na_values="n/a", keep_default_na=False)'


def readme(
    subjects: int,
    story: Story,
    part: Part | None,
    datasets: Sequence[str],
    measured: Sequence[str],
    labels: bool,
) -> str:
    """The text, Markdown.

    Parameters
    ----------
    subjects
        Released subjects that lie here.
    story
        What there is to tell.
    part
        Of which release this is a part; None: of none.
    datasets
        Folders of the parts of this release.
    measured
        Columns of measured covariates.
    labels
        Whether there are label maps.
    """
    many = (
        f"{subjects} synthetic subjects, of a cohort of {part.total}; figures below are of the cohort"
        if part
        else f"{subjects} synthetic subjects"
    )
    title = f"Study {story.study}: {story.title}" if story.title else f"Study {story.study}"
    shown = f"{datasets[0]}/{verify.PREVIEW}" if datasets else verify.PREVIEW
    picture = [f"![The first synthetic subjects, by number]({shown})"] if subjects else []
    parts = [
        f"# {story.config.name}{f', {part.folder}' if part else ''}",
        *picture,
        f"{SYNTHETIC}\n{many}. {title}.",
        "## In five lines\n" + "\n".join(f"- {line}" for line in _five_lines(story)),
        f"## What is here\n{_layout(story, datasets)}\n\n{_files(datasets, labels)}",
        f"## Load it\n{_loading(story, datasets, measured, labels)}",
        f"## Covariates\n{_covariates(story, measured)}",
        "## Suggested split\nColumn `split`: of ten subjects of a group with the same levels, eight are `train`, one is"
        " `val` and one is `test`, drawn by the\nstudy's seed; images of one subject are in one split. It is for work"
        " within this dataset: how well anything works on people, only scans of\npeople can tell.",
        f"## Where they come from\n{origin(story)}\nSampling: {story.sampler}. Software: meddiff_steps {__version__}.",
        *([f"## Model\n{card.model(story.models, story.distilled)}"] if story.models else []),
        f"## Quality\n{(card.quality(story.metrics, story.source) if story.metrics else '') or 'Not measured.'}",
        "\n\n".join(filter(None, [f"## Privacy\n{privacy(story)}", card.privacy(story.privacy or {})])),
        f"## Please note\n{_CAUTION}",
        f"## From the publisher\n{card.blanks(story.config.card)}",
        f"## How to check it\n{card.CHECK_PART if part else card.CHECK}",
        f"## How to cite it\n{_citation(story)}",
        f"## Licence\n{story.config.licence}; LICENSE has the full text.",
    ]
    if story.config.acknowledgements:
        parts.append(f"## Acknowledgements\n{story.config.acknowledgements}")
    return "\n\n".join(parts) + "\n"


# ------------------------------------------------------------------------------------------------ five lines


def _five_lines(story: Story) -> Iterator[str]:
    """Privacy, realism, fidelity, usefulness, limits: of each the figure that is least in favour of the images."""
    metrics = story.metrics or {}
    yield f"**Privacy**: {_about_privacy(story.privacy)}"
    yield f"**Realism**: {_about_realism(metrics, story.source)}"
    yield f"**Fidelity**: {_about_fidelity(metrics, story.source)}"
    yield (
        "**Usefulness**: not told by these figures. Whether images of this kind help a task is found on real scans that"
        " neither model nor task learnt from."
    )
    yield f"**Limits**: {_about_limits(story, metrics)}"


def _about_privacy(report: Mapping[str, Any] | None) -> str:
    if report is None:
        return "not tested."
    gates = report.get("gates", [])
    bad = [shown_name(gate["name"]) for gate in gates if gate["outcome"] != "PASS"]
    passed = f", {len(gates) - len(bad)} of {len(gates)} tests passed" if gates else ""
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    others = f" (not: {'; '.join(bad[:3])}{more})" if bad else ""
    return f"{report['verdict']}{passed}{others}. That is the outcome of stated tests, not a proof of anonymity."


def _about_realism(metrics: Mapping[str, Any], source: str) -> str:
    spaces = {
        name: found["classifier_auc"] for name, found in metrics.get("realism", {}).items() if "classifier_auc" in found
    }
    known = {name: figure for name, figure in spaces.items() if figure.get("value") is not None}
    if not known:
        return "not measured."
    name = max(sorted(known), key=lambda one: known[one]["value"])
    return (
        f"a classifier tells synthetic from {source} images with AUC {card.figure(known[name])}, where it finds that"
        f" easiest ({name} features); {source} from other {source} ones"
        f" {card.figure(known[name].get('floor'))}. 0.5 would be not at all."
    )


def _about_fidelity(metrics: Mapping[str, Any], source: str) -> str:
    shares = {}
    for name, found in metrics.get("covariates", {}).items():
        key = "auc" if found["kind"] == "categorical" else "r"
        figure, ceiling = found.get(key) or {}, (found.get(key) or {}).get("ceiling") or {}
        if figure.get("value") is not None and ceiling.get("value"):
            shares[name] = figure["value"] / ceiling["value"], key, figure, ceiling
    if not shares:
        return "not measured."
    name = min(sorted(shares), key=lambda one: shares[one][0])
    _, key, figure, ceiling = shares[name]
    words = "AUC of reading it" if key == "auc" else "r of asked for and measured"
    return (
        f"of {len(shares)} covariates {name} is shown least as it was asked for: {words} {card.figure(figure)}, where"
        f" held-out {source} scans give {card.figure(ceiling)}."
    )


def _about_limits(story: Story, metrics: Mapping[str, Any]) -> str:
    fine = metrics.get("spectrum", {}).get("synthetic", {}).get("above_half") or {}
    told = [story.config.card.limitations.strip()]
    if fine.get("value") is not None:
        told.append(f"The finest detail has {card.figure(fine)} of the power that it has in {story.source} images.")
    part = f"the training part of a cohort of {story.card['subjects']} subjects"
    told.append(f"The model knows what {part} shows, and nothing beyond it.")
    return " ".join(filter(None, told))


# ---------------------------------------------------------------------------------------------- what is here


def _layout(story: Story, datasets: Sequence[str]) -> str:
    size = " x ".join(map(str, story.grid.shape))
    if story.grid.spacing_mm is None:
        layout = (
            f"images/ID.png: grey pictures of {size} pixels (rows x columns), 0 to {PICTURE_SCALE}. participants.tsv"
            " names the picture of each subject."
        )
    else:
        path = image_path("ID", 3, story.config.suffix)
        spacing = story.grid.spacing_mm
        edges = " x ".join(f"{mm:g}" for mm in ([spacing] if isinstance(spacing, float | int) else spacing))
        layout = (
            f"{path}: volumes of {size} voxels of {edges} mm, axes left-right, posterior-anterior,"
            f" inferior-superior,\norigin in the middle of the grid, int16 from 0 to {VOLUME_SCALE} in arbitrary units."
            f" The layout is BIDS {BIDS_VERSION}, type derivative."
        )
    if not datasets:
        return layout
    return (
        f"{len(datasets)} datasets of at most {story.config.shard_size} subjects, each complete by itself:"
        f" shard-GROUP-NUMBER/. In each, {layout}\nA subject's dataset follows from its group and number alone."
        " provenance/ledger.parquet is the table of all."
    )


def _files(datasets: Sequence[str], labels: bool) -> str:
    rows = [
        ("participants.tsv, participants.json", "covariates asked for and measured, suggested split; what they mean"),
        *(
            [(f"sub-ID_{verify.LABELS}.nii.gz, {verify.LABELS}.tsv", "label map of each image; what its labels are")]
            if labels
            else []
        ),
        ("croissant.json, ro-crate-metadata.json", "the same for other programs"),
        ("CITATION.cff, LICENSE", "how to cite it; the licence in full"),
        ("provenance/", "how each image was made, and what seals all of this"),
    ]
    inside = " (in each dataset)" if datasets else ""
    lines = [f"| {name} | {what}{inside if place < len(rows) - 3 else ''} |" for place, (name, what) in enumerate(rows)]
    return "\n".join(["| file | for |", "|---|---|", *lines])


def _covariates(story: Story, measured: Sequence[str]) -> str:
    lines = []
    for name, covariate in story.covariates.items():
        meaning = (
            f"one of {', '.join(covariate.levels)}"
            if isinstance(covariate, CategoricalCovariate)
            else f"in {covariate.unit}"
        )
        lines.append(f"- {name}: {meaning}{'. ' + covariate.description if covariate.description else ''}")
    text = (
        "A column with a covariate's own name holds the value that the model was asked for; n/a means left open.\n"
        + "\n".join(lines)
    )
    if not measured:
        return f"{text}\n\nNothing was measured in the images."
    return (
        f"{text}\n\nBeside them is what was measured in each image: {', '.join(measured)}. `_measured` is read by"
        f" predictors that learnt from {story.source} scans\nand err on {story.source} scans, too (Quality, last"
        " column);"
        " `_segmented` is the volume of the label map. Use these where it matters what an image shows."
    )


# -------------------------------------------------------------------------------------------------- loading


def _loading(story: Story, datasets: Sequence[str], measured: Sequence[str], labels: bool) -> str:
    """Code for pandas, nilearn and MONAI, which runs in the folder of the dataset."""
    if datasets:
        code = """import pandas as pd
from pathlib import Path

tables = []
for folder in sorted(Path(".").glob("shard-*")):
    table = pd.read_csv(folder / "participants.tsv", sep="\\t", na_values="n/a", keep_default_na=False)
    tables.append(table.assign(folder=str(folder)))
subjects = pd.concat(tables, ignore_index=True)
print(subjects.groupby(["folder", "split"]).size())"""
        return f"{_block('pandas, all datasets', code)}\n\nREADME.md of each dataset has code for nilearn and MONAI."
    columns = [name for name in story.covariates if name + MEASURED in measured]
    compared = [column for name in columns[:1] for column in (name, name + MEASURED)]
    pandas = f"""import pandas as pd

subjects = {_READ}
print(subjects["split"].value_counts())"""
    if compared:
        pandas += f"\nprint(subjects[{json.dumps(compared)}].head())"
    volumes = story.grid.spacing_mm is not None
    path = f"{{one}}/anat/{{one}}_{story.config.suffix}.nii.gz"
    nilearn = f"""import pandas as pd
from nilearn.image import mean_img

subjects = {_READ}
mean = mean_img([f"{path}" for one in subjects["participant_id"][:10]], copy_header=True)
print(mean.shape, mean.affine)"""
    keys = ["image", "label"] if labels else ["image"]
    listed = json.dumps(keys)
    named = {"image": f'f"{path}"' if volumes else "one"}
    if labels:
        named["label"] = f'f"{{one}}/anat/{{one}}_{verify.LABELS}.nii.gz"'
    top, column = (VOLUME_SCALE, "participant_id") if volumes else (PICTURE_SCALE, "image")
    inside = ", ".join(f'"{key}": {value}' for key, value in named.items())
    monai = f"""import pandas as pd
from monai.data import DataLoader, Dataset
from monai.transforms import Compose, EnsureChannelFirstd, LoadImaged, ScaleIntensityRanged

subjects = {_READ}
train = subjects[subjects["split"] == "train"]
files = [{{{inside}}} for one in train["{column}"]]
steps = [LoadImaged({listed}), EnsureChannelFirstd({listed}), ScaleIntensityRanged("image", 0, {top}, 0, 1)]
loader = DataLoader(Dataset(files, Compose(steps)), batch_size=4, shuffle=True)
batch = next(iter(loader))
print({", ".join(f'batch["{key}"].shape' for key in keys)})"""
    blocks = [_block("pandas", pandas), *([_block("nilearn", nilearn)] if volumes else []), _block("MONAI", monai)]
    return "\n\n".join(blocks)


def _block(title: str, code: str) -> str:
    return f"{title}:\n\n```python\n{code}\n```"


def _citation(story: Story) -> str:
    authors = ", ".join(story.config.authors) or NOBODY
    year = f" ({story.config.date[:4]})" if story.config.date else ""
    where = f" {story.config.url}" if story.config.url else ""
    return (
        f"{authors}{year}: {story.config.name}. Synthetic dataset, version {VERSION}.{where}\nCITATION.cff says the"
        " same for programs."
    )
