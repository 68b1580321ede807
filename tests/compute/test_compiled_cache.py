"""What one job compiles, others find."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from meddiff_steps.compute.compilation import lacking_for_compiler

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

#: Compiles a network as the steps do, and prints what it gave, and how often what was compiled was found or not.
JOB = """
import torch
from torch._dynamo.utils import counters
from meddiff_steps import config
from meddiff_steps.compute.compilation import speed_up
from meddiff_steps.compute.device import make_fabric
from meddiff_steps.models.blocks import ResidualBlock
compute = config.Compute(device="cpu", precision="32-true", compile=True)
torch.manual_seed(0)
network = ResidualBlock(2, 4)
torch.nn.init.normal_(network.conv2.weight)
speed_up([network], compute, make_fabric(compute, 1), training=False)
with torch.no_grad():
    total = network(torch.ones(1, 4, 6, 6)).double().sum().item()
found = [counters["aot_autograd"][f"autograd_cache_{what}"] for what in ("hit", "miss")]
found += [counters["inductor"][f"fxgraph_cache_{what}"] for what in ("hit", "miss")]
print(total.hex(), found[0] + found[2], found[1] + found[3])
"""


def begin(folder):
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", JOB]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def result(job):
    out, errors = job.communicate(timeout=300)
    assert job.returncode == 0, errors
    return out.split()


@pytest.mark.slow
@pytest.mark.skipif(lacking_for_compiler("cpu") is not None, reason="no compiler")
def test_jobs_that_begin_together_and_later_ones_share_what_was_compiled(tmp_path):
    together = [result(job) for job in [begin(tmp_path), begin(tmp_path)]]
    later = result(begin(tmp_path))
    assert int(later[1]) and later[2] == "0" and any(int(job[2]) for job in together)
    assert {job[0] for job in [*together, later]} == {later[0]}


@pytest.mark.parametrize("given", [None, "/somewhere/else"])
def test_the_workflow_keeps_it_with_the_study_unless_it_is_told_where(tmp_path, given):
    """Jobs of a cluster read the same files, and have the same."""
    (tmp_path / "Snakefile").write_text(
        f'include: "{ROOT}/rules/common.smk"\nprint("compiled in", environ["TORCHINDUCTOR_CACHE_DIR"])\n'
    )
    environment = {key: value for key, value in os.environ.items() if key != "MEDDIFF_STUDY"} | {
        "PYTHONPATH": str(ROOT)
    }
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    command = [str(BIN / "python"), "-m", "snakemake", "-n", "--directory", str(tmp_path)]
    command += ["-s", str(tmp_path / "Snakefile"), "--configfile", str(ROOT / "config/config.yaml")]
    done = subprocess.run(
        command,
        env=environment | ({"TORCHINDUCTOR_CACHE_DIR": given} if given else {}),
        capture_output=True,
        text=True,
    )
    expected = given or tmp_path / "results/demo/.cache/compiled"
    assert f"compiled in {expected}\n" in done.stdout + done.stderr, done.stderr
