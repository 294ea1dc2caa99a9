"""CSLS against its formula, and against the hubs it is there for."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from apecache.metrics.csls import csls_report, csls_vectors, mean_of_nearest
from apecache.metrics.protocols import folded_report
from apecache.metrics.retrieval import retrieval_report


def pairs(n: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    image = F.normalize(torch.randn(n, 12, generator=generator), dim=1)
    owner = torch.arange(n).repeat_interleave(2)
    return (
        image,
        F.normalize(image[owner] + noise * torch.randn(2 * n, 12, generator=generator), dim=1),
        owner,
    )


@pytest.mark.parametrize("n", [3, 40, 1300])
def test_products_are_the_formula_written_out(n: int) -> None:
    image, text, _ = pairs(n, 1.0)
    cosines = (image @ text.T).double().numpy()
    near_image = np.sort(cosines, axis=1)[:, -10:].mean(1)
    near_text = np.sort(cosines, axis=0)[-10:].mean(0)
    wanted = 2 * cosines - near_image[:, None] - near_text
    a, b = csls_vectors(image, text)
    np.testing.assert_allclose((a @ b.T).numpy(), wanted, atol=2e-6)
    assert mean_of_nearest(image, text).shape == (n, 1)


def test_a_hub_that_hides_the_right_answers_is_put_back() -> None:
    """Every image is nearest to one caption, which is near to all of them; its own comes second."""
    n = 50
    own = torch.eye(n)
    common = torch.ones(n) / n**0.5
    image = F.normalize(0.6 * own + common, dim=1)
    text = torch.cat((F.normalize(own + 0.2 * common, dim=1), common[None]))
    owner = torch.cat((torch.arange(n), torch.tensor([0])))
    assert retrieval_report(image, text, owner).image_to_text[1] == 2
    assert csls_report(image, text, owner).image_to_text[1] == 100


def test_counts_and_chance_are_those_of_the_plain_figures_and_embeddings_of_one_point_score_zero() -> (
    None
):
    image, text, owner = pairs(60, 1.0)
    plain = retrieval_report(image, text, owner)
    corrected = csls_report(image, text, owner)
    assert (plain.n_images, plain.n_texts) == (corrected.n_images, corrected.n_texts)
    assert plain.chance_image_to_text == corrected.chance_image_to_text
    assert plain.image_to_text != corrected.image_to_text
    one = csls_report(image[:1].expand(60, -1), image[:1].expand(120, -1), owner)
    assert set(one.text_to_image.values()) | set(one.image_to_text.values()) == {0.0}


def test_folds_look_only_at_themselves() -> None:
    image, text, owner = pairs(80, 1.0)
    first = csls_report(image[:40], text[:80], owner[:80])
    second = csls_report(image[40:], text[80:], owner[80:] - 40)
    found = folded_report(
        image,
        text=text,
        image_of_text=owner,
        fold_images=40,
        measure=csls_report,
    )
    assert found.text_to_image[1] == pytest.approx(
        (first.text_to_image[1] + second.text_to_image[1]) / 2
    )
