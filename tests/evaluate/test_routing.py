from __future__ import annotations

import numpy as np
import pytest

from isofusion.evaluate.routing import (
    binary_entropy,
    corrected_specialisation,
    modality_specialisation,
    specialisation,
)


def test_binary_entropy() -> None:
    assert binary_entropy(np.array([0.0, 0.5, 1.0])) == pytest.approx([0, 1, 0])
    assert binary_entropy(np.array([0.11])) == pytest.approx([0.4999], abs=1e-4)


def test_experts_of_one_modality_score_one_and_shared_ones_zero() -> None:
    text, image = np.array([[10, 0], [5, 5]]), np.array([[0, 30], [5, 5]])
    assert specialisation(text, image) == pytest.approx([1.0, 0.0])
    assert corrected_specialisation(text, image) == pytest.approx([1.0, 0.0])


def test_only_the_corrected_score_ignores_the_base_rate() -> None:
    text, image = np.array([[100, 100]]), np.array([[900, 900]])  # routing blind to modality, 90 % image tokens
    assert specialisation(text, image) == pytest.approx([1 - binary_entropy(np.array(0.1))])
    assert specialisation(text, image)[0] > 0.5
    assert corrected_specialisation(text, image) == pytest.approx([0.0])


def test_an_unused_expert_does_not_count() -> None:
    assert specialisation(np.array([[10, 0, 0]]), np.array([[0, 10, 0]])) == pytest.approx([1.0])
    assert np.isnan(specialisation(np.zeros((1, 3)), np.zeros((1, 3)))).all()


def test_distance_from_uniform_per_modality() -> None:
    counts = np.array([[25, 25, 25, 25], [100, 0, 0, 0], [40, 20, 20, 20], [0, 0, 0, 0]])
    got = modality_specialisation(counts)
    assert got[:3] == pytest.approx([0.0, (0.75 + 3 * 0.25) / 4, (0.15 + 3 * 0.05) / 4])
    assert np.isnan(got[3])
