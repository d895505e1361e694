"""Health check of a service: `python -m deploy.health URL` exits with 0 if URL answers 200. TLS uses the federation's CA."""

import os
import ssl
import sys
import urllib.request
from pathlib import Path


def main(url: str) -> int:
    """Return 0 if the service is healthy, else 1."""
    ca = Path(os.environ.get("MEADOW_OWN", "/own")) / "keys/ca.crt"
    context = ssl.create_default_context(cafile=str(ca)) if url.startswith("https") else None
    try:
        with urllib.request.urlopen(url, timeout=4, context=context) as answer:
            return 0 if answer.status == 200 else 1
    except OSError:
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
