"""`executor="mp"`: a process for each place, on this machine or on those that `nnodes` counts."""

from collections.abc import Mapping

from modelport import hookimpl

modelport_api = 1


@hookimpl
def register_executors() -> Mapping[str, str]:
    return {"mp": "modelport.parallel.remote:ProcessExecutor"}
