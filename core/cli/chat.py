"""`modelport chat`: a conversation, streamed; it remembers what was said until `/reset`.

Decision: Ctrl-C stops the answer between two tokens, by a flag and not by an exception, so that it can never leave
the engine in the middle of a step.
"""

import argparse
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from modelport.cli import describe
from modelport.cli.flags import (
    add_adapter_flag,
    add_engine_flags,
    add_sampling_flags,
    chosen_adapter,
    engine_settings,
    sampling_params,
)

if TYPE_CHECKING:
    from modelport import LLM, SamplingParams

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"
Message = dict[str, str]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="system message, kept over /reset")
    add_adapter_flag(parser)
    add_sampling_flags(parser, max_tokens=1024, temperature=0.7, top_p=0.95)
    add_engine_flags(parser)


def run(args: argparse.Namespace) -> int:
    params, adapter = sampling_params(args), chosen_adapter(args)

    from modelport import LLM

    llm = LLM(**engine_settings(args))
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  # importing it gives input() its line editing

        print(f"{args.model}: {HELP}")
    opening = [{"role": "system", "content": args.system}] if args.system else []
    history = list(opening)
    for line in _lines("> " if interactive else ""):
        match line.strip():
            case "":
                continue
            case "/exit" | "/quit":
                break
            case "/reset":
                history = list(opening)
            case "/help":
                print(HELP)
            case word if word.startswith("/") and " " not in word:
                print(f"there is no command {word}; {HELP}")
            case message:
                history = _exchange(llm, history, message, params, adapter)
    return 0


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            yield input(prompt)
        except EOFError:
            if prompt:
                print()
            return
        except KeyboardInterrupt:  # at the prompt: drop the line, as shells do
            print()


def _exchange(
    llm: "LLM", history: list[Message], message: str, params: "SamplingParams", adapter: str | None
) -> list[Message]:
    """Print the answer to `message`, and return the history with both; unchanged when there is no answer."""
    asked = [*history, {"role": "user", "content": message}]
    text = ""
    try:
        with _stop_flag() as stop:
            answer = llm.stream_chat(asked, params, lora_request=adapter)
            for output in answer:
                print(output.outputs[0].text[len(text) :], end="", flush=True)
                text = output.outputs[0].text
                if stop:
                    answer.close()  # takes the request out of the engine
                    print(" [stopped]", end="")
                    break
        print()
    except ValueError as error:  # most often: the conversation has become longer than the model can read
        print(f"modelport: error: {describe(error)}", file=sys.stderr)
        return history
    return [*asked, {"role": "assistant", "content": text}]


@contextmanager
def _stop_flag() -> Iterator[list[int]]:
    """A list that is empty until Ctrl-C is pressed; a second Ctrl-C interrupts as usual."""
    stop: list[int] = []

    def note(number: int, frame: object) -> None:
        if stop:
            signal.default_int_handler(number, frame)
        stop.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
