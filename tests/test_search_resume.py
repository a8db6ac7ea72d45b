"""A search that stops and goes on: the same, bit for bit, as one that never stopped."""

from __future__ import annotations

import numpy as np
import pytest
from search_cases import MODES, SMALL, lines_of, run_small, small_data, values_of

from fastshift.errors import CheckpointError
from fastshift.search import Search, SearchOptions, search, transfer
from fastshift.testing import changed_tensors, micro_supernet, stop_at, synthetic_data

pytestmark = pytest.mark.usefixtures("no_waiting_for_the_disk")


def _assert_same_run(out, net, result, reference):
    lines, tensors, plain, version = reference
    assert result.stopped is None
    assert lines_of(out) == lines
    assert values_of(result) == plain
    assert changed_tensors(tensors, net.tensors()) == set()
    assert net.version == version


def _reference(out, net, result):
    return lines_of(out), net.tensors(), values_of(result), net.version


@pytest.mark.parametrize("shift", MODES)
def test_a_run_stopped_anywhere_and_resumed_equals_the_unbroken_run(shift, tmp_path):
    calls, options = 0, {"population": 2 if shift == "immediate" else 3, "mutation": 1}

    def count():
        nonlocal calls
        calls += 1
        return False

    net, _, result = run_small(shift, tmp_path / "whole", stop=count, **options)
    reference = _reference(tmp_path / "whole", net, result)
    expected = {"immediate": 10, "every:2": 10, "none": 2}.get(shift, 6)
    assert calls == expected
    for call in range(1, calls + 1):
        out = tmp_path / f"stopped-{call}"
        _, _, part = run_small(shift, out, stop=stop_at(call), **options)
        assert part.stopped == "interrupted"
        assert not (out / "result.json").exists()
        net, _, result = run_small(shift, out, net=micro_supernet(seed=99), resume=True, **options)
        _assert_same_run(out, net, result, reference)


@pytest.mark.parametrize("shift", ["accumulate", "none", "transfer"])
def test_a_run_stopped_at_every_point_equals_the_unbroken_run(shift, tmp_path):
    options = {"generations": 2, "strategy": "sequential" if shift == "none" else "shared"}
    if shift == "transfer":
        options |= {"start": transfer, "head_warmup_steps": 3, "frozen_trunk_generations": 1}
        options |= {"head_lr_multiplier": 5.0}
    mode = "accumulate" if shift == "transfer" else shift
    net, _, result = run_small(mode, tmp_path / "whole", **options)
    reference = _reference(tmp_path / "whole", net, result)
    out = tmp_path / "broken"
    for part in range(100):
        net = micro_supernet(seed=9 if part else 0)
        net, _, result = run_small(mode, out, net=net, resume=True, stop=stop_at(1), **options)
        if result.stopped is None:
            break
    assert part == {"none": 3, "transfer": 12}.get(shift, 9)
    _assert_same_run(out, net, result, reference)


def test_a_search_object_goes_on_after_its_own_stop(tmp_path):
    net, _, result = run_small("accumulate", tmp_path / "whole")
    reference = _reference(tmp_path / "whole", net, result)
    net = micro_supernet()
    options = SearchOptions(shift="accumulate", **SMALL)
    found = Search(net, small_data(), options, seed=3, out=tmp_path / "again")
    for call in (2, 1, 1):
        assert found.run(stop_at(call)).stopped == "interrupted"
    _assert_same_run(tmp_path / "again", net, found.run(), reference)


def test_lines_written_after_the_last_checkpoint_are_cut_on_resume(tmp_path):
    net, _, result = run_small("accumulate", tmp_path / "whole")
    reference = _reference(tmp_path / "whole", net, result)
    out = tmp_path / "cut"
    run_small("accumulate", out, stop=stop_at(3))
    with (out / "scores.jsonl").open("a") as file:
        file.write('{"arch": "000", "half a li')
    net, _, result = run_small("accumulate", out, net=micro_supernet(seed=9), resume=True)
    _assert_same_run(out, net, result, reference)


def test_a_finished_run_gives_its_result_again(tmp_path):
    net, _, result = run_small("accumulate", tmp_path)
    reference = _reference(tmp_path, net, result)
    written = (tmp_path / "result.json").read_bytes()
    net, _, again = run_small("accumulate", tmp_path, net=micro_supernet(seed=9), resume=True)
    _assert_same_run(tmp_path, net, again, reference)
    assert again.seconds == result.seconds
    assert (tmp_path / "result.json").read_bytes() == written
    (tmp_path / "result.json").unlink()
    run_small("accumulate", tmp_path, net=micro_supernet(seed=9), resume=True)
    assert (tmp_path / "result.json").read_bytes() == written


def test_checkpoints_by_the_clock_change_nothing(tmp_path):
    net, _, result = run_small("accumulate", tmp_path / "whole")
    reference = _reference(tmp_path / "whole", net, result)
    net, out = micro_supernet(), tmp_path / "often"
    options = SearchOptions(shift="accumulate", **SMALL)
    result = Search(net, small_data(), options, seed=3, out=out, checkpoint_seconds=0.0).run()
    _assert_same_run(out, net, result, reference)


def test_resume_starts_the_run_if_there_is_none(tmp_path):
    _, _, plain = run_small("accumulate", tmp_path / "plain")
    _, _, result = run_small("accumulate", tmp_path / "new", resume=True)
    assert values_of(result) == values_of(plain)


def test_a_directory_that_holds_a_run_is_refused_without_resume(tmp_path):
    run_small("accumulate", tmp_path, stop=stop_at(2))
    with pytest.raises(CheckpointError, match="holds a run already"):
        run_small("accumulate", tmp_path)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"shift_lr": 0.01}, "shift_lr"),
        ({"population": 5}, "population"),
        ({"constraints": {"flops": "99%"}}, "constraints"),
        ({"data": synthetic_data(num_classes=4, seed=1)}, "data"),
        ({"net": micro_supernet(5)}, "space"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_the_checkpoint_of_another_run_is_refused_by_what_differs(change, name, tmp_path):
    run_small("accumulate", tmp_path, stop=stop_at(2))
    with pytest.raises(CheckpointError, match=name):
        run_small("accumulate", tmp_path, resume=True, **change)


def test_a_run_needs_no_directory(tmp_path):
    first, _, result = run_small("accumulate", tmp_path)
    second, _, without = run_small("accumulate")
    assert values_of(result) == values_of(without)
    assert changed_tensors(first.tensors(), second.tensors()) == set()
    first, _, part = run_small("accumulate", stop=stop_at(1))
    assert part.stopped == "interrupted"


@pytest.mark.parametrize(
    "change", [{"precision": "bf16"}, {"data": 44}, {"fresh_head": True}, {"cost": 9}]
)
def test_a_search_is_not_resumed_with_other_data_precision_head_or_costs(
    change, tmp_path, monkeypatch
):
    first = dict(SMALL, generations=0)
    search(micro_supernet(), small_data(), out=tmp_path, seed=3, **first)
    net, data, options = micro_supernet(), small_data(), {}
    described = data.describe()
    if "data" in change:
        monkeypatch.setattr(data, "describe", lambda: {**described, "validation_images": 44}, False)
    elif "cost" in change:
        table = np.arange(9.0).reshape(3, 3)
        net.space.add_cost("energy", table)
    else:
        options = change
    with pytest.raises(CheckpointError, match="another run"):
        search(net, data, out=tmp_path, seed=3, resume=True, **first, **options)
