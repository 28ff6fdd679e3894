"""Templates as people write them, with much data: none comes near a limit."""

from __future__ import annotations

import time
from typing import Any

import pytest

from feste.prompt import Prompt

#: Two thousand documents of 4 KB: 8 MB, of which a text of 1 MiB can be made.
DOCS = [
    {"id": i, "title": f"Doc {i}", "text": "Ein Wörterbuch für é.\n" * 190} for i in range(2_000)
]
PLAIN = [{**doc, "text": "some words and a line\n" * 190} for doc in DOCS]
ROWS = [
    {"key": f"k{i * 7919 % 5_000}", "group": i % 50, "n": i, "text": "note " * 20}
    for i in range(5_000)
]
DATA = {
    "rows": [{"id": i, "name": f"n {i}", "tags": ["a", str(i)], "v": 1.5} for i in range(3_000)]
}
SHOTS = [{"q": f" {i}: " + "why " * 30, "a": "because " * 40, "label": "pos"} for i in range(500)]
TALK = [{"role": "user" if i % 2 else "assistant", "content": "hello " * 40} for i in range(3_000)]

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "few shots": (
        "{% for e in shots %}### {{ loop.index }}\nQ: {{ e.q|trim }}\nA: {{ e.a|trim }}\n"
        "{{ e.label|upper }}\n{% if not loop.last %}---\n{% endif %}{% endfor %}Q: {{ q }}",
        {"shots": SHOTS, "q": "Why?"},
    ),
    "truncate": (
        "{% for d in docs %}[{{ d.id }}] {{ d.title }}: {{ d.text|truncate(200) }}\n{% endfor %}",
        {"docs": DOCS},
    ),
    "clean": (
        "{% for d in docs %}{{ d.text|replace('\n', ' ')|trim|truncate(300) }}\n{% endfor %}",
        {"docs": DOCS},
    ),
    "search": (
        "{% for d in docs if 'wörter' in d.text|lower %}{{ d.title }}\n{% endfor %}",
        {"docs": DOCS},
    ),
    "macro": (
        "{% macro show(d) %}<doc id={{ d.id }}>{{ d.text[:300] }}</doc>{% endmacro %}"
        "{% for d in docs %}{{ show(d) }}{% endfor %}",
        {"docs": DOCS},
    ),
    "names": (
        "{{ docs|selectattr('id', 'ne', 3)|map(attribute='title')|join(', ') }}",
        {"docs": DOCS},
    ),
    "count words": ("{% for d in docs %}{{ d.text|wordcount }} {% endfor %}", {"docs": PLAIN}),
    "split": ("{% for d in docs %}{{ d.text.split()|length }} {% endfor %}", {"docs": PLAIN}),
    "whole documents": (
        "{% for d in docs %}<doc>{{ d.text }}</doc>{% endfor %}",
        {"docs": PLAIN[:240]},
    ),
    "json of documents": ("{% for d in docs %}{{ d|tojson }}\n{% endfor %}", {"docs": PLAIN[:200]}),
    "json": ("{{ data|tojson }}", {"data": DATA}),
    "json, indented": ("{{ data|tojson(indent=2) }}", {"data": DATA}),
    "json of a text": ("{{ data|tojson }}", {"data": {"text": "é y" * 66_000}}),
    "pprint": ("{{ data|pprint }}", {"data": DATA}),
    "sort": (
        "{% for r in rows|sort(attribute='key') %}{{ r.key }} {{ r.n }}\n{% endfor %}",
        {"rows": ROWS},
    ),
    "groups": (
        "{% for g, rs in rows|groupby('group') %}## {{ g }} ({{ rs|length }}, {{ rs|sum(attribute='n') }})\n"
        "{% for r in rs|sort(attribute='key', reverse=true) %}- {{ r.key }}\n{% endfor %}{% endfor %}",
        {"rows": ROWS},
    ),
    "unique": ("{{ rows|map(attribute='key')|unique|sort|join(',') }}", {"rows": ROWS}),
    "table": (
        "{% for r in rows %}|{% for k, v in r.items() %} {{ v }} |{% endfor %}\n{% endfor %}",
        {"rows": ROWS},
    ),
    "new ones": (
        "{% for r in rows %}{% if r.key not in seen %}{{ r.key }} {% endif %}{% endfor %}",
        {"rows": ROWS[:1_000], "seen": [f"k{i}" for i in range(500)]},
    ),
    "collect": (
        "{% set ns = namespace(out=[]) %}{% for r in rows %}{% set ns.out = ns.out + [r.key] %}"
        "{% endfor %}{{ ns.out|join(',') }}",
        {"rows": ROWS[:2_000]},
    ),
    "talk": (
        "{% for m in talk %}{% if m['role'] == 'user' %}User: {{ m['content']|trim }}\n"
        "{% elif m.role == 'assistant' %}AI: {{ m.content|trim }}\n{% endif %}{% endfor %}",
        {"talk": TALK},
    ),
    "lines": (
        "{% for l in text.splitlines() %}{{ loop.index }}: {{ l }}\n{% endfor %}",
        {"text": "a line of a log file\n" * 20_000},
    ),
    "large text": ("Summarize:\n{{ text|trim|replace('w', 'v') }}", {"text": "word " * 180_000}),
    "many variables": (
        "".join(f"{'Static text of a policy. ' * 8}{{{{ v{i} }}}}\n" for i in range(1_000)),
        {f"v{i}": f"value {i}" for i in range(1_000)},
    ),
    "many conditions": (
        "".join(
            f"{'A rule. ' * 20}{{% if f{i} %}}{{{{ v{i}|trim }}}}{{% endif %}}\n"
            for i in range(600)
        ),
        {f"{name}{i}": f"value {i}" for name in "fv" for i in range(600)},
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_real_templates_are_far_from_every_limit(name: str) -> None:
    """They give their text, within the two seconds of processor time that a bomb is allowed."""
    source, variables = CASES[name]
    before = time.process_time()

    assert len(Prompt(source)._op.fn(**variables)) > 1_000
    assert time.process_time() - before < 2 * 2
