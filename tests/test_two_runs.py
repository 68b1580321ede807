"""Two runs at once: refused on the same results, undisturbed on different ones."""

import subprocess
import time
from pathlib import Path

import pytest
import yaml
from tiny_study import ENVIRONMENT, STUDY, snakemake

from meddiff_steps.core.files import hold

#: The first steps are enough; they take seconds.
TARGETS = ["cohort/manifest.parquet", "preprocessed/qc.parquet"]


def study_in(folder: Path, name: str, results: str = "results") -> list[str]:
    """Write study `name`; returns the command that runs its first steps there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(STUDY | {"study": name, "results": results}))
    command = snakemake(folder, *(f"{results}/{name}/{target}" for target in TARGETS))
    return [*command[:-1], str(folder / f"{name}.yaml")]


def start(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_same_results_from_two_folders_are_refused(tmp_path):
    results = tmp_path / "shared"
    with hold(results / "tiny" / ".lock"):
        second = start(study_in(tmp_path / "elsewhere", "tiny", str(results)))
        text, _ = second.communicate(timeout=600)
    assert second.returncode != 0
    assert f"{results}/tiny: another run works here" in text
    assert "Traceback" not in text
    assert not (results / "tiny/cohort").exists()


def test_a_run_without_its_scans_is_refused_before_it_begins(tmp_path):
    command = study_in(tmp_path, "gone")
    (tmp_path / "gone.yaml").write_text(
        yaml.safe_dump(STUDY | {"study": "gone", "cohort": {"source": "bids", "root": "no/where"}})
    )
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode != 0
    assert "cohort.root: no/where is not there. Relative paths start at the working directory" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "results/gone/.lock").exists()


@pytest.mark.slow
def test_the_same_study_twice_in_a_folder_is_refused_and_two_studies_are_not(tmp_path):
    first = start(study_in(tmp_path, "first"))
    deadline = time.monotonic() + 300
    while not (tmp_path / "results/first/.lock").exists():
        assert first.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    again, beside = start(study_in(tmp_path, "first")), start(study_in(tmp_path, "second"))
    text, _ = again.communicate(timeout=600)
    assert again.returncode != 0
    assert "Directory cannot be locked" in text or "another run works here" in text
    for process in (first, beside):
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text[-3000:]
    alone = tmp_path / "alone"
    assert subprocess.run(study_in(alone, "second"), env=ENVIRONMENT, capture_output=True, timeout=600).returncode == 0
    for target in TARGETS:
        assert (tmp_path / "results/second" / target).read_bytes() == (alone / "results/second" / target).read_bytes()
