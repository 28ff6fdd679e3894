"""Prompts: templates with named variables, rendered once, in a sandbox, from plain data.

>>> from feste import context
>>> with context.set(eager=True):
...     Prompt("Hello {{ name }}!")(name="world")
'Hello world!'

The author of a template is trusted, the values of its variables are not: values are copied to plain
data, are never interpreted as a template, and cannot become a message of their own.
"""

from feste.prompt.chat import ChatPrompt
from feste.prompt.environment import FesteEnvironment, default_environment
from feste.prompt.text import Prompt

__all__ = ["ChatPrompt", "FesteEnvironment", "Prompt", "default_environment"]
