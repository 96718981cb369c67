# SPDX-License-Identifier: Apache-2.0
"""Writes pathology reports for synthetic cases, and the words that name their subtypes in zero-shot prompts.

Every case draws its own site, procedure, size, margins, order of sections and wording. Grade, lymphocytes, necrosis
and mucin are those that its slides show. Words of one subtype never appear in the report of another. No files here.
"""

import numpy as np

from .tissue_painter import CaseTraits, random_stream

SUBTYPES: dict[str, tuple[str, ...]] = {
    "tubular": (
        "tubular carcinoma",
        "acinar carcinoma",
        "gland-forming carcinoma",
        "carcinoma with tubular growth",
    ),
    "solid": (
        "solid carcinoma",
        "nested carcinoma",
        "insular carcinoma",
        "carcinoma in solid nests",
    ),
    "trabecular": (
        "trabecular carcinoma",
        "carcinoma growing in cords",
        "ribbon-forming carcinoma",
        "carcinoma with trabecular growth",
    ),
}
"""Subtype to the names that reports give it; the class names of a zero-shot classifier."""

PROMPT_TEMPLATES: tuple[str, ...] = (
    "CLASSNAME.",
    "Diagnosis: CLASSNAME.",
    "Histologic type: CLASSNAME.",
    "The sections show a CLASSNAME.",
    "An H&E slide of CLASSNAME.",
)
"""Sentences of a zero-shot classifier; the literal token CLASSNAME stands for a name from `SUBTYPES`."""

GROWTH: dict[str, tuple[str, ...]] = {
    "tubular": (
        "The tumour cells line rounded glands with open lumina.",
        "Tubules with a central lumen infiltrate the stroma.",
        "Well-formed acini, each around an empty lumen, lie scattered in collagen.",
        "Neoplastic glands are lined by a ring of crowded nuclei.",
    ),
    "solid": (
        "Compact islands of tumour cells are separated by collagen.",
        "The tumour forms rounded solid nests.",
        "Cohesive balls of cells fill the stroma.",
        "Densely packed nests push between the vessels.",
    ),
    "trabecular": (
        "The tumour cells form long cords two cells thick.",
        "Parallel ribbons of cells wind through the stroma.",
        "Winding trabeculae are separated by slender strips of collagen.",
        "Rows of aligned nuclei run side by side.",
    ),
}
LYMPHOCYTES: dict[bool, tuple[str, ...]] = {
    True: (
        "There is a brisk lymphocytic infiltrate.",
        "Dense lymphocyte aggregates surround the tumour.",
        "The stroma is rich in lymphocytes.",
        "Tumour-infiltrating lymphocytes are brisk.",
    ),
    False: (
        "Lymphocytes are sparse.",
        "There is hardly any lymphocytic reaction.",
        "The stroma contains few inflammatory cells.",
        "An inflammatory response is absent.",
    ),
}
NECROSIS: dict[bool, tuple[str, ...]] = {
    True: (
        "Tumour necrosis is present.",
        "Areas of necrosis with granular debris are seen.",
        "Geographic necrosis is found.",
    ),
    False: ("No necrosis.", "Necrosis is absent.", "Necrosis is not identified."),
}
MUCIN: dict[bool, tuple[str, ...]] = {
    True: (
        "Pools of extracellular mucin are present.",
        "Mucin lakes are seen.",
        "Extracellular mucin is found focally.",
    ),
    False: ("No mucin.", "Mucin is not seen.", ""),
}
GRADES: dict[int, tuple[str, ...]] = {
    1: ("grade 1", "low grade", "well differentiated (G1)"),
    2: ("grade 2", "intermediate grade", "moderately differentiated (G2)"),
    3: ("grade 3", "high grade", "poorly differentiated (G3)"),
}
SITES = ("stomach, antrum", "stomach, body", "ascending colon", "sigmoid colon", "pancreas, head", "duodenum")
PROCEDURES = ("resection", "excision", "segmental resection", "wedge excision")
MARGINS = (
    "Margins are free of tumour.",
    "Resection margins negative.",
    "The closest margin is {gap} mm away.",
    "Tumour reaches the radial margin.",
)
REPORT_TEMPLATES: tuple[str, ...] = (
    "{Site}, {procedure}: {Name}, {grade}. {growth} {lymphocytes} {necrosis} {mucin} Extent {size} cm. {margins}",
    "DIAGNOSIS: {Name} of the {site}, {grade}, {size} cm. {margins} SEEN: {growth} {necrosis} {lymphocytes} {mucin}",
    "Procedure: {procedure}. Site: {site}. Type: {name}. Grade: {grade}. {size} cm. {margins} {lymphocytes} {growth}",
    "MICROSCOPY: {growth} {mucin} {necrosis} {lymphocytes} {margins} DIAGNOSIS: {Name}, {grade} ({site}, {size} cm).",
    "The {site} contains a tumour of {size} cm. {growth} {lymphocytes} {necrosis} {mucin} It is a {name}, {grade}.",
    "{lymphocytes} {necrosis} {mucin} {growth} {margins} CONCLUSION: {site}, {procedure}, {size} cm: {name}, {grade}.",
)


def write_report(traits: CaseTraits, *, seed: int) -> str:
    """Writes the report of a case; the same case and seed give the same text.

    Args:
        traits (`CaseTraits`): what the slides of the case show.
        seed (`int`): seed of the cohort.

    Returns:
        `str`: one paragraph of English.
    """
    rng = random_stream(seed, "report", traits.case_id)
    name, site = _pick(rng, SUBTYPES[traits.subtype]), _pick(rng, SITES)
    text = _pick(rng, REPORT_TEMPLATES).format(
        name=name,
        Name=name[0].upper() + name[1:],
        site=site,
        Site=site[0].upper() + site[1:],
        procedure=_pick(rng, PROCEDURES),
        grade=_pick(rng, GRADES[traits.nuclear_grade]),
        size=f"{rng.uniform(0.8, 6.5):.1f}",
        growth=_pick(rng, GROWTH[traits.subtype]),
        lymphocytes=_pick(rng, LYMPHOCYTES[traits.brisk_lymphocytes]),
        necrosis=_pick(rng, NECROSIS[traits.necrosis]),
        mucin=_pick(rng, MUCIN[traits.mucin]),
        margins=_pick(rng, MARGINS).format(gap=int(rng.integers(2, 15))),
    )
    return " ".join(text.split())  # an optional sentence that was left out leaves two spaces


def _pick(rng: np.random.Generator, options: tuple[str, ...]) -> str:
    return options[int(rng.integers(len(options)))]
