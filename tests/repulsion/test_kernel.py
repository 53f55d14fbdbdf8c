"""Kernel, entropy and Vendi score against closed forms (paper Eq. 3 and 4)."""

import math

import pytest
import torch

from repulsion import cosine_kernel, vendi_score, von_neumann_entropy

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 and a handful of operations


def test_kernel_holds_the_cosines_of_hand_made_vectors():
    vectors = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, -1.0]], dtype=torch.float64)
    half = math.sqrt(0.5)
    expected = torch.tensor([[1, half, 0], [half, 1, -half], [0, -half, 1]], dtype=torch.float64)
    torch.testing.assert_close(cosine_kernel(vectors), expected, **EXACT)


def test_kernel_knows_no_length_and_no_rotation():
    torch.manual_seed(0)
    vectors = torch.randn(5, 7, dtype=torch.float64)
    lengths = torch.tensor([1e-6, 1.0, 3.0, 1e3, 1e6], dtype=torch.float64)[:, None]
    rotation = torch.linalg.qr(torch.randn(7, 7, dtype=torch.float64)).Q
    torch.testing.assert_close(cosine_kernel(vectors * lengths @ rotation), cosine_kernel(vectors), **EXACT)


def test_zero_vector_resembles_nobody():
    vectors = torch.tensor([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])
    expected = torch.tensor([[1.0, 0, 0], [0, 1, 1], [0, 1, 1]])
    torch.testing.assert_close(cosine_kernel(vectors), expected)


@pytest.mark.parametrize("b", [1, 2, 5])
def test_entropy_and_vendi_at_both_ends(b):
    torch.testing.assert_close(von_neumann_entropy(torch.eye(b).double()).item(), math.log(b), **EXACT)
    torch.testing.assert_close(von_neumann_entropy(torch.ones(b, b).double()).item(), 0.0, rtol=0, atol=1e-13)
    torch.testing.assert_close(vendi_score(torch.eye(b)).item(), float(b), **EXACT)
    torch.testing.assert_close(vendi_score(torch.ones(b, 3)).item(), 1.0, **EXACT)


def test_entropy_of_two_samples_has_a_closed_form():
    cosine = 0.3  # eigenvalues (1 ± c) / 2
    expected = -sum(p * math.log(p) for p in ((1 + cosine) / 2, (1 - cosine) / 2))
    kernel = torch.tensor([[1, cosine], [cosine, 1]], dtype=torch.float64)
    torch.testing.assert_close(von_neumann_entropy(kernel).item(), expected, **EXACT)


def test_two_pairs_of_twins_count_as_two():
    vectors = torch.tensor([[1.0, 0], [0, 5.0], [2.0, 0], [0, 0.1]])
    torch.testing.assert_close(vendi_score(vectors).item(), 2.0, **EXACT)


def test_scores_of_several_groups_at_once_are_those_of_each():
    torch.manual_seed(1)
    vectors = torch.randn(3, 4, 6)
    together = vendi_score(vectors)
    torch.testing.assert_close(together, torch.stack([vendi_score(group) for group in vectors]), **EXACT)
    torch.testing.assert_close(vendi_score(vectors[:, [2, 0, 3, 1]]), together, **EXACT)
