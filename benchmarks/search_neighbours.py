# SPDX-License-Identifier: Apache-2.0
"""Nearest slides in a large cohort: processor time per query, and whether they are those of brute force in float64.

    python benchmarks/search_neighbours.py
    python benchmarks/search_neighbours.py --slides 100000 --width 4096

Embeddings are random, in clusters, so that neighbours are close to each other. One line of JSON: `same_rows_numpy`
and `same_rows_faiss`, the share of ten queries whose ten nearest are, in order, those of brute force (target: 1.0),
and `ms_per_query_numpy`, `ms_per_query_faiss` and `ms_per_query_brute_force` (processor time, no target; one search of
all queries, with what it takes to prepare the embeddings, as `dre-slcl search` does it). FAISS's figures are
null where it is not installed.
"""

import argparse
import json
import sys
import time

import numpy as np

from dre_slcl.training.search_index import nearest

_TOP_K = 10


def main() -> int:
    """Runs the benchmark; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--slides", type=int, default=20_000, help="size of the cohort (default: %(default)s)")
    parser.add_argument("--width", type=int, default=512, help="of an embedding (default: %(default)s)")
    parser.add_argument("--queries", type=int, default=100, help="slides that are searched by (default: %(default)s)")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(50, arguments.width))
    members = centres[rng.integers(50, size=arguments.slides)]
    gallery = (members + 0.3 * rng.normal(size=members.shape)).astype(np.float32)
    queries = gallery[rng.integers(len(gallery), size=arguments.queries)]

    start = time.process_time()
    expected = np.stack([_brute_force(query, gallery.astype(np.float64)) for query in queries[:10]])
    figures = {"slides": arguments.slides, "width": arguments.width, "top_k": _TOP_K}
    figures["ms_per_query_brute_force"] = round(1e3 * (time.process_time() - start) / len(expected), 3)
    for backend in ("numpy", "faiss"):
        try:
            nearest(queries[:1], gallery[:100], 1, backend=backend)  # imports the library
            start = time.process_time()
            rows = nearest(queries, gallery, _TOP_K, backend=backend)[1]
        except ImportError:
            figures |= {f"same_rows_{backend}": None, f"ms_per_query_{backend}": None}
            continue
        figures[f"ms_per_query_{backend}"] = round(1e3 * (time.process_time() - start) / len(queries), 3)
        figures[f"same_rows_{backend}"] = float((rows[: len(expected)] == expected).all(axis=1).mean())
    print(json.dumps(figures))
    return 0


def _brute_force(query: np.ndarray, gallery: np.ndarray) -> np.ndarray:
    """The rows with the largest cosine, by sorting all of them."""
    cosines = gallery @ query.astype(np.float64) / np.linalg.norm(gallery, axis=1)
    return np.argsort(-cosines, kind="stable")[:_TOP_K]


if __name__ == "__main__":
    sys.exit(main())
