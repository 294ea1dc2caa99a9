from .auto.curate import CurateReport as CurateReport
from .auto.curate import CurateSpec as CurateSpec
from .auto.curate import curate as curate
from .auto.forecast import ForecastReport as ForecastReport
from .auto.forecast import ForecastSpec as ForecastSpec
from .auto.forecast import forecast as forecast
from .auto.ladder import AutoReport as AutoReport
from .auto.ladder import AutoSpec as AutoSpec
from .auto.ladder import auto_heads as auto_heads
from .cluster.extract import extract_on_ray as extract_on_ray
from .cluster.pool import RaySpec as RaySpec
from .cluster.sweep import sweep_on_ray as sweep_on_ray
from .data.pairs import Pair as Pair
from .data.pairs import PairSource as PairSource
from .data.sources import open_pairs as open_pairs
from .data.spec import OpenSpec as OpenSpec
from .encoders.packaged import write_packaged_encoders as write_packaged_encoders
from .encoders.spec import EncoderSpec as EncoderSpec
from .encoders.spec import parse_encoder as parse_encoder
from .encoders.tower import Tower as Tower
from .encoders.tower import build_tower as build_tower
from .errors import ApecacheError as ApecacheError
from .evaluate.analysis import ShiftReport as ShiftReport
from .evaluate.analysis import layernorm_shift as layernorm_shift
from .evaluate.benchmark_names import Benchmark as Benchmark
from .evaluate.benchmark_names import load_benchmark as load_benchmark
from .evaluate.class_names import ClassNames as ClassNames
from .evaluate.class_names import read_class_names as read_class_names
from .evaluate.comparison import MetricDifference as MetricDifference
from .evaluate.comparison import RunComparison as RunComparison
from .evaluate.comparison import compare_runs as compare_runs
from .evaluate.embeddings import embed_store as embed_store
from .evaluate.labeled import LabeledSpec as LabeledSpec
from .evaluate.probe import ProbeReport as ProbeReport
from .evaluate.probe import probe as probe
from .evaluate.prompts import find_templates as find_templates
from .evaluate.scout import ScoutReport as ScoutReport
from .evaluate.scout import ScoutSpec as ScoutSpec
from .evaluate.scout import scout as scout
from .evaluate.zeroshot import ZeroShotReport as ZeroShotReport
from .evaluate.zeroshot import ZeroShotSpec as ZeroShotSpec
from .evaluate.zeroshot import zero_shot as zero_shot
from .export.benchmark_suite import SuiteSpec as SuiteSpec
from .export.benchmark_suite import run_suite as run_suite
from .export.embeddings import EmbeddingsReport as EmbeddingsReport
from .export.embeddings import export_embeddings as export_embeddings
from .export.export_run import ExportRunReport as ExportRunReport
from .export.export_run import ExportRunSpec as ExportRunSpec
from .export.export_run import export_run as export_run
from .export.hub import push_to_hub as push_to_hub
from .export.mteb_model import mteb_model as mteb_model
from .export.open_clip_triple import open_clip_triple as open_clip_triple
from .export.suite_report import SuiteReport as SuiteReport
from .extraction.additions import add_images as add_images
from .extraction.additions import delete_images as delete_images
from .extraction.estimate import ExtractPlan as ExtractPlan
from .extraction.estimate import plan_extraction as plan_extraction
from .extraction.repair import RepairReport as RepairReport
from .extraction.repair import repair as repair
from .extraction.run import ExtractReport as ExtractReport
from .extraction.run import ExtractSpec as ExtractSpec
from .extraction.run import extract as extract
from .extraction.shard_range import ShardRange as ShardRange
from .heads.registered import register_head as register_head
from .losses.registered import register_loss as register_loss
from .metrics.retrieval import RetrievalReport as RetrievalReport
from .metrics.retrieval import retrieval_report as retrieval_report
from .plan.counting import PlanSpec as PlanSpec
from .plan.environment import EnvironmentReport as EnvironmentReport
from .plan.environment import describe_environment as describe_environment
from .plan.plan import Plan as Plan
from .plan.plan_recipe import plan_recipe as plan_recipe
from .progress import progress_bar as progress_bar
from .recipes.recipe import Recipe as Recipe
from .recipes.recipe import load_recipe as load_recipe
from .recipes.recipe import recipe_names as recipe_names
from .report.auto_page import write_auto_page as write_auto_page
from .report.auto_page import write_forecast_page as write_forecast_page
from .report.curate_page import write_curate_page as write_curate_page
from .report.report_page import ReportSpec as ReportSpec
from .report.report_page import report_page as report_page
from .report.serve import ServeSpec as ServeSpec
from .report.serve import serve as serve
from .report.sweep_page import sweep_page as sweep_page
from .runs.bundle import BundleReport as BundleReport
from .runs.bundle import write_bundle as write_bundle
from .runs.encoders import TrainedEncoders as TrainedEncoders
from .runs.encoders import load_encoders as load_encoders
from .runs.ensemble import ensemble_heads as ensemble_heads
from .runs.folder import read_history as read_history
from .runs.heads import TrainedHeads as TrainedHeads
from .runs.heads import load_heads as load_heads
from .runs.heads import save_heads as save_heads
from .runs.load import load_run as load_run
from .runs.model import ImageTextModel as ImageTextModel
from .runs.model import load as load
from .search.index import build_index as build_index
from .search.index import update_index as update_index
from .search.query import Query as Query
from .search.query import SearchIndex as SearchIndex
from .store.array import FeatureArray as FeatureArray
from .store.compact import CompactReport as CompactReport
from .store.compact import compact_store as compact_store
from .store.copy import copy_store as copy_store
from .store.export import export_npz as export_npz
from .store.export import export_parquet as export_parquet
from .store.import_features import ImportReport as ImportReport
from .store.import_features import import_features as import_features
from .store.import_spec import FeatureInput as FeatureInput
from .store.import_spec import ImportSpec as ImportSpec
from .store.manage import RemovalReport as RemovalReport
from .store.manage import list_views as list_views
from .store.manage import remove_features as remove_features
from .store.manage import remove_views as remove_views
from .store.manage import rename_view as rename_view
from .store.reader import FeatureStore as FeatureStore
from .store.upgrade import upgrade_store as upgrade_store
from .store.verify import VerifyReport as VerifyReport
from .store.verify import verify_store as verify_store
from .store.view_edits import split_store as split_store
from .store.views import ViewRecord as ViewRecord
from .sweeps.run import SweepReport as SweepReport
from .sweeps.run import SweepSpec as SweepSpec
from .sweeps.run import sweep as sweep
from .sweeps.space import Space as Space
from .sweeps.space import load_space as load_space
from .train.batches import SplitSpec as SplitSpec
from .train.encoder_data import FitEncoderSpec as FitEncoderSpec
from .train.estimator import AlignmentHead as AlignmentHead
from .train.fit_encoder import FitEncoderReport as FitEncoderReport
from .train.fit_encoder import fit_encoder as fit_encoder
from .train.fit_head import FitReport as FitReport
from .train.fit_head import fit_head as fit_head
from .train.head_data import FitSpec as FitSpec
from .train.lint.encoders import lint_encoder_plan as lint_encoder_plan
from .train.lint.encoders import lint_encoder_run as lint_encoder_run
from .train.lint.findings import Finding as Finding
from .train.lint.heads import lint_plan as lint_plan
from .train.lint.heads import lint_run as lint_run
from .train.pair_dataset import PairDataset as PairDataset
from .train.tracking import log_to_tensorboard as log_to_tensorboard

__all__ = [
    "AlignmentHead",
    "ApecacheError",
    "AutoReport",
    "AutoSpec",
    "Benchmark",
    "BundleReport",
    "ClassNames",
    "CompactReport",
    "CurateReport",
    "CurateSpec",
    "EmbeddingsReport",
    "EncoderSpec",
    "EnvironmentReport",
    "ExportRunReport",
    "ExportRunSpec",
    "ExtractPlan",
    "ExtractReport",
    "ExtractSpec",
    "FeatureArray",
    "FeatureInput",
    "FeatureStore",
    "Finding",
    "FitEncoderReport",
    "FitEncoderSpec",
    "FitReport",
    "FitSpec",
    "ForecastReport",
    "ForecastSpec",
    "ImageTextModel",
    "ImportReport",
    "ImportSpec",
    "LabeledSpec",
    "MetricDifference",
    "OpenSpec",
    "Pair",
    "PairDataset",
    "PairSource",
    "Plan",
    "PlanSpec",
    "ProbeReport",
    "Query",
    "RaySpec",
    "Recipe",
    "RemovalReport",
    "RepairReport",
    "ReportSpec",
    "RetrievalReport",
    "RunComparison",
    "ScoutReport",
    "ScoutSpec",
    "SearchIndex",
    "ServeSpec",
    "ShardRange",
    "ShiftReport",
    "Space",
    "SplitSpec",
    "SuiteReport",
    "SuiteSpec",
    "SweepReport",
    "SweepSpec",
    "Tower",
    "TrainedEncoders",
    "TrainedHeads",
    "VerifyReport",
    "ViewRecord",
    "ZeroShotReport",
    "ZeroShotSpec",
    "add_images",
    "auto_heads",
    "build_index",
    "build_tower",
    "compact_store",
    "compare_runs",
    "copy_store",
    "curate",
    "delete_images",
    "describe_environment",
    "embed_store",
    "ensemble_heads",
    "export_embeddings",
    "export_npz",
    "export_parquet",
    "export_run",
    "extract",
    "extract_on_ray",
    "find_templates",
    "fit_encoder",
    "fit_head",
    "forecast",
    "import_features",
    "layernorm_shift",
    "lint_encoder_plan",
    "lint_encoder_run",
    "lint_plan",
    "lint_run",
    "list_views",
    "load",
    "load_benchmark",
    "load_encoders",
    "load_heads",
    "load_recipe",
    "load_run",
    "load_space",
    "log_to_tensorboard",
    "mteb_model",
    "open_clip_triple",
    "open_pairs",
    "parse_encoder",
    "plan_extraction",
    "plan_recipe",
    "probe",
    "progress_bar",
    "push_to_hub",
    "read_class_names",
    "read_history",
    "recipe_names",
    "register_head",
    "register_loss",
    "remove_features",
    "remove_views",
    "rename_view",
    "repair",
    "report_page",
    "retrieval_report",
    "run_suite",
    "save_heads",
    "scout",
    "serve",
    "split_store",
    "sweep",
    "sweep_on_ray",
    "sweep_page",
    "update_index",
    "upgrade_store",
    "verify_store",
    "write_auto_page",
    "write_bundle",
    "write_curate_page",
    "write_forecast_page",
    "write_packaged_encoders",
    "zero_shot",
]
