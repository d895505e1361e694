"""Texts and characters as tokens."""

import os
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.refusals import refused
from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.tasks.data import MISSING, Dataset
from meadow.tasks.readers.datasets import open_dataset
from meadow.tasks.readers.text import CHARACTERS

TRAIN = "text,label,who\nThe cat sat.,1,x\nthe dog,0,y\ncat cat cat cat cat,1,x\n"
REAL = pytest.mark.skipif("MEADOW_DATA" not in os.environ, reason="needs MEADOW_DATA")


def opened(folder: Path, **settings: Any) -> Dataset:
    (folder / "train.csv").write_text(TRAIN)
    (folder / "test.csv").write_text("text,label,who\na dog sat,0,q\n")
    defaults: dict[str, Any] = {"dataset": "text", "root": str(folder), "targets": ("label",), "length": 4}
    return open_dataset(Task(**(defaults | settings)))


def test_words_are_hashed_into_buckets(tmp_path: Path) -> None:
    data = opened(tmp_path, vocabulary_size=100, client="who")

    def bucket(word: str) -> int:
        return 2 + zlib.crc32(word.encode()) % 98

    assert data.tokens == 100 and data.train.x.dtype == torch.int64
    assert data.train.x[0].tolist() == [bucket(w) for w in ("the", "cat", "sat", ".")]
    assert data.train.x[1].tolist() == [bucket("the"), bucket("dog"), 0, 0]
    assert data.train.x[2].tolist() == [bucket("cat")] * 4  # cut
    assert data.clients == ("x", "y")


def test_a_vocabulary_is_learnt_on_public_texts_only(tmp_path: Path) -> None:
    with refused('task.tokens = "words"'):
        opened(tmp_path, tokens="words")
    (tmp_path / "public.csv").write_text("text\ndog dog\ncat the\nzebra the\n")
    data = opened(tmp_path, tokens="words", public="public.csv", vocabulary_size=5)
    # dog and the twice, cat before zebra by code point: dog 2, the 3, cat 4; sat and "." unknown
    assert data.tokens == 5 and data.train.x[0].tolist() == [3, 4, 1, 1]
    assert data.test.x.tolist() == [[1, 2, 1, 0]]
    declared = opened(tmp_path, tokens="words", public="train")
    assert declared.train.x[0].tolist() == [3, 2, 6, 4]  # cat 6 times, the twice, then "." "dog" "sat" once each


def test_a_vocabulary_may_be_given(tmp_path: Path) -> None:
    (tmp_path / "words.txt").write_text("cat\ndog\n")
    assert opened(tmp_path, tokens="words", vocabulary="words.txt").train.x[0].tolist() == [1, 2, 1, 1]
    (tmp_path / "twice.txt").write_text("cat\ncat\n")
    with refused('"cat"'):
        opened(tmp_path, tokens="words", vocabulary="twice.txt")
    with pytest.raises(UserError, match=r"none\.txt"):
        opened(tmp_path, tokens="words", vocabulary="none.txt")


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"tokens": "letters"}, "write hash, words, chars or transformers:NAME"),
        ({"inputs": ("words",)}, 'no column "words"'),
        ({"inputs": ("text", "who")}, "task.inputs"),
        ({"tokens": "transformers:/no/where"}, "transformers:/no/where"),
        ({"public": "none.csv"}, "none.csv"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, settings: dict[str, Any], why: str) -> None:
    with pytest.raises(UserError, match=why):
        opened(tmp_path, **settings)


def test_a_models_own_tokeniser(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "dog"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    transformers.BertTokenizerFast(vocab={w: i for i, w in enumerate(words)}).save_pretrained(tmp_path / "bert")
    data = opened(tmp_path, tokens=f"transformers:{tmp_path / 'bert'}")
    assert data.tokens == len(words) and data.train.x[1].tolist() == [2, 5, 7, 3]
    assert data.train.x[2].tolist() == [2, 6, 6, 3]  # cut with its end kept


def test_windows_of_characters_predict_what_follows(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "abcdef", "a": "p", "b": "q"}\n{"text": "ab", "a": "p", "b": "r"}\n')
    (tmp_path / "e.jsonl").write_text('{"text": "abc"}\n')
    settings = {"train": "t.jsonl", "test": "e.jsonl", "targets": ("next",), "client": "a+b", "length": 3}
    data = opened(tmp_path, **{"dataset": "characters", **settings})
    a, b, c, d, e, f = (2 + CHARACTERS.index(letter) for letter in "abcdef")
    assert data.train.x.tolist() == [[a, b, c], [d, e, 0], [a, 0, 0]]
    assert data.train.y["next"].tolist() == [[b, c, d], [e, f, MISSING], [b, MISSING, MISSING]]
    assert data.test.x.tolist() == [[a, b, 0]]
    assert data.tokens == len(CHARACTERS) + 2 == data.targets[0].size
    assert data.clients == ("p+q", "p+r") and data.owner is not None and data.owner.tolist() == [0, 0, 1]


@REAL
def test_real_texts() -> None:
    root = "$MEADOW_DATA"
    reviews = open_dataset(Task(dataset="text", root=f"{root}/reviews", targets=("sentiment",), client="domain"))
    assert len(reviews.clients) == 16 and (len(reviews.train), len(reviews.test)) == (25379, 6400)
    tweets = open_dataset(
        Task(dataset="text", root=f"{root}/airline_tweets", train="tweets.csv.xz", targets=("sentiment", "reason"),
             client="user", test_fraction=0.1)
    )  # fmt: skip
    assert len(tweets.train) + len(tweets.test) == 14640
    missing = sum(int((part.y["reason"] == MISSING).sum()) for part in (tweets.train, tweets.test))
    assert missing == 5443 and tweets.targets[0].names == ("negative", "neutral", "positive")
    plays = open_dataset(
        Task(dataset="characters", root=root, train="shakespeare_roles.jsonl.xz", targets=("next",),
             client="play+role", length=80)
    )  # fmt: skip
    both = [plays.train, plays.test]
    assert sum(int((part.x != 0).sum()) for part in both) == sum(
        int((part.y["next"] != MISSING).sum()) for part in both
    )
    assert 1400 < len(plays.clients) <= 1509
