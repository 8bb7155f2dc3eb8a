"""Invariants: what a request gets does not depend on how the work was cut, shared or interrupted.

Every check runs the prompts in another way and holds tokens and log-probabilities against the same prompts run alone
and uncut; the limit is that of rounding, since sums may be taken in another order.
"""

from dataclasses import replace

from modelport.sampling_params import SamplingParams
from modelport.testing.prompts import Prompt
from modelport.testing.reference import LOGITS_LIMIT
from modelport.testing.registry import Failure, Measured, conformance_check
from modelport.testing.subject import GREEDY, Subject, difference, needs

CHUNKS = (5, 16, 33)
BLOCK_SIZES = (4, 32)  # against 16
BLOCK = 16
DRAWN = SamplingParams(temperature=1.0, max_tokens=16, ignore_eos=True, seed=11)


@conformance_check(every_variant=True)
def chunked(subject: Subject) -> Measured:
    """A prompt computed in chunks is the prompt computed whole."""
    longest = sorted(subject.prompts, key=len)[-2:]
    known = {c.prompt: c for c in subject.baseline}
    worst = 0.0
    for size in CHUNKS:
        for found in subject.alone(longest, max_num_batched_tokens=size, max_num_seqs=4):
            worst = max(worst, difference(known[found.prompt], found))
    mixed = subject.together(subject.prompts, max_num_batched_tokens=CHUNKS[1], max_num_seqs=4)
    return Measured(max(worst, subject.hold(mixed)), LOGITS_LIMIT, f"chunks of {', '.join(map(str, CHUNKS))} tokens")


@conformance_check()
def batched(subject: Subject) -> Measured:
    """A prompt among others is the prompt alone, in any order, also when others wait and leave."""
    reverse = subject.prompts[::-1]
    together = subject.hold(subject.together(subject.prompts))
    reordered = subject.hold(subject.together(reverse, max_num_seqs=3), reverse)
    return Measured(max(together, reordered), LOGITS_LIMIT)


@conformance_check(every_variant=True)
def block_sizes(subject: Subject) -> Measured:
    """The size of the cache's blocks changes nothing."""
    worst = max(subject.hold(subject.together(subject.prompts, block_size=size)) for size in BLOCK_SIZES)
    return Measured(worst, LOGITS_LIMIT, f"blocks of {BLOCK_SIZES[0]}, {BLOCK} and {BLOCK_SIZES[1]} tokens")


@conformance_check(every_variant=True)
def prefix_cached(subject: Subject) -> Measured:
    """A prompt whose beginning lies in the cache is the prompt computed anew."""
    llm = subject.llm(enable_prefix_caching=True)
    cold = subject.hold(subject.together(subject.prompts, llm=llm))
    outputs = subject.together(subject.prompts, llm=llm)
    hits = [(len(o.prompt_token_ids), o.num_cached_tokens) for o in outputs]
    if subject.shares_prefixes and not all(cached for length, cached in hits if length > BLOCK):
        raise Failure(f"prompts were run twice, and of some nothing came from the cache; (tokens, cached): {hits}")
    cached = sum(cached for _, cached in hits)
    detail = f"{cached} tokens came from the cache" if cached else "what the model keeps cannot be shared"
    return Measured(max(cold, subject.hold(outputs)), LOGITS_LIMIT, detail)


@conformance_check(every_variant=True)
def preempted(subject: Subject) -> Measured:
    """A request that lost its cache to another one goes on as if nothing had happened."""
    needs(subject.is_paged, "the model keeps no pages of keys and values, which could run out")
    room = min(subject.max_model_len, max(map(len, subject.prompts)) + GREEDY.max_tokens + 1)
    blocks = -(-room // BLOCK) + 1  # for one of the longest, and a little
    outputs = subject.together(subject.prompts, num_kv_blocks=blocks, max_model_len=room)
    times = sum(output.metrics.num_preemptions for output in outputs)
    if not times:
        raise Failure(f"{len(outputs)} requests fitted in {blocks} blocks: nothing was preempted, so nothing is proved")
    return Measured(subject.hold(outputs), LOGITS_LIMIT, f"{times} preemptions")


@conformance_check()
def sliding_window(subject: Subject) -> Measured:
    """Prompts and chunks that end just before, at and after a window's edge are computed right."""
    needs(subject.windows, "the model has no sliding window that a prompt of the kit reaches beyond")
    worst = 0.0
    for window in subject.windows:
        near = [c for c in subject.baseline if len(c.prompt) in (window - 1, window, window + 1, 2 * window + 3)]
        for size in (window - 1, window, window + 1):
            if size < 1:
                continue
            found = subject.alone([c.prompt for c in near], max_num_batched_tokens=size, max_num_seqs=1)
            worst = max(worst, *(difference(c, f) for c, f in zip(near, found, strict=True)))
    return Measured(worst, LOGITS_LIMIT, f"windows of {', '.join(map(str, subject.windows))} tokens")


@conformance_check()
def parallel_samples(subject: Subject) -> None:
    """Several completions of one prompt are as many draws, each its own, and the same whenever they are repeated."""
    prompt = max(subject.prompts, key=len)
    several = replace(DRAWN, n=3)

    def drawn(llm) -> list[list[int]]:
        (output,) = subject.together([prompt], several, llm)
        return [list(completion.token_ids) for completion in output.outputs]

    llm = subject.llm(enable_prefix_caching=True)
    first, again, apart = drawn(llm), drawn(llm), drawn(subject.llm())
    if len({tuple(ids) for ids in first}) < len(first):
        raise Failure(f"some of the completions are equal, although each is drawn anew: {first}")
    if first != again or first != apart:
        raise Failure("the completions depend on what the cache holds")
    (alone,) = subject.together([prompt], DRAWN)
    if list(alone.outputs[0].token_ids) != first[0]:
        raise Failure("the first of several completions is not the one that the same seed gives alone")


@conformance_check()
def seeds(subject: Subject) -> None:
    """A seed gives the same tokens every time, alone or among others; another seed gives others."""
    prompts = subject.prompts[:4]

    def drawn(some: list[Prompt], seed: int, **settings: int) -> list[list[int]]:
        outputs = subject.together(some, replace(DRAWN, seed=seed), **settings)
        return [list(output.outputs[0].token_ids) for output in outputs]

    together = drawn(prompts, 11)
    if drawn(prompts, 11) != together:
        raise Failure("the same seed gives other tokens the second time")
    if [drawn([prompt], 11)[0] for prompt in prompts] != together:
        raise Failure("what a seed gives depends on the other requests of the batch")
    if drawn(prompts, 12) == together:
        raise Failure("another seed gives the same tokens: the likeliest token has nearly all the probability")
