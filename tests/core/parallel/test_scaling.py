"""The numbers in docs/scaling.md follow from formulas, and a real model sends as many bytes as these say."""

import re
from pathlib import Path

import pytest
from torch import Tensor

from modelport import LLM, SamplingParams
from modelport.parallel.groups import Place, ThreadLinks

PAGE = (Path(__file__).parents[3] / "docs/scaling.md").read_text("utf-8")
HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCABULARY, BF16 = 16384, 126, 128, 8, 128, 53248, 128256, 2
TP, PP = 8, 2
LAYER = HIDDEN * HEAD_DIM * (2 * HEADS + 2 * KV_HEADS) + 3 * HIDDEN * WIDTH
TABLE = VOCABULARY * HIDDEN * BF16


def reduced(tokens: int, hidden: int, layers: int, itemsize: int) -> int:
    """Bytes that are summed over the places of the first stage: embeddings, and twice in each of its layers."""
    return (1 + 2 * layers) * tokens * hidden * itemsize


def gathered(rows: int, vocabulary: int, itemsize: int) -> int:
    """Bytes of logits that the places of the last stage have together."""
    return rows * vocabulary * itemsize


def handed_on(tokens: int, hidden: int, itemsize: int) -> int:
    """Bytes that a place sends to the next stage."""
    return tokens * hidden * itemsize


def ring(size: int, places: int) -> int:
    """Bytes that each place of a ring sends to sum `size` bytes."""
    return 2 * (places - 1) * size // places


def ring_gather(size: int, places: int) -> int:
    """Bytes that each place of a ring sends until all have all of `size` bytes."""
    return (places - 1) * size // places


def test_the_bytes_of_the_page() -> None:
    norms = (2 * LAYERS + 1) * HIDDEN * BF16
    wanted = [
        LAYERS * LAYER * BF16 + 2 * TABLE + norms,
        LAYERS * LAYER * BF16 // (TP * PP),
        TABLE // TP,
        LAYERS // PP * 2 * (KV_HEADS // TP) * HEAD_DIM * BF16,
        ring(reduced(1, HIDDEN, LAYERS // PP, BF16), TP),
        ring_gather(gathered(1, VOCABULARY, BF16), TP),
        TP * handed_on(1, HIDDEN, BF16),
        ring(reduced(1, HIDDEN, LAYERS, BF16), TP * PP),
    ]
    found = [int(number.replace(",", "")) for number in re.findall(r"^\|.*\| ([\d,]{5,}) \|$", PAGE, re.MULTILINE)]
    assert found == wanted
    room = (80e9 - wanted[1] - wanted[2]) / wanted[3]
    assert re.search(rf"about {round(room, -4):,.0f}\s+tokens of cache", PAGE)


@pytest.mark.parametrize(("what", "tokens", "rows"), [("decode", 64, 64), ("prefill", 4096, 1)])
def test_the_times_of_the_page(what: str, tokens: int, rows: int) -> None:
    (row,) = re.findall(rf"^\| {what}, {tokens} \w+ \| (.*) \|$", PAGE, re.MULTILINE)
    weights, head = LAYERS * LAYER // (TP * PP), VOCABULARY * HIDDEN // TP
    sums = reduced(tokens, HIDDEN, LAYERS // PP, BF16)
    last = ring(sums - tokens * HIDDEN * BF16, TP) + ring_gather(gathered(rows, VOCABULARY, BF16), TP)
    wanted = [
        (weights + head) * BF16 / 3.35e12,
        max(ring(sums, TP), last) / 450e9,
        TP * handed_on(tokens, HIDDEN, BF16) / 50e9,
        2 * (weights * tokens + head * rows) / 989e12,
    ]
    assert [float(number) for number in row.split(" | ")] == [round(1e3 * seconds, 1) for seconds in wanted]


def test_a_model_sends_what_the_formulas_say(tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden, layers, vocabulary, prompt, made = 64, 3, 320, 7, 5  # the first three are the tiny model's
    seen = {"reduced": 0, "gathered": 0, "sent": 0}
    reduce, gather, send = Place.all_reduce, Place.all_gather, ThreadLinks.send

    def all_reduce(place: Place, x: Tensor) -> Tensor:
        seen["reduced"] += x.nbytes
        return reduce(place, x)

    def all_gather(place: Place, x: Tensor) -> list[Tensor]:
        seen["gathered"] += x.nbytes
        return gather(place, x)

    def sends(links: ThreadLinks, state: Tensor, to: int) -> None:
        seen["sent"] += state.nbytes
        send(links, state, to)

    settings = {"dtype": "float32", "max_model_len": 64, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    llm = LLM(tiny, **settings, executor="inproc")
    monkeypatch.setattr(Place, "all_reduce", all_reduce)
    monkeypatch.setattr(Place, "all_gather", all_gather)
    monkeypatch.setattr(ThreadLinks, "send", sends)
    params = SamplingParams(temperature=0.0, max_tokens=made, ignore_eos=True)
    llm.generate({"prompt_token_ids": list(range(3, 3 + prompt))}, params, use_tqdm=False)
    tokens = prompt + made - 1  # the last one is not computed
    # both stages together have all layers; each of two places of a stage takes part in every sum
    assert seen == {
        "reduced": 2 * reduced(tokens, hidden, layers, 4),
        "gathered": gathered(made, vocabulary, 4),
        "sent": 2 * handed_on(tokens, hidden, 4),
    }
