"""Compiling, caching and threading of kernels: many callers, forked and spawned processes, damaged caches."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from pullback.kernels.ir.expr import I, J, builders, variable
from pullback.kernels.ir.primitives import op
from pullback.kernels.ir.reductions import OVER_I, OVER_J, Program, pullback
from pullback.kernels.runtime import compile, launch, pool
from pullback.kernels.runtime.launch import run

X, Y, B = variable(0, 3, I), variable(1, 3, J), variable(2, 1, J)
GAUSS = Program("Sum", (op("Exp", -builders["Sum"](op("Square", X - Y))) * B,), (OVER_J,), ((3, I), (3, J), (1, J)))


def inputs(m, n, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.rand(k, d, generator=g) for k, d in ((m, 3), (n, 3), (n, 1))]


def dense(args):
    x, y, b = (a.double() for a in args)
    return torch.exp(-(x[:, None] - y).square().sum(-1)) @ b


def right(m, n, seed=0):
    args = inputs(m, n, seed)
    got, want = run(GAUSS, args, (), m, n), dense(args)
    return bool(((got - want).abs() <= 1e-6 * want.abs()).all())


def fresh(constant):
    """A program that no other test compiles."""
    f = op("Exp", -constant * builders["Sum"](op("Square", X - Y))) * B
    return Program("Sum", (f,), (OVER_J,), ((3, I), (3, J), (1, J)))


def forget():
    launch._calls.clear()
    compile._kernels.clear()


@pytest.mark.slow
def test_threads_at_once():
    """Several Python threads with different data and sizes, on one pool: no call sees another's state."""
    bad, before = [], torch.get_num_threads()
    torch.set_num_threads(4)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)

    def work(k):
        for r in range(60):
            if not right(300 + 40 * k + r % 3, 700 + 10 * k, seed=k):
                bad.append((k, r))

    try:
        threads = [threading.Thread(target=work, args=(k,)) for k in range(6)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    finally:
        sys.setswitchinterval(interval)
        torch.set_num_threads(before)
    assert not bad


def test_first_calls_at_once():
    """The same new formula from many threads is compiled once and correctly."""
    p, args = fresh(1.25), inputs(50, 60)
    x, y, b = (a.double() for a in args)
    want = torch.exp(-1.25 * (x[:, None] - y).square().sum(-1)) @ b
    results = []
    threads = [threading.Thread(target=lambda: results.append(run(p, args, (), 50, 60))) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 8
    for r in results:
        torch.testing.assert_close(r.double(), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_number_of_threads(threads):
    """Honoured, and the results of one axis do not depend on it."""
    before = torch.get_num_threads()
    args = inputs(2000, 900)
    want = run(GAUSS, args, (), 2000, 900)
    try:
        torch.set_num_threads(threads)
        assert torch.equal(run(GAUSS, args, (), 2000, 900), want)
        (call,) = [c for key, c in launch._calls.items() if key[0] is GAUSS and key[3:6] == (2000, 900, threads)]
        assert call.threads == threads
    finally:
        torch.set_num_threads(before)


def test_same_twice():
    """Results that are merged from parts do not depend on which thread took which part."""
    p, _ = pullback(GAUSS, (0, 1, 2))
    args = [*inputs(1500, 1200), torch.rand(1500, 1, generator=torch.Generator().manual_seed(3))]
    args = [a.double() for a in args]
    first = run(p, args, (), 1500, 1200)
    assert all(torch.equal(run(p, args, (), 1500, 1200), first) for _ in range(10))


def test_large_parts_are_avoided(monkeypatch):
    """Results whose parts would take much memory are computed one by one, with the same numbers."""
    p, _ = pullback(GAUSS, (0, 1, 2))
    args = [*inputs(700, 600), torch.rand(700, 1)]
    want = run(p, args, (), 700, 600)
    forget()
    monkeypatch.setattr(launch, "PARTS", 1000)
    torch.testing.assert_close(run(p, args, (), 700, 600), want, rtol=1e-5, atol=1e-5)
    forget()


def _child(queue):
    queue.put(all(right(900, 1100, seed) for seed in range(3)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_fork():
    """A child of a process whose pool runs works with a pool of its own."""
    assert right(900, 1100)
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_child, args=(queue,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert queue.get()


CODE = """
import sys
import torch
sys.path.insert(0, {tests!r})
import pullback
assert "llvmlite" not in sys.modules
import test_kernels_runtime as t
assert t.right(200, 300)
"""


def python(folder, **more):
    code = CODE.format(tests=str(Path(__file__).parent))
    env = {**os.environ, "PULLBACK_CACHE": str(folder), **more}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
def test_processes_race(tmp_path):
    """Fresh processes that compile the same formula into an empty cache; `import pullback` loads no compiler."""
    children = [python(tmp_path / "cache") for _ in range(3)]
    for child in children:
        assert child.wait(60) == 0, child.stderr.read()
        child.stderr.close()
    names = [p.name for p in (tmp_path / "cache").iterdir()]
    assert len(names) == 1 and names[0].endswith(".o")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PULLBACK_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()


def test_cache_hit(cache, monkeypatch):
    """The second process does not compile."""
    assert right(20, 30)
    forget()
    monkeypatch.setattr(compile, "optimised", None)
    assert right(20, 30)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "empty"])
def test_damaged_entry(cache, damage):
    """An entry that is not what was written is compiled again, never loaded."""
    assert right(20, 30)
    (entry,) = cache.iterdir()
    good = entry.read_bytes()
    middle = len(good) // 2
    entry.write_bytes(
        {
            "truncated": good[:middle],
            "flipped": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "foreign": b"\\x7fELF" + good,
            "empty": b"",
        }[damage]
    )
    forget()
    assert right(20, 30)
    assert entry.read_bytes() == good


def test_cache_that_cannot_be_written(tmp_path, monkeypatch):
    """A file where the folder should be: everything works, nothing is kept."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("PULLBACK_CACHE", str(blocked / "cache"))
    forget()
    assert right(20, 30)
    forget()


def test_no_home(monkeypatch):
    """No home and no PULLBACK_CACHE."""
    monkeypatch.delenv("PULLBACK_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)

    def homeless(cls=None):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    forget()
    assert right(20, 30)
    forget()


def test_the_oldest_entries_are_removed(cache, monkeypatch):
    monkeypatch.setattr(compile, "ENTRIES", 3)
    for k, name in enumerate(["aa", "bb", "cc", "dd"]):
        compile._write(name, b"code")
        os.utime(cache / f"{name}.o", (k, k))
    compile._write("00", b"code")
    assert sorted(p.name for p in cache.iterdir()) == ["00.o", "cc.o", "dd.o"]


def test_key_holds_the_target(cache):
    """Code for different CPUs does not share an entry."""
    assert right(20, 30)
    if compile.runs_here("haswell"):
        with compile.use_target("haswell"):
            assert right(20, 30)
        assert len(list(cache.iterdir())) == 2


def test_memory():
    """Scratch memory is a few MB, whatever the size."""
    for p in (GAUSS, pullback(GAUSS, (0, 1, 2))[0], Program("Sum", (X * B,), (OVER_I,), GAUSS.signature)):
        plan = launch.plan_for(p, torch.float32, 10**6, 10**6)
        assert compile.kernel(plan).module.scratch < 4 << 20


def test_scratch_is_aligned():
    address = pool.scratch(1000)
    assert address % 64 == 0
    assert pool.scratch(500) == address


def test_old_kernels_are_dropped(monkeypatch):
    """Formulas with ever new constants do not fill the memory with code; prepared calls keep theirs."""
    forget()
    monkeypatch.setattr(compile, "KEPT_KERNELS", 2)
    args = inputs(20, 30)
    x, y, b = (a.double() for a in args)
    for _ in range(2):
        for c in (0.5, 0.75, 1.5, 2.5):
            want = torch.exp(-c * (x[:, None] - y).square().sum(-1)) @ b
            torch.testing.assert_close(run(fresh(c), args, (), 20, 30).double(), want, rtol=1e-6, atol=0)
    assert len(compile._kernels) == 2
    forget()


SCATTERED = """
import ctypes, random, torch
import pullback as pb
mmap = ctypes.CDLL(None).mmap
mmap.restype = ctypes.c_void_p
mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
random.seed(0)
x = torch.rand(20, 3, dtype=torch.float64)
for k in range(150):
    for _ in range(6):  # reserve address space, without memory, so that neighbours are taken
        mmap(None, random.choice([1 << 12, 1 << 13, 1 << 14, 1 << 16, 1 << 31]), 0, 0x4022, -1, 0)
    y = pb.Genred(f"Exp(-SqDist(x,y)*IntCst({k + 2}))", ["x = Vi(3)", "y = Vj(3)"], axis=1)(x, x, backend="llvm")
    torch.testing.assert_close(y, torch.exp(-torch.cdist(x, x).square() * (k + 2)).sum(1, keepdim=True))
print("all")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reserves address space as Linux does")
def test_code_is_linked_where_memory_is_scattered():
    """A linker that places constants 2 GB from the code aborts the process."""
    out = subprocess.run([sys.executable, "-c", SCATTERED], capture_output=True, text=True, check=False)
    assert out.stdout == "all\n", out.stderr[-1000:]
