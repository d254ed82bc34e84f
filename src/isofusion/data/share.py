"""Which ranks take which rows of a step: equal numbers of rows, balanced in tokens, a pure function of the rows.

Rows are of equal length, so equal numbers of rows mean equal slots and equal memory. What differs is how full they are
and how many of their tokens are patches, which an image encoder processes a second time.

# R rows of a step
"""

from __future__ import annotations

import numpy as np

from isofusion.errors import InputError

IMAGE_WEIGHT = 2
"""Work of an image token over that of a text token: late fusion runs it through the encoder and the decoder."""


def share_rows(text_R: np.ndarray, image_R: np.ndarray, ranks: int) -> list[np.ndarray]:
    """Row numbers of each rank, increasing; numbers of rows differ by one at most.

    Longest processing time first (Graham 1969): the heaviest row goes to the rank with the least work so far that has
    room for a row. Ties go to the lower rank. Raises InputError for fewer rows than ranks.
    """
    rows = len(text_R)
    if rows < ranks:
        raise InputError(
            f"a step has {rows} rows (train.rows_per_step) for {ranks} ranks; start at most {rows} ranks, "
            f"or raise rows_per_step in a new study"
        )
    work_R = np.asarray(text_R, np.int64) + IMAGE_WEIGHT * np.asarray(image_R, np.int64)
    room = [rows // ranks + (r < rows % ranks) for r in range(ranks)]
    load = [0] * ranks
    out: list[list[int]] = [[] for _ in range(ranks)]
    for row in np.argsort(-work_R, kind="stable").tolist():
        rank = min((r for r in range(ranks) if len(out[r]) < room[r]), key=lambda r: (load[r], r))
        out[rank].append(row)
        load[rank] += int(work_R[row])
    return [np.array(sorted(mine), np.int64) for mine in out]
