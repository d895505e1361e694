"""Texts as tokens: tables with a text column, and characters for next-character prediction.

Token 0 is padding, at the end of a text; token 1 is whatever the vocabulary does not know.
"""

import functools
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from meadow.config.schema import Task
from meadow.runtime.errors import UserError
from meadow.tasks.data import MISSING, Part, Raw
from meadow.tasks.readers.tables import Table
from meadow.tasks.readers.tabular import labelled, read_public, read_train_and_test

UNKNOWN = 1
CHARACTERS = "".join(chr(i) for i in range(32, 127)) + "\n"
"""The characters of tokens = chars where no vocabulary is given: printable ASCII and the line's end."""

_WORD = re.compile(r"[^\W_]+|[^\w\s]")
_TRANSFORMERS = "transformers:"

Ints = npt.NDArray[np.int64]
Tokenise = Callable[[str], Sequence[int]]


def text(task: Task, folder: Path) -> Raw:
    """The texts of `task.inputs` (one column, default "text") in the tables `task.train` and `task.test`.

    x int64 (n, task.length): the first tokens of each text, 0 behind its end. Every other column may be a target.
    """
    train, test = read_train_and_test(task, folder)
    return text_raw(task, folder, train, test, read_public(task, folder, train))


def text_raw(task: Task, folder: Path | None, train: Table, test: Table | None, public: Table | None) -> Raw:
    """The same of tables that are read already; `folder`: where `task.vocabulary` is (None: the current one)."""
    column = _one(task)
    tokenise, tokens = tokeniser(task, folder, None if public is None else public.column(column, "task.public"))

    def part(table: Table, clients: bool) -> Part:
        texts = table.column(column, f'task.inputs = "{column}"')
        x = np.zeros((len(texts), task.length), dtype=np.int64)
        for row, words in zip(x, map(tokenise, texts), strict=True):
            row[: min(len(words), task.length)] = words[: task.length]
        return labelled(task, table, torch.from_numpy(x), clients)

    return Raw(Path(train.source).stem, part(train, True), part(test, False) if test else None, tokens=tokens)


def characters(task: Task, folder: Path) -> Raw:
    """The texts of a table cut into windows of `task.length` characters, each of which predicts its next.

    x int64 (n, length), 0 behind a text's end; target "next" int64 (n, length): the character after each one, missing
    behind a text's end (Reddi et al. 2021, appendix C: the sequence version of Shakespeare). The last window of a text is
    shorter. The windows of one text follow each other and have one owner, by `task.client`; a global test set that is
    held out takes windows, so that one text may be on both sides: give a test file where that matters.
    """
    if task.tokens not in ("hash", "chars"):  # hash is what stands there by itself
        raise UserError(
            f'task.tokens = "{task.tokens}": task.dataset = "characters" reads chars; write that, or dataset text'
        )
    task = task.model_copy(update={"tokens": "chars"})
    column = _one(task)
    train, test = read_train_and_test(task, folder)
    tokenise, tokens = tokeniser(task, folder, None)

    def part(table: Table, clients: bool) -> Part:
        texts = table.column(column, f'task.inputs = "{column}"')
        owner = labelled(task, table, torch.empty(len(texts), 0), clients).client
        windows = [_windows(np.asarray(tokenise(t), dtype=np.int64), task.length) for t in texts]
        x, following = (np.concatenate(parts) for parts in zip(*windows, strict=True))
        counts = [len(w[0]) for w in windows]
        lines = np.repeat(table.lines, counts)
        client = None if owner is None else np.repeat(owner, counts)
        return Part(torch.from_numpy(x), {"next": following}, client, table.source, lines)

    parts = part(train, True), part(test, False) if test else None
    return Raw(Path(train.source).stem, *parts, kinds={"next": f"class {tokens}"}, tokens=tokens)


def tokeniser(task: Task, folder: Path | None, public: Iterable[str] | None) -> tuple[Tokenise, int]:
    """How `task.tokens` makes numbers of a text, and how many different ones there are.

    hash: lower-cased words by CRC-32 into vocabulary_size - 2 buckets (feature hashing, Weinberger et al. 2009); needs
    nothing. words: the most frequent words of the public texts, or those of the file `task.vocabulary`. chars: the
    characters of that file, or `CHARACTERS`. transformers:NAME: that model's own tokeniser. Raises UserError for words
    without a public vocabulary: one learnt on private texts would tell what is in them.
    """
    kind = task.tokens
    if kind.startswith(_TRANSFORMERS):
        return _of_transformers(task)
    if kind not in ("hash", "words", "chars"):
        raise UserError(f'task.tokens = "{kind}": write hash, words, chars or transformers:NAME')
    given = _vocabulary(task, folder)
    if kind == "hash":
        if given is not None:
            raise UserError(
                f'task.vocabulary = "{task.vocabulary}": task.tokens = "hash" uses none; write tokens = "words", or leave '
                "the vocabulary out"
            )
        buckets = task.vocabulary_size - 2
        bucket = functools.cache(lambda word: 2 + zlib.crc32(word.encode(errors="surrogatepass")) % buckets)
        return lambda text: [bucket(word) for word in _WORD.findall(text.lower())], task.vocabulary_size
    if kind == "chars":
        if longer := [word for word in given or () if len(word) > 1]:
            raise UserError(
                f'task.vocabulary = "{task.vocabulary}": "{longer[0]}" is more than one character; for tokens = "chars" '
                "each line is one"
            )
        return _lookup(list, given or list(CHARACTERS))
    if given is None:
        if public is None:
            raise UserError(
                'task.tokens = "words" needs a public vocabulary: name a file of words in task.vocabulary or a public file '
                'of texts in task.public, declare the training texts public (task.public = "train"), or write task.tokens '
                '= "hash", which needs none'
            )
        counts = Counter(word for text in public for word in _WORD.findall(text.lower()))
        ordered = sorted(counts, key=lambda word: (-counts[word], word))
        given = ordered[: task.vocabulary_size - 2]
    return _lookup(lambda text: _WORD.findall(text.lower()), given)


def _lookup(cut: Callable[[str], Sequence[str]], words: Sequence[str]) -> tuple[Tokenise, int]:
    number = {word: i for i, word in enumerate(words, start=2)}
    return lambda text: [number.get(word, UNKNOWN) for word in cut(text)], len(words) + 2


def _vocabulary(task: Task, folder: Path | None) -> list[str] | None:
    if not task.vocabulary:
        return None
    path = (folder or Path()) / task.vocabulary
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'task.vocabulary = "{task.vocabulary}": {path} cannot be read: {error}') from None
    words = [r"\n" if line == "" else line for line in (lines[:-1] if lines[-1] == "" else lines)]
    words = ["\n" if word == r"\n" else word for word in words]
    if not words:
        raise UserError(f'task.vocabulary = "{task.vocabulary}": {path} is empty; a token a line was expected')
    if len(set(words)) != len(words):
        twice = next(word for word, count in Counter(words).items() if count > 1)
        raise UserError(f'task.vocabulary = "{task.vocabulary}": "{twice}" stands twice in {path}')
    return words


def _windows(tokens: Ints, length: int) -> tuple[Ints, Ints]:
    """A text of k characters as ceil((k - 1) / length) windows and what follows each character in them."""
    count = max(0, -(-(len(tokens) - 1) // length))
    x = np.zeros(count * length, dtype=np.int64)
    following = np.full(count * length, MISSING, dtype=np.int64)
    if count:
        x[: len(tokens) - 1] = tokens[:-1]
        following[: len(tokens) - 1] = tokens[1:]
    return x.reshape(count, length), following.reshape(count, length)


def _of_transformers(task: Task) -> tuple[Tokenise, int]:
    try:
        import transformers
    except ImportError:
        raise UserError(
            f"task.tokens = \"{task.tokens}\" needs the package transformers: pip install -e '.[transformers]'"
        ) from None
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(task.tokens.removeprefix(_TRANSFORMERS))
    except (OSError, ValueError) as error:
        raise UserError(f'task.tokens = "{task.tokens}": {str(error).splitlines()[0]}') from None
    if tokenizer.pad_token_id != 0:
        raise UserError(f'task.tokens = "{task.tokens}" pads with {tokenizer.pad_token_id}; Meadow pads with 0')

    def tokenise(text: str) -> Sequence[int]:
        return list(tokenizer(text, truncation=True, max_length=task.length)["input_ids"])

    return tokenise, len(tokenizer)


def _one(task: Task) -> str:
    if len(task.inputs) > 1:
        raise UserError(f"task.inputs = {list(task.inputs)}: texts have one input column; name one")
    return task.inputs[0] if task.inputs else "text"
