"""The workflow's own files: they parse, are formatted, and plan jobs, also where no cluster is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "MEDDIFF_STUDY"}
    return subprocess.run([str(BIN / command[0]), *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_the_linter_is_content():
    done = run("snakemake", "--lint")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(not (BIN / "snakefmt").exists(), reason="snakefmt is not installed")
def test_the_rules_are_formatted():
    done = run("snakefmt", "--check", "Snakefile", "rules")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not (BIN / "ruff").exists(), reason="ruff is not installed")
def test_the_code_is_clean():
    assert run("ruff", "check", ".").returncode == 0
    assert run("ruff", "format", "--check", ".").returncode == 0


@pytest.mark.skipif(not (BIN / "mypy").exists(), reason="mypy is not installed")
def test_the_types_are_clean():
    done = run("mypy")
    assert done.returncode == 0, done.stdout


def test_the_slurm_profile_plans_the_published_scale(tmp_path):
    done = run("snakemake", "--profile", "slurm", "-n", "--configfile", "config/studies/ukb.yaml", "--config", f"results={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    total = int(re.search(r"^total\s+(\d+)", done.stdout, re.M).group(1))
    assert 900 < total < 2500
    assert re.search(r"^generate\s+400", done.stdout, re.M)


def test_exactly_the_rules_that_run_networks_ask_for_a_gpu():
    rules = "\n".join(path.read_text() for path in (ROOT / "rules").glob("*.smk"))
    blocks = dict(re.findall(r"^ *rule (\w+):\n(.*?)(?=^ *rule |\Z)", rules, re.M | re.S))
    found = {name for name, body in blocks.items() if re.search(r"^ +gpu=", body, re.M)}
    assert found == {
        "autoencoder",
        "augment_train",
        "latents",
        "diffusion",
        "generate",
        "filter",
        "compare_samplers",
        "showcase",
        "audit",
        "regenerate_shard",
    }
