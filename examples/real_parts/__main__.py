"""`python -m examples.real_parts [--pictures DIR]`, from the repository's root."""

import argparse
from pathlib import Path

from examples.real_parts.demonstration import Size, demonstrate
from ivl.errors import InputError


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.real_parts", description="Teach DINOv2 and SmolLM2 to caption.")
    parser.add_argument("--out", type=Path, default=Path("runs/real-parts"))
    parser.add_argument("--pictures", type=Path, help="folder of NAME.png or NAME.jpg beside NAME.txt, not the stamps")
    parser.add_argument("--steps", type=int, help="steps of each training instead of hours, for a trial")
    options = parser.parse_args()
    try:
        found = demonstrate(options.out, options.pictures, Size(steps=options.steps))
    except InputError as error:
        raise SystemExit(f"real_parts: {error}") from None
    for name in ("trained", "stage1", "untrained", "blind"):
        low, high = found[name]["ci95"]
        print(f"{name}: {found[name]['accuracy']:.1%} right among 20 (95% interval {low:.1%} to {high:.1%})")
    for each in found["written"]:
        print(f"{each['caption']} | {each['said']}")


if __name__ == "__main__":
    main()
