"""A ledger of 100,000 subjects: build, root, audit of L0 to L4 without reading images; and how fast images are read and
hashed.

    python benchmarks/ledger.py [ROWS]

Each part runs in a process of its own, so that its peak memory is its own.  Prints seconds (of the wall and of the
processor: on a busy machine only the second says something) and resident memory; fails above 30 s of the processor or 1
GiB, and if hashing files takes more than half as much again, of the processor, as SHA-256 of one large buffer and
reading the files.
"""

from __future__ import annotations

import hashlib
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from meddiff_steps import config
from meddiff_steps.audit.request import Request
from meddiff_steps.audit.run import audit
from meddiff_steps.core.files import read_json, write_json
from meddiff_steps.core.random_streams import seed_key
from meddiff_steps.privacy.calibration import Thresholds
from meddiff_steps.provenance import ledger, verify
from meddiff_steps.release import croissant, seal
from meddiff_steps.release.layout import image_path

SECONDS, MEBIBYTES = 30.0, 1024.0
#: As many images, of the size of a brain at 1 mm, as fit into memory.
FILES, FILE_BYTES = 100, 4_000_000
LIMITS = {"aligned": 0.9, "learned": 0.8, "latent": 0.7}


def tables(rows: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Plan, decisions and images of a 2D cohort; nothing is rejected."""
    draw = np.random.default_rng(0)
    ids = [f"syn{i:06d}" for i in range(rows)]
    keys = [seed_key("seed/syn", i, 0, "noise") for i in range(rows)]
    index = np.arange(rows)
    plan = pd.DataFrame(
        {
            "sample_id": ids,
            "group": "syn",
            "index": index,
            "noise_index": index,
            "cohort_root": "seed/syn",
            "shard": index // 1000,
        }
    )
    plan = plan.assign(age=draw.uniform(25, 88, rows).round(1), sex=draw.choice(["F", "M"], rows))
    decisions = pd.DataFrame({"sample_id": ids, "attempt": 0, "seed_key": keys, "decision": "accepted", "reason": ""})
    for detector, limit in LIMITS.items():
        decisions[f"similarity_{detector}"], decisions[f"nearest_{detector}"] = (
            draw.uniform(0, limit, rows),
            draw.integers(1000, size=rows),
        )
    digests = [f"{i:064x}" for i in range(rows)]
    images = pd.DataFrame(
        {
            "sample_id": ids,
            "path": [image_path(i, 2) for i in ids],
            "bytes": 1,
            "sha256": digests,
            "voxel_sha256": digests,
        }
    )
    return plan, decisions, images


def prepare(folder: Path, rows: int) -> None:
    """A sealed release of pictures, whose images and plan are then replaced by `rows` others."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests/provenance"))
    from tiny_release import Place

    release = Place(folder, dims=2, sign=False, measured=False).release
    plan, decisions, images = tables(rows)
    for name, table in (("plan", plan), ("decisions", decisions), ("images", images)):
        table.to_parquet(folder / f"{name}.parquet")
    shutil.rmtree(release / "images")
    (release / "images").mkdir()
    for path in images["path"]:
        (release / path).write_bytes(b"x")
    table = plan.rename(columns={"sample_id": "participant_id"})[["participant_id", "age", "sex"]]
    table = table.assign(
        participant_id="sub-" + table["participant_id"], image=images["path"], age=table["age"].map("{:.6g}".format)
    )
    splits = verify.Splits(read_json(release / seal.ROOT)["seed"]["root"])
    table["split"] = [
        splits.of(*row)
        for row in zip(plan["group"], plan["noise_index"], [{"sex": sex} for sex in plan["sex"]], strict=True)
    ]
    table[["participant_id", "image", "age", "sex", "split"]].to_csv(
        release / "participants.tsv", sep="\t", index=False
    )
    study = read_json(release / seal.CONFIG)
    write_json(
        release / seal.CONFIG,
        study | {"plan": [study["plan"][0] | {"subjects": rows}], "release": study["release"] | {"shard_size": rows}},
    )


def build(folder: Path, rows: int) -> None:
    release = folder / "results/tiny/release"
    study = config.parse_study(read_json(release / seal.CONFIG), seal.CONFIG)
    recipe = ledger.Recipe(**next(ledger.read_parquet(release / seal.TABLE))["recipe"])
    plan, decisions, images = (pd.read_parquet(folder / f"{name}.parquet") for name in ("plan", "decisions", "images"))
    found = ledger.public_tables(plan, decisions, images, study.covariates, recipe)
    public = ledger.write_ledger(
        found, ledger.public_schema(study.covariates), release / seal.TABLE, release / seal.LINES
    )
    candidates = ledger.private_tables(plan, decisions, Thresholds(dict(LIMITS), {}, 0.05, 99), None)
    private = ledger.write_ledger(candidates, ledger.private_schema(sorted(LIMITS)), folder / "private.parquet")
    root = read_json(release / seal.ROOT)
    shards = ledger.shard_roots(public, dict(zip(plan["sample_id"], plan["shard"], strict=True)))
    root["ledger"] |= {"root": public.root, "rows": rows, "released": rows, "shards": shards}
    root["private_ledger"] |= {"root": private.root, "rows": rows}
    root["privacy"]["counts"] = {
        "planned": rows,
        "released": rows,
        "candidates": rows,
        "rejected": 0,
        "duplicates": 0,
        "failed": 0,
    }
    files = seal._files(release, set(images["path"]))
    for name, content in seal.metadata(
        release, root["ledger"], root["inputs"], files, read_json(release / croissant.NAME)["datePublished"]
    ):
        write_json(release / name, content)
        files[name] = seal._entry(release / name)
    write_json(release / seal.ROOT, root | {"files": files})


def check(folder: Path, rows: int) -> None:
    report = audit(Request(folder / "results/tiny/release", private=folder / "private.parquet", hash_images=False))
    # The plan was changed on purpose, after the runs were recorded.
    found = [check for check in report.checks if check.outcome == "finding" and check.name != "settings"]
    if found or [report.status(level) for level in range(4)] != ["PASS"] * 4:
        sys.exit(
            "\n".join(f"L{check.level} {check.name}: {check.text} {check.examples}" for check in found)
            or "a level did not run"
        )


def rates(folder: Path, rows: int) -> None:
    """MB per second of the processor: SHA-256 of memory, reading files that are cached, and what an audit does with
    them.
    """
    content = np.random.default_rng(0).bytes(FILE_BYTES)
    files = []
    for i in range(FILES):
        (folder / f"{i}.nii.gz").write_bytes(content)
        files.append((f"{i}.nii.gz", FILE_BYTES, hashlib.sha256(content).hexdigest()))
    large = content * FILES
    total = len(large) / 1e6

    def timed(run: Callable[[], Any]) -> tuple[float, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        return total / (time.perf_counter() - wall), total / (time.process_time() - cpu)

    memory = timed(lambda: hashlib.sha256(large))
    reading = timed(lambda: [(folder / name).read_bytes() for name, _, _ in files])
    audited = timed(
        lambda: verify._altered(folder, files, True, None) and sys.exit("a file that was not changed is said to be")
    )
    for name, (wall, cpu) in (
        ("SHA-256 of memory", memory),
        ("reading", reading),
        ("hashing files as an audit", audited),
    ):
        print(f"{name}: {cpu:.0f} MB/s of the processor, {wall:.0f} MB/s", file=sys.stderr)
    if 1 / audited[1] > 1.5 * (1 / memory[1] + 1 / reading[1]):
        sys.exit("hashing files is slow beside SHA-256 and reading")


PARTS = {"prepare": prepare, "build": build, "audit": check, "rates": rates}


def measure(part: str, folder: Path, rows: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, str(rows), part, str(folder)], stdout=subprocess.PIPE, text=True, check=True
    )
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(rows: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        results = {part: measure(part, Path(folder), rows) for part in PARTS}
        provenance = Path(folder, "results/tiny/release/provenance")
        sizes = {path.name: round(path.stat().st_size / 2**20, 1) for path in provenance.glob("ledger.*")}
    for part in ("build", "audit"):
        print(
            f"{part:6} {rows} rows: {results[part]['cpu']:.1f} s of the processor, {results[part]['wall']:.1f} s, peak"
            f" {results[part]['mib']:.0f} MiB"
        )
    print(f"size in MiB: {sizes}")
    cpu = results["build"]["cpu"] + results["audit"]["cpu"]
    return int(
        rows <= 100_000 and (cpu > SECONDS or max(results[part]["mib"] for part in ("build", "audit")) > MEBIBYTES)
    )


if __name__ == "__main__":
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
    if len(sys.argv) <= 2:
        sys.exit(main(count))
    begun, used = time.perf_counter(), time.process_time()
    PARTS[sys.argv[2]](Path(sys.argv[3]), count)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"wall": time.perf_counter() - begun, "cpu": time.process_time() - used, "mib": peak}))
