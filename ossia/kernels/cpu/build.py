"""C sources as a library: compiled by this machine's own compiler on first use, kept in the user's cache folder.

Compiled here because `-march=native` is worth more than any wheel could carry, and a C compiler is all it needs: no
torch headers, no build step. Where there is none, or it fails, the caller gets an `Unavailable` that says why.
The library's name is a hash of all it depends on, so an old one is never used; many processes may make it at once.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

COMPILERS = ("cc", "gcc", "clang")
# not -ffast-math: linking with it makes the whole process flush denormals, and it lets sums change their order
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.so[.\d]*$")
_COMPILE_S = 120


@dataclass(frozen=True)
class Unavailable:
    """Why there is no library, in a line for the user."""

    reason: str


@dataclass(frozen=True)
class Library:
    """A loaded library and where it is kept."""

    path: Path
    functions: ctypes.CDLL


def cache_folder() -> Path:
    """Where compiled libraries are kept: `ossia` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # where, not what: no result depends on it
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "ossia"


def load_library(
    sources: Sequence[Path], folder: Path | None = None, compilers: tuple[str, ...] = COMPILERS
) -> Library | Unavailable:
    """The library, compiled first if this machine's isn't there yet (some seconds).

    sources    what is compiled, then all that it includes
    folder     of compiled libraries; None: `cache_folder`
    compilers  names to look for, in this order
    """
    folder = cache_folder() if folder is None else folder
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    if compiler is None:
        return Unavailable(f"no C compiler ({', '.join(compilers)}); install one, e.g. `apt install gcc`")
    runtime = loaded_openmp()
    path = folder / f"{sources[0].stem}-{_key(sources, Path(compiler), runtime)}.so"
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(sources[0], compiler, runtime, path)
        return Library(path, ctypes.CDLL(str(path)))
    except subprocess.CalledProcessError as error:
        first = next((line for line in error.stderr.splitlines() if "error" in line), error.stderr.strip()[:200])
        return Unavailable(f"{compiler} could not compile it: {first}")
    except subprocess.TimeoutExpired:
        return Unavailable(f"{compiler} took longer than {_COMPILE_S} s")
    except OSError as error:
        return Unavailable(f"{path}: {error.strerror or error}; XDG_CACHE_HOME names another place for the cache")


def loaded_openmp() -> str | None:
    """The OpenMP runtime that this process has loaded already: torch's.

    Sharing it means one set of threads; with two, each waits for the cores that the other's idle threads spin on.
    """
    maps = Path("/proc/self/maps")
    paths = (line.split(maxsplit=5)[-1] for line in maps.read_text().splitlines()) if maps.is_file() else ()
    return next((path for path in paths if _OPENMP.search(path)), None)


def _compile(source: Path, compiler: str, runtime: str | None, path: Path) -> None:
    """Both steps beside the target, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as scratch:
        compiled, linked = f"{scratch}/library.o", f"{scratch}/library.so"
        _run(compiler, *_FLAGS, "-c", str(source), "-o", compiled)
        link = (compiler, "-shared", "-Wl,-z,defs", compiled, "-lm", "-o", linked)
        try:
            _run(*link, runtime or "-fopenmp")
        except subprocess.CalledProcessError:  # a compiler that needs a runtime of another maker
            _run(*link, "-fopenmp")
        os.replace(linked, path)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S, stdin=subprocess.DEVNULL)


def _key(sources: Sequence[Path], compiler: Path, runtime: str | None) -> str:
    """Everything that the library's bytes depend on, in one name."""
    about = hashlib.sha256()
    for source in sources:
        about.update(source.read_bytes())
    stat = compiler.stat()
    about.update(repr((_FLAGS, str(compiler.resolve()), stat.st_size, stat.st_mtime_ns, runtime, _cpu())).encode())
    return about.hexdigest()[:20]


def _cpu() -> str:
    """What `-march=native` looks at, as far as the system tells: a home folder may be shared by several machines."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    first = {line.split(":")[0].strip(): line for line in reversed(lines) if ":" in line}
    kinds = ("model name", "flags", "Features", "CPU part")
    return "\n".join([platform.machine(), *(first[kind] for kind in kinds if kind in first)])
