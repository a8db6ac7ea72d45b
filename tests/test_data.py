"""Batches, held-out parts and augmentation of the data sets."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastshift import data as fsdata


@pytest.fixture(scope="module")
def digits():
    return fsdata.load("digits", batch_size=64, seed=3)


def pictures(num=400, size=8, channels=3, num_classes=4, seed=0):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, size, size, channels), dtype=np.uint8)
    return images, np.arange(num) % num_classes


def identity_of(batches):
    return {image.numpy().tobytes() for images, _ in batches for image in images}


def test_digits_are_cut_into_training_scoring_calibration_and_test_parts(digits):
    described = digits.describe()
    assert described["train_images"] + described["validation_images"] == 1438
    assert described["test_images"] == 359
    assert (digits.num_classes, digits.in_channels, digits.image_size) == (10, 1, 8)
    assert json.loads(json.dumps(described)) == described


def test_batches_are_normalised_contiguous_float_images_and_integer_labels(digits):
    for images, labels in (digits.train.batch(0), digits.validation[0], digits.calibration[0]):
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        assert images.shape[1:] == (1, 8, 8)
        assert labels.dtype == torch.int64
    plain = fsdata.load("digits", augment=False)
    images, _ = plain.train.batch(0, size=plain.train.num_images)
    assert images.mean().abs() < 1e-5
    assert abs(images.std() - 1) < 1e-3


def test_a_training_batch_is_a_pure_function_of_its_index(digits):
    again = fsdata.load("digits", batch_size=64, seed=3)
    for _ in range(3):
        again.train.batch(11)
    expected = digits.train.batch(40)
    for left, right in zip(expected, again.train.batch(40), strict=True):
        assert torch.equal(left, right)
    assert not torch.equal(expected[0], digits.train.batch(40, stream="shift")[0])
    other_seed = fsdata.load("digits", batch_size=64, seed=4)
    assert not torch.equal(expected[0], other_seed.train.batch(40)[0])


def test_held_out_batches_are_the_same_every_time(digits):
    for batches in (digits.validation, digits.calibration, digits.test):
        first, second = list(batches), list(batches)
        assert len(first) == len(batches)
        for (images, labels), (images_again, labels_again) in zip(first, second, strict=True):
            assert torch.equal(images, images_again)
            assert torch.equal(labels, labels_again)
