"""Rows and tasks of one's own, by the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from ivl.cli.data import main as data_command
from ivl.cli.eval import evaluate as command
from ivl.data.mixture import Mixture, load_mixture
from ivl.errors import InputError
from ivl.evaluation.config import EvalConfig
from ivl.evaluation.task import Example
from ivl.evaluation.tasks import task_of
from ivl.evaluation.tasks.own import OwnData
from tests.evaluation.rows import png
from tests.helpers.engines import tiny_directory


def write(path: Path, *pairs: tuple[str, Any], **more: Any) -> Path:
    """Rows as training reads them."""
    (path.parent / "p.png").write_bytes(png())
    lines = []
    for question, answer in pairs:
        turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
        lines.append(json.dumps({"image": "p.png", "conversations": turns, **more}))
    path.write_text("\n".join(lines) + "\n")
    return path


def own(path: Path, metric: Any) -> OwnData:
    return OwnData((str(path),), metric, path.stem, val_share=0, root=None)


@pytest.mark.parametrize(
    ("metric", "question", "answer", "reply", "value"),
    [
        ("exact", "q", "Red", "red.", 1.0),
        ("exact", "q", "Red", "a red car", 0.0),
        ("relaxed", "q", "100", "104", 1.0),
        ("relaxed", "q", "100", "106", 0.0),
        ("anls", "q", "abcd", "abcx", 0.75),
        ("vqa", "q", "2 dogs", "two dogs!", 1.0),
        ("choice", "q\nA. cat\nB. dog", "B", "It is a dog", 1.0),
        ("choice", "q\n(A) cat\n(B) dog", "B. dog", "A", 0.0),
        ("choice", "q\nA. cat\nB. dog", "B", "", 0.0),
        ("exact", "q", "三只", "三只。", 1.0),
        ("choice", "哪个？\nA、猫\nB、狗", "狗", "B", 1.0),
        ("choice", "哪个？\nA：猫\n（B）狗", "B", "是猫", 0.0),
        ("iou", "q", "<box>[[0, 0, 100, 100]]</box>", "[[0, 0, 100, 50]]", 0.5),
        ("iou", "q", "[0, 0, 100, 100]", "nowhere", 0.0),
        ("math", "q", "\\frac{1}{2}", "0.5", 1.0),
    ],
)
def test_metrics(metric: Any, question: str, answer: str, reply: str, value: float, tmp_path: Path) -> None:
    if metric == "math":
        pytest.importorskip("math_verify")
    task = own(write(tmp_path / "rows.jsonl", (question, answer)), metric)
    (example,) = task.examples()
    assert example.answers == (answer,) and example.conversation[0].text.strip() == question
    assert task.score(reply, example).value == pytest.approx(value)


def test_fewer_answers_than_ten_people_give_are_alternatives(tmp_path: Path) -> None:
    for answers, value in ((["1", "one dog"], 1.0), (["1"] * 2 + ["2"] * 8, 0.6)):
        (example,) = own(write(tmp_path / "rows.jsonl", ("q", "1"), answers=answers), "vqa").examples()
        assert own(tmp_path / "rows.jsonl", "vqa").score("the 1", example).value == pytest.approx(value)


def test_accepted_answers_of_a_row_and_a_judge(tmp_path: Path) -> None:
    task = own(write(tmp_path / "rows.jsonl", ("q", "a"), answers=["x", "y"]), "judge")
    (example,) = task.examples()
    score = task.score("Y it is", example)
    assert score.undecided and "Reference answer: x or y" in score.undecided.prompt
    assert [s and s.value for s in map(score.undecided.read, ("1", " 0.\n", "yes"))] == [1, 0, None]


def test_several_conversations_of_a_row_stay_together(tmp_path: Path) -> None:
    turns = [[{"from": "human", "value": f"q{n}"}, {"from": "gpt", "value": "a"}] for n in range(2)]
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"conversations": turns}) + "\n")
    examples: list[Example] = list(own(path, "exact").examples())
    assert [(e.id, e.cluster) for e in examples] == [("0-0", "row 0"), ("0-1", "row 0")]


def test_own_rows_and_an_own_task_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tiny_directory(tmp_path / "model"))
    path = write(tmp_path / "rows.jsonl", ("q", "a"), ("r", "b"))
    common = [model, "--max-new-tokens", "2", "--out", str(tmp_path / "r.json")]
    command([*common, "--data", str(path), "--metric", "exact"])
    report = json.loads((tmp_path / "r.json").read_text())
    assert (report["task"], report["metric"], report["n"]) == ("rows", "exact", 2) and report["data"]["file"] == str(path)
    own = tmp_path / "mine.py"
    own.write_text(
        "import ivl\nfrom ivl.evaluation.task import Example, Task\n\n\n"
        "class Mine(Task):\n    name, metric = 'mine', 'length'\n\n    def examples(self):\n"
        "        yield Example(id='1', conversation=ivl.ask('?'), answers=('x',))\n\n"
        "    def score(self, reply, example):\n        return float(len(reply) > 100)\n"
    )
    command([*common, "--fresh", "--task", f"{own}:Mine", "--predictions", str(tmp_path / "mine.jsonl")])
    assert "all  length" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--metric", "exact"], "--metric scores rows of your own: name their file with --data"),
        (["--prompt", "cot"], "--prompt is for benchmarks of files, and task easy-vqa is none"),
        (["--data", "rows.jsonl"], "--data is for benchmarks of files, and task easy-vqa is none; .* by --metric"),
        (["--task", "mmstar", "--frames", "8"], "--frames is for benchmarks of videos, at least 1; got 8 for mmstar"),
        (["--task", "mvbench", "--frames", "0"], "--frames is for benchmarks of videos, at least 1; got 0 for mvbench"),
        (["--task", "mmstar", "--data", "a.tsv", "b.tsv"], "several names of --data need --metric"),
        (["--task", "mmstar", "--root", "pictures"], "--root and several names of --data need --metric"),
        (["--url", "http://x/v1"], "give --url-model for every --url"),
        (["--task", "mvbench", "--frames", "-1"], "--frames is for benchmarks of videos, at least 1; got -1 for mvbench"),
        (["--task", "nowhere.py:Mine"], "nowhere.py: no such task file"),
        (["--task", f"{__file__}:Path"], "Path must be a class that derives from ivl.evaluation.task.Task"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: list[str], problem: str) -> None:
    with pytest.raises(InputError, match=problem):
        command(["no-model", *options])


def test_a_configuration_names_a_task_with_its_settings() -> None:
    task = task_of(EvalConfig(task="mmstar", prompt="plain", extraction="2026-08", data=("x.tsv",), defects=True))
    assert (task.prompt, task.profile, task.path, task.defects) == ("plain", "2026-08", Path("x.tsv"), True)


def test_answers_that_a_metric_cannot_use_are_named(tmp_path: Path) -> None:
    for metric, problem in (("choice", "names none of the options"), ("iou", "has no box")):
        path = write(tmp_path / "rows.jsonl", ("q\nA. cat\nB. dog", "a bird"))
        with pytest.raises(InputError, match=rf"rows\.jsonl:1: the answer 'a bird' {problem}; another --metric may read it"):
            list(own(path, metric).examples())


def test_the_chosen_reply_of_a_pair_is_the_answer(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"question": "q", "chosen": "red", "rejected": "blue"}) + "\n")
    (example,) = own(path, "exact").examples()
    assert example.answers == ("red",) and example.conversation[-1].text == "q"


def texts(task: OwnData) -> dict[str, str]:
    """The questions by id."""
    return {example.id: example.conversation[-1].text.strip() for example in task.examples()}


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """Two files of rows; pictures lie elsewhere, and repeat_time would draw rows often or leave some out."""
    for name, count in (("one", 12), ("two", 8)):
        write(tmp_path / f"{name}.jsonl", *((f"{name} {n}", f"a{n}") for n in range(count)))
    (tmp_path / "pictures").mkdir()
    (tmp_path / "p.png").rename(tmp_path / "pictures" / "p.png")
    entries = {
        name: {"root": "pictures", "annotation": f"{name}.jsonl", "repeat_time": times, "data_augment": False}
        for name, times in (("one", 3), ("two", 0.5))
    }
    (tmp_path / "meta.json").write_text(json.dumps(entries))
    return tmp_path / "meta.json"


def test_a_mixture_asks_each_row_once(mixture: Path) -> None:
    task, asked = own(mixture, "exact"), [f"one {n}" for n in range(12)] + [f"two {n}" for n in range(8)]
    assert list(texts(task).items()) == [(each.replace(" ", "/"), each) for each in asked]
    assert all(Path(e.conversation[-1].content[0].source).is_file() for e in task.examples())  # type: ignore[union-attr]
    files = task.settings()["data"]["files"]
    assert [Path(file["file"]).name for file in files] == ["one.jsonl", "two.jsonl"] and all(len(f["md5"]) == 32 for f in files)
    named = task_of(EvalConfig(data=(str(mixture), str(mixture.with_name("one.jsonl"))), metric="exact"))
    assert named.name == f"{mixture.parent.name}+one", "many files are called meta.json"


def test_the_share_of_a_mixture_is_what_its_training_kept(mixture: Path) -> None:
    kept = Mixture(load_mixture(mixture), seed=0, shuffle=False, val_share=0.25, validation=True)
    expected = [kept.record(d, row) for d, rows in enumerate(kept.files) for row in range(len(rows))]
    task = OwnData((str(mixture),), "exact", "mixed", val_share=0.25, root=None)
    assert list(texts(task).values()) == [r.conversations[0][0].text.strip() for r in expected] and len(expected) == 5
    assert task.settings()["data"]["val_share"] == 0.25


def test_several_files_have_ids_of_their_own(tmp_path: Path, mixture: Path) -> None:
    (tmp_path / "more").mkdir()
    other = write(tmp_path / "more" / "one.jsonl", ("q", "a"), ("r", "b"))
    names = (str(other), str(mixture), str(other))
    asked = texts(OwnData(names, "exact", "mixed", val_share=0, root=None))
    assert len(asked) == 22 and asked[f"{other}/1"] == "r" and asked[f"{tmp_path}/one.jsonl/0"] == "one 0"
    assert asked["two/0"] == "two 0" and texts(own(other, "exact")) == {"0": "q", "1": "r"}


def test_pictures_under_another_root(tmp_path: Path, mixture: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, out = str(tiny_directory(tmp_path / "model")), tmp_path / "r.json"
    common = [model, "--metric", "exact", "--max-new-tokens", "2", "--out", str(out)]
    files = [str(tmp_path / "one.jsonl"), str(tmp_path / "two.jsonl")]
    with pytest.raises(InputError, match=r"p\.png"):
        command([*common, "--data", *files])
    command([*common, "--data", *files, "--root", str(tmp_path / "pictures")])
    assert "one+two of" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert report["n"] == 20 and report["data"]["root"] == str(tmp_path / "pictures")
    assert [file["file"] for file in report["data"]["files"]] == files
    with pytest.raises(InputError, match=r"meta\.json: is a meta JSON, whose entries have a root each"):
        command([*common, "--data", str(mixture), "--root", str(tmp_path)])


def test_the_mixture_of_a_filter_is_asked_and_its_folder_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, out = write(tmp_path / "rows.jsonl", ("how many?", "three"), ("how many?", "three"), ("why?", "x")), tmp_path / "kept"
    data_command(["filter", "heuristic", str(rows), str(out)])
    kept = json.loads((out / "report.json").read_text())["kept"]
    capsys.readouterr()
    assert 0 < kept < 3 and len(texts(own(out / "meta.json", "exact"))) == kept
    with pytest.raises(InputError, match=r"with the rows that it dropped; name .*kept/meta\.json"):
        texts(own(out, "exact"))
