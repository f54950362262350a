"""Every report can be read on a phone and on a desk, in light and in dark, and says what to do next."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ivl.data.config import DataConfig
from ivl.datasets.demo import write_demo
from ivl.datasets.inspect import inspect
from ivl.datasets.stats import DatasetStats
from ivl.datasets.stats_report import write_report as write_stats
from ivl.evaluation.config import EvalConfig, Method
from ivl.evaluation.report import write as write_scores
from ivl.evaluation.run import evaluate_all
from ivl.evaluation.tasks import easy_vqa
from ivl.filters.chain import read_chain
from ivl.filters.run import run as run_filter
from ivl.preference.pairs import Tally
from ivl.preference.report import write_report as write_pairs
from ivl.utils import html
from tests.evaluation.test_samples import Sums, Unsure

REPORTS = ("filter", "stats", "pairs", "scores", "quickstart")
CONTRASTS = """() => {
    const rgb = (color) => color.match(/[\\d.]+/g).map(Number);
    const luminance = (color) => rgb(color).slice(0, 3).map((c) => c / 255)
        .map((c) => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, n) => sum + c * [0.2126, 0.7152, 0.0722][n], 0);
    const behind = (element) => {
        for (let e = element; e; e = e.parentElement) {
            const color = getComputedStyle(e).backgroundColor;
            if ((rgb(color)[3] ?? 1) === 1) return color;
        }
    };
    return [...document.querySelectorAll("body *")]
        .filter((e) => e.checkVisibility() && !e.closest("svg"))
        .filter((e) => [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
        .map((e) => [luminance(getComputedStyle(e).color), luminance(behind(e)), e.outerHTML.slice(0, 200)])
        .map(([a, b, what]) => [(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), what]).sort((a, b) => a[0] - b[0])[0];
}"""
CLIPPED = """() => [...document.querySelectorAll("body *")].filter((e) => e.checkVisibility() && !e.closest("svg"))
    .filter((e) => e.getBoundingClientRect().right > innerWidth + 1 ||
        e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== "inline")
    .map((e) => e.outerHTML.slice(0, 200))"""


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A page of each report, with long names, many columns and long texts."""
    place = tmp_path_factory.mktemp("reports")
    write_demo(place)
    return {
        "filter": _filtered(place), "stats": _stats(place), "pairs": _pairs(place), "scores": _scores(place),
        "quickstart": _quickstart(place),
    }  # fmt: skip


def _filtered(place: Path) -> Path:
    """24 rows of which 4 come again, 2 are too long, and none is short."""
    rows = [json.loads(line) for line in (place / "data/train.jsonl").read_text().splitlines()[:24]]
    rows += [row | {"id": f"again-{row['id']}"} for row in rows[:4]]
    for n in (5, 6):
        rows[n] = rows[n] | {"conversations": [rows[n]["conversations"][0], {"from": "gpt", "value": "word " * 300}]}
    (place / "data/some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = [{"use": "length", "max_answer": 1000}, {"use": "runs"}, {"use": "duplicates"}]
    run_filter(read_chain({"about": "three stages", "stages": stages}, "chain"), place / "data/some.jsonl", place / "filtered")
    return place / "filtered/report.html"


def _stats(place: Path) -> Path:
    found = []
    for n, name in enumerate(("train", "val")):
        *_, stats = inspect(DataConfig(mixture=str(place / f"data/{name}.jsonl")))
        assert isinstance(stats, DatasetStats)
        stats.name = f"a-data-set-with-a-long-name-{n}"
        found.append(stats)
    return write_stats(place / "stats", found, mixture="data/meta.json", model=None)


def _pairs(place: Path) -> Path:
    rows = [json.loads(line) for line in (place / "data/pairs.jsonl").read_text().splitlines()]
    rows = [r | {"kind": "correctness", "answer_gt": [r["chosen"]], "image": str(place / "data" / r["image"])} for r in rows]
    (place / "pairs").mkdir()
    (place / "pairs/pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    good = Tally(questions=24, replies=96, correct=48, wrong=40, malformed=Counter({"no answer": 8}), with_pairs=24,
                 pairs=Counter(correctness=24), left_out=Counter({"right answer is part of the wrong one": 3}))  # fmt: skip
    none = Tally(questions=5, replies=20, malformed=Counter({"no answer": 20}))
    write_pairs(place / "pairs", {"charts": good, "maths": none})
    return place / "pairs/report.html"


def _scores(place: Path) -> Path:
    config = EvalConfig(method=Method(style="final_answer", samples=4), sampling=Sums.params)
    result = evaluate_all(Sums(), Unsure(), config, model="a model", predictions=place / "p.jsonl")
    write_scores(place / "scores.json", result)
    return place / "scores.html"


def _quickstart(place: Path) -> Path:
    from examples.quickstart.report import write_page

    out, stages = place / "quickstart", []
    names = ("nano-language", "nano-vision", "nano-stage1", "nano-stage1.5", "nano-stage2", "nano-reason", "nano-mpo")
    for n, name in enumerate(names):
        (out / name).mkdir(parents=True)
        share = "rewards/accuracy" if name == "nano-mpo" else "accuracy"  # as their objectives name it
        rows = ({"step": k, "loss": 3 / (k + 1), share: k / 400} for k in range(1, 400))
        (out / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        stages.append({"name": name, "steps": 400, "samples": 10**4 * n, "tokens": 10**6, "seconds": 60.0, "loss": 0.1,
                       "run_dir": str(out / name)})  # fmt: skip
    asked = [{"id": row.id, "prediction": row.answer, "score": n % 9} for n, row in enumerate(easy_vqa.rows("test")[:100])]
    (out / "predictions.jsonl").write_text("\n".join(["{}", *map(json.dumps, asked)]))
    shares = {"accuracy": 0.8, "reasoning": 0.9, "malformed": 0.01, "endless": 0.0, "n": 1000}
    score = {"value": 0.99, "ci95": [0.98, 0.995], "n": 3000}
    return write_page(out, {
        "accuracy": 0.99, "ci95": [0.98, 0.995], "n": 9673, "training_minutes": 7.5, "stages": stages[:5],
        "by_type": dict.fromkeys(("color", "shape", "yes/no"), score),
        "preference": {"before": shares, "after": shares, "replies": 4800, "pairs": 500, "stages": stages[5:]},
    })  # fmt: skip


@pytest.mark.parametrize("report", REPORTS)
def test_page_stands_alone_and_says_what_next(pages: dict[str, Path], report: str) -> None:
    page = pages[report].read_text()
    assert not re.search(r"(?:src|href)=['\"](?!data:|#|pairs/report.html)", page) and len(page) < 1_000_000
    assert page.rindex("<h2>What next</h2>") > page.rindex("<table") or report == "filter"
    assert "ivl " in page[page.index("<h2>What next</h2>") :]


def test_a_page_is_the_same_in_every_run() -> None:
    def drawn() -> str:
        figure, axis = html.pyplot().subplots()
        axis.plot([1, 2], [3, 4], "o-", label="a")
        axis.legend()
        return html.plot(figure, "a plot")

    assert drawn() == drawn() and "currentColor" in drawn() and html.INK not in drawn()


def test_duplicates_stand_beside_what_they_repeat(pages: dict[str, Path]) -> None:
    page = pages["filter"].read_text()
    pairs = re.findall(r"<div class='pair'>(.*?)</div></div>", page, re.DOTALL)
    shown = [re.findall(r"some.jsonl:(\d+)", pair) for pair in pairs]
    assert shown[-4:] == [["25", "1"], ["26", "2"], ["27", "3"], ["28", "4"]]
    assert all(pair.count("data:image/png") == 2 for pair in pairs)


def test_only_stages_that_dropped_rows_have_a_section(pages: dict[str, Path]) -> None:
    page = pages["filter"].read_text()
    assert re.findall(r"<h2>(.*?)</h2>", page) == ["Stages", "Data sets", "length", "duplicates", "What next", "Configuration"]
    assert page.count("class='plot'") == 1  # duplicates have no score


def test_a_source_without_pairs_says_why(pages: dict[str, Path]) -> None:
    last = pages["pairs"].read_text().partition("<h2>What next</h2>")[2]
    assert (
        "maths gave no pairs: 20 of 20 replies show no answer" in last and "--style direct" in last and "ivl train mpo" in last
    )


@pytest.fixture(scope="module")
def browser() -> Generator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright drives the browser")
    if not (chromium := shutil.which("chromium")):
        pytest.skip("no Chromium here")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_pages_fit_and_can_be_read(browser: Any, pages: dict[str, Path], width: int, scheme: str) -> None:
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    tab = context.new_page()
    for name, path in pages.items():
        tab.goto(path.as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, name
        assert tab.evaluate(CLIPPED) == [], name
        contrast, where = tab.evaluate(CONTRASTS)
        assert contrast >= 4.5, (name, where)
        ink = tab.evaluate("""() => [...document.querySelectorAll("figure svg")]
            .every((svg) => getComputedStyle(svg).color === getComputedStyle(document.body).color)""")
        assert ink, name
        # Letters of 9 points are 12 px where a plot has its own size.
        sizes = tab.evaluate("""() => [...document.querySelectorAll("figure svg")]
            .map((svg) => 12 * svg.getBoundingClientRect().width / (svg.viewBox.baseVal.width * 4 / 3))""")
        assert min(sizes, default=12) >= 9, (name, sizes)
    context.close()


def test_small_pictures_keep_their_pixels(tmp_path: Path) -> None:
    small, large = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (640, 480), "red")
    assert "data:image/png" in html.picture(small) and "class='pixels'" in html.picture(small)
    assert "data:image/jpeg" in html.picture(large)
    assert "unreadable image" in html.picture(tmp_path / "none.png")
