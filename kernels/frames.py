"""The frames of all nodes: the last batch norms applied, rows added or set side by side.

Forward, one launch: a node's row of its chains' last raw rows and of its parent's row (an identity
copies that). The shuffle of channels is in where the units read, so it costs nothing here.

Backward, one launch before all others: the totals that the last batch norms need of the nodes'
gradients, and, of a layer that has identities alone, the gradients of the parents' rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastshift.kernels.norm import (
    activate,
    finish_totals,
    is_last,
    load_channels,
    load_norm,
    normalise,
)
from fastshift.kernels.record import (
    BLOCK_NODES,
    CHAIN,
    CHAIN_C,
    CHAIN_CHANNEL,
    CHAIN_RAW,
    CHAIN_RELU,
    CHAIN_SHIFT,
    CHAIN_THERE,
    CHAIN_Y_OFFSET,
    FRAME,
    FRAME_CHAIN,
    FRAME_CHANNELS,
    FRAME_ROW,
    OUT_CHANNELS,
    OUT_PIXELS,
    ROW_CHANNELS,
    ROW_PIXELS,
    STATISTICS,
    STATISTICS_FLOATS,
    node_span,
    raw_of,
    sized,
    statistics_of,
    totals_of,
)

__all__ = ["add_passed", "frame_bwd_kernel", "frame_fwd_kernel"]


@triton.jit
def _clear_statistics(b, node, begin, BLOCK: tl.constexpr):
    """Zeros behind a node's statistics."""
    stop = tl.load(b.table + STATISTICS_FLOATS)
    for start in range(begin, stop, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        tl.store(statistics_of(b, node) + offs, tl.zeros([BLOCK], tl.float32), mask=offs < stop)


@triton.jit
def _load_last(b, node, chain, pixel, inside, offs_c, ALIGN: tl.constexpr):
    """A chain's last raw rows at `[P, C]` of the node's row; mask, mean and the row normalised."""
    c = sized(chain, CHAIN_C, ALIGN)
    offs_i = offs_c - sized(chain, CHAIN_Y_OFFSET, ALIGN)
    mask_c = (offs_i >= 0) & (offs_i < c) & (tl.load(chain + CHAIN_THERE) != 0)
    mask = inside[:, None] & mask_c[None, :]
    raw_ptr = raw_of(b, node, tl.load(chain + CHAIN_RAW))
    raw = tl.load(raw_ptr + (pixel[:, None] * c + offs_i[None, :]), mask=mask, other=0.0)
    raw = raw.to(tl.float32)
    channel, shift_at = tl.load(chain + CHAIN_CHANNEL), tl.load(chain + CHAIN_SHIFT)
    norm = load_norm(b, node, channel, shift_at, c, offs_i, mask_c)
    return mask, raw - norm[0], normalise(raw, norm)


@triton.jit
def _load_row(
    b,
    node,
    pixel,
    inside,
    first_c,
    count,
    BLOCK_C: tl.constexpr,
    PART: tl.constexpr,
    ALIGN: tl.constexpr,
):
    """The parent's row at `[P, C]`, of every channel or of every other, `count` in all."""
    channels = sized(b.table, ROW_CHANNELS, ALIGN)
    parent = tl.load(b.parent + node).to(tl.int64)
    x_ptr = b.rows + parent * tl.load(b.table + ROW_PIXELS) * channels
    x = load_channels(x_ptr, pixel * channels, inside, first_c, count, BLOCK_C, PART)
    return x.to(tl.float32)


@triton.jit(do_not_specialize=["parts", "tiles"])
def frame_fwd_kernel(
    b,
    parts,
    tiles,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Write the nodes' rows, and zeros behind their statistics.

    Programs `(node, tile of pixels, tile of channels)`. A node that is padding has zeros for
    statistics, and no row.

    Args:
        b: `Forward`.
        parts, tiles: tiles of pixels of a node, and of channels.
        ALIGN: divides every number of channels.
    """
    tile, place = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    part, node = place % parts, place // parts
    choice = tl.load(b.choice + node)
    frame = b.frames + tl.maximum(choice, 0) * FRAME
    if (part == 0) & (tile == 0):
        used = tl.where(choice < 0, 0, tl.load(frame + FRAME_CHANNELS))
        _clear_statistics(b, node, used * STATISTICS, BLOCK_P)
    if choice < 0:
        return
    channels = sized(b.table, OUT_CHANNELS, ALIGN)
    positions = tl.load(b.table + OUT_PIXELS)
    offs_p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    first_c = tile * BLOCK_C
    offs_c = first_c + tl.arange(0, BLOCK_C)
    inside = offs_p < positions
    pixel = offs_p.to(tl.int64)
    y = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    row = tl.load(frame + FRAME_ROW)
    if row == 1:
        y = _load_row(b, node, pixel, inside, first_c, channels, BLOCK_C, 2, ALIGN)
    elif row == 2:
        even = sized(b.table, ROW_CHANNELS, ALIGN) // 2
        y = _load_row(b, node, pixel, inside, first_c, even, BLOCK_C, 0, ALIGN)
    for index in tl.static_range(2):
        chain = frame + FRAME_CHAIN + index * CHAIN
        if tl.load(chain + CHAIN_THERE) != 0:
            mask, _, found = _load_last(b, node, chain, pixel, inside, offs_c, ALIGN)
            y += tl.where(mask, activate(found, tl.load(chain + CHAIN_RELU)), 0.0)
    to = b.out + node.to(tl.int64) * positions * channels
    at = to + (pixel[:, None] * channels + offs_c[None, :])
    mask = inside[:, None] & (offs_c < channels)[None, :]
    tl.store(at, y.to(b.out.dtype.element_ty), mask=mask)


@triton.jit
def _load_d_out(b, node, pixel, inside, offs_c, there, ALIGN: tl.constexpr):
    """The gradient of a node's row at `[P, C]`, zero where not asked for."""
    channels = sized(b.table, OUT_CHANNELS, ALIGN)
    g_ptr = b.d_out + tl.cast(node, tl.int64) * tl.load(b.table + OUT_PIXELS) * channels
    at = g_ptr + (pixel[:, None] * channels + offs_c[None, :])
    return tl.load(at, mask=inside[:, None] & there[None, :], other=0.0).to(tl.float32)


@triton.jit
def add_passed(
    acc,
    b,
    node,
    choice,
    pixel,
    inside,
    tile,
    channels,
    PASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Add what goes straight from a node's gradient to its parent's row, `[P, C]`.

    `PASSES` is what the layer's choices pass on (`LayerPlan`): other code is not there.
    """
    passes = tl.load(b.frames + choice * FRAME + FRAME_ROW)
    if passes == 1:
        offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        acc += _load_d_out(b, node, pixel, inside, offs_c, offs_c < channels, ALIGN)
    # Of the two conditions the first is decided when compiling.
    if PASSES == 2:  # noqa: SIM102
        if passes == 2:
            # Half as many channels, side by side: as even ones they would be read one by one.
            offs_h = tile * (BLOCK_C // 2) + tl.arange(0, BLOCK_C // 2)
            half = tl.multiple_of(channels // 2, (ALIGN + 1) // 2)
            even = _load_d_out(b, node, pixel, inside, offs_h, offs_h < half, ALIGN)
            pairs = tl.join(even, tl.zeros_like(even))
            acc += tl.reshape(pairs, (BLOCK_P, BLOCK_C))
    return acc


@triton.jit
def _last_totals(
    b,
    program,
    width,
    chunk,
    parts,
    tiles,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs `(node, chain, tile of the chain's channels, part of the pixels)`."""
    part, place = program % parts, program // parts
    tile, item = place % tiles, place // tiles
    node = item // 2
    choice = tl.load(b.choice + node)
    chain = b.frames + tl.maximum(choice, 0) * FRAME + FRAME_CHAIN + item % 2 * CHAIN
    c = sized(chain, CHAIN_C, ALIGN)
    positions = tl.load(b.table + OUT_PIXELS)
    begin = part * chunk * BLOCK_P
    there = (choice >= 0) & (tl.load(chain + CHAIN_THERE) != 0)
    if there & (begin < positions) & (tile * BLOCK_C < c):
        offs_i = tile * BLOCK_C + tl.arange(0, BLOCK_C)
        mask_i = offs_i < c
        offs_c = offs_i + sized(chain, CHAIN_Y_OFFSET, ALIGN)
        relu = tl.load(chain + CHAIN_RELU)
        total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        along = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
        for start in range(begin, tl.minimum(begin + chunk * BLOCK_P, positions), BLOCK_P):
            offs_p = start + tl.arange(0, BLOCK_P)
            inside = offs_p < positions
            pixel = offs_p.to(tl.int64)
            mask, centred, y = _load_last(b, node, chain, pixel, inside, offs_c, ALIGN)
            g = _load_d_out(b, node, pixel, inside, offs_c, mask_i, ALIGN)
            g = tl.where(((y <= 0.0) & (relu != 0)) | (not mask), 0.0, g)
            total += g
            along += g * centred
        partial = b.partial + item.to(tl.int64) * parts * 2 * width
        at = partial + part * 2 * width + offs_i
        tl.store(at, tl.sum(total, 0), mask=mask_i)
        tl.store(at + width, tl.sum(along, 0), mask=mask_i)
        own_parts = tl.cdiv(positions, chunk * BLOCK_P)
        if is_last(b.counters + place, own_parts):
            totals = totals_of(b, node) + 2 * tl.load(chain + CHAIN_CHANNEL)
            finish_totals(totals, partial, own_parts, width, c, offs_i, mask_i)


@triton.jit
def _passed_gradient(
    b,
    program,
    nodes,
    row_parts,
    row_tiles,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Programs `(row, tile of its channels, tile of its pixels)`; nodes in their order."""
    part, place = program % row_parts, program // row_parts
    tile, row = place % row_tiles, place // row_tiles
    channels = sized(b.table, ROW_CHANNELS, ALIGN)
    positions = tl.load(b.table + ROW_PIXELS)
    offs_p = part * BLOCK_P + tl.arange(0, BLOCK_P)
    offs_c = tile * BLOCK_C + tl.arange(0, BLOCK_C)
    inside, mask_c = offs_p < positions, offs_c < channels
    pixel = offs_p.to(tl.int64)
    begin, stop = node_span(b.parent, row, nodes, BLOCK_NODES)
    acc = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for node in range(begin, stop):
        choice = tl.load(b.choice + node)
        if (tl.load(b.parent + node) == row) & (choice >= 0):
            acc = add_passed(
                acc, b, node, choice, pixel, inside, tile, channels, 1, ALIGN, BLOCK_P, BLOCK_C
            )
    at = b.d_rows + row.to(tl.int64) * positions * channels
    at += pixel[:, None] * channels + offs_c[None, :]
    tl.store(at, acc.to(b.d_rows.dtype.element_ty), mask=inside[:, None] & mask_c[None, :])


@triton.jit(
    do_not_specialize=[
        "nodes", "width", "chunk", "parts", "tiles", "row_parts", "row_tiles", "node_programs",
    ]
)  # fmt: skip
def frame_bwd_kernel(
    b,
    gradients,
    nodes,
    width,
    chunk,
    parts,
    tiles,
    row_parts,
    row_tiles,
    node_programs,
    PASSES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Start the backward pass: totals, and where parameters' gradients go.

    The gradients are new tensors at each call, and a table of their addresses that was copied
    from the host would be one more transfer at each, which a CUDA graph could not have.

    Args:
        b: `Backward`.
        gradients: of all parameters, float32.
        nodes: how many, padding among them.
        width: channels that a partial result has room for.
        chunk, parts, tiles: of the nodes' totals: tiles of pixels in a part, parts, and tiles of
            channels.
        row_parts, row_tiles: tiles of a row's pixels and channels.
        node_programs: of the first range; the rest has the rows.
        PASSES: whether rows' gradients are wanted, and no unit reads a row, whose launch has them.
    """
    program = tl.program_id(0)
    if program == 0:
        for index in tl.static_range(len(gradients)):
            tl.store(b.destinations + index, gradients[index].to(tl.int64))
    if program < node_programs:
        _last_totals(b, program, width, chunk, parts, tiles, ALIGN, BLOCK_P, BLOCK_C)
    elif PASSES:
        _passed_gradient(
            b, program - node_programs, nodes, row_parts, row_tiles, ALIGN,
            BLOCK_P, BLOCK_C,
        )  # fmt: skip
