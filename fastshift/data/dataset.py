"""A training and a test source -> `Data`: the batches every part of a run draws from."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastshift.data.batches import FixedBatches, Normalisation, Source, TrainBatches
from fastshift.data.options import Options, check_at_least
from fastshift.data.splits import check_classes, keep_classes, stratified
from fastshift.errors import DataError

__all__ = ["Data", "assemble"]

SAMPLE = 2048  # images on disk that mean and standard deviation are taken from
CHUNK = 1024  # images counted at a time


@dataclass(frozen=True)
class Data:
    """A data set cut into the parts of a search.

    Attributes:
        train: the training part, an endless stream (`TrainBatches.batch`), one epoch if iterated.
        validation: the scoring set: stratified, held out of the training set, the same every time.
        calibration: stratified batches of the training part, for batch-norm statistics.
        test: the test set; never used in a search. None where there is none.
        num_classes: classes, numbered from 0.
        in_channels: 1 or 3.
        image_size: side of an image, in pixels.
        class_names: a name per class, or None.
        spec: where the data come from.
        seed: what fixes the training stream.
        split_seed: what fixed the held-out parts.
        digest: sha256 over the images and labels of training and test set, before the hold-out.
        normalisation: mean and standard deviation of the training part, per channel, of 0..1.
    """

    train: TrainBatches
    validation: FixedBatches
    calibration: FixedBatches
    test: FixedBatches | None
    num_classes: int
    in_channels: int
    image_size: int
    class_names: tuple[str, ...] | None
    spec: str
    seed: int
    split_seed: int
    digest: str
    normalisation: Normalisation

    @property
    def mean(self) -> tuple[float, ...]:
        """Mean of the training part per channel, pixels scaled to 0..1."""
        return self.normalisation.mean

    @property
    def std(self) -> tuple[float, ...]:
        """Standard deviation of the training part per channel, pixels scaled to 0..1."""
        return self.normalisation.std

    def describe(self) -> dict[str, object]:
        """Return counts, normalisation and a digest of the contents, ready for JSON."""
        return {
            "spec": self.spec,
            "seed": self.seed,
            "split_seed": self.split_seed,
            "num_classes": self.num_classes,
            "class_names": None if self.class_names is None else list(self.class_names),
            "in_channels": self.in_channels,
            "image_size": self.image_size,
            "train_images": self.train.num_images,
            "validation_images": self.validation.num_images,
            "calibration_images": self.calibration.num_images,
            "test_images": 0 if self.test is None else self.test.num_images,
            "batch_size": self.train.batch_size,
            "validation_batch_size": self.validation.batch_size,
            "calibration_batch_size": self.calibration.batch_size,
            **self.train.describe(),
            "mean": list(self.mean),
            "std": list(self.std),
            "digest": self.digest,
        }


def assemble(
    train: Source,
    test: Source | None,
    options: Options,
    *,
    spec: str,
    class_names: Sequence[str] | None = None,
    flip: bool = True,
) -> Data:
    """Check the labels, hold images out, measure the normalisation and build the batches.

    Args:
        train: the training set, from which the scoring set is held out.
        test: the test set, or None.
        options: the caller's choices.
        spec: name of the data set, for records.
        class_names: a name per label of `train`, before `options.classes` selects among them.
        flip: whether images of this kind may be flipped, where `options.flip` does not say.

    Returns:
        The data set.

    Raises:
        DataError: the labels or the options cannot be used.
    """
    if test is not None:
        _check_same_shape(train, test)
    if class_names is not None and len(class_names) <= train.labels.max(initial=-1):
        raise DataError(
            f"class_names: {len(class_names)} names, expected {train.labels.max() + 1}, one a label"
        )
    if options.classes is not None:
        train, test, class_names = _with_classes(train, test, class_names, options.classes)
    num_classes = check_classes(train.labels, None if test is None else test.labels)
    digests = [train.digest(), "" if test is None else test.digest()]
    if options.limit is not None:
        train = _limited(train, options.limit, num_classes, options.split_seed)
    num_bytes = train.num_bytes + (0 if test is None else test.num_bytes)
    if num_bytes <= options.max_memory_bytes:
        train, test = train.in_memory(), None if test is None else test.in_memory()
    held, rest = _hold_out(train.labels, num_classes, options)
    chosen, calibration_batch_size = _calibration(train.labels[rest], options)
    normalise = _measure(train, rest)

    def fixed(source: Source, positions: np.ndarray, batch_size: int) -> FixedBatches:
        return source.fixed_batches(
            positions,
            batch_size=batch_size,
            normalise=normalise,
            cache_bytes=options.max_memory_bytes // 4,
        )

    return Data(
        train=train.train_batches(
            rest,
            options=options,
            normalise=normalise,
            flip=flip if options.flip is None else options.flip,
        ),
        validation=fixed(train, held, options.validation_batch_size),
        calibration=fixed(train, rest[chosen], calibration_batch_size),
        test=None
        if test is None
        else fixed(test, np.arange(len(test.labels)), options.validation_batch_size),
        num_classes=num_classes,
        in_channels=train.in_channels,
        image_size=train.image_size,
        class_names=None if class_names is None else tuple(class_names),
        spec=spec,
        seed=options.seed,
        split_seed=options.split_seed,
        digest=hashlib.sha256(" ".join(digests).encode()).hexdigest(),
        normalisation=normalise,
    )


def _check_same_shape(train: Source, test: Source) -> None:
    shapes = [(s.image_size, s.image_size, s.in_channels) for s in (train, test)]
    if shapes[0] != shapes[1]:
        raise DataError(
            f"test images: {'x'.join(map(str, shapes[1]))}, "
            f"expected {'x'.join(map(str, shapes[0]))} as in training"
        )


def _with_classes(
    train: Source,
    test: Source | None,
    class_names: Sequence[str] | None,
    classes: Sequence[int],
) -> tuple[Source, Source | None, Sequence[str] | None]:
    """Return the images and the names of some classes, relabelled in the order given."""
    absent = sorted(set(classes) - set(train.labels.tolist()))
    if absent:
        raise DataError(f"classes={list(classes)}: label {absent[0]} has no training image")
    train = train.subset(*keep_classes(train.labels, classes))
    if test is not None:
        test = test.subset(*keep_classes(test.labels, classes))
    if class_names is not None:
        class_names = [class_names[label] for label in classes]
    return train, test, class_names


def _limited(train: Source, limit: int, num_classes: int, seed: int) -> Source:
    if limit >= len(train.labels):
        return train
    if limit < 2 * num_classes:
        raise DataError(
            f"limit={limit}: expected at least {2 * num_classes}, two images of each class"
        )
    rng = np.random.default_rng((seed, 3))
    positions = np.sort(stratified(train.labels, limit, rng, at_least=2))
    return train.subset(positions, train.labels[positions])


def _hold_out(
    labels: np.ndarray, num_classes: int, options: Options
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of the scoring set and those of the training part."""
    num, asked = len(labels), options.validation_size
    if asked is None:
        # a tenth, but where that is under 1,000 images up to a quarter: scores need resolution
        size = max(num_classes, min(max(num // 10, min(1000, num // 4)), 5000))
    elif isinstance(asked, float) and 0 < asked < 1:
        size = round(asked * num)
    else:
        size = check_at_least("validation_size", asked, 1)
    if not num_classes <= size <= num - num_classes:
        raise DataError(
            f"validation_size={asked}: {size} of {num} images, expected {num_classes} to "
            f"{num - num_classes} (each class stays in both parts)"
        )
    rng = np.random.default_rng((options.split_seed, 1))
    held = stratified(labels, size, rng, at_least=1, spare=1)
    is_held = np.zeros(num, dtype=bool)
    is_held[held] = True
    return held, np.flatnonzero(~is_held)


def _calibration(labels: np.ndarray, options: Options) -> tuple[np.ndarray, int]:
    """Return positions within the training part and the size of a calibration batch.

    Eight batches of 128, fewer or smaller ones where the training part is too small; what the
    caller asked for by number is never cut.
    """
    num = len(labels)
    batch_size = options.calibration_batch_size or min(128, num)
    batches = options.calibration_batches or max(1, min(8, num // batch_size))
    if batch_size * batches > num:
        raise DataError(
            f"calibration_batches={batches} of {batch_size} images: expected at most {num} images, "
            f"the training part"
        )
    rng = np.random.default_rng((options.split_seed, 2))
    return stratified(labels, batches * batch_size, rng), batch_size


def _measure(source: Source, positions: np.ndarray) -> Normalisation:
    """Return mean and standard deviation per channel: exact, or of a sample of images on disk."""
    if not source.is_in_memory and len(positions) > SAMPLE:
        positions = np.sort(np.random.default_rng(0).permutation(positions)[:SAMPLE])
    counts = np.zeros((source.in_channels, 256))
    for start in range(0, len(positions), CHUNK):
        images = source.take(positions[start : start + CHUNK]).numpy()
        for channel in range(source.in_channels):
            counts[channel] += np.bincount(images[:, channel].ravel(), minlength=256)
    levels = np.arange(256) / 255
    share = counts / counts.sum(axis=1, keepdims=True)
    mean = share @ levels
    std = np.sqrt((share * (levels - mean[:, None]) ** 2).sum(axis=1))
    if not std.all():
        raise DataError(
            f"training images: channel {std.argmin()} has one value everywhere, "
            f"expected images that differ"
        )
    return Normalisation(tuple(mean.tolist()), tuple(std.tolist()))
