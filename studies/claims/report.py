"""The pages of the claims, made from the files of figures alone: runs/claims/report.html and docs/claims.md.

`python -m studies.claims.report` writes them again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ivl.utils import html as pages
from studies.claims import STUDIES
from studies.claims.study import Estimate, Lab, Results, Study

DOCS = Path("docs/claims.md")
IMAGES = "images"
INTRO = (
    "Nobody has to believe what InternVL2.5's paper (arXiv:2412.05271) claims: `make claims` tries each claim in small, on "
    "two cores, and writes this page from the figures under `studies/results`. Intervals are those of Student's t, 95%, over "
    "seeds: over three trainings. A difference counts where its interval lies above zero. What does not hold in small is said "
    "to. Settings are chosen on held-out pictures of the training data, and the test data are only measured."
)
HOW = (
    "`make claims` goes on where it stopped, `FRESH=1` starts anew, `QUICK=1` runs everything with tiny budgets into "
    '`runs/claims/quick`, `REAL=1` adds the demonstration on real parts, `ONLY="scaling stages"` runs some studies.'
)


def write(lab: Lab) -> list[Path]:
    """Write the page of a lab, and at full size the page of the documentation, too."""
    results = [Results(study, lab) for study in STUDIES.values()]
    lab.runs.mkdir(parents=True, exist_ok=True)
    page = lab.runs / "report.html"
    page.write_text(pages.page("The paper's claims in small", *html_sections(results)), encoding="utf-8")
    if lab.scale != 1:
        return [page]
    for each in results:
        save_plot(each, DOCS.parent / IMAGES)
    DOCS.write_text(markdown(results), encoding="utf-8")
    return [page, DOCS]


def markdown(results: list[Results]) -> str:
    """The page of the documentation."""
    lines = ["# Claims", "", INTRO, "", HOW, "", "| claim | verdict |", "|---|---|"]
    lines += [f"| [{r.study.title}](#{anchor(r.study)}) | {r.verdict().holds} |" for r in results]
    lines += ["", f"Measured so far in {sum(map(hours, results)):.1f} hours of one core."]
    for each in results:
        head, rows = table(each)
        lines += ["", f"## {each.study.title}", "", f"**Claim.** {each.study.claim}", "", f"**Done.** {each.study.done}", ""]
        lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        if any(each.rows.values()):
            lines += ["", f"![{each.study.title}]({IMAGES}/claims-{each.study.name}.png)"]
        lines += ["", f"**Verdict: {each.verdict().holds}.** {each.verdict().sentence}", "", about(each)]
    return "\n".join(lines) + "\n"


def html_sections(results: list[Results]) -> list[str]:
    """The sections of the page in HTML."""
    summary = pages.table(["claim", "verdict"], [(r.study.title, r.verdict().holds) for r in results])
    sections = [f"<p>{pages.text(INTRO.replace('`', ''))}</p>", summary]
    for each in results:
        study, verdict = each.study, each.verdict()
        tone = {"holds": "good", "does not hold here": "bad"}.get(verdict.holds, "")
        parts = [
            f"<h2>{pages.text(study.title)}</h2><p><b>Claim.</b> {pages.text(study.claim)}</p>",
            f"<p><b>Done.</b> {pages.text(study.done)}</p>", pages.table(*table(each)),
            pages.plot(figure_of(each), study.title) if any(each.rows.values()) else "",
            f"<p><b class='{tone}'>Verdict: {verdict.holds}.</b> {pages.text(verdict.sentence)}</p>",
            f"<p>{pages.text(about(each))}</p>",
        ]  # fmt: skip
        sections.append("".join(parts) + (study.extra(each) if study.extra else ""))
    return sections


def table(results: Results) -> tuple[list[str], list[list[str]]]:
    """A row for each arm."""
    columns = results.study.columns
    rows = []
    for name, arm in results.study.arms.items():
        figures = results.figures(name)
        cells = [shown(figures, key, form) for key, (_, form) in columns.items()]
        rows.append([arm.about, str(len(figures)) if figures else "not run yet", *cells])
    return ["", "seeds", *(title for title, _ in columns.values())], rows


def shown(figures: list[dict[str, Any]], key: str, form: str) -> str:
    """The mean of a figure over seeds with its interval; empty where the arm has no such figure."""
    values = tuple(each[key] for each in figures if key in each)
    return Estimate(values).shown(form) if values else ""


def about(results: Results) -> str:
    """When and where the figures were measured, and what is missing."""
    records = [record for rows in results.rows.values() for record in rows]
    if not records:
        return "No arm has been run yet."
    of = {key: sorted({record[key] for record in records}) for key in ("date", "commit", "processor")}
    dates = of["date"][0] if len(of["date"]) == 1 else f"{of['date'][0]} to {of['date'][-1]}"
    said = f"{dates}, commit {', '.join(of['commit'])}, {', '.join(of['processor'])}, {hours(results):.1f} hours of one core."
    return f"{said} Not run yet: {', '.join(results.missing)}." if results.missing else said


def hours(results: Results) -> float:
    """Processor time of a study's arms, with what they start from."""
    return sum(record["processor_seconds"] for rows in results.rows.values() for record in rows) / 3600


def save_plot(results: Results, folder: Path) -> None:
    """Write a study's plot, if anything of it was measured."""
    if any(results.rows.values()):
        figure = figure_of(results)
        figure.savefig(folder / f"claims-{results.study.name}.png", dpi=90)
        pages.pyplot().close(figure)


def figure_of(results: Results) -> Any:
    panels = results.study.panels
    figure, axes = pages.pyplot().subplots(1, panels, figsize=(3 + 4 * panels, 3.4), layout="constrained", sharey=True)
    results.study.draw(results, axes)
    return figure


def anchor(study: Study) -> str:
    return study.title.lower().replace(" ", "-")


if __name__ == "__main__":
    for written in write(Lab()):
        print(written)
