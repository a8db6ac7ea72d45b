"""The speed record: reduced, merged, and shown beside the floors; the READMEs say what it says."""

from __future__ import annotations

import json
import re

import pytest
import speed
from baselines import Turns
from recording import figures
from speed_tables import FLOORS, details, short, summary

MACHINE = {
    "machine": {
        "device": "A processor",
        "cores": 2,
        "system": "Linux",
        "instruction_set": "avx512",
        "bf16_units": {"avx512_bf16": True, "amx_bf16": False},
    },
    "versions": {"fastshift": "0", "torch": "2", "numpy": "2", "python": "3"},
}
CEILING = {"fp32_gflops": 100.0, "bf16_gflops": 80.0, "copy_gb": 10.0}


def timed(name, file="blocks", median=0.01, **extra):
    stats = {"min": median, "median": median, "stddev": 0.0, "rounds": 3, "mean": median}
    return {
        "name": name,
        "fullname": f"benchmarks/bench_{file}.py::{name}",
        "stats": stats,
        "extra_info": {"threads": 1, "precision": "fp32", "space": "s", "size": 32, **extra},
    }


def block(name, ratio, **extra):
    fields = {"ratio": ratio, "ratio_folded": ratio / 2, "gflop": 0.7, "kernels": "avx512"}
    fields["peak_gflop"] = 1.0
    times = {"eager nchw": 0.03, "eager nhwc": 0.01 * ratio}
    return timed(name, item="block inference", baseline_seconds=times, **fields, **extra)


@pytest.fixture
def record():
    run = {"date": "2026-01-01", "commit": "abc", "dirty": False, "threads": 1, "failed": []}
    run |= {"ceiling_before": CEILING, "ceiling_after": CEILING}
    run |= {"load_before": 0.5, "load_after": 1.1}
    made = [
        block("test_inference[a]", 2.5),
        block("test_inference[b]", 1.5),
        timed(
            "test_accumulate[g]",
            "shift",
            item="accumulate",
            generation=0,
            ratio=4.4,
            ratio_folded=4.4,
            ratio_over_sharing=2.2,
        ),
        timed("test_first[x]", "fresh", item="first evaluation", seconds=1.5, score_seconds=0.2),
        timed(
            "test_memory[x]",
            "fresh",
            item="memory",
            what="train",
            ratio=0.61,
            mebibytes=10.0,
            baseline_mebibytes={"nchw": 16.4},
        ),
        timed(
            "test_levers[x]",
            "shift",
            item="accumulate levers",
            sharing=2.0,
            without={"trie": 0.02, "fusion": 0.03},
        ),
        timed("test_of_something_else"),
    ]
    made[-1]["extra_info"] = {}
    return {**MACHINE, "runs": [run], "rows": speed.reduce_rows(made, 0)}


def line_of(text, what):
    return next(line for line in text.splitlines() if line.startswith(f"| {what}"))


def test_a_row_keeps_its_spread_and_its_run(record):
    assert len(record["rows"]) == 6
    row = record["rows"][0]
    assert row["name"] == "blocks::test_inference[a]"
    assert row["times"] == {"min": 0.01, "median": 0.01, "stddev": 0.0, "rounds": 3}
    assert row["run"] == 0


def test_rows_made_again_take_the_place_of_their_own_only(record):
    record["runs"].append({**record["runs"][0], "commit": "def"})
    again = speed.reduce_rows([block("test_inference[b]", 9.0)], 1)
    speed.merge(record, [*again, {**again[0], "threads": 2}])
    found = {
        (r["name"], r["threads"]): (r["ratio"], r["run"]) for r in record["rows"] if "ratio" in r
    }
    assert found["blocks::test_inference[a]", 1] == (2.5, 0)
    assert found["blocks::test_inference[b]", 1] == (9.0, 1)
    assert found["blocks::test_inference[b]", 2] == (9.0, 1)


def test_a_run_without_a_row_is_forgotten(record):
    record["runs"].append({**record["runs"][0], "commit": "def"})
    names = [row["name"] for row in record["rows"]]
    speed.merge(record, [{**record["rows"][0], "run": 1}])
    speed.drop(record, [(name, 1) for name in names[1:]])
    speed.prune(record)
    assert [run["commit"] for run in record["runs"]] == ["def"]
    assert [row["run"] for row in record["rows"]] == [0]


def test_a_missed_floor_is_said_to_be_missed(record):
    text = summary(record)
    assert "**missed** (1 of 2 met)" in line_of(text, "block inference")
    assert "60 % of ceiling: met" in line_of(text, "block inference")
    # At 70 % of the ceiling and 2.5 and 1.5 times the baseline, twice it takes 56 and 93 %.
    assert "| 2 | 56 % / 93 % |" in line_of(text, "block inference")
    assert line_of(text, "accumulate | s, 32 px | fp32 | 1 |  | 4.40 = 2.20 S").count("| met |")
    assert "1.50 s" in line_of(text, "first evaluation")
    assert "**missed**" in line_of(text, "first evaluation")
    assert "-39 %" in line_of(text, "memory, train")
    assert "50 % of ceiling: not measured" in line_of(text, "accumulate")
    assert "0.02 (2.00)" in text


def test_what_has_no_row_is_said_to_be_not_measured(record):
    text = summary(record)
    missing = text[text.index("\nNot measured: ") :].splitlines()[1]
    for item, precision in FLOORS:
        measured = any(line.startswith(f"| {item}") for line in text.splitlines())
        assert (f"{item} in {precision}" in missing) == (not measured or precision == "bf16")
    assert "AMX: not measured" in text
    assert "torch.compile` is not among the baselines" in text


def test_a_dirty_tree_and_a_failure_show(record):
    assert "uncommitted" not in summary(record)
    record["runs"][0].update(dirty=True, failed=["blocks::test_inference[c]"])
    for text in (summary(record), details(record)):
        assert "with uncommitted changes" in text
        assert "Failed, so without a row: blocks::test_inference[c]" in text


def test_the_figures_in_short_come_first(record):
    assert summary(record).startswith(
        "In short, in fp32 on one thread: one block is computed 1.50 to 2.50 times as fast as by "
        "the best of PyTorch without folded norms, trained on 4.40 times as fast. What was asked "
        "beforehand (*floor*) is met by 3 of 5 figures."
    )


def test_a_share_of_the_ceiling_is_of_the_same_rounds():
    """The machine slows down by ten in one round: so does its matrix product."""
    found = figures([1.0, 10.0, 1.0], {"eager": [2.0, 20.0, 2.0]}, peaks=[1.0, 100.0, 10.0, 100.0])
    assert found["peak_gflop"] == 100.0


def test_a_floor_between_the_rounds_is_said_to_be_so():
    row = {"ratio": 4.0, "ratio_over_sharing": 2.1, "ratio_extremes": [3.6, 4.2]}
    own = figures([1.0, 2.0, 4.0], {"eager": [2.0, 6.0, 4.0]})
    assert own["ratio"] == 2.0
    assert own["ratio_extremes"] == [1.0, 3.0]
    assert "ratio_extremes" not in figures([1.0, 2.0], {"eager": [3.0]})
    floor = FLOORS["evaluator", "fp32"]
    assert floor.near(row)
    assert not floor.near({**row, "ratio_extremes": [3.9, 4.2]})
    assert not floor.near({"ratio": 4.0, "ratio_over_sharing": 2.1})


def test_types_are_compared_within_a_run_alone(record):
    bf16 = block("test_inference[a-bf16]", 3.0, precision="bf16")
    fp32 = block("test_inference[a-fp32]", 3.0)
    fp32["stats"] = {**fp32["stats"], "median": 0.02}
    bf16["extra_info"]["precision"] = "bf16"
    record["runs"].append(record["runs"][0])
    record["rows"] = speed.reduce_rows([bf16], 0) + speed.reduce_rows([fp32], 0)
    assert "| 2.00 | " in line_of(summary(record), "block inference | s, 32 px | bf16")
    record["rows"][1]["run"] = 1
    assert "| 2.00 | " not in line_of(summary(record), "block inference | s, 32 px | bf16")


def test_spreads_are_shown_as_what_they_are(record):
    record["rows"][0]["times"]["rounds"] = 1
    record["rows"].append(
        {**record["rows"][4], "name": "m", "mebibytes": 2.0, "extremes": [1.5, 2.25]}
        | {"item": "memory", "what": "train", "baseline_mebibytes": {}, "ratio": 1.0}
    )
    text = details(record)
    assert "| once |" in text
    assert "| 1.5 to 2.25 MiB |" in text


def test_only_what_stands_between_the_markers_changes():
    begin, end = speed.BEGIN.format("speed"), speed.END.format("speed")
    text = f"before\n{begin}\nold\n{end}\nafter\n"
    assert speed.section(text, "new\n") == f"before\n{begin}\n\nnew\n\n{end}\nafter\n"
    assert speed.section(speed.section(text, "new"), "new") == speed.section(text, "new")
    with pytest.raises(SystemExit, match="lacks"):
        speed.section("no markers", "new")
    with pytest.raises(SystemExit, match="amx: begin"):
        speed.section(text, "new", "amx")


def test_the_command_writes_the_readmes(record, tmp_path, monkeypatch, capsys):
    readme, kept = tmp_path / "README.md", tmp_path / "record.json"
    readme.write_text(f"{speed.BEGIN.format('speed')}\n{speed.END.format('speed')}\n")
    speed.write(kept, record)
    monkeypatch.setattr(speed, "READMES", {readme: summary})
    assert speed.main(["readme", "--out", str(kept)]) == 0
    assert summary(record).strip() in readme.read_text()
    assert speed.main(["table", "--out", str(kept)]) == 0
    assert summary(record).strip() in capsys.readouterr().out


@pytest.mark.parametrize("path", speed.READMES, ids=lambda path: path.parent.name)
def test_the_readmes_say_what_the_record_says(path):
    text = path.read_text()
    for name, record, makers in (
        ("speed", speed.RECORD, speed.READMES),
        ("amx", speed.AMX_RECORD, speed.AMX_READMES),
    ):
        assert text.count(speed.BEGIN.format(name)) == text.count(speed.END.format(name)) == 1
        if record.exists():
            made = makers[path](json.loads(record.read_text()))
            assert text == speed.section(text, made, name), "run speed.py readme"


def test_another_machines_record_is_told_in_a_paragraph(record):
    text = short(record)
    assert "one thread: in fp32 one block is computed 1.50 to 2.50 times as fast as" in text
    assert "is met there by 3 of 5 figures" in text
    for row in record["rows"]:
        row["precision"] = "bf16"
    assert "one thread: in bf16 one block is computed" in short(record)


def test_the_subset_takes_each_kind_of_its_ids():
    taken = (
        "bench_blocks.py::test_inference[shufflenet_v2-224-32-1-0-fp32]",
        "bench_evaluator.py::test_generation[nasbench_macro-32-generation10-fp32]",
        "bench_shift.py::test_accumulate[shufflenet_v2-64-10-fp32]",
        "bench_shift.py::test_pretraining_step[nasbench_macro-32-fp32]",
    )
    left = (
        "bench_blocks.py::test_inference[shufflenet_v2-224-32-1-0-bf16]",
        "bench_generation.py::test_generation[nasbench_macro-32-generation10-fp32]",
        "bench_shift.py::test_accumulate[shufflenet_v2-64-0-fp32]",
    )
    assert all(re.search(speed.SUBSET, name) for name in taken)
    assert not any(re.search(speed.SUBSET, name) for name in left)


def test_a_ratio_is_the_median_of_its_rounds_where_baselines_take_turns():
    """The machine slows down by ten in one round: no median of either alone would show 2 and 3."""
    own = [1.0, 10.0, 1.1]
    times = {"eager": [50.0, 2.0, 20.0, 2.2], "slow": [9.0, 4.0, 40.0, 4.4], "folded": [1.0]}
    found = figures(own, times, sharing=2.0)
    assert found["baseline"] == "eager"
    assert found["turns"]
    assert found["ratio"] == pytest.approx(2.0)
    assert found["ratio_over_sharing"] == pytest.approx(1.0)
    assert found["ratio_folded"] == pytest.approx(1.0 / 1.1, rel=1e-3)


def test_a_baseline_that_was_timed_once_is_compared_with_the_median():
    found = figures([1.0, 2.0, 3.0], {"released loop": [8.0]})
    assert not found["turns"]
    assert found["ratio"] == 4.0


def test_each_baseline_is_called_once_a_round():
    order = []
    turns = Turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")})
    assert turns() is None
    turns()
    assert order == ["a", "b", "a", "b"]
    assert [len(times) for times in turns.times.values()] == [2, 2]
