"""What stays on disk: temporary shards go when nobody needs them, weights and sealed releases are not replaced by
accident.
"""

import os
import re
import shutil
import subprocess

import pytest
import yaml
from tiny_study import ENVIRONMENT, STUDY, snakemake

# Root may write what is read-only; without this capability it is like anybody.
ORDINARY = ["setpriv", "--bounding-set", "-dac_override"] if os.geteuid() == 0 else []


def plan(folder, *arguments, **storage) -> subprocess.CompletedProcess[str]:
    """A dry run of the tiny study, as a user without the powers of root."""
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY | {"storage": storage}))
    return subprocess.run(
        [*ORDINARY, *snakemake(folder, "-n", *arguments)], env=ENVIRONMENT, capture_output=True, text=True, timeout=1200
    )


def test_temporary_shards_go_after_their_last_reader_and_nothing_else_does(tmp_path):
    done = plan(tmp_path, temporary=["latents", "generated"])
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    removed = set(re.findall(r"Would remove temporary output (\S+)", said))
    assert {path.removeprefix("results/tiny/") for path in removed} == {
        f"{kind}/shard-000{i}.arrow" for kind in ("latents", "generated") for i in range(2)
    }
    assert said.index("Training the latent diffusion model") < said.index(
        "Would remove temporary output results/tiny/latents"
    )
    assert said.index("Attacking the synthetic cohort") < said.index(
        "Would remove temporary output results/tiny/generated"
    )


@pytest.mark.skipif(bool(ORDINARY) and shutil.which("setpriv") is None, reason="root needs setpriv to be like anybody")
@pytest.mark.parametrize(
    "name",
    [
        *(f"{kind}/model.safetensors" for kind in ("autoencoder", "decoder", "diffusion")),
        "release/provenance/root.json",
    ],
)
def test_a_run_that_would_replace_what_is_protected_is_refused_before_it_starts(tmp_path, name):
    path = tmp_path / "results/tiny" / name
    path.parent.mkdir(parents=True)
    path.write_text("a week of work")
    path.chmod(0o444)
    done = plan(tmp_path, protect=True)
    assert done.returncode != 0
    assert (
        f"Write-protected output files for rule {'ledger' if 'root' in name else path.parent.name}"
        in done.stdout + done.stderr
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="of anybody but root Snakemake asks whether the file can be written")
def test_root_is_refused_as_well(tmp_path):
    """Root, which containers run as, can write what is read-only."""
    path = tmp_path / "results/tiny/autoencoder/model.safetensors"
    path.parent.mkdir(parents=True)
    path.write_text("a week of work")
    path.chmod(0o444)
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(STUDY | {"storage": {"protect": True}}))
    done = subprocess.run(snakemake(tmp_path), env=ENVIRONMENT, capture_output=True, text=True, timeout=1200)
    said = done.stdout + done.stderr
    assert done.returncode != 0 and "autoencoder would replace" in said and "chmod u+w" in said
    assert path.read_text() == "a week of work" and not (tmp_path / "results/tiny/cohort/manifest.parquet").exists()
