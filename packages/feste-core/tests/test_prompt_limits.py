"""Templates that would fill the memory or run without end: refused, or over in a moment.

Each is made and rendered in a process of its own, which tells its processor time and the growth of
its memory; limits of the system kill what would exceed them by far.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from jinja2.defaults import DEFAULT_FILTERS, DEFAULT_TESTS

from feste.errors import PlainDataError, PromptError
from feste.prompt import FesteEnvironment, Prompt
from feste.prompt.costs import FILTERS, METHODS, TESTS
from feste.prompt.limits import NODE_LIMIT, TAG_LIMIT
from feste.prompt.sandbox import sandbox_with

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

#: Numbers of digits below zero, and sums that are none.
BOMBS += """
{{ 5|round(-30000000) }}
{{ [5]|map('round', -30000000)|list }}
{{ ([[1]] * 100000)|sum(start=[])|length }}
{{ ([(1,)] * 100000)|sum(none, ())|length }}
""".strip().splitlines()

#: Filters whose items are made when they are taken, with long ways to an attribute, and few results.
PATH = "{% set p = '0.' * 50000 ~ '0' %}{% set a = ['a'] * 2000 %}"
WAYS = """
map(attribute=p)
selectattr(p)
rejectattr(p)
unique(attribute=p)
sort(attribute=p)
sort(false, false, '0,' * 50000 ~ '0')
groupby(p)
min(attribute=p)
max(false, p)
sum(p)
join('', p)
""".strip().splitlines()
BOMBS += [PATH + "{{ a|" + each + "|list }}" for each in WAYS]
BOMBS += [PATH + TURNS.replace("@", "['a']|map(attribute=p)|list")]
LATER = """
r|map(attribute='real')|list
r|map('default')|list
r|reverse|list
r|select|select|list
r|select('==', -1)|first is defined
r|reject|first is defined
r|rejectattr('real')|list
d.items()|list
d|items|list
d.values()|list
d|dictsort
d.copy()
dict(d)
-1 in d.values()
d.items() == d.items()
d.keys().isdisjoint([-1])
d.keys() - []
d[t] is defined
d.get(t)
{t: 1}
'a'.startswith(t)
1.5 in range(99999)
range(99999).count(1.5)
loop.changed(r)
a // b
a % b
a is divisibleby(b)
s.find(n)
s|replace(n, '')
n in s
n not in s
'' < n in s
""".strip().splitlines()
SETS = (
    R + "{% set d = {}.fromkeys(range(99999)) %}{% set t = ('b',) * 300000 %}"
    "{% set a = 2 ** 16000 - 1 %}{% set b = 2 ** 8000 - 1 %}"
    "{% set s = 'a' * 2499 %}{% set n = 'a' * 600 ~ 'b' ~ 'a' * 600 %}"
)
BOMBS += [SETS + TURNS.replace("@", each) for each in LATER]
BOMBS += [
    R + TURNS.replace("@", "r" + "|map(attribute='real')" * 80 + "|list"),
    "{% set t = (1,) * 500000 %}{{ range(5000)|map('attr', 'x')|map('default', t)|unique|list }}",
]

BIGS = BIG + "{% set l = [big] %}{% set c = big[1:] ~ 'y' %}"
BOMBS += [
    BIGS + TURNS.replace("@", each)
    for each in ("l == [c]", "'%.1s'|format(l)", "'%.1s' % (l,)", "'{0!s:.1}'.format(l)", "c in l")
]
BOMBS += [
    BIG + "{% for i in range(99999) %}{% set c %}{{ big }}{{ big|first }}{% endset %}{% endfor %}",
    "{{ [" + "('aa ' * 333000).split()," * 30 + "]|length }}",
    "{% for a in [1] recursive %}{{ loop([('aa ' * 333000).split()]) }}{% endfor %}",
]

#: Turns with much in them.
MUCH = "{% if 1 %}{% endif %}" * 1_800
BOMBS += [
    "{% for i in range(99999) %}" + MUCH + "{% endfor %}",
    "{% for i in range(99999) if [" + "i.real," * 3_000 + "]|length == 0 %}{% endfor %}",
    "{% macro m() %}" + MUCH + "{% endmacro %}{% for i in range(99999) %}{{ m() }}{% endfor %}",
    "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}{% endmacro %}"
    "{% call m() %}" + MUCH + "{% endcall %}",
    "{% block b %}" + MUCH + "{% endblock %}{% for i in range(99999) %}{{ self.b() }}{% endfor %}",
]

#: What takes memory if it is kept.
KEPT = """
{% set a# = {}.fromkeys(range(100000)) %}
{% set a# = ('aa ' * 333000).split() %}
{% set a# = 'x' * 1000000 %}
{% set a# = '🦜' * 1000000 %}
{% set a# = [0] * 900000 %}
{% set a# = range(99999)|map('string')|list %}
{% set a# %}{{ big }}x{% endset %}
""".strip().splitlines()
BOMBS += [BIG + "".join(each.replace("#", str(i)) for i in range(200)) for each in KEPT]
BOMBS += [
    "{% macro m(n) %}{% set a = 'x' * 1000000 %}{{ m(n) }}{% endmacro %}{{ m(1) }}",
    "{% macro m(a) %}{{ m({}.fromkeys(range(99999))) }}{% endmacro %}{{ m(1) }}",
    "{{ range(1000)|map('center', 100000)|list|length }}",
    "{{ ''.join(range(1000)|map('center', 100000)) }}",
    "{{ [1]|slice(1000000)|list|length }}",
    "{{ ''.maketrans('a' * 1000000, 'b' * 1000000)|length }}",
]

#: Iterators in iterators, in which Python itself would crash.
INSIDE = (
    "{% set ns = namespace(g=[1]) %}{% for i in range(99999) %}{% set ns.g = ns.g|@ %}{% endfor %}"
)
BOMBS += [
    INSIDE.replace("@", each) + "{{ ns.g|list }}"
    for each in (
        "map('default')",
        "select('defined')",
        "batch(1)",
        "unique",
        "map('upper')|reverse",
    )
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


def test_costs_are_known() -> None:
    """Every filter and test of Jinja is in the table, and every method of plain data."""
    assert FILTERS.keys() == DEFAULT_FILTERS.keys() - {"random", "urlize"}
    assert TESTS.keys() == DEFAULT_TESTS.keys()
    in_reach = {
        name
        for value in ("", [], (), {}, {}.keys(), {}.values(), {}.items(), range(0), 0, 0.5, {0})
        for name in dir(value)
        if callable(getattr(value, name))
        and sandbox_with(()).is_safe_attribute(value, name, getattr(value, name))
    }
    assert METHODS.keys() >= in_reach


@pytest.mark.parametrize(
    "source", ["{{ x }}", "{{ x|tojson }}", "{% for i in x %}{{ i }}{% endfor %}"]
)
def test_short_values_that_print_long_texts_are_refused(source: str) -> None:
    """Lists that hold one list twice, again and again, from outside; and one text very often."""
    shared: Any = [1]
    for _ in range(30):
        shared = [shared, shared]
    before = time.process_time()
    for value in (shared, {"a": shared}):
        with pytest.raises(PlainDataError, match="repeats more than 1,000,000 parts"):
            Prompt(source)(x=value)
    for _ in range(12):
        shared = shared[0]
    for value in (shared, ["x" * 1_000_000] * 20):
        with pytest.raises(PromptError, match=r"larger|more than"):
            Prompt(source)._op.fn(x=value)
    assert time.process_time() - before < 2 * 2


def test_what_is_overwritten_is_kept_no_more() -> None:
    """A name in a loop holds one value at a time, also in macros that others call."""
    source = (
        "{% macro count(t) %}{% set words = t.split() %}{{ words|length }}{% endmacro %}"
        "{% for i in range(200) %}{% set words = text.split() %}{{ count(text) }}{% endfor %}"
    )

    assert Prompt(source)._op.fn(text="many words " * 2_000).startswith("40004000")


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
