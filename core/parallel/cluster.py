"""Workers where a Ray cluster has room: `executor="ray"`.

Decisions: Ray finds the room (a placement group with one bundle for each place, packed) and keeps one actor in each,
which starts an agent; everything else is as without Ray, and no tensor and no plan goes through it. A cluster that
this process already uses, or that runs on this machine, or that RAY_ADDRESS names, is used; otherwise one is started
here and ended with the engine. The secret travels in the actors' environment.
"""

from __future__ import annotations

import contextlib
import logging
import os
import subprocess
import sys
from typing import Any, ClassVar

from modelport.config import EngineConfig
from modelport.engine.memory import Limits
from modelport.loading.model import Description
from modelport.parallel.agent import SECRET_VARIABLE
from modelport.parallel.channel import Listener, new_secret
from modelport.parallel.fleet import Fleet, how_ended, start_agent
from modelport.parallel.remote import RemoteExecutor
from modelport.plugin import Plugins

ROOM_TIMEOUT = 60.0
"""Seconds in which the cluster has to find room."""


class RayExecutor(RemoteExecutor):
    """Every place in a bundle of a placement group.

    :raises ValueError: Ray is not installed, or its cluster has no room.
    """

    def __init__(
        self, about: Description, plugins: Plugins, settings: EngineConfig, limits: Limits, progress: bool = False
    ):
        launcher = RayLauncher(settings)
        try:
            fleet = Fleet(settings, launcher)
        except BaseException:
            launcher.end()
            raise
        super().__init__(about, plugins, settings, limits, progress, fleet)


class RayLauncher:
    """One agent for each place.

    :cvar open: how many are not ended; the last one ends a cluster that the first one has started.
    """

    first_device = 0  # an agent sees only the one that Ray gave it
    open: ClassVar[int] = 0
    started: ClassVar[bool] = False

    def __init__(self, settings: EngineConfig):
        ray = _ray()
        self._ray, self._settings, self._secret = ray, settings, new_secret()
        self.num_agents = settings.num_places
        self._group, self._hosts = None, {}
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(log_to_driver=False, logging_level=logging.ERROR)
            RayLauncher.started = True
        RayLauncher.open += 1
        self._is_open = True
        try:
            self._find_room()
        except BaseException:
            self.end()
            raise

    def listen(self) -> Listener:
        return Listener((self._ray.util.get_node_ip_address(), 0), self._secret)

    def launch(self, node: int, address: str) -> None:
        early = {"plugins": list(self._settings.plugins), "blocked": list(self._settings.blocked_plugins)}
        here = self._ray.get_runtime_context().get_node_id()
        bundle, actor, where = self._hosts[node]
        # modules that plugins= names lie where this process finds them, on this machine
        path = os.pathsep.join(path or os.getcwd() for path in sys.path) if where["node"] == here else None
        try:
            self._ray.get(actor.start.remote(address, node, early, path))
        except self._ray.exceptions.RayActorError:  # lost since it was last used
            actor = self._actor(bundle)
            self._hosts[node] = (bundle, actor, self._ray.get(actor.where.remote()))
            self._ray.get(actor.start.remote(address, node, early, path))

    def complaint(self, node: int) -> str | None:
        try:
            code = self._ray.get(self._hosts[node][1].poll.remote(), timeout=5.0)
        except self._ray.exceptions.RayError as error:
            return f"is lost to Ray ({type(error).__name__})"
        return None if code is None else how_ended(code)

    def end(self) -> None:
        """Ray may be gone already when Python ends; then so is all of this, and to ask it would start it again."""
        if not self._is_open:
            return
        self._is_open = False
        RayLauncher.open -= 1
        is_ours, RayLauncher.started = RayLauncher.started, RayLauncher.started and RayLauncher.open > 0
        if not self._ray.is_initialized():
            return
        with contextlib.suppress(Exception):
            for _, actor, _ in self._hosts.values():
                self._ray.kill(actor)
            if self._group is not None:
                self._ray.util.remove_placement_group(self._group)
        self._hosts = {}
        if is_ours and not RayLauncher.open:
            with contextlib.suppress(Exception):
                self._ray.shutdown()

    def _find_room(self) -> None:
        """Places of a stage are neighbours, so bundles are numbered machine by machine, this one first."""
        ray, count = self._ray, self.num_agents
        have = ray.cluster_resources()
        wants_gpu = self._settings.device.startswith("cuda") or self._settings.device == "auto" and have.get("GPU", 0)
        self._kind = "GPU" if wants_gpu else "CPU"
        self._group = ray.util.placement_group([{self._kind: 1.0}] * count, strategy="PACK")
        enough = have.get(self._kind, 0) >= count
        if not enough or not self._group.wait(ROOM_TIMEOUT):
            raise ValueError(
                f"the Ray cluster has no room for {count} places, each of which takes a {self._kind}: it has "
                f"{have.get(self._kind, 0):g} in all; add machines, or choose other parallel sizes"
            )
        actors = [self._actor(bundle) for bundle in range(count)]
        found = list(enumerate(ray.get([actor.where.remote() for actor in actors])))
        here = ray.get_runtime_context().get_node_id()
        found.sort(key=lambda item: (item[1]["node"] != here, item[1]["node"], item[1]["devices"], item[0]))
        self._hosts = {node: (bundle, actors[bundle], where) for node, (bundle, where) in enumerate(found)}

    def _actor(self, bundle: int) -> Any:
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        options = {"num_gpus": 1, "num_cpus": 0} if self._kind == "GPU" else {"num_cpus": 1}
        return (
            self._ray.remote(_Host)
            .options(
                **options,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, bundle),
                runtime_env={"env_vars": {SECRET_VARIABLE: self._secret.decode()}},
            )
            .remote()
        )


class _Host:
    """An actor: keeps a bundle, and the agent in it. A GPU that Ray gives it is the only one that the agent sees."""

    _process: subprocess.Popen | None = None

    def where(self) -> dict[str, Any]:
        import ray

        context = ray.get_runtime_context()
        return {"node": context.get_node_id(), "devices": [int(i) for i in ray.get_gpu_ids()]}

    def start(self, address: str, node: int, early: dict[str, list[str]], path: str | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = start_agent(address, node, 1, early, {"PYTHONPATH": path} if path else None)

    def poll(self) -> int | None:
        return None if self._process is None else self._process.poll()


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ValueError("executor='ray' needs Ray; install it with: pip install 'modelport[ray]'") from None
    return ray
