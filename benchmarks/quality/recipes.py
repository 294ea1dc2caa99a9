"""Every recipe of the four papers that trains within towers, on pairs of your own; and what the
cache saves.

    python -m benchmarks.quality.recipes --pairs captions.tsv --image timm:/folder --text hf:/folder --images 1000
    python -m benchmarks.quality.recipes --quick       # eight recipes, the drawings of the demo, tiny random encoders

First part: each recipe trains with its own optimizer, warm-up scaled to the smaller of 1,000 steps
and a tenth; its loss must fall, and its R@10 text to image on held-out pairs be above chance with
the whole of its 95 % interval. With --lr all train at that rate instead of their own, which are for
many thousands of steps. Second part: LiT, the last two blocks, and deep adapters with and without
the cache: the same losses, less time and memory, beside what `apecache plan` expects. Every run has
a process of its own, whose peak memory is counted above what it began with, libraries that it loads
included (CUDA: what torch allocated). Its cuts need towers of three blocks and more. With --work
rows that are done are kept: the same call goes on where it was broken off, and `--work DIR --table`
puts together what several calls measured, with other encoders or rates for some of the recipes.
"""

import argparse
import json
import multiprocessing
import resource
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apecache.data.images import load_image
from apecache.data.pairs import PairSource
from apecache.data.sources import open_pairs
from apecache.encoders.load import count_classes, shape_tower
from apecache.encoders.spec import EncoderSpec, parse_encoder
from apecache.errors import EncoderError, MismatchError, RecipeError
from apecache.evaluate.embeddings import embed_store, load_lengths
from apecache.extraction.run import ExtractSpec, extract
from apecache.metrics.protocols import retrieval_intervals
from apecache.metrics.retrieval import retrieval_report
from apecache.plan.counting import PlanSpec
from apecache.plan.counting_shared import TeacherSizes, count_teacher
from apecache.plan.devices import measure_device
from apecache.plan.plan import plan
from apecache.plan.step_timer import StepTimer
from apecache.recipes.recipe import Recipe, load_recipe, tower_zoo_names
from apecache.recipes.sections import shorthand_names
from apecache.runs.checkpoint import CHECKPOINT
from apecache.runs.folder import read_history
from apecache.runs.load import load_run
from apecache.store.reader import FeatureStore
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import fit_encoder
from apecache.train.fit_head import fit_head
from apecache.train.head_data import FitSpec
from benchmarks.record import Goal, print_goals, print_table, write_result

DRAWINGS = Path(__file__).parents[2] / "examples" / "drawings" / "pairs.tsv"
WITHOUT_GOAL = {"lilt-a"}
"""Trains the temperature alone, so its recall stays what it was."""
QUICK = (
    "lit",
    "lilt-d",
    "lilt-f",
    "lilt-h",
    "lilt-m",
    "freeze/Vuf-Tuu",
    "freeze/Vcf-Tcf",
    "shared-encoder",
)
LAST_BLOCKS = 'towers.rules=[{part = "image.blocks[-2:]"}, {part = "text.blocks[-2:]"}]'
CUTS = {"lit": ("lit",), "last 2 blocks": ("lilt-c", LAST_BLOCKS), "deep adapters": ("lilt-f",)}
PATTERNS = {
    "lilt-pattern-a": 'towers.rules=[{{part="image.norms[{}:]"}},{{part="text.norms[:{}]"}}]',
    "lilt-pattern-b": 'towers.rules=[{{part="image.norms[:{}]"}},{{part="text.norms[{}:]"}}]',
}
LOWER = "t2i R@10 from"
LAYERS = {"last 2 blocks": -3, "deep adapters": -1}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What all runs of one call have in common."""

    pairs: Path
    image: EncoderSpec
    text: EncoderSpec
    images: int
    epochs: int
    batch: int
    lr: float | None
    threads: int
    autocast: str
    work: Path
    teacher: EncoderSpec

    @property
    def steps(self) -> int:
        """Of an epoch: a tenth of the images, at most 500, are the dev split."""
        return max(1, (self.images - min(500, self.images // 10)) // self.batch)


@dataclass(frozen=True, kw_only=True)
class Job:
    setting: Setting
    case: str
    recipe: Recipe
    spec: FitEncoderSpec


def main() -> None:
    options = parse_arguments()
    if options.table:
        kept = [
            row_of(json.loads(path.read_text()))
            for path in sorted((options.work / "rows").glob("*.json"))
        ]
        report(
            [row for row in kept if "recipe" in row],
            [row for row in kept if "cut" in row],
            options,
        )
        return
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        image, text = quick_encoders(work) if options.quick else (options.image, options.text)
        seen = replace(parse_encoder(image, "image"), resolution=options.resolution)
        specs = seen, replace(parse_encoder(text, "text"), pooling="cls")
        numbers = (
            options.images,
            options.epochs,
            options.batch,
            options.lr,
            options.threads,
            options.autocast,
        )
        teacher = parse_encoder(options.teacher, "image") if options.teacher else specs[0]
        image_value, text_value = specs
        images, epochs, batch, lr, threads, autocast = numbers
        setting = Setting(
            pairs=options.pairs,
            image=image_value,
            text=text_value,
            images=images,
            epochs=epochs,
            batch=batch,
            lr=lr,
            threads=threads,
            autocast=autocast,
            work=work,
            teacher=teacher,
        )
        apart(prepare, setting)
        names = options.recipes or (QUICK if options.quick else recipe_names())
        jobs = [job_of(setting, name) for name in names]
        rows = [show(once(job, job.case, partial(apart, train, job))) for job in jobs]
        whole = replace(setting, autocast="float32")
        cases = {case: job_of(whole, *CUTS[case]) for case in CUTS} if options.cuts else {}
        cuts = [
            show(once(job, f"cut {case}", partial(compare, job, case)))
            for case, job in cases.items()
        ]
    report(rows, cuts, options)


def report(
    rows: list[dict[str, Any]],
    cuts: list[dict[str, Any]],
    options: argparse.Namespace,
) -> None:
    print_table([row for row in rows if "left out" not in row])
    if cuts:
        print_table(cuts)
    found = goals(rows, cuts, above_chance=not options.quick)
    print_goals(found)
    if options.json or not options.quick:
        write_result("quality-recipes", goals=found, rows=rows + cuts, path=options.json)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Every recipe that trains within towers, and what the cache saves."
    )
    parser.add_argument(
        "--pairs",
        type=Path,
        help="captions.tsv with columns image, caption, split (train, val)",
    )
    parser.add_argument("--image", help="ViT, for example timm:/folder")
    parser.add_argument("--text", help="BERT, for example hf:/folder")
    parser.add_argument(
        "--resolution",
        type=int,
        help="pixels of --image; default: the encoder's own",
    )
    parser.add_argument(
        "--teacher",
        help="supervised timm encoder for see-hear-read; default: --image, if it is one",
    )
    parser.add_argument(
        "--images",
        type=int,
        default=1000,
        help="so many training images, and at most as many of val",
    )
    parser.add_argument("--recipes", nargs="+", help="only these in the first part")
    parser.add_argument(
        "--cuts",
        action=argparse.BooleanOptionalAction,
        help="the second part; default: without --recipes",
    )
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, help="instead of each recipe's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--autocast",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of the first part",
    )
    parser.add_argument("--work", type=Path, help="folder to keep the store and the runs in")
    parser.add_argument(
        "--table",
        action="store_true",
        help="nothing is measured: what is in --work",
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.cuts = not options.recipes if options.cuts is None else options.cuts
    if options.table:
        if not options.work:
            parser.error("--table is of --work")
    elif options.quick:
        options.pairs = DRAWINGS
        options.images = 64
        options.epochs = 3
        options.batch = 16
        options.lr = 1e-3
    elif not (options.pairs and options.image and options.text):
        parser.error("--pairs, --image and --text are needed (or --quick)")
    return options


def recipe_names() -> list[str]:
    """Those of the papers, all freezing combinations, and one of CLS alone."""
    plain = [f"freeze/{name}" for name in shorthand_names() if "c" not in name]
    return [*(name for name in tower_zoo_names() if name != "freeze"), *plain, "freeze/Vcf-Tcf"]


def apart(run: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a call in a fresh process, which a server with everything imported has
    forked."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["apecache.train.fit_encoder", "apecache.plan.plan", "timm", "transformers"]
    )
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(run, *arguments).result()


def show(row: dict[str, Any]) -> dict[str, Any]:
    print(json.dumps(row), flush=True)
    return row


def once(job: Job, case: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The row that an earlier call with the same settings has left in the work folder, or a new
    one."""
    path = job.setting.work / "rows" / f"{plain(case)}.json"
    asked = {"setting": asdict(job.setting), "recipe": job.recipe.model_dump(mode="json")}
    about = json.loads(json.dumps(asked, default=str))
    if path.is_file() and (kept := json.loads(path.read_text()))["about"] == about:
        return row_of(kept)
    row = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"about": about, "row": row}))
    temporary.replace(path)
    return row_of({"about": about, "row": row})


def row_of(kept: dict[str, Any]) -> dict[str, Any]:
    """With what calls may differ in."""
    setting = kept["about"]["setting"]
    recipe = kept["about"]["recipe"]
    name = Path(setting["text"]["name"]).name
    return {
        **kept["row"],
        "text": name,
        "lr": recipe["optimizer"]["lr"],
        "epochs": setting["epochs"],
    }


def plain(case: str) -> str:
    return case.replace("/", "-").replace(" ", "-")


# --- what is trained on ---------------------------------------------------------------------------


def prepare(setting: Setting) -> None:
    """A store with all that the recipes read: pooled features, the teachers', and tokens for the
    cuts."""
    torch.set_num_threads(setting.threads)
    image = setting.image
    text = setting.text
    images = (
        image,
        replace(image, pooling="cls", layer=-1),
        *(tokens_of(image, layer) for layer in LAYERS.values()),
    )
    images += () if setting.teacher in images else (setting.teacher,)
    texts = (text, *(tokens_of(text, layer) for layer in LAYERS.values()))
    extract(source(setting), setting.work / "store", ExtractSpec(images, texts, add=True))


def tokens_of(spec: EncoderSpec, layer: int) -> EncoderSpec:
    return replace(spec, pooling="tokens", layer=layer)


def source(setting: Setting) -> PairSource:
    """The first so many images of train, and of val."""
    whole = open_pairs(setting.pairs)
    chosen = [
        [pair for pair in whole if pair.split == split][: setting.images]
        for split in ("train", "val")
    ]
    return replace(whole, pairs=tuple(chosen[0] + chosen[1]))


def quick_encoders(work: Path) -> tuple[str, str]:
    """Eight random blocks of width 64 each: a ViT at 32 px with 10 classes, and a BERT without
    dropout."""
    work.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    _quick_vit(work / "vit")
    _quick_bert(work / "bert")
    return f"timm:{work.resolve() / 'vit'}", f"hf:{work.resolve() / 'bert'}"


def _quick_vit(folder: Path) -> None:
    import timm
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    size = {"img_size": 32, "depth": 8}
    model = timm.create_model("test_vit", pretrained=False, num_classes=10, **size)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()},
        folder / "model.safetensors",
    )
    config: dict[str, Any] = {
        "input_size": [3, 32, 32],
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "crop_pct": 1.0,
    }
    config |= {
        "interpolation": "bicubic",
        "num_classes": 10,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    config |= {"fixed_input_size": True}
    about = {
        "architecture": "test_vit",
        "num_classes": 10,
        "model_args": size,
        "pretrained_cfg": config,
    }
    (folder / "config.json").write_text(json.dumps(about))


def _quick_bert(folder: Path) -> None:
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    words = sorted(
        {
            word
            for pair in open_pairs(DRAWINGS)
            for text in pair.captions
            for word in text.lower().split()
        }
    )
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys((*names.values(), *words)))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ends = [("[CLS]", 2), ("[SEP]", 3)]
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=ends,
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=32,
        **names,
    ).save_pretrained(folder)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 8,
        "num_attention_heads": 2,
        "intermediate_size": 128,
    }
    still = {
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "max_position_embeddings": 32,
    }
    config = BertConfig(vocab_size=len(vocabulary), **sizes, **still)
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)


# --- training -------------------------------------------------------------------------------------


def job_of(setting: Setting, name: str, *settings: str) -> Job:
    warmup = min(1000, max(1, setting.epochs * setting.steps // 10))
    short = [
        f"schedule.epochs={setting.epochs}",
        f"schedule.batch_size={setting.batch}",
        "schedule.warmup=0",
    ]
    short += [f"schedule.warmup_steps={warmup}", *settings]
    short += [f"optimizer.lr={setting.lr}"] if setting.lr else []
    if name in ("shared-encoder", "see-hear-read"):
        own = replace(setting.image, pooling="cls", layer=-1)
        teacher = setting.teacher if name == "see-hear-read" else own
        short.append(f"distillation.teacher={teacher.slug}")
    if name in PATTERNS:  # which are for twelve blocks
        halves = [shape_tower(spec).n_blocks // 2 for spec in (setting.image, setting.text)]
        short.append(PATTERNS[name].format(*halves))
    if (
        name == "shared-encoder"
    ):  # full after two steps: while a bank fills, there is ever more to tell apart
        short.append(f"distillation.bank={2 * setting.batch}")
    spec = FitEncoderSpec(
        image_features=setting.image.slug,
        text_features=setting.text.slug,
        autocast=setting.autocast,
    )
    return Job(setting=setting, case=name, recipe=load_recipe(name, short), spec=spec)


def train(job: Job) -> dict[str, Any]:
    """One run, measured on val; a recipe that does not suit the encoders says why."""
    try:
        return measured(job)
    except (EncoderError, RecipeError) as error:
        return {"recipe": job.case, "left out": str(error)}


def measured(job: Job) -> dict[str, Any]:
    run, history, seconds, peak = fit(job)
    media = source(job.setting).media
    store = FeatureStore.open(job.setting.work / "store")
    found = embed_store(
        load_run(run),
        store=store,
        split="val",
        open_image=lambda key: load_image(key, media).image,
    )
    report = retrieval_report(
        found.image,
        found.text,
        found.image_of_text,
        relevance=found.relevance,
    )
    losses = [line["loss"] for line in history if line["loss"] is not None]
    row = {"recipe": job.case, "trained": trained_share(job), "s/step": seconds, "peak MB": peak}
    row |= {"first loss": round(losses[0], 4), "last loss": round(losses[-1], 4)}
    for way, recalls in (("i2t", report.image_to_text), ("t2i", report.text_to_image)):
        row |= {f"{way} R@{k}": round(value, 2) for k, value in recalls.items()}
    chances = (("i2t", report.chance_image_to_text), ("t2i", report.chance_text_to_image))
    for way, recalls in chances:
        row |= {
            f"chance {way} R@{k}": round(value, 2)
            for k, value in recalls.items()
            if (way, k) != ("t2i", 10)
        }
    low, _ = retrieval_intervals(
        found.image,
        found.text,
        found.image_of_text,
        relevance=found.relevance,
    ).text_to_image[10]
    return row | {
        LOWER: round(low, 2),
        "chance": round(report.chance_text_to_image[10], 2),
        "images": report.n_images,
    }


def fit(job: Job) -> tuple[Path, list[dict[str, Any]], float, float]:
    """(run folder, history, seconds of a step, peak memory in MB); one that was broken off goes
    on."""
    torch.set_num_threads(job.setting.threads)
    out = job.setting.work / "runs" / plain(job.case)
    store = FeatureStore.open(job.setting.work / "store")
    media = source(job.setting).media
    before = used()
    try:
        report = fit_job(
            job,
            store=store,
            out=out,
            media=media,
            overwrite=not (out / CHECKPOINT).is_file(),
        )
    except MismatchError:  # of other settings
        report = fit_job(job, store=store, out=out, media=media, overwrite=True)
    history = list(read_history(out))
    step = step_seconds(history, report.ledger.evaluation_seconds, job.setting.steps)
    return out, history, step, round((used() - before) / 1e6, 1)


def step_seconds(history: list[dict[str, Any]], evaluation_seconds: float, steps: int) -> float:
    """Of the median epoch (the first one warms up), without its share of the evaluation on dev."""
    seconds = sorted(line["seconds"] for line in history if line["loss"] is not None)
    return round((float(seconds[len(seconds) // 2]) - evaluation_seconds / len(history)) / steps, 5)


def fit_job(job: Job, store: FeatureStore, out: Path, media: Any, overwrite: bool) -> Any:
    if job.recipe.trains_heads_alone:
        spec = FitSpec(job.spec.image_features, job.spec.text_features, overwrite=overwrite)
        return fit_head(store, recipe=job.recipe, out=out, spec=spec)
    spec = replace(job.spec, overwrite=overwrite)
    return fit_encoder(
        store,
        recipe=job.recipe,
        out=out,
        spec=spec,
        open_image=lambda key: load_image(key, media).image,
    )


def used() -> float:
    """Bytes: torch's peak on CUDA, else the process's."""
    if torch.cuda.is_available():
        return float(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def planned(job: Job, timed: bool = False) -> Any:
    """What `apecache plan` says; with `timed` what `--device here` says, by steps of its own."""
    torch.set_num_threads(job.setting.threads)
    towers = job.recipe.towers
    image = replace(job.setting.image, pooling=towers.image_pooling)
    text = replace(job.setting.text, pooling=towers.text_pooling)
    shapes = [partial(shape_tower, spec) for spec in (image, text)]
    spec = PlanSpec(rows=job.setting.images, tokens=batch_tokens(job.setting))
    taught = partial(teacher, job, spec)
    clock = (
        StepTimer(recipe=job.recipe, image=image, text=text, spec=spec, teacher=taught)
        if timed
        else None
    )
    return plan(job.recipe, *shapes, spec, measure_device(seconds=0.2), taught, clock)


def batch_tokens(setting: Setting) -> int:
    """Tokens that a caption costs: batches are padded to their longest one; the mean over some
    drawn at random."""
    store = FeatureStore.open(setting.work / "store")
    lengths = load_lengths(
        store.array("text", tokens_of(setting.text, LAYERS["deep adapters"]).slug)
    )
    assert lengths is not None
    drawn = torch.randint(
        len(lengths),
        (200, setting.batch),
        generator=torch.Generator().manual_seed(0),
    )
    return round(float(lengths[drawn].amax(1).double().mean()))


def clocked(job: Job) -> tuple[float, float]:
    """Seconds of a step that the planner expects here, with the cache and without."""
    said = planned(job, timed=True)
    return said.planned.step_seconds, said.without_cache.step_seconds


def teacher(job: Job, spec: PlanSpec) -> TeacherSizes:
    """The image encoder itself, or what is taught by a classifier, without its cost."""
    if job.recipe.distillation is not None and job.recipe.distillation.kind == "classes":
        return TeacherSizes(dim=count_classes(job.setting.teacher))
    return count_teacher(shape_tower(job.setting.image), spec)


def trained_share(job: Job) -> str:
    """Per cent of both towers, as far as they are run, and heads."""
    found = planned(job)
    return f"{100 * found.n_trained / found.n_parameters:.2f} %"


def compare(job: Job, case: str) -> dict[str, Any]:
    """With the cache and without, in one process each; the planner's clock runs before and
    after."""
    before = apart(clocked, job)
    found = [apart(fit, with_cache(job, case, cache)) for cache in (True, False)]
    expected = [(one + other) / 2 for one, other in zip(before, apart(clocked, job), strict=True)]
    losses = [
        [line["loss"] for line in history if line["loss"] is not None] for _, history, _, _ in found
    ]
    seconds = [step for _, _, step, _ in found]
    said = planned(job)
    return {
        "cut": case,
        "losses apart": max(abs(one - other) for one, other in zip(*losses, strict=True)),
        "s/step": seconds[0],
        "without": seconds[1],
        "times as fast": round(seconds[1] / seconds[0], 2),
        "planned s/step": round(expected[0], 5),
        "planned without": round(expected[1], 5),
        "peak MB": found[0][3],
        "without, MB": found[1][3],
        "planned MB": round(said.planned.peak_bytes / 1e6, 1),
        "planned without, MB": round(said.without_cache.peak_bytes / 1e6, 1),
    }


def with_cache(job: Job, case: str, cache: bool) -> Job:
    """The job that reads the tokens of its cut; without the cache the same encoders run from the
    inputs."""
    layer = LAYERS.get(case)
    spec = replace(job.spec, cache=cache)
    if layer is not None:
        image, text = (tokens_of(one, layer).slug for one in (job.setting.image, job.setting.text))
        spec = replace(spec, image_features=image, text_features=text)
    return replace(job, case=f"{case} {'cached' if cache else 'whole'}", spec=spec)


def goals(rows: list[dict[str, Any]], cuts: list[dict[str, Any]], above_chance: bool) -> list[Goal]:
    """`above_chance` False: nothing is asked of held-out pairs, as after a few steps from random
    encoders."""
    asked = [row for row in rows if row["recipe"] not in WITHOUT_GOAL]
    done = [row for row in asked if "left out" not in row]
    falling = sum(row["last loss"] < row["first loss"] for row in done)
    above = sum(row[LOWER] > row["chance"] for row in done)
    found = [
        Goal(name="recipes whose loss falls", value=falling, target=len(asked), better="higher")
    ]
    if above_chance:
        found.append(
            Goal(
                name="recipes with R@10 above chance on val",
                value=above,
                target=len(asked),
                better="higher",
            )
        )
    for row in cuts:
        found.append(
            Goal(
                name=f"{row['cut']}: losses with and without the cache apart",
                value=row["losses apart"],
                target=0.01,
                better="lower",
            )
        )
        found.append(
            Goal(
                name=f"{row['cut']}: times as fast with the cache",
                value=row["times as fast"],
                target=1.0,
                better="higher",
            )
        )
        for name in ("s/step", "without"):
            off = abs(row[f"planned {name}"] / row[name] - 1)
            found.append(
                Goal(
                    name=f"{row['cut']}, {name}: plan and measurement apart",
                    value=round(off, 3),
                    target=0.25,
                    better="lower",
                )
            )
    return found


if __name__ == "__main__":
    main()
