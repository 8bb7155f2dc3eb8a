"""Places: one model in several of them computes what it computes in one; and checks of features that are yet to come.

Decisions: the places are threads of this process, which take turns, with the transforms that places on devices of their
own have; every position's logits are held against one place's, then a crowd whose prompts are cut, wait and leave. A
check of what is not built yet tells so in every report and never counts as passed.
"""

from modelport.testing.media import compare_pictures
from modelport.testing.reference import LOGITS_LIMIT
from modelport.testing.registry import Measured, Skip, conformance_check
from modelport.testing.report import NOT_APPLICABLE, NOT_BUILT
from modelport.testing.subject import Subject, difference

CHUNK = 24  # tokens of a step, so that most prompts are cut


def divided(subject: Subject, tensor: int = 1, pipeline: int = 1) -> Measured:
    """The largest difference between one place and so many."""
    settings = {
        "tensor_parallel_size": tensor,
        "pipeline_parallel_size": pipeline,
        "executor": "inproc",
    }
    longest = max(subject.baseline, key=lambda c: len(c.prompt))
    base = [c for c in subject.baseline if c is longest or len(c.prompt) in (1, 17)]
    try:
        found = subject.alone([c.prompt for c in base], **settings)
    except ValueError as error:
        if "cannot be" not in str(error):
            raise
        raise Skip(f"{NOT_APPLICABLE}{error}") from None
    worst = max(difference(c, f) for c, f in zip(base, found, strict=True))
    llm = subject.llm(max_num_batched_tokens=CHUNK, max_num_seqs=3, **settings)
    crowd = subject.hold(subject.together(subject.prompts, llm=llm))
    notes = [note for note in llm._front.engine.runner.describe() if note.is_layer]
    whole = [note for note in notes if not note.divided]
    if notes and len(whole) == len(notes):
        raise Skip(f"{NOT_BUILT}division of {whole[0]}")
    detail = f"{len(notes) - len(whole)} units divided" if notes else f"{pipeline} stages"
    if whole:
        detail += f"; {len(whole)} whole, as {whole[0]}"
    return Measured(max(worst, crowd), LOGITS_LIMIT, detail)


@conformance_check(every_variant=True)
def tensor_parallel(subject: Subject) -> Measured:
    """Two places that share every layer compute what one does."""
    return divided(subject, tensor=2)


@conformance_check()
def pipeline_parallel(subject: Subject) -> Measured:
    """Two places that divide the layers compute what one does."""
    return divided(subject, pipeline=2)


@conformance_check(every_variant=True)
def media(subject: Subject) -> Measured:
    """Prompts with images give what the reference gives: together, cut, from the cache, divided."""
    return compare_pictures(subject)


@conformance_check()
def pooling(subject: Subject) -> None:
    """Embeddings, scores and rewards are the reference's."""
    raise Skip(f"{NOT_BUILT}pooling tasks")
