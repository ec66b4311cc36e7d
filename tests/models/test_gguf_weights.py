"""What a layout does to rows must be found exactly, and anything but rows must be noticed."""

from collections.abc import Callable

import numpy as np
import pytest

from llmc.models.gguf_weights import Assembly, row_order

ROWS = np.random.default_rng(0).permutation(12)


def one(change: Callable[[np.ndarray], np.ndarray]) -> Assembly:
    return Assembly(keys=("w",), run=lambda load: change(load("w")))


def test_untouched_rows_keep_their_order() -> None:
    order = row_order(one(lambda w: w), {"w": (12, 8)}, (12, 8))
    np.testing.assert_array_equal(order, np.arange(12))


def test_moved_rows_are_found() -> None:
    order = row_order(one(lambda w: w[ROWS]), {"w": (12, 8)}, (12, 8))
    np.testing.assert_array_equal(order, ROWS)


NOT_ROWS = {
    "transposed": (lambda w: w.T, (8, 12)),
    "transposed square": (lambda w: w[:8].T, (8, 8)),
    "columns moved": (lambda w: w[:, ::-1], (12, 8)),
    "rows moved otherwise in every column": (
        lambda w: np.take_along_axis(w, (np.arange(96).reshape(12, 8) * 5) % 12, axis=0),
        (12, 8),
    ),
    "shifted": (lambda w: w - 1, (12, 8)),
    "scaled": (lambda w: w * 2, (12, 8)),
    "rows twice": (lambda w: w[np.zeros(12, int)], (12, 8)),
    "reshaped": (lambda w: w.reshape(24, 4), (24, 4)),
}


@pytest.mark.parametrize("case", NOT_ROWS)
def test_anything_but_moved_rows_is_noticed(case: str) -> None:
    change, shape = NOT_ROWS[case]
    assert row_order(one(change), {"w": (12, 8)}, shape) is None


@pytest.mark.parametrize("experts", [1, 2, 7])
def test_stacks_joined_in_every_expert_are_found(experts: int) -> None:
    shapes = {"gate": (experts, 3, 4), "up": (experts, 5, 4)}
    joined = Assembly(
        keys=("gate", "up"),
        run=lambda load: np.concatenate([load("gate")[:, ::-1], load("up")], axis=1),
    )

    order = row_order(joined, shapes, (experts, 8, 4))

    assert order is not None
    rng = np.random.default_rng(1)
    values = {key: rng.normal(size=shape) for key, shape in shapes.items()}
    stacked = np.concatenate([value.reshape(-1, 4) for value in values.values()])
    np.testing.assert_array_equal(
        stacked[order].reshape(experts, 8, 4), joined.run(values.__getitem__)
    )


def test_experts_that_change_places_are_noticed() -> None:
    swapped = one(lambda w: w[::-1])
    assert row_order(swapped, {"w": (4, 3, 8)}, (4, 3, 8)) is None
