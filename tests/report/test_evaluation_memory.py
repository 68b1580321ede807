"""Evaluation holds a batch of images and the features of all, never all images."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fabricated import Fabricated

SHAPE = (24, 24, 24)
#: Prints the largest anonymous memory of the process (MB) while it evaluated; pages of memory-mapped shards are the
#: system's to keep or drop.
MEASURED = """
import sys, threading
from pathlib import Path

from meddiff_steps.imaging import selection
from meddiff_steps.steps import evaluate

selection.BATCH_VALUES = 2**20
root, done, peak = Path(sys.argv[1]), threading.Event(), [0]

def watch():
    while not done.wait(0.005):
        status = Path("/proc/self/status").read_text()
        peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]))

thread = threading.Thread(target=watch)
thread.start()
try:
    evaluate.run(
        config=next(root.glob("evaluate-*.json")), manifest=root / "cohort/manifest.parquet",
        images=sorted(root.glob("shard-*.arrow")), generated=[root / "generated.arrow"], plan=root / "plan.parquet",
        reconstructions=root / "autoencoder/reconstructions.arrow", out=root / "evaluation",
        predictors=root / "predictors",
    )
finally:
    done.set()
    thread.join()
print(peak[0] / 1024)
"""


def peak_mb(root: Path, synthetic: int) -> float:
    root.mkdir()
    Fabricated(root, SHAPE, scans=60, synthetic=synthetic).learn()
    done = subprocess.run([sys.executable, "-c", MEASURED, root], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return float(done.stdout.split()[-1])


@pytest.mark.skipif(
    not Path("/proc/self/status").is_file(), reason="anonymous memory is read from /proc, which only Linux has"
)
def test_memory_does_not_grow_with_the_number_of_synthetic_images(tmp_path: Path) -> None:
    few, many = 1000, 6000  # below a thousand, buffers of a fixed size are still filling
    grown = peak_mb(tmp_path / "many", many) - peak_mb(tmp_path / "few", few)
    images = (many - few) * np.prod(SHAPE) * 4 / 2**20
    assert images > 250  # far more than the 20 MB by which one run differs from the next
    assert grown < 0.3 * images, f"{grown:.0f} MB more for {images:.0f} MB more of images"
