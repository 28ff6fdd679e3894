"""Parameters of the operations: every one that the endpoint takes, by its own name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from feste.backend import Params

__all__ = ["ChatParams", "EmbedParams", "GenerateParams"]

Objects = Sequence[Mapping[str, Any]]


class ChatParams(Params):
    """Parameters of a chat; what is None is not sent, so Cohere's default holds.

    :param model: another model than the client's.
    :param max_tokens: tokens to generate, at most.
    :param temperature: how random the answer is; 0 asks for the same answer each time.
    :param seed: asks for the same answer to the same request.
    :param k: choose among so many most likely tokens only.
    :param p: choose among the most likely tokens with this total probability only.
    :param frequency_penalty: how much to avoid tokens the more often they came.
    :param presence_penalty: how much to avoid tokens that came at all.
    :param stop_sequences: texts that end the answer, up to five.
    :param logprobs: give the log-probabilities of the tokens.
    :param response_format: the form of the answer, as the API takes it; ``output=`` of the call
        does it for pydantic models.
    :param tools: functions that the model may call.
    :param tool_choice: ``"REQUIRED"`` or ``"NONE"``.
    :param strict_tools: keep calls of tools strictly to their definitions.
    :param documents: texts or documents that the answer may cite.
    :param citation_options: how to cite.
    :param safety_mode: which safety instruction goes into the prompt.
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

    :param model: another model than the client's.
    :param input_type: what the vector is for: ``"search_document"``, ``"search_query"``,
        ``"classification"`` or ``"clustering"``.
    :param embedding_types: the forms of the vector: ``"float"``, ``"int8"``, ``"uint8"``,
        ``"binary"``, ``"ubinary"``, ``"base64"``. With one, the value is an array of it; with
        several, a dict of arrays.
    :param output_dimension: the length of the vector.
    :param max_tokens: tokens of the text to embed, at most.
    :param truncate: which end of a text that is too long to drop: ``"START"``, ``"END"``, or
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

    :param model: another model than the client's; the endpoint has a default of its own.
    :param num_generations: answers to give, from 1 to 5; with more than one the value is a list.
    :param max_tokens: tokens to generate, at most.
    :param temperature: how random the answer is; 0 asks for the same answer each time.
    :param seed: asks for the same answer to the same request.
    :param k: choose among so many most likely tokens only.
    :param p: choose among the most likely tokens with this total probability only.
    :param frequency_penalty: how much to avoid tokens the more often they came.
    :param presence_penalty: how much to avoid tokens that came at all.
    :param end_sequences: texts before which the answer is cut.
    :param stop_sequences: texts after which the answer is cut.
    :param truncate: which end of a prompt that is too long to drop, or ``"NONE"``.
    :param preset: the id of parameters kept at Cohere.
    :param return_likelihoods: ``"GENERATION"`` gives the likelihoods of the tokens.
    :param raw_prompting: hand the prompt to the model as it is.
    :param extra: further fields of the body.
    """

    def max_output(self) -> int | None:
        """Return how many tokens one call may generate at most; None if nothing bounds them."""
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
