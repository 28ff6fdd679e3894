"""OpenAI, and with ``base_url`` all servers with its protocol (vLLM, llama.cpp, Ollama).

>>> from feste.backend.openai import ChatParams, OpenAI
>>> llm = OpenAI(model="gpt-5-mini")
>>> haiku = llm.chat("A haiku about rain.", ChatParams(max_completion_tokens=64))  # nothing is sent

Importing this does not import the SDK; sending the first request does.
"""

from feste.backend import Reply
from feste.backend.openai.client import OpenAI
from feste.backend.openai.params import ChatParams, CompleteParams, EmbedParams

__all__ = ["ChatParams", "CompleteParams", "EmbedParams", "OpenAI", "Reply"]
