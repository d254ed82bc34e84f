"""Packing: the edges, nothing lost, nothing split."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from isofusion.data.batch import IGNORE
from isofusion.data.pack import IMAGE, Piece, best_fit, build, cut, largest_prefix, take

N, DIM = 4, 12  # patches per image, bytes per patch
PAD, BOS, EOS, IMG = 0, 1, 2, 3


def piece(key, layout, first=10):
    """layout: 't3 i t2' -> BOS, 3 text tokens, an image, 2 text tokens, EOS."""
    ids, image, patches = [BOS], [-1], []
    for part in layout.split():
        if part == "i":
            image += [len(patches)] * N
            ids += [IMG] * N
            patches.append(np.full((N, DIM), first + len(patches), np.uint8))
            continue
        for _ in range(int(part[1:])):
            ids.append(first)
            image.append(-1)
            first += 1
    ids.append(EOS)
    image.append(-1)
    ids_l = np.array(ids, np.int32)
    return Piece(
        key, ids_l, np.array(image, np.int32), np.concatenate([np.zeros((0, DIM), np.uint8), *patches]),
        token_class=(ids_l % 250).astype(np.uint8), oracle=ids_l.astype(np.float32),
    )  # fmt: skip


def pack_rows(rows, row_len=24):
    return build(rows, row_len, N, DIM, 1, PAD)


def test_edges():
    b = pack_rows([[piece("a", "t2 i t1"), piece("b", "i i", 50)]]).batch
    assert b.token_ids.tolist() == [1, 10, 11, 3, 3, 3, 3, 12, 2, 1, 3, 3, 3, 3, 3, 3, 3, 3, 2, 0, 0, 0, 0, 0]
    x = IGNORE
    assert b.targets.tolist() == [10, 11, x, x, x, x, 12, 2, x, x, x, x, x, x, x, x, x, 2, x, x, x, x, x, x]
    assert b.doc_id.tolist() == [0] * 9 + [1] * 10 + [-1] * 5
    assert b.image_id.tolist() == [-1] * 3 + [0] * 4 + [-1] * 3 + [1] * 4 + [2] * 4 + [-1] * 6
    assert b.position.tolist() == [*range(9), *range(10), 0, 0, 0, 0, 0]
    assert b.patch_slot.tolist() == [3, 4, 5, 6, *range(10, 18)]
    assert b.patches[:, 0].tolist() == [12] * 4 + [50] * 4 + [51] * 4
    assert b.modality.tolist() == (b.image_id >= 0).astype(int).tolist()
    assert set(b.domain.tolist()) == {1}
    assert b.keys == ("a", "b")


def test_class_and_oracle_lie_on_the_slot_that_predicts():
    b = pack_rows([[piece("a", "t2 i t1")], [piece("b", "t3")]]).batch
    aimed = b.targets >= 0
    assert np.array_equal(b.oracle[aimed], b.targets[aimed])
    assert np.array_equal(b.token_class[aimed], b.targets[aimed])
    assert np.isnan(b.oracle[~aimed]).all()
    assert (b.token_class[~aimed] == 0).all()


def test_a_full_row_does_not_predict_the_next_row():
    b = pack_rows([[piece("a", "t6")], [piece("b", "t6", 90)]], row_len=8).batch
    assert b.targets[7] == IGNORE
    assert b.doc_id.tolist() == [0] * 8 + [1] * 8


def test_dtypes():
    b = pack_rows([[piece("a", "t2 i t1")]]).batch
    kinds = {
        "token_ids": "int32", "modality": "uint8", "doc_id": "int32", "image_id": "int32", "position": "int32",
        "targets": "int32", "domain": "uint8", "patches": "uint8", "patch_slot": "int32", "token_class": "uint8",
        "oracle": "float32",
    }  # fmt: skip
    one = take([(pack_rows([[piece("a", "t2 i t1")]]), 0)])
    for name, kind in kinds.items():
        assert getattr(b, name).dtype == kind == getattr(one, name).dtype


def test_taking_rows_out_of_blocks_equals_packing_them_together():
    rows = [[piece("a", "t2 i t1"), piece("b", "i i", 50)], [piece("c", "t5", 70)], [piece("d", "i t3", 90)]]
    block, other = pack_rows(rows), pack_rows([[piece("e", "t1 i t1 i", 120)]])
    taken = take([(block, 2), (other, 0), (block, 0), (block, 1)])
    together = pack_rows([rows[2], [piece("e", "t1 i t1 i", 120)], rows[0], rows[1]]).batch
    for name in taken.__dataclass_fields__:
        a, b = getattr(taken, name), getattr(together, name)
        assert np.array_equal(a, b, equal_nan=name == "oracle") if isinstance(a, np.ndarray) else a == b, name


segments = st.lists(st.one_of(st.just(IMAGE), st.integers(0, 40)), min_size=1, max_size=12).filter(
    lambda s: any(x > 0 for x in s)
)


@settings(max_examples=200, deadline=None)
@given(segments, st.integers(N + 2, 30))
def test_cut_fits_loses_nothing_and_splits_no_image(parts, row_len):
    ends = cut(parts, N, row_len)
    slots = [N if p == IMAGE else p for p in parts]
    assert ends[-1] == sum(slots)
    lengths = np.diff([0, *ends])
    assert (lengths >= 1).all()
    assert (lengths + 1 <= row_len).all()
    assert lengths[-1] + 2 <= row_len
    starts = np.cumsum([0, *slots])
    for i, p in enumerate(parts):
        if p == IMAGE:
            assert not any(starts[i] < e < starts[i + 1] for e in ends)
    if sum(slots) + 2 <= row_len:
        assert len(ends) == 1


def test_a_piece_takes_what_just_fits():
    assert cut([1, IMAGE, 3], N, 6) == [5, 8]  # BOS, a token and an image fill a row of six; the last piece has EOS
    assert cut([IMAGE, IMAGE, 1], N, 9) == [8, 9]
    assert cut([7], N, 6) == [5, 7]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(3, 64), max_size=300), st.integers(1, 40))
def test_best_fit_uses_every_piece_once_within_its_window(lengths, window):
    sizes = np.array(lengths, np.int64)
    row_ptr, order = best_fit(sizes, 64, window)
    assert np.array_equal(np.sort(order), np.arange(len(sizes)))
    for r in range(len(row_ptr) - 1):
        assert 0 < sizes[order[row_ptr[r] : row_ptr[r + 1]]].sum() <= 64
    assert len(row_ptr) - 1 <= max(1, 2 * sizes.sum() / 64 + 1)  # half full on average, at worst


def test_best_fit_fills_rows():
    sizes = np.random.default_rng(0).integers(10, 120, 5000)
    row_ptr, _ = best_fit(sizes, 256)
    assert sizes.sum() / ((len(row_ptr) - 1) * 256) > 0.98


def test_largest_prefix_is_a_prefix_that_fits_and_fills():
    sizes = np.random.default_rng(0).integers(40, 110, 400).tolist()
    plan = largest_prefix(sizes, 64, 256)
    used = sorted(i for row in plan for i in row)
    assert used == list(range(len(used)))
    assert all(sum(sizes[i] for i in row) <= 256 for row in plan)
    assert sum(sizes[i] for i in used) > 0.93 * 64 * 256
