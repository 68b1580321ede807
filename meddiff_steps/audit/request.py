"""What an audit is asked to look at, and what it reports: checks, by level."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from meddiff_steps import __version__
from meddiff_steps.provenance.verify import Check

LEVELS = ("form", "integrity", "completeness", "lineage", "recipes", "content", "re-execution", "privacy")


@dataclass(frozen=True)
class Request:
    """What to audit, with what.

    Attributes
    ----------
    release
        Root of the dataset.
    key
        The publisher's public key.
    private
        The private ledger.
    models
        Folder with autoencoder/ and diffusion/ (or distilled/diffusion/), for L6.
    results
        The study's folder with the real scans, for L7.
    sample, seed
        Images that L6 and L7 look at, and what they are drawn by; by default something new, which no publisher could
        foresee.
    version
        The version of this package that sealed the release, as the auditor knows it; this one by default.
    hash_images
        Whether L1 reads the images; without, L5 does not run either.
    threads
        CPU threads of L6 and L7.
    """

    release: Path
    key: Path | None = None
    private: Path | None = None
    models: Path | None = None
    results: Path | None = None
    sample: int = 20
    seed: str = field(default_factory=lambda: secrets.token_hex(16))
    version: str = __version__
    hash_images: bool = True
    threads: int = 1


@dataclass
class Report:
    """All checks of an audit.

    Attributes
    ----------
    release, sha256
        Root of the release, and the SHA-256 of its root.json, which stands for it.
    stopped
        Whether levels that need nothing but the release did not run to their end.
    """

    release: str
    checks: list[Check] = field(default_factory=list)
    sha256: str | None = None
    stopped: bool = False

    def status(self, level: int) -> str:
        """`FINDINGS`, `NOT RUN` or `PASS`."""
        outcomes = [check.outcome for check in self.checks if check.level == level]
        if "finding" in outcomes:
            return "FINDINGS"
        return "PASS" if "pass" in outcomes else "NOT RUN"

    @property
    def found(self) -> bool:
        """Whether anything is wrong."""
        return any(check.outcome == "finding" for check in self.checks)

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong, and all was looked at that could be with what was given."""
        return not self.found and not self.stopped

    def skip(self, levels: range, reason: str) -> None:
        """Say of levels that they did not run."""
        self.checks += [Check(level, "all", "not run", reason) for level in levels]

    def to_json(self) -> dict[str, Any]:
        levels = [{"level": i, "name": name, "status": self.status(i)} for i, name in enumerate(LEVELS)]
        return {
            "schema": "meddiff/audit/v1",
            "release": self.release,
            "root_sha256": self.sha256,
            "passed": self.passed,
            "levels": levels,
            "checks": [vars(check) for check in self.checks],
        }
