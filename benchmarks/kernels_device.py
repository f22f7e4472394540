"""Kernel reductions on a device: the rows of `kernels.py --device cuda`.

    python benchmarks/kernels.py --device cuda [--sizes 10000,100000,1000000] [--only NAME] [--no-peer]

Times are those of the device, between two events on its stream, after calls that compile and warm up; minimum and
median. Results are compared with the definition in float64 at some rows before they are timed. The peer is KeOps
where it can run, otherwise the formula in torch through torch.compile. Where it would take long or run out of memory it
does fewer rows and its time is scaled: rows are independent.

The limit is counted: a pair occupies the multiply-add units for its `fma` operations, the special function unit for one
exponential and, if its products are done by tensor cores, those for three products in tf32 for each one in float32. The
busiest unit decides, and the cheaper of the two ways to do products.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from kernels_cases import GAUSSIAN, gaussian_aliases, points, weights
from torch import Tensor

import pullback as pb

WIDTH = 40
SIZES = (10**4, 10**5, 10**6)
PEER_PAIRS = 1 << 28  # of the formula in torch, which stores them
PEER_WORK = 1.2e13  # pairs times D that KeOps does in a reading: enough rows to fill a device
KEOPS_RATE, KEOPS_PEAK = 0.7e12, 13.45e12  # pairs of a Gaussian, D = 3, on an RTX 2080 Ti, and the flops of that card
# Operations in a clock of a multiprocessor, by compute capability: multiply-adds in float32, in tf32 by tensor cores
UNITS = {
    (7, 5): (64, 0),
    (8, 0): (64, 512),
    (8, 6): (128, 128),
    (8, 9): (128, 128),
    (9, 0): (128, 1024),
    (10, 0): (128, 2048),
}
SPECIAL = 16  # exponentials in a clock of a multiprocessor

Call = Callable[[], Any]


# The machine --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peak:
    """Operations in a second of the whole device."""

    fma: float
    tensor: float
    special: float

    def pairs(self, dim: int, exponentials: int = 1) -> float:
        """Pairs with |x - y|^2 or (x|y) in D dimensions and one weight that the device could do in a second.

        |x - y|^2 is 2 D operations, or D by |x|^2 + |y|^2 - 2 (x|y) and two more; the weight is one.
        """
        special = exponentials / self.special
        ways = [max((min(2 * dim, dim + 2) + 1) / self.fma, special)]
        if self.tensor:
            ways.append(max(3 * dim / self.tensor, 3 / self.fma, special))
        return 1 / min(ways)


def clock(index: int) -> float:
    """The highest clock of the multiprocessors [Hz]."""
    query = ["nvidia-smi", f"--id={index}", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        return float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]) * 1e6
    except (OSError, subprocess.CalledProcessError, ValueError, IndexError):
        return torch.cuda.get_device_properties(index).clock_rate * 1e3


def peak(device: torch.device) -> Peak | None:
    """None where it is not known: the CPU, and architectures that are not in the table."""
    if device.type != "cuda" or torch.version.hip:
        return None
    properties = torch.cuda.get_device_properties(device)
    units = UNITS.get((properties.major, properties.minor))
    if units is None:
        return None
    each = properties.multi_processor_count * clock(device.index or 0)
    return Peak(units[0] * each, units[1] * each, SPECIAL * each)


def waited(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Call, device: torch.device, budget: float = 1.0) -> tuple[float, float]:
    """(minimum, median) seconds of a call, after warming up; about `budget` seconds, at least three readings."""
    call()
    waited(device)
    start = time.perf_counter()
    call()
    waited(device)
    count = int(min(max(budget / max(time.perf_counter() - start, 1e-6), 3), 200))
    if device.type != "cuda":
        return spread([clocked(call) for _ in range(count)])
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for first, last in events:
        first.record()
        call()
        last.record()
    waited(device)
    return spread([first.elapsed_time(last) * 1e-3 for first, last in events])


def clocked(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def spread(times: list[float]) -> tuple[float, float]:
    return min(times), statistics.median(times)


# Texts --------------------------------------------------------------------------------------------------------------


def seconds(t: float) -> str:
    """Three digits and a unit."""
    scale, unit = (1e6, "us") if t < 1e-3 else (1e3, "ms") if t < 1 else (1, "s")
    return f"{t * scale:.3g} {unit}" if t * scale < 999.5 else f"{t * scale:.0f} {unit}"


def verdict(value: float, bar: float | None, unit: str, at_most: bool = False) -> str:
    if bar is None:
        return ""
    met = value <= bar if at_most else value >= bar
    return f"  bar {'<=' if at_most else '>='} {bar:g}{unit} {'ok' if met else 'MISSED'}"


def row(name: str, times: tuple[float, float], *parts: str) -> str:
    return f"{name:{WIDTH}}{seconds(times[0]):>9}{seconds(times[1]):>9}  " + "  ".join(p for p in parts if p)


# Peers --------------------------------------------------------------------------------------------------------------


@dataclass
class Peer:
    """Another library.

    Args:
        name: for the table.
        library: a module with Genred, or None.
        dense: (x, y, b) -> result, the formula in torch that stands in for one.
    """

    name: str
    library: Any | None
    dense: Callable[..., Tensor] | None = None

    def gaussian(self, x: Tensor, y: Tensor, b: Tensor) -> tuple[Call, float]:
        """A call, and what its time is multiplied with."""
        pairs = PEER_PAIRS if self.library is None else int(PEER_WORK / x.shape[1])
        rows = min(len(x), max(1, pairs // len(y)))
        f = self.dense
        if self.library is not None:
            f = self.library.Genred(GAUSSIAN, gaussian_aliases(x.shape[1]), reduction_op="Sum", axis=1)
        assert f is not None
        return partial(f, x[:rows], y, b), len(x) / rows


def in_torch(x: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """The definition, with all pairs in memory."""
    return torch.exp(-torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()) @ b


def find_peer(device: torch.device, library: Any | None) -> Peer:
    """KeOps if it can run on the device, else torch.compile."""
    if library is not None:
        try:
            tiny = torch.ones(4, 3, device=device)
            library.Genred(GAUSSIAN, gaussian_aliases(3), reduction_op="Sum", axis=1)(tiny, tiny, tiny[:, :1])
            return Peer("KeOps", library)
        except Exception as error:  # whatever keeps it from running here
            print(f"KeOps does not run on {device}: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
    return Peer("torch.compile", None, torch.compile(in_torch, dynamic=False))


# Rows ---------------------------------------------------------------------------------------------------------------


class Bench:
    """The rows: each method gives the text of one.

    Args:
        device: where.
        peer: whom to compare with; None: nobody.
    """

    def __init__(self, device: torch.device, peer: Peer | None) -> None:
        self.device, self.peer, self.peak = device, peer, peak(device)

    def _data(self, n: int, dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [t.to(self.device, dtype) for t in (points(0, n, dim), points(1, n, dim), weights(n))]

    def _checked(self, got: Tensor, want: Callable[[Tensor], Tensor], x: Tensor, rtol: float) -> str:
        """The relative error at the first rows, and whether it is too large."""
        exact = want(x[:50].double())
        error = float((got[:50].double() - exact).norm() / exact.norm())
        return f"error {error:.0e}{'' if error <= rtol else f', MORE than {rtol:.0e}'}"

    def gaussian(self, n: int, dim: int, bar: float | None) -> str:
        """A Gaussian matvec beside the peer and the limit."""
        x, y, b = self._data(n, dim)
        f = pb.Genred(GAUSSIAN, gaussian_aliases(dim), axis=1)
        error = self._checked(f(x, y, b), lambda rows: in_torch(rows, y.double(), b.double()), x, 2e-6)
        times = timed(lambda: f(x, y, b), self.device)
        rate = n * n / times[0]
        parts = [f"{rate / 1e9:8.1f} Gpair/s", error]
        if self.peak is not None:
            share = rate / self.peak.pairs(dim)
            parts.append(f"{share:.0%} of the limit{verdict(share, 0.6 if dim == 3 else None, '')}")
        if self.peer is not None:
            call, scale = self.peer.gaussian(x, y, b)
            ratio = timed(call, self.device)[0] * scale / times[0]
            parts.append(f"{ratio:.1f}x {self.peer.name}{verdict(ratio, bar, 'x')}")
        if self.peak is not None and dim == 3:
            scaled = KEOPS_RATE * 2 * self.peak.fma / KEOPS_PEAK
            parts.append(f"{rate / scaled:.1f}x KeOps on an RTX 2080 Ti scaled by flops")
        return row(f"Gaussian D={dim} N={n:.0e}", times, *parts)

    def attention(self, n: int, kind: str, bar: float | None) -> str:
        """Of the scores (x|y) / 8 the logarithm of the sum or the softmax mean, beside torch's fused attention."""
        dim = 64
        x, y, _ = self._data(n, dim, torch.bfloat16)
        x, y, v = 8 * x, 8 * y, points(2, n, dim).to(self.device, torch.bfloat16)
        aliases = [f"x = Vi({dim})", f"y = Vj({dim})"]

        def fused() -> Tensor:
            return torch.nn.functional.scaled_dot_product_attention(x[None, None], y[None, None], v[None, None])

        def exact(rows: Tensor) -> Tensor:
            scores = rows @ y.double().T / 8
            return scores.logsumexp(1, keepdim=True) if kind == "LogSumExp" else scores.softmax(1) @ v.double()

        if kind == "LogSumExp":
            f, args = pb.Genred("(x|y) / IntCst(8)", aliases, kind, axis=1), (x, y)
        else:
            f = pb.Genred("(x|y) / IntCst(8)", [*aliases, f"v = Vj({dim})"], kind, axis=1, formula2="v")
            args = x, y, v
        error = self._checked(f(*args), exact, x, 2e-2)
        base, times = timed(fused, self.device), timed(lambda: f(*args), self.device)
        ratio = times[0] / base[0]
        text = f"{ratio:.2f}x scaled_dot_product_attention{verdict(ratio, bar, 'x', at_most=True)}"
        rate = f"{n * n / times[0] / 1e9:8.1f} Gpair/s"
        return row(f"{kind} bf16 D={dim} N={n:.0e}", times, rate, error, f"{text}; it: {seconds(base[0])}")

    def neighbours(self, n: int, dim: int) -> str:
        """The ten nearest points."""
        x, y, _ = self._data(n, dim)
        f = pb.Genred("SqDist(x, y)", [f"x = Vi({dim})", f"y = Vj({dim})"], "ArgKMin", axis=1, opt_arg=10)
        want = torch.cdist(x[:50].double(), y.double()).topk(10, largest=False).indices
        wrong = float((f(x, y)[:50] != want).double().mean())
        times = timed(lambda: f(x, y), self.device)
        rate = f"{n * n / times[0] / 1e9:8.1f} Gpair/s"
        text = f"wrong {wrong:.1%}{'' if wrong <= 0.02 else ', MORE than 2%'}"
        return row(f"ArgKMin K=10 D={dim} N={n:.0e}", times, rate, text)

    def gradient(self, n: int, wanted: str, bar: float | None) -> str:
        """Forward and backward together, beside forward alone."""
        f = pb.Genred(GAUSSIAN, gaussian_aliases(3), axis=1)
        args = dict(zip("xyb", self._data(n, 3), strict=True))
        forward = timed(lambda: f(*args.values()), self.device)[0]
        inputs = [args[name].requires_grad_() for name in wanted]
        ones = torch.ones(n, 1, device=self.device)
        times = timed(lambda: torch.autograd.grad(f(*args.values()), inputs, ones), self.device)
        ratio = times[0] / forward
        text = f"{ratio:.2f}x forward{verdict(ratio, bar, 'x', at_most=True)}"
        return row(f"forward + gradient {', '.join(wanted)} D=3 N={n:.0e}", times, text)

    def overhead(self) -> str:
        """What the host spends on a call: many calls, the device waited for at the end only."""
        f = pb.Genred(GAUSSIAN, gaussian_aliases(3), axis=1)
        x, y, b = self._data(10, 3)

        def many() -> None:
            for _ in range(100):
                f(x, y, b)

        many()
        readings = []
        for _ in range(20):
            waited(self.device)
            readings.append(clocked(many) / 100)
        waited(self.device)
        return row("call M=N=10", spread(readings), verdict(statistics.median(readings) * 1e6, 30, "us", at_most=True))

    def processes(self) -> str:
        """A new formula in fresh processes: with an empty cache, then with the cache that the first one left."""
        lines = []
        with tempfile.TemporaryDirectory() as cache:
            env = os.environ | {"PULLBACK_CACHE": cache, "TRITON_CACHE_DIR": cache}
            for name, bar in (("first result, no cache", 2.0), ("second process, warm cache", 0.1)):
                command = [sys.executable, __file__, str(self.device)]
                done = subprocess.run(command, env=env, capture_output=True, text=True)
                if done.returncode:
                    raise RuntimeError(done.stderr[-1000:])
                found = json.loads(done.stdout.splitlines()[-1])
                forward, judged = found["forward"], verdict(found["forward"], bar, "s", at_most=True)
                lines.append(row(name, (forward, forward), f"with gradient {seconds(found['both'])}", judged))
        return "\n".join(lines)

    def rows(self, sizes: Sequence[int]) -> Iterator[tuple[str, Call]]:
        """(name, what gives its text)."""
        for dim, bar in ((3, 1.5), (16, None), (64, 5.0), (256, 5.0)):
            for n in sizes:
                yield f"Gaussian D={dim}", partial(self.gaussian, n, dim, bar)
        for n in sizes:
            yield "LogSumExp", partial(self.attention, n, "LogSumExp", 1.5)
            yield "SumSoftMax", partial(self.attention, n, "SumSoftMax", None)
        for dim in (3, 64):
            for n in sizes:
                yield f"ArgKMin D={dim}", partial(self.neighbours, n, dim)
        for n in sizes:
            yield "gradient x", partial(self.gradient, n, "x", 3.5)
            yield "gradient x, y, b", partial(self.gradient, n, "xyb", None)
        yield "call", self.overhead
        for _ in range(2):
            yield "first result, second process", self.processes


def first(device: torch.device) -> dict[str, float]:
    """Seconds from the text of a formula to its value and to its gradient, library and device being ready."""
    x, y, b = (t.to(device) for t in (points(0, 1000, 3), points(1, 1000, 3), weights(1000)))
    x.requires_grad_()
    torch.autograd.grad((x * 2).sum(), x)
    waited(device)
    start = time.perf_counter()
    out = pb.Genred(GAUSSIAN, gaussian_aliases(3), axis=1)(x, y, b)
    waited(device)
    forward = time.perf_counter() - start
    torch.autograd.grad(out.sum(), x)
    waited(device)
    return {"forward": forward, "both": time.perf_counter() - start}


def main(place: str, sizes: Sequence[int], only: str, library: Any | None, with_peer: bool) -> None:
    """Print the table."""
    device = torch.device(place)
    bench = Bench(device, find_peer(device, library) if with_peer else None)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    print(f"pullback {pb.__version__}, torch {torch.__version__}, {name}, float32")
    if bench.peak is None:
        print("the limit of this device is not known")
    else:
        each = ", ".join(f"{k} {v / 1e12:.1f}" for k, v in vars(bench.peak).items())
        print(f"operations in a second, counted [1e12]: {each}; at the highest clock, which a long load may not keep")
    print(f"{'':{WIDTH}}{'min':>9}{'median':>9}")
    for title, text in bench.rows(sizes):
        if only.lower() in title.lower():
            try:
                print(text(), flush=True)
            except Exception as error:  # the other rows are worth having
                print(f"{title}: {type(error).__name__}: {str(error)[:300]}", flush=True)


if __name__ == "__main__":
    print(json.dumps(first(torch.device(sys.argv[1]))))
