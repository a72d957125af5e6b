"""A picture of how an answer was decoded: positions from left to right, one row a pass, as an SVG.

A long answer is drawn as several bands below each other, each with the passes that finalised its tokens.
"""

import colorsys
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby

BAND_CHARACTERS = 110
"""Most characters of a band, unless a single token has more."""

_CHARACTER, _ROW, _MARGIN, _LABEL, _GAP = 7.2, 20, 12, 62, 16  # lengths in pixels
_FIRST_HUE, _LAST_HUE = 215, -20  # degrees on the colour wheel: from blue over green and yellow to red
_STYLE = (
    "text{font:12px ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;white-space:pre;fill:#1f2328}"
    ".label{font-family:sans-serif;fill:#57606a}"
)


@dataclass(frozen=True)
class _Cell:
    """A token of the answer as it is drawn: its text, its pass, and its place in the band, in characters."""

    text: str
    step: int
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.text)


def decoding_svg(tokens: Sequence[str], steps: Sequence[int], *, title: str) -> str:
    """An SVG document that draws the tokens in the order of their positions.

    `steps`: the pass, from 1, that finalised each token (`Output.step_G`); 0 for one that was given. A token is drawn
    with its text in the row of that pass, and pale in the later rows; before it, the place is empty, as it is masked.
    """
    assert len(tokens) == len(steps), "one pass for each token"
    last_step = max(steps, default=0)
    body: list[str] = [_text(_MARGIN, 1.5 * _MARGIN + 4, title, label=True)]
    top, width = 3.0 * _MARGIN, _LABEL + BAND_CHARACTERS * _CHARACTER
    for band in _bands(tokens, steps):
        rows = range(min(cell.step for cell in band), max(cell.step for cell in band) + 1)
        body += _drawn_band(band, rows, top, last_step)
        top += len(rows) * _ROW + _GAP
        width = max(width, _LABEL + band[-1].end * _CHARACTER)
    size = f'width="{width + 2 * _MARGIN:.0f}" height="{top:.0f}"'
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
            f"<title>{escape(_printable(title))}</title>",
            f"<style>{_STYLE}</style>",
            '<rect width="100%" height="100%" fill="#fff"/>',
            *body,
            "</svg>\n",
        ]
    )


def _bands(tokens: Sequence[str], steps: Sequence[int]) -> Iterator[list[_Cell]]:
    band: list[_Cell] = []
    for token, step in zip(tokens, steps, strict=True):
        text = _printable(token)
        if band and band[-1].end + len(text) > BAND_CHARACTERS:
            yield band
            band = []
        band.append(_Cell(text, step, band[-1].end if band else 0))
    if band:
        yield band


def _printable(text: str) -> str:
    """Line ends as arrows, and what XML or a line of text cannot hold as dots; never empty."""
    shown = text.replace("\n", "↵").replace("\t", " ")
    return "".join("·" if unicodedata.category(one).startswith("C") else one for one in shown) or "·"


def _drawn_band(band: Sequence[_Cell], rows: range, top: float, last_step: int) -> Iterator[str]:
    bottom = top + len(rows) * _ROW
    for step in rows:
        name = "given" if step == 0 else f"pass {step}"
        yield _text(_MARGIN, top + (step - rows.start) * _ROW + 14, name, label=True)
    right = band[-1].end * _CHARACTER
    yield _box(0, right, top, bottom, "#f3f4f6")
    for step, run in groupby(band, key=lambda cell: cell.step):
        cells = list(run)
        left, right = cells[0].start * _CHARACTER, cells[-1].end * _CHARACTER
        row = top + (step - rows.start) * _ROW
        yield _box(left, right, row, bottom, _colour(step, last_step, lightness=93))
        yield _box(left, right, row, row + _ROW, _colour(step, last_step, lightness=78))
        for cell in cells:
            # Spaces move the text instead of standing in it, since not every viewer draws them.
            ahead = len(cell.text) - len(cell.text.lstrip())
            if word := cell.text.strip():
                x = _MARGIN + _LABEL + (cell.start + ahead) * _CHARACTER
                yield _text(x, row + 14, word, width=len(word) * _CHARACTER)


def _colour(step: int, last_step: int, *, lightness: int) -> str:
    share = (step - 1) / max(1, last_step - 1)
    hue = (_FIRST_HUE + share * (_LAST_HUE - _FIRST_HUE)) % 360
    rgb = colorsys.hls_to_rgb(hue / 360, lightness / 100, 0.0 if step == 0 else 0.75)
    return "#" + "".join(f"{round(255 * part):02x}" for part in rgb)


def _box(left: float, right: float, top: float, bottom: float, colour: str) -> str:
    """A rectangle; `left` and `right` are counted from the first token."""
    x = _MARGIN + _LABEL + left
    return f'<rect x="{x:.1f}" y="{top:.0f}" width="{right - left:.1f}" height="{bottom - top:.0f}" fill="{colour}"/>'


def _text(x: float, y: float, text: str, *, width: float | None = None, label: bool = False) -> str:
    """A line of text; with a `width` it is fitted to it, whatever font the reader has."""
    fitted = "" if width is None else f' textLength="{width:.1f}" lengthAdjust="spacingAndGlyphs"'
    kind = ' class="label"' if label else ""
    return f'<text x="{x:.1f}" y="{y:.0f}"{fitted}{kind}>{escape(_printable(text))}</text>'
