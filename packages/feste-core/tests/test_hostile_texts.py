"""A hundred hostile texts, wherever others choose a text, through everything that Feste shows or writes."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import traceback
import warnings
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, ClassVar, NamedTuple
from xml.etree import ElementTree

import pytest

import feste
from feste import plugins, store
from feste.backend import Backend, operation
from feste.cli import main
from feste.errors import InvalidRequest, RunFailed
from feste.prompt import Prompt
from feste.report import RunReport
from feste.testing import FakeBackend

_PAYLOADS = [
    "<script>alert(1)</script>",
    "</title><script src=https://evil.test/x.js></script>",
    "</pre><img src=x onerror=alert(1)>",
    "</style><style>@import url(https://evil.test/x.css);",
    "</text></svg><svg onload=alert(1)>",
    "<a xlink:href='javascript:alert(1)'>x</a>",
    "<foreignObject><iframe src='https://evil.test'/></foreignObject>",
    "' onmouseover='alert(1)",
    '" onmouseover="alert(1)',
    "'><b onclick=alert(1)>",
    "]]><!--",
    "--><![CDATA[<script>",
    "<?xml-stylesheet href='https://evil.test'?>",
    '<!DOCTYPE x [<!ENTITY y SYSTEM "file:///etc/passwd">]>&y;',
    "&lt;script&gt;&#60;script&#62;",
    "{{ 7 * 7 }}{% raw %}",
    "%%{init: {'securityLevel': 'loose'}}%%",
    '"]; click n0 href "javascript:alert(1)"',
    "end\nsubgraph x\nclassDef y fill:#fff",
    "``` \n# heading\n[x](javascript:alert(1))",
    "[bold red]x[/] [link=https://evil.test]y[/link] [/nothing]",
    "\x1b[2J\x1b[H\x1b]0;title\x07",
    "\x1b]8;;https://evil.test\x1b\\link\x1b]8;;\x1b\\",
    "\x9b31m\x90q\x9c\x85",
    "\r\noverwritten\r",
    "\b\b\b\x7f\x0b\x0c\x00",
    "\u202egnp.exe\u202c\u2066x\u2069",
    "\u2028\u2029\ufeff\u200b",
    "\ud800 lone \udfff",
    "=HYPERLINK(1)\t+1\t-1\t@x",
    "\U0001f600\u0301" * 20,
    "a" * 3000,
    "../../../../etc/passwd",
]
#: Each has a mark of its own before it, by which it is found again.
TEXTS = [f"q{n}q{_PAYLOADS[n % len(_PAYLOADS)]}" for n in range(100)]

#: What our own pages and pictures consist of; neither can load or run anything.
TAGS = set(
    "html head meta title style body p pre b div span table thead tbody tr td th ul li details summary "
    "svg g rect path text tspan circle line polygon polyline ellipse defs marker desc".split()
)
ATTRIBUTES = set(
    "lang charset name content class style open xmlns viewbox width height role aria-label "
    "aria-labelledby id x y x1 x2 y1 y2 cx cy r rx ry d points fill stroke transform font-size "
    "text-anchor stroke-width data-key refx refy markerwidth markerheight orient marker-end preserveaspectratio".split()
)


class Outputs(NamedTuple):
    """What was shown or written, by name."""

    pages: dict[str, str]
    pictures: dict[str, str]
    texts: dict[str, str]
    charts: dict[str, str]
    data: dict[str, str]


class Refusing(Backend):
    """A provider that answers each call with an error of its own words."""

    plugin: ClassVar[str] = "refusing"

    @operation
    async def chat(self, prompt: str) -> str:
        """Refuse."""
        raise InvalidRequest(prompt)


class Talking:
    """A pass that says a text of others."""

    def __init__(self, text: str) -> None:
        self.name = text
        self.text = text

    def apply(self, graph: Any, cx: Any) -> Any:
        cx.missed(self.text)
        cx.advice(self.text, list(graph.nodes.values())[:1])
        return graph


def named(text: str) -> Any:
    """A task whose name is a text, and that fails with it where the graph says so."""

    def body(fails: bool) -> str:
        if fails:
            raise ValueError(text)
        return text

    body.__name__ = body.__qualname__ = text
    return feste.task(body)


def graph(texts: list[str]) -> list[Any]:
    nodes: list[Any] = []
    for text in texts:
        prompt = Prompt("q: {{ said }}")(said=text)
        nodes.append(FakeBackend(text).chat(prompt))
        nodes += [named(text)(False), named(text)(True), Refusing().chat(text)]
    return nodes


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Outputs]:
    """Run the texts in five graphs, small enough to be drawn node by node, and keep all that comes out."""
    folder = tmp_path_factory.mktemp("outputs")
    made = Outputs({}, {}, {}, {}, {})
    lines = io.StringIO()
    handler = logging.StreamHandler(lines)
    logger = logging.getLogger("feste")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    passes = plugins.registry().optimizations
    try:
        for n in range(0, 100, 20):
            texts = TEXTS[n : n + 20]
            passes["talking"] = Talking(texts[0])
            _run(folder, made, str(n), texts)
    finally:
        passes.pop("talking", None)
        logger.removeHandler(handler)
        logger.setLevel(level)
    made.texts["log"] = lines.getvalue()
    yield made


def _run(folder: Path, made: Outputs, n: str, texts: list[str]) -> None:
    path = folder / f"{n}.db"
    nodes = graph(texts)
    plan = feste.explain(nodes)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with pytest.raises(RunFailed) as failed:
            feste.compute(nodes, store=str(path))
    store.close()
    report = failed.value.report
    after = feste.explain(nodes, analyze=report)
    read = RunReport.from_json(json.loads(json.dumps(report.to_json())))

    def saved(what: Any, end: str) -> str:
        file = folder / f"out{end}"
        what(file)
        return file.read_text(encoding="utf-8")

    for name, one in {"plan": plan, "after": after, "report": report, "read": read}.items():
        made.texts.update({f"{name} {n}": str(one), f"{name} repr {n}": repr(one)})
        made.texts[f"{name}.txt {n}"] = saved(one.save, ".txt")
        made.pages[f"{name}.html {n}"] = saved(one.save, ".html")
        made.pages[f"{name} notebook {n}"] = one._repr_html_()
        made.data[f"{name}.json {n}"] = saved(one.save, ".json")
    made.charts[f"plan.mmd {n}"] = saved(plan.save, ".mmd")
    drawn = nodes[:80]
    made.pictures[f"graph.svg {n}"] = saved(lambda file: _draw(drawn, file), ".svg")
    made.pages[f"graph.html {n}"] = saved(lambda file: _draw(drawn, file), ".html")
    made.charts[f"graph.mmd {n}"] = saved(lambda file: _draw(drawn, file), ".mmd")
    made.pictures[f"timeline.svg {n}"] = saved(report.timeline, ".svg")
    made.pages[f"timeline.html {n}"] = saved(report.timeline, ".html")
    made.texts[f"error {n}"] = str(failed.value)
    made.texts[f"errors {n}"] = "\n".join(str(error) for error in failed.value.errors)
    made.texts[f"warnings {n}"] = "\n".join(str(one.message) for one in caught)
    made.texts[f"traceback {n}"] = "".join(
        line for error in failed.value.errors for line in traceback.format_exception_only(error)
    )
    for command in ("list", "show", "verify", "salvage"):
        made.texts[f"store {command} {n}"] = _command("store", command, str(path))
    for command in ("list", "show", "verify"):
        made.data[f"store {command} --json {n}"] = _command("store", command, str(path), "--json")
    out = folder / f"{n}.jsonl"
    made.texts[f"export {n}"] = _command("store", "export", str(path), "--out", str(out))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    made.data[f"export file {n}"] = json.dumps(rows)


def _draw(nodes: list[Any], file: Path) -> None:
    feste.task(_gather)(*nodes).visualize(file)


def _gather(*values: Any) -> int:
    return len(values)


def _command(*arguments: str) -> str:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        main(list(arguments))
    return shown.getvalue()


class Elements(HTMLParser):
    """The elements of a page as a browser takes it apart."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.styles: list[str] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.styles += [value or "" for name, value in attrs if name == "style"]

    def handle_data(self, data: str) -> None:
        self.text += data

    def handle_comment(self, data: str) -> None:
        self.tags.add("a comment")

    def handle_pi(self, data: str) -> None:
        self.tags.add("an instruction")


def marks(text: str) -> set[str]:
    return {text for text in re.findall(r"q\d+q", text) if int(text[1:-1]) < 100}


def own(n: str) -> set[str]:
    return {f"q{k}q" for k in range(int(n), int(n) + 20)}


def test_pages_hold_nothing_that_loads_or_runs(outputs: Outputs) -> None:
    """A browser's parser finds our own elements and attributes, whatever the texts are."""
    assert len(outputs.pages) == 50
    for name, page in outputs.pages.items():
        found = Elements(page)

        assert found.tags <= TAGS, name
        assert found.attributes <= ATTRIBUTES, name
        assert not re.search(r"url|q\d+q", " ".join(found.styles)), name
        assert len(marks(found.text)) >= 5, name  # the texts are there
    for n in range(0, 100, 20):
        assert marks(Elements(outputs.pages[f"graph.html {n}"]).text) >= own(str(n))


def test_pictures_are_sound_and_hold_nothing_that_loads_or_runs(outputs: Outputs) -> None:
    """A real XML parser reads each; it finds shapes and texts alone."""
    assert len(outputs.pictures) == 10
    for name, picture in outputs.pictures.items():
        root = ElementTree.fromstring(picture)
        elements = list(root.iter())
        tags = {element.tag.removeprefix("{http://www.w3.org/2000/svg}") for element in elements}
        attributes = {key.lower() for element in elements for key in element.attrib}

        assert tags <= TAGS, name
        assert attributes <= ATTRIBUTES, name
        assert "<?" not in picture, name
        assert "<!" not in picture, name
        assert marks("".join(root.itertext())) >= own(name.split()[1]), name


def test_texts_cannot_act_on_a_terminal(outputs: Outputs) -> None:
    """Reports, plans, errors, warnings, logs and commands have no control characters but line ends and tabs."""
    for name, text in outputs.texts.items():
        wrong = sorted({c for c in text if not c.isprintable() and c not in "\n\t"})

        assert not wrong, f"{name}: {wrong}"
    for name in ("errors", "traceback", "plan", "store show", "error"):
        assert all(marks(outputs.texts[f"{name} {n}"]) for n in range(0, 100, 20)), name
    assert marks(outputs.texts["log"])
    assert marks(outputs.texts["errors 0"]) >= own("0")


def test_charts_hold_boxes_and_edges_alone(outputs: Outputs) -> None:
    """Each line of a Mermaid chart is one of ours: no directive, link or click comes from a text."""
    label = r'"[^"]*"'
    line = re.compile(
        rf"\s*(flowchart (TB|LR)|n\d+\S{{1,2}}{label}\S{{1,2}}:::\w+Box|n\d+ -->(\|{label}\|)? n\d+"
        rf"|subgraph g\d+\[{label}\]|end|classDef \w+Box [\w:#,. -]+|class [n\d,]+ \w+Box|%% [^%{{}}]*)"
    )
    for name, chart in outputs.charts.items():
        wrong = [one for one in chart.splitlines() if one and not line.fullmatch(one)]

        assert wrong == [], name
        assert all(c.isprintable() or c == "\n" for c in chart), name
        assert "<" not in chart.replace("<br/>", ""), name


def test_data_is_json_and_holds_the_texts_as_they_are(outputs: Outputs) -> None:
    """What programs read is escaped by JSON alone: nothing is lost of a text, nothing added."""
    for name, data in outputs.data.items():
        json.loads(data)

        assert data.isascii(), name
    for n in range(0, 100, 20):
        rows = json.loads(outputs.data[f"export file {n}"])
        asked = {row["request"]["model"] for row in rows}

        assert asked == set(TEXTS[n : n + 20])


def test_prompts_stay_out_of_pictures(tmp_path: Path) -> None:
    """A picture shows how a template begins, which is code, and no text that is put into one or sent."""
    llm = FakeBackend()
    template = Prompt("Translate: {{ text }}")
    nodes = [llm.chat("secret one"), llm.chat(template(text="secret two"))]
    nodes.append(llm.chat([{"role": "user", "content": "secret three"}]))
    for end in (".svg", ".html", ".mmd"):
        _draw(nodes, file := tmp_path / f"graph{end}")

        assert "Translate" in file.read_text(), end
        assert "secret" not in file.read_text(), end
