"""A sweep by actors: the trials, the best run and the files of a local sweep."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from pieces import sent
from recipes import SMALL

import apecache.cluster.sweep as engine
from apecache.cluster.pool import RaySpec
from apecache.errors import RecipeError
from apecache.store.reader import FeatureStore
from apecache.sweeps.run import SweepSpec, Trial, sweep
from apecache.sweeps.space import Space, load_space
from apecache.train.batches import SplitSpec
from apecache.train.head_data import FitSpec

if TYPE_CHECKING:
    from benchmarks.reliability.injection.cluster import Nodes

pytestmark = pytest.mark.usefixtures("one_thread")

SPLITS = ["train"] * 96 + ["dev"] * 24
CPU = FitSpec(splits=SplitSpec(dev="dev"), device="cpu")
SETTINGS = (
    '"optimizer.lr" = {log = [1e-5, 3e-2]}\n"schedule.epochs" = {choice = [9]}\n'
    '"image.kind" = {choice = ["linear", "mlp"]}\n"image.width" = {int = [8, 9]}\n'
)


@pytest.fixture(scope="module")
def store(write_store: Any, tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(len(SPLITS), 6))
    image, text = (
        hidden @ rng.normal(size=(6, dim)) + 0.3 * rng.normal(size=(len(SPLITS), dim))
        for dim in (12, 10)
    )
    features = image.astype(np.float32), text.astype(np.float32)
    made: FeatureStore = write_store(
        tmp_path_factory.mktemp("sweep") / "s",
        *features,
        range(len(SPLITS)),
        SPLITS,
    )
    return made


@pytest.fixture
def space(tmp_path: Path) -> Space:
    (tmp_path / "space.toml").write_text(SETTINGS)
    return load_space(tmp_path / "space.toml", (SMALL,))


class Backwards:
    """A pool in this process that does the last piece first, and each by a worker of its own. What
    goes to it and comes back is pickled, as by Ray."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def run(self, pieces: Iterable[Any]) -> Iterator[tuple[Any, Any]]:
        for piece in reversed(list(pieces)):
            make, same = sent((self.make, piece))
            yield piece, sent(make(1).do(same))


@pytest.fixture
def backwards(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def opened(make: Callable[[int], Any], spec: RaySpec) -> Iterator[Backwards]:
        yield Backwards(make)

    monkeypatch.setattr(engine, "open_pool", opened)


def results(out: Path) -> dict[str, bytes]:
    names = ("trials.jsonl", "sweep.json", "best/head.safetensors")
    return {name: (out / name).read_bytes() for name in names}


@pytest.mark.parametrize("halving", [False, True])
def test_actors_find_the_trials_of_a_local_sweep(
    halving: bool,
    store: FeatureStore,
    space: Space,
    tmp_path: Path,
    backwards: None,
) -> None:
    spec = SweepSpec(8, seeds=2, halving=halving, population=4, fit=CPU)
    told: list[Trial] = []
    here = sweep(store, space=space, out=tmp_path / "here", spec=spec)
    there = engine.sweep_on_ray(
        store,
        space=space,
        out=tmp_path / "there",
        spec=spec,
        progress=told.append,
    )
    assert results(tmp_path / "there") == results(tmp_path / "here")
    assert there.trials == here.trials
    assert sorted(trial.number for trial in told) == list(range(8))
    assert not (tmp_path / "there" / "work").exists()


def test_a_sweep_goes_on_with_either_engine(
    store: FeatureStore,
    space: Space,
    tmp_path: Path,
    backwards: None,
) -> None:
    spec = SweepSpec(8, population=4, fit=CPU)
    sweep(store, space=space, out=tmp_path / "here", spec=spec)
    sweep(store, space=space, out=tmp_path / "there", spec=replace(spec, n_trials=3))
    engine.sweep_on_ray(store, space=space, out=tmp_path / "there", spec=spec)
    assert (tmp_path / "there/trials.jsonl").read_bytes() == (
        tmp_path / "here/trials.jsonl"
    ).read_bytes()


def test_a_trial_that_makes_no_recipe_fails_as_it_does_here(
    store: FeatureStore,
    tmp_path: Path,
    backwards: None,
) -> None:
    (tmp_path / "space.toml").write_text('"image.kind" = {choice = ["transformer"]}\n')
    space = load_space(tmp_path / "space.toml", (SMALL,))
    with pytest.raises(RecipeError) as here:
        sweep(store, space=space, out=tmp_path / "here", spec=SweepSpec(2, fit=CPU))
    with pytest.raises(RecipeError) as there:
        engine.sweep_on_ray(store, space=space, out=tmp_path / "there", spec=SweepSpec(2, fit=CPU))
    assert str(there.value) == str(here.value)


@pytest.mark.slow
def test_a_sweep_on_a_real_cluster(
    long_run: bool,
    request: pytest.FixtureRequest,
    store: FeatureStore,
    space: Space,
    tmp_path: Path,
) -> None:
    if not long_run:
        pytest.skip("two actors that import torch: in the long run alone (APECACHE_FAULTS=long)")
    nodes: Nodes = request.getfixturevalue("nodes")
    spec = SweepSpec(6, population=2, fit=CPU)
    sweep(store, space=space, out=tmp_path / "here", spec=spec)
    engine.sweep_on_ray(
        store,
        space=space,
        out=tmp_path / "there",
        spec=spec,
        cluster=RaySpec(address=nodes.address, actors=2),
    )
    assert results(tmp_path / "there") == results(tmp_path / "here")
