"""`decode.c` as a library: compiled by this machine's own compiler on first use, kept in the user's cache folder.

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
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from pathlib import Path

FLOAT32, BFLOAT16, MXFP4, BFLOAT16_COLUMNS = range(4)  # Matrix.kind
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_up_proj", "down_proj")  # Layer.matrix, in order
COMPILERS = ("cc", "gcc", "clang")
_SOURCES = ("decode.c", "head.h", "step.h", "parts.h", "matrix.h")
# not -ffast-math: linking with it makes the whole process flush denormals, and it lets sums change their order
_FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fopenmp", "-fPIC", "-fno-math-errno", "-fno-trapping-math")
_OPENMP = re.compile(r"/lib(gomp|iomp5|omp)[^/]*\.so[.\d]*$")
_COMPILE_S = 120


class Matrix(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [
        ("weight", c_void_p),
        ("scales", c_void_p),
        ("bias", c_void_p),
        ("kind", c_int32),
        ("fan_in", c_int32),
        ("fan_out", c_int32),
        ("interleaved", c_int32),
    ]


class Factors(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [("a", c_void_p), ("b", c_void_p), ("rank", c_int64)]


class Layer(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [
        ("input_norm", c_void_p),
        ("post_norm", c_void_p),
        ("sinks", c_void_p),
        ("matrix", Matrix * len(TARGETS)),
    ]


class Lane(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [
        ("pool", c_void_p),
        ("scales", c_void_p),
        ("table", c_void_p),
        ("table_width", c_int32),
        ("block", c_int32),
        ("window", c_int32),
        ("unused", c_int32),
    ]


class Model(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [
        ("layers", POINTER(Layer)),
        ("factors", POINTER(Factors)),
        ("num_layers", c_int32),
        ("num_adapters", c_int32),
        ("hidden", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("width", c_int32),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("bf16", c_int32),
        ("max_rank", c_int32),
        ("rms_eps", c_float),
        ("swiglu_limit", c_float),
        ("swiglu_alpha", c_float),
    ]


class Call(ctypes.Structure):
    """As in decode.c."""

    _fields_ = [
        ("x", c_void_p),
        ("out", c_void_p),
        ("positions", c_void_p),
        ("adapters", POINTER(c_int32)),
        ("cos", c_void_p),
        ("sin", c_void_p),
        ("lanes", POINTER(Lane)),
        ("routes", c_void_p),
        ("workspace", c_void_p),
        ("sequence", POINTER(c_int32)),
        ("first", POINTER(c_int32)),
        ("rows", c_int32),
        ("threads", c_int32),
    ]


class Head(ctypes.Structure):
    """As in head.h."""

    _fields_ = [
        ("x", c_void_p),
        ("weight", c_void_p),
        ("temperature", c_void_p),
        ("uniform", c_void_p),
        ("wanted", POINTER(c_int32)),
        ("logits", c_void_p),
        ("ids", c_void_p),
        ("logprobs", c_void_p),
        ("sums", c_void_p),
        ("workspace", c_void_p),
        ("rows", c_int32),
        ("hidden", c_int32),
        ("vocab", c_int32),
        ("kind", c_int32),
        ("bf16", c_int32),
        ("threads", c_int32),
    ]


@dataclass(frozen=True)
class Unavailable:
    """Why there is no library, in a line for the user."""

    reason: str


class Kernels:
    """The loaded library.

    multiplies_pairs  of bfloat16, into sums of 32 bits: this machine has an instruction for it
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._library = ctypes.CDLL(str(path))
        self._library.ossia_workspace.argtypes = (POINTER(Model), c_int32, c_int32)
        self._library.ossia_workspace.restype = c_int64
        self._library.ossia_decode.argtypes = (POINTER(Model), POINTER(Call))
        self._library.ossia_decode.restype = None
        self._library.ossia_multiplies_pairs.argtypes = ()
        self._library.ossia_multiplies_pairs.restype = c_int32
        self.multiplies_pairs: bool = bool(self._library.ossia_multiplies_pairs())
        self._library.ossia_head_workspace.argtypes = (c_int32,) * 4
        self._library.ossia_head_workspace.restype = c_int64
        self._library.ossia_head.argtypes = (POINTER(Head),)
        self._library.ossia_head.restype = None

    def workspace_bytes(self, model: Model, rows: int, threads: int) -> int:
        """Bytes of workspace for a step of so many rows, aligned to 64."""
        return self._library.ossia_workspace(ctypes.byref(model), rows, threads)

    def decode(self, model: Model, call: Call) -> None:
        """A step; Python's lock is not held meanwhile."""
        self._library.ossia_decode(ctypes.byref(model), ctypes.byref(call))

    def head_workspace_bytes(self, rows: int, hidden: int, vocab: int, threads: int) -> int:
        """Bytes of workspace for `draw`, aligned to 64."""
        return self._library.ossia_head_workspace(rows, hidden, vocab, threads)

    def draw(self, head: Head) -> None:
        """A token for each row; Python's lock is not held meanwhile."""
        self._library.ossia_head(ctypes.byref(head))


def cache_folder() -> Path:
    """Where compiled libraries are kept: `ossia` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME", "")  # where, not what: no result depends on it
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".cache") / "ossia"


def load_kernels(folder: Path | None = None, compilers: tuple[str, ...] = COMPILERS) -> Kernels | Unavailable:
    """The library, compiled first if this machine's isn't there yet (some seconds).

    folder     of compiled libraries; None: `cache_folder`
    compilers  names to look for, in this order
    """
    folder = cache_folder() if folder is None else folder
    compiler = next((found for name in compilers if (found := shutil.which(name))), None)
    if compiler is None:
        return Unavailable(f"no C compiler ({', '.join(compilers)}); install one, e.g. `apt install gcc`")
    runtime = loaded_openmp()
    path = folder / f"decode-{_key(Path(compiler), runtime)}.so"
    try:
        if not path.is_file():
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            _compile(compiler, runtime, path)
        return Kernels(path)
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


def _compile(compiler: str, runtime: str | None, path: Path) -> None:
    """Both steps beside the target, which appears whole or not at all."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".compiling-") as scratch:
        compiled, linked = f"{scratch}/decode.o", f"{scratch}/decode.so"
        _run(compiler, *_FLAGS, "-c", str(Path(__file__).with_name(_SOURCES[0])), "-o", compiled)
        link = (compiler, "-shared", "-Wl,-z,defs", compiled, "-lm", "-o", linked)
        try:
            _run(*link, runtime or "-fopenmp")
        except subprocess.CalledProcessError:  # a compiler that needs a runtime of another maker
            _run(*link, "-fopenmp")
        os.replace(linked, path)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_S, stdin=subprocess.DEVNULL)


def _key(compiler: Path, runtime: str | None) -> str:
    """Everything that the library's bytes depend on, in one name."""
    about = hashlib.sha256()
    for name in _SOURCES:
        about.update(Path(__file__).with_name(name).read_bytes())
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
