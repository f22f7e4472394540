"""Vector functions, compiled for three instruction sets, against mpmath (float64) and torch in float64 (both types)."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import mpmath as mp
import numpy as np
import pytest
import torch

from pullback.kernels.codegen.builder import Builder
from pullback.kernels.codegen.vecmath import FUNCTIONS, ULP

llvm = pytest.importorskip("llvmlite.binding")

INF = math.inf
EDGES = [0.0, -0.0, INF, -INF, math.nan, 1.0, -1.0, 0.5, -0.5, 2.0, -2.0, 3.0, -3.0, 1e30, -1e30, 1e-30, -1e-30]
ELEMENTS = {"float": np.float32, "double": np.float64}
TARGETS = {"host": 64, "haswell": 32, "x86-64": 16}  # cpu: bytes of a vector


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    n = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n)


def _bool(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    return lambda *x: function(*x).to(x[0].dtype)


@dataclass(frozen=True)
class Case:
    """A function: its torch definition, its mpmath definition (None: torch rounds correctly) and where to sample it."""

    torch: Callable[..., torch.Tensor]
    exact: Callable[..., mp.mpf] | None
    float_range: tuple[float, float]
    double_range: tuple[float, float] | None = None
    arity: int = 1
    params: tuple[int, ...] = ()
    near_one: bool = False  # errors relative to max(1, |value|): near a zero only the absolute error is small
    edges: bool = True  # the torch function has the right special values


def _powi(n: int) -> Case:
    return Case(lambda x: x**n, lambda x: x**n, (-30, 30), params=(n,))


REAL = (-100.0, 100.0)
CASES: dict[str, Case] = {
    "exp": Case(torch.exp, mp.exp, (-104, 89), (-746, 710)),
    "exp2": Case(torch.exp2, lambda x: mp.mpf(2) ** x, (-150, 128), (-1075, 1024)),
    "expm1": Case(torch.expm1, mp.expm1, (-104, 89), (-746, 710)),
    "sigmoid": Case(torch.sigmoid, lambda x: 1 / (1 + mp.exp(-x)), (-87, 89), (-700, 700)),
    "softplus": Case(
        lambda x: torch.logaddexp(x, torch.zeros_like(x)), lambda x: mp.log1p(mp.exp(x)), (-87, 100), (-700, 1000)
    ),
    "log": Case(torch.log, mp.log, (1e-42, 1e38), (1e-320, 1e308)),
    "log2": Case(torch.log2, lambda x: mp.log(x) / mp.log(2), (1e-42, 1e38), (1e-320, 1e308)),
    "log1p": Case(torch.log1p, mp.log1p, (-0.9999, 1e38), (-0.9999, 1e300)),
    "xlogx": Case(lambda x: torch.xlogy(x, x), lambda x: x * mp.log(x), (1e-30, 1e30)),
    "sin": Case(torch.sin, mp.sin, (-1e4, 1e4)),
    "cos": Case(torch.cos, mp.cos, (-1e4, 1e4)),
    "tan": Case(torch.tan, mp.tan, (-1e4, 1e4)),
    "sinc": Case(lambda x: torch.where(x == 0, 1, torch.sin(x) / x), lambda x: mp.sin(x) / x, (-1e4, 1e4)),
    "asin": Case(torch.asin, mp.asin, (-1, 1)),
    "acos": Case(torch.acos, mp.acos, (-1, 1)),
    "atan": Case(torch.atan, mp.atan, (-1e30, 1e30)),
    "atan2": Case(torch.atan2, mp.atan2, REAL, arity=2),
    "sinh": Case(torch.sinh, mp.sinh, (-90, 90), (-711, 711)),
    "cosh": Case(torch.cosh, mp.cosh, (-90, 90), (-711, 711)),
    "tanh": Case(torch.tanh, mp.tanh, REAL),
    "asinh": Case(torch.asinh, mp.asinh, (-1e38, 1e38), (-1e300, 1e300)),
    "erf": Case(torch.erf, mp.erf, (-7, 7)),
    "erfc": Case(torch.erfc, mp.erfc, (-10, 9), (-10, 26)),
    "lgamma": Case(torch.lgamma, lambda x: mp.loggamma(x).real, (-30, 1e30), near_one=True),
    "digamma": Case(torch.digamma, mp.digamma, (-30, 1e30), near_one=True, edges=False),
    "trigamma": Case(lambda x: torch.polygamma(1, x), lambda x: mp.psi(1, x), (-30, 1e30), near_one=True, edges=False),
    "pow": Case(torch.pow, lambda x, y: x**y, (1e-3, 1e3), arity=2),
    "powi": _powi(3),
    "sqrt": Case(torch.sqrt, mp.sqrt, (0, 1e30)),
    "rsqrt": Case(lambda x: torch.where(x == 0, 0, 1 / x.sqrt()), lambda x: 1 / mp.sqrt(x), (1e-30, 1e30)),
    "inv": Case(torch.reciprocal, None, REAL),
    "square": Case(torch.square, None, REAL),
    "fadd": Case(torch.add, None, REAL, arity=2),
    "fsub": Case(torch.sub, None, REAL, arity=2),
    "fmul": Case(torch.mul, None, REAL, arity=2),
    "fdiv": Case(torch.div, None, REAL, arity=2),
    "fneg": Case(torch.neg, None, REAL),
    "abs": Case(torch.abs, None, REAL),
    "floor": Case(torch.floor, None, REAL),
    "ceil": Case(torch.ceil, None, REAL),
    "trunc": Case(torch.trunc, None, REAL),
    "round": Case(torch.round, None, REAL),
    "mod": Case(lambda x, n, d: x - n * torch.floor((x - d) / n), None, REAL, arity=3),
    "sign": Case(torch.sign, None, REAL),
    "step": Case(lambda x: torch.where(x < 0, 0.0, 1.0).to(x.dtype), None, REAL),
    "relu": Case(torch.relu, None, REAL),
    "minimum": Case(torch.minimum, None, REAL, arity=2),
    "maximum": Case(torch.maximum, None, REAL, arity=2),
    "where": Case(lambda c, x, y: torch.where(c != 0, x, y), None, REAL, arity=3),
    "eq": Case(_bool(torch.eq), None, REAL, arity=2),
    "ne": Case(_bool(torch.ne), None, REAL, arity=2),
    "lt": Case(_bool(torch.lt), None, REAL, arity=2),
    "le": Case(_bool(torch.le), None, REAL, arity=2),
    "logical_and": Case(_bool(torch.logical_and), None, REAL, arity=2),
    "logical_or": Case(_bool(torch.logical_or), None, REAL, arity=2),
    "logical_not": Case(_bool(torch.logical_not), None, REAL),
}
# the same functions with other parameters
MORE = {f"powi_{n}": _powi(n) for n in (-7, -1, 0, 1, 2, 4, 5, 12)} | {
    f"round_{d}": Case(lambda x, d=d: torch.round(x, decimals=d), None, REAL, params=(d,)) for d in (-1, 2)
}
ALL = CASES | MORE


def _function(name: str) -> str:
    return name if name in FUNCTIONS else name.rsplit("_", 1)[0]


@dataclass(frozen=True)
class Library:
    engine: object  # keeps the code alive
    functions: dict[str, Callable[..., np.ndarray]]


@cache
def library(target: str, elem: str) -> Library:
    """Every function as a loop over arrays, one LLVM module a target and type."""
    if "x86" not in llvm.get_process_triple():
        pytest.skip("the host is not x86")
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    host = llvm.get_host_cpu_features()
    if target != "x86-64" and not (host.get("avx2") and host.get("fma")):
        pytest.skip("the host has no AVX2")
    avx512 = target == "host" and bool(host.get("avx512f") and host.get("avx512dq"))
    width = TARGETS[target] if avx512 or target != "host" else 32
    lanes = width // ELEMENTS[elem]().itemsize
    declarations: set[str] = set()
    texts = []
    for name, case in ALL.items():
        b = Builder(elem, lanes, fma=target != "x86-64", avx512=avx512)
        result = FUNCTIONS[_function(name)](b, *(b.load(f"%p{k}") for k in range(case.arity)), *case.params)
        b.store(result, "%p")
        declarations |= b.declarations
        pointers = "".join(f"  %p{k} = getelementptr {elem}, ptr %a{k}, i64 %i\n" for k in range(case.arity))
        texts.append(
            f"define void @v_{name}({', '.join(f'ptr %a{k}' for k in range(case.arity))}, ptr %out, i64 %n) {{\n"
            "entry:\n  br label %loop\nloop:\n  %i = phi i64 [0, %entry], [%next, %loop]\n"
            f"{pointers}  %p = getelementptr {elem}, ptr %out, i64 %i\n" + "\n".join(b.lines) + "\n"
            f"  %next = add i64 %i, {lanes}\n  %more = icmp slt i64 %next, %n\n"
            "  br i1 %more, label %loop, label %end\nend:\n  ret void\n}\n"
        )
    module = llvm.parse_assembly("\n".join([*sorted(declarations), *texts]))
    module.verify()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name() if target == "host" else target,
        features=host.flatten() + ",-prefer-256-bit" if target == "host" else "",
        opt=2,
    )
    engine = llvm.create_mcjit_compiler(module, machine)
    engine.finalize_object()

    def wrap(name: str, arity: int) -> Callable[..., np.ndarray]:
        code = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * (arity + 1), ctypes.c_int64)(
            engine.get_function_address(f"v_{name}")
        )

        def call(*args: np.ndarray) -> np.ndarray:
            n = args[0].size
            arrays = [np.concatenate([a, np.ones(-n % lanes)]).astype(ELEMENTS[elem]) for a in args]
            out = np.empty_like(arrays[0])
            code(*(a.ctypes.data for a in arrays), out.ctypes.data, out.size)
            return out[:n]

        return call

    return Library(engine, {name: wrap(name, case.arity) for name, case in ALL.items()})


def _points(case: Case, elem: str, n: int) -> list[np.ndarray]:
    """Uniform, log-spaced and normal points in the range, rounded to the type; independent for each operand."""
    low, high = case.double_range if elem == "double" and case.double_range else case.float_range
    rng = np.random.default_rng(n)
    result = []
    for _ in range(case.arity):
        size = 10 ** rng.uniform(-9, math.log10(max(abs(low), abs(high))), 2 * n)
        x = np.concatenate(
            [rng.uniform(low, high, n), size, -size, rng.normal(size=2 * n), 1 + 0.1 * rng.normal(size=n)]
        )
        x = x.astype(ELEMENTS[elem]).astype(float)
        x = x[(x >= low) & (x <= high)]
        result.append(rng.permutation(x))
    shortest = min(x.size for x in result)
    return [x[:shortest] for x in result]


def _torch(case: Case, points: list[np.ndarray], dtype: torch.dtype = torch.float64) -> np.ndarray:
    return case.torch(*(torch.from_numpy(x).to(dtype) for x in points)).double().numpy()


def _definition_type(case: Case, elem: str) -> torch.dtype:
    """Float64, but for exactly rounded functions, which round as their type does."""
    return torch.float32 if case.exact is None and elem == "float" else torch.float64


@cache
def _exact(name: str) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
    """Points, values and what rounding the values to float64 lost."""
    case = ALL[name]
    assert case.exact is not None
    points = _points(case, "double", 40)
    with mp.workdps(50):
        values = [case.exact(*map(mp.mpf, map(float, p))) for p in zip(*points, strict=True)]
        rounded = np.array([float(v) for v in values])
        rest = np.array(
            [float(v - mp.mpf(r)) if math.isfinite(r) else 0.0 for v, r in zip(values, rounded.tolist(), strict=True)]
        )
    return points, rounded, rest


def _errors(case: Case, got: np.ndarray, value: np.ndarray, rest: np.ndarray | float, elem: str) -> np.ndarray:
    """Errors in ulp of the exact value + rest; 0 for the right special value, inf for a wrong one."""
    info = np.finfo(ELEMENTS[elem])
    with np.errstate(all="ignore"):
        expected = value.astype(ELEMENTS[elem])
        size = np.maximum(np.abs(value), 1.0 if case.near_one else float(info.smallest_normal))
        ulp = np.exp2(np.floor(np.log2(size)) - info.nmant)
        error = np.abs((got.astype(float) - value) - rest) / ulp
    special = ~np.isfinite(expected)
    right = (got == expected) | (np.isnan(got) & np.isnan(expected))
    return np.where(right & special, 0, np.where(np.isfinite(error), error, INF))


def _bound(name: str, elem: str) -> float:
    if _function(name) == "powi":
        n = abs(ALL[name].params[0])
        return 1.5 if n > 3 else float(n)
    return ULP.get(_function(name), (0.51, 0.51))[elem == "double"]


def test_every_function_has_a_reference() -> None:
    assert set(FUNCTIONS) == set(CASES)
    assert set(ULP) <= set(FUNCTIONS)


every = pytest.mark.parametrize("name", ALL)
types = pytest.mark.parametrize("elem", ELEMENTS)
targets = pytest.mark.parametrize("target", TARGETS)


@targets
@types
@every
def test_accuracy(name: str, elem: str, target: str) -> None:
    call, case = library(target, elem).functions[name], ALL[name]
    rest: np.ndarray | float = 0.0
    if elem == "double" and case.exact is not None:
        points, value, rest = _exact(name)
    else:
        points = _points(case, elem, 2500)
        value = _torch(case, points, _definition_type(case, elem))
    error = _errors(case, call(*points), value, rest, elem)
    worst = int(error.argmax())
    assert error[worst] <= _bound(name, elem), f"{name}{[p[worst] for p in points]}"


@targets
@pytest.mark.parametrize("name", [n for n, case in ALL.items() if case.exact and n not in ("digamma", "trigamma")])
def test_float64_on_many_points(name: str, target: str) -> None:
    """Torch's own error in float64 is added to the bound.

    Its digamma is wrong by 300 ulp near -1, its polygamma by 1e-9, and its sinh overflows early.
    """
    case = ALL[name]
    points = _points(case, "double", 2500)
    value = _torch(case, points)
    error = _errors(case, library(target, "double").functions[name](*points), value, 0.0, "double")
    error = np.where(np.isfinite(value), error, 0)
    worst = int(error.argmax())
    assert error[worst] <= _bound(name, "double") + 8, f"{name}{[p[worst] for p in points]}"


@targets
@types
@every
def test_special_values(name: str, elem: str, target: str) -> None:
    """Infinities, nan, zeros with their signs, and arguments outside the domain are those of torch."""
    case = ALL[name]
    if not case.edges:
        pytest.skip("torch differs at poles: see test_poles_of_the_gamma_family")
    sines = name in ("sin", "cos", "tan", "sinc")  # |x| = 1e30 is out of their range
    edges = np.array([x for x in EDGES if not (sines and abs(x) == 1e30)]).astype(ELEMENTS[elem]).astype(float)
    points = [grid.ravel() for grid in np.meshgrid(*[edges] * case.arity)]
    got = library(target, elem).functions[name](*points)
    value = _torch(case, points, _definition_type(case, elem))
    error = _errors(case, got, value, 0.0, elem)
    worst = int(error.argmax())
    assert error[worst] <= _bound(name, elem) + 1, f"{name}{[p[worst] for p in points]}"
    if name not in ("minimum", "maximum"):  # a tie of 0 and -0 goes to the first operand
        zero = (got == 0) & (value == 0)
        assert (np.signbit(got) == np.signbit(value))[zero].all()


@targets
@types
def test_poles_of_the_gamma_family(elem: str, target: str) -> None:
    functions = library(target, elem).functions
    x = np.array([0.0, -0.0, -1.0, -7.0, INF, -INF, math.nan, 1e-30])
    np.testing.assert_equal(functions["digamma"](x)[:7], [-INF, INF, math.nan, math.nan, INF, math.nan, math.nan])
    np.testing.assert_equal(functions["trigamma"](x)[:7], [INF, INF, INF, INF, 0, math.nan, math.nan])
    np.testing.assert_allclose(functions["digamma"](x)[7], -1e30, rtol=1e-6)


@targets
@types
def test_exp_underflows_gradually_and_overflows_to_inf(elem: str, target: str) -> None:
    low, high = (-110, 90) if elem == "float" else (-760, 715)
    y = library(target, elem).functions["exp"](np.linspace(low, high, 200_001))
    assert y[0] == 0 and y[-1] == INF
    tiny = np.finfo(ELEMENTS[elem]).smallest_normal
    assert ((y > 0) & (y < tiny)).any()
    below = y[y < tiny]
    assert (np.diff(below) >= 0).all()


@targets
@types
@pytest.mark.parametrize("name", ["sin", "cos"])
def test_large_arguments_of_sines(name: str, elem: str, target: str) -> None:
    limit, tolerance = (1e8, 1e-6) if elem == "float" else (1e15, 1e-14)
    x = np.random.default_rng(0).uniform(-limit, limit, 20_000).astype(ELEMENTS[elem]).astype(float)
    function = library(target, elem).functions[name]
    assert np.abs(function(x) - getattr(np, name)(x)).max() < tolerance
    assert (np.abs(function(1e10 * x)) <= 1).all()  # out of range, but bounded
