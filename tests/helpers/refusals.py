"""What must hold of an error message, in whatever words: it names the setting and its value, and what to write instead."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from meadow.runtime.errors import UserError


@contextmanager
def refused(*facts: object, kind: type[Exception] = UserError) -> Iterator[None]:
    """Inside the block an error is raised that tells these facts: names of settings, values, what to write instead."""
    with pytest.raises(kind) as caught:
        yield
    message = str(caught.value)
    assert [fact for fact in facts if str(fact) not in message] == [], message
