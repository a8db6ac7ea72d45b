"""Training streams, held-out parts, augmentation and normalisation of data sets held as arrays."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from fastshift import data as fsdata
from fastshift.data.batches import Augmentation, Normalisation
from fastshift.data.splits import stratified
from fastshift.errors import DataError

NEUTRAL = Normalisation(mean=(0.0,) * 3, std=(1.0,) * 3)


@pytest.fixture(scope="module")
def digits():
    return fsdata.load("digits", batch_size=64, seed=3)


def pictures(num=400, size=8, channels=3, num_classes=4, seed=0):
    """Make random images, all different, and labels in turn."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, size, size, channels), dtype=np.uint8)
    return images, np.arange(num) % num_classes


def images_of(batches):
    return [image.numpy().tobytes() for images, _ in batches for image in images]


def labels_of(batches):
    return torch.cat([labels for _, labels in batches]).numpy()


def test_digits_are_cut_into_training_scoring_calibration_and_test_parts(digits):
    described = digits.describe()
    assert described["train_images"] + described["validation_images"] == 1438
    assert described["test_images"] == 359
    assert described["flip"] is False
    assert described["crop_padding"] == 1
    assert (digits.num_classes, digits.in_channels, digits.image_size) == (10, 1, 8)
    assert json.loads(json.dumps(described)) == described


def test_the_test_part_of_digits_does_not_depend_on_the_seed(digits):
    # other training parts are normalised otherwise: compare the pixels behind that
    def pixels(data):
        images = torch.cat([images for images, _ in data.test])
        return (255 * (images * data.std[0] + data.mean[0])).round()

    other = fsdata.load("digits", seed=4)
    assert torch.equal(pixels(other), pixels(digits))
    assert other.digest == digits.digest


def test_batches_are_normalised_contiguous_float_images_and_integer_labels(digits):
    for images, labels in (digits.train.batch(0), digits.validation[0], digits.calibration[0]):
        assert images.dtype == torch.float32
        assert images.is_contiguous()
        assert images.shape[1:] == (1, 8, 8)
        assert labels.dtype == torch.int64
        assert len(images) == len(labels)


def test_the_training_part_has_mean_zero_and_deviation_one_in_each_channel():
    x, y = pictures()
    x[..., 1] //= 4
    train = fsdata.from_arrays(x, y, augment=False).train
    images, _ = train.batch(0, size=train.num_images)
    assert images.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    assert (images.std(dim=(0, 2, 3)) - 1).abs().max() < 1e-3


def test_a_training_batch_is_a_pure_function_of_seed_stream_index_and_size(digits):
    again = fsdata.load("digits", batch_size=64, seed=3)
    for index in (5, 900, 11):
        again.train.batch(index)
    expected = digits.train.batch(40)
    for left, right in zip(expected, again.train.batch(40), strict=True):
        assert torch.equal(left, right)
    other_seed = fsdata.load("digits", batch_size=64, seed=4)
    for other in (digits.train.batch(40, stream="shift"), other_seed.train.batch(40)):
        assert not torch.equal(expected[0], other[0])


@pytest.mark.parametrize("size", [7, 300, 1000])
def test_the_stream_shows_every_training_image_once_an_epoch_for_any_batch_size(size):
    x, y = pictures()
    train = fsdata.from_arrays(x, y, augment=False, validation_size=100).train
    epochs, num = 7, train.num_images
    stream = images_of(train.batch(index, size) for index in range(epochs * num // size + 1))
    first = set(stream[:num]) if size < num else set(images_of([train.batch(0, num)]))
    assert len(first) == num
    for epoch in range(min(epochs, len(stream) // num)):
        assert set(stream[epoch * num : (epoch + 1) * num]) == first
    assert stream[:num] != stream[num : 2 * num]


def test_iterating_the_training_part_goes_on_from_one_epoch_to_the_next():
    x, y = pictures()
    train = fsdata.from_arrays(x, y, batch_size=32, validation_size=100).train
    assert len(train) == 9
    passes = [list(train), list(train)]
    for epoch, batches in enumerate(passes):
        for step, (images, labels) in enumerate(batches):
            expected = train.batch(epoch * len(train) + step)
            assert torch.equal(images, expected[0])
            assert torch.equal(labels, expected[1])


@pytest.mark.parametrize(("index", "size"), [(-1, 4), (0, 0)])
def test_a_batch_before_the_stream_or_without_images_is_refused(digits, index, size):
    with pytest.raises(ValueError, match=f"index={index}, size={size}"):
        digits.train.batch(index, size)


def test_held_out_batches_are_the_same_every_time(digits):
    uncached = fsdata.load("digits", batch_size=64, seed=3, max_memory_bytes=0)
    for name in ("validation", "calibration", "test"):
        batches, others = getattr(digits, name), getattr(uncached, name)
        for again in (batches, others, others):
            assert images_of(again) == images_of(batches)
            assert np.array_equal(labels_of(again), labels_of(batches))


def test_fixed_batches_are_a_list():
    x, y = pictures()
    batches = fsdata.from_arrays(x, y, validation_size=100, validation_batch_size=30).validation
    assert [len(labels) for _, labels in batches] == [30, 30, 30, 10]
    assert len(batches) == 4
    assert torch.equal(batches[-1][0], batches[3][0])
    with pytest.raises(IndexError):
        batches[4]


def test_scoring_set_is_disjoint_from_training_and_calibration_and_calibration_is_of_training():
    x, y = pictures()
    data = fsdata.from_arrays(x, y, augment=False, calibration_batches=3, calibration_batch_size=16)
    train = set(images_of([data.train.batch(0, data.train.num_images)]))
    validation, calibration = images_of(data.validation), images_of(data.calibration)
    assert len(set(validation) | train) == 400 == len(set(validation)) + len(train)
    assert len(set(calibration)) == 48
    assert set(calibration) <= train


def test_scoring_and_calibration_sets_hold_each_class_in_proportion():
    x, _ = pictures(num=1000)
    y = np.repeat([0, 1, 2], [700, 290, 10])
    data = fsdata.from_arrays(
        x, y, validation_size=0.1, calibration_batches=1, calibration_batch_size=90
    )
    assert np.bincount(labels_of(data.validation)).tolist() == [70, 29, 1]
    assert np.bincount(labels_of(data.calibration)).tolist() == [63, 26, 1]


def test_stratified_draws_leave_a_rare_class_in_both_parts():
    labels = np.repeat([0, 1, 2], [96, 2, 2])
    rng = np.random.default_rng(0)
    for size in (3, 10, 97):
        drawn = stratified(labels, size, rng, at_least=1, spare=1)
        assert len(np.unique(drawn)) == size
        counts = np.bincount(labels[drawn], minlength=3)
        assert counts.min() >= 1
        assert (np.array([96, 2, 2]) - counts).min() >= 1
    with pytest.raises(ValueError, match="size=98"):
        stratified(labels, 98, rng, at_least=1, spare=1)


def test_small_sets_get_a_default_scoring_set_and_calibration_that_fit():
    x, y = pictures(num=8)
    data = fsdata.from_arrays(x, y)
    assert (data.validation.num_images, data.train.num_images) == (4, 4)
    assert (len(data.calibration), data.calibration.num_images) == (1, 4)
    assert data.test is None
    assert len(data.train) == 1


def test_crops_are_shifts_of_the_image_padded_with_the_fill():
    image = torch.arange(1, 49, dtype=torch.uint8).view(1, 3, 4, 4)
    fill = (200, 210, 220)
    augment = Augmentation(padding=1, fill=fill, flip=False)
    out = augment(image.expand(500, -1, -1, -1).contiguous(), np.random.default_rng(0))
    padded = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, 6, 6)
    padded[:, 1:5, 1:5] = image[0]
    shifts = {
        padded[:, top : top + 4, left : left + 4].numpy().tobytes()
        for top in range(3)
        for left in range(3)
    }
    assert {picture.numpy().tobytes() for picture in out} == shifts


def test_about_half_of_the_images_are_flipped_and_the_others_untouched():
    image = torch.arange(48, dtype=torch.uint8).view(1, 3, 4, 4)
    augment = Augmentation(padding=0, fill=(0, 0, 0), flip=True)
    out = augment(image.expand(1000, -1, -1, -1).contiguous(), np.random.default_rng(0))
    flipped = (out == image.flip(-1)).all(dim=(1, 2, 3))
    same = (out == image).all(dim=(1, 2, 3))
    assert (flipped | same).all()
    assert 400 < flipped.sum() < 600


def test_padding_is_zero_to_half_a_level_once_normalised():
    x, y = pictures()
    data = fsdata.from_arrays(x, y)
    fill = torch.tensor(data.train.augmentation.fill, dtype=torch.uint8).view(1, 3, 1, 1)
    normalise = Normalisation(data.mean, data.std)
    assert normalise(fill).abs().max() <= 0.5 / 255 / min(data.std) + 1e-6


def test_normalisation_is_pixel_over_255_minus_mean_over_deviation():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    out = Normalisation(mean=(0.3,), std=(0.25,))(images)
    expected = (images.double() / 255 - 0.3) / 0.25
    assert (out - expected).abs().max() < 1e-6


def test_augmentation_can_be_switched_off_and_the_flip_alone():
    x, y = pictures()
    assert fsdata.from_arrays(x, y, augment=False).train.augmentation is None
    assert fsdata.from_arrays(x, y, flip=False).train.augmentation.flip is False
    assert fsdata.from_arrays(x, y).train.augmentation.flip is True


def test_keeping_classes_relabels_them_in_the_order_given():
    x, y = pictures(num=400, num_classes=5)
    names = ["a", "b", "c", "d", "e"]
    data = fsdata.from_arrays(
        x, y, x[:50], y[:50], classes=[4, 1], class_names=names, augment=False
    )
    assert data.num_classes == 2
    assert data.class_names == ("e", "b")
    assert data.train.num_images + data.validation.num_images == 160
    assert data.test.num_images == 20
    images, labels = data.test[0]
    expected = x[:50][np.isin(y[:50], [1, 4])]
    pixels = 255 * (images * torch.tensor(data.std).view(3, 1, 1))
    pixels = (pixels + 255 * torch.tensor(data.mean).view(3, 1, 1)).round()
    assert np.array_equal(pixels.permute(0, 2, 3, 1).numpy(), expected)
    assert labels.tolist() == [{4: 0, 1: 1}[label] for label in y[:50] if label in (1, 4)]


def test_a_limit_keeps_a_stratified_part_of_the_training_set():
    x, y = pictures()
    data = fsdata.from_arrays(x, y, limit=100, validation_size=20)
    assert (data.train.num_images, data.validation.num_images) == (80, 20)
    labels = np.concatenate([labels_of(data.validation), labels_of([data.train.batch(0, 80)])])
    assert np.bincount(labels).tolist() == [25] * 4


def test_images_are_brought_to_another_size_by_the_average_over_areas():
    x, y = pictures(size=16)
    small = fsdata.from_arrays(x, y, x, y, image_size=8, augment=False, validation_batch_size=400)
    assert small.image_size == 8
    images = small.test[0][0] * torch.tensor(small.std).view(3, 1, 1)
    pixels = 255 * (images + torch.tensor(small.mean).view(3, 1, 1))
    areas = x.reshape(400, 8, 2, 8, 2, 3).mean(axis=(2, 4)).transpose(0, 3, 1, 2)
    assert np.abs(pixels.numpy() - areas).max() < 0.51


@pytest.mark.parametrize("image_size", [5, 12, 20])
def test_oblong_images_are_cut_to_their_middle_and_scaled(image_size):
    x, y = pictures(size=16)
    x = np.concatenate([np.zeros_like(x[:, :, :4]), x, np.zeros_like(x[:, :, :4])], axis=2)
    x[:, :, 4:20] = 200
    x[:200, :, 4:20] = 100
    data = fsdata.from_arrays(x, y, x, y, image_size=image_size)
    images = data.test[0][0] * data.std[0] + data.mean[0]
    assert images.shape[2:] == (image_size, image_size)
    assert torch.allclose(255 * images[200:], torch.tensor(200.0), atol=1e-3)


def test_labels_of_any_integer_type_are_accepted():
    x, y = pictures()
    for dtype in (np.uint8, np.int16, np.uint64, np.int32):
        _, labels = fsdata.from_arrays(x, y.astype(dtype)).validation[0]
        assert labels.dtype == torch.int64


def test_equal_data_have_equal_digests_and_one_changed_pixel_another():
    x, y = pictures()
    digest = fsdata.from_arrays(x, y).digest
    assert fsdata.from_arrays(x.copy(), y.astype(np.uint8), seed=9).digest == digest
    x[17, 3, 3, 1] ^= 1
    assert fsdata.from_arrays(x, y).digest != digest


def bad_arrays():
    x, y = pictures()
    one = np.where(np.arange(400) == 7, 4, y)
    return {
        "x_train: dtype float64, expected uint8": (x / 255.0, y),
        "x_train: shape [400, 8, 8], expected [n, H, W, C] with C of 1 or 3": (x[..., 0], y),
        "x_train: shape [400, 3, 8, 8], expected [n, H, W, C]": (x.transpose(0, 3, 1, 2), y),
        "x_train: shape [400, 0, 8, 3], expected [n, H, W, C]": (x[:, :0], y),
        "x_train: images of 8x6, expected square ones": (x[:, :, :6], y),
        "x_test: images of 8x6, expected square ones": (x, y, x[:, :, :6], y),
        "test images: 4x4x3, expected 8x8x3 as in training": (x, y, x[:, :4, :4], y),
        "test images: 8x8x1, expected 8x8x3 as in training": (x, y, x[..., :1], y),
        "y_train: dtype float64, expected integer labels": (x, y * 1.0),
        "y_train: dtype bool, expected integer labels": (x, y > 1),
        "y_train: shape [400, 1], expected [n]": (x, y[:, None]),
        "y_train: 399 labels for 400 images, expected as many": (x, y[1:]),
        "y_train: label -1, expected labels of 0 and more": (x, y - 1),
        "training labels: highest 4 but none is 0": (x, y + 1),
        "training labels: highest 6 but none is 1": (x, y * 2),
        "training labels: all 400 are 0, expected at least two classes": (x, y * 0),
        "training labels: all 400 are 3, expected at least two classes": (x, y * 0 + 3),
        "training labels: class 4 has 1 image, expected at least 2": (x, one),
        "training set: 0 images": (x[:0], y[:0]),
        "test set: 0 images": (x, y, x[:0], y[:0]),
        "test labels: highest 4, expected at most 3 as in training": (x, y, x, y + 1),
        "x_test: given alone, expected x_test and y_test or neither": (x, y, x),
        "y_test: given alone, expected x_test and y_test or neither": (x, y, None, y),
        "training images: channel 1 has one value": (x * np.array([1, 0, 1], np.uint8), y),
    }


@pytest.mark.parametrize("message", bad_arrays())
def test_unusable_arrays_are_refused_by_name_value_and_expectation(message):
    with pytest.raises(DataError) as caught:
        fsdata.from_arrays(*bad_arrays()[message])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: expected an integer of at least 1"),
        ({"batch_size": 2.5}, "batch_size=2.5: expected an integer"),
        ({"batch_size": True}, "batch_size=True: expected an integer"),
        ({"batch_size": None}, "batch_size=None: expected an integer of at least 1"),
        ({"seed": -1}, "seed=-1: expected an integer of at least 0"),
        ({"image_size": 0}, "image_size=0"),
        ({"validation_size": 3}, "validation_size=3: 3 of 400 images, expected 4 to 396"),
        ({"validation_size": 397}, "validation_size=397: 397 of 400 images"),
        ({"validation_size": 1.5}, "validation_size=1.5: expected an integer"),
        ({"validation_size": float("nan")}, "validation_size=nan"),
        ({"validation_size": 0.999}, "validation_size=0.999: 400 of 400 images"),
        ({"calibration_batches": 9}, "calibration_batches=9 of 128 images: expected at most 300"),
        ({"calibration_batch_size": 1}, "calibration_batch_size=1: expected an integer of at leas"),
        ({"calibration_batch_size": 301}, "calibration_batches=1 of 301 images"),
        ({"classes": [1]}, "classes=[1]: expected at least two distinct labels"),
        ({"classes": [1, 1]}, "classes=[1, 1]: expected at least two distinct labels"),
        ({"classes": [1, 7]}, "classes=[1, 7]: label 7 has no training image"),
        ({"limit": 7}, "limit=7: expected at least 8, two images of each class"),
        ({"class_names": ["a", "b"]}, "class_names: 2 names, expected 4, one a label"),
    ],
)
def test_unusable_options_are_refused_by_name_value_and_expectation(options, message):
    with pytest.raises(DataError) as caught:
        fsdata.from_arrays(*pictures(), **options)
    assert str(caught.value).startswith(message)


def test_numpy_integers_are_accepted_and_described_as_plain_ones():
    data = fsdata.from_arrays(*pictures(), seed=np.int64(3), batch_size=np.int32(8))
    assert json.loads(json.dumps(data.describe()))["batch_size"] == 8


def test_an_unknown_option_is_a_type_error():
    with pytest.raises(TypeError, match="batch_sizes"):
        fsdata.load("digits", batch_sizes=3)


def test_the_seed_of_a_run_does_not_move_what_is_held_out():
    first, second = (fsdata.load("digits", seed=seed) for seed in (0, 1))
    for part in ("validation", "calibration"):
        for (x, y), (u, v) in zip(getattr(first, part), getattr(second, part), strict=True):
            assert torch.equal(x, u)
            assert torch.equal(y, v)
    assert not torch.equal(first.train.batch(0)[1], second.train.batch(0)[1])
    moved = fsdata.load("digits", split_seed=1)
    assert not torch.equal(first.validation[0][1], moved.validation[0][1])
