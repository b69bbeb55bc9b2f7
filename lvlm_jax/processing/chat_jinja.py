"""The prompt templates in Hugging Face's form (Jinja), which exported folders carry; ``%SYSTEM%`` is the system text.

A content is a string, or a list of {"type": "image"} and {"type": "text", "text": ...}. Each template is one line, so
that no setting of whitespace control can change it.
"""

_CONTENT = (
    "{% macro write(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% if not loop.last and (loop.nextitem['type'] == 'image' or not loop.nextitem['text'].startswith('\\n')) %}"
    "{{ '\\n' }}{% endif %}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
_BETWEEN = (
    "{% macro write(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ 'FIRST<|image_pad|>LAST' }}"
    "{% elif part['type'] == 'video' %}{{ 'FIRST<|video_pad|>LAST' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
_PICTURES = (
    "{% macro pictures(content) %}{% if content is not string %}{% for part in content %}"
    "{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
_WORDS = (
    "{% macro words(content) %}{% if content is string %}{{ content }}{% else %}{% for part in content %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}{% endmacro %}"
)
SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{% set system = write(messages[0]['content']) %}"
    "{% set rounds = messages[1:] %}{% else %}{% set system = %SYSTEM% %}{% set rounds = messages %}{% endif %}"
)
"""Sets `system` and `rounds`; a template that has it defines the macro `write` before."""

VICUNA = (
    _CONTENT + SYSTEM + "{% if system %}{{ system + ' ' }}{% endif %}{% for message in rounds %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + write(message['content']) + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + write(message['content']) + '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

PLAIN = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{% if message['content'] is not string %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}"
    "{% endif %}{% elif message['role'] == 'assistant' %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "{% endif %}{{ '\\n' }}{% endif %}{% endfor %}"
)

DOCUMENT = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '<image>' }}{% endfor %}"
    "{% endif %}{% endfor %}{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)

# A chunk is a picture and its text: it ends before the next picture, and where a turn ends that nobody answers.
FLAMINGO = (
    "{% set chunk = namespace(shown=false) %}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}"
    "{{ ('<|endofchunk|>' if chunk.shown else '') + '<image>' }}{% set chunk.shown = true %}{% endif %}{% endfor %}"
    "{% endif %}{% if message['role'] != 'user' or (not loop.last and loop.nextitem['role'] == 'user') %}"
    "{{ '<|endofchunk|>' }}{% set chunk.shown = false %}{% endif %}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)

IDEFICS = (
    "{% set before = namespace(picture=false) %}{% for message in messages %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% set before.picture = false %}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}"
    "{% set before.picture = before.picture and not part['text'] %}{% else %}"
    "{{ ('' if before.picture else '<fake_token_around_image>') + '<image><fake_token_around_image>' }}"
    "{% set before.picture = true %}{% endif %}{% endfor %}{% endif %}{% endfor %}"
    "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}"
)

LLAMA_3 = (
    _CONTENT + SYSTEM + "{% if system %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\\n\\n' + system + '<|eot_id|>' }}{% endif %}"
    "{% for message in rounds %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
    "{{ write(message['content']) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)

GEMMA = (
    _CONTENT + SYSTEM + "{% for message in rounds %}"
    "{{ '<start_of_turn>' + ('user' if message['role'] == 'user' else 'model') + '\\n' }}"
    "{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}"
    "{{ write(message['content']) + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

MISTRAL_V3 = (
    _CONTENT + SYSTEM + "{% for message in rounds %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    "{% if loop.first and system %}{{ system + '\\n\\n' }}{% endif %}{{ write(message['content']) + '[/INST]' }}"
    "{% else %}{{ ' ' + write(message['content']) + '</s>' }}{% endif %}{% endfor %}"
)

# The sequence begins with the pictures, then comes the start token: who tokenizes this must not add another.
PALIGEMMA = (
    _PICTURES + _WORDS + "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ pictures(message['content']) + bos_token + words(message['content']) + '\\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ words(message['content']) + eos_token }}{% endif %}{% endfor %}"
)

# Words alone: the torch library's processor of these models puts the pictures in front of all text by itself.
READ_AND_WRITTEN = (
    _WORDS + "{% for message in messages %}{{ words(message['content']) }}"
    "{% if not loop.last or message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)


def pictures_first(end: str) -> str:
    """Words alone, as above; `end` is what closes an answer, as an expression."""
    return (
        _WORDS + "{% set asked = namespace(space='') %}{% for message in messages %}"
        "{% set text = words(message['content']) %}{% if message['role'] == 'user' %}{{ text }}"
        "{% set asked.space = ' ' if text and text == text.rstrip() else '' %}"
        "{% else %}{{ asked.space + text + END }}{% endif %}{% endfor %}"
    ).replace("END", end)


def chatml(newline: str, around: tuple[str, str] | None = None) -> str:
    """ChatML; `newline` is what stands after each ``<|im_end|>``, `around` what stands around a picture or video."""
    close = "'<|im_end|>" + newline.replace("\n", "\\n") + "'"
    content = _CONTENT if around is None else _BETWEEN.replace("FIRST", around[0]).replace("LAST", around[1])
    return (
        content + SYSTEM + "{% if system %}{{ '<|im_start|>system\\n' + system + CLOSE }}{% endif %}"
        "{% for message in rounds %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + write(message['content']) + CLOSE }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ).replace("CLOSE", close)


def inst(before: str, after: str, end: str, again: str) -> str:
    """``[INST]`` as plain text: what stands around the system text, what ends an answer, what starts a later round."""
    return (
        (
            _CONTENT + SYSTEM + "{% for message in rounds %}{% if message['role'] == 'user' %}"
            "{{ AGAIN if not loop.first else '' }}{{ '[INST] ' }}"
            "{% if loop.first and system %}{{ BEFORE + system + AFTER }}{% endif %}{{ write(message['content']) }}"
            "{{ ' [/INST]' }}{% else %}{{ ' ' + write(message['content']) + END }}{% endif %}{% endfor %}"
        )
        .replace("AGAIN", _quoted(again))
        .replace("BEFORE", _quoted(before))
        .replace("AFTER", _quoted(after))
        .replace("END", _quoted(end))
    )


def cogvlm(before: str, after: str, gap: str, again: str) -> str:
    """CogVLM's running text: what stands before and after a question, before an earlier answer and the next question.

    Its code tokenizes the text behind a picture by itself, which no template can say.
    """
    return (
        (
            _PICTURES + _WORDS + "{% for message in messages %}{% if message['role'] == 'user' %}"
            "{% set shown = pictures(message['content']) %}"
            "{{ shown + (BEFORE if loop.first or shown else AGAIN) + words(message['content']) + AFTER }}"
            "{% elif message['role'] == 'assistant' %}"
            "{{ words(message['content']) + eos_token if loop.last else GAP + words(message['content']) }}"
            "{% endif %}{% endfor %}"
        )
        .replace("BEFORE", _quoted(before))
        .replace("AFTER", _quoted(after))
        .replace("GAP", _quoted(gap))
        .replace("AGAIN", _quoted(again))
    )


def _quoted(text: str) -> str:
    return "'" + text.replace("\n", "\\n") + "'"
