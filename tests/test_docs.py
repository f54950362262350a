"""What README.md and docs/ say is true.

Every ```python block runs, in the order of its page and in one namespace, and so does every line of a ```sh block of docs/
that starts with `ivl` (or with `echo`, which writes a file), in a folder that has a small model at runs/quickstart/model, the
files of `ivl demo-data .` and the examples. A block under `<!-- no-run: why -->` does not run; its flags are checked all the
same, as are all flags in running text. Trainings of whole epochs stop after a few steps.
"""

from __future__ import annotations

import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import pytest

from ivl.cli import COMMANDS, main
from ivl.datasets.demo import write_demo
from ivl.recipes import STAGES
from ivl.serve.page import write_examples

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MAX_NOT_RUN, FEW_STEPS = 16, 4
FENCE = re.compile(r"(?P<mark><!-- no-run[^\n]*-->\n)?```(?P<kind>\w*)\n(?P<body>.*?)```", re.DOTALL)
IVL = re.compile(r"^(?:torchrun .*? -m |(?:\.venv/bin/)?)(ivl .*)$")


@dataclass(frozen=True)
class Block:
    kind: str
    body: str
    run: bool
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    return [Block(m["kind"], m["body"], not m["mark"], text[: m.start("body")].count("\n")) for m in FENCE.finditer(text)]


def prose(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def lines(block: Block) -> list[str]:
    return [line.strip() for line in block.body.replace("\\\n", " ").splitlines()]


def commands(block: Block) -> list[list[str]]:
    """Arguments of each `ivl` line."""
    return [shlex.split(found[1], comments=True)[1:] for line in lines(block) if (found := IVL.match(line))]


def shortened(arguments: list[str]) -> list[str]:
    """A training of whole epochs stops after a few steps."""
    whole = arguments[0] == "train" and not {"--num-steps", "--dry-run", "--resume", "--help"} & {*arguments}
    return [*arguments, "--num-steps", str(FEW_STEPS)] if whole else arguments


def call(arguments: list[str]) -> tuple[str, int]:
    """What `ivl ARGUMENTS` prints, and its exit code."""
    out, before = io.StringIO(), sys.argv
    sys.argv = ["ivl", *arguments]
    try:
        with contextlib.redirect_stdout(out):
            main()
    except SystemExit as end:
        return out.getvalue(), int(end.code or 0)
    finally:
        sys.argv = before
    return out.getvalue(), 0


@cache
def flags(command: tuple[str, ...]) -> frozenset[str]:
    """Every flag a command's --help tells."""
    text, code = call([*command, "--help"])
    assert code == 0, f"ivl {' '.join(command)} --help"
    return frozenset(re.findall(r"(?<![\w-])--?[a-z][\w.-]*", text)) | {"-h", "--help"}


def command_of(arguments: list[str]) -> tuple[str, ...]:
    """The words that choose a help page."""
    if arguments[0] in ("data", "prefer") and len(arguments) > 1:
        return tuple(arguments[:2])
    if arguments[0] != "train":
        return (arguments[0],)
    return ("train", arguments[1] if arguments[1] in STAGES else "nano-language")


def all_flags() -> set[str]:
    chosen = [
        *(("data", name) for name in ("validate", "stats", "convert", "filter", "pack")),
        ("train", "nano-language"),
        ("train", "nano-mpo"),
        ("train", "lora"),
    ]
    chosen += [("prefer", name) for name in ("sample", "pairs", "dropout")]
    chosen += [(name,) for name in COMMANDS if name not in ("data", "prefer", "train")]
    beside_the_parser = {"--resume", "--config", "--fresh", "--nproc-per-node", "--version"}
    return set().union(*(flags(command) for command in chosen), beside_the_parser)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("world")
    build = runpy.run_path(str(ROOT / "examples/own_model_from_config.py"))["build"]
    build(place / "runs/quickstart/model")
    write_demo(place)
    write_examples(place / "runs/quickstart/model", [("what color is it?", [place / "picture.png"])])
    shutil.copytree(ROOT / "examples", place / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    return place


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT).with_suffix("")))
def test_blocks_run(page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    shutil.copytree(world, here)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    names: dict[str, object] = {"__name__": "docs"}
    for block in blocks(page):
        if not block.run:
            continue
        if block.kind == "python":
            # As many lines before it as in the page, so that a traceback names the right one.
            exec(compile("\n" * block.line + block.body, str(page), "exec"), names)
        elif block.kind == "sh" and page.name != "README.md":
            for line in lines(block):
                if line.startswith("echo "):  # writes a file
                    subprocess.run(line, shell=True, check=True)
                for arguments in commands(replace(block, body=line)):
                    _, code = call(shortened(arguments))
                    assert code == 0, f"{page.name}: ivl {shlex.join(arguments)}"


def test_few_blocks_do_not_run() -> None:
    left = [f"{page.name}:{block.line}" for page in PAGES for block in blocks(page) if not block.run]
    print(f"{len(left)} blocks are not run: {', '.join(left)}")
    assert len(left) <= MAX_NOT_RUN, left


def test_every_command_and_flag_exists() -> None:
    for page in PAGES:
        for block in blocks(page):
            for arguments in commands(block) if block.kind == "sh" else []:
                assert arguments[0] in COMMANDS or arguments[0].startswith("-"), f"{page.name}: ivl {arguments[0]}"
                used = {a.partition("=")[0] for a in arguments if re.match(r"--?[a-z]", a)}
                known = flags(command_of(arguments)) | ({"--resume", "--config"} if arguments[0] == "train" else set())
                assert used <= known, f"{page.name}: ivl {shlex.join(arguments)}: {used - known}"
        for code in re.findall(r"`([^`\n]+)`", prose(page)):
            if code.startswith(("python -m benchmarks.", "python -m studies.", "swift ")):
                continue  # these have flags of their own
            unknown = set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", code)) - all_flags()
            assert not unknown, f"{page.name}: `{code}`"
            if found := re.match(r"ivl ([a-z][a-z-]*)", code):
                assert found[1] in COMMANDS, f"{page.name}: `{code}`"


def test_every_command_is_documented() -> None:
    text = "".join(page.read_text() for page in PAGES if page.name != "README.md")
    assert [name for name in COMMANDS if f"ivl {name} " not in text and f"ivl {name}`" not in text] == []


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = re.findall(r"(?:^|`)make ([a-z-]+)", page.read_text(), re.MULTILINE)
        assert set(named) <= targets, page.name


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_links_resolve() -> None:
    for page in PAGES:
        for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
            if "://" in link:
                continue
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name}: {link}"
            assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_troubleshooting_quotes_messages_of_the_code() -> None:
    """What stands in the first column, between the dots, is somewhere in the code or in a pattern of torch and the shell."""
    code = "".join(path.read_text() for path in (ROOT / "ivl").rglob("*.py"))
    page = (ROOT / "docs/troubleshooting.md").read_text()
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) > 30
    assert not [message for message in quoted for part in message.split("...") if part.strip() not in code]


def test_every_page_is_in_the_site_and_in_the_index() -> None:
    pages = {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]}
    nav = set(re.findall(r'"([\w/]+\.md)"', (ROOT / "docs/zensical.toml").read_text()))
    assert nav == pages
    listed = set(re.findall(r"\]\((\w+\.md)", (ROOT / "docs/index.md").read_text()))
    assert {page for page in pages if "/" not in page} - {"index.md"} <= listed
    listed = {f"results/{name}" for name in re.findall(r"\]\((\w+\.md)", (ROOT / "docs/results/index.md").read_text())}
    assert {page for page in pages if "/" in page} - {"results/index.md"} == listed


def test_no_path_of_a_machine() -> None:
    for page in [*PAGES, *sorted((ROOT / "examples").glob("*.py"))]:
        found = re.findall(r"(?<![\w./])/(?:work|home|root|tmp|Users|mnt|opt|var|data)/\S*", page.read_text())
        assert not found, f"{page.name}: {found}"
