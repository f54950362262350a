"""Build the pages of docs/ as a site: `python docs/build.py` writes it to site/ and fails on a broken link.

Pages link to files of the repository, as a reader of the repository wants them. On the site each of these files is a page or
a file of its own, so the site needs no other address.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent.resolve()
ROOT = DOCS.parent
LINK = re.compile(r"(\]\()([^)\s#]+)([^)\s]*\))")
FENCES = {".py": "python", ".sh": "sh", ".txt": "text", ".json": "json", ".cpp": "cpp"}
"""Files that become pages, by suffix, and how they are colored."""


def stage(pages: Path) -> None:
    """Copy the pages into a folder, and beside them, in source/, the files of the repository that they link to."""
    for path in sorted(DOCS.rglob("*")):
        copy = pages / path.relative_to(DOCS)
        if path.suffix == ".md":
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(LINK.sub(lambda link, path=path: _linked(link, path, pages), path.read_text("utf-8")), "utf-8")
        elif path.suffix == ".png":
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)


def _linked(link: re.Match[str], page: Path, pages: Path) -> str:
    """Return the link as it reads on the site."""
    before, target, after = link.groups()
    path = (page.parent / target).resolve()
    if "://" in target or path.is_relative_to(DOCS) or not path.is_file():
        return link[0]  # a broken one, too: the site builder names it
    name = path.relative_to(ROOT).as_posix()
    copy = pages / "source" / name
    copy.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix in FENCES:
        copy = copy.with_name(f"{copy.name}.md")
        copy.write_text(f"# {name}\n\n``````{FENCES[path.suffix]}\n{path.read_text('utf-8')}``````\n", "utf-8")
    else:
        shutil.copyfile(path, copy)
    up = "../" * len(page.relative_to(DOCS).parent.parts)
    return f"{before}{up}{copy.relative_to(pages).as_posix()}{after}"


def build(site: Path) -> int:
    """Build the site into a folder; returns the exit code of the site builder, which is not 0 if a link is broken."""
    with tempfile.TemporaryDirectory() as folder:
        stage(Path(folder) / "pages")
        config = (DOCS / "zensical.toml").read_text("utf-8").replace("ROOT", ROOT.as_posix())
        (Path(folder) / "zensical.toml").write_text(config, "utf-8")
        code = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=folder).returncode
        if not code:
            shutil.copytree(Path(folder) / "site", site, dirs_exist_ok=True)
        return code


if __name__ == "__main__":
    raise SystemExit(build(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "site"))
