"""Distances between sets of features: closed forms, independent formulas, and what they detect."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch

from ddim_schedulers.training.metrics.distances import (
    frechet_distance,
    inception_score,
    kernel_distance,
    neighbour_metrics,
)


def _exact(n, mean, covariance):
    """n float64 rows whose sample mean and covariance are the given ones."""
    rows = torch.randn(n, len(mean), dtype=torch.float64)
    rows -= rows.mean(0)
    own = torch.linalg.cholesky(torch.cov(rows.T))
    white = torch.linalg.solve_triangular(own, rows.T, upper=False).T
    return white @ torch.linalg.cholesky(covariance).T + mean


def _covariance(size):
    root = torch.randn(size, size, dtype=torch.float64)
    return root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)


def test_frechet_is_the_closed_form_of_known_gaussians():
    std_a, std_b = torch.tensor([1.0, 2.0, 0.5]).double(), torch.tensor([3.0, 1.0, 0.25]).double()
    turn = torch.linalg.qr(torch.randn(3, 3).double())[0]
    mean = torch.tensor([0.3, -2.0, 1.0]).double()
    a = _exact(500, torch.zeros(3).double(), turn @ (std_a**2).diag() @ turn.T)
    b = _exact(400, mean, turn @ (std_b**2).diag() @ turn.T)
    # commuting covariances: |mu|^2 + sum (s_a - s_b)^2
    want = float((mean**2).sum() + ((std_a - std_b) ** 2).sum())
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(want, rel=1e-12)
    without_root = float((mean**2).sum() + ((std_a**2 - std_b**2) ** 2).sum())
    assert frechet_distance(a, b) != pytest.approx(without_root, rel=1e-2)  # a wrong formula


@pytest.mark.parametrize("shift", [0.0, 1000.0])
def test_frechet_agrees_with_scipy_and_is_zero_for_equal_sets(shift):
    size = 48
    a = _exact(300, torch.full((size,), shift).double(), _covariance(size))
    b = _exact(300, torch.full((size,), shift + 0.1).double(), _covariance(size))
    s_a, s_b = np.cov(a.numpy().T), np.cov(b.numpy().T)
    root = scipy.linalg.sqrtm(s_a @ s_b).real
    gap = float((a.mean(0) - b.mean(0)).square().sum())
    want = gap + np.trace(s_a) + np.trace(s_b) - 2 * np.trace(root)
    assert frechet_distance(a, b) == pytest.approx(want, rel=1e-6)
    assert abs(frechet_distance(a, a.flip(0))) <= 1e-6 * np.trace(s_a)


def test_frechet_of_equal_sets_is_zero_with_constant_features_and_few_rows():
    rows = torch.rand(40, 64)
    rows[:, :20] = 1.0
    trace = float(torch.cov(rows.double().T).trace())
    assert abs(frechet_distance(rows, rows.flip(0))) <= 1e-6 * trace


def test_kernel_distance_is_the_unbiased_mmd():
    a, b = torch.randn(60, 5).double(), torch.randn(60, 5).double() + 0.5

    def kernel(x, y):
        return (x @ y.T / 5 + 1) ** 3

    k_aa, k_bb, k_ab = (kernel(x, y).numpy() for x, y in ((a, a), (b, b), (a, b)))
    off = ~np.eye(60, dtype=bool)
    want = k_aa[off].mean() + k_bb[off].mean() - 2 * k_ab.mean()
    mean, std = kernel_distance(a, b, subsets=2, subset_size=60)
    assert mean == pytest.approx(want, rel=1e-10) and std < 1e-10
    biased = k_aa.mean() + k_bb.mean() - 2 * k_ab.mean()
    assert abs(mean - biased) > 1e-3


def test_kernel_distance_depends_on_its_seed_alone():
    a, b = torch.randn(80, 4), torch.randn(90, 4)
    first = kernel_distance(a, b, subset_size=30)
    torch.rand(7)
    before = torch.get_rng_state()
    assert kernel_distance(a, b, subset_size=30) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert kernel_distance(a, b, subset_size=30, seed=1) != first


def test_neighbour_metrics_count_balls():
    # on a line, k = 1: real radii are 1, 1, 1, 7
    real = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
    fake = torch.tensor([[0.5], [0.6], [20.0]])
    found = neighbour_metrics(real, fake, k=1)
    # 0.5 and 0.6 are inside the balls around 0 and 1; 20 is in none (the ball around 9 ends at 16)
    assert found["precision"] == pytest.approx(2 / 3)
    assert found["density"] == pytest.approx((2 + 2 + 0) / 3)
    assert found["coverage"] == pytest.approx(2 / 4)
    # fake radii: 0.1, 0.1, 19.4: 2 and 9 lie within 19.4 of 20, 0 and 1 do not (20, 19 -> 19 does)
    assert found["recall"] == pytest.approx(3 / 4)


def test_neighbour_metrics_do_not_depend_on_the_blocks_they_are_computed_in():
    real, fake = torch.randn(1500, 3), torch.randn(1300, 3)
    found = neighbour_metrics(real, fake, k=5)
    distance = torch.cdist(real.double(), fake.double())
    own = torch.cdist(real.double(), real.double()).sort(1).values[:, 5]
    within = distance < own[:, None]
    assert found["coverage"] == pytest.approx(float(within.any(1).double().mean()))
    assert found["density"] == pytest.approx(float(within.sum(0).double().mean() / 5))
    assert 0.9 < found["density"] < 1.1 and found["precision"] > 0.9 and found["recall"] > 0.9


def test_missing_modes_and_missing_quality_are_told_apart():
    centres = 20 * torch.eye(4)
    real = centres.repeat_interleave(100, 0) + torch.randn(400, 4)
    one_mode = centres[:1].repeat(400, 1) + torch.randn(400, 4)
    blurred = centres.repeat_interleave(100, 0) + 4 * torch.randn(400, 4)
    narrow, wide = neighbour_metrics(real, one_mode), neighbour_metrics(real, blurred)
    assert narrow["precision"] > 0.9 and narrow["recall"] < 0.35 and narrow["coverage"] < 0.35
    assert wide["precision"] < 0.5 and wide["recall"] > 0.8


def test_inception_score_goes_from_one_to_the_number_of_classes():
    sure = torch.eye(10).repeat(20, 1) * 100
    assert inception_score(sure) == pytest.approx(10)
    assert inception_score(sure[:1].repeat(50, 1)) == pytest.approx(1)
    assert inception_score(torch.zeros(50, 10)) == pytest.approx(1)
    p = torch.tensor([[0.9, 0.1], [0.2, 0.8]], dtype=torch.float64)
    mean = p.mean(0)
    want = math.exp(float((p * (p / mean).log()).sum(1).mean()))
    assert inception_score(p.log()) == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: frechet_distance(torch.rand(1, 3), torch.rand(5, 3)), "`real` has shape"),
        (lambda: frechet_distance(torch.rand(4, 3), torch.rand(5, 2)), "`fake` has shape"),
        (lambda: kernel_distance(torch.rand(4, 3), torch.full((4, 3), math.nan)), "finite"),
        (lambda: neighbour_metrics(torch.rand(4, 3), torch.rand(9, 3), k=4), "`k` is 4"),
        (lambda: inception_score(torch.full((4, 3), math.inf)), "finite"),
    ],
)
def test_bad_features_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
