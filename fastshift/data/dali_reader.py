"""Requests of batches in, images decoded by NVIDIA DALI out: the one place that knows DALI's API.

Nothing in the pipeline is random and nothing is carried from one request to the next, so an image
depends on its file, window, flip and colours alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastshift.data.batches import Normalisation
from fastshift.data.image_folder import open_image
from fastshift.errors import DataError, missing_extra

__all__ = ["COLORS", "Reader", "Request", "check_installed", "placement"]

COLORS = ("brightness", "contrast", "saturation")  # in the order in which they change


@dataclass(frozen=True)
class Request:
    """What a batch of images is made of.

    Attributes:
        files: paths of the image files, N of them.
        windows: top, left, height and width of the part that is taken of each, pixels, `[N, 4]`.
        flips: whether that part is flipped, `[N]` bool.
        colors: factors of its `COLORS`, `[N, 3]`; read only where the reader changes colours.
    """

    files: list[Path]
    windows: np.ndarray
    flips: np.ndarray
    colors: np.ndarray

    def alone(self, index: int) -> Request:
        """Return the request of one image of the batch."""
        row = slice(index, index + 1)
        return Request(self.files[row], self.windows[row], self.flips[row], self.colors[row])


def check_installed() -> None:
    """Raise `MissingExtraError` unless DALI can be imported."""
    try:
        import nvidia.dali  # noqa: F401
    except ImportError as error:
        raise missing_extra("nvidia.dali", "dali") from error


def placement(device: torch.device) -> tuple[str, str]:
    """Return where DALI decodes and where it computes the rest, for batches on `device`."""
    return ("mixed", "gpu") if device.type == "cuda" else ("cpu", "cpu")


class Reader:
    """A pipeline that decodes the batch it is asked for, and begins on the one expected next.

    Args:
        image_size: side that windows are scaled to, pixels (bilinear, antialiased).
        device: where the images are decoded and stay.
        normalise: applied last; None gives the pixels as they are.
        has_colors: whether requests change colours.
    """

    def __init__(
        self,
        image_size: int,
        device: torch.device,
        normalise: Normalisation | None = None,
        *,
        has_colors: bool = False,
    ) -> None:
        self.image_size = image_size
        self.device = device
        self.normalise = normalise
        self.has_colors = has_colors
        self._pipe: Any = None
        self._batch_size = 0
        self._begun: tuple[Hashable, Request] | None = None

    def read(
        self,
        wanted: Hashable,
        request_of: Callable[[Any], Request],
        following: Hashable | None = None,
    ) -> Tensor:
        """Decode a batch, and begin to decode another while the caller works on it.

        Args:
            wanted: the key of the batch.
            request_of: gives the request of a key, the same every time.
            following: the key that will probably be wanted next; any other costs its decoding.

        Returns:
            `[N, 3, S, S]`, channels last, memory of its own: float32, uint8 without `normalise`.

        Raises:
            DataError: a file is not an image that DALI decodes; the message names it.
        """
        if self._begun is not None and self._begun[0] != wanted:
            self._discard()
        if self._begun is None:
            self._begin(wanted, request_of(wanted))
        images = self._finish()
        if following is not None:
            self._begin(following, request_of(following))
        return images

    def close(self) -> None:
        """Let go of the pipeline, its threads and what it was decoding."""
        self._pipe = self._begun = None
        self._batch_size = 0

    def _begin(self, key: Hashable, request: Request) -> None:
        num = len(request.files)
        if num > self._batch_size:
            self._pipe, self._batch_size = self._build(num), num
        feed = self._pipe.feed_input
        feed("files", [np.frombuffer(os.fsencode(file), np.uint8) for file in request.files])
        feed("start", np.ascontiguousarray(request.windows[:, :2], np.int32))
        feed("shape", np.ascontiguousarray(request.windows[:, 2:], np.int32))
        if self.normalise is not None:
            feed("flip", request.flips.astype(np.int32))
        if self.has_colors:
            for name, factors in zip(COLORS, request.colors.T, strict=True):
                feed(name, np.ascontiguousarray(factors, np.float32))
        self._pipe.schedule_run()
        self._begun = key, request

    def _finish(self) -> Tensor:
        assert self._begun is not None
        _, request = self._begun
        # bound to the stream that will read it, its memory is not reused before that has happened
        is_cuda = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device) if is_cuda else None
        try:
            [images] = self._pipe.share_outputs(stream)
        except RuntimeError:
            self.close()
            self._blame(request)
            raise
        pixels = torch.from_dlpack(images.as_tensor())
        self._pipe.release_outputs()
        self._begun = None
        return pixels.permute(0, 3, 1, 2)

    def _discard(self) -> None:
        try:
            self._pipe.share_outputs()
            self._pipe.release_outputs()
            self._begun = None
        except RuntimeError:  # of a batch that nobody asked for; whoever does will be told
            self.close()

    def _blame(self, request: Request) -> None:
        """Raise `DataError` for the first file of a request that cannot be decoded by itself."""
        for index, file in enumerate(request.files):
            alone = Reader(self.image_size, self.device, self.normalise, has_colors=self.has_colors)
            alone._begin(None, request.alone(index))
            try:
                alone._pipe.share_outputs()
            except RuntimeError as error:
                with open_image(file) as image:
                    image.load()
                raise DataError(f"{file}: an image that DALI cannot decode") from error

    def _build(self, batch_size: int) -> Any:
        from nvidia.dali import Pipeline

        device_id = None
        if self.device.type == "cuda":
            index = self.device.index
            device_id = torch.cuda.current_device() if index is None else index
        pipe = Pipeline(
            batch_size=batch_size,
            num_threads=torch.get_num_threads(),
            device_id=device_id,
            seed=0,
            prefetch_queue_depth=1,
        )
        with pipe:
            pipe.set_outputs(self._graph())
        pipe.build()
        return pipe

    def _graph(self) -> Any:
        """Define the pipeline: files, windows, flips and colours in, `[S, S, 3]` images out."""
        from nvidia.dali import fn, types

        def given(name: str, dtype: Any, ndim: int) -> Any:
            return fn.external_source(name=name, dtype=dtype, ndim=ndim)

        decode_on, _ = placement(self.device)
        images = fn.decoders.image_slice(
            fn.io.file.read(given("files", types.UINT8, 1)),
            device=decode_on,
            output_type=types.RGB,
            axes=[0, 1],
            start=given("start", types.INT32, 1),
            shape=given("shape", types.INT32, 1),
            adjust_orientation=False,  # as image folders are read
            jpeg_fancy_upsampling=True,  # the GPU's chroma as the CPU's
            # the hardware decoder takes a share of a batch, and its pixels differ: without it an
            # image does not depend on the batch it is in
            hw_decoder_load=0.0,
        )
        images = fn.resize(
            images,
            size=[self.image_size, self.image_size],
            interp_type=types.INTERP_LINEAR,
            antialias=True,
        )
        if self.has_colors:
            images = _recolored(images, *(given(name, types.FLOAT, 0) for name in COLORS))
        if self.normalise is None:
            return images
        return fn.crop_mirror_normalize(
            images,
            mirror=given("flip", types.INT32, 0),
            mean=[255 * mean for mean in self.normalise.mean],
            std=[255 * std for std in self.normalise.std],
            dtype=types.FLOAT,
            output_layout="HWC",
        )


def _recolored(images: Any, brightness: Any, contrast: Any, saturation: Any) -> Any:
    """Multiply `[S, S, 3]`, its distance from its mean grey, and that from each pixel's own grey.

    Values are rounded and kept within 0 to 255 after each, as torchvision's functions do it.
    """
    from nvidia.dali import fn, types

    images = fn.brightness(images, brightness=brightness)
    greys = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
    # what an operator takes besides its input is read on the CPU, wherever it computes
    mean = fn.reductions.mean(greys, dtype=types.FLOAT).cpu()
    images = fn.contrast(images, contrast=contrast, contrast_center=mean)
    return fn.saturation(images, saturation=saturation)
