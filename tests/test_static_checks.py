"""The static record: what misses a target, what is worse than before, what is committed."""

from __future__ import annotations

import copy
import json
import re
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path

import pytest

pytest.importorskip("triton", minversion="3.6")

from catalogue import DTYPES, cases, recorded
from gpu_static import collect, variants
from kernel_sites import SITES, network
from static_checks import REGISTER_TOLERANCE, known, regressions, shortfalls
from static_tables import tables

from fastshift.kernels.cards import CARDS
from fastshift.kernels.infer_bands import Machine, choose_bands
from fastshift.kernels.infer_plan import plan_infer

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "benchmarks" / "records" / "gpu_static.json"


def _code(**changes):
    plain = {
        "registers": 100,
        "stack_bytes": 0,
        "spills": 0,
        "shared_bytes": 0,
        "warps": 4,
        "occupancy": 0.5,
        "load_bytes": 16,
        "store_bytes": 16,
        "loads": {"4": 2, "16": 2},
        "tensor": {"HMMA": 4},
        "products": True,
    }
    return {**plain, **changes}


def _record(code=None, counted=100, **changes):
    case = {
        "cards": [90],
        "launches": ["k 1"],
        "torch_launches": [],
        "variants": ["k FLAG=1"],
        "budget": 1,
        "made_bytes": 10,
        "least_made_bytes": 8,
        "scratch_bytes": 0,
        "allocated_bytes": 10,
        "read_bytes": 5,
        "written_bytes": 5,
        "multiply_adds": 7,
        "intensity": 1.0,
        "floor_us": {"90": 1.0},
        "load_width": 16,
        "store_width": 16,
        "narrow": [],
        "no_rows": [],
        "dot": True,
    }
    return {
        "versions": {"triton": "1"},
        "cards": {"90": "card"},
        "kernels": {"k 1": {"90": code or _code()}},
        "cases": {"op | site | bf16": {**case, **changes}},
        "counted_at": "small",
        "counted": {
            "op | bf16": {
                "loaded_bytes": counted,
                "stored_bytes": 10,
                "read_bytes": 90,
                "written_bytes": 10,
            }
        },
    }


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (_record(_code(spills=1)), "1 spills"),
        (_record(_code(registers=130, warps=16, occupancy=0.0)), "no program of 16 warps fits"),
        (_record(_code(stack_bytes=8)), "8 bytes of stack"),
        (_record(_code(tensor={})), "without tensor cores"),
        (_record(_code(products=False)), "no kernel of it has a matrix product"),
        (_record(_code(load_bytes=8)), "widest load 8 bytes, expected 16"),
        (_record(_code(store_bytes=4)), "widest store 4 bytes, expected 16"),
        (_record(_code(load_bytes=4), no_rows=["k"]), "widest load 4 bytes, expected 16"),
        (_record(_code(loads={"2": 3, "16": 2})), "3 loads of at most 16 bits"),
        (_record(made_bytes=9, allocated_bytes=4106), "4106 bytes made, needed are 9"),
        (_record(scratch_bytes=5, allocated_bytes=4112), "4112 bytes made, needed are 10"),
        (_record(scratch_bytes=2**25), "a scratch of 33554432 bytes, at most 26214400"),
        (_record(scratch_bytes=2**25, cards=[80]), "at most 20971520"),
        (_record(launches=["k 1", "k 1"]), "2 launches, the budget is 1"),
        (_record(torch_launches=["aten::sum"]), "2 launches, the budget is 1"),
    ],
)
def test_a_missed_target_is_named(found, words):
    lines = shortfalls(found)
    assert len(lines) == 1
    assert words in lines[0]


def test_what_meets_its_targets_passes():
    assert shortfalls(_record()) == []
    assert shortfalls(_record(_code(load_bytes=4, store_bytes=4), narrow=["k"])) == []
    assert shortfalls(_record(_code(store_bytes=4), no_rows=["k"])) == []
    assert shortfalls(_record(_code(load_bytes=4), load_width=4)) == []
    assert shortfalls(_record(_code(loads={"1": 8}), load_width=8)) == []
    assert shortfalls(_record(made_bytes=9, allocated_bytes=4105)) == []
    assert shortfalls(_record(scratch_bytes=5, allocated_bytes=4111)) == []
    wide = _record(_code(tensor={}))
    wide["cases"] = {"op | site | fp32": wide["cases"]["op | site | bf16"]}
    assert shortfalls(wide) == []  # fp32 products of full precision have no tensor core
    assert regressions(_record(), _record()) == []


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (_record(_code(registers=100 + REGISTER_TOLERANCE + 1)), "109 registers, 100"),
        (_record(_code(spills=2)), "2 spills, 0 in the record"),
        (_record(_code(load_bytes=8)), "load_bytes 8, 16"),
        (_record(_code(store_bytes=8)), "store_bytes 8, 16"),
        (_record(_code(tensor={})), "no tensor cores"),
        (_record(_code(tensor={"HMMA": 2})), "2 HMMA, 4 in the record"),
        (_record(_code(occupancy=0.4375)), "an occupancy of 44%, 50%"),
        (_record(_code(shared_bytes=1025)), "1025 bytes of shared memory, 0 in the record"),
        (
            _record(_code(loads={"4": 3, "16": 2})),
            "40.0% of its loads have 16 bytes or more, 50.0%",
        ),
        (_record(_code(loads={"4": 3, "16": 1})), "25.0% of its loads"),
        (_record(launches=["k 1", "k 1"]), "2 launches, 1"),
        (_record(torch_launches=["aten::sum"]), "2 launches, 1"),
        (_record(allocated_bytes=11), "allocated_bytes 11, 10"),
        (_record(counted=101), "loaded_bytes 101 under the interpreter, 100"),
    ],
)
def test_a_regression_is_named_and_its_reverse_is_none(found, words):
    lines = regressions(found, _record())
    assert len(lines) == 1
    assert words in lines[0]
    assert regressions(_record(), found) == []


@pytest.mark.parametrize(
    "change",
    [
        {"made_bytes": 30},
        {"least_made_bytes": 7},
        {"multiply_adds": 63},
        {"intensity": 0.1},
        {"floor_us": {"90": 0.5}},
        {"budget": 2},
        {"load_width": 8},
        {"store_width": 8},
        {"narrow": ["k"]},
        {"no_rows": ["k"]},
        {"dot": False},
    ],
    ids=str,
)
def test_a_changed_definition_is_named_in_either_direction(change):
    ((field, value),) = change.items()
    found = _record(**change)
    lines = regressions(found, _record()) + regressions(_record(), found)
    assert len(lines) == 2
    assert f"{field} {value}, " in lines[0]
    assert f", {value} in the record: another definition" in lines[1]


def test_an_architecture_that_is_gone_is_named_and_one_more_is_not():
    both = _record(cards=[90, 100])
    both["kernels"]["k 1"]["100"] = _code()
    both["cards"]["100"] = "another"
    assert regressions(both, _record()) == []
    assert regressions(_record(), both) == [
        "op | site | bf16: not for sm_100, which the record has",
        "sm_100: in the record, but no longer among the cards",
    ]
    without = copy.deepcopy(both)
    del without["kernels"]["k 1"]["100"]
    (line,) = regressions(without, both)
    assert line == "op | site | bf16: k 1 for sm_100: no machine code, which the record has"


def test_within_their_tolerances_the_compilers_choices_are_none():
    found = _code(
        registers=100 + REGISTER_TOLERANCE,
        shared_bytes=1024,
        loads={"4": 11, "16": 9},
        tensor={"HMMA": 3},
    )
    assert regressions(_record(found), _record()) == []


def test_a_change_of_form_is_named_in_either_direction():
    one, stages = _record(budget=2), _record(launches=["s 1", "s 1"], budget=2)
    stages["kernels"] = {"s 1": {"90": _code()}}
    words = "op | site | bf16: it runs {}; in the record {}"
    assert regressions(one, stages) == [words.format("k", "s")]
    assert words.format("s", "k") in regressions(stages, one)


@pytest.mark.parametrize(
    "change",
    [
        {"registers": 200},
        {"occupancy": 0.25},
        {"shared_bytes": 4096},
        {"loads": {"4": 4, "16": 1}},
        {"tensor": {"HMMA": 1}},
    ],
    ids=str,
)
def test_what_a_compiler_chooses_is_compared_between_equal_ones_alone(change):
    found = _record(_code(**change))
    assert len(regressions(found, _record())) == 1
    found["versions"]["triton"] = "2"
    assert regressions(found, _record()) == []


def test_what_is_new_or_gone_must_be_recorded():
    found = _record()
    found["cases"]["new | site | bf16"] = found["cases"]["op | site | bf16"]
    assert regressions(found, _record()) == ["new | site | bf16: not in the record"]
    (line,) = regressions(_record(), found)
    assert "no longer listed" in line
    assert regressions(_record(), found, partial=True) == []
    assert regressions(found, _record(), more=True) == []


def test_the_tables_show_every_kernel_case_and_count():
    text = "\n".join(tables(_record()))
    for words in ("k 1", "HMMA:4", "op | site | bf16", ">= 1", "BOUND", "1.10x", "without caches"):
        assert words in text
    assert "no time was measured" in text


def test_the_tables_show_memory_made_beside_what_is_needed_and_what_computing_again_would_leave():
    sizes = {"allocated_bytes": 9 * 10**6, "made_bytes": 7 * 10**6, "scratch_bytes": 4 * 10**6}
    head, row = (
        re.split(r" {2,}", line)
        for line in tables(_record(least_made_bytes=6 * 10**6, **sizes))
        if "scratch  " in line or ">= 1" in line
    )
    found = dict(zip(head, row, strict=True))
    wanted = {"made MB": "9", "needed": "7", "scratch": "4", "beyond least": "3"}
    assert {name: found[name] for name in wanted} == wanted


def test_a_target_that_the_record_misses_too_is_known_and_a_worse_one_is_not_silent():
    old = _record(_code(spills=5, stack_bytes=8))
    new = _record(_code(spills=3, stack_bytes=16))
    for found, key in ((old, "k 76543210"), (new, "k 0123abcd")):
        found["kernels"][key] = found["kernels"].pop("k 1")
        found["cases"]["op | site | bf16"]["launches"] = [key]
    assert [len(lines) for lines in known(shortfalls(new), old)] == [0, 1]
    assert [len(lines) for lines in known(shortfalls(new), _record())] == [1, 0]
    old["kernels"]["k 76543210"]["90"]["load_bytes"] = 8
    new["kernels"]["k 0123abcd"]["90"]["store_bytes"] = 8
    assert [len(lines) for lines in known(shortfalls(new), old)] == [1, 1]
    spilled = (_record(_code(spills=count, stack_bytes=8)) for count in (6, 5))
    (line,) = regressions(*spilled)
    assert "6 spills, 5 in the record" in line


def test_the_committed_record_holds_every_case_and_misses_targets_on_memory_alone():
    found = json.loads(RECORD.read_text())
    missed = shortfalls(found)
    assert [line for line in missed if "bytes made" not in line] == []
    assert [line for line in missed if not line.startswith("layer_")] == []
    assert regressions(found, copy.deepcopy(found)) == []
    assert set(found["cards"]) == {str(capability) for capability in CARDS}
    listed = {
        f"{case.name} | {case.site} | {case.dtype}": recording
        for case, recording, _ in collect(SITES)
    }
    assert set(found["cases"]) == set(listed)
    for name, recording in listed.items():
        assert set(found["cases"][name]["variants"]) == variants(recording), name


def _each_code(found):
    return (code for codes in found["kernels"].values() for code in codes.values())


def _lower_occupancy(found):
    for code in _each_code(found):
        code["occupancy"] = 1 / 16


def _more_shared_memory(found):
    for code in _each_code(found):
        code["shared_bytes"] *= 4


def _one_tensor_instruction(found):
    for code in _each_code(found):
        code["tensor"] = dict.fromkeys(code["tensor"], 1)


def _narrower_loads(found):
    for code in _each_code(found):
        narrowed = code["loads"].get("16", 0) - 1
        if narrowed > 0:
            code["loads"] |= {"4": code["loads"].get("4", 0) + narrowed, "16": 1}


def _loses_a_tenth(width, loads):
    """Whether all loads of 16 bytes but one are more than a tenth of those wide enough."""
    wide = sum(count for size, count in loads.items() if int(size) >= width)
    return width > 4 and 10 * (loads.get("16", 0) - 1) > wide


def _more_needed(found):
    for case in found["cases"].values():
        case["made_bytes"] *= 3


def _more_work(found):
    for case in found["cases"].values():
        case |= {"multiply_adds": 9 * case["multiply_adds"], "intensity": 0.1}


def _one_card_less(found):
    for codes in found["kernels"].values():
        codes.pop("100", None)


@pytest.mark.parametrize(
    ("alter", "is_worse"),
    [
        (_lower_occupancy, lambda case, code: code["occupancy"] > 1 / 16),
        (_more_shared_memory, lambda case, code: 3 * code["shared_bytes"] > 1024),
        (_one_tensor_instruction, lambda case, code: max(code["tensor"].values(), default=0) > 1),
        (_narrower_loads, lambda case, code: _loses_a_tenth(case["load_width"], code["loads"])),
        (_more_needed, lambda case, code: case["made_bytes"] > 0),
        (_more_work, lambda case, code: True),
        (_one_card_less, lambda case, code: 100 in case["cards"]),
    ],
)
def test_a_worse_column_of_the_committed_record_is_named_in_each_case(alter, is_worse):
    found = json.loads(RECORD.read_text())
    worse = copy.deepcopy(found)
    alter(worse)
    expected = {
        name
        for name, case in found["cases"].items()
        if any(
            is_worse(case, c) for key in case["launches"] for c in found["kernels"][key].values()
        )
    }
    assert expected
    assert {line.split(": ")[0] for line in regressions(worse, found)} == expected


def test_every_body_of_a_kernel_that_some_level_runs_stands_in_the_record():
    found = json.loads(RECORD.read_text())
    own = [case for name, case in found["cases"].items() if name.endswith("bf16")]
    seen = {variant for case in own for variant in case["variants"]}
    for site in SITES:
        for case in cases(network(site), "bf16"):
            for card in CARDS.values() if case.by_card else (None,):
                assert variants(recorded(case, card)) <= seen, (case.name, case.site)


def test_what_is_compiled_for_a_card_is_what_that_card_would_choose():
    found = json.loads(RECORD.read_text())
    site = SITES[2]
    launches = {}
    for case in cases(network(site, whole=False), "fp32"):
        if case.name != "layer_infer":
            assert not case.by_card
            continue
        in_tf32 = replace(case, launcher=partial(case.launcher, precision="tf32"))
        for (precision, given), (capability, card) in product(
            (("fp32", case), ("tf32", in_tf32)), CARDS.items()
        ):
            name = f"layer_infer sm_{capability} | {case.site} | {precision}"
            row, recording = found["cases"][name], recorded(given, card)
            assert [key.split()[0] for key in row["launches"]] == [
                launch.name for launch in recording.launches
            ]
            assert row["variants"] == sorted(variants(recording))
            assert row["cards"] == [capability]
            for key in row["launches"]:
                assert str(capability) in found["kernels"][key]
            launches.setdefault((case.site, precision), set()).add(tuple(row["launches"]))
    assert max(map(len, launches.values())) > 1  # an A100 chooses another form than an H100


def test_the_readme_says_for_how_many_levels_one_launch_is_chosen():
    plans = [
        plan_infer(level.layer, *level.rows[1:]) for site in SITES for level in network(site).levels
    ]
    plans = [plan for plan in plans if len(plan.steps) > 1]

    def chosen(card, rate, item_size):
        machine = Machine(card, card.multiprocessors, item_size, rate)
        return sum(choose_bands(plan, machine) is not None for plan in plans)

    counts = [chosen(card, "bf16", 2) for card in CARDS.values()]
    text = " ".join((ROOT / "benchmarks" / "README.md").read_text().split())
    assert f"Of the {len(plans)} levels of the four spaces" in text
    assert "for {}, {} and {} in bf16 by the figures of an A100, an H100".format(*counts) in text
    wide = [chosen(CARDS[80], rate, 4) for rate in ("vector", "tf32")]
    assert "for {} in fp32 and {} in TF32 by those of an A100".format(*wide) in text


def test_memory_needed_is_least_where_nothing_is_read_again_and_most_where_all_is_kept():
    for case in cases(network(SITES[0], whole=False), "bf16"):
        if case.name == "layer_infer":
            assert case.made_bytes == case.least_made_bytes
        elif case.name.startswith("layer_"):
            assert case.made_bytes > case.least_made_bytes


def test_every_kernel_stands_in_the_record_in_every_type_for_every_architecture():
    found = json.loads(RECORD.read_text())
    seen = {
        (key.split()[0], name.split(" | ")[2], capability)
        for name, case in found["cases"].items()
        for key in case["launches"]
        for capability in found["kernels"][key]
        if not name.endswith("tf32")
    }
    names = {name for name, _, _ in seen}
    assert seen == set(product(names, DTYPES, found["cards"]))
    spaces = {name.split(" | ")[1].split()[0] for name in found["cases"]}
    assert spaces == {"shufflenet_v2", "nasbench_macro", "digits"}
