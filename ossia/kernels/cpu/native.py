"""`decode.c` as a library: its structs and functions as Python sees them; `build.py` compiles it."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

from ossia.kernels.cpu.build import COMPILERS, Library, Unavailable, load_library

FLOAT32, BFLOAT16, MXFP4, BFLOAT16_COLUMNS, FLOAT32_PANELS, BFLOAT16_PANELS = range(6)  # Matrix.kind
PANEL = 32  # results that lie side by side in a panel
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "router", "gate_up_proj", "down_proj")  # Layer.matrix, in order
_SOURCES = ("decode.c", "head.h", "step.h", "parts.h", "matrix.h", "tiles.h")


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
        ("tiles", c_int32),
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
        ("tiles", c_int32),
        ("threads", c_int32),
    ]


class Kernels:
    """The loaded library.

    multiplies_pairs  of bfloat16, into sums of 32 bits: this machine has an instruction for it
    uses_tiles        of them: it has instructions for 16 rows at a time, and they are wanted
    """

    def __init__(self, library: Library, *, tiles: bool = True) -> None:
        self.path, self._library = library.path, library.functions
        self._library.ossia_workspace.argtypes = (POINTER(Model), c_int32, c_int32)
        self._library.ossia_workspace.restype = c_int64
        self._library.ossia_decode.argtypes = (POINTER(Model), POINTER(Call))
        self._library.ossia_decode.restype = None
        self._library.ossia_multiplies_pairs.argtypes = ()
        self._library.ossia_multiplies_pairs.restype = c_int32
        self.multiplies_pairs: bool = bool(self._library.ossia_multiplies_pairs())
        self._library.ossia_multiplies_tiles.argtypes = ()
        self._library.ossia_multiplies_tiles.restype = c_int32
        self.uses_tiles: bool = tiles and bool(self._library.ossia_multiplies_tiles())
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


def load_kernels(
    folder: Path | None = None, compilers: tuple[str, ...] = COMPILERS, *, tiles: bool = True
) -> Kernels | Unavailable:
    """The library; see `build.load_library`.

    tiles  use instructions for tiles of numbers where the machine has them (AMX)
    """
    found = load_library([Path(__file__).with_name(name) for name in _SOURCES], folder, compilers)
    return found if isinstance(found, Unavailable) else Kernels(found, tiles=tiles)
