"""The official `openai` client, unchanged, against `ivl serve`.

    ivl serve runs/quickstart/model
    python examples/serve_openai_client.py [http://127.0.0.1:8000/v1] [IMAGE]

IVL_API_KEY holds the key if the server has any. Without an image a red circle is drawn.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path

import openai
from PIL import Image, ImageDraw


def data_url(path: str | None) -> str:
    """A picture as the address that carries it."""
    if path:
        data = Path(path).read_bytes()  # the server looks at the bytes, not at the media type
    else:
        picture, out = Image.new("RGB", (64, 64), "white"), io.BytesIO()
        ImageDraw.Draw(picture).ellipse((16, 16, 48, 48), fill="red")
        picture.save(out, "PNG")
        data = out.getvalue()
    return f"data:image/png;base64,{base64.b64encode(data).decode()}"


def main() -> None:
    base_url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000/v1"
    url = data_url(sys.argv[2] if len(sys.argv) > 2 else None)
    client = openai.OpenAI(base_url=base_url, api_key=os.environ.get("IVL_API_KEY", "none"))
    model = client.models.list().data[0].id
    print("model:  ", model)

    def ask(text: str, *urls: str) -> list:
        images = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        return [{"role": "user", "content": [*images, {"type": "text", "text": text}]}]

    # One question about one picture; several pictures are several parts.
    reply = client.chat.completions.create(model=model, messages=ask("what shape is in the image?", url), max_tokens=16)
    print("one:    ", reply.choices[0].message.content)
    reply = client.chat.completions.create(model=model, messages=ask("are they alike?", url, url), max_tokens=16, seed=1)
    print("two:    ", reply.choices[0].message.content, f"({reply.usage.prompt_tokens if reply.usage else 0} prompt tokens)")

    # The same, piece by piece; the last chunk tells how many tokens were used.
    print("stream: ", end="")
    for chunk in client.chat.completions.create(
        model=model, messages=ask("what color is it?", url), max_tokens=16, stream=True, stream_options={"include_usage": True}
    ):
        print("".join(choice.delta.content or "" for choice in chunk.choices), end="", flush=True)
        if chunk.usage:
            print(f" ({chunk.usage.completion_tokens} tokens)")

    # What the server does not take is an error that says why.
    try:
        client.chat.completions.create(model=model, messages=ask("what is it?", "http://example.org/a.png"), max_tokens=16)
    except openai.APIStatusError as error:
        print("refused:", error.status_code, error.body["message"] if isinstance(error.body, dict) else error.message)


if __name__ == "__main__":
    main()
