"""The parts that every encoder shares: padding, pooling, digests, devices."""

from collections.abc import Callable
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from apecache.encoders.encoder import encode_images, encode_texts, pad_ids, pool_tokens
from apecache.encoders.fingerprint import digest_module
from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.lists(st.integers(0, 99), max_size=6), min_size=1, max_size=5),
    pad=st.integers(0, 5),
)
def test_padding_is_on_the_right_and_masked(ids: list[list[int]], pad: int) -> None:
    batch, mask = pad_ids(ids, pad)
    longest = max(1, *map(len, ids))
    assert batch.tolist() == [row + [pad] * (longest - len(row)) for row in ids]
    assert mask.tolist() == [[1] * len(row) + [0] * (longest - len(row)) for row in ids]
    assert batch.dtype == mask.dtype == torch.int64


def test_pooling_takes_the_first_token_or_the_mean_of_the_unmasked_ones() -> None:
    hidden = torch.arange(24.0).reshape(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    assert torch.equal(pool_tokens(hidden, mask, "cls"), hidden[:, 0])
    assert pool_tokens(hidden, mask, "mean").tolist() == [[1.5, 2.5, 3.5], [16.5, 17.5, 18.5]]
    assert pool_tokens(hidden, None, "mean").tolist() == [[4.5, 5.5, 6.5], [16.5, 17.5, 18.5]]
    assert pool_tokens(hidden, torch.zeros(2, 4), "mean").tolist() == [[0.0] * 3] * 2


def test_no_encoder_runs_in_inference_mode(
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> None:
    """transformers' BEiT keeps tensors between passes: made in inference mode, they end a fit."""
    image = load_image_encoder(parse_encoder(f"timm:{tiny_image_encoder}", "image"))
    text = load_text_encoder(parse_encoder(f"hf:{tiny_text_encoder}", "text"))
    modes: set[tuple[str, bool, bool]] = set()
    for side, encoder in (("image", image), ("text", text)):
        for submodule in encoder.module.modules():
            submodule.register_forward_hook(
                lambda *_, side=side: modes.add(
                    (side, torch.is_inference_mode_enabled(), torch.is_grad_enabled())
                )
            )
    pixels = torch.randn(2, *image.input_shape)
    image.encode(pixels)
    encode_images([image], pixels)
    text.encode(["a", "b"])
    encode_texts([text], text.tokenize(["a"]).ids)
    assert modes == {("image", False, False), ("text", False, False)}


def module(**tensors: Tensor) -> nn.Module:
    made = nn.Module()
    for name, tensor in tensors.items():
        made.register_buffer(name, tensor)
    return made


def test_the_digest_of_weights_is_their_names_dtypes_shapes_and_values() -> None:
    base = {
        "a": torch.tensor([[1.0, 2.0]]),
        "b": torch.tensor(3),
        "c": torch.empty(0),
        "d": torch.tensor([True]),
    }
    digest = digest_module(module(**base))
    assert digest_module(module(**dict(reversed(base.items())))) == digest
    changed: list[dict[str, Tensor]] = [
        {**base, "a": torch.tensor([[1.0, 2.0000002]])},
        {**base, "a": torch.tensor([[2.0, 1.0]])},
        {**base, "a": torch.tensor([[1.0], [2.0]])},
        {**base, "b": torch.tensor(3, dtype=torch.int32)},
        {**base, "c": torch.empty(0, 1)},
        {**base, "d": torch.tensor([False])},
        {"x" if name == "a" else name: tensor for name, tensor in base.items()},
        {name: tensor for name, tensor in base.items() if name != "c"},
    ]
    assert (
        len({digest, *(digest_module(module(**tensors)) for tensors in changed)})
        == len(changed) + 1
    )


def test_the_same_bytes_of_another_dtype_are_other_weights() -> None:
    assert digest_module(module(a=torch.zeros(2))) != digest_module(
        module(a=torch.zeros(2, dtype=torch.int32))
    )


def test_the_digest_of_weights_does_not_depend_on_their_memory_layout() -> None:
    weights = torch.arange(6.0).reshape(2, 3)
    assert digest_module(module(a=weights.t().contiguous().t())) == digest_module(module(a=weights))


def test_excluded_names_and_other_floating_types_are_handled() -> None:
    half = {"a": torch.ones(2, dtype=torch.bfloat16), "pooler": torch.ones(1)}
    digest = digest_module(module(**half), exclude=["pooler"])
    assert digest == digest_module(module(a=half["a"]))
    assert digest != digest_module(module(**half))
    assert digest != digest_module(module(a=torch.ones(2, dtype=torch.float16)))


def test_queries_are_encoded_in_their_order_whatever_the_batch(tiny_text_encoder: Path) -> None:
    encoder = load_text_encoder(parse_encoder(f"hf:{tiny_text_encoder}", "text"), "cpu")
    texts = ["a red circle", "the", "a drawing of the blue square in white", "a photo"]
    alone: Callable[[str], Tensor] = lambda text: encoder.encode([text])[0]  # noqa: E731
    for size in (1, 3, 64):
        features = encoder.encode(texts, batch_size=size)
        assert (features.shape, features.dtype) == ((4, encoder.dim), torch.float32)
        for row, text in zip(features, texts, strict=True):
            torch.testing.assert_close(row, alone(text), atol=1e-5, rtol=0)
    assert encoder.encode([]).shape == (0, encoder.dim)
