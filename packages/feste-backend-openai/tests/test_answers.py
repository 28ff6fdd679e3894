"""The pure halves: schemas out, answers in. Whatever a server says, it is a value or an error."""

from __future__ import annotations

import base64
import struct
import sys
from typing import Annotated, Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from feste.backend import Response, Usage
from feste.backend.openai import ChatParams, CompleteParams, EmbedParams, OpenAI
from feste.backend.openai.answers import usage_of
from feste.backend.openai.schema import response_format, strict_schema
from feste.errors import CountMismatch, MalformedResponse, ParameterError

LLM: Any = OpenAI("m", base_url="http://127.0.0.1:9/v1")
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(0, 3) | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                "choices data index message content text embedding usage finish_reason tool_calls "
                "refusal prompt_tokens prompt_tokens_details model logprobs".split()
            ),
            inner,
            max_size=5,
        )
    ),
    max_leaves=20,
)
_MESSAGES = st.fixed_dictionaries(
    {}, optional={"content": JSON, "tool_calls": JSON, "refusal": JSON}
)
_ITEMS = st.fixed_dictionaries(
    {}, optional={"index": JSON, "message": _MESSAGES | JSON, "text": JSON, "embedding": JSON}
)
PAYLOADS = JSON | st.fixed_dictionaries(
    {}, optional={"choices": st.lists(_ITEMS, max_size=3), "data": st.lists(_ITEMS, max_size=3)}
)


class Point(BaseModel):
    x: int
    y: int = 0


def choice(**parts: Any) -> dict[str, Any]:
    return {"index": 0, "message": {"role": "assistant", "content": "text"}, **parts}


class TestOddAnswers:
    @given(PAYLOADS)
    def test_any_json_is_a_value_or_a_malformed_response(self, payload: Any) -> None:
        """No shape of an answer breaks a parse half with an error of another class."""
        response = Response(payload)
        for call, arguments in (
            (LLM.chat, ["p", ChatParams(), None]),
            (LLM.chat, ["p", ChatParams(n=2), None]),
            (LLM.chat, ["p", ChatParams(), Point]),
            (LLM.complete, ["p", CompleteParams()]),
            (LLM.complete, ["p", CompleteParams(n=2)]),
            (LLM.embed, ["p", EmbedParams()]),
        ):
            try:
                call.parse(response, arguments)
            except MalformedResponse as error:
                assert len(str(error)) < 600
        assert isinstance(usage_of(payload), (Usage, type(None)))

    @given(PAYLOADS)
    def test_any_json_for_a_list_is_full_or_a_mismatch(self, payload: Any) -> None:
        """A packed answer is handed out whole or not at all."""
        for call, params in ((LLM.complete, CompleteParams()), (LLM.embed, EmbedParams())):
            requests = [call.prepare([text, params]) for text in "ab"]
            try:
                got = call.rule.unpack(LLM, call.rule.pack(LLM, requests), Response(payload))
            except CountMismatch:
                continue
            assert len(got) == 2

    def test_no_content_is_an_empty_text(self) -> None:
        """Content may be null: when only tools were called, or the model refused."""
        message = {"role": "assistant", "content": None, "refusal": "no"}
        payload = {"choices": [choice(message=message, finish_reason="stop")]}
        reply = LLM.chat.parse(Response(payload), ["p", ChatParams(), None])
        assert reply == "" and reply.message == {**message, "refusal": "no"}

    def test_a_refusal_is_no_instance(self) -> None:
        """A model that refuses gives no instance, and its words are shown."""
        message = {"role": "assistant", "content": None, "refusal": "I cannot."}
        payload = {"choices": [choice(message=message, finish_reason="stop")]}
        with pytest.raises(MalformedResponse, match=r"refused to answer.*'I cannot\.'"):
            LLM.chat.parse(Response(payload), ["p", ChatParams(), Point])

    def test_a_message_can_go_back(self) -> None:
        """Fields that an endpoint sends but refuses to get, null or empty, are not in the message."""
        message: dict[str, Any] = {
            "role": "assistant", "content": "hi", "refusal": None, "tool_calls": [],
            "annotations": [], "audio": None, "reasoning_content": "hm",
        }  # fmt: skip
        reply = LLM.chat.parse(
            Response({"choices": [choice(message=message)]}), ["", ChatParams(), None]
        )
        assert reply.message == {"role": "assistant", "content": "hi", "reasoning_content": "hm"}

    def test_a_server_that_ignores_n_is_found_out(self) -> None:
        """One choice where three were asked for is an error that names the way round it."""
        response = Response({"choices": [choice(text="a")]})
        for call, params in (
            (LLM.chat, [ChatParams(n=3), None]),
            (LLM.complete, [CompleteParams(n=3)]),
        ):
            with pytest.raises(MalformedResponse, match=r"1 choices instead of 3.*as many calls"):
                call.parse(response, ["p", *params])

    def test_parsing_twice_gives_the_same(self) -> None:
        """A parse half is pure: a stored answer gives its value again."""
        payload = {"choices": [choice()], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
        response = Response(payload, usage_of(payload))
        before = repr(payload)
        one, two = (LLM.chat.parse(response, ["p", ChatParams(), None]) for _ in range(2))
        assert one == two and vars(one) == vars(two) and repr(payload) == before


class TestLists:
    @given(st.lists(st.integers(-1, 7), max_size=8), st.integers(1, 2), st.integers(2, 3))
    @example([1, 0], 1, 2)
    @example([0, 1, 1], 1, 2)
    @example([3, 2, 1, 0], 2, 2)
    @example([0, 1, 2, 4], 2, 2)
    def test_answers_never_cross(self, indexes: list[int], n: int, prompts: int) -> None:
        """Whatever indexes a server gives, each prompt gets its own choices or none gets any."""
        requests = [
            LLM.complete.prepare([f"p{i}", CompleteParams(n=n, temperature=0)])
            for i in range(prompts)
        ]
        packed = LLM.complete.rule.pack(LLM, requests)
        assert packed.body["prompt"] == [f"p{i}" for i in range(prompts)]
        payload = {"choices": [{"index": i, "text": f"for {i}"} for i in indexes]}
        if sorted(indexes) != list(range(n * prompts)):
            with pytest.raises(CountMismatch):
                LLM.complete.rule.unpack(LLM, packed, Response(payload))
            return
        outcomes = LLM.complete.rule.unpack(LLM, packed, Response(payload, Usage(9, 9)))
        for i, outcome in enumerate(outcomes):
            assert outcome.usage is None
            assert outcome.payload["choices"] == [
                {"index": j, "text": f"for {i * n + j}"} for j in range(n)
            ]

    def test_one_bad_choice_costs_one_call(self) -> None:
        """A choice without text fails its own call only."""
        requests = [LLM.complete.prepare([t, CompleteParams()]) for t in "ab"]
        packed = LLM.complete.rule.pack(LLM, requests)
        payload = {"choices": [{"index": 0, "text": None}, {"index": 1, "text": "b"}]}
        bad, good = LLM.complete.rule.unpack(LLM, packed, Response(payload))
        with pytest.raises(MalformedResponse):
            LLM.complete.parse(bad, ["a", CompleteParams()])
        assert LLM.complete.parse(good, ["b", CompleteParams()]) == "b"


class TestVectors:
    @pytest.mark.parametrize(
        "bad",
        [
            None,
            "",
            "!!!",
            "AAA=",
            base64.b64encode(b"12345").decode(),
            [],
            ["x"],
            [None],
            {"a": 1},
            5,
        ],
    )
    def test_what_is_no_vector(self, bad: Any) -> None:
        """Text that is not base64 of 32-bit floats, and lists that are no numbers, are refused."""
        with pytest.raises(MalformedResponse):
            LLM.embed.parse(
                Response({"data": [{"index": 0, "embedding": bad}]}), ["t", EmbedParams()]
            )

    @given(
        st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=9)
    )
    def test_both_encodings_give_the_same_bits(self, numbers: list[float]) -> None:
        """base64 has the lowest byte first on every machine."""
        packed = base64.b64encode(struct.pack(f"<{len(numbers)}f", *numbers)).decode()
        made = [
            LLM.embed.parse(
                Response({"data": [{"index": 0, "embedding": e}]}), ["t", EmbedParams()]
            )
            for e in (packed, numbers)
        ]
        assert made[0] == made[1] and list(made[0]) == numbers
        assert sys.byteorder in ("little", "big")


class TestUsage:
    @pytest.mark.parametrize(
        ("counted", "wanted"),
        [
            ({"prompt_tokens": 9, "completion_tokens": 2}, Usage(9, 2)),
            ({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 8}}, Usage(9, 0, 8)),
            ({"prompt_tokens": 9, "total_tokens": 9, "prompt_tokens_details": None}, Usage(9)),
            (
                {"prompt_tokens": 9, "prompt_tokens_details": {"cache_write_tokens": 7}},
                Usage(9, written=7),
            ),
            ({"prompt_tokens": None, "completion_tokens": "many"}, Usage()),
            (None, None),
        ],
    )
    def test_tokens(self, counted: Any, wanted: Usage | None) -> None:
        """Tokens read, generated and cached, where the server counts them."""
        assert usage_of({"usage": counted}) == wanted


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]


class Tree(BaseModel):
    """A model that holds itself, once with words beside the reference."""

    value: int
    left: Tree | None = None
    right: Annotated[Tree | None, Field(description="the greater half")] = None
    best: Annotated[Cat, Field(description="the best cat")]
    default: Annotated[str, Field(description="a property of that name")] = "x"
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]


class Link(BaseModel):
    next: Annotated[Link, Field(description="the next one")]


class TestSchema:
    def test_it_is_strict_all_the_way_down(self) -> None:
        """All properties are required and no others allowed; no words that strict mode refuses."""
        made = response_format(Tree)["json_schema"]["schema"]
        assert made["type"] == "object" and set(made["required"]) == set(Tree.model_fields)
        stack: list[Any] = [made]
        while stack:
            part = stack.pop()
            if isinstance(part, list):
                stack.extend(part)
            elif isinstance(part, dict):
                if part.get("type") == "object":
                    assert part["additionalProperties"] is False
                    assert part["required"] == list(part["properties"])
                    stack.extend(part["properties"].values())
                assert "$ref" not in part or len(part) == 1
                assert not {"oneOf", "discriminator", "allOf"} & part.keys()
                assert not isinstance(part.get("default"), (str, int, type(None))) or (
                    "default" not in part
                )
                stack.extend(v for k, v in part.items() if k != "properties")
        assert made["properties"]["best"]["description"] == "the best cat"
        assert made["properties"]["default"]["type"] == "string"

    def test_a_model_without_end_has_a_schema_with_one(self) -> None:
        """A reference with words beside it is written out, but not inside itself."""
        made = response_format(Link)["json_schema"]["schema"]
        first = made["properties"]["next"]
        assert first["description"] == "the next one" and first["type"] == "object"
        assert first["properties"]["next"] == {"$ref": "#/$defs/Link"}

    @pytest.mark.parametrize("model", [Point, Cat])
    def test_it_agrees_with_the_sdk(self, model: Any) -> None:
        """For plain models it is what the SDK's own helper makes, less the defaults."""
        import openai

        theirs: Any = openai.pydantic_function_tool(model)["function"]["parameters"]
        for described in theirs["properties"].values():
            described.pop("default", None)
        assert response_format(model)["json_schema"]["schema"] == theirs

    def test_names_are_those_that_providers_take(self) -> None:
        """A schema's name is letters, digits, _ and -, at most 64 of them."""
        odd = type("Größe[int] " + "x" * 80, (BaseModel,), {"__module__": __name__})
        name = response_format(odd)["json_schema"]["name"]
        assert name.isascii() and len(name) == 64 and " " not in name and "[" not in name

    def test_a_schema_is_made_once(self) -> None:
        """A thousand calls with one model make one schema."""
        assert response_format(Point) is response_format(Point)
        assert strict_schema({"type": "string"}) == {"type": "string"}

    @pytest.mark.parametrize("output", [dict, int, "Point", Point(x=1), list[Point]])
    def test_what_is_no_model(self, output: Any) -> None:
        """Only pydantic models are outputs; for other JSON there is response_format."""
        with pytest.raises(ParameterError, match=r"pydantic\.BaseModel"):
            LLM.chat.prepare(["p", ChatParams(), output])

    def test_not_both(self) -> None:
        """output= and response_format= say the same thing twice."""
        params = ChatParams(response_format={"type": "json_object"})
        with pytest.raises(ParameterError, match="not both"):
            LLM.chat.prepare(["p", params, Point])
