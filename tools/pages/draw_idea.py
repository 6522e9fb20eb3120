"""Draws the idea of a shared pool, for README and the site: docs/images/idea.svg, and idea_dark.svg for dark pages.

Run it as `python -m tools.pages.draw_idea`. Banks, coefficients and layers are those of a small model: 6 layers, 2 banks of 6 experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

IMAGES = Path(__file__).resolve().parents[2] / "docs/images"
WIDTH, HEIGHT = 980, 440
#: Coefficients of bank 1 and bank 2, by layer.
COEFFICIENTS = ((0.9, 0.1), (0.2, 0.8), (0.7, 0.3), (0.4, 0.6), (0.8, 0.2), (0.1, 0.9))
#: The two experts that each layer's router chose for one token.
CHOSEN = ((1, 4), (0, 3), (2, 5), (1, 2), (0, 5), (3, 4))
EXPERTS, SIDE, PITCH, ROW, TOP = 6, 21, 28, 44, 100
MOE_X, BANK_X, LAYER_X = 92, 364, 736


@dataclass(frozen=True)
class Theme:
    """Colours of a page; those of the banks are Okabe's and Ito's, told apart whatever colours one sees."""

    ink: str
    muted: str
    line: str
    own: str
    banks: tuple[str, str]
    paper: str


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


def ribbon(y0: float, y1: float, colour: str, weight: float) -> str:
    """Returns the way from a bank to a layer, as thick as the coefficient."""
    x0, x1 = BANK_X + PITCH * EXPERTS, LAYER_X - 84
    middle = (x0 + x1) / 2
    return (
        f'<path d="M{x0} {y0:g} C{middle:g} {y0:g} {middle:g} {y1:g} {x1} {y1:g}" fill="none" stroke="{colour}" '
        f'stroke-width="{1 + 9 * weight:.1f}" stroke-opacity="{0.25 + 0.5 * weight:.2f}"/>'
    )


def moe(theme: Theme) -> list[str]:
    """Returns the left half: layers with experts of their own."""
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


def samoe(theme: Theme) -> list[str]:
    """Returns the right half: banks, what each layer takes of them, and what layers compute with."""
    drawn = [
        text(BANK_X - 16, 34, "Shared pool (SaMoE)", theme.ink, 21, 'font-weight="700"'),
        text(BANK_X - 16, 60, "banks of experts ...", theme.muted),
        text(LAYER_X - 96, 60, "... that every layer mixes in its own way", theme.muted),
    ]
    middles = [TOP + ROW * (1.5 + 3 * bank - 0.25) + SIDE / 2 for bank in range(2)]
    ribbons = []
    for layer, mix in enumerate(COEFFICIENTS):
        y = TOP + ROW * layer
        for bank in sorted((0, 1), key=lambda b: -mix[b]):
            ribbons.append(ribbon(middles[bank], y + SIDE / 2 + 8 * bank - 4, theme.banks[bank], mix[bank]))
    drawn += ribbons
    for bank, middle in enumerate(middles):
        top = middle - SIDE / 2
        drawn += [
            f'<rect x="{BANK_X - 16}" y="{top - 36:g}" width="{PITCH * EXPERTS + 27}" height="72" rx="10" '
            f'fill="{theme.paper}" stroke="{theme.banks[bank]}" stroke-width="2"/>',
            text(BANK_X, top - 12, f"bank {bank + 1}", theme.banks[bank], 16, 'font-weight="700"'),
            experts(BANK_X, top, [(theme.banks[bank], 1.0)], (), theme.ink),
        ]
    for layer, (mix, chosen) in enumerate(zip(COEFFICIENTS, CHOSEN, strict=True)):
        y = TOP + ROW * layer
        for bank, share in enumerate(mix):
            drawn.append(
                text(LAYER_X - 78 + 36 * bank, y + 16, f"{share:.1f}", theme.banks[bank], 15, 'font-weight="700"')
            )
        drawn += [
            experts(LAYER_X, y, list(zip(theme.banks, mix, strict=True)), chosen, theme.ink),
            text(LAYER_X + PITCH * EXPERTS + 4, y + 16, f"layer {layer + 1}", theme.ink),
        ]
    bottom = TOP + ROW * 6 + 20
    return [
        *drawn,
        text(BANK_X - 16, bottom, "12 experts stored", theme.ink, 18, 'font-weight="700"'),
        text(LAYER_X - 78, bottom, "coefficients, learned with the experts", theme.muted),
    ]


def drawing(theme: Theme) -> str:
    """Returns the whole picture as SVG."""
    divide = f'<path d="M316 24 V{HEIGHT - 60}" stroke="{theme.line}" stroke-width="1.5"/>'
    ring = square(26, HEIGHT - 34, [(theme.own, 1.0)], theme.ink)
    key = text(58, HEIGHT - 18, "chosen by the layer's router for one token: the same work in both", theme.muted)
    shapes = "\n".join([divide, *moe(theme), *samoe(theme), ring, key])
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        "font-family=\"system-ui, -apple-system, 'Segoe UI', Roboto, Arial, sans-serif\">"
        "<title>Left, six layers with six experts each. Right, two banks of six experts, which six layers mix by "
        f"learned coefficients.</title>\n{shapes}\n</svg>\n"
    )


def main() -> None:
    """Writes both pictures."""
    for name, theme in (("idea.svg", LIGHT), ("idea_dark.svg", DARK)):
        (IMAGES / name).write_text(drawing(theme))


if __name__ == "__main__":
    main()
