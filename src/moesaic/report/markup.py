"""Pieces of HTML that several parts of the page are made of."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

__all__ = ["bullets", "fixed_table"]


def bullets(entries: Iterable[str]) -> str:
    """A list of texts."""
    return "<ul>" + "".join(f"<li>{escape(entry)}</li>" for entry in entries) + "</ul>"


def fixed_table(heads: list[str], rows: list[list[str]], *, text: set[int], label: str) -> str:
    """A table of cells that are HTML already; columns in `text` are words, the others numbers."""
    kind = ['class="text"' if index in text else "" for index in range(len(heads))]
    head = "".join(f'<th scope="col" {kind[i]}>{escape(name)}</th>' for i, name in enumerate(heads))
    body = "".join(
        "<tr>" + "".join(f"<td {kind[i]}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(label)}"><table class="fixed">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )
