"""apecache: an embedding cache and head trainer for image-text models.

Public names are resolved when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apecache.data.pairs import Pair, PairSource
    from apecache.data.tables import TableSpec, read_pairs
    from apecache.encoders.spec import EncoderSpec, parse_encoder
    from apecache.errors import ApecacheError
    from apecache.evaluate.embeddings import embed_store
    from apecache.evaluate.retrieval import RetrievalReport, retrieval_report
    from apecache.evaluate.zeroshot import ZeroShotReport, ZeroShotSpec, zero_shot
    from apecache.extraction import ExtractReport, ExtractSpec, extract
    from apecache.heads.checkpoint import TrainedHeads, load_heads, save_heads
    from apecache.heads.combine import combine_heads
    from apecache.index import SearchIndex, build_index
    from apecache.recipes.recipe import Recipe, load_recipe
    from apecache.store.reader import FeatureArray, FeatureStore
    from apecache.train.batches import SplitSpec
    from apecache.train.fit_head import FitReport, FitSpec, fit_head

_HOME = {
    "ApecacheError": "errors",
    "EncoderSpec": "encoders.spec",
    "ExtractReport": "extraction",
    "ExtractSpec": "extraction",
    "FeatureArray": "store.reader",
    "FeatureStore": "store.reader",
    "FitReport": "train.fit_head",
    "FitSpec": "train.fit_head",
    "Pair": "data.pairs",
    "PairSource": "data.pairs",
    "Recipe": "recipes.recipe",
    "RetrievalReport": "evaluate.retrieval",
    "SearchIndex": "index",
    "SplitSpec": "train.batches",
    "TableSpec": "data.tables",
    "TrainedHeads": "heads.checkpoint",
    "ZeroShotReport": "evaluate.zeroshot",
    "ZeroShotSpec": "evaluate.zeroshot",
    "build_index": "index",
    "combine_heads": "heads.combine",
    "embed_store": "evaluate.embeddings",
    "extract": "extraction",
    "fit_head": "train.fit_head",
    "load_heads": "heads.checkpoint",
    "load_recipe": "recipes.recipe",
    "parse_encoder": "encoders.spec",
    "read_pairs": "data.tables",
    "retrieval_report": "evaluate.retrieval",
    "save_heads": "heads.checkpoint",
    "zero_shot": "evaluate.zeroshot",
}

__all__ = [
    "ApecacheError",
    "EncoderSpec",
    "ExtractReport",
    "ExtractSpec",
    "FeatureArray",
    "FeatureStore",
    "FitReport",
    "FitSpec",
    "Pair",
    "PairSource",
    "Recipe",
    "RetrievalReport",
    "SearchIndex",
    "SplitSpec",
    "TableSpec",
    "TrainedHeads",
    "ZeroShotReport",
    "ZeroShotSpec",
    "build_index",
    "combine_heads",
    "embed_store",
    "extract",
    "fit_head",
    "load_heads",
    "load_recipe",
    "parse_encoder",
    "read_pairs",
    "retrieval_report",
    "save_heads",
    "zero_shot",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
