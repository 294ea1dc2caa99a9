"""Today's ways of extracting features, as tutorials write them: what apecache is measured
beside."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

BATCH = 32


class Pictures(Dataset[Tensor]):
    def __init__(self, paths: Sequence[Path], transform: Callable[[Image.Image], Tensor]) -> None:
        self.paths = paths
        self.transform = transform

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> Tensor:
        return self.transform(Image.open(self.paths[row]).convert("RGB"))


def timm_loop(folder: Path, workers: int) -> Callable[[Sequence[Path]], Tensor]:
    """timm's README and the DataLoader's: one model, its own transform, batches, no gradients."""
    import timm

    model = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    transform = timm.data.create_transform(
        **timm.data.resolve_model_data_config(model),
        is_training=False,
    )

    def features(paths: Sequence[Path]) -> Tensor:
        loader = DataLoader(Pictures(paths, transform), BATCH, num_workers=workers)
        with torch.inference_mode():
            return torch.cat([model(batch) for batch in loader])

    return features


def transformers_loop(folder: Path, pad_to: int | None) -> Callable[[Sequence[str]], Tensor]:
    """Mean pooling as in the model's card; batches as they come, padded to the longest or, like
    CLIP's, to a length."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()
    padding: dict[str, Any] = (
        {"padding": "max_length", "max_length": pad_to} if pad_to else {"padding": True}
    )

    def features(texts: Sequence[str]) -> Tensor:
        parts = []
        for batch in DataLoader(list(texts), BATCH):  # type: ignore[arg-type]
            inputs = tokenizer(batch, truncation=True, return_tensors="pt", **padding)
            with torch.inference_mode():
                hidden = model(**inputs).last_hidden_state
            mask = inputs["attention_mask"][..., None].to(hidden.dtype)
            parts.append((hidden * mask).sum(1) / mask.sum(1))
        return torch.cat(parts)

    return features


def sentence_transformers_encode(folder: Path) -> Callable[[Sequence[str]], Tensor]:
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    words = Transformer(str(folder))
    model = SentenceTransformer(
        modules=[words, Pooling(words.get_embedding_dimension(), "mean")],
        device="cpu",
    )

    def features(texts: Sequence[str]) -> Tensor:
        return torch.from_numpy(
            model.encode(list(texts), batch_size=BATCH, show_progress_bar=False)
        )

    return features
