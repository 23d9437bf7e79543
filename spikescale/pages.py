"""Web pages that stand alone: one HTML file with its pictures inside and beside it, which loads nothing.

Whatever comes from data is escaped, its control characters are shown as such, and its writing direction is
kept to itself.
"""

import base64
import html
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from spikescale.files import write_bytes, write_text

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; padding: 0 1rem;
  max-width: 62rem; margin: 2rem auto }
h1 { font-size: 1.5rem }
h2 { font-size: 1.15rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd }
h3 { font-size: 1rem; margin-bottom: .3rem }
table { border-collapse: collapse; margin: .6rem 0; font-size: .9rem }
th, td { padding: .2rem .7rem; border-bottom: 1px solid #e4e4e4; text-align: right; vertical-align: top }
.text { text-align: left }
th { color: #555; font-weight: 600 }
img { max-width: 100%; height: auto }
code, pre { font: 12.5px/1.4 ui-monospace, monospace }
pre { background: #f5f5f3; padding: .6rem .8rem; margin: .2rem 0 .9rem; white-space: pre-wrap }
pre, .place { overflow-wrap: anywhere }
.place { color: #666; font-size: .82rem }
.note { color: #555 }
"""
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_page(path: Path, title: str, sections: Iterable[str]) -> None:
    """Write a page of HTML sections to `path`; the title, too, must be HTML."""
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style></head><body>\n<h1>{title}</h1>\n"
        + "\n".join(sections)
        + "\n</body></html>\n"
    )
    write_text(path, page)


class Pictures:
    """Writes the PNG files beside the page, and gives what shows them in it."""

    def __init__(self, page: Path) -> None:
        self._page = page
        self.written: list[Path] = []

    def path(self, name: str) -> Path:
        """The file of a picture."""
        return self._page.with_name(f"{self._page.stem}-{name}.png")

    def show(self, name: str, title: str, content: bytes | None) -> str:
        """Write a picture and return its element; nothing for None."""
        if content is None:
            return ""
        self._page.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(self.path(name), content)
        self.written.append(self.path(name))
        return image(content, title)


def table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table; columns of whole numbers and percentages are set flush right, and all cells are escaped."""
    listed = list(rows)
    classes = [
        ""
        if all(isinstance(row[column], int) or str(row[column]).endswith("%") for row in listed)
        else "text"
        for column in range(len(heads))
    ]

    def line(tag: str, values: Sequence[Any]) -> str:
        shown = (f"{value:,}" if isinstance(value, int) else text(str(value)) for value in values)
        cells = (f'<{tag} class="{kind}">{cell}</{tag}>' for kind, cell in zip(classes, shown, strict=True))
        return f"<tr>{''.join(cells)}</tr>"

    body = "".join(line("td", row) for row in listed)
    return f"<table><thead>{line('th', heads)}</thead><tbody>{body}</tbody></table>"


def image(content: bytes, title: str) -> str:
    """A PNG as an element of the page."""
    encoded = base64.b64encode(content).decode("ascii")
    return f'<p><img alt="{text(title)}" src="data:image/png;base64,{encoded}"></p>'


def text(content: str) -> str:
    """Text of a stranger, to stand between tags or in a quoted attribute."""
    return html.escape("".join(map(_visible, content)), quote=True)


def _visible(character: str) -> str:
    # Controls (but line ends and tabs), format characters such as overrides of direction, and surrogates.
    if character in "\n\t" or unicodedata.category(character) not in ("Cc", "Cf", "Cs"):
        return character
    return f"\\u{ord(character):04x}"
