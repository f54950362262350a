"""Progressive scaling in small: a ViT that learned beside one language model moves to a wider one.

    python examples/move_vit_to_another_llm.py

With published parts the same is one command:
    ivl compose --vit OpenGVLab/InternVL2_5-8B --llm Qwen/Qwen2.5-3B-Instruct runs/4B-parts
"""

from __future__ import annotations

from pathlib import Path

import torch
from own_model_from_config import build

import ivl
from ivl.checkpoint import load_model
from ivl.checkpoint.compose import compose

RUN = Path("runs/examples/move-vit")


def main() -> None:
    first = build(RUN / "first", seed=1)
    wider = build(RUN / "wider", seed=2, words=("hello there", "general words"), width=96, num_heads=6, num_kv_heads=2)

    # The projector joins both widths, so it starts afresh unless a third model has one of the right shape.
    config = compose(first, wider, None, RUN / "parts", seed=3, force=True)
    print(f"vision width {config.vision.width}, language width {config.decoder.width}, vocabulary {config.decoder.vocab_size}")

    a, b, c = (load_model(RUN / name) for name in ("first", "wider", "parts"))
    same = [torch.equal(x, y) for x, y in zip(a.vision.parameters(), c.vision.parameters(), strict=True)]
    kept = torch.equal(b.decoder.layers[0].down.weight, c.decoder.layers[0].down.weight)
    print(f"{sum(same)} of {len(same)} vision tensors moved bit for bit; decoder kept: {kept}")

    print(
        f"ready to chat and to train (stage 1, the projector alone): {ivl.load(RUN / 'parts').chat('hi', max_new_tokens=4)!r}"
    )


if __name__ == "__main__":
    main()
