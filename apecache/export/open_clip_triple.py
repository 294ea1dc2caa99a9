"""Give a run the face of an open_clip model: (model, preprocess, tokenizer)."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from apecache.arguments import AnyPath, as_place
from apecache.encoders.encoder import TextEncoder
from apecache.encoders.spec import EncoderSpec
from apecache.export.whole_model import WholeModel, open_whole_model
from apecache.runs.remote import fetched_run

PADDING = -1
"""Id of padding in the tokens that the tokenizer returns: no token of any vocabulary."""


class OpenClipModel(nn.Module):
    """Answer as open_clip's models do: `encode_image`, `encode_text`, `logit_scale`, forward."""

    def __init__(self, model: WholeModel) -> None:
        super().__init__()
        self.visual = model.image
        self.text = model.text
        self.pad_id = model.text.encoder.pad_id
        self.least_columns = model.text.encoder.length or 1
        self.logit_scale = nn.Parameter(torch.tensor(math.log(model.run.scale)))
        self.requires_grad_(False)

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Embed pixels [n, 3, height, width] as [n, dim].

        Embeddings have length 1 whatever `normalize` says: the head ends in the normalization.
        """
        del normalize
        encoder = self.visual.encoder
        embedded: Tensor = self.visual(encoder.move(image)).float()
        return embedded

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """Embed tokens [n, length] of the tokenizer as [n, dim], of length 1."""
        del normalize
        ids = text.to(self.text.encoder.device)
        mask = (ids != PADDING).long()
        # The tokenizer pads to the context; most of it would be computed for nothing.
        n_columns = max(self.least_columns, int(mask.sum(1).max()) if len(mask) else 0)
        ids = ids[:, :n_columns]
        mask = mask[:, :n_columns]
        embedded: Tensor = self.text(ids.masked_fill(mask == 0, self.pad_id), mask).float()
        return embedded

    def forward(
        self, image: Tensor | None = None, text: Tensor | None = None
    ) -> tuple[
        Tensor | None,
        Tensor | None,
        Tensor,
    ]:
        """Return image embeddings, text embeddings and the scale of the logits."""
        image_features = None if image is None else self.encode_image(image)
        text_features = None if text is None else self.encode_text(text)
        return image_features, text_features, self.logit_scale.exp()


class OpenClipTokenizer:
    """Turn texts into int64 [n, length] as open_clip's tokenizers do.

    Padding is -1: a pad id can be the id of a word, and the model needs to tell them apart.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self.encoder = encoder
        self.context_length = encoder.max_tokens

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Tokenize a text or several.

        Args:
            texts: the texts.
            context_length: not used: the encoder of the run sets its own.
        """
        del context_length
        listed = [texts] if isinstance(texts, str) else list(texts)
        ids, mask = self.encoder.pad(self.encoder.tokenize(listed).ids)
        tokens = ids.masked_fill(mask == 0, PADDING).cpu()
        # Batches of one size can be stacked by whoever tokenizes text by text.
        return F.pad(tokens, (0, self._width(tokens) - tokens.shape[1]), value=PADDING)

    def _width(self, tokens: Tensor) -> int:
        return max(self.context_length, tokens.shape[1])


OpenClipTriple = tuple[OpenClipModel, Callable[[Image.Image], Tensor], OpenClipTokenizer]


def open_clip_triple(
    run: AnyPath,
    image: EncoderSpec | None = None,
    text: EncoderSpec | None = None,
    device: str = "cpu",
) -> OpenClipTriple:
    """Open a run with any heads as `open_clip.create_model_and_transforms` opens a model.

    Args:
        run: folder of the run, or its URL on object storage.
        image: image encoder at its new place, if it has moved.
        text: text encoder at its new place, if it has moved.
        device: of encoders and heads.

    Returns:
        The model, the preprocessing of an RGB image, and the tokenizer.

    Raises:
        RunError: not a finished run.
        EncoderError: an encoder cannot be loaded.
        MismatchError: it is not the one that the run was trained on.
    """
    with fetched_run(as_place(run, "run")) as folder:
        model = open_whole_model(folder, image=image, text=text, device=device)
    encoder = model.image.encoder

    def preprocess(picture: Image.Image) -> Tensor:
        return encoder.preprocess(picture.convert("RGB"))

    return OpenClipModel(model).eval(), preprocess, OpenClipTokenizer(model.text.encoder)
