"""Faults: numbers that are none are found, where they come in and before anybody reads a token made of them."""

from modelport.testing.registry import Failure, Measured, conformance_check
from modelport.testing.subject import GREEDY, Subject, engine_model
from modelport.testing.weights import is_spare


@conformance_check()
def nan_weights(subject: Subject) -> Measured:
    """A checkpoint with one value that is not a number is refused, in a small tensor and in a large one."""
    numeric = [
        name for name, tensor in subject.tensors.items() if tensor.is_floating_point() and not is_spare(subject, name)
    ]
    by_size = sorted(numeric, key=lambda name: subject.tensors[name].numel())
    for name in (by_size[0], by_size[-1]):
        poisoned = subject.tensors[name].clone()
        poisoned.view(-1)[-1] = float("nan")
        try:
            subject.build(subject.write("nan", {**subject.tensors, name: poisoned}))
        except ValueError as error:
            if "NaN" not in str(error):
                raise Failure(f"a NaN in {name!r} is refused, but the message does not say so: {error}") from error
            continue
        raise Failure(f"the checkpoint loads with a NaN in {name!r}")
    return Measured(detail=f"{by_size[0]} and {by_size[-1]}")


@conformance_check()
def nan_logits(subject: Subject) -> None:
    """A request whose logits are not numbers ends with an error, and the others go on."""
    llm = subject.llm()
    prompts = sorted(subject.prompts, key=len)[1:3]

    def poison(_module, _inputs, out):
        if len(out) == 1:
            return out
        out = out.clone()
        out[0] = float("nan")
        return out

    hook = engine_model(llm).lm_head.register_forward_hook(poison)
    try:
        bad, good = subject.together(prompts, GREEDY, llm)
    finally:
        hook.remove()
    if bad.outputs[0].finish_reason != "error":
        raise Failure(f"a request whose logits are NaN ended with {bad.outputs[0].finish_reason!r}, not with an error")
    subject.hold([good], prompts[1:])
