"""A BIDS derivative dataset of images that were made from somebody's scans, on the scans' own grids."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
from PIL import Image as PilImage

from meddiff_steps import __version__
from meddiff_steps.core.files import atomic_path, write_atomic, write_json

#: BIDS version whose rules for derivatives are followed.
BIDS_VERSION = "1.10.0"
#: What every header and sidecar says.
EDITED = "EDITED: made by a generative model from a real person's scan"
#: The id of a BIDS scan: entities, and a suffix where it has one.
BIDS_ID = "sub-[a-zA-Z0-9]+(_[a-zA-Z]+-[a-zA-Z0-9]+)*(_[a-zA-Z0-9]+)?"


@dataclass(frozen=True)
class Source:
    """The scan that images are made from.

    Attributes
    ----------
    scan_id
        Of the manifest; of a BIDS scan its name without suffixes.
    path
        Of the file.
    suffix
        BIDS suffix of a scan whose id and file have none.
    """

    scan_id: str
    path: str
    suffix: str = "T1w"

    def name(self, description: str, extension: str, shows: str | None = None) -> PurePosixPath:
        """Place of a derived image: that of a BIDS scan with `desc-...`; of any other scan a name made of its id, with
        a short hash of it where that has more than letters and digits.

        `shows` is the BIDS suffix where the image shows something else than the scan does, such as `mask`.
        """
        entities = re.findall(r"(?:^|_)([a-zA-Z]+)-([a-zA-Z0-9]+)", self.scan_id)
        suffix = self.scan_id.rpartition("_")[2]
        if not re.fullmatch(BIDS_ID, self.scan_id):
            entities, suffix = [("sub", _plain(self.scan_id))], self.suffix
        elif "-" in suffix:
            own = re.search(r"_([a-zA-Z0-9]+)\.[^/]+$", self.in_dataset() or "")
            suffix = own[1] if own else self.suffix
        entities = [entity for entity in entities if entity[0] != "desc"] + [("desc", description)]
        folders = [f"{key}-{value}" for key, value in entities if key in ("sub", "ses")]
        name = "_".join([f"{key}-{value}" for key, value in entities] + [shows or suffix])
        return PurePosixPath(*folders, "anat", f"{name}{extension}")

    def in_dataset(self) -> str | None:
        """Path of a BIDS scan below the root of its dataset; None of any other scan."""
        found = re.search(r"(?:^|/)((sub-[^/]+)/(?:.*/)?\2_[^/]+)$", self.path)
        return found[1] if found else None


def _plain(text: str) -> str:
    """Letters and digits of a text; where it has anything else, and a short hash of it, so that no two are alike."""
    plain = re.sub("[^a-zA-Z0-9]", "", text)
    return plain if plain == text else plain + hashlib.sha256(text.encode()).hexdigest()[:6]


def label(covariate: str, value: Any) -> str:
    """A BIDS label of a requested value, letters and digits only; a level that has others ends in a hash of it.

    >>> label("ventricles_ml", 60.5), label("sex", "F"), label("change", -2), label("grade", "<5")
    ('ventriclesml60p5', 'sexF', 'changeminus2', 'grade549498f')
    """
    name = re.sub("[^a-zA-Z0-9]", "", covariate)
    if isinstance(value, (int, float)):
        return name + re.sub("[^a-zA-Z0-9]", "", f"{value:g}".replace("-", "minus").replace(".", "p"))
    return name + _plain(str(value))


def write_image(
    root: Path,
    source: Source,
    description: str,
    array: np.ndarray,
    affine: np.ndarray | None,
    facts: Mapping[str, Any],
    span: tuple[float, float] = (0.0, 255.0),
    shows: str | None = None,
) -> str:
    """Write an image and its sidecar; returns its path below `root`.

    Parameters
    ----------
    array
        On the scan's own grid and in its grey values: float32 (x, y, z), or (rows, columns).
    affine
        Of a volume.
    facts
        For the sidecar.
    span
        Values that 0 and 255 of a picture stand for, or more where the array has more.
    shows
        As of `Source.name`.
    """
    place = source.name(description, ".nii.gz" if affine is not None else ".png", shows)
    path = root / place
    if affine is not None:
        volume = nib.Nifti1Image(array.astype(np.float32), affine)
        volume.header["descrip"] = EDITED.encode()[:79]
        volume.header.set_xyzt_units("mm", "sec")
        with atomic_path(path) as temporary:
            nib.save(volume, temporary)
    else:
        low, high = min(span[0], float(array.min())), max(span[1], float(array.max()))
        pixels = np.rint((array - low) / (high - low) * 255).astype(np.uint8)
        with atomic_path(path) as temporary:
            PilImage.fromarray(pixels).save(temporary, format="PNG")
        facts = {**facts, "GreyValueOf0": low, "GreyValueOf255": high}
    sidecar = {"Description": EDITED, "Sources": [f"bids:raw:{source.in_dataset() or source.scan_id}"], **facts}
    write_json(root / place.with_name(place.name.split(".")[0] + ".json"), sidecar)
    return str(place)


def complete(root: Path, name: str, readme: str, model: Mapping[str, str], step: str = "counterfactual") -> None:
    """Write README, what validators shall pass over, and, last, dataset_description.json.

    Parameters
    ----------
    model
        SHA-256 of the weights by stage.
    step
        That made it.
    """
    write_atomic(root / "README.md", readme.encode())
    others = {path.name for path in root.iterdir() if path.is_file()} - {"README.md", "dataset_description.json"}
    write_atomic(root / ".bidsignore", "".join(f"/{name}\n" for name in sorted(others - {".bidsignore"})).encode())
    description = {
        "Name": name,
        "BIDSVersion": BIDS_VERSION,
        "DatasetType": "derivative",
        "GeneratedBy": [
            {
                "Name": "meddiff_steps",
                "Version": __version__,
                "Description": step,
                "Container": {"Tag": json.dumps(dict(model), sort_keys=True)},
            }
        ],
    }
    write_json(root / "dataset_description.json", description)
