"""Files of right answers: by the number of a caption, by its words, with and without grades."""

import json
from pathlib import Path

import pytest

from apecache.errors import DataError
from apecache.evaluate.embeddings import embed_store
from apecache.evaluate.relevance_file import RelevantPair, graded_pairs, read_relevance
from apecache.runs.heads import load_heads
from apecache.store.reader import FeatureStore


def test_three_formats_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("text\timage\tgrade\nx.jpg#1\ty.jpg\t2\na dog\tz.jpg\t\n")
    (tmp_path / "a.csv").write_text("image,text,grade\ny.jpg,x.jpg#1,2\nz.jpg,a dog,\n")
    lines = [{"text": "x.jpg#1", "image": "y.jpg", "grade": 2}, {"text": "a dog", "image": "z.jpg"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    expected = [
        RelevantPair(text="x.jpg#1", image="y.jpg", grade=2.0),
        RelevantPair(text="a dog", image="z.jpg"),
    ]
    for suffix in ("tsv", "csv", "jsonl"):
        assert read_relevance(tmp_path / f"a.{suffix}") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("caption\timage\nx\ty\n", "line 2: expected the columns text, image"),
        ("text\timage\tgrade\nx\ty\tgood\n", "line 2: grade 'good': expected a number from 0"),
        ("text\timage\tgrade\nx\ty\t-1\n", "grade '-1'"),
        ("hello\n", "has no pair; expected"),
    ],
)
def test_faults_name_their_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.tsv").write_text(text)
    with pytest.raises(DataError, match=message):
        read_relevance(tmp_path / "a.tsv")
    with pytest.raises(DataError, match="cannot be read"):
        read_relevance(tmp_path / "none.tsv")


def test_each_line_of_json_is_an_object(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('["x", "y"]\n')
    with pytest.raises(DataError, match="expected an object on each line"):
        read_relevance(tmp_path / "a.jsonl")


def test_names_find_the_rows_of_the_split(tiny_run: Path, tiny_store: Path) -> None:
    store = FeatureStore.open(tiny_store)
    embedded = embed_store(load_heads(tiny_run), store, split="val")
    pairs = store.pairs
    first, second = (str(pairs.keys[row]) for row in embedded.image_rows[:2])
    second_text = int(embedded.text_rows[1])
    caption = str(pairs.captions[second_text])
    listed = [
        RelevantPair(text=f"{first}#1", image=second, grade=3.0),
        RelevantPair(text=f"  {caption.upper()} ", image=first),
        RelevantPair(text="no such caption", image=first),
        RelevantPair(text=caption, image="no such image"),
    ]
    found, n_unknown = graded_pairs(listed, store, embedded)
    assert n_unknown == 2
    by_pair = {
        (text, image): grade
        for text, image, grade in zip(
            found.texts.tolist(),
            found.images.tolist(),
            found.grades.tolist(),
            strict=True,
        )
    }
    assert by_pair[1, 1] == 3.0
    equal = [n for n, row in enumerate(embedded.text_rows) if pairs.captions[row] == caption]
    assert {(text, 0) for text in equal} <= set(by_pair)
