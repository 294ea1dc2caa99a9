"""A sweep by a Ray cluster: populations of heads train in actors; the driver plans, ranks and
writes as it does alone.

Every actor reads the features from the store once. Checkpoints of populations and rungs lie in the
sweep's folder, so this folder and the store must be reachable by every node under the same path; a
population that goes down with its actor goes on in another from its last checkpoint. With as many
threads as a local sweep the results are the same.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from apecache.arguments import AnyPath, as_path, require_type
from apecache.cluster.pool import Pool, RaySpec, open_pool
from apecache.storage.bucket import is_object_url
from apecache.store.reader import FeatureStore
from apecache.sweeps.halving import Group, Name, Results, SweepSpec, Wave
from apecache.sweeps.run import SweepReport, load_data, sweep
from apecache.sweeps.space import Space
from apecache.sweeps.trials import Trial
from apecache.train.loop import Training


def sweep_on_ray(
    store: FeatureStore,
    space: Space,
    out: AnyPath,
    spec: SweepSpec | None = None,
    progress: Callable[[Trial], None] = lambda _: None,
    cluster: RaySpec | None = None,
) -> SweepReport:
    """`sweep`, whose populations train in the actors of a Ray cluster; the best trial is fitted by
    the driver.

    Raises:
        EngineError, MissingExtraError: as `open_pool`. All others as `sweep`.
    """
    require_type(store, FeatureStore, "store")
    require_type(space, Space, "space")
    require_type(spec, SweepSpec, "spec", optional=True)
    out = as_path(out, "out")
    spec = spec or SweepSpec()
    place = store.path if is_object_url(store.path) else Path(os.path.abspath(store.path))
    make = partial(_Populations, place, space, Path(os.path.abspath(out)), spec)
    with open_pool(make, (cluster or RaySpec()).for_device(spec.fit.device)) as pool:
        return sweep(
            store,
            space=space,
            out=out,
            spec=spec,
            progress=progress,
            make_wave=partial(_ClusterWave, pool),
        )


class _ClusterWave(Wave):
    """Hands its groups to a pool."""

    def __init__(self, pool: Pool, *about: Any) -> None:
        super().__init__(*about)
        self.pool = pool

    def train_groups(
        self,
        groups: Sequence[Group],
        members: Mapping[Name, Training],
    ) -> Iterator[tuple[Group, Results]]:
        return self.pool.run(groups)


class _Populations:
    """An actor: the features, and a wave of which it trains what it is given."""

    def __init__(
        self,
        store: str | Path,
        space: Space,
        out: Path,
        spec: SweepSpec,
        cpus: int,
    ) -> None:
        torch.set_num_threads(cpus)
        data = load_data(FeatureStore.open(store), spec.fit)
        self.wave = Wave(out, spec=spec, space=space, data=data, trials={}, progress=lambda _: None)

    def do(self, group: Group) -> Results:
        return self.wave.train_group(group)
