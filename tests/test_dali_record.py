"""The record of JPEG loaders: what is timed and how, and the README that says what it says."""

from __future__ import annotations

import json

import dali
import jpeg_loaders
import pytest

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
    "files": 10,
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
    text = dali.section(RECORD)
    for part in (
        "DALI on the CPU, 2026-01-02",
        "A processor, 2 cores, Linux; DALI 2, torchvision 0.1, Pillow 13, torch 3, Python 4",
        "commit abc, with changes that are not committed; load 0.2 before and 1.0 after",
        "| DALI, 1 thread | 1,000 | 900 to 1,100 | 15 | 2.35 over torchvision, in the caller",
        "| torchvision, 2 processes | 1,003 | 900 to 1,100 | 15 |  |",
    ):
        assert part in text
    assert "not committed" not in dali.section(RECORD | {"dirty": False})


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
    if dali.RECORD.exists():
        kept = dali.section(json.loads(dali.RECORD.read_text()))
    else:
        kept = "## JPEG files: DALI on the CPU: not measured"
    assert text == dali.in_readme(text, kept)


@pytest.mark.dali
def test_the_command_times_every_loader_and_writes_record_and_readme(tmp_path, monkeypatch, capsys):
    for package in ("nvidia.dali", "torchvision", "sklearn.datasets", "PIL.Image"):
        pytest.importorskip(package)
    monkeypatch.setattr(jpeg_loaders, "NUM_IMAGES", 72)
    monkeypatch.setattr(dali, "AHEAD", 1)
    monkeypatch.setattr(dali, "RECORD", tmp_path / "dali.json")
    monkeypatch.setattr(dali, "README", tmp_path / "README.md")
    dali.README.write_text(f"{dali.BEGIN}\n{dali.END}\n")
    assert dali.main(["--rounds", "2", "--round-batches", "1", "--record"]) == 0
    found = json.loads(dali.RECORD.read_text())
    assert [row["name"] for row in found["rows"]] == list(dali.LABELS)
    for row in found["rows"]:
        assert row["rounds"] == len(row["seconds"]) == 2
        assert 0 < row["percentile_20"] <= row["images_per_second"] <= row["percentile_80"]
    assert set(found["ratios"]) == set(dali.PAIRS)
    assert dali.section(found) in dali.README.read_text()
    assert dali.section(found) in capsys.readouterr().out
