"""Class folders through NVIDIA DALI: the pixels of torchvision, the splits of image folders."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

import fastshift as fs
from fastshift import data as fsdata
from fastshift.cli import main
from fastshift.errors import DataError
from fastshift.ops import Head, Unit, conv, identity
from fastshift.space import SearchSpace

pytest.importorskip("nvidia.dali", reason="NVIDIA DALI is not installed (extra dali)")
Image = pytest.importorskip("PIL.Image")
transforms = pytest.importorskip("torchvision.transforms.v2")
sklearn_datasets = pytest.importorskip("sklearn.datasets")

from dali_cases import (  # noqa: E402
    SIZE,
    assert_close,
    by_torchvision,
    levels,
    load,
    recolored,
    write,
)

from fastshift.data.dali_reader import Reader, Request, placement  # noqa: E402
from fastshift.data.resized_crop import TRIES, ResizedCrop  # noqa: E402

pytestmark = pytest.mark.dali

SPACE = """
from fastshift.ops import Head, Unit, conv, identity
from fastshift.space import SearchSpace

def tiny(image_size, num_classes, in_channels):
    stem = [Unit("dense", in_channels, 4, kernel=3, stride=2)]
    shape = {"in_channels": in_channels, "image_size": image_size}
    blocks = [[identity(4), conv(4, 4, 3, 1)]] * 3
    return SearchSpace("tiny", stem=stem, blocks=blocks, head=Head(4, (), num_classes), **shape)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photographs")
    write(root)
    return root


@pytest.fixture(scope="module")
def data(folder):
    return load(folder)


def equal(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


# Pixels


def test_middle_squares_are_torchvisions(data):
    source = data.test._source
    request = source.middle(np.arange(len(source.labels)))
    sides = request.windows[:, 2:]
    assert (sides[:, 0] == sides[:, 1]).all()
    images = torch.cat([images for images, _ in data.test])
    assert_close(levels(data, images), by_torchvision(request))


def test_augmented_images_are_torchvisions_crops_of_the_same_windows(data):
    for index in range(6):
        request = data.train._request((index, 8, "train"))
        images, _ = data.train.batch(index)
        assert_close(levels(data, images), by_torchvision(request))


def test_half_of_the_images_are_flipped_and_none_without_flips(folder, data):
    flips = np.concatenate([data.train._request((i, 8, "x")).flips for i in range(50)])
    assert 150 < flips.sum() < 250
    assert not load(folder, flip=False).train._request((0, 400, "x")).flips.any()


def test_windows_are_spread_as_torchvisions():
    num, (height, width) = 4000, (150, 200)
    draws = ResizedCrop(0.08, True, 0.0).draw(num, np.random.default_rng(0))
    sizes = np.tile([height, width], (num, 1))
    windows = ResizedCrop(0.08, True, 0.0).request([], sizes, draws).windows
    picture = torch.zeros(3, height, width)
    torch.manual_seed(0)
    crop = transforms.RandomResizedCrop(8)
    drawn = [crop.make_params([picture]) for _ in range(num)]
    theirs = np.array([[d[name] for name in ("top", "left", "height", "width")] for d in drawn])
    for own, other in zip(windows.T, theirs.T, strict=True):
        spread = math.hypot(own.std(), other.std()) / math.sqrt(num)
        assert abs(own.mean() - other.mean()) < 4 * spread
        assert abs(own.std() / other.std() - 1) < 0.1
    top, left, high, wide = windows.T
    assert (np.minimum(top, left) >= 0).all()
    assert (top + high <= height).all()
    assert (left + wide <= width).all()
    assert ((top + high == height) & (high < height)).any()


@pytest.mark.parametrize(("height", "width"), [(100, 1000), (1000, 100), (90, 100)])
def test_where_no_draw_fits_the_largest_middle_part_is_taken_as_torchvision_does(height, width):
    crop = ResizedCrop(1.0, True, 0.0)
    draws = np.zeros((2 * TRIES + 6, 1))
    draws[TRIES : 2 * TRIES] = 0.99
    [window] = crop.request([], np.array([[height, width]]), draws).windows.tolist()
    # an area above that of the image: no draw of theirs fits either
    params = transforms.RandomResizedCrop(8, scale=(1.5, 1.6)).make_params(
        [torch.zeros(3, height, width)]
    )
    assert window == [params[name] for name in ("top", "left", "height", "width")]


COLORS = [(1.4, 1, 1), (0.6, 1, 1), (1, 1.4, 1), (1, 0.6, 1), (1, 1, 1.4), (1, 1, 0.6)]


@pytest.mark.parametrize(
    "colors",
    [*COLORS, (0.8, 1.2, 0.7), (1.3, 0.7, 1.4), (0.6,) * 3, (1.4,) * 3, (2, 0, 2), (0,) * 3],
)
def test_colours_change_as_by_torchvisions_functions(folder, colors):
    """Bytes by one of them; by all as floats, since of bytes it drops fractions after each."""
    files = sorted(folder.glob("val/*/*.jpg"))
    windows, flips = np.array([[0, 0, 60, 60]] * len(files)), np.zeros(len(files), bool)
    request = Request(files, windows, flips, np.array([colors] * len(files)))
    found = Reader(SIZE, torch.device("cpu"), has_colors=True).read(0, lambda _: request)
    plain = by_torchvision(request)
    assert_close(found, recolored(plain.double(), request.colors))
    if colors in COLORS:
        assert_close(found, recolored(plain, request.colors))
    with pytest.raises(AssertionError):
        assert_close(found, plain)


def test_colours_that_do_not_change_leave_the_pixels_as_they_are(folder):
    files = sorted(folder.glob("val/*/*.jpg"))
    request = Request(
        files, np.array([[0, 0, 60, 60]] * len(files)), np.zeros(len(files), bool), np.ones((16, 3))
    )
    readers = [Reader(SIZE, torch.device("cpu"), has_colors=colors) for colors in (False, True)]
    assert equal(*(reader.read(0, lambda _: request) for reader in readers))


def test_augmented_colours_are_torchvisions_of_the_same_factors(folder, data):
    train = load(folder, color_jitter=0.4).train
    for index in range(6):
        images, _ = train.batch(index)
        request = train._request((index, 8, "train"))
        assert len({*request.colors.ravel()}) == 24
        expected = recolored(by_torchvision(request).double(), request.colors)
        assert_close(levels(data, images), expected)
    colors = np.concatenate([train._request((i, 8, "x")).colors for i in range(50)])
    assert 0.6 <= colors.min() < 0.62
    assert 1.38 < colors.max() <= 1.4


def test_batches_are_channels_last_and_their_memory_is_their_own(data):
    kept = [data.train.batch(index)[0] for index in range(5)]
    copies = [data.train.batch(index)[0].clone() for index in range(5)]
    assert equal(kept, copies)
    assert len({images.data_ptr() for images in kept}) == 5
    for images in (*kept, data.validation[0][0]):
        assert images.dtype == torch.float32
        assert images.is_contiguous(memory_format=torch.channels_last)


# Splits


@pytest.mark.parametrize(
    "chosen", [{}, {"split_seed": 3}, {"classes": [2, 0], "limit": 20, "validation_size": 6}]
)
def test_the_parts_are_the_image_folders_file_by_file(folder, chosen):
    own, other = load(folder, **chosen), load(folder, "folder", max_memory_bytes=0, **chosen)
    assert own.digest == other.digest
    assert own.class_names == other.class_names
    for name in ("train", "validation", "calibration", "test"):
        files = [
            [batches._source.files[position] for position in batches._positions]
            for batches in (getattr(own, name), getattr(other, name))
        ]
        assert files[0] == files[1]
        for batch, same in zip(getattr(own, name), getattr(other, name), strict=True):
            assert torch.equal(batch[1], same[1])


def test_what_is_held_out_has_as_many_of_each_class_and_is_not_trained_on(folder):
    """Of 48 training files, 16 a class; the order of files is by class."""
    data = load(folder, validation_size=15)
    labels = torch.cat([labels for _, labels in data.validation])
    assert torch.bincount(labels).tolist() == [5, 5, 5]
    parts = [getattr(data, name)._positions.tolist() for name in ("train", "validation")]
    assert sorted(parts[0] + parts[1]) == [*range(48)]
    assert not set(data.calibration._positions.tolist()) & set(parts[1])


def test_evaluation_sees_every_image_once_and_training_drops_the_last_part(data):
    sizes = [len(labels) for _, labels in data.test]
    assert sizes == [5, 5, 5, 2]
    images = torch.cat([images for images, _ in data.test])
    assert len({image.numpy().tobytes() for image in images}) == 17
    assert data.train.num_images == 34
    assert [len(labels) for _, labels in data.train] == [8] * 4


@pytest.mark.parametrize("num_shards", [2, 3])
def test_the_shards_of_a_batch_are_the_batch(data, num_shards):
    shards = [data.train.shard(shard, num_shards) for shard in range(num_shards)]
    assert {len(shard) for shard in shards} == {34 // (8 * num_shards)}
    for index in (0, 1, 2):
        whole = data.train.batch(index, 6 * num_shards)
        parts = [shard.batch(index, 6) for shard in shards]
        assert equal(whole, [torch.cat(part) for part in zip(*parts, strict=True)])


def test_the_shards_of_a_list_hold_every_image_once(data):
    shards = [list(data.test.shard(shard, 3)) for shard in range(3)]
    assert [sum(len(labels) for _, labels in shard) for shard in shards] == [6, 6, 5]
    images = [image for shard in shards for batch, _ in shard for image in batch]
    expected = [image for batch, _ in data.test for image in batch]
    assert sorted(x.numpy().tobytes() for x in images) == sorted(
        x.numpy().tobytes() for x in expected
    )


@pytest.mark.parametrize(("shard", "of"), [(2, 2), (-1, 2), (0, 0)])
def test_a_shard_that_is_none_is_refused(data, shard, of):
    for batches in (data.train, data.test):
        with pytest.raises(ValueError, match=f"shard_id={shard}, num_shards={of}"):
            batches.shard(shard, of)


# Order, seeds and going on


def test_a_resumed_stream_goes_on_bit_for_bit(folder):
    """Over epochs, between other streams and sizes, backwards, with other numbers of threads."""
    unbroken = load(folder, color_jitter=0.4)
    whole = [unbroken.train.batch(index, 8, "shift") for index in range(9)]
    resumed = load(folder, color_jitter=0.4)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        for index in (5, 6, 7):
            assert equal(resumed.train.batch(index, 8, "shift"), whole[index])
            resumed.train.batch(0, 3, "head")
        for index in (8, 0, 4):
            assert equal(resumed.train.batch(index, 8, "shift"), whole[index])
    finally:
        torch.set_num_threads(before)
    assert not torch.equal(unbroken.train.batch(0)[0], whole[0][0])
    other = load(folder, seed=6, color_jitter=0.4)
    assert not torch.equal(other.train.batch(0, 8, "shift")[0], whole[0][0])


def test_fixed_batches_are_the_same_every_time_kept_or_not(folder, data):
    anew = load(folder, max_memory_bytes=0)
    for name in ("validation", "calibration", "test"):
        kept, decoded = getattr(data, name), getattr(anew, name)
        for first, second in [(kept, decoded), (decoded, decoded), (kept, kept)]:
            pairs = list(zip(first, second, strict=True))
            assert all(equal(batch, other) for batch, other in pairs)
        assert equal(decoded[len(decoded) - 1], kept[-1])


def tiny_space(data):
    stem = [Unit("dense", 3, 4, kernel=3, stride=2)]
    head = Head(4, (), data.num_classes)
    blocks = [[identity(4), conv(4, 4, 3, 1)]] * 3
    return SearchSpace(
        "tiny", stem=stem, blocks=blocks, head=head, in_channels=3, image_size=data.image_size
    )


def test_a_pretraining_that_was_stopped_ends_as_the_one_that_was_not(folder, tmp_path):
    def supernet():
        torch.manual_seed(0)
        return fs.Supernet(tiny_space(load(folder)))

    unbroken = supernet()
    fs.pretrain(unbroken, load(folder), steps=6, lr=0.1)
    asked = iter([False] * 3 + [True])
    stopped = fs.pretrain(
        supernet(), load(folder), steps=6, lr=0.1, out=tmp_path, stop=lambda: next(asked)
    )
    assert (stopped.steps, stopped.stopped) == (3, "interrupted")
    resumed = supernet()
    fs.pretrain(resumed, load(folder), steps=6, lr=0.1, out=tmp_path, resume=True)
    for name, tensor in unbroken.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_a_search_runs_from_end_to_end(folder, tmp_path, capsys):
    (tmp_path / "tiny.py").write_text(SPACE)
    out = tmp_path / "run"
    argv = ["search", f"--space={tmp_path / 'tiny.py'}:tiny", f"--data=dali:{folder}"]
    argv += [f"--image-size={SIZE}", "--color-jitter=0.4", "--crop-area=0.2", "--device=cpu"]
    argv += ["--generations=1", "--population=4", "--parents=2", "--shift-steps=2", "--top-k=2"]
    argv += ["--shift-batch-size=8", "--pretrain-steps=3", "--pretrain-batch-size=8", "--no-report"]
    argv += ["--calibration-batches=1", "--calibration-batch-size=16", "--quiet", f"--out={out}"]
    assert main(argv) == 0
    result = json.loads((out / "result.json").read_text())
    assert result["best"]["arch"] in capsys.readouterr().out
    described = result["data"]
    assert described["spec"] == f"dali:{folder}"
    assert (described["crop_area"], described["color_jitter"]) == (0.2, 0.4)
    assert described["decoder"] == "dali on cpu"


# What is refused


@pytest.fixture
def small(tmp_path):
    """Write two classes of eight small photographs each, and a test image of each."""
    [photograph, _] = sklearn_datasets.load_sample_images().images
    for part, num in (("train", 16), ("val", 2)):
        for index in range(num):
            file = tmp_path / part / ("ant", "bee")[index % 2] / f"{index:03d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(photograph[index * 10 :, index * 20 :][:70, :80]).save(file)
    return tmp_path


def refusal(folder, **options):
    with pytest.raises(DataError) as caught:
        # what is held out is decoded when it is first asked for
        list(
            load(folder, **{"validation_size": 4, "calibration_batch_size": 4} | options).validation
        )
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "damage", [lambda whole: whole[: len(whole) // 2], lambda whole: b"text", lambda whole: b""]
)
def test_a_damaged_image_is_named(small, damage):
    file = small / "train" / "bee" / "005.jpg"
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(small)
    assert f"{file}: " in message
    assert "expected a whole image file" in message


def test_an_image_that_is_damaged_later_is_named_and_the_others_can_still_be_read(small):
    data = load(small, validation_size=4, calibration_batch_size=4)
    before = data.train.batch(0)
    [bad] = data.train.shard(0, 1)._request((1, 1, "train")).files
    whole = bad.read_bytes()
    bad.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=rf"{bad}: .* expected a whole image file"):
        data.train.batch(1, 1)
    bad.write_bytes(whole)
    assert equal(data.train.batch(0), before)


def test_an_image_of_16_bits_or_of_another_format_is_refused(small):
    deep = np.arange(4096, dtype=np.uint16).reshape(64, 64) * 10
    file = small / "train" / "ant" / "deep.png"
    Image.fromarray(deep).save(file)
    assert "deep.png: mode I;16, expected 8 bits a channel" in refusal(small)
    file.unlink()
    moving = small / "train" / "ant" / "moving.gif"
    Image.new("L", (64, 64)).save(moving)
    assert "train/ant/moving.gif is of a format DALI does not decode" in refusal(small)
    moving.rename(file)
    assert f"{file}: an image that DALI cannot decode" in refusal(small)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: (root / "train" / "cat").mkdir(), "train/cat holds no image"),
        (lambda root: (root / "val").rename(root / "valid"), "val, expected train/ and val/ in it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_under_its_own_name(small, change, message):
    change(small)
    refused = refusal(small)
    assert message in refused
    assert refused.startswith(f"dali:{small}: ")


def test_images_of_different_sizes_need_an_image_size(folder):
    assert "(or an image_size to scale all to)" in refusal(folder, image_size=None)


@pytest.mark.parametrize("name", ["tpu", "meta"])
def test_a_device_that_is_none_is_refused(small, name):
    with pytest.raises(DataError, match=f"device='{name}': expected auto, cpu, cuda or cuda:N"):
        fsdata.load(f"dali:{small}", image_size=SIZE, device=name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_refused_and_auto_is_the_cpu(small):
    with pytest.raises(DataError, match="device='cuda': no usable GPU"):
        fsdata.load(f"dali:{small}", image_size=SIZE, device="cuda")
    data = fsdata.load(f"dali:{small}", image_size=SIZE, validation_size=4)
    assert data.train.batch(0)[0].device.type == "cpu"


def test_for_a_gpu_everything_behind_the_file_is_on_the_gpu():
    from nvidia.dali import Pipeline

    device = torch.device("cuda", 0)
    assert placement(device) == ("mixed", "gpu")
    assert placement(torch.device("cpu")) == ("cpu", "cpu")
    normalise = fsdata.batches.Normalisation((0.5,) * 3, (0.2,) * 3)
    with Pipeline(batch_size=1, num_threads=1, device_id=0):
        for colors in (False, True):
            assert Reader(8, device, normalise, has_colors=colors)._graph().device == "gpu"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_images_are_torchvisions_and_a_stream_goes_on_where_it_was(folder):
    data = load(folder, device="cuda")
    source = data.test._source
    images = torch.cat([images for images, _ in data.test])
    assert images.device.type == "cuda"
    assert images.is_contiguous(memory_format=torch.channels_last)
    expected = by_torchvision(source.middle(np.arange(len(source.labels))))
    assert_close(levels(data, images.cpu()), expected)
    batches = [data.train.batch(index) for index in range(6)]
    for index, (images, labels) in enumerate(batches):
        assert images.device.type == "cuda"
        request = data.train._request((index, 8, "train"))
        assert_close(levels(data, images.cpu()), by_torchvision(request))
        assert equal([labels], [load(folder).train.batch(index)[1]])
    again = load(folder, device="cuda").train
    for index in (3, 4, 1):
        assert equal(again.batch(index), batches[index])


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_colours_change_as_on_a_cpu(folder):
    trains = [load(folder, color_jitter=0.4, device=name).train for name in ("cpu", "cuda")]
    for index in range(3):
        one, two = (train.batch(index)[0].cpu() for train in trains)
        assert_close(*(levels(load(folder), images) for images in (one, two)))
