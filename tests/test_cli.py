"""`ivl` itself: its help, its version, its completion, and what it says about options that other tools have."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from ivl.cli import COMMANDS, GROUPS, main
from ivl.cli.completion import flags, script, second_words
from ivl.cli.data import COMMANDS as DATA
from ivl.cli.options import OPTIONS, answer_foreign
from ivl.cli.prefer import COMMANDS as PREFER
from ivl.errors import InputError


def ivl(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["ivl", *arguments])
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_help_and_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert ivl("--help", monkeypatch=monkeypatch) == 0
    page = capsys.readouterr().out
    assert all(f"{title}:" in page for title in GROUPS) and all(f"\n  {name} " in page for name in COMMANDS)
    assert max(map(len, page.splitlines())) <= 100
    for option in ("-V", "--version"):
        assert ivl(option, monkeypatch=monkeypatch) == 0 and capsys.readouterr().out.strip() == version("ivl")
    assert ivl("help", "models", monkeypatch=monkeypatch) == 0 and "usage: ivl models" in capsys.readouterr().out


def test_closed_streams_are_not_taken_by_files(tmp_path: Path) -> None:
    code = """if True:
        import os, sys
        from ivl.cli import main
        sys.argv = ["ivl", "--version"]
        main()
        with open("journal", "w") as file:
            print("words")
            print("words", file=sys.stderr)
            os.write(2, b"words")
    """
    command = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", code]
    subprocess.run(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(Path.cwd())}, check=True)
    assert (tmp_path / "journal").read_text() == ""


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["trian"], "did you mean 'train'"),
        (["data", "validat", "x"], "ivl data: unknown command 'validat'; did you mean 'validate'?"),
        (["data", "valdate", "rows.jsonl"], "did you mean 'validate'?"),
        (["prefer", "sampl", "a", "b"], "ivl prefer: unknown command 'sampl'; did you mean 'sample'?"),
        (["prefer", "grade", "a", "b"], "commands are sample, pairs, dropout"),
        (["help", "data", "stat"], "did you mean 'stats'?"),
        (["chat", "MODEL", "--max-new-token", "3"], "--max-new-tokens"),
        (["train", "1B-lora", "--optim.learningrate", "1"], "--optim."),
        (["serve", "MODEL", "--prt", "1"], "--port"),
        (["eval", "MODEL", "--taks", "easy-vqa"], "--task"),
        (["models", "--jsn"], "--json"),
    ],
)
def test_a_misspelled_word_is_answered_with_the_nearest(
    arguments: list[str], hint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ivl(*arguments, monkeypatch=monkeypatch) != 0
    assert hint in capsys.readouterr().err


MISTAKES = [
    ["chat", "M", "--typo"], ["serve", "M", "--prt", "1"], ["eval", "M", "--metric", "exct"], ["eval", "M", "--taks", "x"],
    ["train", "nano-mpo", "--optim.lrr", "1"], ["plan", "nano-mpo", "--crad", "x"], ["plan", "--serve", "8B", "--crad", "x"],
    ["data"], ["data", "--modle", "x"], ["prefer"], ["models", "--jsn"], ["convert", "A", "B", "--dtype", "x"], ["convert"],
    ["compose", "--vti", "x"], ["merge", "--forec"], ["demo-data", "--x"], ["completion", "fish"],
    *(["data", name, "A", "--modle", "x"] for name in DATA), *(["prefer", name, "A", "B", "--stlye", "x"] for name in PREFER),
]  # fmt: skip


@pytest.mark.parametrize("arguments", MISTAKES, ids=" ".join)
def test_a_mistake_names_only_pages_of_help_that_there_are(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ivl(*arguments, monkeypatch=monkeypatch) == 2
    said = " ".join(re.sub("[│╭╮╰╯─]", " ", capsys.readouterr().err).split())
    words = 1 + (arguments[0] in ("data", "prefer", "train") or arguments[1:2] == ["nano-mpo"])
    command = " ".join(["ivl", *(word for word in arguments[:words] if not word.startswith("-"))])
    assert re.findall(r"\S*ivl(?: [\w-]+)* --help", said) == [f"{command} --help"], said


@pytest.mark.parametrize("command", ["validate", "stats"])
def test_commands_of_rows_need_a_name(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ivl("data", command, monkeypatch=monkeypatch) == 1
    assert "ivl data: name rows: a meta JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "arguments", "answer"),
    [
        ("train", ["--learning-rate", "1e-5"], "--learning-rate is --optim.lr "),
        ("train", ["--per_device_train_batch_size=4"], "--per_device_train_batch_size is --packs-per-step"),
        ("train", ["--num-train-epochs", "3", "--lora_rank", "8"], "is --data.epochs; --lora_rank is --lora.rank"),
        ("train", ["--cutoff_len", "2048"], "--data.max-tokens"),
        ("train", ["--freeze_vit", "true"], "--stage.trainable"),
        ("train", ["--split_dataset_ratio", "0.1"], "--val-share"),
        ("serve", ["--max-model-len", "4096"], "--max-context"),
        ("serve", ["--lora-modules", "a=b"], "--adapter"),
        ("chat", ["--model", "x"], "the first argument"),
        ("eval", ["--tasks", "mmmu"], "--task"),
        ("data", ["stats", "--dataset", "x"], "an argument"),
        ("prefer", ["sample", "--num-return-sequences", "8"], "--num-replies"),
        ("convert", ["--output_dir", "x"], "the second argument"),
        ("merge", ["--adapter", "x"], "ivl merge MODEL ADAPTER OUT"),
    ],
)
def test_options_of_other_tools_are_answered_with_ours(
    command: str, arguments: list[str], answer: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    starts = {"train": ["finetune", "--model", "M", "--data", "D"], "data": [], "prefer": []}
    start = starts.get(command, ["MODEL"])
    assert ivl(command, *start, *arguments, monkeypatch=monkeypatch) == 1
    said = capsys.readouterr().err
    assert answer in said and said.count("\n") == 1


def test_no_name_of_the_table_is_an_option_here_and_its_answers_are() -> None:
    own = {"train": set().union(*(flags("train", page) for page in ("finetune", "lora", "mpo", "nano-mpo")))}
    own["train"] |= {"--model", "--data", "--resume", "--config"}
    words = {command: second_words().get(command, ("",)) for command in OPTIONS if command != "train"}
    own |= {command: set().union(*(flags(command, word) for word in words[command])) for command in words}
    own["train"].add("--nproc-per-node")
    for command, table in OPTIONS.items():
        assert not {f"--{name}" for name in table} & (own[command] - {"--model", "--nproc-per-node"})
        named = {word.strip(",;:") for ours in table.values() for word in ours.split() if word.startswith("--")}
        assert named <= own[command], (command, named - own[command])


def test_our_own_options_are_no_foreign_ones() -> None:
    answer_foreign("train", ["1B-lora", "--optim.lr", "1e-5", "--model", "learning-rate"])
    answer_foreign("eval", ["MODEL", "--judge-model", "DIR", "--judge-url-model", "x"])  # as well as --judge.model
    with pytest.raises(InputError, match=r"--lr is --optim\.lr"):
        answer_foreign("train", ["1B-lora", "--lr", "1e-5"])


@pytest.fixture(scope="module")
def completed() -> str:
    return script()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["ser"], {"serve"}),
        (["data", "va"], {"validate"}),
        (["train", "fine"], {"finetune"}),
        (["train", "nano-st"], {"nano-stage1", "nano-stage1.5", "nano-stage2"}),
        (["prefer", "sample", "--num-r"], {"--num-replies"}),
        (["train", "lora", "--lora.r"], {"--lora.rank"}),
        (["train", "1B-stage2", "--resu"], {"--resume"}),
        (["chat", "MODEL", "--adap"], {"--adapter"}),
        (["chat", "MODEL", "pic"], set()),
    ],
)
def test_bash_completes(completed: str, words: list[str], expected: set[str]) -> None:
    line = f'COMP_WORDS=(ivl {" ".join(words)}); COMP_CWORD={len(words)}; _ivl; echo "${{COMPREPLY[@]}}"'
    told = subprocess.run(["bash", "-c", f"{completed}\n{line}"], capture_output=True, text=True, check=True)
    assert set(told.stdout.split()) == expected and told.stderr == ""


def test_completion_knows_every_word(completed: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert all(f'"{name} ' in completed for name in COMMANDS)
    assert set(second_words()) == {"train", "data", "prefer", "completion"}
    from ivl.cli.completion import completion

    completion(["zsh"])
    said = capsys.readouterr().out
    assert "bashcompinit" in said and completed in said


FORGED = "a\x1b]52;c;aGk=\x07\x1b[2J\nforged: 0 problems\u202e.png"


def test_a_strangers_names_neither_rule_the_terminal_nor_forge_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    turns = [{"from": "human", "value": "<image> x"}, {"from": "gpt", "value": "y"}]
    rows = [{"id": FORGED, "image": FORGED, "conversations": turns}, {"id": FORGED, "conversations": turns}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[1]]))
    meta = {
        FORGED: {"annotation": "rows.jsonl"},
        "[/red]": {"annotation": "rows.jsonl"},
        "a$\\frac{": {"annotation": "rows.jsonl"},
    }
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert ivl("data", "validate", str(tmp_path / "meta.json"), monkeypatch=monkeypatch) == 1
    assert ivl("data", "stats", str(tmp_path / "meta.json"), "--out", str(tmp_path / "out"), monkeypatch=monkeypatch) == 0
    assert ivl("train", "lora", "--model", FORGED, "--data", "x", monkeypatch=monkeypatch) == 1
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and not re.search("^forged", told.out + told.err, re.MULTILINE)
    assert r"\x1b[2J\nforged: 0 problems\u202e.png" in told.out and "[/red]" in told.out and r"\x1b[2J\n" in told.err


def test_help_is_quick_to_import() -> None:
    code = "import sys; from ivl.cli import usage; usage(); sys.exit('tyro' in sys.modules or 'torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_list_of_tasks_fits_100_columns() -> None:
    from ivl.cli.eval import listing
    from ivl.evaluation.tasks import TASKS

    lines = listing().splitlines()
    assert max(map(len, lines)) <= 100
    assert [line.split()[0] for line in lines if not line.startswith(" ")] == ["task", *TASKS]
    assert " ".join(" ".join(lines).split()).count("makes a submission") >= 7, "words are wrapped, not cut"
