"""Reads texts as tokens: tables with a text column, and windows of characters for next-character prediction.

Token 0 is padding, at the end of a text; token 1 is the unknown token.
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
from meadow.runtime.limits import check_fits, read_file
from meadow.tasks.data import MISSING, Part, Raw
from meadow.tasks.models.backbones import TRANSFORMERS, from_transformers
from meadow.tasks.readers.tables import Table
from meadow.tasks.readers.tabular import labelled, raw_of, read_public, read_train_and_test

UNKNOWN = 1
LARGEST_VOCABULARY = 64 * 2**20
"""Bytes of the file `task.vocabulary`."""
CHARACTERS = "".join(chr(i) for i in range(32, 127)) + "\n"
"""The default characters of tokens = chars: printable ASCII and the newline."""

_WORD = re.compile(r"[^\W_]+|[^\w\s]")

Ints = npt.NDArray[np.int64]
Tokenise = Callable[[str], Sequence[int]]


def text(task: Task, folder: Path) -> Raw:
    """Read the texts in the column `task.inputs` (default "text") of the tables `task.train` and `task.test`.

    x int64 (n, task.length): the first tokens of each text, padded with 0. Every other column may be a target.
    """
    train, test = read_train_and_test(task, folder)
    return text_raw(task, folder, train, test, read_public(task, folder, train))


def text_raw(task: Task, folder: Path | None, train: Table, test: Table | None, public: Table | None) -> Raw:
    """`text` for tables in memory; `folder`: that of `task.vocabulary` (None: the current one)."""
    column = _text_column(task)
    tokenise, tokens = tokeniser(task, folder, None if public is None else public.column(column, "task.public"))

    def part(table: Table, clients: bool) -> Part:
        texts = table.column(column, f'task.inputs = "{column}"')
        check_fits(f"task.length = {task.length}: {len(texts):,} texts of so many tokens", 8 * len(texts) * task.length)
        x = np.zeros((len(texts), task.length), dtype=np.int64)
        for row, words in zip(x, map(tokenise, texts), strict=True):
            row[: min(len(words), task.length)] = words[: task.length]
        return labelled(task, table, torch.from_numpy(x), clients)

    return raw_of(train, test, part, tokens=tokens)


def characters(task: Task, folder: Path) -> Raw:
    """Read the texts of a table as windows of `task.length` characters, to predict the character after each one.

    x int64 (n, length), padded with 0; target "next" int64 (n, length): the next character, missing beyond a text's end
    (Reddi et al. 2021, appendix C: the sequence version of Shakespeare). The last window of a text may be shorter. A text's
    windows are consecutive and belong to its client (`task.client`). A held-out test set consists of windows, so one text
    may be in both: give a test file where that matters.
    """
    if task.tokens not in ("hash", "chars"):  # hash is the default
        raise UserError(f'task.tokens = "{task.tokens}": task.dataset = "characters" needs tokens = "chars"')
    task = task.model_copy(update={"tokens": "chars"})
    column = _text_column(task)
    train, test = read_train_and_test(task, folder)
    tokenise, tokens = tokeniser(task, folder, None)

    def part(table: Table, clients: bool) -> Part:
        texts = table.column(column, f'task.inputs = "{column}"')
        owner = labelled(task, table, torch.empty(len(texts), 0), clients).client
        whole = sum(-(-len(t) // task.length) for t in texts) * task.length
        check_fits(f"task.length = {task.length}: windows of so many characters", 16 * whole)
        windows = [_windows(np.asarray(tokenise(t), dtype=np.int64), task.length) for t in texts]
        x, following = (np.concatenate(parts) for parts in zip(*windows, strict=True))
        counts = [len(w[0]) for w in windows]
        lines = np.repeat(table.lines, counts)
        client = None if owner is None else np.repeat(owner, counts)
        return Part(torch.from_numpy(x), {"next": following}, client, table.source, lines)

    return raw_of(train, test, part, kinds={"next": f"class {tokens}"}, tokens=tokens)


def tokeniser(task: Task, folder: Path | None, public: Iterable[str] | None) -> tuple[Tokenise, int]:
    """The tokeniser that `task.tokens` names, and its vocabulary size.

    hash: lower-cased words by CRC-32 into vocabulary_size - 2 buckets (feature hashing, Weinberger et al. 2009). words: the
    most frequent words of the public texts, or those of the file `task.vocabulary`. chars: the characters of that file,
    or `CHARACTERS`. transformers:NAME: that model's tokeniser. Raises UserError for words without a public vocabulary,
    because one from private texts would reveal their words.
    """
    kind = task.tokens
    if kind.startswith(TRANSFORMERS):
        return _transformers_tokeniser(task)
    if kind not in ("hash", "words", "chars"):
        raise UserError(f'task.tokens = "{kind}": write hash, words, chars or transformers:NAME')
    given = _vocabulary(task, folder)
    if kind == "hash":
        if given is not None:
            raise UserError(
                f'task.vocabulary = "{task.vocabulary}": task.tokens = "hash" has no vocabulary; write '
                'task.tokens = "words", or leave task.vocabulary out'
            )
        buckets = task.vocabulary_size - 2
        bucket = functools.cache(lambda word: 2 + zlib.crc32(word.encode(errors="surrogatepass")) % buckets)
        return lambda text: [bucket(word) for word in _WORD.findall(text.lower())], task.vocabulary_size
    if kind == "chars":
        if longer := [word for word in given or () if len(word) > 1]:
            raise UserError(
                f'task.vocabulary = "{task.vocabulary}": "{longer[0]}" is more than one character; '
                'for task.tokens = "chars" write one per line'
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
        lines = (
            read_file(path, LARGEST_VOCABULARY)
            .decode("utf-8-sig")
            .replace("\r\n", "\n")
            .replace("\r", "\n")
            .split("\n")
        )
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f'task.vocabulary = "{task.vocabulary}": {path} cannot be read: {error}') from None
    words = [r"\n" if line == "" else line for line in (lines[:-1] if lines[-1] == "" else lines)]
    words = ["\n" if word == r"\n" else word for word in words]
    if not words:
        raise UserError(f'task.vocabulary = "{task.vocabulary}": {path} is empty; expected one token per line')
    if len(set(words)) != len(words):
        twice = next(word for word, count in Counter(words).items() if count > 1)
        raise UserError(f'task.vocabulary = "{task.vocabulary}": "{twice}" is twice in {path}')
    return words


def _windows(tokens: Ints, length: int) -> tuple[Ints, Ints]:
    """Cut a text of k characters into ceil((k - 1) / length) windows; also the character after each one."""
    count = max(0, -(-(len(tokens) - 1) // length))
    x = np.zeros(count * length, dtype=np.int64)
    following = np.full(count * length, MISSING, dtype=np.int64)
    if count:
        x[: len(tokens) - 1] = tokens[:-1]
        following[: len(tokens) - 1] = tokens[1:]
    return x.reshape(count, length), following.reshape(count, length)


def _transformers_tokeniser(task: Task) -> tuple[Tokenise, int]:
    tokenizer = from_transformers("task.tokens", task.tokens, lambda lib, name: lib.AutoTokenizer.from_pretrained(name))
    if tokenizer.pad_token_id != 0:
        raise UserError(f'task.tokens = "{task.tokens}" pads with {tokenizer.pad_token_id}; Meadow pads with 0')

    def tokenise(text: str) -> Sequence[int]:
        return list(tokenizer(text, truncation=True, max_length=task.length)["input_ids"])

    return tokenise, len(tokenizer)


def _text_column(task: Task) -> str:
    if len(task.inputs) > 1:
        raise UserError(f"task.inputs = {list(task.inputs)}: name the one column of texts")
    return task.inputs[0] if task.inputs else "text"
