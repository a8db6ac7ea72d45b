"""Random numbers and image sizes -> windows, flips and changes of colours."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fastshift.data.dali_reader import COLORS, Request

__all__ = ["ResizedCrop"]

RATIO = 4 / 3  # widest window, width over height; the inverse is the narrowest
TRIES = 10


@dataclass(frozen=True)
class ResizedCrop:
    """A random window of the whole image, a flip for half of the images, a change of colours.

    Windows are drawn as Inception's: a share of the area, uniform from `area` to 1, and an aspect
    ratio from 3/4 to 4/3, its logarithm uniform; the first of ten draws that fits in the image,
    else the largest middle part within those ratios.

    Attributes:
        area: smallest share.
        flip: whether images are flipped.
        color_jitter: how far from 1 the factors of brightness, contrast and saturation go.
    """

    area: float
    flip: bool
    color_jitter: float

    def describe(self) -> dict[str, object]:
        """Return what it does, ready for JSON."""
        return {
            "crop_padding": 0,
            "crop_area": self.area,
            "flip": self.flip,
            "color_jitter": self.color_jitter,
        }

    def draw(self, num: int, rng: np.random.Generator) -> np.ndarray:
        """Return the random numbers of `num` images, a column each, uniform in [0, 1)."""
        return rng.random((2 * TRIES + 3 + len(COLORS), num))

    def request(self, files: list[Path], sizes: np.ndarray, draws: np.ndarray) -> Request:
        """Turn draws into a request.

        Args:
            files: of the images, N of them.
            sizes: their heights and widths in pixels, `[N, 2]`.
            draws: N columns of `draw`.
        """
        windows = self._windows(sizes, draws[: 2 * TRIES + 2])
        flips = (draws[2 * TRIES + 2] < 0.5) & self.flip
        colors = 1 + self.color_jitter * (2 * draws[2 * TRIES + 3 :].T - 1)
        return Request(files, windows, flips, colors)

    def _windows(self, sizes: np.ndarray, draws: np.ndarray) -> np.ndarray:
        """Return top, left, height and width, `[N, 4]` int64."""
        height, width = sizes.T
        areas = (self.area + (1 - self.area) * draws[:TRIES]) * height * width
        ratios = RATIO ** (2 * draws[TRIES : 2 * TRIES] - 1)
        heights = np.rint(np.sqrt(areas / ratios)).astype(np.int64)
        widths = np.rint(np.sqrt(areas * ratios)).astype(np.int64)
        fits = (heights > 0) & (heights <= height) & (widths > 0) & (widths <= width)
        first = fits.argmax(axis=0), np.arange(len(sizes))
        is_drawn = fits.any(axis=0)
        # no draw fits in an image far from square: its longer side is cut
        cut_height = np.minimum(height, np.rint(width * RATIO).astype(np.int64))
        cut_width = np.minimum(width, np.rint(height * RATIO).astype(np.int64))
        window_height = np.where(is_drawn, heights[first], cut_height)
        window_width = np.where(is_drawn, widths[first], cut_width)
        free = np.stack([height - window_height, width - window_width])
        place = np.where(is_drawn, draws[2 * TRIES :] * (free + 1), free / 2).astype(np.int64)
        return np.stack([*place, window_height, window_width], axis=1)
