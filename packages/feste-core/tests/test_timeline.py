"""Timelines: every span is drawn at its time, bars never overlap, and any run stays readable."""

from __future__ import annotations

import math
import re
from itertools import combinations
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feste.report import Span, draw_timeline
from feste.report.axis import CHART, GUTTER
from feste.report.spans import MAX_LANES
from feste.report.waiting import HEIGHT, WORDS, in_order

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = [
    "]]> <b> & \"q\" 'x'",
    "</title><script>",
    "a\nb\r\nc\td",
    "\u05e9\u05dc\u05d5\u05dd",
    "&lt;",
]


def parsed(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def with_class(root: ElementTree.Element, name: str) -> list[ElementTree.Element]:
    return [element for element in root.iter() if name in element.get("class", "").split()]


def box_of(element: ElementTree.Element) -> tuple[float, float, float, float]:
    x, y, width, height = (
        float(element.get(name, "nan")) for name in ("x", "y", "width", "height")
    )
    return x, y, x + width, y + height


def texts(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}text")]


def titles(root: ElementTree.Element) -> list[str]:
    return [element.text or "" for element in root.iter(f"{SVG}title")]


# Times on a coarse raster: bars have a least width, so that an instant can be seen at all.
times = st.integers(0, 40).map(float)
spans = st.builds(
    lambda lane, start, length, ok, waits, items: Span(
        lane, "chat", start, start + length, ok, items, list(waits.items())
    ),
    st.sampled_from(["openai.chat gpt-5-mini", "task clean", "prompt"]),
    times,
    st.integers(1, 20).map(float),
    st.booleans(),
    st.dictionaries(st.sampled_from([*WORDS, "a cause of tomorrow"]), times, max_size=3),
    st.integers(1, 96),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(spans, min_size=1, max_size=40))
def test_every_span_is_one_bar_and_bars_do_not_overlap(run: list[Span]) -> None:
    root = parsed(draw_timeline(run))
    bars = [box_of(bar) for bar in with_class(root, "bar")]
    assert len(bars) == len(run)
    slack = 0.11  # coordinates are written with one decimal
    for one, other in combinations(bars, 2):
        apart = one[2] <= other[0] + slack or other[2] <= one[0] + slack
        assert apart or one[3] <= other[1] or other[3] <= one[1]
    failed = [bar for bar in with_class(root, "bar") if "bad" in bar.get("class", "").split()]
    assert len(failed) == sum(not span.ok for span in run)


@settings(max_examples=60, deadline=None)
@given(st.lists(spans, min_size=1, max_size=40))
def test_bars_and_waits_stand_at_their_times(run: list[Span]) -> None:
    root = parsed(draw_timeline(run))
    high = max(span.end for span in run)

    def x(time: float) -> float:
        return GUTTER + CHART * time / high

    lefts = sorted(box_of(bar)[0] for bar in with_class(root, "bar"))
    assert lefts == pytest.approx(sorted(x(span.start) for span in run), abs=0.1)
    drawn = sorted((box_of(bar)[0], box_of(bar)[2]) for bar in with_class(root, "wait"))
    waited = []
    for span in run:
        end = span.start
        for _, wait in reversed(span.waits):
            if wait and end > 0:
                left = max(x(end - wait), GUTTER)
                waited.append((left, max(x(end), left + 1.5)))
            end -= wait
    assert [a for pair in drawn for a in pair] == pytest.approx(
        [a for pair in sorted(waited) for a in pair], abs=0.2
    )


def test_rows_are_as_few_as_the_most_that_ran_at_once() -> None:
    run = [Span("chat", f"{n}", n * 0.5, n * 0.5 + 1.0) for n in range(20)]
    root = parsed(draw_timeline(run))
    assert len({bar.get("y") for bar in with_class(root, "bar")}) == 2
    assert "most: 2" in texts(root)


def test_the_curve_counts_what_runs_at_once() -> None:
    run = [Span("a", "a", 0, 4), Span("a", "b", 1, 3), Span("b", "c", 2, 3), Span("b", "now", 2, 2)]
    root = parsed(draw_timeline(run))
    (curve,) = with_class(root, "curve")
    path = curve.find(f"{SVG}path")
    assert path is not None
    levels = [float(level) for level in re.findall(r"V([\d.]+)", path.get("d", ""))]
    heights = [round((levels[-1] - level) / (levels[-1] - min(levels)) * 3) for level in levels]
    assert heights == [1, 2, 3, 1, 0, 0]
    assert "4 spans in 4 s, at most 3 at once." in texts(root)


def test_a_bar_tells_its_times_wait_calls_and_failure() -> None:
    run = [Span("openai.embed small", "embed", 2, 3.25, False, 96, [("slot", 0.5)])]
    root = parsed(draw_timeline(run, title="Embedding"))
    assert "embed\n2 s to 3.25 s (1.25 s), waited 500 ms for a slot, 96 calls, failed" in titles(
        root
    )
    assert {"embed × 96", "waiting", "waits for a slot", "failed", "Embedding"} <= set(texts(root))
    assert (
        root.get("aria-label")
        == "Embedding: 1 span in 1.25 s, at most 1 at once; 96 calls; 1 failed."
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_texts_parse_back_equal(text: str) -> None:
    root = parsed(draw_timeline([Span(text, text, 0, 1)], title=text))
    assert text in titles(root)
    assert any(title.startswith(text + "\n0 s to 1 s") for title in titles(root))
    assert {element.tag.removeprefix(SVG) for element in root.iter()} <= {
        "svg", "title", "style", "rect", "g", "path", "text"
    }  # fmt: skip


@settings(deadline=None)
@given(st.text(), st.text())
def test_any_text_makes_a_sound_picture(lane: str, label: str) -> None:
    root = parsed(draw_timeline([Span(lane, label, 0, 1)], title=label))
    assert len(with_class(root, "bar")) == 1


def test_lanes_are_in_the_order_of_their_first_span() -> None:
    root = parsed(draw_timeline([Span("late", "", 2, 3), Span("early", "", 0, 1)]))
    words = texts(root)
    assert words.index("early") < words.index("late")


def test_tasks_prompts_and_calls_differ() -> None:
    run = [Span("task clean", "", 0, 1), Span("openai.chat", "", 0, 1), Span("prompt", "", 0, 1)]
    root = parsed(draw_timeline(run))
    kinds = [lane.get("class", "") for lane in with_class(root, "lane") if len(lane) > 1]
    assert sorted(kinds) == ["lane call", "lane prompt", "lane task"]
    assert {"LLM call", "Python task", "prompt"} <= set(texts(root))


def test_very_many_spans_become_shades() -> None:
    run = [
        Span("chat", f"{n}", n, n + 30, n != 50_000, 1, [("slot", float(n))])
        for n in range(100_000)
    ]
    run += [Span("task clean", "x", 500, 550)]
    root = parsed(draw_timeline(run))
    assert not with_class(root, "bar")
    assert with_class(root, "heat")
    assert len(with_class(root, "fault")) == 1
    assert len(list(root.iter())) < 3000
    assert "100,001 spans in 27:47 h, at most 31 at once; 1 failed." in texts(root)


def test_shades_show_where_it_was_busy() -> None:
    run = [Span("chat", "", 0, 100)] + [Span("chat", "", 50, 60)] * 15
    root = parsed(draw_timeline(run, max_spans=10))
    (lane,) = (lane for lane in with_class(root, "lane") if len(lane) > 1)
    heats = [heat for heat in lane if "heat" in heat.get("class", "")]
    shades = [heat.get("class", "").split()[-1] for heat in heats]
    assert shades == ["s2", "s8", "s2"]
    left, _, right, _ = box_of(heats[1])
    assert left == pytest.approx(GUTTER + CHART * 0.5, abs=CHART / 100)
    assert right == pytest.approx(GUTTER + CHART * 0.6, abs=CHART / 100)


def test_the_idlest_of_very_many_lanes_are_one() -> None:
    run = [Span(f"task t{n}", "x", 0, 1 + n) for n in range(1000)]
    root = parsed(draw_timeline(run))
    assert len(with_class(root, "band")) == MAX_LANES
    assert "961 other lanes" in texts(root)
    assert len(with_class(root, "bar")) == MAX_LANES - 1
    assert with_class(root, "heat")


def test_a_lane_with_very_many_at_once_is_a_strip_and_the_others_keep_their_bars() -> None:
    """The picture stays on one screen, says what was folded, and shows what ran at once on top."""
    wide = [Span("chat m", f"{n}", 0, 1 + n / 512, n != 3, 1, [("retry", 0.1)]) for n in range(512)]
    narrow = [Span("embed m", f"{n}", 0, 1) for n in range(5)]
    svg = draw_timeline(wide + narrow)
    root = parsed(svg)
    (curve,) = with_class(root, "curve")
    (panel,) = with_class(root, "panel")
    elements = list(root.iter())

    assert float(panel.get("height", "nan")) < 600
    assert len(with_class(root, "bar")) == 5
    assert len(with_class(root, "fault")) == 1
    assert elements.index(curve) < elements.index(with_class(root, "lane")[0])
    assert (
        "Too many at once for single bars in 1 lane (up to 512): the darker, the more ran at once."
        in texts(root)
    )
    assert len(with_class(root, "waiting")) == 1 and not with_class(root, "wait")


@pytest.mark.parametrize("model", ["meta-llama/Llama-3.1-8B-Instruct", "gpt-5-mini-2025-08-07"])
def test_a_long_model_has_a_line_of_its_own(model: str) -> None:
    """The names of models are not cut; nothing of a lane's words stands outside of it."""
    root = parsed(draw_timeline([Span(f"complete {model}", "x", 0, 1), Span("chat m", "x", 0, 1)]))
    tall, flat = (box_of(band) for band in with_class(root, "band"))
    words = [text for text in root.iter(f"{SVG}text") if text.get("x") == "12.0"]
    heights = [float(text.get("y", "nan")) for text in words if text.text != "at once"]

    assert {"complete", model, "chat m", "1 span, mean 1 s"} <= set(texts(root))
    assert tall[3] - tall[1] > flat[3] - flat[1]
    assert all(flat[1] < y < flat[3] or tall[1] < y < tall[3] for y in heights[1:])


def test_a_run_with_nothing_in_it() -> None:
    root = parsed(draw_timeline([], title="Empty"))
    assert {"Empty", "Nothing to draw: nothing ran."} <= set(texts(root))


def test_instants_are_visible() -> None:
    (bar,) = with_class(parsed(draw_timeline([Span("a", "now", 0, 0)])), "bar")
    assert float(bar.get("width", "0")) >= 1


@pytest.mark.parametrize(
    "span",
    [
        Span("a", "bad", 2, 1),
        Span("a", "bad", math.nan, 1),
        Span("a", "bad", 0, math.inf),
        Span("a", "bad", 0, 1, waits=[("slot", -1)]),
        Span("a", "bad", 0, 1, waits=[("slot", math.inf)]),
    ],
)
def test_impossible_times_are_refused(span: Span) -> None:
    with pytest.raises(ValueError, match="'bad' of 'a'"):
        draw_timeline([Span("a", "good", 0, 1), span])


@pytest.mark.parametrize("length", [1e-6, 0.02, 1, 59, 61, 3000, 90_000, 1e7])
def test_the_axis_has_a_few_round_times(length: float) -> None:
    (grid,) = with_class(parsed(draw_timeline([Span("a", "a", 0, length)])), "grid")
    words = texts(grid)
    assert 3 <= len(words) <= 12
    assert len(set(words)) == len(words)


def test_the_file_is_self_contained_and_friendly() -> None:
    svg = draw_timeline([Span("a", "a", 0, 1)], title="One")
    root = parsed(svg)
    assert root.get("role") == "img"
    assert "prefers-color-scheme:dark" in svg
    assert not re.search(r"href|src=|url\(|@import|<script|foreignObject|\bid=", svg)
    assert svg.count("http") == 1  # the namespace


def areas(root: ElementTree.Element) -> dict[str, float]:
    """The area of each cause in the band of waits, in pixels times pixels."""
    (band,) = with_class(root, "waiting")
    found = {}
    for path in band.iter(f"{SVG}path"):
        x = y = area = 0.0
        for command, number in re.findall(r"([HVM])([\d.]+)", path.get("d", "")):
            if command == "V":
                y = float(number)
            else:
                area += (float(number) - x) * (-y)
                x = float(number)
                if command == "M":
                    y = float(path.get("d", "M0 0").split()[1].split("H")[0])
                    area = 0.0
        found[path.get("class", "").removeprefix("w-")] = area
    return found


def test_the_band_shows_how_many_waited_for_what() -> None:
    """The area of a cause is the sum of its waits; causes that are too short to see are left out."""
    run = [
        Span("chat", f"{n}", 10, 20, waits=[("rate_limit", 4.0), ("slot", 6.0)]) for n in range(5)
    ]
    run += [Span("chat", "last", 20, 30, waits=[("slot", 20.0), ("store", 1e-6)])]
    root = parsed(draw_timeline(run))
    found = areas(root)
    pixels = CHART / 30 * (HEIGHT - 4) / 6  # of one that waits for a second; six wait at most

    assert set(found) == {"rate_limit", "slot"}
    assert found["rate_limit"] == pytest.approx(5 * 4 * pixels, rel=0.02)
    assert found["slot"] == pytest.approx((5 * 6 + 20) * pixels, rel=0.02)
    low, high = (path.get("d", "") for path in with_class(root, "waiting")[0].iter(f"{SVG}path"))
    (top,) = re.findall(r"^M\S+ [\d.]+H[\d.]+V([\d.]+)", low)
    assert high.startswith(f"M{GUTTER:.1f} {top}H")  # one begins where the other ends
    words = [text for text in texts(root) if text.startswith("waits")]
    assert words == ["waits for the rate limit", "waits for a slot"]
    assert "most: 6" in texts(root)


def test_a_run_that_waits_for_nothing_has_no_band() -> None:
    root = parsed(draw_timeline([Span("chat", "", 0, 1, waits=[("worker", 1e-5)])]))
    assert not with_class(root, "waiting") and not with_class(root, "wait")


def test_limits_are_drawn_where_the_gate_was_closed() -> None:
    """Slots and limits take turns; what is known of the order is kept, and the sums always."""
    waits = {"slot": 6.0, "rate_limit": 6.0, "store": 1.0}
    order = in_order(waits, 14.0, [(0.0, 2.0), (5.0, 9.0), (12.0, 13.0)])
    unknown = in_order({**waits, "retry": 2.0}, 14.0, [(5.0, 8.0)])

    assert order == [
        ("rate_limit", 1.0), ("slot", 3.0), ("rate_limit", 4.0), ("slot", 3.0),
        ("rate_limit", 1.0), ("store", 1.0),
    ]  # fmt: skip
    assert unknown == [
        ("retry", 2.0), ("rate_limit", 3.0), ("slot", 1.0), ("rate_limit", 3.0), ("slot", 5.0),
        ("store", 1.0),
    ]  # fmt: skip
