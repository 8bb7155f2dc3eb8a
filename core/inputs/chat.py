"""Render a chat template: messages in, prompt text out.

Decisions: jinja2 in its immutable sandbox, with the environment that published templates are written for (blocks
trimmed, loop controls, `raise_exception`, `strftime_now`, a `tojson` that leaves `<` alone); importing transformers'
renderer would cost more than a second at every start. A template is data from a stranger: whatever goes wrong inside
it is a ValueError that names the template's own complaint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, Any]

# Where the final message ends in the rendered text. The trailing space tells whether the template strips messages.
_END_MARK = "<<end-of-the-final-message>> "


def render(
    template: str,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    tools: Sequence[Mapping[str, Any]] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """Return the prompt text of a conversation.

    :param messages: `{"role": ..., "content": ...}`; the content is a string, or a list of `{"type": "text", ...}`.
    :param continue_final_message: end the text where the last message ends, so that the model goes on with it.
    :param tools: JSON schemas of functions that the template describes to the model.
    :param variables: what else the template may read: special tokens, the user's `chat_template_kwargs`.
    :raises ValueError: the messages are malformed, or the template refuses them or is itself broken.
    """
    chat = [_message(i, message) for i, message in enumerate(_conversation(messages))]
    if continue_final_message:
        if add_generation_prompt:
            raise ValueError(
                "continue_final_message and add_generation_prompt exclude each other; pass add_generation_prompt=False"
            )
        final = _mark_end(chat[-1])
    for tool in tools or ():
        if not isinstance(tool, Mapping):
            raise ValueError(f"tools must be JSON schemas (dictionaries), got {tool!r}")
    text = _run(
        template,
        {"documents": None, **(variables or {})}
        | {"messages": chat, "tools": tools, "add_generation_prompt": add_generation_prompt},
    )
    return _cut(text, final) if continue_final_message else text


def _conversation(messages: Sequence[Message]) -> Sequence[Message]:
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        raise ValueError(f'messages must be a list such as [{{"role": "user", "content": "Hello"}}], got {messages!r}')
    if not messages:
        raise ValueError('messages is empty; give at least one, such as {"role": "user", "content": "Hello"}')
    return messages


def _message(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f'messages[{index}] must be a dictionary with "role" and "content", got {message!r}')
    if not isinstance(message.get("role"), str):
        raise ValueError(f'messages[{index}] has no "role" (a string such as "user"): {dict(message)!r}')
    # OpenAI-style objects spell "absent" as None, which templates would print
    chat = {key: value for key, value in message.items() if value is not None}
    content = chat.get("content")
    if isinstance(content, (list, tuple)):
        chat["content"] = [_part(index, part) for part in content]
    elif content is not None and not isinstance(content, str):
        raise ValueError(f'messages[{index}]["content"] must be text or a list of parts, got {content!r}')
    return chat


def _part(index: int, part: Any) -> dict[str, Any]:
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
        raise ValueError(f'messages[{index}] holds a content part without a "type": {part!r}')
    if part["type"] == "text" and not isinstance(part.get("text"), str):
        raise ValueError(f'messages[{index}] holds a text part without "text": {part!r}')
    return dict(part)


def _mark_end(message: dict[str, Any]) -> str:
    """Append the end mark to the message's text, and return that text as it was."""
    content = message.get("content")
    if isinstance(content, str):
        message["content"] = content + _END_MARK
        return content
    for part in reversed(content or ()):
        if part["type"] == "text":
            text = part["text"]
            part["text"] += _END_MARK
            return text
    raise ValueError(f"continue_final_message: the final message has no text to continue: {message!r}")


def _cut(text: str, final: str) -> str:
    mark = _END_MARK.strip()
    if mark not in text or final.strip() not in text:
        raise ValueError(
            "continue_final_message: the chat template does not print the final message as it is; "
            "pass add_generation_prompt=True instead, or another chat_template"
        )
    before, _, after = text.rpartition(mark)
    # a template that strips the message took the mark's own space, and would have taken the message's too
    return before if after.startswith(" ") else before.rstrip()


def _run(template: str, variables: Mapping[str, Any]) -> str:
    from jinja2 import TemplateError, TemplateSyntaxError

    try:
        return _compiled(template).render(variables)
    except TemplateSyntaxError as error:
        raise ValueError(f"the chat template is not valid jinja (line {error.lineno}): {error.message}") from None
    except TemplateError as error:  # raise_exception, undefined names, what the sandbox forbids
        raise ValueError(f"the chat template refuses these messages: {error}") from error
    except (TypeError, AttributeError, KeyError, IndexError, OverflowError) as error:
        hint = ""
        if any(isinstance(message.get("content"), list) for message in variables["messages"]):
            hint = "; it may not know content in parts: pass the content as one string"
        raise ValueError(f"the chat template failed on these messages: {error!r}{hint}") from error


@lru_cache(maxsize=16)
def _compiled(template: str) -> Template:
    from jinja2 import TemplateError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks what the assistant says, for training; here it prints its body."""

        tags = {"generation"}

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True)).set_lineno(line)

    def raise_exception(message: str) -> NoReturn:
        raise TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment.from_string(template)
