"""apecache: an embedding cache and head trainer for image-text models.

Public names are resolved when they are first used, so that importing the package costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from apecache.data.pairs import Pair, PairSource
    from apecache.data.sources import open_pairs
    from apecache.data.spec import OpenSpec
    from apecache.encoders.spec import EncoderSpec, parse_encoder
    from apecache.encoders.towers import Tower, build_tower
    from apecache.engines.extraction import extract_on_ray
    from apecache.engines.ray import RaySpec
    from apecache.engines.sweep import sweep_on_ray
    from apecache.errors import ApecacheError
    from apecache.estimator import AlignmentHead
    from apecache.evaluate.benchmark_names import Benchmark, load_benchmark
    from apecache.evaluate.class_names import ClassNames, read_class_names
    from apecache.evaluate.comparison import MetricDifference, RunComparison, compare_runs
    from apecache.evaluate.embeddings import embed_store
    from apecache.evaluate.labelled import LabelledSpec
    from apecache.evaluate.probe import ProbeReport, probe
    from apecache.evaluate.prompts import find_templates
    from apecache.evaluate.retrieval import RetrievalReport, retrieval_report
    from apecache.evaluate.scout import ScoutReport, ScoutSpec, scout
    from apecache.evaluate.zeroshot import ZeroShotReport, ZeroShotSpec, zero_shot
    from apecache.extraction import ExtractReport, ExtractSpec, extract
    from apecache.heads.checkpoint import TrainedHeads, load_heads, save_heads
    from apecache.heads.combine import combine_heads
    from apecache.index import build_index, update_index
    from apecache.laws.law import Law, load_law
    from apecache.laws.run import LawsReport, run_laws
    from apecache.laws.setting import LawsSetting
    from apecache.parts import Part
    from apecache.planning import ExtractPlan, plan_extraction
    from apecache.recipes.counting import PlanSpec
    from apecache.recipes.plan import Plan
    from apecache.recipes.recipe import Recipe, load_recipe
    from apecache.recipes.runs import load_run
    from apecache.recipes.trained_encoders import TrainedEncoders, load_encoders
    from apecache.report.report_page import ReportSpec, report_page
    from apecache.report.serve import ServeSpec, serve
    from apecache.report.sweep_page import sweep_page
    from apecache.search import Query, SearchIndex
    from apecache.space import Space, load_space
    from apecache.store.array import FeatureArray
    from apecache.store.reader import FeatureStore
    from apecache.sweeping import SweepReport, SweepSpec, sweep
    from apecache.train.batches import SplitSpec
    from apecache.train.encoder_data import FitEncoderSpec
    from apecache.train.fit_encoder import FitEncoderReport, fit_encoder
    from apecache.train.fit_head import FitReport, FitSpec, fit_head
    from apecache.train.tracking import log_to_tensorboard
    from apecache.trained import ImageTextModel, load

_HOME = {
    "AlignmentHead": "estimator",
    "ApecacheError": "errors",
    "Benchmark": "evaluate.benchmark_names",
    "ClassNames": "evaluate.class_names",
    "EncoderSpec": "encoders.spec",
    "ExtractPlan": "planning",
    "ExtractReport": "extraction",
    "ExtractSpec": "extraction",
    "FeatureArray": "store.array",
    "FeatureStore": "store.reader",
    "FitEncoderReport": "train.fit_encoder",
    "FitEncoderSpec": "train.encoder_data",
    "FitReport": "train.fit_head",
    "FitSpec": "train.fit_head",
    "ImageTextModel": "trained",
    "LabelledSpec": "evaluate.labelled",
    "Law": "laws.law",
    "LawsReport": "laws.run",
    "LawsSetting": "laws.setting",
    "MetricDifference": "evaluate.comparison",
    "OpenSpec": "data.spec",
    "Pair": "data.pairs",
    "PairSource": "data.pairs",
    "Part": "parts",
    "Plan": "recipes.plan",
    "PlanSpec": "recipes.counting",
    "ProbeReport": "evaluate.probe",
    "Query": "search",
    "RaySpec": "engines.ray",
    "Recipe": "recipes.recipe",
    "ReportSpec": "report.report_page",
    "RetrievalReport": "evaluate.retrieval",
    "RunComparison": "evaluate.comparison",
    "ScoutReport": "evaluate.scout",
    "ScoutSpec": "evaluate.scout",
    "SearchIndex": "search",
    "ServeSpec": "report.serve",
    "Space": "space",
    "SplitSpec": "train.batches",
    "SweepReport": "sweeping",
    "SweepSpec": "sweeping",
    "Tower": "encoders.towers",
    "TrainedEncoders": "recipes.trained_encoders",
    "TrainedHeads": "heads.checkpoint",
    "ZeroShotReport": "evaluate.zeroshot",
    "ZeroShotSpec": "evaluate.zeroshot",
    "build_index": "index",
    "build_tower": "encoders.towers",
    "combine_heads": "heads.combine",
    "compare_runs": "evaluate.comparison",
    "embed_store": "evaluate.embeddings",
    "extract": "extraction",
    "extract_on_ray": "engines.extraction",
    "find_templates": "evaluate.prompts",
    "fit_encoder": "train.fit_encoder",
    "fit_head": "train.fit_head",
    "load": "trained",
    "load_benchmark": "evaluate.benchmark_names",
    "load_encoders": "recipes.trained_encoders",
    "load_heads": "heads.checkpoint",
    "load_law": "laws.law",
    "load_recipe": "recipes.recipe",
    "load_run": "recipes.runs",
    "load_space": "space",
    "log_to_tensorboard": "train.tracking",
    "open_pairs": "data.sources",
    "parse_encoder": "encoders.spec",
    "plan_extraction": "planning",
    "probe": "evaluate.probe",
    "read_class_names": "evaluate.class_names",
    "report_page": "report.report_page",
    "retrieval_report": "evaluate.retrieval",
    "run_laws": "laws.run",
    "save_heads": "heads.checkpoint",
    "scout": "evaluate.scout",
    "serve": "report.serve",
    "sweep": "sweeping",
    "sweep_on_ray": "engines.sweep",
    "sweep_page": "report.sweep_page",
    "update_index": "index",
    "zero_shot": "evaluate.zeroshot",
}

__all__ = [
    "AlignmentHead",
    "ApecacheError",
    "Benchmark",
    "ClassNames",
    "EncoderSpec",
    "ExtractPlan",
    "ExtractReport",
    "ExtractSpec",
    "FeatureArray",
    "FeatureStore",
    "FitEncoderReport",
    "FitEncoderSpec",
    "FitReport",
    "FitSpec",
    "ImageTextModel",
    "LabelledSpec",
    "Law",
    "LawsReport",
    "LawsSetting",
    "MetricDifference",
    "OpenSpec",
    "Pair",
    "PairSource",
    "Part",
    "Plan",
    "PlanSpec",
    "ProbeReport",
    "Query",
    "RaySpec",
    "Recipe",
    "ReportSpec",
    "RetrievalReport",
    "RunComparison",
    "ScoutReport",
    "ScoutSpec",
    "SearchIndex",
    "ServeSpec",
    "Space",
    "SplitSpec",
    "SweepReport",
    "SweepSpec",
    "Tower",
    "TrainedEncoders",
    "TrainedHeads",
    "ZeroShotReport",
    "ZeroShotSpec",
    "build_index",
    "build_tower",
    "combine_heads",
    "compare_runs",
    "embed_store",
    "extract",
    "extract_on_ray",
    "find_templates",
    "fit_encoder",
    "fit_head",
    "load",
    "load_benchmark",
    "load_encoders",
    "load_heads",
    "load_law",
    "load_recipe",
    "load_run",
    "load_space",
    "log_to_tensorboard",
    "open_pairs",
    "parse_encoder",
    "plan_extraction",
    "probe",
    "read_class_names",
    "report_page",
    "retrieval_report",
    "run_laws",
    "save_heads",
    "scout",
    "serve",
    "sweep",
    "sweep_on_ray",
    "sweep_page",
    "update_index",
    "zero_shot",
]


def __getattr__(name: str) -> object:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
