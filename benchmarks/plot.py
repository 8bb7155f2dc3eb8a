"""Draws a comparison and writes its tables: ``python benchmarks/plot.py benchmarks/results/NAME.json``.

The picture goes to docs/performance.png (matplotlib), the tables, in Markdown, to stdout.
"""

import argparse
import json
from pathlib import Path
from typing import Any

BATCHES = (1, 8, 32, 128)
COLORS = {"modelport": "#c2410c", "modelport-int8": "#f59e0b", "vllm": "#1d4ed8", "transformers": "#0f766e",
          "transformers-batch": "#5eead4", "llamacpp-bf16": "#6b21a8", "llamacpp-q8_0": "#a855f7",
          "llamacpp-q4_1": "#d8b4fe"}  # fmt: skip
COLUMNS = [  # title, case, figure, factor, digits
    *((f"decode, batch {size}", f"decode-{size}", "decode_tok_s", 1, 0) for size in BATCHES),
    ("prefill, 1024", "prefill-1024", "prefill_tok_s", 1, 0),
    ("1024 in, 32 out", "long-1024", "output_tok_s", 1, 1),
    ("trace", "trace", "output_tok_s", 1, 0),
    ("trace: first token p50, s", "trace", "first_token_p50_s", 1, 2),
    ("between tokens p50, ms", "trace", "inter_token_p50_s", 1e3, 0),
    ("p99, ms", "trace", "inter_token_p99_s", 1e3, 0),
]


def markdown(result: dict[str, Any]) -> str:
    """Figures, ratios within rounds, the machine's limits, and what was left out, as Markdown."""
    return "\n\n".join(part for part in (_figures(result), _ratios(result), _limits(result), _notes(result)) if part)


def _figures(result: dict[str, Any]) -> str:
    medians, starts = result["medians"], result["starts"]
    columns = [c for c in COLUMNS if c[1] in medians]
    rows = []
    for engine in result["engines"]:
        cells = [_cell(medians[case].get(engine, {}).get(name), by, digits) for _, case, name, by, digits in columns]
        first = sorted(one["first_token_s"] for one in starts.get(engine, []))
        start = first[len(first) // 2] if first else None
        rows.append(
            [engine, *cells, _cell(start, 1, 1), _cell(result["engines"][engine].get("peak_memory_bytes"), 1e-6, 0)]
        )
    titles = [title for title, *_ in columns]
    return _table(["tokens per second", *titles, "start to first token, s", "peak memory, MB"], rows)


def _ratios(result: dict[str, Any]) -> str:
    columns = [c for c in COLUMNS if c[1] in result["ratios"]]
    pairs = dict.fromkeys(pair for found in result["ratios"].values() for pair in found)
    rows = [
        [pair, *(_cell(result["ratios"][case].get(pair, {}).get(name), 1, 2) for _, case, name, *_ in columns)]
        for pair in pairs
    ]
    return _table(["ratio (median over rounds)", *(title for title, *_ in columns)], rows) if rows else ""


def _limits(result: dict[str, Any]) -> str:
    if not result["limits"]:
        return ""
    middle = {
        name: sorted(one[name] for one in result["limits"])[len(result["limits"]) // 2] for name in result["limits"][0]
    }
    read, single, half = (middle[n] / 1e9 for n in ("read_bytes_s", "float32_flop_s", "bfloat16_flop_s"))
    lines = [
        f"Limits of the machine, by torch with {middle['threads']} threads: memory read {read:.1f} GB/s, "
        f"matrix products {single:.0f} GFLOP/s in float32 and {half:.0f} in bf16."
    ]
    names = dict.fromkeys(name for shares in result["shares"].values() for name in shares)
    rows = [[engine, *(_percent(shares.get(n)) for n in names)] for engine, shares in result["shares"].items()]
    return "\n\n".join([*lines, *([_table(["share of the limit", *names], rows)] if rows else [])])


def _notes(result: dict[str, Any]) -> str:
    lines = []
    for engine, about in result["engines"].items():
        versions = ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items())
        options = [f"{k}={v}" for k, v in {**about["settings"], **about["environment"]}.items()]
        agreement = result["agreement"].get(engine)
        same = f"; first tokens as transformers: {agreement:.0%}" if agreement is not None else ""
        chosen = f"; {', '.join(options)}" if options else ""
        lines.append(f"- {engine}: {versions}; {about.get('threads')} threads{chosen}{same}")
    machine = result["machine"]
    lines.append(f"- machine: {machine['cpu']}, {machine['cores']} cores ({', '.join(machine['instructions'])})")
    lines += [f"- left out: {what} ({why})" for what, why in result["skipped"].items()]
    return "\n".join(lines)


def _table(titles: list[str], rows: list[list[str]]) -> str:
    lines = [titles, ["---", *["---:"] * (len(titles) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: float | None, by: float, digits: int) -> str:
    return "-" if value is None else f"{value * by:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Decode rate by batch size, prompt rate, start-up and the trace's gaps between tokens, one panel each."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, ((decode, prefill), (start, gaps)) = pyplot.subplots(2, 2, figsize=(11, 7.5), width_ratios=(4, 3))
    medians, engines = result["medians"], list(result["engines"])
    for engine in engines:
        points = [
            (size, found["decode_tok_s"])
            for size in BATCHES
            if (found := medians.get(f"decode-{size}", {}).get(engine)) and found["decode_tok_s"]
        ]
        if points:
            decode.plot(*zip(*points, strict=True), marker="o", label=engine, color=COLORS.get(engine),
                        linewidth=3 if engine == "modelport" else 1.5)  # fmt: skip
    decode.set(title="Decoding, tokens per second", xlabel="sequences at once", xscale="log", yscale="log")
    decode.set_xticks(BATCHES, [str(size) for size in BATCHES])
    decode.minorticks_off()
    ticks = [t * 10**power for power in range(5) for t in (1, 2, 5)]
    low, high = decode.get_ylim()
    shown = [t for t in ticks if low <= t <= high]
    decode.set_yticks(shown, [f"{t:,}" for t in shown])
    decode.grid(alpha=0.3)
    decode.legend(fontsize=8)

    _bars(prefill, "1024-token prompts, tokens per second", engines, _row(medians, "prefill-1024", "prefill_tok_s", 1))
    firsts = {name: sorted(one["first_token_s"] for one in starts) for name, starts in result["starts"].items()}
    _bars(
        start, "New process to first token, seconds", engines, {n: f[len(f) // 2] for n, f in firsts.items()}, log=True
    )
    _bars(gaps, "Trace: p99 between tokens, ms", engines, _row(medians, "trace", "inter_token_p99_s", 1e3))
    machine = result["machine"]
    figure.suptitle(
        f"{Path(result['model']['name']).name} on {machine['cpu']}, {machine['cores']} cores, {result['date']}"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def _row(medians: dict[str, Any], case: str, name: str, by: float) -> dict[str, float]:
    return {engine: f[name] * by for engine, f in medians.get(case, {}).items() if f[name] is not None}


def _bars(axes: Any, title: str, engines: list[str], values: dict[str, float], log: bool = False) -> None:
    shown = [engine for engine in engines if engine in values]
    bars = axes.barh(shown, [values[e] for e in shown], color=[COLORS.get(e, "gray") for e in shown], log=log)
    axes.bar_label(bars, fmt=lambda value: f"{value:,.0f}" if value >= 100 else f"{value:.1f}", padding=3, fontsize=8)
    axes.set_title(title)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.tick_params(axis="x", which="both", bottom=False, labelbottom=False)  # the bars carry their values
    if log and shown:
        axes.set_xlim(min(values.values()) / 3, max(values.values()) * 3)
    axes.tick_params(axis="y", labelsize=8)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("result", type=Path)
    parser.add_argument("--picture", type=Path, default=Path(__file__).parent.parent / "docs" / "performance.png")
    parsed = parser.parse_args()
    measured = json.loads(parsed.result.read_text())
    draw(measured, parsed.picture)
    print(markdown(measured))
