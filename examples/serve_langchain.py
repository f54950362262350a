"""LangChain on `ivl serve`: a chain that looks at a picture, streamed and in a batch.

    pip install langchain-openai
    ivl serve runs/quickstart/model
    python examples/serve_langchain.py IMAGE [http://127.0.0.1:8000/v1]

IVL_API_KEY holds the key if the server has any.
"""

from __future__ import annotations

import base64
import os
import sys
from pathlib import Path

from langchain_core.output_parsers import StrOutputParser
from langchain_core.prompts import ChatPromptTemplate
from langchain_openai import ChatOpenAI
from openai import OpenAI
from pydantic import SecretStr


def main() -> None:
    if len(sys.argv) < 2:
        raise SystemExit("usage: serve_langchain.py IMAGE [URL]")
    base_url = sys.argv[2] if len(sys.argv) > 2 else "http://127.0.0.1:8000/v1"
    key = os.environ.get("IVL_API_KEY", "none")
    name = OpenAI(base_url=base_url, api_key=key).models.list().data[0].id
    model = ChatOpenAI(base_url=base_url, api_key=SecretStr(key), model=name, temperature=0, max_completion_tokens=16)
    prompt = ChatPromptTemplate(
        [("human", [{"type": "image_url", "image_url": {"url": "{picture}"}}, {"type": "text", "text": "{question}"}])]
    )
    chain = prompt | model | StrOutputParser()
    url = f"data:image/png;base64,{base64.b64encode(Path(sys.argv[1]).read_bytes()).decode()}"

    print("one:    ", chain.invoke({"picture": url, "question": "what shape is in the image?"}))
    print("stream: ", end="")
    for piece in chain.stream({"picture": url, "question": "what color is the shape?"}):
        print(piece, end="", flush=True)
    print()
    questions = ("what shape is in the image?", "is it red?", "is it blue?")
    for answer in chain.batch(
        [{"picture": url, "question": question} for question in questions]
    ):  # the server answers them together
        print("batch:  ", answer)


if __name__ == "__main__":
    main()
