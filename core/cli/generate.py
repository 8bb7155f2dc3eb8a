"""`modelport generate`: continue one prompt, token by token.

Decisions: the prompt goes to the model as it is, `--chat` wraps it in the model's chat template; text goes to stdout
and everything about it to stderr, so that a pipe gets the text alone; likeliest tokens by default, so that the same
command gives the same text.
"""

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from modelport.cli.flags import (
    add_adapter_flag,
    add_engine_flags,
    add_sampling_flags,
    chosen_adapter,
    engine_settings,
    sampling_params,
)

if TYPE_CHECKING:
    from modelport import LLM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", help="the prompt; `-`, or nothing in a pipe, reads it from stdin")
    parser.add_argument("--chat", action="store_true", help="the prompt is a message: apply the chat template")
    parser.add_argument("--system", metavar="TEXT", help="system message; implies --chat")
    for modality in ("image", "video", "audio"):
        parser.add_argument(
            f"--{modality}",
            action="append",
            default=[],
            metavar="FILE",
            help=f"{'an' if modality != 'video' else 'a'} {modality} that the message is about, a file or an address; "
            "may be repeated; implies --chat where the model has a chat template",
        )
    parser.add_argument("--no-stream", dest="stream", action="store_false", help="print the text when it is complete")
    parser.add_argument("-q", "--quiet", action="store_true", help="no timings on stderr")
    add_adapter_flag(parser)
    add_sampling_flags(parser, max_tokens=256, temperature=0.0)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    prompt = _read_prompt(args.prompt)
    params, adapter = sampling_params(args), chosen_adapter(args)

    from modelport import LLM

    started = time.perf_counter()
    llm = LLM(**engine_settings(args))
    loaded = time.perf_counter()
    messages = [{"role": "system", "content": args.system}] if args.system else []
    media = [{"type": kind, kind: file} for kind in ("image", "video", "audio") for file in getattr(args, kind)]
    content = [*media, {"type": "text", "text": prompt}] if media else prompt
    messages.append({"role": "user", "content": content})
    as_chat = args.chat or args.system is not None or bool(media)
    if media and not (args.chat or args.system or _has_template(llm)):
        prompt, as_chat = _with_media(llm, prompt, media), False
    first = None
    if args.stream:
        shown = 0
        begin, what = (llm.stream_chat, messages) if as_chat else (llm.stream, prompt)
        for output in begin(what, params, lora_request=adapter):
            first = first or time.perf_counter()
            text = output.outputs[0].text
            print(text[shown:], end="", flush=True)
            shown = len(text)
    else:
        complete, what = (llm.chat, messages) if as_chat else (llm.generate, prompt)
        (output,) = complete(what, params, use_tqdm=False, lora_request=adapter)
        print(output.outputs[0].text, end="")
    print(flush=True)
    if not args.quiet:
        tokens = len(output.outputs[0].token_ids)
        print(_timings(tokens, loaded - started, loaded, first, time.perf_counter()), file=sys.stderr)
    return 0


def _has_template(llm: "LLM") -> bool:
    """Whether a message can be given; a model that takes no media is told that media are none of its matter."""
    return llm._front.media is None or llm.tokenizer is None or bool(llm.tokenizer.chat_templates)


def _with_media(llm: "LLM", prompt: str, media: list[dict[str, str]]) -> dict[str, Any]:
    """A prompt for a base model, its media in front unless it has places for them."""
    from modelport.inputs.multimodal import with_places

    given: dict[str, list[str]] = {}
    for part in media:
        given.setdefault(part["type"], []).append(part[part["type"]])
    llm._front.media.check_kinds(given)
    return {"prompt": with_places(llm._front.media.processor, prompt, given), "multi_modal_data": given}


def _read_prompt(given: str | None) -> str:
    if given not in (None, "-"):
        return given
    if given is None and sys.stdin.isatty():
        raise ValueError('there is no prompt; write it in quotes, as in: modelport generate "Once upon a time"')
    return sys.stdin.read().removesuffix("\n")  # the one that `echo` adds


def _timings(tokens: int, loading: float, start: float, first: float | None, end: float) -> str:
    """One line. The rate counts the tokens after the first where the first was seen: what a reader waits for."""
    if first is not None and tokens > 1:
        rate = (tokens - 1) / max(end - first, 1e-9)
        return (
            f"{tokens} tokens, {rate:.1f} tokens per second; first token after {first - start:.2f} s; "
            f"model loaded in {loading:.1f} s"
        )
    return f"{tokens} tokens in {end - start:.2f} s; model loaded in {loading:.1f} s"
