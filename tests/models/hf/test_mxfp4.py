"""MXFP4: each number against the format's definition, and pieces against the whole."""

import numpy as np
import pytest

from jaxdpo.models.hf import mxfp4

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random_weight(
    experts: int = 3, outputs: int = 10, inputs: int = 96, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks and scales."""
    rng = np.random.default_rng(seed)
    blocks, scales = mxfp4.stored_shapes((experts, outputs, inputs))
    return rng.integers(0, 256, blocks).astype(np.uint8), rng.integers(120, 133, scales).astype(
        np.uint8
    )


def whole(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[E, in, out], number by number."""
    experts, outputs, groups, _ = blocks.shape
    weight = np.empty((experts, groups * 32, outputs), np.float32)
    for expert, row, column in np.ndindex(experts, outputs, groups * 32):
        group, place = divmod(column, 32)
        byte = int(blocks[expert, row, group, place // 2])
        code = byte >> 4 if place % 2 else byte & 15
        weight[expert, column, row] = (
            (-1 if code & 8 else 1)
            * VALUES[code & 7]
            * 2.0 ** (int(scales[expert, row, group]) - 127)
        )
    return weight


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "index",
    [
        (slice(0, 3), slice(0, 96), slice(0, 10)),
        (slice(1, 2), slice(0, 96), slice(4, 10)),
        (slice(0, 3), slice(48, 96), slice(0, 5)),
        (slice(2, 3), slice(31, 33), slice(9, 10)),
        (slice(0, 3), slice(0, 7), slice(0, 10)),
    ],
)
def test_pieces_are_those_of_the_whole(index: tuple[slice, slice, slice], dtype: str) -> None:
    blocks, scales = random_weight()
    expected = whole(blocks, scales)[index].astype(dtype)
    piece = np.full(expected.shape, np.nan, dtype)
    mxfp4.read(piece, blocks, scales, index)
    np.testing.assert_array_equal(piece, expected)


def test_only_the_groups_of_a_piece_are_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks, scales = random_weight()
    sizes: list[int] = []
    numbers = mxfp4._dequantized
    monkeypatch.setattr(
        mxfp4,
        "_dequantized",
        lambda blocks, scales: sizes.append(blocks.size * 2) or numbers(blocks, scales),
    )
    mxfp4.read(
        np.empty((2, 32, 5), np.float32), blocks, scales, (slice(0, 2), slice(32, 64), slice(5, 10))
    )
    assert sizes == [32 * 5] * 2


@pytest.mark.torch
def test_the_numbers_are_transformers() -> None:
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks, scales = random_weight(2, 64, 128)
    piece = np.empty((2, 128, 64), np.float32)
    mxfp4.read(piece, blocks, scales, (slice(0, 2), slice(0, 128), slice(0, 64)))
    np.testing.assert_array_equal(
        piece, theirs(torch.from_numpy(blocks), torch.from_numpy(scales)).float().numpy()
    )
