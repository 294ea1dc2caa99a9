"""Open a run or an exported folder as a model of mteb; extra `mteb`."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from apecache.arguments import AnyPath, as_place
from apecache.encoders.spec import EncoderSpec
from apecache.errors import DataError, MissingExtraError
from apecache.runs.model import Embeddings, ImageTextModel, load
from apecache.storage.bucket import is_object_url

if TYPE_CHECKING:
    from mteb.models import SentenceTransformerEncoderWrapper
    from mteb.models.model_meta import ModelMeta

MODALITIES = ("image", "text")
SENTENCE_MODEL = "modules.json"
"""A file of every sentence-transformers folder, and of no run."""
ORGANIZATION = "apecache"
"""mteb asks for names with an organization; those of local folders have none."""


class MtebModel:
    """Answer as mteb's encoders do: `encode`, `similarity`, `similarity_pairwise`."""

    def __init__(self, model: ImageTextModel, meta: "ModelMeta") -> None:
        self.model = model
        self.mteb_model_meta = meta

    def encode(self, inputs: Iterable[Mapping[str, Any]], **_: object) -> Embeddings:
        """Embed the batches of a loader as float32 [n, dim].

        Args:
            inputs: batches with the key `text` (texts) or `image` (PIL images). The vector of an
                item with both is their sum, as in mteb's own model of open_clip.

        Raises:
            DataError: a batch with neither.
        """
        embedded = [self._embed_batch(batch) for batch in inputs]
        return np.concatenate([np.empty((0, self.model.dim), np.float32), *embedded])

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Embeddings:
        """Return the cosines of all pairs, float32 [n, m]."""
        cosines: Embeddings = _unit(embeddings1) @ _unit(embeddings2).T
        return cosines

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Embeddings:
        """Return the cosines of items with the same position, float32 [n]."""
        cosines: Embeddings = (_unit(embeddings1) * _unit(embeddings2)).sum(-1)
        return cosines

    def _embed_batch(self, batch: Mapping[str, Any]) -> Embeddings:
        parts = []
        if "text" in batch:
            parts.append(self.model.encode_text(list(batch["text"])))
        if "image" in batch:
            parts.append(self.model.encode_image(list(batch["image"])))
        if not parts:
            raise DataError(
                f"mteb gave a batch with {', '.join(sorted(batch)) or 'nothing'}; this model "
                "embeds text and image"
            )
        return parts[0] + parts[1] if len(parts) == 2 else parts[0]


def mteb_model(
    source: AnyPath,
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
    device: str = "cpu",
) -> "MtebModel | SentenceTransformerEncoderWrapper":
    """Open a model for `mteb.evaluate`.

    mteb takes every local model for one of texts: only of a hub's model it reads the modalities.
    This function states them.

    Args:
        source: folder of a run with any heads, its URL, or a folder of `apecache export-run --to
            sentence-transformers`.
        image: image encoder of the run at its new place, if it has moved.
        text: text encoder of the run at its new place, if it has moved.
        device: of encoders and heads.

    Raises:
        RunError: neither a finished run nor such a folder.
        MissingExtraError: mteb is not installed.
    """
    place = as_place(source, "source")
    require_mteb()
    name = f"{ORGANIZATION}/{Path(str(place)).name or 'run'}"
    if not is_object_url(place) and (Path(place) / SENTENCE_MODEL).is_file():
        return _open_sentence_model(Path(place), name, device)
    model = load(place, image=image, text=text, device=device)
    meta = _meta(name, MODALITIES, model.dim)
    return MtebModel(model, meta)


def require_mteb() -> None:
    """Raise MissingExtraError unless mteb is installed."""
    try:
        import mteb  # noqa: F401
    except ImportError:
        raise MissingExtraError("mteb", "mteb") from None


def _open_sentence_model(
    folder: Path,
    name: str,
    device: str,
) -> "SentenceTransformerEncoderWrapper":
    from mteb.models import SentenceTransformerEncoderWrapper
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device=device, trust_remote_code=False)
    wrapped = SentenceTransformerEncoderWrapper(model)
    described = json.loads((folder / "sentence_bert_config.json").read_text(encoding="utf-8"))
    modalities = sorted(described["modality_config"])
    dim = model.get_embedding_dimension()
    wrapped.mteb_model_meta = _meta(name, modalities, dim)
    return wrapped


def _meta(name: str, modalities: Iterable[str], dim: int | None) -> "ModelMeta":
    from mteb.models.model_meta import ModelMeta, ScoringFunction

    fields = {
        "name": name,
        "modalities": list(modalities),
        "embed_dim": dim,
        "similarity_fn_name": ScoringFunction.COSINE,
        "framework": ["PyTorch"],
    }
    return ModelMeta.create_empty(overwrites=fields)


def _unit(embeddings: Any) -> Embeddings:
    """Return vectors of length 1 as float32 [n, dim], also of tensors."""
    values: Embeddings = np.asarray(embeddings, np.float32)
    length = np.linalg.norm(values, axis=-1, keepdims=True)
    unit: Embeddings = values / np.maximum(length, np.finfo(np.float32).tiny)
    return unit
