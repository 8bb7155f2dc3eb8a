"""What the rounds of a comparison say: medians, ratios within rounds, shares of the machine's limits, agreement."""

from typing import Any

from modelport.cli import measure

CLASSES = {
    "full": ("modelport", "transformers", "transformers-batch", "vllm", "llamacpp-bf16"),
    "float32": ("modelport-f32", "transformers", "transformers-batch", "vllm"),
    "quantised": ("modelport-int8", "llamacpp-q8_0", "llamacpp-q4_1"),
}
"""The first of each is ours, and is compared with the others, each at what suits it best on the machine."""


def summarize(result: dict[str, Any]) -> dict[str, Any]:
    """Medians by case and engine, ratios of ours to each other engine of its class, and shares of the limits."""
    rounds: dict[str, dict[str, dict[int, measure.Figures]]] = {}
    for record in result["rounds"]:
        by_round = rounds.setdefault(record["case"], {}).setdefault(record["engine"], {})
        by_round[record["round"]] = record["figures"]
    medians = {
        case: {engine: measure.medians(list(found.values())) for engine, found in engines.items()}
        for case, engines in rounds.items()
    }
    ratios: dict[str, dict[str, measure.Figures]] = {}
    for case, engines in rounds.items():
        for ours, *others in CLASSES.values():
            for other in others:
                if ours in engines and other in engines:
                    names = [n for n in medians[case][ours] if n != "seconds"]
                    ratios.setdefault(case, {})[f"{ours} / {other}"] = {
                        name: measure.ratio(_series(engines[ours], name), _series(engines[other], name))
                        for name in names
                    }
    return {"medians": medians, "ratios": ratios, "shares": _shares(result, rounds), "agreement": _agreement(result)}


def _series(found: dict[int, measure.Figures], name: str) -> dict[int, float]:
    return {number: figures[name] for number, figures in found.items() if figures.get(name) is not None}


def _shares(result: dict[str, Any], rounds: dict) -> dict[str, dict[str, float]]:
    """How much of the machine's limit of the same round is reached: memory for one sequence, products for prompts.

    Bytes are those of bf16 weights, whatever an engine reads.
    """
    model, shares = result["model"], {}
    limits = dict(enumerate(result["limits"]))
    for engine in CLASSES["full"]:
        decode = _series(rounds.get("decode-1", {}).get(engine, {}), "decode_tok_s")
        prefill = _series(rounds.get("prefill-1024", {}).get(engine, {}), "prefill_tok_s")
        found = {
            "decode-1 of read bandwidth": measure.ratio(
                {n: rate * model["bytes_per_token"] for n, rate in decode.items()},
                {n: one["read_bytes_s"] for n, one in limits.items()},
            ),
            "prefill-1024 of matrix rate": measure.ratio(
                {n: rate * model["flop_per_token_at_1024"] for n, rate in prefill.items()},
                {n: max(one["bfloat16_flop_s"], one["float32_flop_s"]) for n, one in limits.items()},
            ),
        }
        if any(found.values()):
            shares[engine] = found
    return shares


def _agreement(result: dict[str, Any]) -> dict[str, float]:
    """Share of first tokens equal to those of transformers: near 1, or an engine runs another model."""
    by_engine: dict[str, dict[tuple, list[int]]] = {}
    for record in result["rounds"]:
        by_engine.setdefault(record["engine"], {})[record["case"], record["round"]] = record["first_tokens"]
    truth, found = by_engine.get("transformers", {}), {}
    for engine, answers in by_engine.items():
        pairs = [p for key in answers.keys() & truth.keys() for p in zip(answers[key], truth[key], strict=True)]
        if pairs and engine != "transformers":
            found[engine] = sum(a == b for a, b in pairs) / len(pairs)
    return found
