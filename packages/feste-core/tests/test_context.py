"""Settings: keyword > with > set > environment > default, for threads, tasks and snapshots alike."""

from __future__ import annotations

import asyncio
import copy
import json
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal, Optional, Union

import pytest
from hypothesis import given
from hypothesis import strategies as st

import feste
from feste import context
from feste.backend import Backend, Operation, Request, Response, operation
from feste.context import SETTINGS, Setting, settings
from feste.errors import ConfigError, UnknownName
from feste.plugins import registry
from feste.testing import FakeBackend


@pytest.fixture(autouse=True)
def clean_layers() -> Iterator[None]:
    """Each test begins and ends without layers of its own."""
    before = list(context._layers)
    yield
    context._layers[:] = before
    assert context._overlays.get() == ()


def fresh(code: str, **environment: str) -> Any:
    """Run code in a new interpreter and return the JSON that it prints."""
    command = [sys.executable, "-W", "error", "-c", f"import json\n{code}"]
    env = {**os.environ, **environment}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


# --- what goes before what --------------------------------------------------------------------------


def test_each_source_goes_before_the_one_below_it() -> None:
    """Keyword, innermost block, block, newest set, older set, default: the first that has a value."""
    seen = [context.get("keep")]
    context.set(keep="all")
    seen.append(context.get("keep"))
    context.set(keep="none")
    seen.append(context.get("keep"))
    with context.set(keep="paid"):
        seen.append(context.get("keep"))
        with context.set(keep="all"):
            seen.append(context.get("keep"))
            seen.append(settings(keep="none")["keep"])

    assert seen == ["paid", "all", "none", "paid", "all", "none"]


def test_the_environment_goes_between_set_and_default() -> None:
    """FESTE_<NAME> is the process's default; ``set`` and everything above it win."""
    code = """
from feste import context
seen = [context.get("eager"), context.get("keep"), context.get("on_error")]
context.set(keep="paid")
seen.append(context.get("keep"))
with context.set(eager=False):
    seen.append(context.get("eager"))
seen.append(context.settings(on_error="stop").on_error)
print(json.dumps(seen))
"""
    found = fresh(code, FESTE_EAGER="1", FESTE_KEEP="all", FESTE_ON_ERROR="return")

    assert found == [True, "all", "return", "paid", False, "stop"]


def test_eager_by_the_environment_runs_calls_at_once() -> None:
    """With FESTE_EAGER=1 a program holds values where it would hold nodes."""
    code = """
import feste
print(json.dumps([feste.task(abs)(-2), str(feste.Prompt("Hi {{ x }}")(x=1))]))
"""
    assert fresh(code, FESTE_EAGER="1") == [2, "Hi 1"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1", True), ("true", True), ("ON", True), ("0", False), ("", False), ("no", False)],
)
def test_switches_in_the_environment(text: str, value: bool) -> None:
    """A switch is on for 1, true, yes, on; off for 0, false, no, off and nothing."""
    assert SETTINGS["eager"].parse("eager", text) is value
    assert SETTINGS["optimize"].parse("optimize", text) is value
    assert SETTINGS["progress"].parse("progress", text) is value


def test_passes_can_be_named_in_the_environment() -> None:
    """FESTE_OPTIMIZE takes names of passes too, separated by commas."""
    assert SETTINGS["optimize"].parse("optimize", "rewrite, route") == {
        "rewrite": True,
        "route": True,
    }


@pytest.mark.parametrize(
    ("name", "text"), [("eager", "maybe"), ("on_error", "explode"), ("scheduler", "")]
)
def test_a_wrong_variable_is_named(name: str, text: str) -> None:
    """What is wrong in the environment is told by the variable's name, not the setting's."""
    with pytest.raises(ConfigError, match=f"FESTE_{name.upper()}='{text}'"):
        SETTINGS[name].parse(name, text)


def test_a_wrong_variable_stops_a_run_before_any_request() -> None:
    """A mistake in the environment is no reason to go on with a default."""
    code = """
import feste
from feste.testing import FakeBackend
llm = FakeBackend()
try:
    llm.chat("Hi").compute()
except feste.errors.ConfigError as error:
    print(json.dumps([str(error), len(llm.requests)]))
"""
    said, requests = fresh(code, FESTE_KEEP="everything")

    assert said == "FESTE_KEEP='everything': allowed are 'paid', 'all', 'none'"
    assert requests == 0


def test_the_environment_is_read_once() -> None:
    """What changes in the environment after the first look changes nothing any more."""
    code = """
import os
from feste import context
before = context.get("keep")
os.environ["FESTE_KEEP"] = "all"
print(json.dumps([before, context.get("keep"), context.settings().keep]))
"""
    assert fresh(code) == ["paid", "paid", "paid"]


# --- blocks and layers ------------------------------------------------------------------------------


def test_a_layer_becomes_a_block_by_entering_it() -> None:
    """``set`` holds for the process until its result is entered; then it holds for the block only."""
    layer = context.set(keep="all")
    elsewhere = []
    with layer:
        inside = context.get("keep")
        with ThreadPoolExecutor(1) as pool:
            elsewhere.append(pool.submit(context.get, "keep").result())

    assert (inside, elsewhere, context.get("keep")) == ("all", ["paid"], "paid")


def test_a_layer_is_shown_as_it_was_written() -> None:
    """The last line of a notebook's cell shows the settings, not an address."""
    with context.set(on_error="return", eager=True) as layer:
        shown = repr(layer)

    assert shown == "context.set(on_error='return', eager=True)"


def test_entering_removes_the_layer_itself_not_an_equal_one() -> None:
    """Of two equal ``set(...)`` the one that is entered goes, the other stays."""
    context.set(keep="all")
    second = context.set(keep="all")
    with second:
        pass

    assert context.get("keep") == "all"


def test_a_block_ends_when_it_raises() -> None:
    """An exception ends a block like its last line does."""
    with pytest.raises(KeyError), context.set(keep="all"):
        raise KeyError

    assert context.get("keep") == "paid"


def test_a_block_can_be_entered_again() -> None:
    """One layer serves several blocks, one after the other and one inside the other."""
    layer = context.set(keep="all")
    seen = []
    with layer:
        with layer:
            seen.append(context.get("keep"))
        seen.append(context.get("keep"))
    seen.append(context.get("keep"))
    with layer:
        seen.append(context.get("keep"))

    assert seen == ["all", "all", "paid", "all"]


def test_threads_may_be_in_the_block_of_one_layer_at_once() -> None:
    """Blocks of one layer in two threads end in any order without disturbing each other."""
    layer = context.set(keep="all")
    entered, leave_first = threading.Barrier(2), threading.Event()
    seen: dict[str, list[str]] = {"first": [], "second": []}

    def work(name: str) -> None:
        with layer:
            entered.wait(10)
            if name == "second":
                leave_first.wait(10)
            seen[name].append(context.get("keep"))
        seen[name].append(context.get("keep"))
        leave_first.set()

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(work, name) for name in seen]:
            future.result(timeout=20)

    assert seen == {"first": ["all", "paid"], "second": ["all", "paid"]}


def test_a_new_thread_sees_the_process_not_the_block() -> None:
    """``set`` reaches every thread; a block reaches its own thread only."""
    context.set(on_error="return")
    with context.set(keep="all"), ThreadPoolExecutor(1) as pool:
        found = pool.submit(lambda: (context.get("on_error"), context.get("keep"))).result()

    assert found == ("return", "paid")


def test_async_tasks_have_blocks_of_their_own() -> None:
    """Two tasks of one loop, each inside its own block, never see each other's."""
    seen: list[tuple[str, str]] = []

    async def work(value: str, mine: asyncio.Event, other: asyncio.Event) -> None:
        with context.set(keep=value):
            mine.set()
            await other.wait()
            seen.append((value, context.get("keep")))
        seen.append((value, context.get("keep")))

    async def both() -> None:
        a, b = asyncio.Event(), asyncio.Event()
        await asyncio.gather(work("all", a, b), work("none", b, a))

    asyncio.run(both())

    assert sorted(seen) == [("all", "all"), ("all", "paid"), ("none", "none"), ("none", "paid")]


def test_a_child_task_inherits_the_block_it_was_made_in() -> None:
    """An async task begins with the settings of where it was created, and keeps them."""

    async def child(go: asyncio.Event) -> str:
        await go.wait()
        return str(context.get("keep"))

    async def parent() -> str:
        go = asyncio.Event()
        with context.set(keep="all"):
            task = asyncio.create_task(child(go))
        go.set()
        return await task

    assert asyncio.run(parent()) == "all"


def test_user_tasks_run_in_a_copy_of_the_callers_context() -> None:
    """A task sees the settings of the compute that runs it, and cannot change its caller's."""

    @feste.task
    def look() -> str:
        found = str(context.get("keep"))
        context.set(keep="none").__enter__()
        return found

    with context.set(keep="all"):
        value = look().compute()
        after = context.get("keep")

    assert (value, after) == ("all", "all")


class Loud(Backend):
    """Tells the value of a plugin's setting wherever its code runs."""

    def _prepare(self, text: str) -> Request:
        return Request(self.plugin, "ask", "plugin:loud", {"prepare": context.get("volume")})

    async def _send(self, request: Request, on_chunk: Any = None) -> Response:
        return Response({**request.body, "send": context.get("volume")})

    def _parse(self, response: Response, arguments: Any) -> Any:
        return {**response.payload, "parse": context.get("volume")}

    ask = Operation(prepare=_prepare, send=_send, parse=_parse)

    @operation
    def blocking(self) -> dict[str, int]:
        return {"blocking": context.get("volume")}

    @operation
    async def coroutine(self) -> dict[str, int]:
        return {"coroutine": context.get("volume")}


class Listener:
    """Tells it as an observer and as a pass."""

    name = "listener"

    def __init__(self) -> None:
        self.heard: dict[str, int] = {}

    def apply(self, graph: Any, cx: Any) -> Any:
        self.heard["pass"] = context.get("volume")
        return graph

    @feste.hookimpl
    def feste_run_started(self, event: Any) -> None:
        self.heard["observer"] = context.get("volume")


@pytest.mark.parametrize("how", ["keyword", "block", "eager"])
def test_a_plugins_setting_holds_wherever_its_code_runs(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every half of an operation and in tasks: that of the run."""
    monkeypatch.setattr(context, "_extra", lambda: {"volume": Setting(2, int, "how loud")})
    told = feste.task(lambda: {"task": context.get("volume")})

    @feste.task
    async def told_later() -> dict[str, int]:
        return {"async task": context.get("volume")}

    def program(**keyword: Any) -> Any:
        llm = Loud()
        told_all = [llm.ask(""), llm.blocking(), llm.coroutine(), told(), told_later()]
        return feste.compute(told_all, **keyword)[0]

    if how == "keyword":
        values = program(volume=7)
    else:
        with context.set(volume=7, eager=how == "eager"):
            values = program()

    found = {name: volume for value in values for name, volume in value.items()}
    everywhere = ["prepare", "send", "parse", "blocking", "coroutine", "task", "async task"]
    assert found == dict.fromkeys(everywhere, 7)
    assert program()[0] == {"prepare": 2, "send": 2, "parse": 2}


def test_passes_and_observers_hear_the_setting_of_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Though an observer has a thread of its own, and a pass is asked by ``explain`` too."""
    monkeypatch.setattr(context, "_extra", lambda: {"volume": Setting(2, int, "how loud")})
    listener = Listener()
    monkeypatch.setitem(registry().optimizations, "listener", listener)
    registry().manager.register(listener)
    try:
        feste.compute(Loud().ask(""), volume=7)
        assert listener.heard == {"pass": 7, "observer": 7}
        feste.explain(Loud().ask(""), volume=9)
        assert listener.heard == {"pass": 9, "observer": 7}
    finally:
        registry().manager.unregister(listener)


names = st.sampled_from(["keep", "on_error"])
values = {"keep": ["paid", "all", "none"], "on_error": ["raise", "return", "stop"]}
steps = st.lists(
    st.tuples(st.sampled_from(["set", "enter", "leave"]), names, st.integers(0, 2)), max_size=12
)


@given(steps)
def test_any_order_of_set_and_blocks_agrees_with_a_model(order: list[Any]) -> None:
    """The model: a list of process layers, a stack of blocks; the topmost value counts."""
    blocks: list[tuple[context.Layer, dict[str, str]]] = []
    process: list[dict[str, str]] = []
    try:
        for step, name, index in order:
            value = {name: values[name][index]}
            if step == "set":
                context.set(**value)
                process.append(value)
            elif step == "enter":
                blocks.append((context.set(**value).__enter__(), value))
            elif blocks:
                blocks.pop()[0].__exit__(None, None, None)
            wanted = {n: values[n][0] for n in values}
            for layer in (*process, *(v for _, v in blocks)):
                wanted.update(layer)

            assert {n: context.get(n) for n in values} == wanted
            assert {n: settings()[n] for n in values} == wanted
    finally:
        for layer, _ in reversed(blocks):
            layer.__exit__(None, None, None)
        context._layers.clear()


# --- wrong names and values -------------------------------------------------------------------------


@pytest.mark.parametrize("use", ["set", "get", "settings", "compute", "explain"])
def test_an_unknown_setting_is_refused_with_the_nearest(use: str) -> None:
    """A misspelt setting is an error that names the right one, wherever it is used."""
    llm = FakeBackend()
    uses: dict[str, Any] = {
        "set": lambda: context.set(egaer=True),
        "get": lambda: context.get("egaer"),
        "settings": lambda: settings(egaer=True),
        "compute": lambda: feste.compute(llm.chat("Hi"), egaer=True),
        "explain": lambda: feste.explain(llm.chat("Hi"), egaer=True),
    }
    with pytest.raises(UnknownName, match=r"no setting 'egaer'\. Did you mean 'eager'\?"):
        uses[use]()

    assert llm.requests == []


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"eager": 1}, "setting eager=1: expected bool, not int"),
        ({"eager": "yes"}, "setting eager='yes': expected bool, not str"),
        ({"on_error": "explode"}, "allowed are 'raise', 'return', 'stop'"),
        ({"on_error": ["raise"]}, "allowed are 'raise', 'return', 'stop'"),
        ({"progress": 1}, "allowed are 'auto', True, False"),
        ({"keep": None}, "allowed are 'paid', 'all', 'none'"),
        ({"scheduler": ""}, "expected a name, a URL"),
        ({"scheduler": None}, "expected a name, a URL"),
        ({"optimize": 3}, "expected True, False or a mapping"),
        ({"optimize": {"cse": 0}}, "expected True, False or a mapping"),
        ({"optimize": {1: True}}, "expected True, False or a mapping"),
    ],
)
def test_a_wrong_value_is_refused_before_it_is_set(given: dict[str, Any], said: str) -> None:
    """A value of the wrong type names setting, value and what is expected, and changes nothing."""
    llm = FakeBackend()
    with pytest.raises(ConfigError) as one:
        context.set(keep="all", **given) if "keep" not in given else context.set(**given)
    with pytest.raises(ConfigError) as two:
        llm.chat("Hi").compute(**given)

    assert said in str(one.value)
    assert str(two.value) == str(one.value)
    assert context.get("keep") == "paid"
    assert llm.requests == []


OPTIONAL, UNION = Optional[int], Union[int, str]  # noqa: UP007, UP045 - as others may write them


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        (int, [1, -1], [True, 1.0, "1", None]),
        (float, [1.5, 1], [True, "1.5", None]),
        (bool, [True, False], [1, 0, None]),
        (str, ["a", ""], [b"a", None]),
        (int | None, [1, None], [True, "1"]),
        (OPTIONAL, [1, None], [True, "1"]),
        (UNION, [1, "a"], [True, None]),
        (object, [True, 1, None], []),
        (Literal[1, "a"], [1, "a"], [True, 1.0, "b"]),
        (Literal["a", "b"] | None, ["a", None], ["c", 1]),
        (Literal[1] | float, [1, 0.5, 2], [True, "1"]),
        (list, [[], ["a"]], ["abc", ()]),
    ],
)
def test_types_of_declared_settings(kind: Any, good: list[Any], bad: list[Any]) -> None:
    """A plugin's setting may be a class, a Literal or a union; True is no int and no 1."""
    setting = Setting(good[0], kind, "a test")
    for value in good:
        assert setting.check("x", value) == value
    for value in bad:
        with pytest.raises(ConfigError, match="setting x="):
            setting.check("x", value)


@pytest.mark.parametrize(
    ("default", "kind", "said"),
    [
        ("text", int, "the default: expected int, not str"),
        (None, int, "the default: expected int, not None"),
        (True, int, "the default: expected int, not bool"),
        ("c", Literal["a", "b"], "the default: allowed are 'a', 'b'"),
        (1, Literal["a", "b"] | None, "the default: expected 'a' | 'b' | None, not int"),
        ([], list[str], r"no value can be checked against list\[str\]"),
        (None, list[str] | None, r"no value can be checked against list\[str\]"),
        (1, (int, str), r"no value can be checked against \(<class"),
        (1, Any, "no value can be checked against"),
        (1, "int", "no value can be checked against int"),
        (None, None, "no value can be checked against None"),
    ],
)
def test_a_wrong_declaration_is_refused_as_it_is_made(default: Any, kind: Any, said: str) -> None:
    """The default is of the type, and the type can be checked."""
    with pytest.raises(ConfigError, match=rf"Setting\(.*, 'a test'\): {said}"):
        Setting(default, kind, "a test")


def test_a_setting_may_check_itself() -> None:
    """A callable type returns the value to keep, and may refuse by ValueError."""

    def even(value: Any) -> int:
        if int(value) % 2:
            raise ValueError("expected an even number")
        return int(value)

    setting = Setting(0, even, "a test")

    assert setting.check("x", "4") == 4
    assert setting.parse("x", "4") == 4
    with pytest.raises(ConfigError, match="setting x=3: expected an even number"):
        setting.check("x", 3)
    with pytest.raises(ConfigError, match=r"setting x=\[\]"):
        setting.check("x", [])


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (int, "3", 3),
        (float, "2.5", 2.5),
        (float, "2", 2.0),
        (int | None, "3", 3),
        (OPTIONAL, "", None),
        (float | None, "1e3", 1000.0),
        (int | float, "2.5", 2.5),
        (bool | None, "1", True),
        (bool | None, "off", False),
        (bool | None, "", None),
        (Literal[1, 2, 3], "2", 2),
        (Literal["auto", 1], "1", 1),
        (Literal["auto", 1] | None, "auto", "auto"),
    ],
)
def test_the_environment_is_read_by_the_type(kind: Any, text: str, value: Any) -> None:
    """A text is what the type may be; one that is none of it is refused by the variable's name."""
    setting = Setting(value, kind, "a test")
    found = setting.parse("x", text)

    assert (type(found), found) == (type(value), value)
    with pytest.raises(ConfigError, match=r"FESTE_X='many': (expected|allowed)"):
        setting.parse("x", "many")


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (str, "1", "1"),
        (str, "", ""),
        (str | None, "off", "off"),
        (str | None, "", None),
        (int | str, "7", 7),
        (int | str, "7a", "7a"),
        (Literal["1", 1], "1", "1"),
        (object, "1", "1"),
    ],
)
def test_a_text_stays_one_where_it_may(kind: Any, text: str, value: Any) -> None:
    """Where text and something else are allowed, a text that can be the other is the other."""
    found = Setting(value, kind, "a test").parse("x", text)

    assert (type(found), found) == (type(value), value)


@pytest.mark.parametrize("name", SETTINGS)
def test_every_setting_is_declared_well(name: str) -> None:
    """Each default passes its own check, and each setting has a line of help."""
    setting = SETTINGS[name]

    assert setting.check(name, setting.default) == setting.default
    assert setting.help and "\n" not in setting.help


# --- snapshots --------------------------------------------------------------------------------------


def test_a_snapshot_does_not_follow_later_changes() -> None:
    """A run keeps the settings of its start, whatever is set meanwhile."""
    switches = {"batch": False}
    with context.set(optimize=switches):
        taken = settings()
    switches["batch"] = True
    context.set(keep="all", optimize=False)

    assert (taken.keep, taken.optimize) == ("paid", {"batch": False})


def test_a_snapshot_cannot_be_changed() -> None:
    """Neither by attribute nor by item, nor through a value that it holds."""
    taken: Any = settings(optimize={"batch": False})
    with pytest.raises(AttributeError, match=r"context\.set"):
        taken.keep = "all"
    with pytest.raises(TypeError):
        taken["keep"] = "all"
    with pytest.raises(TypeError):
        taken.optimize["batch"] = True

    assert (taken.keep, taken.optimize) == ("paid", {"batch": False})


@pytest.mark.parametrize("again", [lambda s: pickle.loads(pickle.dumps(s)), copy.deepcopy])
@pytest.mark.parametrize("given", [{}, {"optimize": {"batch": False}}, {"optimize": "a,b"}])
def test_a_snapshot_pickles(again: Any, given: dict[str, Any]) -> None:
    """Another process gets the settings of the run, switched passes too."""
    taken = settings(keep="all", **given)
    back = again(taken)

    assert dict(back) == dict(taken)
    with pytest.raises(AttributeError):
        back.keep = "none"


def test_a_snapshot_is_a_mapping_with_attributes() -> None:
    """Settings read as items and as attributes; a wrong name is an error with a suggestion."""
    taken: Any = settings()

    assert (len(taken), set(taken)) == (len(context.declarations()), set(context.declarations()))
    assert (taken["keep"], taken.keep) == ("paid", "paid")
    assert repr(taken).startswith("Settings(eager=False, ")
    assert not hasattr(taken, "keeep")
    with pytest.raises(UnknownName, match=r"Did you mean 'keep'\?"):
        taken["keeep"]
    with pytest.raises(AttributeError, match=r"Did you mean 'keep'\?"):
        taken.keeep  # noqa: B018


# --- settings of plugins ----------------------------------------------------------------------------

PLUGIN = """
import feste
from feste.context import Setting

@feste.hookimpl
def feste_settings():
    return {"tracing_rate": Setting(0.5, float, "how many runs are traced")}
"""


def plugin(folder: Path, module: str, source: str) -> str:
    """Install a throw-away distribution with one plugin; return the path to find it by."""
    info = folder / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[feste]\n{module} = {module}\n")
    (folder / f"{module}.py").write_text(source)
    return os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])


def test_a_plugin_declares_a_setting(tmp_path: Path) -> None:
    """A declared setting works like Feste's own: keyword, set, environment, check, suggestion."""
    code = """
import feste
from feste import context
seen = [context.get("tracing_rate"), context.settings(tracing_rate=1).tracing_rate]
with context.set(tracing_rate=0.25):
    seen.append(context.settings().tracing_rate)
for wrong in ({"tracing_rate": "much"}, {"tracing_rat": 1.0}):
    try:
        feste.compute(1, **wrong)
    except feste.errors.ConfigError as error:
        seen.append(str(error))
print(json.dumps(seen))
"""
    path = plugin(tmp_path, "feste_traces", PLUGIN)
    found = fresh(
        code, PYTHONPATH=path, FESTE_TRACING_RATE="0.75", FESTE_LOAD_PLUGINS="feste_traces"
    )

    assert found == [
        0.75,
        1.0,
        0.25,
        "setting tracing_rate='much': expected float, not str",
        "no setting 'tracing_rat'. Did you mean 'tracing_rate'?",
    ]


def test_own_settings_load_no_plugin(tmp_path: Path) -> None:
    """Looking at Feste's own settings, and eager calls of prompts, import no plugin."""
    code = """
import sys
import feste
from feste import context
with context.set(eager=True):
    feste.Prompt("Hi {{ x }}")(x=context.get("keep"))
print(json.dumps("feste_traces" in sys.modules))
"""
    assert fresh(code, PYTHONPATH=plugin(tmp_path, "feste_traces", PLUGIN)) is False


def test_a_default_is_seen_while_others_leave_their_blocks() -> None:
    """Another thread may take its own layers out in the middle of a look-up."""

    class Leaving(dict[str, Any]):
        def __contains__(self, name: object) -> bool:
            context._layers[:] = [at for at in context._layers if at.values is not self]
            context._layers[1:] = []
            return False

    context.set(on_error="return")
    for _ in range(3):
        leaving = context.set(keep="all")
        object.__setattr__(leaving, "values", Leaving())

    assert context.get("on_error") == "return"
