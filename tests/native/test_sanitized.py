"""Each C file under AddressSanitizer and UndefinedBehaviorSanitizer, on random shapes (`fuzz.c`).

By hand, for another 1,000 networks:

    gcc -O1 -g -march=native -fsanitize=address,undefined -fno-sanitize-recover=all -DFUSED -Imeadow/native \\
        -o /tmp/fuzz tests/native/fuzz.c -lm && /tmp/fuzz 1000 1000
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from meadow.native import build

SANITIZED = ("-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
COUNTS = {"FUSED": 300, "POOLING": 3000, "SUMS": 3000, "NOISE": 3000}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")
@pytest.mark.parametrize("file", COUNTS)
def test_random_shapes_read_and_write_only_their_own(file: str, tmp_path: Path) -> None:
    sources = [f"-D{file}", f"-I{Path(build.__file__).parent}", str(Path(__file__).with_name("fuzz.c"))]
    done = subprocess.run(
        ["cc", *SANITIZED, *sources, "-o", str(tmp_path / "fuzz"), "-lm"], capture_output=True, text=True
    )
    if "cannot find" in done.stderr:
        pytest.skip("the compiler has no sanitizers")
    assert done.returncode == 0, done.stderr
    done = subprocess.run([str(tmp_path / "fuzz"), "0", str(COUNTS[file])], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
