"""A fake backend that has what real ones have and complicates planning: accounts, limits, effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from feste.backend import Determinism, Limits, Operation, Profile, Request, Response, SampleRule
from feste.testing.fake_backend import FakeBackend, FakeParams

__all__ = ["OddBackend", "VoicedParams"]


class VoicedParams(FakeParams):
    """Parameters of which one is not sent: it says how the answer is read."""

    voice: str = "plain"

    def body(self) -> dict[str, Any]:
        """Return the parameters that are sent."""
        return {name: value for name, value in super().body().items() if name != "voice"}


class OddBackend(FakeBackend):
    """A fake backend with an account, a limit of answers to one prompt, and calls with effects.

    It sends prompts with the word "green" by another route, so that calls with equal parameters may
    have requests that differ in more than the prompt; and says one answer in several voices, so that
    calls with equal requests may have values that differ.

    :param model: as for :class:`FakeBackend`.
    :param tenant: the account.
    :param draws: the maximum number of answers to one prompt in one request; None is unknown.
    :param limits: as for any backend.
    """

    plugin = "odd"

    def __init__(
        self,
        model: str = "fake-1",
        *,
        tenant: str = "a",
        draws: int | None = None,
        limits: Limits | None = None,
    ) -> None:
        super().__init__(model, limits=limits)
        self.tenant = tenant
        self.draws = draws

    @property
    def account(self) -> str:
        """The tenant, to which limits and bills belong."""
        return self.tenant

    def config(self) -> Mapping[str, Any]:
        """Return the configuration of an equal backend."""
        return {**super().config(), "tenant": self.tenant}

    def profile(self, model: str) -> Profile:
        """Return the limit of answers to one prompt.

        :param model: unused; all models are alike.
        """
        return Profile(max_draws=self.draws)

    def _prepare_routed(self, prompt: str, params: FakeParams = FakeParams()) -> Request:
        """Continue a text."""
        request = self._prepare_complete(prompt, params)
        if "green" not in prompt:
            return request
        return replace(request, body={**request.body, "route": "green"})

    complete = Operation(
        prepare=_prepare_routed,
        send=FakeBackend._send,
        parse=FakeBackend._parse_text,
        samples=FakeBackend.complete.samples,
        batch=FakeBackend.complete.rule,
    )

    def _prepare_publish(self, prompt: str, params: FakeParams = FakeParams()) -> Request:
        """Publish a text: a call with an effect, of a kind that could be listed."""
        return self._request("publish", {"prompt": prompt, "tenant": self.tenant}, params)

    publish = Operation(
        prepare=_prepare_publish,
        send=FakeBackend._send,
        parse=FakeBackend._parse_text,
        determinism=Determinism.EFFECT,
        samples=SampleRule(FakeBackend._several),
        batch=FakeBackend.complete.rule,
    )

    def _prepare_say(self, text: str, params: VoicedParams = VoicedParams()) -> Request:
        """Answer in a voice."""
        return self._prepare_chat(text, FakeParams(**params.body()))

    def _parse_say(self, response: Response, arguments: Mapping[str, Any]) -> str:
        said = str(self._parse_text(response, arguments))
        return said.upper() if arguments["params"].voice == "loud" else said

    say = Operation(prepare=_prepare_say, send=FakeBackend._send, parse=_parse_say)
