"""`executor="ray"`: a process for each place, where a Ray cluster has room. Needs the extra `ray`."""

from collections.abc import Mapping

from modelport import hookimpl

modelport_api = 1


@hookimpl
def register_executors() -> Mapping[str, str]:
    return {"ray": "modelport.parallel.cluster:RayExecutor"}
