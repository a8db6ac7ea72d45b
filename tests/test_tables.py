from __future__ import annotations

import io
import json

import numpy as np
import pytest

from fastshift import tables
from fastshift.errors import ArchError, DataError


def _write(path, text: str):
    path.write_text(text, encoding="utf-8")
    return path


def test_scores_come_back_exactly(tmp_path):
    table = tables.ScoreTable(
        archs=("012", "210"),
        error=np.array([1 / 3, np.nan]),
        loss=np.array([5e-324, np.inf]),
        flops=np.array([2**53 + 1, 7]),
        params=np.array([1, 2]),
        weights_version=np.array([0, 400]),
    )
    text = io.StringIO()
    tables.write_scores(text, table)
    assert text.getvalue().splitlines()[0] == "arch,error,loss,flops,params,weights_version"
    found = tables.read_scores(_write(tmp_path / "scores.csv", text.getvalue()))
    assert found.archs == table.archs
    for name in ("error", "loss", "flops", "params", "weights_version"):
        assert getattr(found, name).dtype == getattr(table, name).dtype
        np.testing.assert_array_equal(getattr(found, name), getattr(table, name))


def test_scores_need_no_more_than_arch_and_error(tmp_path):
    found = tables.read_scores(_write(tmp_path / "scores.csv", "error,arch\r\n0.5,012\r\n"))
    assert found.archs == ("012",)
    assert found.error.tolist() == [0.5]
    assert found.loss is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "header \\[\\]"),
        ("error\n0.5\n", "expected distinct names with 'arch'"),
        ("arch,error,error\n0,1,1\n", "expected distinct names"),
        ("arch,loss\n012,0.5\n", "expected error"),
        ("arch,error,speed\n012,0.5,1\n", "'speed'"),
        ("arch,error\n", "no rows"),
        ("arch,error\n012,0.5\n210\n", "1 fields in line 3, expected 2"),
        ("arch,error\n012,good\n", "good"),
        ("arch,error,flops\n012,0.5,1.5\n", "1.5"),
        ("arch,error\n012,0.5\n012,0.4\n", "'012' stands in it twice"),
        ('arch,error\n"012,0.5\n', "end of data"),
    ],
)
def test_malformed_scores_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(DataError, match=message) as caught:
        tables.read_scores(_write(tmp_path / "scores.csv", text))
    assert "scores.csv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read_are_refused_by_name(tmp_path):
    for read in (tables.read_scores, tables.Truth.load):
        with pytest.raises(DataError, match=r"missing\.csv"):
            read(tmp_path / "missing.csv")
        with pytest.raises(DataError, match=str(tmp_path)):
            read(tmp_path)
        path = tmp_path / "binary.csv"
        path.write_bytes(b"\xff\xfe\x00\x01")
        with pytest.raises(DataError, match=r"binary\.csv"):
            read(path)


def test_truth_is_read_from_json_with_and_without_runs(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(
        json.dumps(
            {
                "01": {"test_acc": [90.0, 91.0], "mean_acc": 90.5, "flops": 5, "params": 1},
                "10": {"test_acc": [80.0, 81.0], "mean_acc": 80.5, "flops": 6, "params": 1},
            }
        )
    )
    truth = tables.Truth.load(path)
    assert truth.archs == ("01", "10")
    assert truth.accuracy.tolist() == [[90.0, 91.0], [80.0, 81.0]]
    assert truth.flops.tolist() == [5, 6]
    assert truth.rows(["10", "01", "10"]).tolist() == [1, 0, 1]
    with pytest.raises(ArchError, match="'00' has no true accuracy"):
        truth.rows(["00"])
    path.write_text('{"01": {"mean_acc": 90.5}}')
    assert tables.Truth.load(path).accuracy.tolist() == [[90.5]]
    assert tables.Truth.load(path).flops is None


def test_truth_is_read_from_csv_with_a_column_for_each_run(tmp_path):
    text = "arch,flops,seed0,params,seed1\n01,5,90.0,1,91.0\n10,6,80.0,1,81.0\n"
    truth = tables.Truth.load(_write(tmp_path / "truth.csv", text))
    assert truth.accuracy.tolist() == [[90.0, 91.0], [80.0, 81.0]]
    assert truth.flops.tolist() == [5, 6]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", "{"),
        ("a.json", "[]"),
        ("a.json", "{}"),
        ("a.json", '{"01": 90.5}'),
        ("a.json", '{"01": {"flops": 5}}'),
        ("a.json", '{"01": {"test_acc": "good"}}'),
        ("a.json", '{"01": {"test_acc": [NaN]}}'),
        ("a.json", '{"01": {"test_acc": [90, 91]}, "10": {"test_acc": [90]}}'),
        ("a.json", '{"01": {"mean_acc": 90}, "01": {"mean_acc": 91}}'),
        ("a.csv", "arch,flops\n01,5\n"),
        ("a.csv", "arch,run\n01,good\n"),
        ("a.csv", "arch,run\n01,inf\n"),
    ],
)
def test_malformed_truth_is_refused_by_name(tmp_path, name, text):
    with pytest.raises(DataError, match=name) as caught:
        tables.Truth.load(_write(tmp_path / name, text))
    assert "\n" not in str(caught.value)
