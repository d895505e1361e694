"""Logs of a deployed process: one line an event, `level=INFO round=3 client=7 text="..."`, on standard output.

Flower starts the processes of an app, so a container says by MEADOW_LOG=lines what form it wants.
"""

import json
import logging
import os
import sys


class Lines(logging.Formatter):
    """One line an event; `round` and `client` if the caller gave them as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        facts = {key: getattr(record, key) for key in ("round", "client") if hasattr(record, key)}
        words = [f"level={record.levelname}", *(f"{key}={value}" for key, value in facts.items())]
        return " ".join([*words, f"text={json.dumps(text, ensure_ascii=False)}"])


def log_lines() -> None:
    """Let Meadow's loggers write lines, if the environment says so; once a process."""
    logger = logging.getLogger("meadow")
    if os.environ.get("MEADOW_LOG") != "lines" or logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Lines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def tell(line: str) -> None:
    """Print a line by one call: `print` makes two where nothing is buffered, and another thread's line may come between."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
