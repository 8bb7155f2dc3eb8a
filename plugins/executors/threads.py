"""`executor="inproc"`: all places in this process, as threads that take turns."""

from collections.abc import Mapping

from modelport import hookimpl

modelport_api = 1


@hookimpl
def register_executors() -> Mapping[str, str]:
    return {"inproc": "modelport.parallel.executor:ThreadExecutor"}
