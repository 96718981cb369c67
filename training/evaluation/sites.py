# SPDX-License-Identifier: Apache-2.0
"""Which hospital a case comes from: a model may learn its stains and scanners instead of the disease."""

from ..cohort.barcodes import TCGA_CASE
from ..manifest_checks import raise_offenders
from .embedding_table import EmbeddingTable
from .label_table import LabelTable


def find_sites(table: EmbeddingTable, labels: LabelTable, column: str | None = None) -> list[str]:
    """Finds the site of each item.

    Args:
        table (`EmbeddingTable`): the items.
        labels (`LabelTable`): the label file.
        column (`str`, *optional*): its column with sites; without it the tissue source site is read out of TCGA
            barcodes, the part after "TCGA-".

    Returns:
        `list` of `str`: a site for each item.

    Raises:
        ValueError: if there is no such column, or an item has no site or two.
    """
    if column is None:
        found = [
            TCGA_CASE.match(case_id) or TCGA_CASE.match(id_)
            for id_, case_id in zip(table.ids, table.case_ids, strict=True)
        ]
        missing = [id_ for id_, match in zip(table.ids, found, strict=True) if match is None]
        raise_offenders("Sites are read out of TCGA barcodes; name a column of sites instead (--site-column)", missing)
        return [match[2].upper() for match in found if match is not None]
    if column not in labels.columns:
        raise ValueError(f"{labels.path}: has no column `{column}`; it has {', '.join(labels.columns)}.")
    sites_of: dict[str, set[str]] = {}
    for keys in (labels.slide_ids, labels.case_ids):
        for key, site in zip(keys, labels.columns[column], strict=False):
            if key and site is not None:
                sites_of.setdefault(key, set()).add(str(site))
    told = [
        sites_of.get(id_) or sites_of.get(case_id) or set()
        for id_, case_id in zip(table.ids, table.case_ids, strict=True)
    ]
    wrong = [
        f"{id_}: {', '.join(sorted(sites)) or 'none'}"
        for id_, sites in zip(table.ids, told, strict=True)
        if len(sites) != 1
    ]
    raise_offenders(f"{labels.path}: column `{column}` must tell one site of every item", wrong)
    return [next(iter(sites)) for sites in told]
