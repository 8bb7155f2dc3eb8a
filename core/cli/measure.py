"""What a benchmark asks of an engine, and the arithmetic of what comes back: one list of token times per request.

Decisions: every figure is computed from token times alone, so that it means the same for every engine; nothing here
needs more than the standard library until an engine is driven. Prompts are random token ids from a seed: a new seed
is a new text, and the prefix cache cannot make a later round look better than it is.
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from modelport.frontend import Frontend

Figures = dict[str, float | None]


@dataclass(frozen=True)
class Work:
    """One request: when it comes (seconds after the start), its token ids, and exactly how many tokens it wants."""

    arrival: float
    prompt: list[int]
    max_tokens: int


def batch(size: int, input_len: int, output_len: int, vocab: int, seed: object) -> list[Work]:
    """`size` requests with distinct random prompts, all there from the start."""
    chance = random.Random(repr(seed))
    return [Work(0.0, _ids(chance, input_len, vocab), output_len) for _ in range(size)]


def trace(
    requests: int, rate: float, vocab: int, seed: object, *, prefixes: int = 4, prefix_len: int = 192,
    longest_input: int = 128, longest_output: int = 64,
) -> list[Work]:  # fmt: skip
    """Requests as a service gets them: Poisson arrivals, each prompt a shared beginning and an end of its own.

    :param rate: requests per second, on average.
    :param longest_input: of a prompt's own part; its length is uniform from a quarter of this, outputs likewise.
    """
    chance = random.Random(repr(seed))
    shared = [_ids(chance, prefix_len, vocab) for _ in range(prefixes)]
    now, made = 0.0, []
    for _ in range(requests):
        own = _ids(chance, chance.randint(max(1, longest_input // 4), longest_input), vocab)
        output = chance.randint(max(2, longest_output // 4), max(2, longest_output))
        made.append(Work(now, chance.choice(shared) + own, output))
        now += chance.expovariate(rate)
    return made


def _ids(chance: random.Random, length: int, vocab: int) -> list[int]:
    return [chance.randrange(vocab) for _ in range(length)]


def figures(work: Sequence[Work], times: Sequence[Sequence[float]]) -> Figures:
    """What the token times of `work` say; times and arrivals count from the same start, in seconds.

    `first_token_*` counts from a request's arrival; `prefill_tok_s` is None unless every request wanted one token,
    for otherwise decoding is mixed in; see `decode_rate` for when there is no `decode_tok_s`.

    :raises ValueError: a request has not as many tokens as it wanted.
    """
    for index, (one, stamps) in enumerate(zip(work, times, strict=True)):
        if len(stamps) != one.max_tokens:
            raise ValueError(f"request {index} made {len(stamps)} tokens instead of {one.max_tokens}")
    seconds = max(stamps[-1] for stamps in times)
    first = [stamps[0] - one.arrival for one, stamps in zip(work, times, strict=True)]
    gaps = [b - a for stamps in times for a, b in itertools.pairwise(stamps)]
    prompts, made = sum(len(one.prompt) for one in work), sum(map(len, times))
    return {
        "seconds": seconds,
        "output_tok_s": made / seconds,
        "total_tok_s": (prompts + made) / seconds,
        "prefill_tok_s": prompts / seconds if made == len(work) else None,
        "decode_tok_s": decode_rate(times),
        "first_token_p50_s": percentile(first, 50),
        "first_token_p99_s": percentile(first, 99),
        "inter_token_p50_s": percentile(gaps, 50) if gaps else None,
        "inter_token_p99_s": percentile(gaps, 99) if gaps else None,
    }


def decode_rate(times: Sequence[Sequence[float]]) -> float | None:
    """Tokens per second while the batch is whole: from the last first token to the first end.

    None where there is no such time: the first requests ended before the last one's prompt was through.
    """
    start, end = max(stamps[0] for stamps in times), min(stamps[-1] for stamps in times)
    if end <= start:
        return None
    return sum(start < stamp <= end for stamps in times for stamp in stamps) / (end - start)


def percentile(values: Iterable[float], percent: float) -> float:
    """Between the two nearest values in proportion."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def medians(rounds: Sequence[Mapping[str, float | None]]) -> Figures:
    """The median of each figure over the rounds that have it."""
    found = {name: [r[name] for r in rounds if r.get(name) is not None] for name in rounds[0]}
    return {name: statistics.median(values) if values else None for name, values in found.items()}


def ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """Median of `ours / theirs` over the rounds that both have: what slows the machine for a while slows both."""
    both = [ours[r] / theirs[r] for r in ours if theirs.get(r)]
    return statistics.median(both) if both else None


def drive(front: Frontend, work: Sequence[Work]) -> tuple[list[list[float]], list[list[int]], int]:
    """Run `work` as it arrives; token times, token ids, and how many prompt tokens came from the prefix cache.

    :raises ValueError: a request does not fit the model's length.
    """
    from modelport.sampling_params import SamplingParams

    engine = front.engine
    longest = max(len(one.prompt) + one.max_tokens for one in work)
    if longest > engine.max_model_len:
        raise ValueError(f"{longest} tokens of prompt and output are more than max_model_len={engine.max_model_len}")
    times: list[list[float]] = [[] for _ in work]
    requests: dict[int, Any] = {}  # by place in `work`
    place: dict[int, int] = {}  # of a request, by its identity
    waiting = sorted(range(len(work)), key=lambda i: work[i].arrival, reverse=True)
    start = time.perf_counter()
    while waiting or engine.has_work:
        now = time.perf_counter() - start
        while waiting and work[waiting[-1]].arrival <= now:
            index = waiting.pop()
            params = SamplingParams(
                temperature=0.0, max_tokens=work[index].max_tokens, ignore_eos=True, detokenize=False
            )
            (requests[index],) = front.job(work[index].prompt, params).requests
            place[id(requests[index])] = index
            engine.add(requests[index])
        if not engine.has_work:
            time.sleep(max(0.0, work[waiting[-1]].arrival - now))
            continue
        touched = engine.step()
        now = time.perf_counter() - start
        for request in touched:
            if request.finish_reason == "error":
                raise RuntimeError(f"a request of the benchmark failed: {request.stop_reason}")
            times[place[id(request)]].append(now)
    ordered = [requests[index] for index in range(len(work))]
    return times, [list(r.output_token_ids) for r in ordered], sum(r.metrics.num_cached_tokens for r in ordered)


def cache_bytes(front: Frontend) -> int:
    """What the key-value cache may come to hold; its pages take memory when they are first used."""
    found = (getattr(module, name, None) for module in front.engine.model.modules() for name in ("k_cache", "v_cache"))
    return sum(tensor.nbytes for tensor in found if tensor is not None)


def weight_bytes(front: Frontend) -> int:
    """What the weights hold as the kernels read them; a packed weight is counted in place of what it was made of."""
    model = front.engine.model
    packed = {id(p): p.nbytes for m in model.modules() if (p := getattr(m, "packed", None)) is not None}
    return sum(packed.values()) + sum(parameter.nbytes for parameter in model.parameters())


def peak_memory() -> int | None:
    """The most bytes of memory that this process ever held, or None where the system does not say."""
    status = Path("/proc/self/status")  # getrusage would count what the parent held before it started this process
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
