"""Draws the idea of a shared pool, for README and the site: docs/images/idea.svg, idea_dark.svg for dark pages, and both narrow,
for phones.

Run it as `python -m tools.pages.draw_idea`. Banks, coefficients and layers are those of a small model: 6 layers, 2 banks of 6 experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[2] / "docs/images"
#: Coefficients of bank 1 and bank 2, by layer.
COEFFICIENTS = ((0.9, 0.1), (0.2, 0.8), (0.7, 0.3), (0.4, 0.6), (0.8, 0.2), (0.1, 0.9))
#: The two experts that each layer's router chose for one token.
CHOSEN = ((1, 4), (0, 3), (2, 5), (1, 2), (0, 5), (3, 4))
EXPERTS, SIDE, PITCH, ROW, TOP = 6, 21, 28, 44, 100
MOE_X = 92


@dataclass(frozen=True)
class Theme:
    """Colours of a page; those of the banks are Okabe's and Ito's, told apart whatever colours one sees."""

    ink: str
    muted: str
    line: str
    own: str
    banks: tuple[str, str]
    paper: str


@dataclass(frozen=True)
class Format:
    """Where the pool is: its left edge, how far below the usual MoE, and how far its layers are from its banks.

    Attributes:
        names: whether its layers are named; the usual MoE's are always.
    """

    width: int
    height: int
    pool: tuple[int, int]
    reach: int
    names: bool

    @property
    def bank_x(self) -> int:
        """Where a bank's experts begin."""
        return self.pool[0] + 16

    @property
    def layer_x(self) -> int:
        """Where a layer's experts begin."""
        return self.bank_x + self.reach


WIDE = Format(980, 440, (348, 0), 372, True)
NARROW = Format(524, 880, (24, 410), 308, False)
LIGHT = Theme("#1c2430", "#56616f", "#c3cad3", "#aab3be", ("#0072b2", "#e07b00"), "#ffffff")
DARK = Theme("#e6e9ee", "#a3adba", "#4a5462", "#6a7583", ("#56b4e9", "#f0a030"), "#131416")


def text(x: float, y: float, words: str, colour: str, size: int = 16, more: str = "") -> str:
    """Returns a line of text; `more` are further attributes."""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-size="{size}" {more}>{words}</text>'


def square(x: float, y: float, fills: Sequence[tuple[str, float]], ring: str | None) -> str:
    """Returns an expert: shares of its height, each in its colour from below, and a ring around one that a token visits."""
    parts, bottom = [], y + SIDE
    for colour, share in fills:
        bottom -= share * SIDE
        parts.append(f'<rect x="{x:g}" y="{bottom:.1f}" width="{SIDE}" height="{share * SIDE:.1f}" fill="{colour}"/>')
    if ring:
        parts.append(
            f'<rect x="{x - 2:g}" y="{y - 2:g}" width="{SIDE + 4}" height="{SIDE + 4}" rx="4" '
            f'fill="none" stroke="{ring}" stroke-width="2.5"/>'
        )
    return "".join(parts)


def experts(x: float, y: float, fills: Sequence[tuple[str, float]], chosen: Sequence[int], ring: str) -> str:
    """Returns a row of experts."""
    return "".join(square(x + PITCH * e, y, fills, ring if e in chosen else None) for e in range(EXPERTS))


def ribbon(form: Format, y0: float, y1: float, colour: str, weight: float) -> str:
    """Returns the way from a bank to a layer, as thick as the coefficient."""
    x0, x1 = form.bank_x + PITCH * EXPERTS, form.layer_x - 84
    middle = (x0 + x1) / 2
    return (
        f'<path d="M{x0} {y0:g} C{middle:g} {y0:g} {middle:g} {y1:g} {x1} {y1:g}" fill="none" stroke="{colour}" '
        f'stroke-width="{1 + 9 * weight:.1f}" stroke-opacity="{0.25 + 0.5 * weight:.2f}"/>'
    )


def moe(theme: Theme) -> list[str]:
    """Returns layers with experts of their own."""
    drawn = [
        text(24, 34, "Usual MoE", theme.ink, 21, 'font-weight="700"'),
        text(24, 60, "every layer has its own experts", theme.muted),
    ]
    for layer, chosen in enumerate(CHOSEN):
        y = TOP + ROW * layer
        drawn += [
            text(24, y + 16, f"layer {layer + 1}", theme.ink),
            experts(MOE_X, y, [(theme.own, 1.0)], chosen, theme.ink),
        ]
    return [*drawn, text(24, TOP + ROW * 6 + 20, "36 experts stored", theme.ink, 18, 'font-weight="700"')]


def samoe(theme: Theme, form: Format) -> list[str]:
    """Returns the pool: banks, what each layer takes of them, and what layers compute with."""
    left, down = form.pool
    drawn = [
        text(left, down + 34, "Shared pool (SaMoE)", theme.ink, 21, 'font-weight="700"'),
        text(left, down + 60, "banks of experts ...", theme.muted),
        text(form.layer_x - 96, down + 60, "... that every layer mixes", theme.muted),
    ]
    middles = [down + TOP + ROW * (1.5 + 3 * bank - 0.25) + SIDE / 2 for bank in range(2)]
    ribbons = []
    for layer, mix in enumerate(COEFFICIENTS):
        y = down + TOP + ROW * layer
        for bank in sorted((0, 1), key=lambda b: -mix[b]):
            ribbons.append(ribbon(form, middles[bank], y + SIDE / 2 + 8 * bank - 4, theme.banks[bank], mix[bank]))
    drawn += ribbons
    for bank, middle in enumerate(middles):
        top = middle - SIDE / 2
        drawn += [
            f'<rect x="{left}" y="{top - 36:g}" width="{PITCH * EXPERTS + 27}" height="72" rx="10" '
            f'fill="{theme.paper}" stroke="{theme.banks[bank]}" stroke-width="2"/>',
            text(form.bank_x, top - 12, f"bank {bank + 1}", theme.banks[bank], 16, 'font-weight="700"'),
            experts(form.bank_x, top, [(theme.banks[bank], 1.0)], (), theme.ink),
        ]
    for layer, (mix, chosen) in enumerate(zip(COEFFICIENTS, CHOSEN, strict=True)):
        y = down + TOP + ROW * layer
        for bank, share in enumerate(mix):
            drawn.append(
                text(form.layer_x - 78 + 36 * bank, y + 16, f"{share:.1f}", theme.banks[bank], 15, 'font-weight="700"')
            )
        drawn.append(experts(form.layer_x, y, list(zip(theme.banks, mix, strict=True)), chosen, theme.ink))
        if form.names:
            drawn.append(text(form.layer_x + PITCH * EXPERTS + 4, y + 16, f"layer {layer + 1}", theme.ink))
    bottom = down + TOP + ROW * 6 + 20
    return [
        *drawn,
        text(left, bottom, "12 experts stored", theme.ink, 18, 'font-weight="700"'),
        text(form.layer_x - 78, bottom, "learned coefficients", theme.muted),
    ]


def drawing(theme: Theme, form: Format) -> str:
    """Returns the whole picture as SVG."""
    left, down = form.pool
    line = f"M24 {down} H{form.width - 24}" if down else f"M{left - 32} 24 V{form.height - 60}"
    divide = f'<path d="{line}" stroke="{theme.line}" stroke-width="1.5"/>'
    ring = square(26, form.height - 34, [(theme.own, 1.0)], theme.ink)
    key = text(58, form.height - 18, "chosen by a router for one token: the same work in both", theme.muted)
    shapes = "\n".join([divide, *moe(theme), *samoe(theme, form), ring, key])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {form.width} {form.height}" role="img" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif\">"
        "<title>Six layers with six experts each, and two banks of six experts, which six layers mix by "
        f"learned coefficients.</title>\n{shapes}\n</svg>\n"
    )


#: Pictures by their names.
PICTURES = {
    "idea.svg": (LIGHT, WIDE),
    "idea_dark.svg": (DARK, WIDE),
    "idea_narrow.svg": (LIGHT, NARROW),
    "idea_narrow_dark.svg": (DARK, NARROW),
}


def main() -> None:
    """Writes the pictures."""
    for name, (theme, form) in PICTURES.items():
        (IMAGES / name).write_text(drawing(theme, form))


if __name__ == "__main__":
    main()
