"""The prompt formats of models whose authors published them as code, as chat templates.

Decisions: one is used only where the checkpoint has no `chat_template` of its own; a role that the authors' code does
not know is refused, since a model answers a format that it never saw without a sign that anything is wrong.
"""

_UNKNOWN_ROLE = "{{ raise_exception('this model knows the roles user and assistant, not ' + m['role']) }}"

CHATML = """\
{% for m in messages %}<|im_start|>{{ m['role'] }}
{{ m['content'] }}<|im_end|>
{% endfor %}
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

QWEN = (
    """\
{% if messages[0]['role'] != 'system' %}<|im_start|>system
You are a helpful assistant.<|im_end|>
{% endif %}
"""
    + CHATML
)

INTERNLM2 = "{{ bos_token }}" + CHATML

INTERNLM = (
    """\
{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'user' %}<|User|>:{{ m['content'] }}<eoh>
{% elif m['role'] == 'assistant' %}<|Bot|>:{{ m['content'] }}<eoa>
{% else %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}{% endfor %}{% if add_generation_prompt %}<|Bot|>:{% endif %}"""
)

# user_token and assistant_token: the reserved tokens that generation_config.json names by their ids
BAICHUAN = (
    """\
{% for m in messages %}
{% if m['role'] == 'user' %}{{ user_token }}{{ m['content'] }}
{%- elif m['role'] == 'assistant' %}{{ assistant_token }}{{ m['content'] }}
{%- elif m['role'] == 'system' and loop.first %}{{ m['content'] }}
{%- else %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}{% endfor %}{% if add_generation_prompt %}{{ assistant_token }}{% endif %}"""
)

ORION = (
    """\
{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'user' %}{{ 'Human: ' + m['content'] + '\\n\\nAssistant: ' + eos_token }}
{%- elif m['role'] == 'assistant' %}{{ m['content'] + eos_token }}
{%- else %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}{% endfor %}"""
)

MINICPM = (
    """\
{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'user' %}{{ '<用户>' + m['content'] | trim + '<AI>' }}
{%- elif m['role'] == 'assistant' %}{{ m['content'] | trim }}
{%- else %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}{% endfor %}"""
)

XVERSE = (
    """\
{% for m in messages %}
{% if m['role'] == 'user' %}{{ 'Human: ' + m['content'] + '\\n\\n' }}
{%- elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}
{%- else %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"""
)

DEEPSEEK = """\
{{ bos_token }}{% for m in messages %}
{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\\n\\n' }}
{%- elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}
{%- else %}{{ m['content'] + '\\n\\n' }}{% endif %}
{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"""

PHI3_SMALL = """\
{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>
{{ m['content'] }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|assistant|>
{% endif %}"""

CHATGLM2 = (
    """\
[gMASK]sop{% set count = namespace(rounds=0) %}{% set colon = '\uff1a' %}
{% for m in messages %}
{% if m['role'] == 'user' %}
{% set count.rounds = count.rounds + 1 %}
{{ '[Round ' ~ count.rounds ~ ']\\n\\n问' ~ colon ~ m['content'] ~ '\\n\\n答' ~ colon }}
{%- elif m['role'] == 'assistant' %}{{ m['content'] + '\\n\\n' }}
{%- else %}"""
    + _UNKNOWN_ROLE
    + """{% endif %}{% endfor %}"""
)


def _glm(begin: str, space: str) -> str:
    """:param space: what text begins with after a line break, for a vocabulary that marks the beginning of words."""
    return (
        begin
        + "{% for m in messages %}<|{{ 'observation' if m['role'] == 'tool' else m['role'] }}|>{{ m['metadata'] }}\n"
        + space
        + "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )


CHATGLM3 = _glm("[gMASK]sop", " ")
GLM4 = _glm("[gMASK]<sop>", "")
