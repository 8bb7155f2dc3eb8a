"""Places: checks of features that are yet to come; each tells so in every report and never counts as passed."""

from modelport.testing.registry import Skip, conformance_check
from modelport.testing.report import NOT_BUILT
from modelport.testing.subject import Subject


@conformance_check()
def tensor_parallel(subject: Subject) -> None:
    """Two devices that share every layer compute what one does."""
    raise Skip(f"{NOT_BUILT}tensor parallelism")


@conformance_check()
def pipeline_parallel(subject: Subject) -> None:
    """Two devices that divide the layers compute what one does."""
    raise Skip(f"{NOT_BUILT}pipeline parallelism")


@conformance_check()
def lora(subject: Subject) -> None:
    """An adapter on every linear layer is the merged model, and two adapters in a batch do not mix."""
    raise Skip(f"{NOT_BUILT}adapters")


@conformance_check()
def media(subject: Subject) -> None:
    """Images, audio and video, and their embeddings, give what the reference gives."""
    raise Skip(f"{NOT_BUILT}media inputs")


@conformance_check()
def pooling(subject: Subject) -> None:
    """Embeddings, scores and rewards are the reference's."""
    raise Skip(f"{NOT_BUILT}pooling tasks")
