"""What compiled code is found where: by installation, by environment, for which processor, and of which sources."""

import hashlib
import shutil
from pathlib import Path

import pytest

from meadow.native import build
from meadow.native.build import OWN_FLAGS, PORTABLE, NotCompiled, build_all, compiled, library_name, native, targets
from meadow.native.sources import SOURCES

HERE = Path(build.__file__).parent
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="there is no C compiler")


def test_the_sources_are_the_recorded_ones() -> None:
    """Else write what is found into meadow/native/sources.py: the code hash covers that file."""
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in HERE.glob("*.c")}
    assert found == SOURCES and SOURCES.keys() == OWN_FLAGS.keys()


def test_a_library_has_a_name_for_each_file_and_processor() -> None:
    names = {library_name(file, target) for file in SOURCES for target in (native(), *PORTABLE)}
    assert len(names) == 4 * 3
    assert next(targets()) == native()


@needs_compiler
def test_what_was_built_elsewhere_is_found_without_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the image: the code comes from a bundle, which holds no C file, and the libraries lie in $MEADOW_NATIVE."""
    bundle, sources, elsewhere = tmp_path / "bundle", tmp_path / "sources", tmp_path / "elsewhere"
    bundle.mkdir()
    sources.mkdir()
    shutil.copy(HERE / "pooling.c", sources)
    built = build.build(HERE / "sums.c", elsewhere / build.BUILT, native())
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MEADOW_NATIVE", str(elsewhere))
    assert compiled("sums.c", [bundle, elsewhere])._name == str(built)
    with pytest.raises(NotCompiled, match="no C compiler"):
        compiled("pooling.c", [sources])
    with pytest.raises(NotCompiled, match=r"pooling\.c"):
        compiled("pooling.c", [bundle])
    monkeypatch.setenv("MEADOW_NATIVE", "off")
    with pytest.raises(NotCompiled):
        compiled("sums.c", [elsewhere])


@needs_compiler
def test_sources_of_other_code_are_not_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sums.c").write_text((HERE / "sums.c").read_text() + "\n")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    with pytest.raises(NotCompiled, match=r"sums\.c"):
        compiled("sums.c", [tmp_path])


@needs_compiler
def test_a_first_use_compiles_into_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "code").mkdir()
    shutil.copy(HERE / "sums.c", tmp_path / "code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = compiled("sums.c", [tmp_path / "code"])
    assert Path(found._name) == tmp_path / "cache" / "meadow" / library_name("sums.c", native())


def test_an_installation_never_fails_for_want_of_a_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert len(build_all(tmp_path / "built", [native()])) == len(SOURCES)


@needs_compiler
def test_a_damaged_library_is_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a power failure, which may leave a file's name with a part of its content."""
    (tmp_path / "code").mkdir()
    shutil.copy(HERE / "sums.c", tmp_path / "code")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library = Path(compiled("sums.c", [tmp_path / "code"])._name)
    content = library.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[:100] + b"\0" * (len(content) - 100)):
        library.unlink()
        library.write_bytes(damaged)
        assert Path(compiled("sums.c", [tmp_path / "code"])._name) == library
        assert library.read_bytes() == content
