from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from fastshift import durable
from fastshift.errors import CheckpointError


def test_a_log_goes_on_from_the_length_a_checkpoint_recorded(tmp_path):
    path = tmp_path / "scores.jsonl"
    with durable.ScoreLog(path) as log:
        assert log.flush() == 0
        log.append({"arch": "012", "error": 1 / 3, "loss": 2.5})
        length = log.flush()
        assert length == path.stat().st_size
        log.append({"arch": "210", "error": 0.5})
    with path.open("ab") as file:
        file.write(b'{"arch": "2')
    durable.truncate_log(path, length)
    with durable.ScoreLog(path) as log:
        log.append({"arch": "222"})
        log.flush()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows == [{"arch": "012", "error": 1 / 3, "loss": 2.5}, {"arch": "222"}]


def test_a_number_that_is_not_finite_is_written_as_null(tmp_path):
    path = tmp_path / "scores.jsonl"
    with durable.ScoreLog(path) as log:
        log.append({"error": math.nan, "loss": np.float64("inf"), "generation": 0, "flops": 7.5})
    assert path.read_text() == '{"error": null, "loss": null, "generation": 0, "flops": 7.5}\n'


def test_every_line_can_be_read_as_soon_as_it_is_appended(tmp_path):
    path = tmp_path / "scores.jsonl"
    with durable.ScoreLog(path) as log:
        for count in range(1, 4):
            log.append({"count": count})
            assert len(path.read_text().splitlines()) == count


def test_a_log_that_ends_within_a_line_is_refused(tmp_path):
    path = tmp_path / "scores.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a"')
    with pytest.raises(CheckpointError, match="ends within a line, at byte 13"):
        durable.ScoreLog(path)


def test_a_log_is_cut_only_at_the_end_of_a_line_it_has(tmp_path):
    path = tmp_path / "scores.jsonl"
    with pytest.raises(CheckpointError, match=r"scores\.jsonl cannot be cut to 5 bytes"):
        durable.truncate_log(path, 5)
    durable.truncate_log(path, 0)
    assert not path.exists()
    path.write_bytes(b"12345678\n1234\n")
    with pytest.raises(CheckpointError, match="has 14 bytes, expected at least 15"):
        durable.truncate_log(path, 15)
    with pytest.raises(CheckpointError, match="no end of line at byte 8"):
        durable.truncate_log(path, 8)
    assert path.stat().st_size == 14
    durable.truncate_log(path, 14)
    durable.truncate_log(path, 9)
    assert path.read_bytes() == b"12345678\n"
    durable.truncate_log(path, 0)
    assert path.read_bytes() == b""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_named_by_the_log():
    with (
        durable.ScoreLog("/dev/full") as log,
        pytest.raises(CheckpointError, match=r"/dev/full cannot be written: .*No space left"),
    ):
        log.append({"a": 1})


def test_a_log_in_a_missing_folder_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        durable.ScoreLog(tmp_path / "missing" / "scores.jsonl")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "result.json"
    durable.replace_file(path, b"old")
    durable.replace_file(path, b"new")
    assert durable.read_file(path) == b"new"
    assert [item.name for item in tmp_path.iterdir()] == ["result.json"]
    with pytest.raises(CheckpointError, match="cannot be written"):
        durable.replace_file(tmp_path / "missing" / "result.json", b"new")
