# SPDX-License-Identifier: Apache-2.0
"""Tissue masks that others drew, from files: GeoJSON (see `mask_geojson`), PNG, JPEG, TIFF.

Headers are looked at before anything is read, so that a huge or hostile file costs nothing.
"""

import stat
import warnings
from pathlib import Path

import numpy as np

from modeling_dre_slcl.slide_info import SlideInfo

from .mask_geojson import frame_origin, read_mask_geojson

try:
    import cv2
except ImportError:
    cv2 = None
try:
    import PIL.Image
except ImportError:
    PIL = None

GEOJSON_SUFFIXES = (".geojson", ".json")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff")
# Lists of nothing take twenty times their text in memory.
_MAX_GEOJSON_BYTES = 32 << 20
_MAX_IMAGE_BYTES = 256 << 20
_MAX_IMAGE_PX, _MAX_IMAGE_SIDE_PX = 1 << 26, 32_000
_MAX_ASPECT_ERROR = 0.02


def find_mask_file(folder: str | Path, slide_id: str) -> Path | None:
    """Finds the mask of a slide in a folder: `<slide_id>` and a suffix that `read_mask` reads.

    Args:
        folder (`str` or `Path`): the folder.
        slide_id (`str`): the slide.

    Returns:
        `Path` or `None`: the file, if there is one.

    Raises:
        ValueError: if there are several.
    """
    candidates = (Path(folder) / f"{slide_id}{suffix}" for suffix in (*GEOJSON_SUFFIXES, *IMAGE_SUFFIXES))
    found = [path for path in candidates if path.exists()]
    if len(found) > 1:
        raise ValueError(f"{folder}: expected one mask of {slide_id}, found {', '.join(path.name for path in found)}.")
    return found[0] if found else None


def read_mask(
    path: str | Path, *, info: SlideInfo, shape: tuple[int, int], downsample: float, frame: str = "qupath"
) -> np.ndarray:
    """Reads a tissue mask that was drawn elsewhere.

    GeoJSON: a geometry, Feature, FeatureCollection or list of these. Polygons, MultiPolygons and GeometryCollections
    are tissue, whatever their class, but those of `EXCLUDED_CLASSES`, which are cut out. Points, lines, and QuPath's
    detections, cells and tiles are passed over. A collection without any feature means no tissue.

    Images: tissue where the largest channel is above 127, or, in PNG and TIFF without any such pixel (label images),
    above 0; of images with a palette the index counts; where an image is transparent there is none. It shows the
    whole frame (`qupath`: the scanned area; `canvas`: OpenSlide's canvas) at any size, its aspect ratio within 2%.

    Args:
        path (`str` or `Path`): the file; its suffix says what it is.
        info (`SlideInfo`): the slide.
        shape (`tuple[int, int]`): rows and columns of the mask, which covers the slide's bounds.
        downsample (`float`): level-0 pixels per pixel of the mask.
        frame (`str`, defaults to `"qupath"`): one of `MASK_FRAMES`; GeoJSON that says its frame is read in that.

    Returns:
        `np.ndarray` of shape `shape`, bool: True where there is tissue.

    Raises:
        ValueError: if the file can not be used; the message names it and says how to mend it.
        ImportError: if Pillow or OpenCV is not installed and the file is an image.
    """
    path = Path(path)
    frame_origin(frame, info.bounds)
    suffix = path.suffix.lower()
    if suffix in GEOJSON_SUFFIXES:
        _check_file(path, _MAX_GEOJSON_BYTES)
        return read_mask_geojson(path, info=info, shape=shape, downsample=downsample, frame=frame)
    if suffix in IMAGE_SUFFIXES:
        _check_file(path, _MAX_IMAGE_BYTES)
        return _read_image(path, info, shape, downsample, frame)
    raise ValueError(f"{path}: expected a mask ending in {', '.join((*GEOJSON_SUFFIXES, *IMAGE_SUFFIXES))}.")


def _check_file(path: Path, max_bytes: int) -> None:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: expected a mask file ({error}).") from error
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path}: expected a regular file.")
    if status.st_size > max_bytes:
        raise ValueError(
            f"{path}: {status.st_size} bytes; masks of at most {max_bytes >> 20} MiB are read. Simplify or reduce it."
        )


def _read_image(path: Path, info: SlideInfo, shape: tuple[int, int], downsample: float, frame: str) -> np.ndarray:
    if cv2 is None or PIL is None:
        raise ImportError("Reading mask images needs Pillow and OpenCV: pip install pillow opencv-python-headless")
    size = info.bounds[2:] if frame == "qupath" else (info.width_px, info.height_px)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PIL.Image.DecompressionBombWarning)  # our own limit is lower
            image = PIL.Image.open(path, formats=("PNG", "JPEG", "TIFF"))
        with image:
            _check_image_size(image.size, size, frame)
            values = _image_values(image)
            threshold = 127 if image.format == "JPEG" or (values > 127).any() else 0
    except (OSError, SyntaxError, ValueError, MemoryError, PIL.Image.DecompressionBombError) as error:
        raise ValueError(
            f"{path}: can not be used as a mask image of this slide: {str(error).rstrip('.')}."
        ) from error
    mask = (values > threshold).astype(np.uint8) * 255
    offset = np.array(info.bounds[:2]) - frame_origin(frame, info.bounds)
    return _resample(mask, np.array(size), offset, shape, downsample)


def _check_image_size(size: tuple[int, int], slide_size: tuple[int, int], frame: str) -> None:
    """Checks an image's width and height, as its header says, against those of the frame."""
    (width, height), (slide_width, slide_height) = size, slide_size
    if width * height > _MAX_IMAGE_PX or max(size) > _MAX_IMAGE_SIDE_PX:
        raise ValueError(
            f"{width} x {height} px; at most {_MAX_IMAGE_PX} px and {_MAX_IMAGE_SIDE_PX} a side are read. Reduce it: "
            "a pixel of 4 to 8 um is fine enough"
        )
    # Rounding of the size to whole pixels is no error.
    if abs(width - height * slide_width / slide_height) > max(_MAX_ASPECT_ERROR * width, 1):
        raise ValueError(
            f"{width} x {height} px have another aspect ratio than the slide's {slide_width} x {slide_height} px "
            f"(frame {frame!r}). The image must show the whole slide, not turned"
        )


def _image_values(image: "PIL.Image.Image") -> np.ndarray:
    """The largest channel, or index, of each pixel, 0 where transparent; integers (h, w)."""
    if image.mode == "F":
        raise ValueError("it holds fractions; expected whole numbers, 0 for no tissue")
    if image.mode in ("1", "L", "P") or image.mode.startswith("I"):
        return np.asarray(image)
    pixels = np.asarray(image.convert("RGBA" if "A" in image.mode else "RGB"))
    values = pixels[..., :3].max(axis=2)
    return values if pixels.shape[2] == 3 else np.where(pixels[..., 3] > 0, values, 0)


def _resample(
    mask: np.ndarray, frame_size: np.ndarray, offset: np.ndarray, shape: tuple[int, int], downsample: float
) -> np.ndarray:
    """Brings a mask of 0 and 255, uint8 (H, W), that shows a frame to the pixels of a mask of the bounds, bool.

    `frame_size` and `offset`, the bounds' corner in the frame, are (x, y) in level-0 pixels.
    """
    if min(frame_size / mask.shape[::-1]) < downsample:
        reduced = np.clip(np.rint(frame_size / downsample).astype(int), 1, mask.shape[::-1])
        mask = cv2.resize(mask, reduced.tolist(), interpolation=cv2.INTER_AREA)
    pixel = frame_size / mask.shape[::-1]
    # Where the centre of a pixel of the result lies in `mask`, whose pixel centres are whole numbers.
    scale, shift = downsample / pixel, (0.5 * downsample + offset) / pixel - 0.5
    matrix = np.array([[scale[0], 0, shift[0]], [0, scale[1], shift[1]]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(mask, matrix, shape[::-1], flags=flags, borderMode=cv2.BORDER_REPLICATE) > 127
