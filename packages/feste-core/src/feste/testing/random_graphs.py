"""Random graphs of all kinds of nodes, each made from a seed: what a pass must leave as it is.

They hold several backends, models, accounts and limits; calls that look alike and are not, and calls
that are equal though they do not look so; prompts that are known, partly known and broken; tasks that
are pure, have effects, raise, and return further calls; values that are known before the run; nodes
that nothing needs.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Sequence
from typing import Any

import feste
from feste.backend import Limits, Reply
from feste.prompt import ChatPrompt, Prompt
from feste.testing.fake_backend import FakeBackend, FakeParams
from feste.testing.odd_backend import OddBackend
from feste.testing.traces import POISON, Effects, Example

__all__ = ["random_graph"]

# --- tasks and prompts ----------------------------------------------------------------------------


@feste.task(pure=True)
def _same(value: Any) -> Any:
    return value


@feste.task(pure=True)
def _text(*values: Any) -> str:
    return " ".join(map(str, values))


@feste.task(pure=True)
def _params(maximum: int) -> FakeParams:
    return FakeParams(max_tokens=maximum)


@feste.task(pure=True)
def _broken(value: Any) -> Any:
    raise ValueError(f"broken by {value}")


@feste.task
def _note(log: Effects, mark: Any, *values: Any) -> str:
    log.entries.append((mark, str(values)))
    return f"note {mark} {len(str(values))}"


@feste.task
def _fails(log: Effects, mark: Any, value: Any) -> str:
    log.entries.append((mark, str(value)))
    raise KeyError(f"fails at {mark}")


@feste.task(emits=True)
def _agent(log: Effects, mark: Any, llm: FakeBackend, value: Any, calls: int) -> Any:
    log.entries.append((mark, str(value)))
    asked: list[Any] = []
    for i in range(calls):
        text = f"{value} {i // 2}"
        asked += [llm.complete(text), llm.complete(text, FakeParams(temperature=0))]
        asked.append(llm.embed(text))
    return [*asked, _note(log, (mark, "inner"), asked[0])]


@feste.task
def _undeclared(llm: FakeBackend, value: Any) -> Any:
    return llm.chat(f"undeclared {value}")


_PARAMS: tuple[dict[str, Any], ...] = (
    *({},) * 6,
    *({"temperature": 0},) * 3,
    {"temperature": 0.0},
    {"temperature": 1},
    {"seed": 1},
    {"seed": 2},
    {"n": 1},
    {"n": 3},
    {"n": 3, "temperature": 0},
    {"seed": 1, "n": 3},
    {"max_tokens": 8},
    {"max_tokens": 8, "temperature": 0},
    {"model": "fake-9"},
)


def random_graph(seed: int) -> Example:
    """Return a random program; equal seeds give equal programs.

    :param seed: the seed.

    >>> example = random_graph(7)
    >>> len(feste.graph.FesteGraph.collect(example.wanted)[0].nodes) > 1
    True
    """
    return _Maker(random.Random(seed)).make()


class _Prompts:
    """The prompts; they load the template engine, so they are made when the first graph is."""

    def __init__(self) -> None:
        self.one = Prompt("Say {{ x }}")
        self.same = Prompt("Say {{ y }}")  # another prompt, and the same text
        self.two = Prompt("{{ x }} and {{ y }}")
        self.loop = Prompt("{% for s in items %}- {{ s }}\n{% endfor %}")
        self.broken = Prompt("{{ x.missing.deeper }}")
        self.chat = ChatPrompt("You are {{ who }}.", "{{ question }}")


_prompts = functools.cache(_Prompts)


class _Maker:
    """Makes one program, node by node; later nodes use earlier ones."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng
        self.prompts = _prompts()
        self.log = Effects()
        self.texts: list[Any] = []
        self.made: list[Any] = []
        self.words = ["red", "green", "blue", "red green"][: rng.choice([1, 2, 4])]
        if rng.random() < 0.15:
            self.words.append(POISON)
        self.clients = [self._client() for _ in range(rng.choice([1, 2, 2, 4]))]

    def _client(self) -> FakeBackend:
        rng = self.rng
        items = rng.choice([None, None, None, 1, 2, 3])
        limits = Limits(concurrency=512, max_items=items)
        model = rng.choice(["fake-1", "fake-1", "fake-2"])
        if rng.random() < 0.4:
            return FakeBackend(model, limits=limits)
        tenant, draws = rng.choice("aab"), rng.choice([None, None, 1, 2, 3])
        return OddBackend(model, tenant=tenant, draws=draws, limits=limits)

    def make(self) -> Example:
        rng = self.rng
        steps: Sequence[tuple[Callable[[], Any], int]] = (
            (self._calls, 8),
            (self._twins, 4),
            (self._prompt, 3),
            (self._task, 3),
            (self._operator, 2),
            (self._chain, 2),
            (self._growing, 1),
            (self._known, 1),
            (self._failing, 1),
        )
        kinds, weights = [kind for kind, _ in steps], [weight for _, weight in steps]
        for kind in rng.choices(kinds, weights, k=rng.choice([2, 4, 7, 12])):
            kind()
        if not self.made:  # each step needed something to work on
            self._calls()
        wanted = [node for node in self.made if rng.random() < 0.7] or self.made[:1]
        shape = rng.choice([wanted, {"first": wanted[0], "others": tuple(wanted[1:])}])
        return Example(shape, self.made, self.log)

    # --- parts ------------------------------------------------------------------------------------

    def _keep(self, node: Any, text: bool = True) -> Any:
        self.made.append(node)
        if text:
            self.texts.append(node)
        return node

    def _word(self) -> str:
        return self.rng.choice(self.words)

    def _value(self) -> Any:
        """A word or an earlier text."""
        if self.texts and self.rng.random() < 0.45:
            return self.rng.choice(self.texts)
        return self._word()

    def _given(self) -> Any:
        """Parameters, which may hold nodes or be one."""
        rng = self.rng
        if rng.random() < 0.06:
            return _params(rng.choice([8, 9]))
        given = dict(rng.choice(_PARAMS))
        if rng.random() < 0.06:
            given["max_tokens"] = _same(rng.choice([8, 9]))
        return FakeParams(**given)

    def _call(self, llm: FakeBackend, text: Any, given: Any) -> Any:
        """A call, kept as a text if it gives one."""
        kind = self.rng.choice(["complete"] * 4 + ["chat", "chat", "embed", "embed", "publish"])
        if kind == "publish" and not isinstance(llm, OddBackend):
            kind = "complete"
        if kind == "embed":
            return self._keep(llm.embed(text), text=False)
        node: Any = getattr(llm, kind)(text, given)
        if _several(given):
            self._keep(node, text=False)
            node = node[self.rng.randrange(3)]
        return self._keep(node)

    # --- steps ------------------------------------------------------------------------------------

    def _calls(self) -> None:
        """Some calls that may share requests; they differ in one thing, or in nothing."""
        rng = self.rng
        llm, given = rng.choice(self.clients), self._given()
        name = rng.choice(["complete", "complete", "embed"])
        shared = self._value()
        for _ in range(rng.randint(1, 6)):
            other = rng.random()
            text = self._value() if other < 0.5 else shared
            own = self._given() if 0.5 <= other < 0.65 else given
            client = rng.choice(self.clients) if 0.65 <= other < 0.75 else llm
            if name == "embed":
                self._keep(client.embed(text), text=False)
            else:
                self._keep(client.complete(text, own), text=not _several(own))
        if rng.random() < 0.3:
            self._call(llm, shared, given)

    def _twins(self) -> None:
        """Calls that are equal, or that become equal when their inputs are merged."""
        rng = self.rng
        llm, given, text = rng.choice(self.clients), self._given(), self._value()
        alike: list[Callable[[], Any]] = [
            lambda: self.prompts.one(x=text),
            lambda: self.prompts.one(x=text),
            lambda: self.prompts.same(y=text),
        ]
        rng.shuffle(alike)
        state = rng.getstate()
        for prompt in alike:
            rng.setstate(state)  # the same choices again
            inner = prompt() if rng.random() < 0.5 else text
            inner = _text(inner) if rng.random() < 0.3 else inner
            if rng.random() < 0.5:
                self._call(llm, inner, given)
            else:
                self._call(llm, inner, given)  # at another line

    def _prompt(self) -> None:
        rng = self.rng
        kind = rng.randrange(4)
        if kind == 0:
            self._keep(self.prompts.one(x=self._value()))
        elif kind == 1:
            self._keep(self.prompts.two(x=self._value(), y=self._word()))
        elif kind == 2:
            self._keep(self.prompts.loop(items=[self._value() for _ in range(rng.randint(0, 4))]))
        else:
            chat = self._keep(
                self.prompts.chat(who=self._word(), question=self._value()), text=False
            )
            llm = rng.choice(self.clients)
            self._keep(llm.chat(chat))
            if rng.random() < 0.5:
                self._keep(llm.chat(chat[1]["content"]))

    def _task(self) -> None:
        rng = self.rng
        kind = rng.randrange(3)
        if kind == 0:
            self._keep(_text(self._value(), [self._value(), {"in": self._value()}]))
        elif kind == 1:
            self._keep(_same(self._value()))
        else:
            some = rng.sample(self.made, min(len(self.made), rng.randrange(3)))
            self._keep(_note(self.log, len(self.made), *some, {"with": self._value()}))

    def _operator(self) -> None:
        if not self.texts:
            return
        text = self.rng.choice(self.texts)
        kind = self.rng.randrange(4)
        made = [lambda: text + "!", lambda: "so " + text, lambda: text[2:], lambda: text.upper()]
        self._keep(made[kind]())

    def _chain(self) -> None:
        """Calls of two groups that feed each other, in both directions."""
        rng = self.rng
        one, two = rng.choice(self.clients), rng.choice(self.clients)
        for _ in range(rng.randint(1, 3)):
            first, last = (one, two) if rng.random() < 0.5 else (two, one)
            middle = first.complete(self._value())
            self._keep(last.complete(self.prompts.one(x=middle) if rng.random() < 0.5 else middle))
            if rng.random() < 0.4:
                self._keep(first.embed(middle), text=False)

    def _growing(self) -> None:
        rng = self.rng
        llm = rng.choice(self.clients)
        if rng.random() < 0.7:
            node = _agent(self.log, len(self.made), llm, self._value(), rng.randint(1, 4))
            self._keep(node, text=False)
            self._keep(node[0])
        else:
            self._keep(_undeclared(llm, self._value()))

    def _known(self) -> None:
        """Calls that were answered before, otherwise than they would be now."""
        llm, text, given = self.rng.choice(self.clients), self._word(), FakeParams(temperature=0)
        node = llm.complete(text, self.rng.choice([given, FakeParams()]))
        node._node.value = Reply(f"{self._word()} before")
        self._keep(node)
        if self.rng.random() < 0.6:
            self._keep(llm.complete(text, given))
        if self.rng.random() < 0.6:
            self._keep(llm.complete(node))

    def _failing(self) -> None:
        kind = self.rng.randrange(4)
        if kind == 0:
            self._keep(self.prompts.broken(x=self._value()))
        elif kind == 1:
            self._keep(_broken(self._value()))
        elif kind == 2:
            self._keep(_fails(self.log, len(self.made), self._value()))
        else:
            self._keep(self.rng.choice(self.clients).complete(_same(3)))


def _several(given: Any) -> bool:
    return isinstance(given, FakeParams) and given.n == 3
