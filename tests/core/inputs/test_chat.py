"""Chat templates: the same text as transformers renders, and errors that say what the template minded."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelport.inputs.chat import render

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}
{% endif %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}
{%- endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
STRICT = """{{ bos_token }}{% for m in messages %}
{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
[{{ m['role'] }}] {{ m['content'] | trim }}{% endfor %}"""
FEATURES = """{%- set ns = namespace(found=false) -%}
{%- for m in messages -%}
    {%- if m.role == 'skip' -%}{%- continue -%}{%- endif -%}
    {%- if m.role == 'stop' -%}{%- break -%}{%- endif -%}
    {%- if m.content is string -%}{{ m.content }}{%- else -%}
    {%- for part in m.content -%}
    {%- if part.type == 'text' -%}{{ part.text }}{%- else -%}<media>{%- endif -%}
    {%- endfor -%}
    {%- endif -%}
    {%- set ns.found = true -%}
    {% generation %}{{ m.role | upper }}{% endgeneration %}
{%- endfor -%}
{{ tools | tojson(indent=2) if tools }}{{ messages | tojson }}{{ ns.found }}{{ documents }}{{ strftime_now('%Y') }}
{{- eos_token is defined }}{{ style | default('plain') }}"""
TEMPLATES = [CHATML, STRICT, FEATURES]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "a<b": "ž'\""}}}


def reference(template: str, messages: list, **given) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    rendered, _ = render_jinja_template([messages], chat_template=template, **given)
    return rendered[0]


contents = st.one_of(st.text(max_size=20), st.sampled_from(["<b>&amp;</b>", "  spaces  ", "{{ 7 * 7 }}", "\n", ""]))


def messages(roles):
    one = st.fixed_dictionaries({"role": st.sampled_from(roles), "content": contents})
    return st.lists(one, min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(chat=messages(["system", "user", "assistant"]), prompt=st.booleans())
def test_chatml_equals_transformers(chat, prompt):
    assert render(CHATML, chat, add_generation_prompt=prompt) == reference(CHATML, chat, add_generation_prompt=prompt)


@settings(max_examples=60, deadline=None)
@given(
    chat=messages(["user", "skip", "stop"]),
    tools=st.sampled_from([None, [TOOL]]),
    style=st.sampled_from([{}, {"style": "x"}]),
)
def test_every_feature_of_the_environment_equals_transformers(chat, tools, style):
    given_ = {"eos_token": "</s>"} | style
    assert render(FEATURES, chat, tools=tools, variables=given_) == reference(
        FEATURES, chat, tools=tools, add_generation_prompt=True, **given_
    )


@pytest.mark.parametrize("final", ["Once upon", "Once upon  ", " Once", "a\n"])
@pytest.mark.parametrize("template", [CHATML, STRICT])
def test_continuing_the_final_message_equals_transformers(template, final):
    chat = [{"role": "user", "content": "A story"}, {"role": "assistant", "content": final}]
    ours = render(
        template, chat, add_generation_prompt=False, continue_final_message=True, variables={"bos_token": "<s>"}
    )
    assert ours == reference(template, chat, continue_final_message=True, bos_token="<s>")
    assert ours.rstrip().endswith(final.strip())


def test_content_in_parts():
    parts = [{"type": "text", "text": "Hello "}, {"type": "image"}, {"type": "text", "text": "you"}]
    chat = [{"role": "user", "content": parts}]
    parts_only = "{% for part in messages[0].content %}{{ part.text }}{% endfor %}<end>"
    assert render(FEATURES, chat).startswith("Hello <media>youUSER")
    assert render(parts_only, chat, add_generation_prompt=False, continue_final_message=True) == "Hello you"
    assert parts == [{"type": "text", "text": "Hello "}, {"type": "image"}, {"type": "text", "text": "you"}]


def test_text_parts_reach_a_template_that_knows_only_strings_as_an_error_with_a_cure():
    with pytest.raises(ValueError, match=r"pass the content as one string"):
        render(CHATML, [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}])


def test_absent_content_is_not_printed_as_none():
    chat = [{"role": "assistant", "content": None, "tool_calls": [1]}]
    assert render("{{ messages[0].content is defined }}", chat) == "False"


def test_the_template_says_what_it_minds():
    with pytest.raises(ValueError, match=r"refuses these messages: Conversation roles must alternate"):
        render(STRICT, [{"role": "assistant", "content": "Hi"}])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for m in messages %}", r"not valid jinja \(line 1\)"),
        ("{{ ''.__class__.__mro__ }}", r"refuses these messages: .*unsafe"),
        ("{{ messages.append(1) }}", r"refuses these messages"),
        ("{{ nothing.at.all }}", r"refuses these messages: 'nothing' is undefined"),
        ("{{ messages[0].role + 1 }}", r"failed on these messages: TypeError"),
    ],
)
def test_broken_and_malicious_templates(template, message):
    with pytest.raises(ValueError, match=message):
        render(template, [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        ([], r"messages is empty"),
        ("Hello", r"messages must be a list"),
        ({"role": "user", "content": "Hi"}, r"messages must be a list"),
        (["Hello"], r"messages\[0\] must be a dictionary"),
        ([{"content": "Hi"}], r'messages\[0\] has no "role"'),
        ([{"role": "user", "content": 5}], r'messages\[0\]\["content"\] must be text'),
        ([{"role": "user", "content": [{"type": "text"}]}], r"a text part without"),
        ([{"role": "user", "content": [7]}], r'a content part without a "type"'),
    ],
)
def test_malformed_messages(chat, message):
    with pytest.raises(ValueError, match=message):
        render(CHATML, chat)


def test_wrong_wishes():
    chat = [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match=r"exclude each other"):
        render(CHATML, chat, continue_final_message=True)
    with pytest.raises(ValueError, match=r"no text to continue"):
        render(CHATML, [{"role": "user"}], add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ValueError, match=r"does not print the final message"):
        render("nothing", chat, add_generation_prompt=False, continue_final_message=True)
    with pytest.raises(ValueError, match=r"tools must be JSON schemas"):
        render(CHATML, chat, tools=[print])
