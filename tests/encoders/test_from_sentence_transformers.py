"""sentence-transformers: the library's own embedding, from ids that we batch ourselves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from apecache.encoders.load import load_image_encoder, load_text_encoder
from apecache.encoders.spec import parse_encoder
from apecache.errors import EncoderError

library = pytest.importorskip(
    "sentence_transformers",
    reason="the extra sentence-transformers is not installed",
)
TEXTS = ["a red circle", "the blue square on white", "circle"]


def save(
    folder: Path,
    text_encoder: Path,
    pooling: str = "mean",
    prompts: dict[str, str] | None = None,
) -> Path:
    torch.manual_seed(0)
    try:
        from sentence_transformers.sentence_transformer.modules import (
            Dense,
            Normalize,
            Pooling,
            Transformer,
        )
    except ImportError:
        from sentence_transformers.models import Dense, Normalize, Pooling, Transformer
    words: Any = Transformer(str(text_encoder))
    width = words.get_embedding_dimension() if hasattr(words, "get_embedding_dimension") else 32
    modules = [words, Pooling(width, pooling_mode=pooling), Dense(width, 8), Normalize()]
    default = next(iter(prompts)) if prompts else None
    model = library.SentenceTransformer(
        modules=modules,
        prompts=prompts,
        default_prompt_name=default,
        device="cpu",
    )
    model.save_pretrained(str(folder), create_model_card=False)
    return folder


@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_embeddings_are_the_librarys_own(
    tmp_path: Path,
    tiny_text_encoder: Path,
    pooling: str,
) -> None:
    folder = save(tmp_path / "model", tiny_text_encoder, pooling)
    wanted = library.SentenceTransformer(str(folder), device="cpu").encode(
        TEXTS,
        convert_to_tensor=True,
    )
    encoder = load_text_encoder(parse_encoder(f"st:{folder}", "text"), "cpu")
    assert torch.allclose(encoder.encode(TEXTS), wanted, atol=1e-5)
    assert encoder.row_shape == (8,)


def test_the_default_prompt_is_put_before_every_text(
    tmp_path: Path,
    tiny_text_encoder: Path,
) -> None:
    folder = save(tmp_path / "model", tiny_text_encoder, prompts={"query": "a picture of "})
    spec = parse_encoder(f"st:{folder}", "text")
    wanted = library.SentenceTransformer(str(folder), device="cpu").encode(
        TEXTS,
        convert_to_tensor=True,
    )
    encoder = load_text_encoder(spec, "cpu")
    without = load_text_encoder(replace(spec, prefix=""), "cpu")
    assert torch.allclose(encoder.encode(TEXTS), wanted, atol=1e-5)
    assert torch.equal(encoder.encode(["x"]), without.encode(["a picture of x"]))
    assert encoder.fingerprint.digest != without.fingerprint.digest


def test_the_identity_knows_the_modules(tmp_path: Path, tiny_text_encoder: Path) -> None:
    digests = set()
    for pooling in ("mean", "cls"):
        folder = save(tmp_path / pooling, tiny_text_encoder, pooling)
        encoders = [
            load_text_encoder(parse_encoder(f"st:{folder}", "text"), "cpu") for _ in range(2)
        ]
        assert encoders[0].fingerprint == encoders[1].fingerprint
        digests.add(encoders[0].fingerprint.digest)
    assert len(digests) == 2


def test_other_cuts_and_images_are_refused(tmp_path: Path, tiny_text_encoder: Path) -> None:
    folder = save(tmp_path / "model", tiny_text_encoder)
    spec = parse_encoder(f"st:{folder}", "text")
    with pytest.raises(EncoderError, match="has 2 blocks: the layer is 0 to 2"):
        load_text_encoder(replace(spec, pooling="tokens", layer=7), "cpu")
    with pytest.raises(EncoderError, match="reads no images; it reads text"):
        load_image_encoder(parse_encoder(f"st:{folder}", "image"), "cpu")
    with pytest.raises(EncoderError, match=r"has no modules.json"):
        parse_encoder(f"st:{tiny_text_encoder}", "text")
