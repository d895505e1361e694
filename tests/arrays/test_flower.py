"""What Flower keeps private is touched in one file."""

import re

from helpers.stack import ROOT

PRIVATE = re.compile(r"""flwr\.(supercore|superlink)|["']_(message_id|data)["']|TaskIdentity|HttpGrid""")


def test_one_file_touches_them() -> None:
    rooms = ("meadow", "strategies", "client", "server", "simulation")
    found = {
        path.relative_to(ROOT).as_posix()
        for room in rooms
        for path in (ROOT / room).rglob("*.py")
        if PRIVATE.search(path.read_text())
    }
    assert found == {"meadow/arrays/flower.py"}
