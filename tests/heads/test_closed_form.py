"""Closed forms against scikit-learn, SciPy and their definitions; one pass in blocks equals all at
once."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.linalg import orthogonal_procrustes
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge
from torch import Tensor

from apecache.heads.closed_form import (
    AffineMap,
    Covariances,
    PairMoments,
    canonical_maps,
    dictionary_entries,
    procrustes_map,
    ridge_map,
)

Pairs = tuple[NDArray[np.float64], NDArray[np.float64]]


def pairs(n: int = 200, dx: int = 6, dy: int = 4, seed: int = 0) -> Pairs:
    """Two noisy views of 3 hidden numbers, far from the origin."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n, 3)) * [3, 2, 1]
    views = (
        hidden @ rng.normal(size=(3, d)) + rng.normal(size=(n, d)) + rng.normal(size=d) * 5
        for d in (dx, dy)
    )
    image, text = views
    return image, text


def covariances(
    image: NDArray[np.float64],
    text: NDArray[np.float64],
    block: int = 10**9,
) -> Covariances:
    moments = PairMoments()
    for begin in range(0, len(image), block):
        part = slice(begin, begin + block)
        x = torch.tensor(image[part])
        y = torch.tensor(text[part])
        moments.add(x, y, torch.arange(len(x)))
    return moments.covariances()


def apply(affine: AffineMap, x: NDArray[np.float64]) -> NDArray[np.float64]:
    mapped: NDArray[np.float64] = x @ affine.weight.numpy().T + affine.bias.numpy()
    return mapped


@pytest.mark.parametrize("block", [1, 7, 200])
def test_covariances_in_blocks_are_numpys(block: int) -> None:
    image, text = pairs()
    c = covariances(image, text, block)
    both = np.cov(np.hstack([image, text]).T, bias=True)
    np.testing.assert_allclose(c.image, both[:6, :6], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(c.text, both[6:, 6:], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(c.cross, both[:6, 6:], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(c.image_mean, image.mean(0))
    np.testing.assert_allclose(c.text_mean, text.mean(0))


def test_an_image_weighs_one_however_many_captions_it_has() -> None:
    image, text = pairs(n=6)
    owner = np.array([0, 0, 1, 2, 2, 2])
    moments = PairMoments()
    moments.add(torch.tensor(image[:3]), torch.tensor(text), torch.tensor(owner))
    c = moments.covariances()
    weights = np.array([1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3])
    both = np.cov(np.hstack([image[owner], text]).T, aweights=weights, bias=True)
    np.testing.assert_allclose(c.image, both[:6, :6], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(c.text, both[6:, 6:], rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(c.cross, both[:6, 6:], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("ridge", [1e-6, 0.1, 10.0])
def test_ridge_is_scikit_learns(ridge: float) -> None:
    image, text = pairs()
    alpha = ridge * len(image) * np.trace(np.cov(text.T, bias=True)) / text.shape[1]
    theirs = Ridge(alpha=alpha).fit(text, image)
    np.testing.assert_allclose(
        apply(ridge_map(covariances(image, text), ridge), text),
        theirs.predict(text),
        rtol=1e-7,
    )


def test_procrustes_is_scipys_where_the_widths_are_equal() -> None:
    image, text = pairs(dx=5, dy=5)
    found = procrustes_map(covariances(image, text))
    rotation, _ = orthogonal_procrustes(text - text.mean(0), image - image.mean(0))
    np.testing.assert_allclose(found.weight.numpy().T, rotation, atol=1e-9)
    np.testing.assert_allclose(apply(found, text).mean(0), image.mean(0))


def test_procrustes_keeps_lengths_and_angles_of_narrower_texts() -> None:
    weight = procrustes_map(covariances(*pairs())).weight
    torch.testing.assert_close(weight.T @ weight, torch.eye(4, dtype=torch.float64))


def test_canonical_correlations_are_scikit_learns() -> None:
    image, text = pairs()
    found = canonical_maps(covariances(image, text), ridge=0.0)
    theirs = CCA(n_components=3, max_iter=10000, tol=1e-12).fit(image, text)
    x, y = theirs.transform(image, text)
    wanted = [np.corrcoef(x[:, k], y[:, k])[0, 1] for k in range(3)]
    np.testing.assert_allclose(found.correlations[:3], wanted, rtol=1e-5)
    u = apply(found.image, image)
    v = apply(found.text, text)
    np.testing.assert_allclose(np.cov(u.T, bias=True), np.eye(4), atol=1e-8)
    np.testing.assert_allclose(u.T @ v / len(u), np.diag(found.correlations), atol=1e-8)
    np.testing.assert_allclose(u.mean(0), 0, atol=1e-8)
    np.testing.assert_allclose(np.abs(np.corrcoef(u[:, 0], x[:, 0])[0, 1]), 1, rtol=1e-5)


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_products_of_weighted_directions_are_weighted_by_the_correlations(power: float) -> None:
    image, text = pairs()
    maps = canonical_maps(covariances(image, text), ridge=0.3)
    plain = apply(maps.image, image)[:, :2] * apply(maps.text, text)[:, :2]
    u, v = (apply(side, x) for side, x in zip(maps.weighted(2, power), (image, text), strict=True))
    np.testing.assert_allclose(u * v, plain * maps.correlations[:2].numpy() ** power, rtol=1e-9)


def test_features_that_depend_on_one_another_give_finite_maps() -> None:
    image, text = pairs()
    doubled = np.hstack([image, image])
    maps = canonical_maps(covariances(doubled, text), ridge=0.0)
    assert torch.isfinite(maps.image.weight).all()
    assert (maps.correlations <= 1).all()


def test_a_dictionary_has_an_entry_per_image_with_the_mean_of_its_captions() -> None:
    image, text = (torch.tensor(x).float() for x in pairs(n=5))
    owner = torch.tensor([0, 0, 1, 1, 1])
    entries: tuple[Tensor, Tensor] = dictionary_entries(image[:2], text, owner)
    torch.testing.assert_close(entries[0], F.normalize(image[:2], dim=-1))
    directions = F.normalize(text, dim=-1)
    wanted = torch.stack([directions[:2].mean(0), directions[2:].mean(0)])
    torch.testing.assert_close(entries[1], F.normalize(wanted, dim=-1))
