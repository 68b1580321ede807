"""The simulated cohort as a BIDS dataset: images, what is true of them, the table of subjects."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from tqdm import tqdm

from meddiff_steps.config import SimulatedSource
from meddiff_steps.config.cohort import SIMULATED_LEVELS
from meddiff_steps.core.errors import UserError
from meddiff_steps.core.files import atomic_path, write_atomic
from meddiff_steps.core.pool import in_order
from meddiff_steps.simulation.brains import (
    TISSUES,
    Lattice,
    Subject,
    Template,
    load_template,
    make_lattice,
    simulate_subject,
)

log = logging.getLogger(__name__)

#: Folder of what is known of the simulated scans because they are simulated: label maps, masks of lesions.
TRUTH = Path("derivatives", "truth")
SIMULATED = "SIMULATED brain (MNI152 template, randomly deformed); no person"
DESCRIPTION = "dataset_description.json"
DATASET_NAME = "SIMULATED brain cohort (meddiff_steps)"

README = """\
SIMULATED brain cohort
======================

Every image here is SIMULATED. No image shows a person, and nothing about people, ageing or disease can be learnt from
it. It exists to try and test software.

Each image is the MNI ICBM152 2009a template (T1-weighted, grey and white matter maps, as they ship with nilearn),
deformed at random, with ventricles and sulci that follow a made-up age, sex and diagnosis, and with a contrast, bias
field and noise of its own. Images are brain-extracted: 0 outside the brain.

participants.tsv holds the made-up covariates, and the volumes that were measured in each subject's own tissue maps.
derivatives/truth, where it is there, holds the tissue of every voxel (dseg) and where lesions are (mask).

The template carries this notice:

Copyright (C) 1993-2009 Louis Collins, McConnell Brain Imaging Centre, Montreal Neurological Institute, McGill
University. Permission to use, copy, modify, and distribute this software and its documentation for any purpose and
without fee is hereby granted, provided that the above copyright notice appear in all copies. The authors and McGill
University make no representations about the suitability of this software for any purpose. It is provided "as is"
without express or implied warranty. The authors are not responsible for any data loss, equipment damage, property loss,
or injury to subjects or patients resulting from the use or misuse of this package.
"""


def participant_id(index: int) -> str:
    """Return `sub-0001` for index 0; longer only beyond 9,999, so that no id depends on the number of subjects."""
    return f"sub-{index + 1:04d}"


def simulate_cohort(source: SimulatedSource, seed: str, root: Path, threads: int = 1) -> Path:
    """Write a simulated cohort as a BIDS dataset; `participants.tsv` comes last, so the dataset is complete when it is
    there.

    Parameters
    ----------
    source
        Number of subjects, grid, share of cases and of missing ages, further contrasts, labels, share with a lesion.
    seed
        Any text. A subject depends on it and on its own number alone, not on how many subjects are made.
    root
        Directory of the dataset. A simulated dataset that is already there is replaced.
    threads
        Subjects made at the same time; the files are the same for any number.

    Returns
    -------
    Path
        `root/participants.tsv`: participant_id, age (year), sex (F, M), diagnosis (control, case), brain_ml and
        ventricles_ml (mL, measured), with lesions lesion_ml; `n/a` where missing. Images are
        `sub-*/anat/sub-*_T1w.nii.gz` (and `_T2w`, `_FLAIR`), uint8, RAS, 0 outside the brain; label maps
        `derivatives/truth/sub-*/anat/sub-*_dseg.nii.gz`, masks of lesions `sub-*_label-lesion_mask.nii.gz` there.

    Raises
    ------
    UserError
        The grid is too small for a head, or `root` holds subjects that are not simulated.
    """
    lattice = make_lattice(source.shape, source.spacing_mm)
    root = Path(root)
    _clear(root)
    for name, content in _descriptions(source).items():
        write_atomic(root / name, content.encode())
    lesions = source.lesion_share > 0
    rows = ["participant_id\tage\tsex\tdiagnosis\tbrain_ml\tventricles_ml" + "\tlesion_ml" * lesions]
    edge = 0
    with one_torch_thread():
        make = partial(
            _make_subject, source=source, seed=seed, root=root, lattice=lattice, template=load_template(lattice.blur_mm)
        )
        for name, subject in tqdm(
            in_order(make, range(source.subjects), max(1, threads)),
            "simulate",
            source.subjects,
            mininterval=5,
            file=sys.stderr,
        ):
            traits = subject.traits
            age = "n/a" if traits.age_missing else f"{traits.age:.1f}"
            volumes = [subject.brain_ml, subject.ventricles_ml, *[subject.lesion_ml] * lesions]
            rows.append("\t".join([name, age, traits.sex, traits.diagnosis, *(f"{ml:.2f}" for ml in volumes)]))
            edge += subject.at_edge
    log.info("%d simulated subjects in %s; the brain reaches the edge of the image in %d", source.subjects, root, edge)
    table = root / "participants.tsv"
    write_atomic(table, ("\n".join(rows) + "\n").encode())
    return table


def _make_subject(
    index: int, source: SimulatedSource, seed: str, root: Path, lattice: Lattice, template: Template
) -> tuple[str, Subject]:
    """Make a subject and write its files."""
    name = participant_id(index)
    subject = simulate_subject(source, seed, index, lattice, template)
    files = {Path(name, "anat", f"{name}_{contrast}.nii.gz"): image for contrast, image in subject.images.items()}
    truth = TRUTH / name / "anat"
    if source.labels:
        files[truth / f"{name}_dseg.nii.gz"] = subject.tissue
    if source.lesion_share:
        files[truth / f"{name}_label-lesion_mask.nii.gz"] = subject.lesion.astype(np.uint8)
    for path, values in files.items():
        _write_image(values, lattice.affine, root / path)
    return name, subject


def _write_image(image: np.ndarray, affine: np.ndarray, path: Path) -> None:
    nifti = nib.Nifti1Image(image, affine)
    nifti.header.set_xyzt_units("mm")
    nifti.header["descrip"] = SIMULATED
    nifti.set_qform(affine, "scanner")
    nifti.set_sform(affine, "scanner")
    with atomic_path(path) as temporary:
        nib.save(nifti, temporary)


def _clear(root: Path) -> None:
    """Remove an earlier simulated dataset: subjects it has beyond the new number would otherwise stay."""
    subjects = sorted(root.glob("sub-*"))
    if subjects:
        try:
            ours = json.loads((root / DESCRIPTION).read_text(encoding="utf-8")).get("Name") == DATASET_NAME
        except (OSError, ValueError, AttributeError):
            ours = False
        if not ours:
            raise UserError(
                f"{root}: holds {subjects[0].name} but its {DESCRIPTION} does not say {DATASET_NAME!r}, so"
                " these may be real data. Choose another output directory, or remove the subjects yourself."
            )
        # All that is written again, of subjects that are ours
        if (root / TRUTH).exists():
            shutil.rmtree(root / TRUTH)
        for document in root.glob("*.json"):
            if document.name != DESCRIPTION:  # without which nobody would know whose the rest is
                document.unlink()
    (root / "participants.tsv").unlink(missing_ok=True)
    for subject in subjects:
        shutil.rmtree(subject)


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Work in torch on one thread, as where subjects run side by side."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _descriptions(source: SimulatedSource) -> dict[str, str]:
    """Return the dataset's documents by file name."""
    description = {
        "Name": DATASET_NAME,
        "BIDSVersion": "1.10.0",
        "DatasetType": "raw",
        "License": "MNI ICBM152 template licence, see README",
        "Authors": ["meddiff_steps simulator"],
        "GeneratedBy": [{"Name": "meddiff_steps simulate", "Description": SIMULATED}],
        "ReferencesAndLinks": [
            "Fonov V, et al. Unbiased average age-appropriate atlases for pediatric studies. NeuroImage"
            " 2011;54:313-327."
        ],
    }
    participants = {
        "participant_id": {"Description": "SIMULATED subject; no such person exists"},
        "age": {"Description": "Simulated age", "Units": "year"},
        "sex": {"Description": "Simulated sex", "Levels": SIMULATED_LEVELS["sex"]},
        "diagnosis": {
            "Description": "Simulated diagnosis, a disease that acts like faster ageing",
            "Levels": SIMULATED_LEVELS["diagnosis"],
        },
        "brain_ml": {"Description": "Grey and white matter, integrated over the subject's tissue maps", "Units": "mL"},
        "ventricles_ml": {
            "Description": "Lateral and third ventricles, integrated over the subject's tissue maps",
            "Units": "mL",
        },
    }
    if source.lesion_share:
        participants["lesion_ml"] = {"Description": "Lesion, integrated over the subject's tissue maps", "Units": "mL"}
    sidecar = {"Description": SIMULATED, "Modality": "MR", "Simulated": True, "SkullStripped": True}
    documents = {DESCRIPTION: description, "participants.json": participants}
    documents |= {f"{contrast}.json": sidecar for contrast in ("T1w", *source.contrasts)}
    texts = {"README": README}
    if source.labels or source.lesion_share:
        documents[str(TRUTH / DESCRIPTION)] = description | {"DatasetType": "derivative"}
    if source.labels:
        texts[str(TRUTH / "dseg.tsv")] = "index\tname\n" + "".join(f"{i}\t{name}\n" for i, name in TISSUES.items())
    return {name: json.dumps(content, indent=1, sort_keys=True) + "\n" for name, content in documents.items()} | texts
