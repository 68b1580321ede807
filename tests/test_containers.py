"""What container images are made of: code and environment, never data, results, keys or history."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILE, APPTAINER = ROOT / "envs/Dockerfile", ROOT / "envs/meddiff.def"
#: What people keep in a checkout.
PRIVATE = [
    ".git/config",
    ".venv/bin/python",
    ".snakemake/log/a.log",
    "results/demo/cohort/manifest.parquet",
    "data/sub-01/anat/sub-01_T1w.nii.gz",
    "my cohort/participants.tsv",
    "participants.tsv",
    "study.yaml",
    "cohort.pem",
    ".env",
    "regenerated/x",
    "meddiff_steps/__pycache__/a.pyc",
    "meddiff_steps/.ipynb_checkpoints/a.py",
    "config/.secret.yaml",
    "tests/data.nii.gz",
]


def sent(path: str) -> bool:
    """Whether Docker sends a file to the builder: the last pattern of .dockerignore that fits it or a folder above it
    decides.
    """
    parts = path.split("/")
    above = ["/".join(parts[: i + 1]) for i in range(len(parts))]
    kept = True
    for line in (ROOT / ".dockerignore").read_text().splitlines():
        pattern = line.removeprefix("!")
        if not line or line.startswith("#"):
            continue
        names = [p.rpartition("/")[2] for p in above] if pattern.startswith("**/") else above
        depth = pattern.removeprefix("**/")
        if any(fnmatch(name, depth) and ("/" not in name or "/" in depth) for name in names):
            kept = line.startswith("!")
    return kept


def tracked() -> list[str]:
    done = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a checkout")
    return done.stdout.splitlines()


@pytest.mark.parametrize("path", PRIVATE)
def test_what_people_keep_in_a_checkout_goes_into_no_image(path):
    assert not sent(path)


def test_both_recipes_copy_the_same_and_all_that_runs():
    copied = {name.split("/")[0] for name in tracked() if sent(name)}
    files = re.search(r"%files\n(.*?)\n\n", APPTAINER.read_text(), re.S)
    assert files and copied == {line.split()[0] for line in files[1].splitlines()}
    assert {"meddiff_steps", "rules", "Snakefile", "pyproject.toml", "envs", "config", "workflow"} <= copied
    assert all(sent(name) for name in tracked() if name.startswith(("meddiff_steps/", "rules/", "workflow/")))
    assert re.findall(r"^COPY (.*)$", DOCKERFILE.read_text(), re.M) == [". /opt/meddiff"]


def test_all_recipes_install_the_same():
    recipes = [path.read_text() for path in (DOCKERFILE, APPTAINER, ROOT / "envs/meddiff.post-deploy.sh")]
    lines = [re.findall(r"pip install --no-cache-dir (.*)", recipe) for recipe in recipes]
    same = [[line.removesuffix(" \\").replace("--editable ", "") for line in found] for found in lines]
    assert same == [same[0]] * 3 and len(same[0]) == 3
    assert "MEDDIFF_WORKFLOW=/opt/meddiff" in recipes[0] and "MEDDIFF_WORKFLOW=/opt/meddiff" in recipes[1]


def test_the_conda_environment_is_whole_wherever_snakemake_copies_its_file():
    content = yaml.safe_load((ROOT / "envs/meddiff.yaml").read_text())
    assert content["dependencies"] == ["python=3.11", "pip"]
    assert "MEDDIFF_WORKFLOW" in (ROOT / "rules/common.smk").read_text()


def test_the_page_names_both_recipes_and_what_the_image_runs():
    page = (ROOT / "docs/containers.md").read_text()
    assert "envs/Dockerfile" in page and "envs/meddiff.def" in page and "/opt/meddiff/Snakefile" in page


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("builder", ["docker", "podman"])
def test_an_image_is_built_and_runs_a_step(builder):
    if shutil.which(builder) is None or subprocess.run([builder, "info"], capture_output=True).returncode:
        pytest.skip(f"{builder} cannot build here")
    build = [builder, "build", "-q", "-f", str(DOCKERFILE), "-t", "meddiff-test", str(ROOT)]
    assert subprocess.run(build, capture_output=True).returncode == 0
    look = [builder, "run", "--rm", "--entrypoint", "ls", "meddiff-test", "-A", "/opt/meddiff"]
    found = set(subprocess.run(look, capture_output=True, text=True, check=True).stdout.split())
    assert "meddiff_steps" in found and not found & {".git", "results", "tests", ".venv"}
    step = [builder, "run", "--rm", "meddiff-test", "audit", "--help"]
    assert subprocess.run(step, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_an_apptainer_image_is_built_and_runs_a_step(tmp_path):
    if shutil.which("apptainer") is None:
        pytest.skip("apptainer is not installed")
    image = tmp_path / "meddiff.sif"
    assert subprocess.run(["apptainer", "build", str(image), str(APPTAINER)], cwd=ROOT).returncode == 0
    look = ["apptainer", "exec", str(image), "ls", "-A", "/opt/meddiff"]
    found = set(subprocess.run(look, capture_output=True, text=True, check=True).stdout.split())
    assert "meddiff_steps" in found and not found & {".git", "results", "tests", ".venv"}
    assert subprocess.run(["apptainer", "run", str(image), "audit", "--help"]).returncode == 0
