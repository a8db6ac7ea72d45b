"""Photographs as class folders, and what torchvision makes of them, for DALI's pixels."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.datasets.folder import default_loader
from torchvision.transforms.v2 import functional

from fastshift import data as fsdata

# Of 255 levels, against torchvision's decoder, antialiased bilinear resize and colours.
MEAN_LEVELS, P99_LEVELS = 2.0, 8.0
CHANGES = functional.adjust_brightness, functional.adjust_contrast, functional.adjust_saturation
SIZE = 48


def write(root):
    """Write three classes of photographs: 48 to train and 17 to test, few of them alike."""
    photographs = load_sample_images().images
    rng = np.random.default_rng(0)
    for part, num in (("train", 48), ("val", 17)):
        for index in range(num):
            height, width = rng.integers(60, 240, size=2)
            if index == 4:
                height, width = 61, 243  # so wide that crops seldom fit
            top, left = rng.integers(427 - height), rng.integers(640 - width)
            pixels = photographs[index % 2][top : top + height, left : left + width]
            file = root / part / ("ant", "bee", "cat")[index % 3] / f"{index:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(pixels)
            if index == 3:
                image = image.convert("L")
            exif = Image.Exif()
            if index == 6:
                exif[0x0112] = 6  # an orientation, which image folders do not follow
            image.save(file, quality=int(rng.integers(75, 96)), exif=exif)
            if index == 8:
                image.save(file.with_suffix(".png"))
                file.unlink()


def load(folder, spec="dali", **options):
    options = {"image_size": SIZE, "batch_size": 8, "seed": 5, "validation_size": 14} | options
    options = {"device": "cpu"} | options
    return fsdata.load(f"{spec}:{folder}", validation_batch_size=5, **options)


def levels(data, images):
    """Undo the normalisation: `[N, 3, S, S]` of 0 to 255."""
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (data.mean, data.std))
    return 255 * (images * std + mean)


def assert_close(left, right):
    """Compare images by their levels, each image by itself."""
    assert left.shape == right.shape
    for one, other in zip(left, right, strict=True):
        apart = (one.double() - other.double()).abs().flatten()
        assert apart.mean() <= MEAN_LEVELS
        assert apart.quantile(0.99) <= P99_LEVELS


def by_torchvision(request):
    """Make the images of a request with torchvision, colours aside."""
    images = []
    for file, window, flip in zip(request.files, request.windows, request.flips, strict=True):
        image = functional.pil_to_tensor(default_loader(file))
        image = functional.resized_crop(image, *window.tolist(), [SIZE, SIZE], antialias=True)
        images.append(image.flip(-1) if flip else image)
    return torch.stack(images)


def recolored(images, colors):
    """Change the colours of bytes, or of floats up to 255, with torchvision, in our order."""
    most = 255 if images.is_floating_point() else 1
    found = []
    for image, factors in zip(images, colors, strict=True):
        image = image / most if most > 1 else image
        for change, factor in zip(CHANGES, factors, strict=True):
            image = change(image, float(factor))
        found.append(image * most)
    return torch.stack(found)
