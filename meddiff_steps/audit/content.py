"""L5 of an audit: every image is decoded; it says that it is synthetic, and is what the ledger says it shows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from meddiff_steps import config
from meddiff_steps.audit.progress import progress
from meddiff_steps.core.pool import in_order
from meddiff_steps.imaging import encoding
from meddiff_steps.provenance import verify
from meddiff_steps.provenance.ledger import Row
from meddiff_steps.provenance.verify import Check, judged
from meddiff_steps.release import preview
from meddiff_steps.release.layout import Layout
from meddiff_steps.release.measuring import volumes
from meddiff_steps.release.sealed import Sealed

#: What each check says if nothing is wrong, and after the number of wrong things.
SAID = {
    "decodes": ("{count} images can be decoded", "image(s) cannot be decoded"),
    "format": ("shape, type and range are the study's", "problem(s) with shape, type, range or place"),
    "voxels": ("what the images show is what the ledger holds", "image(s) show something else than the ledger says"),
    "bytes": (
        "no image holds anything else: headers are as they are written",
        "thing(s) in images that no image is written with",
    ),
    "marks": ("every image and the dataset say that they are synthetic", "mark(s) are missing or wrong"),
    "packing": ("every image is packed as this machine packs it", "image(s) hide something in their packing"),
    "labels": ("label maps and their volumes are what the ledger holds", "problem(s) with label maps"),
    "previews": ("the pictures in README show the images that they should", "picture(s) show something else"),
    "twins": ("no two subjects show the same", "pair(s) of subjects show the same"),
}


def check_content(release: Sealed, threads: int = 1) -> list[Check]:
    """Every image is decoded, `threads` at a time; it says that it is synthetic, and is what the ledger says it
    shows.
    """
    study, count = release.study, release.root["ledger"]["released"]
    assert study is not None
    images = _Images(release.folder, study)
    looked_at = in_order(lambda row: (row, *images.look(row)), release.released(), threads)
    for row, problems, packed in progress(looked_at, count, "content"):
        images.add(row, problems, packed)
    images.wrong["marks"] += _dataset_marks(release.folder, study, images.folders or {""})
    if verify.OLD_README not in release.root["files"]:
        images.wrong["previews"] += images.preview_problems()
    left_out = {"labels": not images.labelled, "previews": verify.OLD_README in release.root["files"]}
    checks = [
        judged(5, name, images.wrong[name], good.format(count=count), bad)
        for name, (good, bad) in SAID.items()
        if images.wrong[name] or not left_out.get(name)
    ]
    return [images.packing() or check if check.name == "packing" else check for check in checks]


class _Images:
    """Released images: what is wrong with them, and the folders of their datasets."""

    def __init__(self, release: Path, study: config.Study) -> None:
        self.release, self.study = release, study
        self.layout = Layout.of(study.spatial_dims, study.plan, study.release)
        self.grid = encoding.Grid(tuple(study.preprocess.shape), study.preprocess.spacing_mm)
        self.wrong: dict[str, list[str]] = {name: [] for name in SAID}
        self.folders: set[str] = set()
        self.labelled = False
        self._first: dict[str, list[str]] = {}
        self._shown: dict[str, tuple[str, str]] = {}
        self._packed: dict[bool, list[str]] = {True: [], False: []}

    def look(self, row: Row) -> tuple[list[tuple[str, str]], bool | None]:
        """What is wrong with the image of a row, as (check, what), and whether it is packed as this machine packs it;
        None where that was not looked at.
        """
        place = row["image"]["path"]
        try:
            image = encoding.decode(self.release / place, self.grid)
        except encoding.Undecodable as error:
            kind = "format" if isinstance(error, encoding.OtherForm) else "decodes"
            return [(kind, f"{place}: {error}")], None
        problems, packed = self._look_at(image, row["sample_id"], row["image"]["voxel_sha256"])
        if row.get("labels") is not None:
            problems += [("labels", f"{row['sample_id']}: {one}") for one in self._label_problems(row)]
        return problems, packed

    def _label_problems(self, row: Row) -> Iterator[str]:
        """What is wrong with the label map of a row, and with the volumes that follow from it."""
        name, grid = row["sample_id"], replace(self.grid, labels=True)
        structures = self.study.structures
        try:
            found = encoding.decode(self.release / row["labels"]["path"], grid)
            if encoding.voxel_digest(found.stored, found.affine) != row["labels"]["voxel_sha256"]:
                yield "it shows something else than the ledger says"
            yield from encoding.departures(found, grid, name, self.study.study)
            encoding.is_packed_otherwise(found, grid, name, self.study.study)
        except encoding.Undecodable as error:
            yield str(error)
            return
        if found.stored.max() > len(structures):
            yield f"label {found.stored.max()}, of {len(structures)} structures"
            return
        for column, volume in volumes(found.stored, structures, self.grid, self.study.covariates).items():
            if (row.get("measured") or {}).get(column) != volume:
                yield f"{column} is {(row.get('measured') or {}).get(column)}, by the label map {volume}"

    def preview_problems(self) -> Iterator[str]:
        """Pictures that do not show the first images of their dataset; when all images are there."""
        for folder, paths in sorted(self._first.items()):
            name = f"{folder}/{verify.PREVIEW}" if folder else verify.PREVIEW
            if any(not (self.release / path).exists() for path in paths):
                continue
            try:
                wanted = preview.pixels(self.release, paths, self.grid)
                grid = encoding.Grid(wanted.shape, None)
                found = encoding.decode(self.release / name, grid)
                other = encoding.departures(found, grid, preview.NAME, self.study.study)
                encoding.is_packed_otherwise(found, grid, preview.NAME, self.study.study)
                if other or not np.array_equal(found.stored, wanted):
                    yield f"{name}: {', '.join(other) or 'other images'}"
            except encoding.Undecodable as error:
                yield f"{name}: {error}"

    def _look_at(
        self, image: encoding.Decoded, name: str, voxel_sha256: str
    ) -> tuple[list[tuple[str, str]], bool | None]:
        study, packed = self.study.study, None
        wrong = [("format", f"{name}: {problem}") for problem in _format_problems(image.stored)]
        if encoding.voxel_digest(image.stored, image.affine) != voxel_sha256:
            wrong.append(("voxels", name))
        other = [("bytes", f"{name}: {one}") for one in encoding.departures(image, self.grid, name, study)]
        wrong += other
        if not other:
            try:
                packed = not encoding.is_packed_otherwise(image, self.grid, name, study)
            except encoding.Undecodable as error:
                wrong.append(("packing", f"{name}: {error}"))
        if not image.description.startswith("SYNTHETIC"):
            wrong.append(("marks", f"{name}: the description is {image.description[:40]!r}"))
        if image.mark is None or image.mark.get("sample_id") != name or image.mark.get("study") != study:
            wrong.append(("marks", f"{name}: the mark is {str(image.mark)[:200]!r}"))
        return wrong, packed

    def add(self, row: Row, problems: list[tuple[str, str]], packed: bool | None) -> None:
        """Add what `look` found in the image of a row, and look at it beside the others."""
        name, place = row["sample_id"], row["image"]["path"]
        other, key = self._shown.setdefault(row["image"]["voxel_sha256"], (name, row["seed_key"]))
        # Counterfactual images of one subject may be equal: their covariate then does nothing.
        if key != row["seed_key"]:
            self.wrong["twins"].append(f"{name} and {other}")
        self.folders.add(self.layout.folder(row["group"], row["index"]))
        self.labelled |= row.get("labels") is not None
        first = self._first.setdefault(verify.placed(place)[0], [])
        if len(first) < preview.MOST:
            first[:] = preview.chosen([*first, place], self.study.spatial_dims)
        if place != self.layout.path(name, row["group"], row["index"]):
            self.wrong["format"].append(f"{name}: lies at {place}")
        for check, what in problems:
            self.wrong[check].append(what)
        if packed is not None:
            self._packed[packed].append(name)

    def packing(self) -> Check | None:
        """When all images are there: what can be said where some, or all, are packed otherwise than here.

        Where one image is packed as zlib of this machine packs it, zlib is not the reason why others are not.
        """
        as_here, otherwise = self._packed[True], self._packed[False]
        if not otherwise or self.wrong["packing"]:
            return None
        if as_here:
            text = f"{len(otherwise)} image(s) are packed otherwise than the other {len(as_here)}"
            return Check(5, "packing", "finding", text, otherwise[:5])
        text = f"zlib {zlib.ZLIB_RUNTIME_VERSION} of this machine packs all images otherwise, none much smaller"
        return Check(5, "packing", "note", f"{text}: what shows is as it should be, the rest was not compared")


def _format_problems(stored: np.ndarray) -> Iterator[str]:
    top = encoding.VOLUME_SCALE if stored.ndim == 3 else encoding.PICTURE_SCALE
    if stored.min() < 0 or stored.max() > top:
        yield f"values from {stored.min()} to {stored.max()}, expected 0 to {top}"
    elif stored.min() == stored.max():
        yield f"the same value everywhere ({stored.min()})"


def _dataset_marks(folder: Path, study: config.Study, datasets: Collection[str]) -> Iterator[str]:
    wanted: list[tuple[str, Callable[[Any], Any]]] = []
    for place in sorted({"", *datasets}):
        wanted.append((str(PurePosixPath(place, "dataset_description.json")), lambda content: content["Synthetic"]))
        if study.spatial_dims == 3 and place in datasets:
            sidecar = str(PurePosixPath(place, f"{study.release.suffix}.json"))
            wanted.append((sidecar, lambda content: content["Synthesis"]["Synthetic"]))
    for name, mark in wanted:
        try:
            if mark(verify.load_json(verify.read_bytes(folder, name))) is not True:
                yield f"{name}: does not say that it is synthetic"
        except (OSError, ValueError, KeyError, TypeError) as error:
            yield f"{name}: no mark ({type(error).__name__}: {error})"
