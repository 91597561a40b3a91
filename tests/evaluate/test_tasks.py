"""Packaged tasks: what is asked, from what, and that it is fair and repeatable."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from shared_data import SHARED

from moesaic.config.errors import ConfigError
from moesaic.config.strict import strict_object
from moesaic.data.corpus import Document
from moesaic.evaluate.tasks.base import Question, TaskSpec
from moesaic.evaluate.tasks.blimp import Blimp
from moesaic.evaluate.tasks.harness import HarnessTask
from moesaic.evaluate.tasks.next_line import NextLine
from moesaic.evaluate.tasks.story_ending import StoryEnding

DATA = SHARED / "data"


def document(name: str, lines: int) -> Document:
    """Lines that say where they come from, indented by their number, with a short and a blank one now and then."""
    text = [
        f"{'  ' * (n % 4)}value_{name}_{n} = compute()" if n % 7 else "" if n % 2 else "else:" for n in range(lines)
    ]
    return Document(id=name, text="\n".join(text) + "\n")


DOCUMENTS = [document("a", 60), document("b", 25), document("c", 400)]


def asked(limit: int = 30, seed: int = 0, **settings: Any) -> list[Question]:
    return NextLine(limit=limit, context_lines=5, **settings).questions(DOCUMENTS, seed=seed)


def test_next_line_asks_for_the_line_that_follows() -> None:
    texts = {document.id: document.text.splitlines() for document in DOCUMENTS}
    for question in asked():
        name, number = question.id.split(":")
        lines = texts[name][int(number) - 6 : int(number)]
        assert (question.context + question.options[question.gold]).split("\n") == lines


@pytest.mark.parametrize("same", [0, 2, 3])
def test_next_line_distractors(same: int) -> None:
    for question in asked(same_document=same):
        own = question.id.split(":")[0]
        assert len({option.strip() for option in question.options}) == 4
        wrong = [option for at, option in enumerate(question.options) if at != question.gold]
        assert sum(f"value_{own}_" in option for option in wrong) == same
        columns = {len(option) - len(option.lstrip(" \n")) for option in question.options}
        assert len(columns) == 1


def test_next_line_is_repeatable_and_documents_take_turns() -> None:
    assert asked() == asked()
    assert asked() != asked(seed=1)
    counts = [sum(question.id.startswith(name) for question in asked(limit=30)) for name in "abc"]
    assert counts == [10, 10, 10]
    assert len({question.gold for question in asked()}) == 4


def test_next_line_needs_other_documents() -> None:
    assert NextLine(context_lines=5).questions(DOCUMENTS[:1], seed=0) == []
    assert NextLine(context_lines=5).questions([], seed=0) == []
    assert len(NextLine(context_lines=5, same_document=3).questions(DOCUMENTS[:1], seed=0)) > 10


STORIES = [
    'Tom ran. He saw a cat. "Hello!" he said.\nThe cat purred.',
    "One day it rained. They went home.",
    "A single sentence.",
    "It was dark. Was it a bear? It was a bush!",
    "She sang. All clapped.",
]


@pytest.fixture
def stories(tmp_path: Path) -> Path:
    file = tmp_path / "stories.txt"
    file.write_text("\n<|endoftext|>\n".join(STORIES))
    return file


def test_story_endings(stories: Path) -> None:
    questions = StoryEnding(file=stories).questions([], seed=0)
    assert [question.id for question in questions] == ["0", "1", "3", "4"]
    golds = [question.options[question.gold] for question in questions]
    assert golds == ["\nThe cat purred.", " They went home.", " It was a bush!", " All clapped."]
    for question, story in zip(questions, [STORIES[0], STORIES[1], STORIES[3], STORIES[4]], strict=True):
        assert question.context + question.options[question.gold] == story
        assert {option.strip() for option in question.options} == {gold.strip() for gold in golds}


def test_too_few_stories_give_no_question(tmp_path: Path) -> None:
    file = tmp_path / "few.txt"
    file.write_text(STORIES[0])
    assert StoryEnding(file=file).questions([], seed=0) == []


def write_blimp(folder: Path, paradigm: str, pairs: int) -> None:
    with gzip.open(folder / f"{paradigm}.jsonl.gz", "wt") as file:
        for number in range(pairs):
            file.write(json.dumps({"sentence_good": f"good {number}", "sentence_bad": f"bad {number}"}) + "\n")


def test_blimp(tmp_path: Path) -> None:
    write_blimp(tmp_path, "second", 3)
    write_blimp(tmp_path, "first", 5)
    questions = Blimp(folder=tmp_path, limit_per_paradigm=4).questions([], seed=0)
    assert [q.id for q in questions] == [*(f"first:{n}" for n in range(4)), *(f"second:{n}" for n in range(3))]
    assert all(q.options[q.gold].startswith("good") and q.options[1 - q.gold].startswith("bad") for q in questions)
    assert {q.gold for q in questions} == {0, 1}
    assert len(Blimp(folder=tmp_path).questions([], seed=0)) == 8


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (
            Blimp(folder=Path("/nowhere")),
            r"evaluate\.tasks\.it\.folder=/nowhere does not exist; give the path of BLiMP",
        ),
        (StoryEnding(file=Path("/nowhere")), r"evaluate\.tasks\.it\.file=/nowhere does not exist"),
        (HarnessTask(task="x", include_path=Path("/nowhere")), r"include_path=/nowhere does not exist"),
    ],
)
def test_missing_data_is_refused_in_words(task: TaskSpec, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        task.check("evaluate.tasks.it")


def test_a_folder_without_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"has no BLiMP files"):
        Blimp(folder=tmp_path).check("evaluate.tasks.it")
    write_blimp(tmp_path, "first", 1)
    Blimp(folder=tmp_path).check("evaluate.tasks.it")


@pytest.mark.parametrize(
    ("target", "keys", "words"),
    [
        ("next_line.NextLine", {"limit": 0}, r"it\.limit=0 must be at least 1"),
        ("next_line.NextLine", {"same_document": 4}, r"it\.same_document=4 is not allowed: 0\.\.3"),
        ("blimp.Blimp", {"folder": "x", "limit_per_paradigm": 0}, r"it\.limit_per_paradigm=0"),
        ("story_ending.StoryEnding", {"file": "x", "limit": 0}, r"it\.limit=0"),
        ("blimp.Blimp", {}, r"it\.folder is required"),
    ],
)
def test_settings_out_of_range(target: str, keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        strict_object(TaskSpec, {"_target_": f"moesaic.evaluate.tasks.{target}", **keys}, "it")


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")
def test_the_real_data_gives_whole_tasks() -> None:
    assert len(Blimp(folder=DATA / "eval/blimp", limit_per_paradigm=10).questions([], seed=0)) == 670
    questions = StoryEnding(file=DATA / "tinystories/train_prefix.txt").questions([], seed=0)
    assert len(questions) == 200
    assert all(len(set(question.options)) == 4 for question in questions)
