"""Boxes drawn into a picture."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ivl.processing.boxes import Grounding, to_pixels

_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080", "#9a6324", "#808000")


def draw_boxes(image: Image.Image, groundings: Sequence[Grounding]) -> Image.Image:
    """Return a copy with every box outlined and its phrase at its top left corner, in one color per phrase."""
    out = image.convert("RGB").copy()
    pen = ImageDraw.Draw(out)
    line = max(1, round(min(out.size) / 200))
    font = ImageFont.load_default(max(10, min(out.size) // 30))
    for n, grounding in enumerate(groundings):
        color = _COLORS[n % len(_COLORS)]
        for box in grounding.boxes:
            x1, y1, x2, y2 = to_pixels(box, out.width, out.height)
            edge = (round(x1), round(y1), max(round(x1), round(x2) - 1), max(round(y1), round(y2) - 1))
            pen.rectangle(edge, outline=color, width=line)
            if grounding.phrase:
                label = pen.textbbox((edge[0] + line, edge[1] + line), grounding.phrase, font=font)
                pen.rectangle(label, fill=color)
                pen.text((edge[0] + line, edge[1] + line), grounding.phrase, fill="white", font=font)
    return out
