"""GGUF files through llama.cpp: its own HTTP server inside this process, from the prebuilt package of the extra
`gguf-run`; and the terminal chat with it on loopback.
"""

from __future__ import annotations

import signal
import struct
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from http.client import HTTPConnection
from importlib.util import find_spec
from pathlib import Path
from threading import Event
from types import FrameType
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from ossia.errors import CheckpointError, MissingExtraError, UserError
from ossia.harmony import Effort
from ossia.web.address import check_key, listen, open_to_all

if TYPE_CHECKING:
    import xllamacpp

_ARCHITECTURE = "general.architecture"
_SCALARS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # type of a value -> its bytes
_STRING, _ARRAY = 8, 9
_ERRORS_ONLY = 1


@dataclass(frozen=True, slots=True)
class LlamaOptions:
    """Options of llama.cpp under its names; None leaves one to llama.cpp.

    override_tensor  PATTERN=BUFFER each: where tensors go whose names match, like "ffn_.*_exps=CPU"
    flash_attention  False: every logit in float32 sums, where the cache is float32 too; otherwise it attends in float16
    cache_type_k, _v f32, f16, bf16, q8_0, q5_1, q5_0, q4_1, q4_0 or iq4_nl
    ctx_size         tokens of context of all answers together; 0: the model's
    parallel         answers generated at once
    lora             files of adapters, added to the model together
    """

    override_tensor: Sequence[str] = ()
    n_gpu_layers: int | None = None
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    flash_attention: bool | None = None
    threads: int | None = None
    ctx_size: int | None = None
    parallel: int | None = None
    lora: Sequence[str] = ()


def run_gguf_server(
    model: str,
    options: LlamaOptions,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
) -> None:
    """Serve a GGUF file until a signal comes.

    port    0: any that is free; the line that says the server is ready names it
    Raises  UserError for a file, an option or an address that can't be used; MissingExtraError without the package
    """
    check_key(api_key)
    path = checked_gguf(model)
    listen(host, port).close()  # llama.cpp takes the port itself, and says less where it can't
    if warning := open_to_all(host, api_key):
        print(warning, file=sys.stderr)
    server = start_llama(path, options, host=host, port=port, api_key=api_key)
    over = Event()

    def stop(number: int, frame: FrameType | None) -> None:
        print(f"ossia: {signal.Signals(number).name}, stopping", file=sys.stderr, flush=True)
        over.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        print(f"ossia serves {path.stem} through llama.cpp at {server.listening_address}", file=sys.stderr, flush=True)
        over.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    del server  # ends its threads


def run_gguf_chat(
    model: str,
    options: LlamaOptions,
    *,
    system: str | None = None,
    developer: str | None = None,
    effort: Effort = "medium",
    settings: Mapping[str, Any],
) -> None:
    """Ask and answer until the input ends; the rest is `run_remote_chat`'s. Raises as `run_gguf_server`."""
    from ossia.web.client import run_remote_chat  # brings torch, which a server of llama.cpp's doesn't need

    server = start_llama(checked_gguf(model), options)
    run_remote_chat(server.listening_address, system=system, developer=developer, effort=effort, settings=settings)


def start_llama(
    path: Path, options: LlamaOptions, *, host: str = "127.0.0.1", port: int = 0, api_key: str | None = None
) -> xllamacpp.Server:
    """llama.cpp's server, ready to answer at its `listening_address`; it ends with the object.

    Raises  CheckpointError where llama.cpp can't load the file, whose reasons it writes to stderr itself; UserError
            for an -ot that it doesn't take; MissingExtraError
    """
    if find_spec("xllamacpp") is None:
        raise MissingExtraError("GGUF files need llama.cpp: pip install 'ossia[gguf-run]'")
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(path)
    params.model_alias = {path.stem}
    params.hostnames, params.port = [host], port
    params.api_keys = [] if api_key is None else [api_key]
    params.cors_origins = "localhost"  # its default lets the page of any site read what it answers
    params.verbosity = _ERRORS_ONLY
    params.n_parallel = -1 if options.parallel is None else options.parallel  # -1: llama.cpp decides
    if options.override_tensor:
        _check_overrides(options.override_tensor, [one["name"] for one in xllamacpp.get_device_info()])
        params.tensor_buft_overrides = ",".join(options.override_tensor)
    for file in options.lora:
        if not Path(file).is_file():
            raise UserError(f"--lora {file}: there is no such file; name one of `ossia export --to gguf-lora`")
        params.lora_adapters = [*params.lora_adapters, xllamacpp.CommonAdapterLoraInfo(file, 1.0)]
    if options.n_gpu_layers is not None:
        params.n_gpu_layers = options.n_gpu_layers
    if options.threads is not None:
        params.cpuparams.n_threads = options.threads
    if options.ctx_size is not None:
        params.n_ctx = options.ctx_size
    if options.cache_type_k is not None:
        params.cache_type_k = _ggml_type(options.cache_type_k)
    if options.cache_type_v is not None:
        params.cache_type_v = _ggml_type(options.cache_type_v)
    if options.flash_attention is not None:
        kinds = xllamacpp.llama_flash_attn_type
        params.flash_attn_type = (
            kinds.LLAMA_FLASH_ATTN_TYPE_ENABLED if options.flash_attention else kinds.LLAMA_FLASH_ATTN_TYPE_DISABLED
        )
    try:
        server = xllamacpp.Server(params)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path}: llama.cpp can't load it; its reasons are above ({error})\n"
            "  next: write the file again with `ossia export ... --to gguf`, or ask for less with -c"
        ) from None
    _wait_for_loop(server.listening_address, api_key)
    return server


def _wait_for_loop(address: str, api_key: str | None) -> None:
    """Until llama.cpp's queue answers: a server that ends before its queue began would wait for itself for ever."""
    where = urlsplit(address)
    assert where.hostname is not None, address
    connection = HTTPConnection(where.hostname, where.port)
    headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
    with closing(connection):
        connection.request("GET", "/lora-adapters", headers=headers)  # goes through the queue, and changes nothing
        connection.getresponse().read()


def _check_overrides(given: Sequence[str], buffers: Sequence[str]) -> None:
    for one in ",".join(given).split(","):
        pattern, _, buffer = one.partition("=")
        if not pattern or buffer not in buffers:
            raise UserError(
                f"-ot {one}: expected PATTERN=BUFFER, like 'ffn_.*_exps=CPU'; buffers of this machine and build of "
                f"llama.cpp: {', '.join(buffers)}"
            )


def _ggml_type(name: str) -> xllamacpp.ggml_type:
    import xllamacpp

    return xllamacpp.ggml_type[f"GGML_TYPE_{name.upper()}"]


def checked_gguf(model: str) -> Path:
    """The GGUF file of a gpt-oss model. Raises CheckpointError for what isn't one, from its first bytes."""
    path = Path(model).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; `ossia export RUN_OR_MODEL --to gguf --output {path}` writes one")
    try:
        with path.open("rb") as file:
            found = _architecture(file)
    except (EOFError, UnicodeDecodeError):
        raise CheckpointError(f"{path} is no GGUF file, or cut short; write or download it again") from None
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}; check its permissions") from error
    if found != "gpt-oss":
        raise CheckpointError(f"{path}: `{_ARCHITECTURE}` is {found!r}; allowed: 'gpt-oss'. Ossia runs gpt-oss alone")
    return path


def _architecture(file: BinaryIO) -> str | None:
    """The value of `general.architecture`; None if there is none. Raises EOFError for what is no whole header."""

    def number(form: str) -> int:
        size = struct.calcsize(form)
        data = file.read(size)
        if len(data) < size:
            raise EOFError
        return struct.unpack(form, data)[0]

    def string() -> str:
        size = number("<Q")
        data = file.read(min(size, 1 << 20))
        if len(data) < size:
            raise EOFError
        return data.decode()

    def skip(kind: int) -> None:
        if kind == _STRING:
            string()
        elif kind == _ARRAY:
            inner = number("<I")
            for _ in range(number("<Q")):
                skip(inner)
        elif kind in _SCALARS:
            number(f"<{_SCALARS[kind]}s")
        else:
            raise EOFError

    if file.read(4) != b"GGUF" or number("<I") not in (2, 3):
        raise EOFError
    number("<Q")  # tensors
    for _ in range(number("<Q")):
        key, kind = string(), number("<I")
        if key == _ARCHITECTURE and kind == _STRING:
            return string()
        skip(kind)
    return None
