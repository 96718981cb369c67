# SPDX-License-Identifier: Apache-2.0
"""How a tile feature is stored in the memory bank, such that float64 sums of stored features are exact.

A sum of multiples of 2^-g is exact in float64 as long as it stays below 2^(53 - g): such numbers are integers of at
most 53 bits in units of 2^-g. So every stored number is a multiple of 2^-g, whatever its type:

| type | g | why | tiles of a slide at |x| <= 16, at unit features |
| --- | --- | --- | --- |
| float16 | 24 | its smallest number is 2^-24, all others are multiples | 2^25, 2^29 |
| bfloat16 | 24 | rounded to such multiples, which changes only numbers below 2^-17 | 2^25, 2^29 |
| int8 | 24 | a whole number times a float16 scale of the tile | 2^25, 2^29 |
| float32 | 29 | rounded to such multiples: an error of at most 2^-30 | 2^20, 2^24 |

Letters: n tiles, D feature width.
"""

import torch

STORAGE_DTYPES = {name: getattr(torch, name) for name in ("float16", "bfloat16", "int8", "float32")}
# Features are L2-normalised; the limit leaves room and keeps the sums of the largest slides exact.
FEATURE_LIMIT = 16.0
_GRID_BITS = {torch.float16: 24, torch.bfloat16: 24, torch.int8: 24, torch.float32: 29}
_EXACT_BITS = 53
_INT8_MAX = 127
_SMALLEST_SCALE = 2.0**-24


def max_tiles_per_slide(dtype: torch.dtype) -> int:
    """Returns how many stored features of at most `FEATURE_LIMIT` have an exact float64 sum.

    Raises:
        ValueError: if features cannot be stored in this type.
    """
    if dtype not in _GRID_BITS:
        raise ValueError(f"The memory bank stores {', '.join(STORAGE_DTYPES)}, not {dtype}.")
    return int(2 ** (_EXACT_BITS - _GRID_BITS[dtype]) / FEATURE_LIMIT)


def scales_per_tile(dtype: torch.dtype) -> int:
    """Returns how many float16 scales a stored tile has: one for int8, none for other types."""
    return int(dtype == torch.int8)


def encode_features(features: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds features to what is stored of them.

    Args:
        features (`torch.Tensor` of shape `(n, D)`, float32): finite, within `FEATURE_LIMIT`.
        dtype (`torch.dtype`): a type of `STORAGE_DTYPES`.

    Returns:
        `tuple`: numbers of shape `(n, D)` and `dtype`, and their scales of shape `(n, scales_per_tile(dtype))`,
        float16.
    """
    if dtype == torch.int8:
        scales = (features.abs().amax(dim=1, keepdim=True) / _INT8_MAX).half().clamp(min=_SMALLEST_SCALE)
        numbers = (features / scales.float()).round().clamp(-_INT8_MAX, _INT8_MAX)
        return numbers.to(torch.int8), scales
    numbers = features.to(dtype)
    if dtype != torch.float16:
        unit = 2.0 ** _GRID_BITS[dtype]
        numbers = ((numbers.float() * unit).round() / unit).to(dtype)
    return numbers, features.new_empty((len(features), 0), dtype=torch.float16)


def decode_features(numbers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Returns the features that stored numbers stand for, without rounding.

    Args:
        numbers (`torch.Tensor` of shape `(n, D)`): from `encode_features`.
        scales (`torch.Tensor` of shape `(n, 0 or 1)`, float16): from `encode_features`.

    Returns:
        `torch.Tensor` of shape `(n, D)`, float32. A whole number of 8 bits times a scale of 11 is exact in float32.
    """
    return numbers.float() * scales.float() if scales.shape[1] else numbers.float()
