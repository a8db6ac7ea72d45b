"""Data sets read from npz files, torchvision's CIFAR layout and folders, and what is refused."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from fastshift import data as fsdata
from fastshift.errors import DataError, MissingExtraError


def pictures(num=40, size=8, channels=3, num_classes=2, seed=0):
    """Make random images, all different, and labels in turn."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, size, size, channels), dtype=np.uint8)
    return images, np.arange(num) % num_classes


def members():
    (x_train, y_train), (x_test, y_test) = pictures(), pictures(num=10, seed=1)
    return {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}


def pixels_of(data, batches):
    """Undo the normalisation: `[n, H, W, C]` uint8."""
    images = torch.cat([images for images, _ in batches]).permute(0, 2, 3, 1).double()
    pixels = 255 * (images * torch.tensor(data.std) + torch.tensor(data.mean))
    return pixels.round().to(torch.uint8).numpy()


def refusal(spec, **options):
    with pytest.raises(DataError) as caught:
        fsdata.load(str(spec), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "spec",
    ["", "digit", "npz", "npz:", "folder:", "dali:", "cifar10", "cifar11:x", "digits:x", "c10.npz"],
)
def test_an_unknown_spec_is_refused_with_the_known_ones(spec):
    message = refusal(spec)
    assert message.startswith(f"data {spec!r}: not a known spec, expected one of digits, ")


def test_dali_where_it_is_not_installed_is_refused_with_the_extra(monkeypatch, folder):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(MissingExtraError, match=r"'nvidia.dali' is needed .* the extra 'dali'"):
        fsdata.load(f"dali:{folder}")


@pytest.mark.parametrize(("name", "value"), [("crop_area", 0.5), ("color_jitter", 0.4)])
def test_what_only_dali_does_is_refused_of_other_data(folder, name, value):
    message = refusal(f"folder:{folder}", **{name: value})
    assert message.startswith(f"{name}={value}: only data from dali:DIR has it")


@pytest.mark.parametrize(
    ("name", "value"), [("crop_area", 0.0), ("crop_area", 1.5), ("color_jitter", float("nan"))]
)
def test_augmentation_out_of_range_is_refused(name, value):
    assert refusal("digits", **{name: value}).startswith(f"{name}={value}: expected ")


def test_an_npz_gives_the_same_data_as_its_arrays(tmp_path):
    np.savez_compressed(tmp_path / "set.npz", **members())
    read = fsdata.load(f"npz:{tmp_path / 'set.npz'}", batch_size=8, seed=5)
    given = fsdata.from_arrays(**members(), batch_size=8, seed=5)
    assert read.digest == given.digest
    assert torch.equal(read.train.batch(9)[0], given.train.batch(9)[0])
    assert np.array_equal(pixels_of(read, read.test), members()["x_test"])
    assert read.spec == f"npz:{tmp_path / 'set.npz'}"


def test_a_missing_npz_is_refused(tmp_path):
    assert "no such file, expected an npz with x_train" in refusal(f"npz:{tmp_path / 'no.npz'}")
    assert "no such file" in refusal(f"npz:{tmp_path}")


def test_a_pixpack_container_is_refused_by_name_with_the_command_that_converts_it(tmp_path):
    path = tmp_path / "packed.npz"
    blob = np.zeros(10, np.uint8)
    np.savez(path, meta=blob, train_0=blob, test_0=blob, y_train=blob, y_test=blob)
    message = refusal(f"npz:{path}")
    assert (
        f"a pixpack container, expected the plain arrays that `python pixpack.py {path}" in message
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.pop("y_test"),
            "members ['x_test', 'x_train', 'y_train'], expected ['x_test', ",
        ),
        (lambda m: m.update(extra=m["y_test"]), "members ['extra', 'x_test', "),
        (lambda m: m.clear(), "members [], expected ['x_test', "),
        (lambda m: m.update(y_test=np.array([None])), "expected a whole npz of plain arrays"),
        (lambda m: m.update(x_test=m["x_test"] / 255.0), "x_test: dtype float64, expected uint8"),
    ],
)
def test_an_npz_of_another_layout_is_refused_by_name(tmp_path, change, message):
    changed = members()
    change(changed)
    np.savez(tmp_path / "set.npz", **changed)
    assert message in refusal(f"npz:{tmp_path / 'set.npz'}")


def test_a_file_that_is_no_npz_is_refused(tmp_path):
    file = tmp_path / "set.npz"
    for content in (b"", b"hello", pickle.dumps([1, 2])):
        file.write_bytes(content)
        assert "cannot be read" in refusal(f"npz:{file}")
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    assert "a single array, expected an npz" in refusal(f"npz:{file}")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_damaged_npz_is_refused_or_read_whole_but_never_wrong(tmp_path, save):
    file = tmp_path / "set.npz"
    save(file, **members())
    whole = file.read_bytes()
    digest = fsdata.load(f"npz:{file}").digest
    rng = np.random.default_rng(0)
    damaged = [whole[:cut] for cut in rng.integers(len(whole), size=10)]
    for place in [*rng.integers(len(whole), size=20), *(len(whole) - 1 - np.arange(0, 300, 11))]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.integers(8)
        damaged.append(bytes(flipped))
    outcomes = []
    for content in damaged:
        file.write_bytes(content)
        try:
            outcomes.append(fsdata.load(f"npz:{file}").digest)
        except DataError as error:
            outcomes.append("refused, in several lines" if "\n" in str(error) else "refused")
    assert set(outcomes) <= {"refused", digest}
    assert outcomes.count("refused") > len(damaged) // 2


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """Write a tiny CIFAR-10 in torchvision's layout and have torchvision expect its checksums."""
    datasets = pytest.importorskip("torchvision.datasets")
    folder = tmp_path / "cifar" / datasets.CIFAR10.base_folder
    folder.mkdir(parents=True)
    images = {}

    def write(name, content):
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    def batch(name, seed):
        x, y = pictures(size=32, num_classes=10, seed=seed)
        images[name] = x
        flat = np.ascontiguousarray(x.transpose(0, 3, 1, 2)).reshape(40, 3072)
        return [name, write(name, {"data": flat, "labels": y.tolist()})]

    names = [f"class {label}" for label in range(10)]
    train_list = [batch("data_batch_1", 1), batch("data_batch_2", 2)]
    test_list = [batch("test_batch", 3)]
    md5 = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(datasets.CIFAR10, "train_list", train_list)
    monkeypatch.setattr(datasets.CIFAR10, "test_list", test_list)
    monkeypatch.setattr(
        datasets.CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": md5},
    )
    return folder, images


def test_cifar_is_read_from_torchvisions_layout(cifar):
    folder, images = cifar
    data = fsdata.load(f"cifar10:{folder.parent}", augment=False)
    assert data.num_classes == 10
    assert data.image_size == 32
    assert data.class_names[3] == "class 3"
    assert data.train.num_images + data.validation.num_images == 80
    assert np.array_equal(pixels_of(data, data.test), images["test_batch"])
    seen = pixels_of(data, [data.train.batch(0, data.train.num_images), *data.validation])
    expected = np.concatenate([images["data_batch_1"], images["data_batch_2"]])
    assert {x.tobytes() for x in seen} == {x.tobytes() for x in expected}


def test_a_damaged_or_missing_cifar_file_is_named_and_never_unpickled(cifar):
    folder, _ = cifar
    file = folder / "data_batch_2"
    file.write_bytes(file.read_bytes()[:-10])
    message = refusal(f"cifar10:{folder.parent}")
    assert "cifar-10-batches-py/data_batch_2 is damaged, expected the MD5 checksum" in message
    file.unlink()
    assert "cifar-10-batches-py/data_batch_2 is missing" in refusal(f"cifar10:{folder.parent}")


def test_a_cifar_that_cannot_be_downloaded_is_refused_and_leaves_nothing_behind(
    tmp_path, monkeypatch
):
    datasets = pytest.importorskip("torchvision.datasets")
    unreachable = (tmp_path / "nothing" / "cifar.tar.gz").as_uri()
    monkeypatch.setattr(datasets.CIFAR100, "url", unreachable)
    message = refusal(f"cifar100:{tmp_path / 'new'}")
    assert "no folder cifar-100-python and no download (" in message
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    assert "a file, expected a directory" in refusal(f"cifar100:{tmp_path / 'file'}")


@pytest.fixture
def folder(tmp_path):
    """Write a folder of two classes: 24 training and 8 test images of 16x16, PNG."""
    image_module = pytest.importorskip("PIL.Image")
    root = tmp_path / "images"
    for part, num in (("train", 24), ("val", 8)):
        x, y = pictures(num=num, size=16, seed=num)
        for index, (image, label) in enumerate(zip(x, y, strict=True)):
            file = root / part / ("ant", "bee")[label] / f"{index:03d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            image_module.fromarray(image).save(file)
    return root


def test_a_folder_is_read_in_sorted_order_with_its_folders_as_classes(folder):
    (folder / "train" / "ant" / "notes.txt").write_text("not an image")
    (folder / "train" / ".cache").mkdir()
    data = fsdata.load(f"folder:{folder}", validation_size=6)
    assert data.class_names == ("ant", "bee")
    assert (data.train.num_images, data.validation.num_images) == (18, 6)
    assert (data.image_size, data.in_channels) == (16, 3)
    x, _ = pictures(num=8, size=16, seed=8)
    assert np.array_equal(pixels_of(data, data.test), np.concatenate([x[::2], x[1::2]]))


def test_images_decoded_on_access_equal_images_held_in_memory(folder):
    held = fsdata.load(f"folder:{folder}", image_size=8, batch_size=6)
    on_disk = fsdata.load(f"folder:{folder}", image_size=8, batch_size=6, max_memory_bytes=1000)
    assert held.mean == on_disk.mean
    for left, right in zip(held.train.batch(7), on_disk.train.batch(7), strict=True):
        assert torch.equal(left, right)
    assert torch.equal(held.test[0][0], on_disk.test[0][0])


def test_images_decoded_on_access_are_augmented_on_the_host_and_say_so_beside_a_gpu(
    folder, monkeypatch
):
    def said(**options):
        chosen = {"image_size": 8, "max_memory_bytes": 0} | options
        return fsdata.load(f"folder:{folder}", **chosen).train.augmented

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("FASTSHIFT_DEVICE", raising=False)
    why = "on the host: the images are read from files"
    assert said() == said(device="cuda") == why
    assert said(device="cpu") == "on the host"
    monkeypatch.setenv("FASTSHIFT_DEVICE", "cpu")
    assert said() == "on the host"


def test_a_folder_can_be_limited_to_some_classes_and_images(folder):
    extra = folder / "train" / "cat"
    (folder / "train" / "bee").rename(extra)
    (folder / "val" / "bee").rename(folder / "val" / "cat")
    data = fsdata.load(f"folder:{folder}", classes=[1, 0], limit=12, validation_size=4)
    assert data.class_names == ("cat", "ant")
    assert data.train.num_images == 8


def test_images_of_different_sizes_need_an_image_size(folder):
    image_module = pytest.importorskip("PIL.Image")
    x, _ = pictures(num=1, size=32)
    image_module.fromarray(x[0, :20]).save(folder / "train" / "bee" / "wide.jpg", quality=95)
    image_module.fromarray(x[0, ..., 0]).save(folder / "train" / "bee" / "grey.webp")
    message = refusal(f"folder:{folder}")
    assert "expected 16x16 as the first image's width (or an image_size to scale all to)" in message
    data = fsdata.load(f"folder:{folder}", image_size=12)
    assert data.image_size == 12
    assert data.train.num_images + data.validation.num_images == 26


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda root: root.rename(root.with_name("gone")), "no directory"),
        (lambda root: (root / "val").rename(root / "valid"), "val, expected train/ and val/ in it"),
        (lambda root: (root / "train" / "cat").mkdir(), "train/cat holds no image"),
        (lambda root: (root / "val" / "cat").mkdir(), "val/cat is no class folder of train/"),
        (lambda root: (root / "train").rename(root / "val" / "x"), "no directory"),
        (
            lambda root: (root / "train" / "ant" / "000.png").write_bytes(b"no image"),
            "000.png: cannot identify image file",
        ),
        (
            lambda root: (root / "train" / "bee").rename(root / "bee"),
            "val/bee is no class folder of train/",
        ),
    ],
)
def test_a_folder_that_cannot_be_used_is_refused_with_the_reason(folder, change, message):
    change(folder)
    assert message in refusal(f"folder:{folder}")


def test_an_empty_folder_is_refused(tmp_path):
    for part in ("train", "val"):
        (tmp_path / part).mkdir()
    assert "train/ holds no image, expected class folders" in refusal(f"folder:{tmp_path}")


@pytest.mark.parametrize("max_memory_bytes", [0, 10**9])
def test_a_damaged_image_is_named_whether_decoded_at_once_or_on_access(folder, max_memory_bytes):
    file = folder / "train" / "bee" / "001.png"
    file.write_bytes(file.read_bytes()[:300])
    message = refusal(f"folder:{folder}", max_memory_bytes=max_memory_bytes)
    assert f"{file}: " in message
    assert "expected a whole image file" in message


def test_an_image_of_16_bits_is_refused_rather_than_clipped(folder):
    image_module = pytest.importorskip("PIL.Image")
    deep = np.arange(256, dtype=np.uint16).reshape(16, 16) * 200
    image_module.fromarray(deep).save(folder / "train" / "ant" / "deep.png")
    message = refusal(f"folder:{folder}")
    assert "deep.png: mode I;16, expected 8 bits a channel" in message


@pytest.fixture(scope="module")
def truth():
    if "FASTSHIFT_DATA" not in os.environ:
        pytest.skip("FASTSHIFT_DATA is not set: no folder of real images")
    return Path(os.environ["FASTSHIFT_DATA"])


def test_the_real_pixpack_container_is_refused(truth):
    assert "a pixpack container" in refusal(f"npz:{truth / 'cifar10.npz'}")


def test_real_cifar_images_have_the_published_mean_and_deviation(truth):
    spec = importlib.util.spec_from_file_location("pixpack", truth / "pixpack.py")
    pixpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pixpack)
    x, y = pixpack.load(truth / "cifar10.npz", "train", limit=5000)
    data = fsdata.from_arrays(x, y)
    assert data.mean == pytest.approx((0.4914, 0.4822, 0.4465), abs=0.01)
    assert data.std == pytest.approx((0.2470, 0.2435, 0.2616), abs=0.01)
