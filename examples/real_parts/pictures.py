"""Captioned pictures: the stamps of Tux Paint, photographs of scikit-image and scikit-learn, or a folder of one's own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from PIL import Image

from ivl.errors import InputError
from ivl.formats.rows import write_jsonl

STAMPS = Path("/usr/share/tuxpaint/stamps")
QUESTION = "<image>\nDescribe the image in one sentence."
PHOTOGRAPHS = {
    "astronaut": "A smiling astronaut in an orange suit.", "chelsea": "A cat that looks to the side.",
    "coffee": "A cup of coffee on a saucer with a spoon.", "rocket": "A rocket that stands on its launch pad at night.",
    "china.jpg": "A temple with a curved roof in China.", "flower.jpg": "A pink flower in front of dark leaves.",
}  # fmt: skip
"""Names in skimage.data, and files of sklearn.datasets, with captions of ours."""
HELD_OUT = 5
"""One of so many captions is held out, with all its pictures."""
SIDE = 336
"""Most pixels of a side; more would only be resized again."""


def captioned(folder: Path | None) -> list[tuple[Path, str]]:
    """Pictures with captions: NAME.png or NAME.jpg beside NAME.txt, whose first line is the caption.

    Raises:
        InputError: if there are none, with the package to install.
    """
    place = folder or STAMPS
    paths = sorted(p for kind in ("png", "jpg", "jpeg") for p in place.rglob(f"*.{kind}") if p.with_suffix(".txt").exists())
    found = [(path, caption) for path in paths if (caption := first_line(path.with_suffix(".txt")))]
    if len(found) < 20 * HELD_OUT:
        remedy = (
            "" if folder else "; sudo apt-get install tuxpaint-stamps-default, or give a folder of your own with --pictures"
        )
        raise InputError(
            f"{place}: {len(found)} pictures with a caption beside them, the demonstration needs {20 * HELD_OUT}{remedy}"
        )
    return found


def first_line(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].strip()


def photographs() -> list[tuple[Any, str]]:
    """Photographs of packages that are installed; without them there are none."""
    found: list[tuple[Any, str]] = []
    try:
        import skimage.data
        from sklearn.datasets import load_sample_image
    except ImportError:
        return found
    for name, caption in PHOTOGRAPHS.items():
        pixels = load_sample_image(name) if "." in name else getattr(skimage.data, name)()
        found.append((Image.fromarray(pixels), caption))
    return found


def write_rows(out: Path, folder: Path | None) -> None:
    """Write pictures on white, and train.jsonl and test.jsonl. Pictures of one caption are on the same side."""
    given: list[tuple[Any, str]] = captioned(folder)
    given += photographs() if folder is None else []
    captions = sorted({caption for _, caption in given})
    random.Random(0).shuffle(captions)
    held_out = set(captions[::HELD_OUT])
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "test": []}
    (out / "pictures").mkdir(parents=True, exist_ok=True)
    for number, (source, caption) in enumerate(given):
        path = on_white(source, out / f"pictures/{number}.png")
        talk = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": caption}]
        side = "test" if caption in held_out else "train"
        rows[side].append({"id": str(number), "image": str(path.absolute()), "conversations": talk})
    for side, some in rows.items():
        write_jsonl(some, out / f"{side}.jsonl")


def on_white(source: Any, path: Path) -> Path:
    """Write a picture, whose transparent parts become white, no larger than it is used."""
    image = (source if isinstance(source, Image.Image) else Image.open(source)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    white.thumbnail((SIDE, SIDE))
    white.convert("RGB").save(path)
    return path
