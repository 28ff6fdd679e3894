"""Whatever stands in the metadata of a distribution: it is listed, not run, and cannot act on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import tempfile
import warnings
from pathlib import Path
from unittest import mock

from hypothesis import given
from hypothesis import strategies as st

from feste.cli import main
from feste.errors import PluginError, PluginWarning
from feste.installed import PluginInfo, installed
from feste.plugins import Registry
from tests.fuzz.sizes import cases

JUNK = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="\x1b\x07\x00\x85\u202e\u2028[]=:;.,#%$(){}!~ \t\r\nab1", max_size=30),
    st.sampled_from(
        [
            "feste_canary",
            "feste_canary:plugin",
            "feste_canary.sub:a.b [extra]",
            "feste",
            "openai",
            "../feste_canary",
            "..feste_canary",
            "/etc/passwd",
            "os:system",
            "a" * 5000,
            "\x1b]0;title\x07",
            "\ud800",
            "__import__('feste_canary')",
            "feste-core>=99",
            "feste-core (>=1",
            "1.0; python_version < '3'",
        ]
    ),
)
NAMES = st.one_of(JUNK, st.sampled_from(["mine", "other", "[feste]", "[console_scripts]"]))
ENTRY_POINTS = st.one_of(
    st.lists(st.tuples(NAMES, JUNK), max_size=4).map(
        lambda pairs: "[feste]\n" + "\n".join(f"{name} = {value}" for name, value in pairs)
    ),
    JUNK,
)
FIELDS = st.sampled_from(["Name", "Version", "Requires-Dist", "Metadata-Version", "Provides-Extra"])
METADATA = st.one_of(
    st.lists(st.tuples(FIELDS, JUNK), max_size=6).map(
        lambda pairs: "\n".join(f"{name}: {value}" for name, value in pairs) + "\n"
    ),
    JUNK,
)
#: Bytes that are no text, between those that are.
BYTES = st.sampled_from([b"", b"", b"", b"\xff\xfe", b"\x00", b"\xed\xa0\x80"])
#: Each case makes files, and reads all that is installed.
CASES = cases(10, full=400)
FOLDERS = st.sampled_from(
    [
        "mine-1.0.dist-info",
        "mine.dist-info",
        "-.dist-info",
        "mine-1.0.egg-info",
        "\x1b[2J-1.dist-info",
    ]
)


def encoded(text: str, junk: bytes) -> bytes:
    return text.encode("utf-8", "surrogatepass") + junk


@contextlib.contextmanager
def canary(folder: Path) -> object:
    """Put a module there that notes it when it is imported, and what is imported into the path."""
    (folder / "feste_canary").mkdir()
    note = f"open({str(folder / 'imported')!r}, 'w')"
    for name in ("__init__.py", "sub.py"):
        (folder / "feste_canary" / name).write_text(note)
    with mock.patch.object(sys, "path", [str(folder), *sys.path]):
        yield


def listed(*options: str) -> tuple[int, str]:
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(shown):
        code = main(["plugins", *options])
    return code, shown.getvalue()


@CASES
@given(FOLDERS, ENTRY_POINTS, METADATA, st.lists(BYTES, min_size=2, max_size=2), st.booleans())
def test_any_metadata_is_listed_and_nothing_is_imported(
    name: str, points: str, metadata: str, junk: list[bytes], blocked: bool
) -> None:
    """Discovery and both forms of the list go through, and show what a terminal only shows."""
    with tempfile.TemporaryDirectory() as made, canary(folder := Path(made)):
        (folder / name).mkdir()
        (folder / name / "entry_points.txt").write_bytes(encoded(points, junk[0]))
        for file in ("METADATA", "PKG-INFO"):
            (folder / name / file).write_bytes(encoded(metadata, junk[1]))
        modules = set(sys.modules)
        setting = {"FESTE_LOAD_PLUGINS": ""} if blocked else {}
        with mock.patch.dict(os.environ, setting):
            found = installed()
            code, table = listed()
            _, rows = listed("--json")
            if blocked:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", PluginWarning)
                    Registry()

        assert not (folder / "imported").exists()
        assert not [m for m in set(sys.modules) - modules if m.startswith("feste_canary")]
        assert all(line.isprintable() for line in table.split("\n"))
        assert len(json.loads(rows)) == len(found) + 3  # Feste's own parts come first
        assert code == int(any(info.state == "broken" for info in found))
        assert all(isinstance(i, PluginInfo) and i.origin.isprintable() for i in found)


@CASES
@given(st.lists(st.tuples(NAMES, JUNK.filter(lambda text: "canary" not in text)), max_size=3))
def test_any_entry_point_that_cannot_be_loaded_is_a_warning(pairs: list[tuple[str, str]]) -> None:
    """Loading names what is broken and goes on; its warnings can be shown on a terminal."""
    points = "[feste]\n" + "\n".join(f"{name} = {value}" for name, value in pairs)
    with tempfile.TemporaryDirectory() as made, canary(folder := Path(made)):
        (folder / "mine-1.0.dist-info").mkdir()
        (folder / "mine-1.0.dist-info" / "METADATA").write_text("Name: mine\nVersion: 1.0\n")
        (folder / "mine-1.0.dist-info" / "entry_points.txt").write_bytes(encoded(points, b""))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            registry = Registry()
        told = [str(one.message) for one in caught if issubclass(one.category, PluginWarning)]
        broken = [info for info in registry.plugins if info.state == "broken"]

        assert len(told) == len(broken)
        assert all(text.isprintable() for text in told)
        assert "batch" in registry.optimizations


@CASES
@given(st.text(alphabet=st.characters(exclude_characters="\0", exclude_categories=["Cs"])))
def test_any_list_of_names_in_the_environment_is_taken(names: str) -> None:
    """Those that no plugin has are told, each once, and the rest goes on."""
    wanted = {name.strip() for name in names.split(",")} - {""}
    with mock.patch.dict(os.environ, {"FESTE_DISABLED_PLUGINS": names}):
        known = {info.name for info in installed()}
        with contextlib.suppress(PluginError), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            Registry()
    told = [str(one.message) for one in caught if issubclass(one.category, PluginWarning)]

    assert len(told) == len(wanted - known)
    assert all(text.isprintable() for text in told)
