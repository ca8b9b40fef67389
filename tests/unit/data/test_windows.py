"""Windows by index arithmetic: their borders, and a shuffled order that is a bijection at every size."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quadriga.data.windows import Windows, permuted

PINNED_SMALL = [3, 2, 1, 0, 8, 6, 4, 7, 5, 9]
PINNED_LARGE = [512961103006, 642844576428, 465858868803, 958415019340]
PINNED_HASH = "aa62aaccc7be83de"


def order(count: int, key: str) -> np.ndarray:
    return permuted(np.arange(count), count, key)


@pytest.mark.parametrize("key", ["0 0 windows", "7 3 windows", "another"])
def test_it_is_a_bijection_at_every_size_up_to_1200(key):
    for count in range(1, 1200):
        assert np.array_equal(np.sort(order(count, key)), np.arange(count)), count


@given(count=st.integers(1, 5000), key=st.text(max_size=20))
def test_it_is_a_bijection_for_any_key(count, key):
    assert np.array_equal(np.sort(order(count, key)), np.arange(count))


@given(count=st.integers(2**40 - 1000, 2**61), start=st.integers(0, 2**40 - 2000), seed=st.integers(0, 2**63 - 1))
def test_at_large_sizes_no_two_positions_have_one_image(count, start, seed):
    images = permuted(np.arange(start, start + 1000), count, f"{seed} 0 windows")
    assert len(set(images.tolist())) == 1000
    assert images.min() >= 0
    assert images.max() < count


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=50), st.integers(2, 2**40))
def test_an_image_does_not_depend_on_the_other_positions(positions, count):
    inside = np.array(positions) % count
    together = permuted(inside, count, "key")
    assert together.tolist() == [int(permuted(inside[i : i + 1], count, "key")[0]) for i in range(len(inside))]


def test_the_order_of_today_stays():
    """Checkpoints hold a number of slots, so the order must be the same in every version."""
    assert order(10, "7 0 windows").tolist() == PINNED_SMALL
    images = permuted(np.array([0, 1, 2, 2**40 - 1]), 2**40 + 3, "7 0 windows")
    assert images.tolist() == PINNED_LARGE
    assert hashlib.sha256(order(4097, "11 5 windows").tobytes()).hexdigest()[:16] == PINNED_HASH


def chi_square(counts: np.ndarray) -> float:
    """Normalized to mean 0 and deviation 1 if all cells are equally likely."""
    expected, free = counts.mean(), counts.size - 1
    return float((((counts - expected) ** 2).sum() / expected - free) / np.sqrt(2 * free))


@pytest.mark.parametrize("count", [60, 1000, 4096, 10_007])
def test_first_images_and_neighbours_are_uniform(count):
    """Over many keys: where position 0 goes, and the distance between the images of neighbours, in 20 cells."""
    epochs = 4000 if count == 60 else 400
    first, distance = np.zeros(20), np.zeros(20)
    for epoch in range(epochs):
        images = permuted(np.arange(min(count, 200)), count, f"3 {epoch} windows")
        first += np.bincount(images[:1] * 20 // count, minlength=20)
        steps = (np.diff(images) % count - 1) * 20 // (count - 1)
        distance += np.bincount(steps, minlength=20)
    cells = np.bincount(np.arange(count - 1) * 20 // (count - 1), minlength=20)
    distance *= cells.mean() / cells
    assert abs(chi_square(first)) < 4
    assert abs(chi_square(distance)) < 4


@given(
    ids=st.integers(0, 3000),
    seq_len=st.integers(1, 40),
    overlap=st.integers(0, 1),
    short_last=st.booleans(),
)
def test_windows_cover_the_ids_once(ids, seq_len, overlap, short_last):
    windows = Windows(ids, seq_len, overlap, short_last=short_last)
    assert (windows.count > 0) == (ids >= windows.least_ids)
    labels = []
    for window in range(windows.count):
        start, stop = windows.bounds(window)
        assert 2 <= stop - start <= seq_len + 1
        labels += range(start + 1, stop)
    if not overlap:
        assert windows.count == ids // (seq_len + 1)
    elif short_last:
        assert labels == list(range(1, ids)), "each id is a label once"
    else:
        assert labels == list(range(1, 1 + (max(ids - 1, 0) // seq_len) * seq_len))


@given(ids=st.integers(2**40, 2**50), seq_len=st.integers(1, 2**20), overlap=st.integers(0, 1))
def test_borders_are_exact_at_a_trillion_ids(ids, seq_len, overlap):
    windows = Windows(ids, seq_len, overlap, seed=1)
    start, stop = windows.bounds(windows.count - 1)
    assert stop - start == seq_len + 1
    assert ids - stop < seq_len + 1 - overlap <= ids - stop + stop - start
    assert 0 <= windows.at(10**12) < windows.count


@given(ids=st.integers(100, 2000), batch=st.integers(1, 84), seed=st.integers(0, 5))
def test_every_epoch_has_each_window_once_in_another_order(ids, batch, seed):
    windows = Windows(ids, 9, seed=seed)
    total = 4 * windows.count
    by_step = [windows.at(np.arange(slot, min(slot + batch, total))) for slot in range(0, total, batch)]
    epochs = np.concatenate(by_step).reshape(4, windows.count)
    assert all(np.array_equal(np.sort(epoch), np.arange(windows.count)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 4


def test_without_shuffling_the_order_is_that_of_the_data():
    assert Windows(101, 10).at([0, 1, 9, 10, 25]).tolist() == [0, 1, 9, 0, 5]
