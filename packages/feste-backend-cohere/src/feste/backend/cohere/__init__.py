"""The Cohere backend of Feste.

>>> llm = Cohere(model="command-a-03-2025")
>>> llm
Cohere(model='command-a-03-2025', base_url='https://api.cohere.com', timeout=300.0)
>>> haiku = llm.chat("A haiku about rain.", ChatParams(max_tokens=64))

Nothing has been sent: ``haiku.compute()`` sends it, with the key from the environment variable
``CO_API_KEY``, and imports the SDK first.
"""

from __future__ import annotations

from feste.backend.cohere.client import Cohere
from feste.backend.cohere.params import ChatParams, EmbedParams, GenerateParams

__all__ = ["ChatParams", "Cohere", "EmbedParams", "GenerateParams"]
