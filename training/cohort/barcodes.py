# SPDX-License-Identifier: Apache-2.0
"""What the name of a TCGA or CPTAC slide says: case, collecting site, tumour or normal tissue, preparation.

TCGA names slides `TCGA-05-4244-01Z-00-DX1.<uuid>.svs`: site 05, participant 4244, sample type 01, portion, slide.
Sample types 01 to 09 are tumour, 10 to 19 normal tissue. `DX` slides are cut from paraffin blocks, `TS`, `MS` and `BS`
(top, middle, bottom) from the frozen block. CPTAC names them `C3L-00001-21.svs`, case and slide.
Source: GDC documentation, "TCGA Barcode" and its code tables.
"""

import re
from dataclasses import dataclass

TUMOR, NORMAL = "tumor", "normal"
FFPE, FROZEN = "ffpe", "frozen"
TCGA, CPTAC = "TCGA", "CPTAC"

# Groups: case, tissue source site.
TCGA_CASE = re.compile(r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})(?![A-Z0-9])", re.IGNORECASE)
_TCGA_SLIDE = re.compile(
    r"(TCGA-([A-Z0-9]{2})-[A-Z0-9]{4})-(\d{2})[A-Z]?-[A-Z0-9]{2}-(DX|TS|MS|BS)[A-Z0-9]{1,2}(\..+)?", re.IGNORECASE
)
# Most CPTAC cases are numbered by the network that collected them; some of lung carry an older number.
_CPTAC_CASE = re.compile(r"(C3[LN]-\d{5}|\d{2}[A-Z]{2}\d{3})(?![A-Z0-9])", re.IGNORECASE)
_CPTAC_SLIDE = re.compile(rf"{_CPTAC_CASE.pattern}-[A-Z0-9]+", re.IGNORECASE)


@dataclass(frozen=True)
class SlideName:
    """What a slide's file name says.

    Args:
        case_id (`str`): the patient, such as "TCGA-05-4244" or "C3L-00001".
        program (`str`): "TCGA" or "CPTAC".
        site (`str`): TCGA's tissue source site, such as "05"; "CPTAC" there, which does not tell its hospitals.
        tissue (`str` or `None`): "tumor" or "normal"; `None` if the name does not say (CPTAC, other sample types).
        preparation (`str`): "ffpe" or "frozen"; CPTAC's are frozen.
    """

    case_id: str
    program: str
    site: str
    tissue: str | None
    preparation: str


def parse_slide_name(stem: str) -> SlideName | None:
    """Reads the name of a slide file without its suffix; `None` if it is neither TCGA's nor CPTAC's."""
    if match := _TCGA_SLIDE.fullmatch(stem):
        case, site, sample_type, section = (match[place].upper() for place in range(1, 5))
        tissue = TUMOR if 1 <= int(sample_type) <= 9 else NORMAL if 10 <= int(sample_type) <= 19 else None
        return SlideName(case, TCGA, site, tissue, FFPE if section == "DX" else FROZEN)
    if match := _CPTAC_SLIDE.fullmatch(stem):
        return SlideName(match[1].upper(), CPTAC, CPTAC, None, FROZEN)
    return None


def case_of(text: str) -> str | None:
    """The case that a barcode of any length belongs to (case, sample, aliquot, slide, file), `None` without one."""
    text = text.strip()
    match = TCGA_CASE.match(text) or _CPTAC_CASE.match(text)
    return match[0].upper() if match else None


def is_normal_sample(text: str) -> bool:
    """Whether a TCGA barcode names a sample of normal tissue or blood."""
    match = re.match(rf"{TCGA_CASE.pattern}-(\d\d)", text.strip(), re.IGNORECASE)
    return bool(match) and 10 <= int(match[3]) <= 19
