"""The launches of loss, SGD and images at a network's shapes, for the static checks."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from catalogue import DTYPES, Case, Inputs, Network
from torch import Tensor

from fastshift.kernels import images, loss, sgd

__all__ = ["catalogue"]


def catalogue(network: Network, dtype: str) -> Iterator[Case]:
    """Yield the loss and its gradient, the step of all parameters, and the images of a batch."""
    yield from _losses(network, dtype)
    yield from _steps(network, dtype)
    yield from _images(network, dtype)


def _losses(network: Network, dtype: str) -> Iterator[Case]:
    """Yield the loss and its gradient at a network's head."""
    shape = (network.num_candidates, network.num_images, network.num_classes)
    logits = shape[0] * shape[1] * shape[2] * DTYPES[dtype].itemsize
    side = 8 * shape[1] + 4
    width = math.gcd(16, shape[2] * DTYPES[dtype].itemsize)

    def given(device: str) -> tuple[Tensor, ...]:
        make = Inputs(device)
        labels = make.integers(0, shape[2], shape[1])
        num_leaves = make.given([shape[0]], torch.int32)
        return make.normal(*shape, dtype=DTYPES[dtype]), labels, num_leaves

    yield Case(
        "candidate_loss",
        network.name,
        dtype,
        lambda device: (*given(device), 0.1),
        loss._loss_fwd_triton,
        flops=3 * shape[0] * shape[1] * shape[2],
        read_bytes=logits + side,
        written_bytes=12 * shape[0],
        launches=2,
        made_bytes=12 * shape[0],
        load_width=width,
        store_width=4,
        narrow=("loss_sum_kernel",),
    )
    yield Case(
        "candidate_loss_backward",
        network.name,
        dtype,
        lambda device: (Inputs(device, 1).normal(shape[0]), *given(device), 0.1),
        loss._loss_bwd_triton,
        flops=4 * shape[0] * shape[1] * shape[2],
        read_bytes=logits + side + 4 * shape[0],
        written_bytes=logits,
        launches=1,
        made_bytes=logits,
        load_width=width,
        store_width=width,
    )


def _steps(network: Network, dtype: str) -> Iterator[Case]:
    """Yield the step of all parameters of a supernet, its gradients being of the type."""
    shapes = [shape for shape, _ in network.parameters]
    pairs = [pair for _, pair in network.parameters]
    values = sum(math.prod(shape) for shape in shapes)
    num_pairs = max(0, *pairs) + 1

    def prepare(device: str) -> tuple:
        make = Inputs(device)
        parameters = [make.normal(*shape) for shape in shapes]
        gradients = [make.normal(*shape, dtype=DTYPES[dtype]) for shape in shapes]
        momenta = sgd.fresh_momenta(parameters)
        tables = sgd.sgd_tables(parameters, gradients, momenta, pairs, [0] * len(shapes))
        return (
            *(parameters, gradients, momenta),
            *(tables.addresses, tables.layout, tables.pieces),
            make.given([1] * num_pairs, torch.uint8),
            make.given([[0.1, 1e-4, 0.9]], torch.float32),
            make.given([1.0], torch.float32),
            True,
            tables.aligned,
        )

    yield Case(
        "sgd_step",
        network.name,
        dtype,
        prepare,
        sgd._sgd_triton,
        flops=4 * values,
        read_bytes=values * (8 + DTYPES[dtype].itemsize),
        written_bytes=8 * values,
        launches=1,
        made_bytes=0,
    )


def _images(network: Network, dtype: str) -> Iterator[Case]:
    """Yield the augmentation of a network's batch of planar images."""
    num, channels, size = network.num_images, network.in_channels, network.image_size
    values = num * channels * size**2
    block, warps = images._block(channels * size**2)

    def prepare(device: str) -> tuple:
        make = Inputs(device)
        padding = size // 8
        return (
            make.integers(0, 256, num, channels, size, size, dtype=torch.uint8),
            make.integers(0, 2 * padding + 1, 2, num, dtype=torch.int32),
            make.integers(0, 2, num, dtype=torch.uint8),
            make.integers(0, 256, channels, dtype=torch.uint8),
            make.normal(channels),
            make.normal(channels),
            padding,
            DTYPES[dtype],
        )

    yield Case(
        "augment_images",
        network.name,
        dtype,
        prepare,
        images._images_triton,
        flops=values,
        read_bytes=values + 9 * num + 9 * channels,
        written_bytes=values * DTYPES[dtype].itemsize,
        launches=1,
        made_bytes=values * DTYPES[dtype].itemsize,
        load_width=1,  # bytes at an offset of each image's own
        store_width=min(16, block // (32 * warps) * DTYPES[dtype].itemsize),
    )
