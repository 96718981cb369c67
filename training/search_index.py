# SPDX-License-Identifier: Apache-2.0
"""Embeddings of a cohort -> exact nearest neighbours.

Letters: S slides, Q queries, D width of slide embeddings, E joint width, G rows of a gallery.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from modeling_dre_slcl.atomic_files import read_json
from modeling_dre_slcl.slide_file import slide_fingerprint

Space = Literal["slide_embedding", "slide_projection"]
_SPARE = 16
_QUERIES_AT_ONCE = 256


def nearest(
    queries: np.ndarray, gallery: np.ndarray, top_k: int, *, backend: Literal["numpy", "faiss"] = "numpy"
) -> tuple[np.ndarray, np.ndarray]:
    """Finds the rows of a gallery with the largest cosine to each query, exactly: every row is compared.

    Candidates are found in float32, by numpy or FAISS's flat index, and ranked in float64, so that both give the same
    order; of equal rows the first wins (up to 16 of them around the last place, more are cut anywhere).

    Args:
        queries (`np.ndarray` of shape `(Q, D)`, float): need not be normalised.
        gallery (`np.ndarray` of shape `(G, D)`, float): neither.
        top_k (`int`): neighbours per query.
        backend (`str`, defaults to `"numpy"`): or `"faiss"` (the extra `search`), which is slower for one search of a
            large gallery (`benchmarks/search_neighbours.py`), since its index is made for it.

    Returns:
        `tuple`: cosines of shape `(Q, min(top_k, G))`, float64, largest first, and the rows, int64.

    Raises:
        ValueError: if `top_k` is below 1, or widths differ.
        ImportError: if FAISS is asked for and not installed.
    """
    if top_k < 1:
        raise ValueError(f"top_k: expected at least 1, found {top_k}.")
    if queries.ndim != 2 or gallery.ndim != 2 or queries.shape[1] != gallery.shape[1]:
        raise ValueError(
            f"Queries of shape {queries.shape} cannot be compared with embeddings of shape {gallery.shape}: they "
            "come from different models, or from different spaces of one."
        )
    queries, gallery = _unit(queries), _unit(gallery)
    num_candidates = min(top_k + _SPARE, len(gallery))
    find = _candidates_of_numpy if backend == "numpy" else _candidates_of_faiss
    scores, rows = [], []
    for start in range(0, len(queries), _QUERIES_AT_ONCE):
        part = queries[start : start + _QUERIES_AT_ONCE]
        # In the order of rows, so that a stable sort leaves equal ones there.
        candidates = np.sort(find(part, gallery, num_candidates), axis=1)
        cosines = np.einsum("qd,qcd->qc", part, gallery[candidates])
        order = np.argsort(-cosines, axis=1, kind="stable")[:, :top_k]
        scores.append(np.take_along_axis(cosines, order, axis=1))
        rows.append(np.take_along_axis(candidates, order, axis=1))
    shape = (0, min(top_k, len(gallery)))
    if not scores:
        return np.empty(shape), np.empty(shape, dtype=np.int64)
    return np.concatenate(scores), np.concatenate(rows)


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = np.asarray(vectors, dtype=np.float64)
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _candidates_of_numpy(queries: np.ndarray, gallery: np.ndarray, count: int) -> np.ndarray:
    similarity = queries.astype(np.float32) @ gallery.T.astype(np.float32)
    if count == len(gallery):
        return np.broadcast_to(np.arange(count), similarity.shape)
    return np.argpartition(-similarity, count - 1, axis=1)[:, :count]


def _candidates_of_faiss(queries: np.ndarray, gallery: np.ndarray, count: int) -> np.ndarray:
    try:
        import faiss
    except ImportError as error:
        raise ImportError("Searching through FAISS needs it: pip install 'dre-slcl[search]'") from error
    index = faiss.IndexFlatIP(gallery.shape[1])
    index.add(np.ascontiguousarray(gallery, dtype=np.float32))
    return index.search(np.ascontiguousarray(queries, dtype=np.float32), count)[1]


@dataclass(frozen=True)
class EmbeddingIndex:
    """The slides of a folder that `dre-slcl embed` wrote; refused ones are left out.

    Args:
        folder (`Path`): the folder.
        slide_ids (`list` of `str`), case_ids (`list` of `str`): of each slide.
        slide_embedding (`np.ndarray` of shape `(S, D)`, float32): for slide-to-slide search.
        slide_projection (`np.ndarray` of shape `(S, E)`, float32): for search by text.
    """

    folder: Path
    slide_ids: list[str]
    case_ids: list[str]
    slide_embedding: np.ndarray
    slide_projection: np.ndarray

    def __len__(self) -> int:
        return len(self.slide_ids)

    @classmethod
    def open(cls, folder: str | Path) -> "EmbeddingIndex":
        """Reads the table of embeddings.

        Args:
            folder (`str` or `Path`): written by `dre-slcl embed`.

        Raises:
            ValueError: if the folder holds no finished table of embeddings, or no slide was embedded.
        """
        path = Path(folder) / "slides.parquet"
        if not path.is_file():
            raise ValueError(f"{folder}: no slides.parquet; give a folder that `dre-slcl embed` has finished.")
        names = ["slide_id", "case_id", "status", "slide_embedding", "slide_projection"]
        try:
            table = pq.read_table(path, columns=names)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: expected a table of `dre-slcl embed` ({error}).") from error
        missing = sorted(set(names) - set(table.column_names))
        if missing:
            raise ValueError(f"{path}: no columns {missing}; expected a table of `dre-slcl embed`.")
        table = table.filter(pc.equal(table["status"], "ok"))
        if not len(table):
            raise ValueError(f"{path}: no slide was embedded; see refused.jsonl beside it.")
        vectors = {name: _read_vectors(table[name], f"{path}: {name}") for name in names[3:]}
        return cls(Path(folder), table["slide_id"].to_pylist(), table["case_id"].to_pylist(), **vectors)

    def row(self, slide_id: str) -> int:
        """The row of a slide.

        Raises:
            ValueError: if it is not there.
        """
        if slide_id not in self.slide_ids:
            raise ValueError(
                f"{self.folder}: holds no slide {slide_id!r}; it names {', '.join(self.slide_ids[:5])} ..."
            )
        return self.slide_ids.index(slide_id)

    def search(
        self, query: np.ndarray, space: Space, top_k: int, *, leave_out: "set[int] | frozenset[int]" = frozenset()
    ) -> list[tuple[int, float]]:
        """Ranks slides by their cosine to a vector.

        Args:
            query (`np.ndarray` of shape `(D,)` or `(E,)`, float): a slide's embedding or projection, or a text.
            space (`str`): `"slide_embedding"` to find like slides, `"slide_projection"` to search by text.
            top_k (`int`): slides to return.
            leave_out (`set` of `int`, *optional*): rows that are not ranked.

        Returns:
            `list` of `tuple`: row and cosine, nearest first.
        """
        kept = np.array([row for row in range(len(self)) if row not in leave_out], dtype=np.int64)
        if not len(kept):
            return []
        scores, places = nearest(np.asarray(query)[None], getattr(self, space)[kept], top_k)
        return [(int(kept[place]), float(score)) for place, score in zip(places[0], scores[0], strict=True)]

    def check_model(self, model: str | Path) -> None:
        """Makes sure that the embeddings were made with a model's present weights, where that can be told.

        Args:
            model (`str` or `Path`): folder or repository of the model.

        Raises:
            ValueError: if its weights are others.
        """
        path = self.folder / "embed.json"
        made_with = read_json(path).get("weights") if path.is_file() else None
        weights = {file.name: slide_fingerprint(file) for file in sorted(Path(model).glob("*.safetensors"))}
        if made_with and weights and made_with != weights:
            raise ValueError(
                f"{self.folder} was embedded with other weights than those in {model}; embed the slides again, or "
                "give the model that they were embedded with."
            )


def _read_vectors(column: pa.ChunkedArray, where: str) -> np.ndarray:
    """A column of lists of one length -> float32 `(S, width)`."""
    widths = set(pc.list_value_length(column).to_pylist())
    if len(widths) != 1 or None in widths:
        raise ValueError(f"{where}: expected vectors of one width, found widths {sorted(map(str, widths))}.")
    flat = pc.list_flatten(column).to_numpy().astype(np.float32)
    vectors = flat.reshape(len(column), -1)
    if not np.isfinite(vectors).all():
        raise ValueError(f"{where}: holds numbers that are not finite; embed the slides again.")
    return vectors
