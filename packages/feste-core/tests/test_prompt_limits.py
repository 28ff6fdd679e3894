"""Templates that would fill the memory or run without end: refused, or over in a moment.

Each is made and rendered in a process of its own, which tells its processor time and the growth of
its memory; limits of the system kill what would exceed them by far.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from feste.errors import PromptError
from feste.prompt import FesteEnvironment, Prompt
from feste.prompt.limits import NODE_LIMIT, TAG_LIMIT

BOMBS = """
{{ 'a' * 500000000 }}
{{ 500000000 * 'a' }}
{{ [1] * 500000000 }}
{{ (1, 2) * 500000000 }}
{{ ('a' * 1000000) * 1000000 }}
{{ 10 ** (10 ** 10) }}
{{ 2 ** 500000000 }}
{{ (2 ** 10000) ** 10000 }}
{% set ns = namespace(n=3) %}{% for i in range(99) %}{% set ns.n = ns.n * ns.n %}{% endfor %}
{{ 'a'.center(500000000) }}
{{ 'a'.ljust(500000000) }}
{{ 'a'.rjust(500000000) }}
{{ 'a'.zfill(500000000) }}
{% for i in [1] %}{{ 'a'.zfill(500000000) }}{% endfor %}
{{ ('\\t' * 1000).expandtabs(500000) }}
{{ ('\\t' * 1000).expandtabs(tabsize=500000) }}
{{ 'a'|center(500000000) }}
{{ 'a'|center(width=500000000) }}
{{ ['a']|map('center', 500000000)|list }}
{{ 'a'|indent(500000000, true) }}
{{ 'a'|indent('x' * 1000000, true)|indent('x' * 1000000, true) }}
{{ [1]|batch(500000000, 'x')|list }}
{{ [1]|slice(500000000)|list }}
{{ 1.5|round(500000000, 'ceil') }}
{{ '%500000000d' % 1 }}
{{ '%*d' % (500000000, 1) }}
{{ '%.500000000f' % 1 }}
{{ '%500000000s'|format('x') }}
{{ '{:>500000000}'.format('x') }}
{{ '{:{w}}'.format('x', w=500000000) }}
{{ '{a:>500000000}'.format_map({'a': 1}) }}
{{ ('{0}' * 1000).format('x' * 100000) }}
{{ ('%(a)s' * 1000) % {'a': 'x' * 100000} }}
{{ ('x' * 100000).replace('x', 'y' * 100000) }}
{{ ('x' * 100000).replace('', 'y' * 100000) }}
{{ ('x' * 100000)|replace('x', 'y' * 100000) }}
{{ ('x' * 100000)|replace(new='y' * 100000, old='x') }}
{{ ('{0}' * 20).format('x' * 100000, *range(19)) }}
{{ ('x' * 100000).join('y' * 100000) }}
{{ ('y' * 100000)|join('x' * 100000) }}
{{ range(100000)|join('x' * 100000) }}
{{ ('x' * 100000).translate({120: 'y' * 100000}) }}
{{ ('x y ' * 10000)|wordwrap(1, wrapstring='z' * 100000) }}
{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}
{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}
{% set r = range(100000) %}{% for i in r %}{% for j in r if false %}{% endfor %}{% endfor %}
{% set r = range(100000) %}{% for i in r %}{{ r|sum }}{% endfor %}
{% for i in range(100000) %}{{ 'xxxxxxxxxxxxxxxxxxxx' }}{% endfor %}
{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}
{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}
{% set ns = namespace(s=[1]) %}{% for i in range(99) %}{% set ns.s = ns.s + ns.s %}{% endfor %}
{% set ns = namespace(s='xx') %}{% for i in range(99) %}{% set s %}{{ ns.s }}{{ ns.s }}{% endset %}{% set ns.s = s %}{% endfor %}
{% macro m(n) %}{{ m(n) }}{{ m(n) }}{% endmacro %}{{ m(1) }}
{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}
{% macro m() %}{% for i in range(1000) %}xxxxxxxxxx{% endfor %}{% endmacro %}{% for i in range(200) %}{{ m() }}{% endfor %}
{{ range(500000000)|list }}
""".strip().splitlines()


#: A list that holds itself twice, again and again, is short; its text is not.
NESTED = """
{% set ns.a = [ns.a, ns.a] %}
{% set ns.a = namespace(a=ns.a, b=ns.a) %}
{% set ns.a = range(2)|map('attr', 'none')|map('default', ns.a)|list %}
""".strip().splitlines()
NEST = "{%% set ns = namespace(a=['x'], b=['x']) %%}{%% for i in range(40) %%}%s{%% endfor %%}%s"
BOMBS += [NEST % (turn, "{{ ns.a|string|length }}") for turn in NESTED]
BOMBS += """
{% set ns = namespace(a='x' * 1000000) %}{% for i in range(99) %}{% set ns.a = [ns.a] %}{% endfor %}{{ ns.a|pprint|length }}
{{ ('{0}' * 200000).format(2 ** 14000) }}
{{ ('{0:f}' * 200000).format(1e308) }}
{{ ('%()s' * 1000) % {'': 'x' * 100000} }}
{{ '%(a(b)c)500000000d' % {'a(b)c': 1} }}
{{ '%%%500000000d' % 1 }}
{{ ([2 ** 14000] * 1000000)|string|length }}
""".strip().splitlines()

#: What costs much with little text: copies, searches, sorts and calls, over and over.
R, BIG = "{% set r = range(99999)|list %}", "{% set big = 'x' * 1000000 %}"
TURNS = "{% for i in range(99999) %}{% if @ %}{% endif %}{% endfor %}"
OVER = """
r[:]
r[::-1]
r|sort
r|list
r|sum
r.count(1)
-1 is in r
r ~ ''
cycler(*r)
m(*r)
big[1:]
'y' in big
big == big ~ ''
big is lower
big is gt('y')
big.islower()
big.count('y')
big.find('y')
big.upper()
big.split('y')
big|striptags
big|urlencode
big|e
big|string|length
big.rfind('x' * 250000 ~ 'y' ~ 'x' * 250000)
big.strip('y' * 500000 ~ 'x')
big|trim('y' * 500000 ~ 'x')
big|unique|list
[big]|upper
[big]|wordcount
[[big]]|map('wordcount')|list
[r]|pprint
[r]|tojson
a * a
""".strip().splitlines()
SETS = R + BIG + "{% set a = 2 ** 8000 %}{% macro m() %}{{ varargs|length }}{% endmacro %}"
BOMBS += [SETS + TURNS.replace("@", each) for each in OVER]
BOMBS += [
    BIG + "{{ range(5000)|map('attr', 'x')|map('default', big)|map('upper')|list|length }}",
    "{% set p = '🦜' * 260000 %}{{ range(5000)|map('attr', 'x')|map('default', p)|map('upper')|list }}",
    "{{ ('a' * 1000000)|sort|length }}",
    "{{ ('a' * 1000000)|batch(1)|list|length }}",
    "{{ ('a ' * 500000)|title|length }}",
    "{{ ('\\n' * 1000000)|wordwrap(79)|length }}",
    "{% set b = '<>&' * 300000 %}{% for i in range(99) %}{% if b|striptags %}{% endif %}{% endfor %}",
    "{% set f = '{0}' * 90000 %}{% for i in range(99) %}{% if f.format(1) %}{% endif %}{% endfor %}",
    "{% set f = '%%' * 90000 %}{% for i in range(999) %}{% if f % () %}{% endif %}{% endfor %}",
    "{% for i in [1, 1] recursive %}{{ loop([1, 1]) }}{{ loop([1, 1]) }}{% endfor %}",
    "{% macro m(n) %}{% call m(n) %}{% endcall %}{% endmacro %}{{ m(1) }}",
    "{% set ns = namespace(s='') %}{% for i in range(99999) %}{% set ns.s = ns.s ~ 'xxxxxxxxxx' %}{% endfor %}",
]

#: Sources that are hard to read or to compile.
BOMBS += [
    "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "{{ " + "[" * 10_000 + "1" + "]" * 10_000 + " }}",
    "{{ " + "{'a':" * 10_000 + "1" + "}" * 10_000 + " }}",
    "{{ " + "not " * 10_000 + "1 }}",
    "{{ " + "-" * 20_000 + "1 }}",
    "{{ " + "9" * 200_000 + " }}",
    "{{ 0x" + "f" * 200_000 + " }}",
    "{{ 1 }}" * 37_000,
    "{% if 1 %}" * 5_000 + "{% endif %}" * 5_000,
    "{{" * 130_000,
    "{%" * 130_000,
    "{# " * 87_000,
    "\n" * 262_000 + "{{",
    " " * 250_000 + "{%- x %}",
    "x" * 1_000_000,
]

MEASURE = """
import json, os, resource, sys
from feste.errors import PromptError
from feste.prompt import Prompt
Prompt("{% for i in [1] %}{{ i|tojson }}{% endfor %}")._op.fn()  # all is imported
for line in sys.stdin:
    source = json.loads(line)
    out, into = os.pipe()
    child = os.fork()
    if not child:
        status = open("/proc/self/status").read() if os.path.exists("/proc/self/status") else ""
        if status:
            data = (int(status.split("VmData:")[1].split()[0]) << 10) + (256 << 20)
            resource.setrlimit(resource.RLIMIT_DATA, (data, data))
        resource.setrlimit(resource.RLIMIT_CPU, (10, 11))
        before = resource.getrusage(resource.RUSAGE_SELF)
        try:
            what = f"made {len(Prompt(source)._op.fn())}"
        except PromptError as error:
            what = f"refused: {error}"
        except BaseException as error:
            what = f"{type(error).__name__}: {error}"
        after = resource.getrusage(resource.RUSAGE_SELF)
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        unit = 1 if sys.platform == "darwin" else 1024
        grown = (after.ru_maxrss - before.ru_maxrss) * unit
        os.write(into, json.dumps([what[-300:], cpu, grown]).encode())
        os._exit(0)
    os.close(into)
    with os.fdopen(out, "rb") as told:
        print((told.read() or b'["killed", 99, 0]').decode(), flush=True)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def measure() -> Iterator[Callable[[str], Any]]:
    """Measures a bomb: what came of it, seconds of processor time, bytes."""
    path = os.pathsep.join(p for p in sys.path if p)
    child = subprocess.Popen(
        [sys.executable, "-c", MEASURE],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdin is not None and child.stdout is not None
    write, read = child.stdin, child.stdout

    def measured(source: str) -> Any:
        write.write(json.dumps(source) + "\n")
        write.flush()
        return json.loads(read.readline())

    with child:
        yield measured
        write.close()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a process for each template takes fork")
@pytest.mark.parametrize("number", range(len(BOMBS)), ids=lambda i: ascii(BOMBS[i])[:40])
def test_bombs_are_refused(number: int, measure: Callable[[str], Any]) -> None:
    """A template cannot fill the memory or run without end; the limit is named.

    Each is over within two seconds of processor time; a busy machine may count twice of that.
    """
    what, seconds, grown = measure(BOMBS[number])

    assert what.startswith("refused: ")
    assert any(word in what for word in SAID), what
    assert seconds < 2 * 2
    assert grown < 64 << 20


#: Every refusal names the limit, or what in the template is wrong.
SAID = "more than|larger|too|width|field|recursion|Overf|digits|expected|line|Jinja".split("|")


def test_ordinary_loops_are_far_from_the_limit() -> None:
    """Two thousand documents, looked at in each turn as prompts do, are no bomb."""
    source = (
        "{% for d in docs %}{{ loop.index }}/{{ docs|length }} {{ d.title|trim|upper }}"
        "{% if d.tags and 'a' in d.tags and d.text.startswith('x') and d.title is not none %}"
        "{{ d.text[:20]|replace('x', 'y') }}{% endif %}{{ ', ' if not loop.last else '' }}{% endfor %}"
        "{% set ns = namespace(names=[]) %}{% for d in docs[:500] %}"
        "{% set ns.names = ns.names + [d.title] %}{% endfor %}{{ ns.names|sort|join(' ')|length }}"
    )
    docs = [{"title": f" t{i}", "tags": ["b", "a"], "text": "x" * 100} for i in range(2_000)]

    assert Prompt(source)._op.fn(docs=docs).startswith("1/2000 T0yyyyy")


def test_parts_are_counted(tmp_path: Any) -> None:
    """A template may have so many statements and expressions, not one more, with its files."""
    (tmp_path / "one").write_text("{{ 1 }}")
    environment = FesteEnvironment(root=tmp_path)
    Prompt("{{ 1 }}" * (TAG_LIMIT - 1) + "{% include 'one' %}", environment=environment)
    Prompt("{{ [" + "1," * (NODE_LIMIT - 10) + "]|length }}")
    for source in (
        "{{ 1 }}" * TAG_LIMIT + "{% include 'one' %}",
        "{{ [" + "1," * NODE_LIMIT + "]|length }}",
    ):
        with pytest.raises(PromptError, match="more than 2,000 statements and expressions"):
            Prompt(source, environment=environment)
