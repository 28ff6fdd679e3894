"""Evaluate prompts in part: the constant texts of a prompt whose values are not all known yet.

How a template is cut, and why what is rendered in two steps is exactly what is rendered in one, is
explained in :mod:`feste.prompt.cutting`.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from feste.draw import Determinism
from feste.node import PENDING, Node
from feste.packing import Nested, Slot
from feste.prompt.environment import digest
from feste.prompt.limits import Budget
from feste.prompt.operation import PromptOp
from feste.prompt.template import Template, as_filter

if TYPE_CHECKING:  # it imports Jinja
    from feste.prompt.cutting import Piece

__all__ = ["Evaluator", "Hole", "PartialPromptOp", "known_and_unknown", "segments_of"]


class Hole(NamedTuple):
    """A part of a prompt whose text is not known yet.

    :param names: the variables that it waits for, and the impure globals and filters in it.
    :param piece: the part of the template, or None for the whole template, if it was not cut.
    """

    names: frozenset[str]
    piece: Piece | None = None


Segments = tuple[str | Hole, ...]
Cuts = tuple["tuple[Piece, ...] | None", ...]


class PartialPromptOp(PromptOp):
    """The op of a prompt whose constant parts are rendered; it takes the other variables only.

    :param whole: the op of the prompt.
    :param known: the constant variables.
    :param cuts: the pieces of each template, or None for one that was not cut.
    :param texts: the texts of the constant pieces of each template, in order.
    :param steps: the steps that they took.
    """

    __slots__ = ("cuts", "known", "steps", "texts")

    def __init__(
        self,
        whole: PromptOp,
        known: dict[str, Any],
        cuts: Cuts,
        texts: tuple[tuple[str, ...], ...],
        steps: tuple[int, ...],
    ) -> None:
        super().__init__(whole.templates, whole.roles, whole.language)
        self.known = known
        self.cuts = cuts
        self.texts = texts
        self.steps = steps

    @property
    def identity(self) -> str:
        """A text that identifies the op: equal for equal ops in every run of the program."""
        return digest(repr((super().identity, sorted(self.known.items()))))

    @property
    def is_computed(self) -> bool:
        """Whether a text is more than what is written in the template."""
        for cut, texts in zip(self.cuts, self.texts):
            constants = [piece for piece in cut or () if piece.is_constant]
            if any(text and piece.text is None for piece, text in zip(constants, texts)):
                return True
        return False

    def determinism(self, args: object, kwargs: Mapping[str, Any]) -> Determinism:
        """Return the class of the whole prompt."""
        return super().determinism(args, {**self.known, **kwargs})

    def fn(self, /, **variables: Any) -> Any:
        """Render the rest.

        :param variables: the computed values.
        :raises PlainDataError: for a value that is not plain data.
        :raises PromptError: if rendering fails.
        """
        values = {**self.known, **self.plain({**self._needed(), **variables})}
        return self._made_of([self._text(i, values) for i in range(len(self.templates))])

    def segments(self, unknown: frozenset[str]) -> tuple[Segments, ...]:
        """Return the segments of each template.

        :param unknown: the names of the other variables.
        """
        found = zip(self.templates, self.cuts, self.texts)
        return tuple(_segments(*each, unknown) for each in found)

    def _needed(self) -> dict[str, Any]:
        """Return the constants that holes need as well."""
        known = self.known
        holes = [p for cut in self.cuts if cut for p in cut if not p.is_constant]
        return {name: known[name] for p in holes for name in p.names if name in known}

    def _text(self, i: int, values: dict[str, Any]) -> str:
        template, cut = self.templates[i], self.cuts[i]
        if cut is not None:
            from feste.prompt.compiler import joined

            try:
                budget = Budget(values)
                budget.take(self.steps[i])
                whole = len(cut) == len(self.texts[i])
                return joined(self.texts[i] if whole else self._parts(i, cut, values, budget))
            except Exception:  # the whole template knows the error, and its line
                pass
        return template.render(self.plain(values))

    def _parts(
        self, i: int, cut: tuple[Piece, ...], values: dict[str, Any], budget: Budget
    ) -> Iterator[str]:
        from feste.prompt.filters import BUDGET

        names = {**self.templates[i].environment.globals, **values, BUDGET: budget}
        texts = iter(self.texts[i])
        for piece in cut:
            if piece.is_constant:
                yield next(texts)
            else:
                yield from piece.texts(names)


class Evaluator:
    """Renders the constant parts of prompts, equal parts once; equal results share an op."""

    def __init__(self) -> None:
        self._cuts: dict[Hashable, Cuts] = {}
        self._ops: dict[Hashable, dict[Hashable, PartialPromptOp]] = {}
        self._texts: dict[Hashable, dict[Hashable, tuple[str, int] | None]] = {}

    def partial(
        self, op: PromptOp, known: dict[str, Any], unknown: frozenset[str]
    ) -> PartialPromptOp:
        """Return the op of a prompt with its constant parts rendered.

        :param op: the op of the whole prompt; it must live as long as this object.
        :param known: the constant variables, as a call recorded them.
        :param unknown: the names of the others.
        """
        like = (id(op), unknown)
        if like not in self._cuts:
            self._cuts[like] = tuple(template.pieces(unknown) for template in op.templates)
        exact = {name: _exact(value) for name, value in known.items()}
        made = self._ops.setdefault(like, {})
        same = (*exact, *exact.values())
        if same not in made:
            made[same] = self._partial(op, known, exact, self._cuts[like])
        return made[same]

    def _partial(
        self, op: PromptOp, known: dict[str, Any], exact: dict[str, Hashable], cuts: Cuts
    ) -> PartialPromptOp:
        texts, steps = [], []
        for i, cut in enumerate(cuts):
            rendered = [
                self._rendered(op, op.templates[i], piece, known, exact)
                for piece in cut or ()
                if piece.is_constant
            ]
            done = [each for each in rendered if each is not None]
            if len(done) < len(rendered):
                cuts, done = (*cuts[:i], None, *cuts[i + 1 :]), []
            texts.append(tuple([text for text, _ in done]))
            steps.append(sum([taken for _, taken in done]))
        return PartialPromptOp(op, known, cuts, tuple(texts), tuple(steps))

    def _rendered(
        self,
        op: PromptOp,
        template: Template,
        piece: Piece,
        known: dict[str, Any],
        exact: dict[str, Hashable],
    ) -> tuple[str, int] | None:
        """Return the text of a piece and the steps that it took, or None if it fails."""
        if piece.text is not None:
            return piece.text, 0
        if type(known.get(piece.prints)) is str:
            return known[piece.prints], 0
        names = [name for name in piece.names if name in known]
        done = self._texts.setdefault((piece, template.environment), {})
        same = (*names, *[exact[name] for name in names])  # others are missing
        if same not in done:
            given = {name: known[name] for name in names}
            done[same] = _rendered(op, template, piece, given)
        return done[same]


def _rendered(
    op: PromptOp, template: Template, piece: Piece, given: dict[str, Any]
) -> tuple[str, int] | None:
    from feste.prompt.compiler import joined
    from feste.prompt.filters import BUDGET

    budget = Budget(given, is_whole=False)
    try:
        names = {**template.environment.globals, **op.plain(given), BUDGET: budget}
        return joined(piece.texts(names)), budget.spent
    except Exception:  # the run raises it again
        return None


def _exact(value: Any) -> Hashable:
    """Return a hashable that is equal for equal plain data of equal types."""
    return value if type(value) is str else (repr(value),)


def _segments(
    template: Template,
    cut: tuple[Piece, ...] | None,
    texts: tuple[str, ...],
    unknown: frozenset[str],
) -> Segments:
    if cut is None or any(piece.needs is None for piece in cut):
        return (Hole(template.compiled().allowed & unknown),)
    made: list[str | Hole] = []
    rendered = iter(texts)
    for piece in cut:
        if piece.needs:
            made.append(Hole(frozenset(name.lstrip("|") for name in piece.needs), piece))
            continue
        text = next(rendered)
        if made and isinstance(made[-1], str):
            made[-1] += text
        elif text:
            made.append(text)
    return tuple(made)


def known_and_unknown(node: Node) -> tuple[dict[str, Any], frozenset[str]]:
    """Return the constant variables of a prompt's node, and the names of the others.

    :param node: the node.
    """
    known, unknown = {}, []
    for name, value in node.kwargs.items():
        if type(value) is Slot or type(value) is Nested:
            unknown.append(name)
        else:
            known[name] = value
    return known, frozenset(unknown)


def segments_of(node: Node) -> tuple[Segments, ...]:
    """Return what the texts of a prompt consist of: one for a prompt, or one for each message.

    Neighbouring texts are joined, so a text before the first hole is the whole constant beginning.

    :param node: a prompt's node, rendered or not, with any of its variables known.

    >>> from feste.prompt import Prompt
    >>> node = Prompt("{{ a }}, {{ b }}!")
    >>> segments_of(node(a="Hello", b=node(a=1, b=2))._node)[0][0]
    'Hello, '
    """
    op: Any = node.op
    if node.value is not PENDING:
        texts = [message["content"] for message in node.value] if op.roles else [node.value]
        return tuple((text,) if text else () for text in texts)
    known, unknown = known_and_unknown(node)
    if isinstance(op, PartialPromptOp):
        return op.segments(unknown)
    if node.determinism is not Determinism.PURE:
        impure = frozenset[str]().union(*(t.environment.impure for t in op.templates))
        unknown |= impure.difference(known).union(map(as_filter, impure))
    return Evaluator().partial(op, known, unknown).segments(unknown)
