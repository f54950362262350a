"""A recipe of your own: a function that returns a complete RunConfig.

    ivl train examples/own_training_recipe.py:recipe
    ivl train examples/own_training_recipe.py:recipe --optim.lr 1e-3 --num-steps 20 --out-dir runs/examples/slower

or run this file, which trains and then asks the model. It writes 64 pictures of one coloured shape and a jsonl of questions
about them, and trains a model of 150,000 parameters from nothing.
"""

from __future__ import annotations

import json
from pathlib import Path

from PIL import Image, ImageDraw

from ivl.checkpoint import save_tokenizer
from ivl.config import DecoderConfig, ModelConfig, TilingConfig, VisionConfig
from ivl.data.config import DataConfig
from ivl.processing.tokenizer import train_tokenizer
from ivl.runs.config import RunConfig
from ivl.train.config import OptimConfig, Stage, TrainConfig

RUN = Path("runs/examples/own-recipe")
COLOURS = ("red", "green", "blue", "yellow")
SHAPES = ("circle", "square")


def recipe() -> RunConfig:
    """Everything learns at once, from random weights."""
    tokenizer = train_tokenizer(["what colour is it? what shape is it?", *COLOURS, *SHAPES, "user assistant"], 300)
    save_tokenizer(tokenizer, RUN / "tokenizer")
    return RunConfig(
        name="own-recipe",
        out_dir=str(RUN / "run"),
        architecture=ModelConfig(
            vision=VisionConfig(
                width=64, num_layers=2, mlp_width=128, num_heads=4, patch_size=7, image_size=28, layer_scale_init=1.0
            ),
            decoder=DecoderConfig(
                vocab_size=len(tokenizer), width=64, num_layers=2, mlp_width=128, num_heads=4, num_kv_heads=2, head_dim=16,
                qkv_bias=True, max_positions=1024,
            ),
            tiling=TilingConfig(tile_size=28, max_tiles=1),
            image_token_id=tokenizer.id("<IMG_CONTEXT>"),
            eos_token_ids=(tokenizer.id("<|im_end|>"),),
            system_message="",
        ),
        tokenizer=str(RUN / "tokenizer"),
        stage=Stage(trainable=("vision", "projector", "decoder")),
        data=DataConfig(mixture=write_data(RUN / "data"), max_tokens=512, max_tiles=16, num_workers=0, cache_samples=256),
        train=TrainConfig(
            optim=OptimConfig(name="muon", lr=5e-3, warmup_ratio=0.1), num_steps=100, log_every=25, precision="fp32",
            tensorboard=False,
        ),
    )  # fmt: skip


def write_data(folder: Path) -> str:
    """One row for each picture; its two questions share the picture and do not see each other."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(64):
        colour, shape = COLOURS[n % 4], SHAPES[n // 4 % 2]
        draw(colour, shape, at=n % 7).save(folder / f"{n}.png")
        asked = {"what colour is it?": colour, "what shape is it?": shape}
        talks = [[{"from": "human", "value": f"<image>\n{q}"}, {"from": "gpt", "value": a}] for q, a in asked.items()]
        rows.append({"id": n, "image": f"{n}.png", "conversations": talks})
    path = folder / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def draw(colour: str, shape: str, at: int) -> Image.Image:
    picture = Image.new("RGB", (28, 28), "white")
    pen = ImageDraw.Draw(picture)
    (pen.ellipse if shape == "circle" else pen.rectangle)((at, at, at + 20, at + 20), fill=colour)
    return picture


def main() -> None:
    import shutil

    import ivl
    from ivl.runs.run import run

    shutil.rmtree(RUN, ignore_errors=True)
    model = ivl.load(run(recipe()))
    for colour, shape in (("red", "circle"), ("blue", "square"), ("green", "circle")):
        picture = draw(colour, shape, at=3)
        print(f"{colour} {shape}:", *(model.chat(f"what {what} is it?", picture) for what in ("colour", "shape")))


if __name__ == "__main__":
    main()
