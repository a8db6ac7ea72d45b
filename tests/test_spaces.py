"""The ready-made spaces: published costs to the unit, and spaces of the user's own."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from pathlib import Path

import numpy as np
import pytest

from fastshift import spaces
from fastshift.errors import ArchError, SpaceError
from fastshift.ops import Unit
from fastshift.space import SearchSpace
from fastshift.spaces.nasbench_macro import canonical, distinct

SPOS_ARCH = "21012020202300003233"
# Of the published table's architectures, parameters and FLOPs, as `digest_of_costs` writes them.
NASBENCH_MACRO_COSTS = "672d7cab8462f1cd347a9e2c45dd635f39fa6432d46cd736b20c0cc1033324ac"


def read_truth(name):
    folder = os.environ.get("FASTSHIFT_DATA")
    if not folder:
        pytest.skip("FASTSHIFT_DATA is unset")
    path = Path(folder) / name
    if not path.is_file():
        pytest.skip(f"FASTSHIFT_DATA holds no {name}")
    return json.loads(path.read_text())


# ShuffleNetV2


def test_shufflenet_costs_what_the_paper_and_its_code_say():
    space = spaces.shufflenet_v2()
    uniform = [[choice] * 20 for choice in range(4)]
    assert space.flops(uniform).tolist() == [295842496, 313654976, 340373696, 358825920]
    assert space.flops(SPOS_ARCH).tolist() == [322918720]
    assert (space.num_blocks, space.size) == (20, 4**20)
    assert space.affine is False
    assert (space.head.dropout, space.head.bias) == (0.1, False)
    assert (space.image_size, space.num_classes, space.in_channels) == (224, 1000, 3)
    assert not space.identities.any()


def test_the_published_shufflenet_arch_has_3_558_million_parameters_with_affine_norms():
    description = spaces.shufflenet_v2().to_dict() | {"affine": True}
    assert SearchSpace.from_dict(description).params(SPOS_ARCH).item() == pytest.approx(
        3.558e6, abs=500
    )


def test_every_shufflenet_block_costs_what_the_table_says():
    truth = read_truth("spos_flops.json")
    space = spaces.shufflenet_v2()
    layers = truth["layers"]
    assert space.flops_table.tolist() == [layer["flops"] for layer in layers]
    assert space.params_table.tolist() == [layer["weights"] for layer in layers]
    assert space.fixed_flops == truth["stem"]["flops"] + truth["tail"]["flops"]
    assert space.fixed_params == truth["stem"]["weights"] + truth["tail"]["weights"]
    for block, layer in zip(space.blocks, layers, strict=True):
        for op in block:
            found = (op.in_channels, op.out_channels, op.stride)
            assert found == (layer["inp"], layer["oup"], layer["stride"])


def test_the_shufflenet_table_has_20_448_bins_of_flops():
    # a bin is the greatest common divisor of what choices cost above the cheapest of their block
    table = spaces.shufflenet_v2().flops_table
    excess = table - table.min(axis=1, keepdims=True)
    bin_flops = int(np.gcd.reduce(excess, axis=None))
    assert bin_flops == 6272
    assert excess.max(axis=1).sum() // bin_flops == 20_448


@pytest.mark.parametrize("image_size", [32, 63])
def test_below_64_pixels_only_blocks_5_and_9_halve_the_map(image_size):
    space = spaces.shufflenet_v2(image_size=image_size, num_classes=10)
    assert space.stem[0].stride == 1
    halving = [index + 1 for index, block in enumerate(space.blocks) if block[0].stride == 2]
    assert halving == [5, 9]
    for index in (0, 16):  # these change their channels at stride 1, so they split
        for op in space.blocks[index]:
            half = op.in_channels // 2
            assert op.frame.kind == "shuffle"
            assert not op.frame.shortcut
            assert op.units[0].in_channels == half
            assert op.units[-1].out_channels == op.out_channels - half
            assert {unit.out_channels for unit in op.units[2:-1]} <= {op.out_channels // 2}
    maps = [image_size]
    for block in space.blocks:
        (size,) = {op.output_size(maps[-1]) for op in block}
        maps.append(size)
    assert sorted(set(maps)) == [-(-image_size // 4), -(-image_size // 2), image_size]


def test_from_64_pixels_on_every_stage_halves_the_map():
    space = spaces.shufflenet_v2(image_size=64)
    assert space.stem[0].stride == 2
    halving = [index + 1 for index, block in enumerate(space.blocks) if block[0].stride == 2]
    assert halving == [1, 5, 9, 17]


def test_small_images_cost_what_an_independent_count_gives():
    space = spaces.shufflenet_v2(image_size=32, num_classes=10)
    # block 1, choice 0: 8 of 16 channels enter, 32 hidden, 56 leave, on 32x32 positions
    assert space.flops_table[0, 0] == 1024 * (8 * 32 + 32 * 9 + 32 * 56)
    # block 5, choice 1: 64 to 160 channels, 80 hidden, stride 2, with a convolved shortcut
    main = 1024 * 64 * 80 + 256 * (80 * 25 + 80 * 96)
    assert space.flops_table[4, 1] == main + 256 * (64 * 25 + 64 * 64)
    # block 17, choice 3: 160 of 320 channels enter, 320 hidden, 480 leave, on 8x8 positions
    weights = 160 * 9 + 160 * 320 + 320 * 9 + 320 * 320 + 320 * 9 + 320 * 480
    assert (space.flops_table[16, 3], space.params_table[16, 3]) == (64 * weights, weights)
    assert space.fixed_flops == 1024 * 3 * 16 * 9 + 64 * 640 * 1024 + 1024 * 10


def test_a_narrow_shufflenet_keeps_its_shape_and_a_too_narrow_one_is_refused():
    space = spaces.shufflenet_v2(image_size=32, width=0.25)
    outputs = [block[0].out_channels for block in space.blocks]
    assert outputs == [16] * 4 + [40] * 4 + [80] * 8 + [160] * 4
    with pytest.raises(SpaceError, match=r"width 0\.1 leaves the first stage no more channels"):
        spaces.shufflenet_v2(width=0.1)


# NAS-Bench-Macro


def digest_of_costs(rows):
    """Return the SHA-256 of the lines `arch,params,flops`, by arch; each ends with a newline."""
    lines = (f"{arch},{params},{flops}\n" for arch, params, flops in sorted(rows))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def test_every_nasbench_macro_architecture_has_the_recorded_parameters_and_flops():
    space = spaces.nasbench_macro()
    archs = list(map("".join, itertools.product("012", repeat=8)))
    assert len(archs) == space.size == 6561
    rows = zip(archs, space.params(archs).tolist(), space.flops(archs).tolist(), strict=True)
    assert digest_of_costs(rows) == NASBENCH_MACRO_COSTS


def test_the_digest_of_nasbench_macro_is_that_of_its_records():
    truth = read_truth("nas_bench_macro.json")
    rows = [(arch, record["params"], record["flops"]) for arch, record in truth.items()]
    assert len(rows) == 6561
    assert digest_of_costs(rows) == NASBENCH_MACRO_COSTS


def test_nasbench_macro_costs_two_known_architectures():
    space = spaces.nasbench_macro()
    assert space.flops(["02012100", "11111221"]).tolist() == [47327744, 65012224]
    assert space.params(["02012100", "11111221"]).tolist() == [890666, 2181386]
    assert space.identities.sum(axis=1).tolist() == [0, 1, 0, 1, 1, 0, 1, 1]
    assert space.affine is True


def test_equal_networks_share_one_canonical_string():
    space = spaces.nasbench_macro()
    archs = ["00000000", "01001001", "20122010", "10010002", "22222222"]
    moved = space.format_all(canonical(archs))
    assert moved == ["00000000", "01010010", "20122010", "10010020", "22222222"]
    assert canonical(archs).dtype == np.uint8
    with pytest.raises(ArchError, match="archs row 0"):
        canonical(["00000003"])


def test_there_are_3969_distinct_networks_and_their_strings_are_canonical():
    space = spaces.nasbench_macro()
    archs = distinct(space)
    assert archs.shape == (3969, 8)
    assert archs.dtype == np.uint8
    np.testing.assert_array_equal(canonical(archs), archs)
    texts = space.format_all(archs)
    assert texts == sorted(set(texts))


def test_networks_are_distinct_exactly_where_their_records_are():
    truth = read_truth("nas_bench_macro.json")
    space = spaces.nasbench_macro()
    moved = space.format_all(canonical(list(truth)))
    assert len(set(moved)) == 3969
    for text, name in zip(truth, moved, strict=True):
        assert truth[text] == truth[name]


def test_a_narrow_nasbench_macro_scales_every_channel_count():
    space = spaces.nasbench_macro(width=0.3)
    assert space.stem[0].out_channels == 8
    outputs = [block[0].out_channels for block in space.blocks]
    assert outputs == [16] * 2 + [40] * 3 + [80] * 3
    assert space.head.num_features == 384


# Digits


def test_the_digits_space_is_small_quick_and_mixed():
    space = spaces.digits()
    assert (space.num_blocks, space.size) == (6, 4096)
    assert (space.in_channels, space.image_size, space.num_classes) == (1, 8, 10)
    assert space.largest("flops") < 500_000
    assert space.smallest("flops") < space.largest("flops") / 8
    assert space.identities.sum() == 4
    frames = {op.frame.kind for block in space.blocks for op in block}
    kernels = {unit.kernel for block in space.blocks for op in block for unit in op.units}
    assert frames == {"plain", "residual", "shuffle"}
    assert kernels == {1, 3, 5}


# By name


def test_names_are_sorted_and_every_one_builds_and_describes_itself():
    assert spaces.names() == ("digits", "nasbench_macro", "shufflenet_v2")
    for name in spaces.names():
        space = spaces.build(name)
        assert space.name == name
        described = json.loads(json.dumps(space.describe()))
        assert described["size"] == space.size
        assert set(described["costs"]) == {"flops", "params"}


@pytest.mark.parametrize("name", spaces.names())
def test_the_recipe_and_the_description_make_the_same_space_again(name):
    space = spaces.build(name, image_size=16, num_classes=7, in_channels=2)
    assert space.recipe["kwargs"]["num_classes"] == 7
    again = spaces.build(space.recipe["name"], **space.recipe["kwargs"])
    assert again.fingerprint() == space.fingerprint()
    assert again.recipe == space.recipe
    assert SearchSpace.from_dict(space.to_dict()).fingerprint() == space.fingerprint()
    assert isinstance(space.stem[0], Unit)


@pytest.mark.parametrize("name", spaces.names())
@pytest.mark.parametrize("keyword", ["image_size", "num_classes", "in_channels"])
@pytest.mark.parametrize("value", [0, -8, 8.0, "8", None])
def test_every_space_refuses_sizes_that_are_no_positive_integer(name, keyword, value):
    with pytest.raises(SpaceError, match="must be a positive integer"):
        spaces.build(name, **{keyword: value})


def test_an_unknown_name_or_keyword_is_refused_with_the_known_ones():
    known = "digits, nasbench_macro, shufflenet_v2"
    for make in (spaces.build, spaces.load):
        with pytest.raises(SpaceError, match=f"unknown space 'darts': expected one of {known}"):
            make("darts")
        with pytest.raises(SpaceError, match=r"depth.*it takes image_size, num_classes"):
            make("digits", depth=3)
    with pytest.raises(SpaceError, match="unknown space 5"):
        spaces.load(5)


# Of the user's own

OWN = """
from __future__ import annotations
from dataclasses import dataclass
from fastshift import ops
from fastshift.space import SearchSpace

@dataclass
class Settings:
    depth: int = 3

def tiny(image_size=8, num_classes=2):
    return SearchSpace(
        "tiny",
        stem=[ops.Unit("dense", 1, 8, 3)],
        blocks=[[ops.identity(8), ops.conv(8, 8, 3, 1)]] * Settings().depth,
        head=ops.Head(8, (), num_classes),
        in_channels=1,
        image_size=image_size,
    )

def nothing():
    return None

def fails():
    raise RuntimeError("out of ideas")

value = 3
"""


def test_a_space_can_come_from_a_function_in_the_users_file(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    space = spaces.load(f"{path}:tiny", num_classes=4)
    assert (space.name, space.size, space.num_classes) == ("tiny", 8, 4)
    assert space.recipe is None
    assert spaces.load("digits", num_classes=4).num_classes == 4


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("missing", "has no function 'missing'"),
        ("value", "has no function 'value'"),
        ("nothing", "expected a SearchSpace or a ChainSupernet, got NoneType"),
        ("fails", "fails with RuntimeError"),
    ],
)
def test_a_function_that_gives_no_space_is_refused(tmp_path, function, message):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(SpaceError, match=message):
        spaces.load(f"{path}:{function}")


def test_a_file_that_is_missing_or_broken_or_takes_other_keywords_is_refused(tmp_path):
    path = tmp_path / "own.py"
    with pytest.raises(SpaceError, match="there is no file"):
        spaces.load(f"{path}:tiny")
    path.write_text("def tiny(:")
    with pytest.raises(SpaceError, match="fails with SyntaxError"):
        spaces.load(f"{path}:tiny")
    path.write_text(OWN)
    with pytest.raises(SpaceError, match=r"in_channels.*it takes image_size, num_classes"):
        spaces.load(f"{path}:tiny", in_channels=3)
    with pytest.raises(SpaceError, match=r"or FILE\.py:FUNCTION"):
        spaces.load(str(path))
