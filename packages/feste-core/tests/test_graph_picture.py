"""Pictures of graphs: what is drawn, where it stands, and that no label can break out."""

from __future__ import annotations

import re
from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import feste
from feste.errors import ConfigError
from feste.prompt import ChatPrompt, Prompt
from feste.report import Box, draw_mermaid, draw_svg
from feste.report.layers import depths
from feste.report.layout import arrange
from feste.report.svg import Rect, fit, width_of
from feste.testing import FakeBackend

SVG = "{http://www.w3.org/2000/svg}"
KINDS = ("prompt", "call", "task", "data")
HOSTILE = [
    "a \"quoted\" <b> & 'c'",
    "]]> <!-- --> <![CDATA[ x",
    "</title></svg><script>alert(1)</script>",
    "&amp; &#60; &nosuch;",
    "two\nlines\r\nand a\ttab",
    "`code` **bold** _it_ end",
    "end",
    "(paren) [bracket] {brace} | pipe; --> n0 %% x",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "click n0 call x()",
    "#quot; #35; :::failed",
]


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[Box], list[tuple[str, str]]]:
    count = draw(st.integers(1, 24))
    boxes = [
        Box(
            f"k{number}",
            draw(st.sampled_from(["chat", "summarize a long book", "\u7ffb\u8bd1", ""])),
            draw(st.sampled_from(KINDS)),
            detail=draw(st.sampled_from(["", "gpt-5-mini"])),
            group=draw(st.sampled_from(["", "", "g", "h"])),
            output=draw(st.booleans()),
            state=draw(st.sampled_from(["", "done", "failed", "skipped"])),
        )
        for number in range(count)
    ]
    pairs = list(combinations(range(count), 2))
    chosen = draw(st.lists(st.sampled_from(pairs), unique=True, max_size=40)) if pairs else []
    return boxes, [(f"k{tail}", f"k{head}") for tail, head in chosen]


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def with_class(root: ElementTree.Element, name: str, tag: str = "*") -> list[ElementTree.Element]:
    found = root.iterfind(f".//{SVG}{tag}" if tag != "*" else ".//*")
    return [element for element in found if name in element.get("class", "").split()]


def rect_of(element: ElementTree.Element) -> Rect:
    return Rect(*(float(element.get(name, "nan")) for name in ("x", "y", "width", "height")))


def cards(root: ElementTree.Element) -> dict[str, Rect]:
    """The rectangle of each box, by key."""
    return {
        box.get("data-key", ""): rect_of(rect)
        for box in with_class(root, "box")
        for rect in box
        if rect.get("class") == "card"
    }


def frames_of(root: ElementTree.Element) -> list[Rect]:
    """The outlines of batches, without the one in the legend."""
    frames = with_class(root, "frame")
    return [rect_of(frame) for frame in frames if "key" not in frame.get("class", "")]


def titles(root: ElementTree.Element) -> list[str | None]:
    return [b.findtext(f"{SVG}title") for b in with_class(root, "box") if b.get("data-key")]


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def overlap(one: Rect, other: Rect) -> bool:
    return (
        one.x < other.x + other.width
        and other.x < one.x + one.width
        and one.y < other.y + other.height
        and other.y < one.y + one.height
    )


def chain(count: int) -> tuple[list[Box], list[tuple[str, str]]]:
    boxes = [Box(f"k{number}", "step", "task") for number in range(count)]
    return boxes, [(one.key, other.key) for one, other in pairwise(boxes)]


def map_reduce(count: int) -> tuple[list[Box], list[tuple[str, str]]]:
    calls = [Box(f"c{n}", "summarize", "call", "gpt-5-mini") for n in range(count)]
    merge = Box("m", "merge", "task", output=True)
    return [*calls, merge], [(call.key, merge.key) for call in calls]


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_every_box_and_edge_is_drawn_and_no_boxes_overlap(
    graph: tuple[list[Box], list[tuple[str, str]]],
) -> None:
    boxes, edges = graph
    root = parsed(draw_svg(boxes, edges))
    rects = cards(root)
    assert set(rects) == {box.key for box in boxes}
    assert len(with_class(root, "edge")) == len(edges)
    assert not [pair for pair in combinations(rects.values(), 2) if overlap(*pair)]
    rightwards = all(rects[a].x + rects[a].width < rects[b].x for a, b in edges)
    downwards = all(rects[a].y + rects[a].height < rects[b].y for a, b in edges)
    assert rightwards or downwards


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_an_outline_holds_its_batch_and_nothing_else(
    graph: tuple[list[Box], list[tuple[str, str]]],
) -> None:
    boxes, edges = graph
    root = parsed(draw_svg(boxes, edges))
    rects = cards(root)
    groups = {frozenset(b.key for b in boxes if b.group == name) for name in ("g", "h")}
    frames = frames_of(root)
    for frame in frames:
        inside = frozenset(key for key, rect in rects.items() if overlap(frame, rect))
        assert inside in groups
    assert not [pair for pair in combinations(frames, 2) if overlap(*pair)]


@settings(max_examples=60, deadline=None)
@given(graphs())
def test_no_edge_runs_through_a_box(graph: tuple[list[Box], list[tuple[str, str]]]) -> None:
    boxes, names = graph
    edges = [(int(tail[1:]), int(head[1:])) for tail, head in names]
    layout = arrange([120.0] * len(boxes), 40, edges, [box.group for box in boxes])
    for edge, points in layout.routes.items():
        others = [rect for number, rect in enumerate(layout.rects) if number not in edge]
        assert len(points) % 2 == 0
        for (x, y), (to_x, to_y) in zip(points[::2], points[1::2], strict=True):
            line = Rect(x, y, to_x - x, to_y - y)
            assert not [rect for rect in others if overlap(line, rect)]


@pytest.mark.parametrize("label", HOSTILE)
def test_hostile_labels_parse_back_equal(label: str) -> None:
    boxes = [Box(label, label, "call"), Box("b", "b", "task", group=label)]
    root = parsed(draw_svg(boxes, [(label, "b")], title=label))
    assert label in titles(root)
    assert label in cards(root)
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "style", "rect", "g", "path", "text", "circle"
    }  # fmt: skip


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_makes_a_sound_picture(label: str, detail: str) -> None:
    root = parsed(draw_svg([Box(label, label, "call", detail)], [], title=detail))
    assert len(cards(root)) == 1


def test_control_characters_are_shown_and_none_is_written() -> None:
    svg = draw_svg([Box("a", "\x00 \x1b[31m \x7f \x9b \ud800 \uffff", "call")], [])
    assert titles(parsed(svg)) == ["\u2400 \u241b[31m \ufffd \ufffd \ufffd \ufffd"]
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", svg)


def test_direction_overrides_do_not_reach_the_drawn_text() -> None:
    root = parsed(draw_svg([Box("a", "safe\u202etxt.exe", "call")], []))
    assert "safetxt.exe" in texts(root)
    assert titles(root) == ["safe\u202etxt.exe"]


def test_a_long_label_is_shortened_in_the_middle_and_kept_whole_in_its_title() -> None:
    label = "summarize the " + "very " * 3000 + "long book"
    root = parsed(draw_svg([Box("a", label, "call")], []))
    (short,) = (text for text in texts(root) if "\u2026" in text)
    assert short.startswith("summarize")
    assert short.endswith("book")
    assert width_of(short, 13) < cards(root)["a"].width
    assert titles(root) == [label]


def test_fit_keeps_what_fits() -> None:
    assert fit("short", 100, 12) == "short"
    assert fit("a\n  b", 100, 12) == "a b"
    assert fit("abc", 0, 12) == "a\u2026c"


def test_an_empty_graph_and_a_graph_of_one() -> None:
    assert "Nothing to draw: the graph is empty." in texts(parsed(draw_svg([], [])))
    assert draw_mermaid([], []) == "flowchart LR\n"
    root = parsed(draw_svg([Box("a", "chat", "call", "gpt-5-mini")], []))
    assert cards(root)["a"].x == 0
    assert {"chat", "gpt-5-mini", "LLM call"} <= set(texts(root))


def test_the_file_is_self_contained_and_friendly() -> None:
    boxes, edges = map_reduce(3)
    svg = draw_svg(boxes, edges, title="Three books")
    root = parsed(svg)
    assert root.get("role") == "img"
    assert root.get("aria-label") == "Three books: 4 nodes, 3 edges"
    assert root.findtext(f"{SVG}title") == "Three books: 4 nodes, 3 edges"
    assert "prefers-color-scheme:dark" in svg
    assert not re.search(r"href|src=|url\(|@import|<script|foreignObject|\bid=", svg)
    assert svg.count("http") == 1  # the namespace
    style = root.findtext(f"{SVG}style") or ""
    selectors = re.findall(
        r"([^{}]+)\{[^{}]*\}", style.replace("@media(prefers-color-scheme:dark){", "")
    )
    assert all(selector.startswith(".feste-graph ") for selector in selectors)


def test_the_legend_names_what_is_used_and_nothing_else() -> None:
    boxes = [
        Box("a", "a", "prompt", state="done"),
        Box("b", "b", "call", group="g", output=True),
        Box("c", "c", "call", group="g", state="failed"),
    ]
    words = set(texts(parsed(draw_svg(boxes, [("a", "b"), ("a", "c")]))))
    assert {"prompt", "LLM call", "one request", "result", "done", "failed"} <= words
    assert not words & {"Python task", "data", "skipped"}


def test_states_and_outputs_are_marked() -> None:
    boxes = [Box("a", "a", "call", state="failed"), Box("b", "b", "task", output=True)]
    root = parsed(draw_svg(boxes, []))
    by_key = {box.get("data-key"): box for box in with_class(root, "box")}
    assert "failed" in by_key["a"].get("class", "")
    assert [rect.get("class") for rect in by_key["b"].iter(f"{SVG}rect")] == ["ring", "card"]
    assert titles(root)[0] == "a\nfailed"


def test_an_unknown_kind_or_state_is_drawn_as_plain_data() -> None:
    root = parsed(draw_svg([Box("a", "a", 'x" onload="', state="odd")], []))
    assert with_class(root, "data", "g")[0].get("data-key") == "a"


def test_a_batch_stands_in_one_outline_with_its_size() -> None:
    boxes = [Box(f"e{n}", "embed", "call", group="g") for n in range(3)]
    root = parsed(draw_svg([*boxes, Box("x", "x", "task", group="alone")], []))
    assert "1 request \u00b7 3 calls" in texts(root)
    assert len(frames_of(root)) == 1


def test_a_batch_that_would_wait_for_itself_is_drawn_apart() -> None:
    boxes = [Box(name, name, "call", group="g" if name != "b" else "") for name in "abc"]
    edges = [("a", "b"), ("b", "c")]
    root = parsed(draw_svg(boxes, edges))
    assert len(cards(root)) == 3
    assert not frames_of(root)
    assert len(cards(parsed(draw_svg(boxes, [("a", "c")])))) == 3


@pytest.mark.parametrize("draw", [draw_svg, draw_mermaid])
def test_a_cycle_is_named_and_does_not_hang(draw: Callable[..., str]) -> None:
    boxes, edges = chain(5)
    with pytest.raises(ValueError, match=r"cycle of 3 through 'k[123]'"):
        draw(boxes, [*edges, ("k3", "k1")])
    with pytest.raises(ValueError, match="cycle of 1 through 'k2'"):
        draw(boxes, [*edges, ("k2", "k2")])


@pytest.mark.parametrize("draw", [draw_svg, draw_mermaid])
def test_a_broken_graph_is_refused(draw: Callable[..., str]) -> None:
    with pytest.raises(ValueError, match="two boxes have the key 'a'"):
        draw([Box("a", "", "call"), Box("a", "", "task")], [])
    with pytest.raises(ValueError, match="'b', which is no box"):
        draw([Box("a", "", "call")], [("a", "b")])


def test_the_same_graph_makes_the_same_picture() -> None:
    boxes, edges = map_reduce(7)
    assert draw_svg(boxes, edges) == draw_svg(list(boxes), list(edges))


def test_a_repeated_edge_is_one_edge() -> None:
    boxes, edges = chain(2)
    assert len(with_class(parsed(draw_svg(boxes, edges * 3)), "edge")) == 1


def test_a_chain_of_100_000_is_one_box_with_a_loop() -> None:
    boxes, edges = chain(100_000)
    root = parsed(draw_svg(boxes, edges))
    assert len(cards(root)) == 1
    words = texts(root)
    assert "step × 100,000" in words
    assert "100,000 nodes and 99,999 edges, drawn as 1 box." in words
    assert any(text.startswith("Loops, not drawn: step") and "99,999" in text for text in words)


def test_a_wide_graph_of_100_000_is_two_boxes_with_a_weight() -> None:
    boxes, edges = map_reduce(100_000)
    root = parsed(draw_svg(boxes, edges))
    assert len(cards(root)) == 2
    assert {"summarize × 100,000", "merge", "× 100,000"} <= set(texts(root))
    assert len(with_class(root, "edge")) == 1
    assert "100,000 nodes" not in draw_mermaid(*chain(3))
    assert "summarize × 100,000" in draw_mermaid(boxes, edges)


def test_100_000_different_labels_are_merged_by_kind() -> None:
    boxes = [Box(f"k{n}", f"page {n}", KINDS[n % 4], f"d{n}") for n in range(100_000)]
    words = set(texts(parsed(draw_svg(boxes, []))))
    assert "LLM call × 25,000" in words


def test_a_summary_keeps_depth_apart_while_it_can() -> None:
    boxes = [Box(f"{row}.{n}", "step", "call", "m") for row in range(3) for n in range(100)]
    edges = [(f"{row}.{n}", f"{row + 1}.{n}") for row in range(2) for n in range(100)]
    root = parsed(draw_svg(boxes, edges))
    assert texts(root).count("step × 100") == 3
    assert texts(root).count("× 100") == 2


def test_a_summary_counts_requests_failures_and_results() -> None:
    calls = [
        Box(f"e{n}", "embed", "call", "small", group=f"g{n // 96}", state="failed" if n < 2 else "done",
            output=n == 5)
        for n in range(500)
    ]  # fmt: skip
    root = parsed(draw_svg(calls, []))
    assert "small \u00b7 6 requests \u00b7 2 failed" in texts(root)
    (box,) = (box for box in with_class(root, "box") if box.get("data-key"))
    assert "failed" in box.get("class", "").split()
    assert len(with_class(root, "copy")) == 2
    one_batch = draw_svg([Box(f"e{n}", "embed", "call", group="g") for n in range(300)], [])
    assert "1 request \u00b7 300 calls" in texts(parsed(one_batch))


def test_too_many_edges_are_summarised_as_well() -> None:
    boxes = [Box(f"{side}{n}", side, "task") for side in "ab" for n in range(40)]
    edges = [(f"a{n}", f"b{m}") for n in range(40) for m in range(40)]
    root = parsed(draw_svg(boxes, edges))
    assert len(cards(root)) == 2
    assert "× 1,600" in texts(root)
    assert draw_mermaid(boxes, edges).count("-->") == 1


def test_mermaid_draws_every_box_batch_and_edge() -> None:
    boxes = [
        Box("p", "ask", "prompt"),
        Box("a", "chat", "call", "gpt-5-mini", group="g", state="failed"),
        Box("b", "chat", "call", "gpt-5-mini", group="g", output=True),
    ]
    text = draw_mermaid(boxes, [("p", "a"), ("p", "b")])
    assert text.splitlines()[0] == "flowchart LR"
    assert '  n0["ask"]:::promptBox' in text
    assert '    n1(["chat<br/>gpt-5-mini"]):::callBox' in text
    assert '  subgraph g0["1 request \u00b7 2 calls"]' in text
    assert text.count(" --> ") == 2
    assert "class n1 failedBox" in text
    assert "class n2 outputBox" in text


@pytest.mark.parametrize("label", [*HOSTILE, "\x00\x1b\u2028"])
def test_mermaid_labels_cannot_break_out(label: str) -> None:
    text = draw_mermaid([Box(label, label, "call", label)], [])
    (line,) = (line for line in text.splitlines() if line.startswith("  n0"))
    match = re.fullmatch(r'  n0\(\["(.*)<br/>(.*)"\]\):::callBox', line)
    assert match
    decoded = re.sub(r"#(\d+);", lambda code: chr(int(code[1])), match[1])
    assert decoded == fit(label, 400, 13)
    assert not re.search(r"[\"<>&;|`(){}\[\]\\]", re.sub(r"#\d+;", "", match[1]))


def test_depths_are_longest_paths() -> None:
    assert depths(4, [(0, 1), (1, 2), (0, 2), (3, 2)]) == [0, 1, 2, 0]
    assert depths(3, [(0, 1), (1, 0), (1, 2)]) == [-1, -1, -1]


def test_a_layout_of_a_cycle_does_not_hang() -> None:
    with pytest.raises(ValueError, match="the edges have a cycle"):
        arrange([50.0, 50.0], 40, [(0, 1), (1, 0)], ["g", ""])


# --- pictures of nodes ------------------------------------------------------------------------------


def program(llm: FakeBackend) -> tuple[Any, list[Any]]:
    """A small program of every kind of node: its result and its first calls."""
    ask = Prompt("Summarize in one sentence:\n{{ text }}")
    merge = ChatPrompt(system="Be brief.", user="Merge:\n{{ parts }}")
    clean = feste.task(lambda text: text.strip())
    chats = [llm.chat(ask(text=text)) for text in ("one", "two")]
    words = [llm.complete(f"word {i}") for i in range(3)]
    return llm.chat(merge(parts=[*map(clean, chats), *words])), [*chats, *words]


def drawn_states(root: ElementTree.Element) -> dict[str, bool]:
    """For each box whether it is marked as done."""
    boxes = (box for box in with_class(root, "box") if box.get("data-key"))
    return {box.get("data-key", ""): "done" in box.get("class", "").split() for box in boxes}


def test_after_a_run_the_picture_is_the_same_with_marks() -> None:
    """What was computed is drawn as before: calls as calls, batches as batches; answers are marked."""
    result, calls = program(FakeBackend("pictures"))
    before = parsed(result.visualize())
    result.compute()
    after = parsed(result.visualize())
    answered = {node.key for node in (result, *calls)}

    assert cards(after).keys() == cards(before).keys()
    assert len(cards(before)) == 11
    assert len(with_class(after, "edge")) == len(with_class(before, "edge"))
    assert frames_of(after) == frames_of(before) != []
    assert not any(drawn_states(before).values())
    assert {key for key, done in drawn_states(after).items() if done} == answered
    assert not [box for box in with_class(after, "data") if box.get("data-key")]


def test_drawing_changes_no_plan() -> None:
    """A picture forgets no answer and draws nothing new from the model."""
    llm = FakeBackend("pictures")
    result, calls = program(llm)
    calls[0].compute()
    result.visualize()
    explained = feste.explain(result)
    result.compute()

    assert explained.calls == 5
    assert sum(request.items for request in llm.requests) == 6


def test_a_graph_with_an_answer_draws_it_as_what_it_is() -> None:
    """In a graph as it is run, an answered call stands for all behind it, and is still a call."""
    result, _ = program(FakeBackend("pictures"))
    result.compute()
    graph, (key,), _ = feste.graph.FesteGraph.collect(result)
    root = parsed(graph.visualize())

    assert drawn_states(root) == {key: True}
    assert with_class(root, "call")


def test_prompts_say_how_they_begin_and_every_box_where_it_was_written(tmp_path: Path) -> None:
    """The small line is the template's first words, or its file; the hover title ends in file:line."""
    file = tmp_path / "ask.md"
    file.write_text("About {{ x }}", encoding="utf-8")
    result, _ = program(FakeBackend("pictures"))
    root = parsed(result.visualize())
    from_file = parsed(Prompt.from_file(file)(x=1).visualize())

    assert texts(root).count("'Summarize in one sentence:\u2026'") == 2
    assert "'Merge:\u2026'" in texts(root)
    assert "ask.md" in " ".join(texts(from_file))
    assert all(re.search(r"test_graph_picture\.py:\d+$", title or "") for title in titles(root))


def test_paths_below_the_working_directory_are_told_from_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A picture that is shown to others does not tell where one's home is."""
    monkeypatch.chdir(Path(__file__).parent)
    result, _ = program(FakeBackend("pictures"))

    assert all("\ntest_graph_picture.py:" in (t or "") for t in titles(parsed(result.visualize())))


def test_a_picture_is_shown_by_a_notebook_and_short_in_a_prompt(tmp_path: Path) -> None:
    """It is a str; its representations are the picture itself, and in a prompt one line."""
    result, _ = program(FakeBackend("pictures"))
    svg: Any = result.visualize()
    mermaid: Any = result.visualize(tmp_path / "graph.mmd")

    assert isinstance(svg, str) and svg._repr_svg_() == svg
    assert repr(svg) == f"<SVG picture of {len(svg):,} characters>"
    assert mermaid._repr_mimebundle_()["text/vnd.mermaid"] == mermaid
    assert (tmp_path / "graph.mmd").read_text(encoding="utf-8") == mermaid


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    """Nothing is written under a name that promises something else."""
    result, _ = program(FakeBackend("pictures"))
    with pytest.raises(ConfigError, match=r"use \.svg, \.mmd or \.html"):
        result.visualize(tmp_path / "graph.png")

    assert not list(tmp_path.iterdir())


def test_any_state_is_told_in_words() -> None:
    """States that have no mark of their own are told in the title, and in a summary by their number."""
    boxes = [Box(f"k{n}", "chat", "call", state="not_started" if n else "done") for n in range(300)]
    summary = texts(parsed(draw_svg(boxes, [])))

    assert titles(parsed(draw_svg(boxes[:2], []))) == ["chat\ndone", "chat\nnot started"]
    assert "299 not started" in summary
    assert "2 done" in texts(parsed(draw_svg([*boxes[:1], Box("a", "chat", "call"),
                                              Box("b", "chat", "call", state="done")], [], max_boxes=1)))  # fmt: skip


def test_weights_and_captions_need_no_painting_order() -> None:
    """Renderers that do not know `paint-order` would paint a halo over the letters."""
    boxes, edges = map_reduce(1000)
    batch = [Box(f"e{n}", "embed", "call", group="g") for n in range(3)]
    weighted, captioned = draw_svg(boxes, edges), draw_svg(batch, [])

    assert "paint-order" not in weighted + captioned
    for svg, words, name in (
        (weighted, "× 1,000", "plate"),
        (captioned, "1 request · 3 calls", "caption"),
    ):
        root = parsed(svg)
        (plate,) = with_class(root, name)
        (text,) = (text for text in root.iter(f"{SVG}text") if text.text == words)
        middle = rect_of(plate).y + rect_of(plate).height / 2
        assert abs(float(text.get("y", "nan")) - 4 - middle) < 2
        assert rect_of(plate).width > width_of(words, 11)


def test_a_mermaid_comment_reads_as_it_is_and_starts_no_directive() -> None:
    """Escapes are not read in comments; a label cannot begin a directive there."""
    boxes, edges = chain(300)
    plain = draw_mermaid(boxes, edges)
    hostile = [Box(box.key, "%%{init: {}}%%", "task") for box in boxes]

    assert "  %% 300 nodes and 299 edges, drawn as 1 box." in plain.splitlines()
    assert "{init" not in draw_mermaid(hostile, edges)
