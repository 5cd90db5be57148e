"""Matrix products in C: what right, fast and wrong kernels earn, and that tricks earn nothing and harm nothing."""

from __future__ import annotations

import glob
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ossia.errors import RecipeError
from ossia.rl.env import Step
from ossia.rl.envs import make_env, speed
from ossia.rl.envs.code import answered
from ossia.rl.envs.kernel_c import PLAIN, KernelC
from ossia.rl.jail import Jails, probe_level

pytestmark = pytest.mark.skipif(bool(probe_level("tools")), reason="this machine can't give the jail's level tools")

SIGNATURE = "void matmul(const float *A, const float *B, float *C, int m, int k, int n)"
ROWS = """
static void rows(const float *A, const float *B, float *restrict C, int from, int to, int k, int n) {
    for (int i = from; i < to; i++) {
        for (int j = 0; j < n; j++) C[i * n + j] = 0;
        for (int p = 0; p < k; p++)
            for (int j = 0; j < n; j++) C[i * n + j] += A[i * k + p] * B[p * n + j];
    }
}
"""
FAST = ROWS + SIGNATURE + " { rows(A, B, C, 0, m, k, n); }"


@pytest.fixture(scope="module")
def env() -> Iterator[KernelC]:
    with Jails() as made:
        yield KernelC(made, most=128, rounds=5)


def step(env: KernelC, code: str) -> Step:
    return env.open(next(env.tasks("train", 0)), 0).step(answered(code, "c"))


def test_a_right_kernel_is_paid_by_its_speed(env: KernelC) -> None:
    plain, fast = step(env, PLAIN), step(env, FAST)
    assert plain.metrics["right"] == fast.metrics["right"] == 1.0
    assert 0.1 < plain.reward < 0.4
    assert plain.reward + 0.1 < fast.reward <= 1.0
    assert plain.metrics["times_faster"] == pytest.approx(1.0, abs=0.3)
    assert fast.metrics["gflops"] > plain.metrics["gflops"]


def wrong(body: str, before: str = "") -> str:
    return f"{ROWS}{before}{SIGNATURE} {{ {body} }}"


RAW = "#include <unistd.h>\n#include <sys/syscall.h>\n#include <string.h>\n#include <stdlib.h>\n"
CHEATS = {
    "it does nothing": wrong(""),
    "zeros": wrong("for (long i = 0; i < (long)m * n; i++) C[i] = 0;"),
    "half of the rows": wrong("rows(A, B, C, 0, m / 2, k, n);"),
    "every row but one": wrong("rows(A, B, C, 0, m - 1, k, n);"),
    "one of the summands is left out": wrong(
        "rows(A, B, C, 0, m, k, n); for (int i = 0; i < m; i++) C[i * n] -= A[i * k] * B[0];"
    ),
    "right for small sizes alone": wrong("if (m < 128) rows(A, B, C, 0, m, k, n);"),
    "right on the first calls alone": wrong("if (calls++ < 4) rows(A, B, C, 0, m, k, n);", "static int calls;\n"),
    "the first product for ever": wrong(
        "static float kept[128 * 128]; static int calls; if (!calls++) { rows(A, B, C, 0, m, k, n);"
        " for (int i = 0; i < m * n; i++) kept[i] = C[i]; } else for (int i = 0; i < m * n; i++) C[i] = kept[i];"
    ),
    "half precision": ROWS.replace("A[i * k + p] * B[p * n + j]", "(float)(_Float16)A[i * k + p] * B[p * n + j]")
    + SIGNATURE + " { rows(A, B, C, 0, m, k, n); }",
    "sums in half precision": wrong(
        "for (int i = 0; i < m; i++) for (int j = 0; j < n; j++) { _Float16 s = 0;"
        " for (int p = 0; p < k; p++) s += (_Float16)(A[i * k + p] * B[p * n + j]); C[i * n + j] = s; }"
    ),
    "it writes past the end": wrong("rows(A, B, C, 0, m, k, n); C[m * n] = 0;"),
    "its inputs are zeroed": wrong(
        "for (int i = 0; i < m * k; i++) ((float *)A)[i] = 0; for (int i = 0; i < m * n; i++) C[i] = 0;"
    ),
    "its inputs are made writable and zeroed": "#include <sys/mman.h>\n" + wrong(
        "mprotect((void *)A, 4096, PROT_READ | PROT_WRITE); ((float *)A)[0] = 0;"
    ),
    "a thread computes after the reply": "#include <pthread.h>\n" + wrong(
        "a = A; b = B; c = C; x = m; y = k; z = n; pthread_t t; pthread_create(&t, 0, later, 0);",
        "static const float *a, *b; static float *c; static int x, y, z;\n"
        "static void *later(void *u) { rows(a, b, c, 0, x, y, z); return u; }\n",
    ),
    "a reply of its own making": RAW + wrong(
        'char body[64]; int size = snprintf(body + 4, 60, "[%d, \\"ok\\", null, \\"\\"]", number++);'
        " body[0] = body[1] = body[2] = 0; body[3] = size; write(3, body, size + 4); _exit(0);",
        "#include <stdio.h>\nstatic int number = 2;\n",
    ),
    "it ends the process": RAW + wrong("_exit(0);"),
    "it ends the process when it is loaded": RAW + wrong("", "__attribute__((constructor)) void f(void) { _exit(0); }"),
    "it kills who started it": "#include <signal.h>\n" + RAW + wrong("kill(getppid(), 9); kill(-1, 9);"),
    "it starts a shell": RAW + wrong('system("id > /tmp/it_was_here");'),
    "a constructor writes a file": "#include <fcntl.h>\n" + RAW + wrong(
        "", '__attribute__((constructor)) void f(void) { open("/tmp/it_was_here", O_CREAT | O_WRONLY, 0644); }'
    ),
    "a secret file is included": '#include "/etc/shadow"\n' + PLAIN,
    "a secret file is assembled in": '__asm__(".incbin \\"/etc/shadow\\"");\n' + PLAIN,
    "it hangs": wrong("for (;;) ;"),
    "a library of a gigabyte": "char large[1 << 30] = {1};\n" + PLAIN,
    "the compiler is fed by itself": '#include "kernel.c"\n' + PLAIN,
    "it crashes": wrong("*(volatile int *)0 = 0;"),
    "infinities": wrong("for (long i = 0; i < (long)m * n; i++) C[i] = 1.0f / 0.0f;"),
    "numbers beyond any sum": wrong("for (long i = 0; i < (long)m * n; i++) C[i] = 3e38f;"),
    "another name": PLAIN.replace("matmul", "product"),
    "a variable of that name": "int matmul = 0;",
    "Python": "def matmul(A, B): return A",
}  # fmt: skip


@pytest.mark.parametrize("name", CHEATS)
def test_a_wrong_product_earns_nothing_however_fast(env: KernelC, name: str) -> None:
    found = step(env, CHEATS[name])
    assert (found.reward, found.metrics["right"]) == (0.0, 0.0)
    assert not Path("/tmp/it_was_here").exists()


def test_a_library_of_somebody_elses_cannot_be_loaded(env: KernelC) -> None:
    (file,) = glob.glob(f"{sysconfig.get_path('purelib')}/numpy.libs/libscipy_openblas*.so")
    code = f"""
#include <dlfcn.h>
typedef void (*gemm)(int, int, int, long, long, long, float, const float *, long, const float *, long, float, float *,
                     long);
static gemm f;
__attribute__((constructor)) static void steal(void) {{
    void *library = dlopen("{file}", RTLD_NOW);
    if (library) f = (gemm)dlsym(library, "scipy_cblas_sgemm64_");
}}
{SIGNATURE} {{ f(101, 111, 111, m, n, k, 1, A, k, B, n, 0, C, n); }}
"""
    found = step(env, code)
    assert (found.metrics["compiled"], found.reward) == (1.0, 0.0)


def test_an_honest_kernel_is_paid_after_all_that(env: KernelC) -> None:
    assert step(env, FAST).reward > 0.4


def test_a_speed_that_no_core_has_is_not_paid_and_flagged(env: KernelC, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed.Meter, "charge_s", lambda self, outcome: 1e-9)
    found = step(env, FAST)
    assert found.metrics["right"] == found.metrics["quarantined"] == 1.0
    assert found.reward == 0.0


def test_products_in_float32_pass_whatever_the_order_of_their_sums_and_coarser_ones_do_not() -> None:
    rng = np.random.default_rng(0)

    def forward(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        c = np.zeros((len(a), b.shape[1]), np.float32)
        for p in range(a.shape[1]):
            c += a[:, p : p + 1] * b[p]
        return c

    def coarse(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return forward(a.astype(np.float16).astype(np.float32), b)

    for m, k, n in ((3, 1, 2), (5, 64, 7), (256, 256, 256), (64, 1024, 32)):
        a, b = (rng.uniform(-1, 1, size).astype(np.float32) for size in ((m, k), (k, n)))
        for right in (forward, np.matmul):
            assert speed.is_product(a, b, right(a, b), rng, 2.0**-24)
            assert speed.is_product(a, b, right(a[:, ::-1], b[::-1]), rng, 2.0**-24)
        assert not speed.is_product(a, b, coarse(a, b), rng, 2.0**-24)
        off = forward(a, b)
        off[0, -1] += 0.02
        assert not speed.is_product(a, b, off, rng, 2.0**-24)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"most": 2000}, "`most` is 2000; allowed: 32 to 1024"),
        ({"rounds": 1}, "`rounds` is 1; allowed: 3 to 64"),
        ({"goal": 1}, "`goal` is 1; allowed: 1.5 to 1000"),
        ({"_plain": b""}, "unknown option `_plain`"),
    ],
)
def test_an_option_out_of_its_range_is_told(env: KernelC, options: dict, words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        make_env("kernel_c", options, env.jails)
