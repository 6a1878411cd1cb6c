"""Whether a text can be a chat template, before a model is loaded for it."""

from __future__ import annotations

from jinja2 import Environment, TemplateSyntaxError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser

__all__ = ["why_not"]


class _Generation(Extension):
    """``{% generation %}``, which transformers (4 and 5) adds to Jinja."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def why_not(text: str) -> str | None:
    """What is wrong with the chat template ``text``; None: nothing that can be seen.

    Its names and values are looked at by nobody until there are messages.
    """
    environment = Environment(extensions=["jinja2.ext.loopcontrols", _Generation])
    try:
        tree = environment.parse(text)
    except TemplateSyntaxError as e:
        return f"is no Jinja template (line {e.lineno}): {e.message}"
    if "messages" not in meta.find_undeclared_variables(tree):
        return (
            "has no messages in it; it must be a template itself, not the name of a "
            'file: --chat-template "$(cat FILE)"'
        )
    return None
