"""Sweep on a Ray cluster: populations of heads train in actors, the driver plans, ranks and writes.

Every actor reads the features from the store once. Checkpoints of populations and rungs lie in the
sweep's folder, so every node must reach this folder and the store under the same path. If an actor
dies, another resumes its population from the last checkpoint. With as many threads as a local sweep
the results are the same.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from apecache.arguments import AnyPath, as_path, require_spec, require_type
from apecache.cluster.pool import ActorPool, RaySpec, open_pool
from apecache.storage.bucket import is_object_url
from apecache.store.reader import FeatureStore
from apecache.sweeps.data import SweepData
from apecache.sweeps.halving import FitGroup, FitKey, Results, SweepSpec, TrialBatch
from apecache.sweeps.run import SweepReport, sweep
from apecache.sweeps.space import Space
from apecache.sweeps.trials import Trial
from apecache.train.fit import HeadFit


def sweep_on_ray(
    store: FeatureStore,
    space: Space,
    out: AnyPath,
    spec: SweepSpec | None = None,
    progress: Callable[[Trial], None] = lambda _: None,
    cluster: RaySpec | None = None,
) -> SweepReport:
    """Sweep as `sweep` does, with the populations in the actors of a Ray cluster.

    The driver fits the best trial.

    Raises:
        EngineError: as `open_pool`.
        MissingExtraError: as `open_pool`.

    All errors of `sweep` are raised too.
    """
    require_type(store, FeatureStore, "store")
    require_type(space, Space, "space")
    require_spec(spec, SweepSpec, "spec", optional=True)
    out = as_path(out, "out")
    spec = spec or SweepSpec()
    # Absolute: an actor whose node lacks the driver's folder runs in another one.
    store_path = store.path if is_object_url(store.path) else Path(os.path.abspath(store.path))
    out_path = Path(os.path.abspath(out))
    # Named: another view may become the newest one while the sweep runs.
    view = None if store.view is None else store.view.record.view
    make_worker = partial(
        _Populations,
        store=store_path,
        view=view,
        space=space,
        out=out_path,
        spec=spec,
    )
    ray_spec = (cluster or RaySpec()).for_device(spec.fit.device)
    with open_pool(make_worker, ray_spec) as pool:
        return sweep(
            store,
            space=space,
            out=out,
            spec=spec,
            progress=progress,
            make_trial_batch=partial(_ClusterTrialBatch, pool),
        )


class _ClusterTrialBatch(TrialBatch):
    """Hand the groups of a batch of trials to a pool."""

    def __init__(
        self,
        pool: ActorPool,
        out: Path,
        spec: SweepSpec,
        space: Space,
        data: SweepData,
        trials: dict[int, Trial],
        progress: Callable[[Trial], None],
    ) -> None:
        super().__init__(
            out,
            spec=spec,
            space=space,
            data=data,
            trials=trials,
            progress=progress,
        )
        self.pool = pool

    def train_groups(
        self,
        groups: Sequence[FitGroup],
        members: Mapping[FitKey, HeadFit],
    ) -> Iterator[tuple[FitGroup, Results]]:
        return self.pool.run(groups)


class _Populations:
    """Train in an actor the groups it is given, on features that are read once."""

    def __init__(
        self,
        cpus: int,
        store: str | Path,
        view: str | None,
        space: Space,
        out: Path,
        spec: SweepSpec,
    ) -> None:
        torch.set_num_threads(cpus)
        data = SweepData(
            store=FeatureStore.open(store, view),
            fit=spec.fit,
            memory_bytes=spec.memory_bytes,
        )
        # Trials and progress are the driver's: this batch only trains groups.
        self.trial_batch = TrialBatch(
            out,
            spec=spec,
            space=space,
            data=data,
            trials={},
            progress=lambda _: None,
        )

    def do(self, group: FitGroup) -> Results:
        """Train one group."""
        return self.trial_batch.train_group(group)
