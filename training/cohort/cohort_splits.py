# SPDX-License-Identifier: Apache-2.0
"""Cases -> train, val and test, whole cases or whole sites at a time, by the seed and the names alone."""

import hashlib
from collections.abc import Mapping

SPLIT_UNITS = ("case", "site")


def split_cases(
    site_of_case: Mapping[str, str],
    *,
    val_fraction: float = 0.0,
    test_fraction: float = 0.2,
    unit: str = "case",
    seed: int = 0,
) -> dict[str, str]:
    """Divides cases; with `unit="site"` all cases of a hospital go together, so that its stain cannot give them away.

    Cases or sites come in the order of a hash of (seed, name), and fill the test split, then the validation split, to
    their share of the cases. Sites are not cut, so that shares are kept as far as sites allow.

    Args:
        site_of_case (`Mapping[str, str]`): case -> collecting site.
        val_fraction (`float`, *optional*, defaults to 0.0): share of the cases for validation.
        test_fraction (`float`, *optional*, defaults to 0.2): share of the cases for testing.
        unit (`str`, *optional*, defaults to "case"): "case" or "site".
        seed (`int`, *optional*, defaults to 0): another seed draws others.

    Returns:
        `dict[str, str]`: case -> "train", "val" or "test".

    Raises:
        ValueError: if shares are out of range, or cases or sites are too few to give every split one.
    """
    if not (0 <= val_fraction < 1 and 0 <= test_fraction < 1 and val_fraction + test_fraction < 1):
        raise ValueError(
            f"val_fraction={val_fraction} and test_fraction={test_fraction}: expected shares from 0 to below 1 that "
            "leave a part for training."
        )
    if unit not in SPLIT_UNITS:
        raise ValueError(f"unit={unit!r}: expected one of {', '.join(SPLIT_UNITS)}.")
    groups: dict[str, list[str]] = {}
    for case, site in site_of_case.items():
        groups.setdefault(site if unit == "site" else case, []).append(case)
    order = sorted(groups, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())
    split_of: dict[str, str] = {}
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        wanted = fraction * len(site_of_case)
        taken = 0
        # A site is taken if that brings the share nearer; the first always, so that no split stays empty.
        while order and fraction and (taken == 0 or taken + len(groups[order[0]]) / 2 <= wanted):
            cases = groups[order.pop(0)]
            split_of.update(dict.fromkeys(cases, split))
            taken += len(cases)
    if site_of_case and not order:
        raise ValueError(f"{len(groups)} {unit}s are too few for these splits: none would be left for training.")
    return {case: split_of.get(case, "train") for case in site_of_case}
