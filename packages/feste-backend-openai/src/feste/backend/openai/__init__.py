"""OpenAI, and every server that speaks its protocol (vLLM, llama.cpp, Ollama) by ``base_url``.

>>> from feste.backend.openai import ChatParams, OpenAI
>>> llm = OpenAI(model="gpt-5-mini")
>>> haiku = llm.chat("A haiku about rain.", ChatParams(max_completion_tokens=64))  # nothing is sent

Importing it does not import the SDK: that happens when the first request is sent.
"""

from feste.backend import Reply
from feste.backend.openai.client import OpenAI
from feste.backend.openai.params import ChatParams, CompleteParams, EmbedParams

__all__ = ["ChatParams", "CompleteParams", "EmbedParams", "OpenAI", "Reply"]
