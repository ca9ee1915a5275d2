"""The benchmark of sampling: what both engines are asked for. A run of it takes half an hour."""

import torch

from benchmarks.sampling import LONGEST, SHORTEST, RowEnds, ragged_lengths


def test_lengths_are_ragged_and_the_same_for_both_engines():
    lengths = ragged_lengths(64, LONGEST)
    assert lengths == ragged_lengths(64, LONGEST) != ragged_lengths(64, LONGEST, seed=1)
    assert min(lengths) >= SHORTEST and max(lengths) == LONGEST and len(lengths) == 64
    assert sorted(lengths)[32] < LONGEST / 3, "log-uniform: most are short"


def test_each_row_ends_at_its_own_length():
    ends = RowEnds(10, [1, 3, 2])
    assert ends(torch.zeros(3, 11), None).tolist() == [True, False, False]
    assert ends(torch.zeros(3, 12), None).tolist() == [True, False, True]
    assert ends(torch.zeros(3, 13), None).all()
