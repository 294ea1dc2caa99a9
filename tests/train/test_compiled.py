"""Compiled towers train like eager ones: dropout, adapters, slices and checkpointing included.

Most tests need no C++ compiler: torch traces the towers and their gradients as for a compiler, and
runs what it has traced operation by operation.
"""

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_towers import pictures, small_bert, small_vit
from tiny import extract_tiny, make_shapes
from torch._dynamo.utils import counters

from apecache.encoders.encoder import BUCKETS
from apecache.encoders.sample_draws import SampleDraws
from apecache.errors import EncoderError, OptionError
from apecache.models.dual_encoder import build_around
from apecache.recipes.recipe import Recipe, load_recipe
from apecache.runs.checkpoint import save_checkpoint
from apecache.runs.encoders import DESCRIPTION, WEIGHTS, read_tensors
from apecache.runs.folder import HISTORY
from apecache.store.reader import FeatureStore
from apecache.train.batches import SplitSpec
from apecache.train.compiled import compiled_outputs
from apecache.train.encoder_data import FitEncoderSpec
from apecache.train.fit_encoder import FitEncoderReport, fit_encoder
from apecache.train.live import TokenInputs

pytestmark = pytest.mark.usefixtures("one_thread")
needs_compiler = pytest.mark.skipif(
    shutil.which("c++") is None,
    reason="torch.compile needs a C++ compiler here",
)
Data = tuple[FeatureStore, Callable[[str], Image.Image]]


@pytest.fixture(scope="module")
def data(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_image_encoder: Path,
    tiny_text_encoder: Path,
) -> Data:
    """24 images with two captions each, and their store."""
    folder = tmp_path_factory.mktemp("compiled-data")
    table = make_shapes(folder / "shapes", copies=2)
    extract_tiny(table, store=folder / "store", image=tiny_image_encoder, text=tiny_text_encoder)
    return FeatureStore.open(folder / "store"), lambda key: Image.open(table.parent / key).convert(
        "RGB"
    )


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without a compiler."""
    real = torch.compile

    def compiled(run: Any, dynamic: bool | None = None, options: Any = None) -> Any:
        # Without it a cache of another processor gives NaN.
        assert set(options) == {"cpp.simdlen"}
        return real(run, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", compiled)
    torch._dynamo.reset()
    counters.clear()


def recipe_of(name: str, *settings: str) -> Recipe:
    short = [
        "schedule.epochs=3",
        "schedule.batch_size=8",
        "schedule.warmup=0",
        "schedule.warmup_steps=0",
        "optimizer.lr=1e-3",
        # Rounding of small gradients is not amplified.
        "optimizer.eps=1e-3",
        "towers.text_pooling=default",
    ]
    return load_recipe(name, [*short, *settings])


def fit(data: Data, recipe: Recipe, out: Path, **settings: Any) -> FitEncoderReport:
    store, open_image = data
    spec = FitEncoderSpec(splits=SplitSpec(dev="val"), device="cpu", **settings)
    return fit_encoder(store, recipe=recipe, out=out, spec=spec, open_image=open_image)


def require_close(one: Path, other: Path, atol: float = 1e-5) -> None:
    """Weights and losses agree up to rounding."""
    ours = read_tensors(one / WEIGHTS)[0]
    theirs = read_tensors(other / WEIGHTS)[0]
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-3, atol=atol)
    losses = []
    for run in (one, other):
        lines = [json.loads(line) for line in (run / HISTORY).read_text().splitlines()]
        losses.append([line["loss"] for line in lines[1:]])
    assert losses[0] == pytest.approx(losses[1], rel=max(1e-4, atol))


LORA = [
    'towers.rules=[{part = "text.adapters"}]',
    "towers.text_adapter.kind=lora",
    "towers.text_adapter.rank=2",
    "towers.text_adapter.dropout=0.2",
]
CASES = {
    "text tower with dropout": ("lit", [], None),
    "slices": ("lit", [], 3),
    "both towers": ("clip", [], None),
    "layerwise adapters": ("lilt-i", [], None),
    "lora": ("lilt-c", LORA, 3),
    "captions, accumulated": ("lit", ["loss.captions=2", "schedule.accumulate=2"], None),
}
MOST_GRAPHS = 6
"""Of one tower with slices: two sizes of slices, each with and without gradients, and two lengths
of texts. Six steps of three slices would be 36."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "slices" else pytest.mark.slow) for name in CASES],
)
def test_a_compiled_fit_ends_where_an_eager_one_ends(
    name: str,
    data: Data,
    tmp_path: Path,
    traced: None,
) -> None:
    recipe_name, settings, slice_size = CASES[name]
    recipe = recipe_of(recipe_name, *settings)
    report = fit(data, recipe, tmp_path / "eager", slice_size=slice_size)
    assert not counters["stats"]
    compiled = fit(data, recipe, tmp_path / "compiled", slice_size=slice_size, compile=True)
    require_close(tmp_path / "compiled", tmp_path / "eager")
    # The first step is eager, so that its operations are counted; texts are padded to buckets.
    assert compiled.ledger.step_flops >= report.ledger.step_flops > 0
    # Shapes and modes are compiled, and not steps, slices or seeds of masks.
    assert 1 <= counters["stats"]["unique_graphs"] <= MOST_GRAPHS
    description = json.loads((tmp_path / "compiled" / DESCRIPTION).read_text())
    assert description["used"]["compile"]


@pytest.mark.slow
def test_mixed_precision_is_compiled_too(data: Data, tmp_path: Path, traced: None) -> None:
    recipe = recipe_of("lit", "schedule.epochs=2")
    for name, is_compiled in (("eager", False), ("compiled", True)):
        fit(data, recipe, tmp_path / name, autocast="bfloat16", compile=is_compiled)
    assert counters["stats"]["unique_graphs"]
    # Longer batches of texts are summed in another order, in bfloat16.
    require_close(tmp_path / "compiled", tmp_path / "eager", atol=1e-3)


@pytest.mark.slow
def test_both_sides_of_a_shared_encoder_are_compiled(traced: None) -> None:
    blocks = ["shared.image_blocks=2", "shared.text_blocks=1"]
    recipe = load_recipe("shared-encoder", blocks).model_copy(update={"distillation": None})
    model = build_around(
        [small_vit(), small_bert(num_hidden_layers=1)],
        recipe=recipe,
        dims=(16, 16),
        device=torch.device("cpu"),
    ).train()
    ids = torch.randint(5, 60, (4, 6), generator=torch.Generator().manual_seed(0))
    sides = ((model.image, (pictures(4),)), (model.text, (ids, torch.ones_like(ids))))
    for number, (side, inputs) in enumerate(sides, 1):
        gradients = []
        for outputs in (side.outputs, compiled_outputs(side)):
            model.zero_grad()
            with SampleDraws(7, range(4)):
                outputs(*inputs).square().sum().backward()
            gradients.append([p.grad for p in model.parameters() if p.grad is not None])
        assert counters["stats"]["unique_graphs"] == number
        torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_fit_may_be_resumed_with_and_without_compilation(
    data: Data,
    tmp_path: Path,
    traced: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class StoppedError(Exception):
        pass

    def save(*arguments: Any) -> None:
        save_checkpoint(*arguments)
        saved.append(True)
        if len(saved) in (2, 4):
            raise StoppedError

    saved: list[bool] = []
    recipe = recipe_of("lit")
    fit(data, recipe, tmp_path / "eager")
    with monkeypatch.context() as patch:
        patch.setattr("apecache.train.session.save_checkpoint", save)
        for is_compiled in (False, True):
            with suppress(StoppedError):
                fit(data, recipe, tmp_path / "mixed", save_seconds=0, compile=is_compiled)
    assert len(saved) == 4
    assert counters["stats"]["unique_graphs"]
    assert fit(data, recipe, tmp_path / "mixed").resumed_step > 0
    require_close(tmp_path / "mixed", tmp_path / "eager")


def test_without_a_compiler_nothing_is_begun(
    data: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def none(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", none)
    with pytest.raises(EncoderError, match="leave --compile out"):
        fit(data, recipe_of("lit"), tmp_path / "run", compile=True)
    assert not (tmp_path / "run").exists()


def test_checkpointed_blocks_are_not_compiled(data: Data, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="do not go together"):
        fit(data, recipe_of("lit", "towers.checkpointing=true"), tmp_path / "run", compile=True)


def test_batches_of_texts_have_one_of_a_few_lengths() -> None:
    lengths = torch.tensor([3, 9, 13, 2])
    tokens = TokenInputs(
        features=torch.zeros(4, 14, 2),
        n_valid=lengths,
        device=torch.device("cpu"),
        in_buckets=True,
    )
    for rows, expected in (([0, 3], BUCKETS[0]), ([1], BUCKETS[1]), ([2, 0], 14)):
        features, mask = tokens.take(rows)
        assert mask is not None
        assert features.shape[1] == mask.shape[1] == expected
        assert mask.sum(1).tolist() == lengths[rows].tolist()


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of the compiler's own
def test_the_compiler_of_this_machine_trains_to_the_same_weights(
    data: Data,
    tmp_path: Path,
) -> None:
    torch._dynamo.reset()
    # The second step is the first one that is compiled.
    recipe = recipe_of("lit", "schedule.steps=2")
    fit(data, recipe, tmp_path / "eager")
    fit(data, recipe, tmp_path / "compiled", compile=True)
    require_close(tmp_path / "compiled", tmp_path / "eager")
