"""The record of JPEG loaders: what is timed and how, and the README that says what it says."""

from __future__ import annotations

import json
from dataclasses import replace

import dali
import jpeg_loaders
import numpy as np
import pytest

from fastshift.data.image_folder import open_image

RECORD = {
    "date": "2026-01-02",
    "machine": {
        "device": "A processor",
        "cores": 2,
        "system": "Linux",
        "dali": "2",
        "torchvision": "0.1",
        "pillow": "13",
        "torch": "3",
        "python": "4",
        "commit": "abc",
    },
    "dirty": True,
    "load_before": 0.25,
    "load_after": 1.0,
    "files": 1000,
    "sides": [200, 500],
    "image_size": 128,
    "batch_size": 32,
    "rows": [
        {
            "name": name,
            "images_per_second": 1000 + index,
            "percentile_20": 900,
            "percentile_80": 1100,
            "rounds": 15,
        }
        for index, name in enumerate(dali.LABELS)
    ],
    "ratios": {"dali-1": 2.345, "dali-2": 1.0},
}


def test_a_section_says_machine_versions_spread_and_what_was_not_clean():
    text = dali.part(RECORD)
    for part in (
        "### To 128 pixels, 2026-01-02",
        "1,000 files of 200 to 500 pixels a side in the cache, to batches of 32 at 128 pixels",
        "A processor, 2 cores, Linux; DALI 2, torchvision 0.1, Pillow 13, torch 3, Python 4",
        "commit abc, with changes that are not committed; load 0.2 before and 1.0 after",
        "| DALI, 1 thread | 1,000 | 900 to 1,100 | 15 | 2.35 over torchvision, in the caller",
        "| torchvision, 2 processes | 1,003 | 900 to 1,100 | 15 |  |",
    ):
        assert part in text
    assert "not committed" not in dali.part(RECORD | {"dirty": False})
    assert "1,000 files of 32 pixels a side" in dali.part(RECORD | {"sides": [32, 32]})


def test_a_kind_of_files_that_was_not_measured_is_named():
    both = dali.section({"photographs": RECORD, "small": RECORD | {"image_size": 32}})
    assert both.index("### To 128 pixels, ") < both.index("### To 32 pixels, ")
    assert "not measured" not in both
    one = dali.section({"photographs": RECORD})
    assert one.endswith("### To 32 pixels: not measured")
    assert dali.part(RECORD) in one
    assert dali.section({}).count("not measured") == len(jpeg_loaders.KINDS) == 2


def test_only_what_stands_between_the_markers_changes():
    text = f"before\n{dali.BEGIN}\nold\n{dali.END}\nafter\n"
    once = dali.in_readme(text, "new \\1")
    assert once == f"before\n{dali.BEGIN}\n\nnew \\1\n\n{dali.END}\nafter\n"
    assert dali.in_readme(once, "new \\1") == once
    with pytest.raises(SystemExit, match="lacks"):
        dali.in_readme("no markers", "new")


def test_the_readme_says_what_the_record_says():
    text = dali.README.read_text()
    assert text.count(dali.BEGIN) == text.count(dali.END) == 1
    kept = json.loads(dali.RECORD.read_text()) if dali.RECORD.exists() else {}
    assert text == dali.in_readme(text, dali.section(kept))
    for name, record in kept.items():
        kind = jpeg_loaders.KINDS[name]
        assert record["image_size"] == kind.image_size
        assert record["sides"] == [min(kind.lowest), max(kind.highest)]


@pytest.fixture
def few(tmp_path, monkeypatch):
    """Give few files of each kind, and a record and a README of their own."""
    for package in ("nvidia.dali", "torchvision", "sklearn.datasets", "PIL.Image"):
        pytest.importorskip(package)
    for name, kind in jpeg_loaders.KINDS.items():
        monkeypatch.setitem(jpeg_loaders.KINDS, name, replace(kind, num_images=72, round_batches=1))
    monkeypatch.setattr(dali, "AHEAD", 1)
    monkeypatch.setattr(dali, "RECORD", tmp_path / "dali.json")
    monkeypatch.setattr(dali, "README", tmp_path / "README.md")
    dali.README.write_text(f"{dali.BEGIN}\n{dali.END}\n")
    return tmp_path


@pytest.mark.dali
@pytest.mark.parametrize("name", jpeg_loaders.KINDS)
def test_the_files_are_of_their_kind(few, name):
    kind = jpeg_loaders.KINDS[name]
    jpeg_loaders.write(few, kind)
    files = sorted(few.glob("train/*/*.jpg"))
    assert len({file.read_bytes() for file in files}) == kind.num_images
    for file in files:
        with open_image(file) as image:
            assert image.format == "JPEG"
            sides = np.array([image.height, image.width])
        assert (kind.lowest <= sides).all()
        assert (sides <= kind.highest).all()


@pytest.mark.dali
def test_the_command_times_every_loader_and_writes_record_and_readme(few, capsys):
    assert dali.main(["--rounds", "2", "--record"]) == 0
    found = json.loads(dali.RECORD.read_text())
    assert list(found) == list(jpeg_loaders.KINDS)
    for name, record in found.items():
        kind = jpeg_loaders.KINDS[name]
        assert [row["name"] for row in record["rows"]] == list(dali.LABELS)
        for row in record["rows"]:
            assert row["rounds"] == len(row["seconds"]) == 2
            assert 0 < row["percentile_20"] <= row["images_per_second"] <= row["percentile_80"]
        assert set(record["ratios"]) == set(dali.PAIRS)
        assert record["images_a_round"] == record["batch_size"] == kind.batch_size
        assert record["image_size"] == kind.image_size
    assert dali.section(found) in dali.README.read_text()
    said = capsys.readouterr().out
    assert all(dali.part(record) in said for record in found.values())


@pytest.mark.dali
def test_one_kind_of_files_can_be_measured_anew_by_itself(few, capsys):
    dali.RECORD.write_text(json.dumps({"photographs": RECORD}))
    assert dali.main(["--only", "small", "--rounds", "1", "--round-batches", "2", "--record"]) == 0
    found = json.loads(dali.RECORD.read_text())
    assert found["photographs"] == RECORD
    assert found["small"]["images_a_round"] == 2 * found["small"]["batch_size"]
    assert dali.part(RECORD) in dali.README.read_text()
    assert dali.part(RECORD) not in capsys.readouterr().out
