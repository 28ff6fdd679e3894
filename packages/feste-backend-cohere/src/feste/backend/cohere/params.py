"""The parameters of the operations, all of them under the names that the endpoints use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from feste.backend import Params

__all__ = ["ChatParams", "EmbedParams", "GenerateParams"]

Objects = Sequence[Mapping[str, Any]]


class ChatParams(Params):
    """Parameters of a chat; None is not sent, so Cohere's default applies.

    :param model: overrides the backend's model.
    :param max_tokens: the maximum number of tokens to generate.
    :param temperature: the randomness of the answer; 0 asks for the same answer each time.
    :param seed: asks for the same answer to the same request.
    :param k: sample from this number of most likely tokens only.
    :param p: sample from the most likely tokens with this total probability only.
    :param frequency_penalty: the penalty for tokens in proportion to their earlier occurrences.
    :param presence_penalty: the penalty for tokens that have occurred at all.
    :param stop_sequences: texts that end the answer, up to five.
    :param logprobs: return the log-probabilities of the tokens.
    :param response_format: the format of the answer, as in the API; for pydantic models use
        ``output=`` of the call.
    :param tools: functions that the model may call.
    :param tool_choice: ``"REQUIRED"`` or ``"NONE"``.
    :param strict_tools: make tool calls follow their definitions strictly.
    :param documents: texts or documents that the answer may cite.
    :param citation_options: options of citations.
    :param safety_mode: the safety instruction in the prompt.
    :param thinking: whether and how long the model reasons first.
    :param priority: smaller numbers are served first when Cohere is busy.
    :param extra: further fields of the body.
    """

    model: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    k: int | None = None
    p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    stop_sequences: Sequence[str] | None = None
    logprobs: bool | None = None
    response_format: Mapping[str, Any] | None = None
    tools: Objects | None = None
    tool_choice: Literal["REQUIRED", "NONE"] | None = None
    strict_tools: bool | None = None
    documents: Sequence[str | Mapping[str, Any]] | None = None
    citation_options: Mapping[str, Any] | None = None
    safety_mode: Literal["CONTEXTUAL", "STRICT", "OFF"] | None = None
    thinking: Mapping[str, Any] | None = None
    priority: int | None = None
    extra: Mapping[str, Any] | None = None


class EmbedParams(Params):
    """Parameters of an embedding.

    :param model: overrides the backend's model.
    :param input_type: the purpose of the vector: ``"search_document"``, ``"search_query"``,
        ``"classification"`` or ``"clustering"``.
    :param embedding_types: the formats of the vector: ``"float"``, ``"int8"``, ``"uint8"``,
        ``"binary"``, ``"ubinary"``, ``"base64"``. With one format, the value is an array; with
        several, a dict of arrays.
    :param output_dimension: the length of the vector.
    :param max_tokens: the maximum number of tokens of the text to embed.
    :param truncate: the end to cut from a text that is too long: ``"START"``, ``"END"``, or
        ``"NONE"`` to refuse it.
    :param priority: smaller numbers are served first when Cohere is busy.
    :param extra: further fields of the body.
    """

    def max_output(self) -> int:
        """Return 0: vectors are not generated token by token."""
        return 0

    model: str | None = None
    input_type: str = "search_document"
    embedding_types: Sequence[str] = ("float",)
    output_dimension: int | None = None
    max_tokens: int | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    priority: int | None = None
    extra: Mapping[str, Any] | None = None


class GenerateParams(Params):
    """Parameters of the legacy generation.

    :param model: overrides the backend's model; the endpoint has a default of its own.
    :param num_generations: the number of answers, from 1 to 5; above 1 the value is a list.
    :param max_tokens: the maximum number of tokens to generate.
    :param temperature: the randomness of the answer; 0 asks for the same answer each time.
    :param seed: asks for the same answer to the same request.
    :param k: sample from this number of most likely tokens only.
    :param p: sample from the most likely tokens with this total probability only.
    :param frequency_penalty: the penalty for tokens in proportion to their earlier occurrences.
    :param presence_penalty: the penalty for tokens that have occurred at all.
    :param end_sequences: texts before which the answer is cut.
    :param stop_sequences: texts after which the answer is cut.
    :param truncate: the end to cut from a prompt that is too long, or ``"NONE"``.
    :param preset: the ID of parameters stored at Cohere.
    :param return_likelihoods: ``"GENERATION"`` returns the likelihoods of the tokens.
    :param raw_prompting: pass the prompt to the model unchanged.
    :param extra: further fields of the body.
    """

    whole_numbers = Params.whole_numbers | {"num_generations"}

    def max_output(self) -> int | None:
        """Return the maximum number of tokens one call may generate; None if there is no bound."""
        return None if self.max_tokens is None else self.max_tokens * (self.num_generations or 1)

    model: str | None = None
    num_generations: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    seed: int | None = None
    k: int | None = None
    p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    end_sequences: Sequence[str] | None = None
    stop_sequences: Sequence[str] | None = None
    truncate: Literal["NONE", "START", "END"] | None = None
    preset: str | None = None
    return_likelihoods: Literal["GENERATION", "ALL", "NONE"] | None = None
    raw_prompting: bool | None = None
    extra: Mapping[str, Any] | None = None
