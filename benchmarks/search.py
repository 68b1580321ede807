"""Time and memory of the exact nearest-neighbour search, beside other ways: `python benchmarks/search.py`.

Every row runs in a process of its own, so that its peak memory is its own.  faiss is compared where it is installed.
The last lines give the exponent of growth: seconds go with (queries x references) to that power between the smallest
and the largest size.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import time

import numpy as np

SIZES = [(1_000, 1_000), (10_000, 10_000), (100_000, 30_000)]
METHODS = ["meddiff", "numpy", "scikit-learn", "faiss"]


def vectors(count: int, width: int, seed: int) -> np.ndarray:
    x = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def search(method: str, queries: np.ndarray, references: np.ndarray, k: int) -> np.ndarray:
    if method == "meddiff":
        from meddiff_steps.privacy.search import nearest

        return nearest(queries, references, k)[0]
    if method == "numpy":
        product = queries @ references.T
        return -np.sort(-np.partition(product, -k, axis=1)[:, -k:], axis=1)
    if method == "scikit-learn":
        from sklearn.neighbors import NearestNeighbors

        distance, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(references).kneighbors(queries)
        return 1 - distance**2 / 2
    import faiss

    index = faiss.IndexFlatIP(references.shape[1])
    index.add(references)
    return index.search(queries, k)[0]


def one(method: str, queries: int, references: int, width: int, k: int) -> None:
    a, b = vectors(queries, width, 0), vectors(references, width, 1)
    search(method, a[:1000], b[:1000], k)  # imports and threads
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = search(method, a, b, k)
    seconds = time.perf_counter() - start
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"{method:14} {queries:>8,} x {references:>7,}  {seconds:8.3f} s  {grown:8.0f} MiB  checksum"
        f" {float(found.sum()):.2f}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--one", nargs=5, metavar=("METHOD", "QUERIES", "REFERENCES", "WIDTH", "K"))
    parser.add_argument("--width", type=int, default=64, help="numbers per vector (default 64)")
    parser.add_argument("--neighbours", type=int, default=20, help="how many of the nearest (default 20)")
    arguments = parser.parse_args()
    if arguments.one:
        method, *numbers = arguments.one
        one(method, *map(int, numbers))
        return
    seconds: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for queries, references in SIZES:
        for method in METHODS:
            if method == "numpy" and queries * references > 5e8:
                print(
                    f"{method:14} {queries:>8,} x {references:>7,}  left out: {queries * references * 4 / 2**30:.0f}"
                    " GiB of similarities"
                )
                continue
            numbers = map(str, (queries, references, arguments.width, arguments.neighbours))
            done = subprocess.run([sys.executable, __file__, "--one", method, *numbers], capture_output=True, text=True)
            print(done.stdout.strip() or f"{method:14} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
            if done.stdout:
                seconds[method].append((queries * references, float(done.stdout.split(" s ")[0].split()[-1])))
    for method, points in seconds.items():
        if len(points) > 1:
            (small, first), (large, last) = points[0], points[-1]
            print(f"{method:14} exponent {np.log(last / first) / np.log(large / small):.2f}")


if __name__ == "__main__":
    main()
