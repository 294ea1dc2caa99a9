"""Augmentation of features: mixtures, hidden tokens, noise."""

import torch

from apecache.heads.build import build_head
from apecache.heads.head import HeadSpec
from apecache.losses.contrastive import Groups
from apecache.recipes.recipe import AugmentationSpec
from apecache.train.augment import add_noise, augment, hide_tokens, mix
from apecache.train.batches import Batch


def test_both_modalities_are_mixed_with_one_coefficient_half_with_half() -> None:
    torch.manual_seed(0)
    n = 7
    captions = 2
    image = torch.randn(n, 3)
    text = torch.randn(n * captions, 4)
    seen = set()
    for _ in range(20):
        mixed = mix(
            Batch(
                image=image,
                text=text,
                groups=Groups(image=torch.arange(n), text=torch.arange(n).repeat_interleave(2)),
            ),
            1.0,
        )
        own = (mixed.image[0, 0] - image[3, 0]) / (image[0, 0] - image[3, 0])
        torch.testing.assert_close(
            mixed.image,
            own * image[:3] + (1 - own) * image[3:6],
            atol=1e-5,
            rtol=1e-4,
        )
        torch.testing.assert_close(
            mixed.text,
            own * text[:6] + (1 - own) * text[6:12],
            atol=1e-5,
            rtol=1e-4,
        )
        assert 0 <= float(own) <= 1
        assert mixed.groups is not None
        assert mixed.groups.image.unique(return_inverse=True)[1].tolist() == [0, 1, 2]
        assert torch.equal(mixed.groups.text, mixed.groups.image.repeat_interleave(2))
        seen.add(round(float(own), 4))
    assert len(seen) > 10


def test_a_share_of_the_tokens_is_hidden_and_never_the_first() -> None:
    torch.manual_seed(0)
    x = torch.randn(400, 10, 2)
    mask = torch.arange(10) < torch.randint(1, 11, (400, 1))
    hidden = hide_tokens(mask, x, 0.25)
    assert hidden is not None
    assert hidden[:, 0].all()
    assert not (hidden & ~mask).any()
    rest = mask[:, 1:]
    assert abs(float(hidden[:, 1:][rest].double().mean()) - 0.75) < 0.03
    assert hide_tokens(None, x[:, 0], 0.25) is None


def test_noise_is_in_units_of_each_features_deviation() -> None:
    torch.manual_seed(0)
    head = build_head(HeadSpec(dim=2), 2, 2)
    x = torch.randn(20000, 2) * torch.tensor([1.0, 100.0])
    head.fit_statistics(x)
    change = add_noise(x, head, 0.5) - x
    torch.testing.assert_close(change.std(0), torch.tensor([0.5, 50.0]), rtol=0.05, atol=0)


def test_without_settings_a_batch_stays_as_it_is() -> None:
    batch = Batch(image=torch.randn(4, 2), text=torch.randn(4, 3))
    head = build_head(HeadSpec(dim=2), 2, 2)
    assert augment(batch, spec=AugmentationSpec(), image=head, text=head) is batch
