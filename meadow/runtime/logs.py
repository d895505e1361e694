"""Logs of a deployed process: one line per event, `level=INFO round=3 client=7 text="..."`, on standard output.

A container asks for this format by MEADOW_LOG=lines, because Flower starts its processes.
"""

import json
import logging
import os
import sys


class Lines(logging.Formatter):
    """Formats an event as one line, with `round` and `client` if the caller passed them as `extra`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line without a line break."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        facts = {key: getattr(record, key) for key in ("round", "client") if hasattr(record, key)}
        words = [f"level={record.levelname}", *(f"{key}={value}" for key, value in facts.items())]
        return " ".join([*words, f"text={json.dumps(text, ensure_ascii=False)}"])


def log_lines() -> None:
    """Use `Lines` for Meadow's loggers if MEADOW_LOG=lines; once per process."""
    logger = logging.getLogger("meadow")
    if os.environ.get("MEADOW_LOG") != "lines" or logger.handlers:
        return
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(Lines())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False


def print_line(line: str) -> None:
    """Print a line in one call. Unbuffered, `print` makes two, and another thread's output may come between them."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
