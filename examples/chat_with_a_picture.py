"""Ask a model about pictures: one question, a stream, a conversation, a batch.

    python examples/chat_with_a_picture.py MODEL [IMAGE]

MODEL is a directory, such as the runs/quickstart/model that `make quickstart` leaves, or a hub id.
Without an image a red circle is drawn.
"""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw

import ivl


def circle(colour: str) -> Image.Image:
    picture = Image.new("RGB", (64, 64), "white")
    ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill=colour)
    return picture


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: chat_with_a_picture.py MODEL [IMAGE]")
    model = ivl.load(sys.argv[1])
    picture = sys.argv[2] if len(sys.argv) > 2 else circle("red")

    # One question. Options are those of ivl.SamplingParams; the default is greedy.
    print("one:   ", model.chat("what color is the shape?", picture, max_new_tokens=20))

    # The same, piece by piece.
    print("stream: ", end="")
    for piece in model.stream("what shape is in the image?", picture, max_new_tokens=20):
        print(piece, end="", flush=True)
    print()

    # A conversation remembers its pictures and replies.
    talk = model.start()
    talk.send("what shape is in the image?", picture, max_new_tokens=20)
    print("second: ", talk.send("is it blue?", max_new_tokens=20))

    # Many conversations run together; each reply is what it would be alone.
    asked = [ivl.ask("what color is the shape?", circle(colour)) for colour in ("red", "green", "blue")]
    for reply in model.generate(asked, ivl.SamplingParams(max_new_tokens=20)):
        print(f"batch:   {reply.text} ({reply.tiles} tiles, {reply.prompt_tokens} prompt tokens, {reply.finish_reason})")


if __name__ == "__main__":
    main()
