"""CKA, mutual neighbors and the regression, each against its definition written out."""

import numpy as np
import pytest
import torch

from apecache.metrics.geometry import likeness, linear_cka, mutual_knn, ridge_recalls

CHANCE = torch.Generator().manual_seed(0)
X = torch.randn(60, 9, generator=CHANCE)
Y = torch.randn(60, 5, generator=CHANCE)


def hsic_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    """By way of the [n, n] kernels: HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))."""
    n = len(x)
    center = np.eye(n) - 1 / n
    kernel, other = (center @ (side.double() @ side.double().T).numpy() @ center for side in (x, y))
    return float((kernel * other).sum() / np.sqrt((kernel**2).sum() * (other**2).sum()))


def test_cka_is_its_definition_by_kernels() -> None:
    assert linear_cka(X, Y) == pytest.approx(hsic_cka(X, Y), abs=1e-12)
    mixed = X[:, :5] + Y + 3
    assert linear_cka(X, mixed) == pytest.approx(hsic_cka(X, mixed), abs=1e-12)


def test_cka_is_one_under_rotation_scale_and_shift_and_zero_for_a_constant() -> None:
    rotation = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1)))[0]
    assert linear_cka(X, 7 * X @ rotation + 5) == pytest.approx(1, abs=1e-6)
    assert linear_cka(X, torch.full((60, 3), 2.0)) == 0.0


def neighbors(x: torch.Tensor, row: int, k: int) -> set[int]:
    scores = {
        other: float(x[row] @ x[other] / (x[row].norm() * x[other].norm()))
        for other in range(len(x))
        if other != row
    }
    return set(sorted(scores, key=lambda other: -scores[other])[:k])


@pytest.mark.parametrize("k", [1, 10, 59, 100])
def test_mutual_neighbors_are_counted_one_by_one(k: int) -> None:
    y = X[:, :5] + 0.5 * Y
    most = min(k, 59)
    wanted = np.mean(
        [len(neighbors(X, row, most) & neighbors(y, row, most)) / most for row in range(60)]
    )
    assert mutual_knn(X, y, k) == pytest.approx(wanted)
    assert mutual_knn(X, X, k) == 1.0


def test_the_regression_is_fitted_on_one_half_and_measured_on_the_other() -> None:
    texts = torch.randn(200, 6, generator=torch.Generator().manual_seed(2))
    weights = torch.randn(6, 12, generator=torch.Generator().manual_seed(3))
    images = texts @ weights + 4
    fit = torch.arange(200) % 2 == 0
    assert ridge_recalls(images, text=texts, fit=fit, ridge=1e-6) == (100.0, 100.0)
    shuffled = images.clone()
    shuffled[~fit] = images[~fit].roll(1, 0)
    assert ridge_recalls(shuffled, text=texts, fit=fit, ridge=1e-6) == (0.0, 0.0)
    broken = images.clone()
    broken[fit] = torch.randn(100, 12, generator=torch.Generator().manual_seed(4))
    assert max(ridge_recalls(broken, text=texts, fit=fit, ridge=1e-6)) < 20


def test_a_likeness_holds_all_three() -> None:
    fit = torch.arange(60) < 30
    found = likeness(X, Y, fit)
    assert (found.cka, found.mutual_knn) == (linear_cka(X, Y), mutual_knn(X, Y))
    assert found.recall_at_1 == (found.image_to_text + found.text_to_image) / 2
