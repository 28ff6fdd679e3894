"""Files that prompts include: under one root, read when the prompt is made, a part of it then."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from feste.draw import Determinism
from feste.errors import ConfigError, PromptError, UndefinedVariable
from feste.prompt import ChatPrompt, FesteEnvironment, Prompt, files
from feste.prompt.limits import SOURCE_LIMIT
from feste.testing import FakeBackend, fresh_draws

HERE = os.path.basename(__file__)


class Folder:
    """A folder of templates."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __call__(self, /, **files: str) -> FesteEnvironment:
        """Write files, dots in their names as double underscores, and return an environment."""
        for name, text in files.items():
            file = self.path / name.replace("__", "/")
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
        return FesteEnvironment(root=self.path)


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    (tmp_path / "prompts").mkdir()
    return Folder(tmp_path / "prompts")


def rendered(source: str, environment: FesteEnvironment, **variables: Any) -> str:
    """The text, made in one piece; made in pieces it must be the same."""
    node = Prompt(source, environment=environment)(**variables)
    text: str = node._node.op.fn(**node._node.kwargs)
    assert node.compute() == text
    return text


# --- what a template can do with files ------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{% include 'rules' %}!", "Be kind, Ada.!"),
        ("{% include 'deep/rules' %}", "deep Be kind, Ada."),
        ("{% for name in ['Bo', 'Cy'] %}{% include 'rules' %} {% endfor %}", "Be kind, Bo. Be kind, Cy. "),
        ("{% include 'sets' %}{{ x|default('-') }}", "1-"),
        ("{% set x = 2 %}{% include 'sets' %}{{ x }}", "12"),
        ("{% include 'none' ignore missing %}{{ name }}", "Ada"),
        ("{% import 'tools' as t %}{{ t.bold('a') }}{{ t.star }}", "<*a*>*"),
        ("{% import 'tools' as t with context %}{{ t.bold('a') }}", "<*a*>"),
        ("{% from 'tools' import bold, star as s %}{{ bold(s) }}", "<***>"),
        ("{% from 'tools' import bold %}{% macro m() %}{{ bold(1) }}{% endmacro %}{{ m() }}", "<*1*>"),
        ("{% for i in [1, 2] %}{% from 'tools' import bold %}{{ bold(i) }}{% endfor %}", "<*1*><*2*>"),
        ("{% import 'tools' as t %}{% import 'tools' as u %}{{ t.star ~ u.star }}", "**"),
        ("{% import 'chosen' as c %}{{ c.hi }}", "Hallo"),
        ("{% from 'again' import twice %}{{ twice('a') }}", "<*a*><*a*>"),
        ("{% extends 'base' %}", "[top|]"),
        ("{% extends 'base' %}{% block body %}B{% endblock %}", "[top|B]"),
        ("{% extends 'base' %}{% block head %}{{ super() }}+{% endblock %}", "[top+|]"),
        ("{# c #}\n{% extends 'base' %}\n{% set name = 'Bo' %}\n"
         "{% block body %}{% include 'rules' %}{% endblock %}\n", "[top|Be kind, Bo.]"),
        ("{% extends 'middle' %}{% block body %}{{ super() }}C{% endblock %}", "[top|MC]"),
        ("{% extends 'middle' %}{% from 'tools' import bold %}"
         "{% block body %}{{ bold('C') }}{% endblock %}", "[top|<*C*>]"),
        ("{% include 'middle' %}", "[top|M]"),
        ("{% include 'base' %}{% include 'base' %}", "[top|][top|]"),
        ("{% raw %}{% include 'x' %}{% endraw %}{# {% include 'x' %} #}", "{% include 'x' %}"),
    ],
)  # fmt: skip
def test_templates_are_made_of_files(source: str, text: str, folder: Folder) -> None:
    """Files are included, imported and extended as in Jinja, in one step and in pieces."""
    environment = folder(
        rules="Be kind, {{ name }}.\n",
        deep__rules="deep {% include 'rules' %}",
        sets="{% set x = 1 %}{{ x }}",
        tools="dropped{% set star = '*' %}{% macro _in(a) %}{{ star }}{{ a }}{{ star }}{% endmacro %}"
        "{% macro bold(a) %}<{{ _in(a) }}>{% endmacro %}",
        chosen="{% if 'de' == 'de' %}{% set hi = 'Hallo' %}{% else %}{% set hi = 'Hi' %}{% endif %}",
        again="{% from 'tools' import bold %}{% macro twice(a) %}{{ bold(a) ~ bold(a) }}{% endmacro %}",
        base="[{% block head %}top{% endblock %}|{% block body %}{% endblock %}]\n",
        middle="{% extends 'base' %}{% block body %}M{% endblock %}",
    )
    variables = Prompt(source, environment=environment).variables() & {"name"}

    assert rendered(source, environment, **dict.fromkeys(variables, "Ada")) == text


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("\n{% include name %}", "line 2: include takes one name of a file in quotes"),
        ("{% include 'a' ~ name %}", "in quotes: the files that a prompt is made of are read before"),
        ("{% include ['a', 'b'] %}", "one name of a file"),
        ("{% import name as x %}", "import takes one name"),
        ("{% extends name %}", "extends takes one name"),
        ("{% include 'none' %}", "there is no file 'none' in "),
        ("{% include 'a' without context %}", "leave out 'without context'"),
        ("{% include 'self' %}", "'self' includes itself: self > self"),
        ("{% include 'one' %}", "'one' includes itself: one > two > one"),
        ("{% extends 'loop' %}", "'loop' includes itself"),
        ("{% import 'self' as s %}", "'self' includes itself"),
        ("{% include 'wrong' %}", "line 2 of 'wrong': "),
        ("{% include 'bad' %}", "line 1 of 'bad': "),
        ("{% from 'a' import b %}", "'a' defines no 'b'"),
        ("text {% extends 'base' %}", "extends stands once, before anything else"),
        ("{% if 1 %}{% extends 'base' %}{% endif %}", "extends stands once"),
        ("{% extends 'base' %}{% extends 'base' %}", "extends stands once"),
        ("{% extends 'base' %}lost", "what stands outside the blocks"),
        ("{% extends 'base' %}{% block bdy %}{% endblock %}", "'base' has no block 'bdy'. Did you mean 'body'"),
        ("{% extends 'base' %}{% block body %}{{ super() }}{{ super() }}{% endblock %}", "once in a block"),
        ("{% extends 'base' %}{% block body %}{{ super()|upper }}{% endblock %}", "by itself"),
        ("{% include 'must' %}", "the block 'x' is required"),
        ("{% extends 'base' %}{% block body %}{{ self.body() }}{% endblock %}", "no self"),
        ("{% include 'deep0' %}", "more than 32 levels"),
        ("{% include 'large' %}" * 3, "with its files it is larger than 262,144 bytes"),
        ("{% include 'twice0' %}", "with its files it is larger"),
        ("{% include 'huge' %}", "'huge' is larger than 262,144 bytes"),
        ("{% include 'latin' %}", "'latin' is not UTF-8"),
    ],
)  # fmt: skip
def test_wrong_files_are_refused_when_the_prompt_is_made(
    source: str, said: str, folder: Folder
) -> None:
    """The error names the template, the line, the file, and what to do; it is the user's own line."""
    many = {f"deep{i}": f"{{% include 'deep{i + 1}' %}}" for i in range(40)} | {"deep40": ""}
    many |= {f"twice{i}": f"{{% include 'twice{i + 1}' %}}" * 8 for i in range(20)}
    environment = folder(
        a="a",
        self="{% include 'self' %}",
        one="{% include 'two' %}",
        two="{% include 'one' %}",
        loop="{% extends 'loop' %}",
        wrong="\n{{ x",
        bad="{{ x|nofilter }}",
        base="{% block body %}{% endblock %}",
        must="{% block x required %}{% endblock %}",
        large="x" * (SOURCE_LIMIT // 3),
        huge="x" * (SOURCE_LIMIT + 1),
        twice20="",
        **many,
    )
    (folder.path / "latin").write_bytes(b"\xe9")
    with pytest.raises(PromptError) as caught:
        Prompt(source, environment=environment)

    assert said in str(caught.value)
    assert HERE in caught.value.origin


def test_without_a_root_files_are_refused_with_the_fix() -> None:
    """An environment without a folder reads nothing, whoever wrote the template."""
    for source in ("{% include 'a' %}", "{% extends '/etc/passwd' %}", "{% import 'os' as os %}"):
        with pytest.raises(PromptError, match=r'FesteEnvironment\(root="prompts"\)'):
            Prompt(source)


@pytest.mark.parametrize("root", ["no-such-folder", "", __file__, "\0"])
def test_a_root_is_a_folder(root: str) -> None:
    """A misspelt one is found where it is written."""
    with pytest.raises(ConfigError, match="is no folder") as caught:
        FesteEnvironment(root=root)

    assert HERE in caught.value.origin


def test_errors_while_rendering_name_file_and_line(folder: Folder) -> None:
    """A line of an included file is told as its own."""
    environment = folder(part="\n{{ x.y }}")
    with pytest.raises(PromptError, match=r"line 2 of 'part': .*'y'"):
        rendered("{% include 'part' %}", environment, x={})


# --- a part of the prompt -------------------------------------------------------------------------


def test_files_count_for_the_prompt(folder: Folder, tmp_path: Path) -> None:
    """Their variables are the prompt's, their text counts for its identity, its path does not."""
    environment = folder(part="{{ a }}")
    source = "{% include 'part' %}{{ b }}"
    one = Prompt(source, environment=environment)
    with pytest.raises(UndefinedVariable, match="'a'"):
        one(b=1)
    folder(part="{{ a }}.")
    other = Prompt(source, environment=environment)
    shutil.copytree(folder.path, tmp_path / "copy")
    copy = Prompt(source, environment=FesteEnvironment(root=tmp_path / "copy"))

    assert one.variables() == {"a", "b"}
    assert one != other == copy
    assert one._op.identity != other._op.identity == copy._op.identity
    assert [p._op.fn(a=1, b=2) for p in (one, other)] == ["12", "1.2"]


def test_a_changed_file_is_noticed_by_a_later_run(folder: Folder, tmp_path: Path) -> None:
    """A rerun takes the stored answer, and buys another one for another text."""
    sent = []
    for text in ("kind", "kind", "brief"):
        environment = folder(rules=f"Be {text}. ")
        fresh_draws()
        llm = FakeBackend()
        ask = Prompt("{% include 'rules' %}{{ q }}", environment=environment)
        llm.chat(ask(q="Why?")).compute(store=tmp_path / "runs.db")
        sent.append(len(llm.requests))

    assert sent == [1, 0, 1]


def test_prompts_travel_with_their_files(folder: Folder) -> None:
    """Where a prompt is unpickled, and joined and rendered, there is no such folder."""
    environment = folder(part="{{ a }}", tools="{% macro m() %}m{% endmacro %}")
    prompt = Prompt(
        "{% import 'tools' as t %}{% include 'part' %}{{ t.m() }}", environment=environment
    )
    chat = ChatPrompt(prompt, "{% include 'part' %}", environment=environment)
    data = pickle.dumps([prompt, chat, prompt(a=1)])
    shutil.rmtree(folder.path)
    again, talk, node = pickle.loads(data)

    assert ("<" + again + ">")._op.fn(a="x") == "<xm>"
    assert [m["content"] for m in talk._op.fn(a="x")] == ["xm", "x"]
    assert node.compute() == "1m"
    assert again == prompt


def test_joined_prompts_have_the_files_of_both(folder: Folder) -> None:
    """Unless a file has changed in between."""
    environment = folder(a="A", b="B")
    one = Prompt("{% include 'a' %}", environment=environment)
    joined = one + Prompt("{% include 'b' %}{% include 'a' %}", environment=environment)
    folder(a="C")
    with pytest.raises(PromptError, match="'a' has changed"):
        one + Prompt("{% include 'a' %}", environment=environment)

    assert joined._op.fn() == "ABA"


def test_filters_and_impure_names_in_files_count(folder: Folder) -> None:
    """What an included file uses, the prompt uses."""
    environment = folder(part="{{ now() }}")
    environment.globals["now"] = lambda: "now"
    environment.impure.add("now")
    prompt = Prompt("{% include 'part' %}", environment=environment)

    assert prompt.variables() == set()
    assert prompt()._node.determinism is Determinism.SAMPLE


def test_limits_hold_over_files(folder: Folder) -> None:
    """Steps in a file are steps of the prompt."""
    environment = folder(turns="{% for i in xs %}{% endfor %}")
    source = "{% include 'turns' %}" * 2

    assert rendered(source, environment, xs=[0] * 50_000) == ""
    with pytest.raises(PromptError, match="steps"):
        rendered(source, environment, xs=[0] * 50_001)


# --- nothing outside the root ---------------------------------------------------------------------

OUTSIDE = """
/etc/passwd //etc/passwd ///etc/passwd /proc/self/environ /dev/zero /dev/null /dev/stdin ~/secret
~root/secret ../secret ./../secret a/../../secret sub/../../secret sub/../../prompts/ok .. . ./ok
../prompts/ok sub/../ok sub//ok /ok ok/ ok/. ok/.. /{root}/ok {secret} file://{secret} file:{secret}
..\\\\secret ..\\\\..\\\\secret \\\\\\\\host\\\\share\\\\secret C:\\\\secret C:/secret C:secret ok:stream ok::$DATA
%2e%2e/secret ..%2fsecret %2e%2e%2fsecret ..%252fsecret %00 ok%00 ..;/secret ..../secret .../secret
ok. ok.. sub./ok ．．/secret ‥/secret ..∕secret ..⁄secret ok​ ‮ko OK Ok ＯＫ
link link/secret linkdir/secret linkdir/../secret chain up/secret up/up/secret sub/up/secret loop
dangling fifo socket sub device
""".split()  # fmt: skip
OUTSIDE += [
    "",
    " ",
    "ok ",
    " ok",
    "ok\\n",
    "ok\\0",
    "\\0",
    "ok\\0/../../secret",
    "..\\0/secret",
    "a" * 300,
]
OUTSIDE += [
    "../" * 40 + "etc/passwd",
    "sub/" * 2000 + "ok",
    "\\ud800",
    "$HOME/secret",
    "${{HOME}}/secret",
]

READER = """
import json, os, sys
from feste.errors import PromptError
from feste.prompt import FesteEnvironment, Prompt
root, paths = sys.argv[1], json.load(sys.stdin)
opened, inside = [], os.path.realpath(root)
environment = FesteEnvironment(root=root)
made = Prompt("{% include 'ok' %}{% include 'sub/ok' %}{% include 'linked' %}", environment=environment)
assert made._op.fn() == "fine" * 3
def hook(event, args):
    if event == "open":
        opened.append(os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else repr(args[0]))
sys.addaudithook(hook)
read = []
for path in paths:
    for source in ("{% include '" + path + "' %}", "{% import '" + path + "' as x %}",
                   "{% extends '" + path + "' %}", "{% include '" + path + "' ignore missing %}"):
        try:
            text = Prompt(source, environment=environment)._op.fn()
        except PromptError as error:
            assert "SECRET" not in str(error)
        else:
            if "ignore" not in source or text:
                read.append([path, text])
names = {"ok", "sub", "linked", root, inside}
print(json.dumps({"read": read, "outside": [name for name in opened if name not in names]}))
"""


def test_no_path_leads_out_of_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More than 60 paths, with files planted outside: none is opened, as an audit hook sees it."""
    import json
    import socket

    root = tmp_path / "prompts"
    (root / "sub").mkdir(parents=True)
    for file in (root / "ok", root / "sub" / "ok"):
        file.write_text("fine")
    (tmp_path / "secret").write_text("SECRET")
    (root / "linked").symlink_to("sub/ok")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "linkdir").symlink_to(tmp_path)
    (root / "chain").symlink_to("link")
    (root / "up").symlink_to("..")
    (root / "sub" / "up").symlink_to("../..")
    (root / "loop").symlink_to("loop")
    (root / "dangling").symlink_to(tmp_path / "nothing")
    (root / "device").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo")
    listening = socket.socket(socket.AF_UNIX)
    monkeypatch.chdir(root)  # the path of a socket must be short
    listening.bind("socket")
    monkeypatch.undo()
    paths = [p.format(root=root, secret=tmp_path / "secret") for p in OUTSIDE]
    done = subprocess.run(
        [sys.executable, "-c", READER, str(root)],
        input=json.dumps(paths),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    listening.close()

    assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(paths)) >= 60
    assert json.loads(done.stdout) == {"read": [], "outside": []}


def test_a_file_that_becomes_a_link_meanwhile_is_not_followed(tmp_path: Path) -> None:
    """While another thread swaps a file, and its folder, for links, nothing else is ever read."""
    root, other = tmp_path / "prompts", tmp_path / "other"
    for place, text in ((root, "fine"), (other, "SECRET")):
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "part").write_text(text)
    environment = FesteEnvironment(root=root)
    ended = threading.Event()

    def swap() -> None:
        while not ended.is_set():
            for name in ("sub", "sub/part"):
                (root / name).rename(root / "away")
                (root / name).symlink_to(other / name)
                (root / name).unlink()
                (root / "away").rename(root / name)
                ended.wait(0.002)

    swapper = threading.Thread(target=swap)
    swapper.start()
    texts, until = set(), time.monotonic() + 1
    try:
        while time.monotonic() < until:
            try:
                texts.add(Prompt("{% include 'sub/part' %}", environment=environment)._op.fn())
            except PromptError:
                texts.add("refused")
    finally:
        ended.set()
        swapper.join()

    assert texts <= {"fine", "refused"}
    assert len(texts) == 2


@pytest.mark.parametrize("name", ["sub", "sub/part"])
def test_a_link_put_there_between_look_and_open_is_not_followed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same at the worst moment: the path was found sound, then it changes."""
    root, other = tmp_path / "prompts", tmp_path / "other"
    for place, text in ((root, "fine"), (other, "SECRET")):
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "part").write_text(text)
    opened = files._opened

    def swapped(*args: Any) -> int:
        (root / name).rename(root / "away")
        (root / name).symlink_to(other / name)
        return opened(*args)

    monkeypatch.setattr(files, "_opened", swapped)
    with pytest.raises(PromptError, match="sub/part"):
        Prompt("{% include 'sub/part' %}", environment=FesteEnvironment(root=root))
