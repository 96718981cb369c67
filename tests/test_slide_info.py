# SPDX-License-Identifier: Apache-2.0
"""The rules by which sizes and text properties of a slide are judged."""

from pathlib import Path

import pytest

from modeling_dre_slcl.slide_info import SlideError, make_slide_info


def make_info(**changes):
    arguments = {
        "level_sizes": ((1000, 800),),
        "level_downsamples": (1.0,),
        "properties": {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5"},
        **changes,
    }
    arguments["properties"] = {"openslide.mpp-x": "0.5", "openslide.mpp-y": "0.5", **arguments["properties"]}
    return make_slide_info("a", Path("a.svs"), **arguments)


def test_nearly_square_pixels_are_averaged_and_others_refused():
    assert make_info(properties={"openslide.mpp-y": "0.52"}).mpp == pytest.approx(0.51)
    with pytest.raises(SlideError, match=r"mpp-x of 0\.5 and mpp-y of 0\.55"):
        make_info(properties={"openslide.mpp-y": "0.55"})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"level_sizes": ((2**20 + 1, 5),)}, "too_large"),
        ({"level_sizes": ((2**20, 2**20),)}, "too_large"),
        ({"level_sizes": ((64, 64),) * 33}, "too_large"),
        ({"level_sizes": ((0, 64),)}, "unreadable"),
        (
            {"properties": {f"openslide.level[0].tile-{side}": "65520" for side in ("width", "height")}},
            "too_large",
        ),
    ],
)
def test_limits(changes, reason):
    with pytest.raises(SlideError) as caught:
        make_info(**changes)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        (("10", "20", "100", "200"), (10, 20, 100, 200)),
        (("-10", "20", "100", "5000"), (0, 20, 90, 780)),
        (("2000", "0", "10", "10"), (0, 0, 1000, 800)),
        (("x", "0", "10", "10"), (0, 0, 1000, 800)),
    ],
)
def test_bounds_are_cut_to_the_canvas(bounds, expected):
    names = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    assert make_info(properties=dict(zip(names, bounds, strict=True))).bounds == expected


def test_background_colour():
    assert make_info(properties={"openslide.background-color": "F0E1d2"}).background_rgb == (0xF0, 0xE1, 0xD2)
    assert make_info(properties={"openslide.background-color": "red"}).background_rgb == (255, 255, 255)
