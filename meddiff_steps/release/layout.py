"""Where a subject lies in a release: in the one dataset, or, if many are planned, in one of several.

Programs and file systems grow slow with folders of a hundred thousand subjects.  A large release is therefore cut into
datasets of at most `release.shard_size` subjects, each complete by itself.  Which one is a subject's follows from its
group and its number in the group alone, so that nobody moves when a group grows or another one is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from meddiff_steps.config import PlanGroup, Release
from meddiff_steps.synthesis.size import planned_subjects


@dataclass(frozen=True)
class Layout:
    """Rule by which images lie in a release.

    Attributes
    ----------
    spatial_dims
        2 or 3.
    suffix
        BIDS suffix of volumes.
    size
        Most subjects of a dataset; None if all are in one, the release's own folder.
    """

    spatial_dims: int
    suffix: str
    size: int | None

    @classmethod
    def of(cls, spatial_dims: int, plan: Sequence[PlanGroup], release: Release) -> Self:
        """The layout of a study: one dataset if no more subjects are planned than it may hold."""
        return cls(
            spatial_dims, release.suffix, release.shard_size if planned_subjects(plan) > release.shard_size else None
        )

    def folder(self, group: str, index: int) -> str:
        """Folder of a subject's dataset in the release, "" for the release itself.

        >>> Layout(3, "T1w", 1000).folder("syn", 2345)
        'shard-syn-0002'
        """
        return "" if self.size is None else f"shard-{group}-{index // self.size:04d}"

    def path(self, sample_id: str, group: str, index: int) -> str:
        """Where a subject's image lies in the release, with forward slashes.

        >>> Layout(3, "T1w", None).path("syn000001", "syn", 1)
        'sub-syn000001/anat/sub-syn000001_T1w.nii.gz'
        >>> Layout(2, "T1w", 1000).path("syn002345", "syn", 2345)
        'shard-syn-0002/images/syn002345.png'
        """
        inside = image_path(sample_id, self.spatial_dims, self.suffix)
        folder = self.folder(group, index)
        return f"{folder}/{inside}" if folder else inside


def unknown_to_bids(suffix: str) -> bytes:
    """Lines of .bidsignore for volumes of a suffix that BIDS does not have; none of any other."""
    return b"/sub-*/anat/*_CT.nii.gz\n/CT.json\n" if suffix == "CT" else b""


def image_path(sample_id: str, spatial_dims: int, suffix: str = "T1w") -> str:
    """Where a sample's image lies in its dataset, with forward slashes.

    >>> image_path("demo000001", 3)
    'sub-demo000001/anat/sub-demo000001_T1w.nii.gz'
    >>> image_path("demo000001", 2)
    'images/demo000001.png'
    """
    return f"sub-{sample_id}/anat/sub-{sample_id}_{suffix}.nii.gz" if spatial_dims == 3 else f"images/{sample_id}.png"
