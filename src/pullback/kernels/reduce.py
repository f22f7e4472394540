"""Reducer: a reduction as users know it, prepared once and called cheaply: checks, and composition of programs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core import interop, maps
from pullback.core.errors import ArgumentError, DeviceError, DtypeError, ShapeError
from pullback.kernels.codegen import eager
from pullback.kernels.ir.expr import CATEGORY, Expr, I, J, builders, variable, walk
from pullback.kernels.ir.reductions import OVER_J, Program
from pullback.kernels.ir.rules import shortened
from pullback.kernels.plan.ranges import Ranges, as_ranges
from pullback.kernels.task import BACKENDS, event_rank, sizes, task, tolerance_of, within

_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_SELECTIONS = {
    # name -> (program, wants values, wants indices, keeps K)
    "Min": ("ArgKMin", True, False, False),
    "Max": ("ArgKMax", True, False, False),
    "ArgMin": ("ArgKMin", False, True, False),
    "ArgMax": ("ArgKMax", False, True, False),
    "Min_ArgMin": ("ArgKMin", True, True, False),
    "Max_ArgMax": ("ArgKMax", True, True, False),
    "KMin": ("ArgKMin", True, False, True),
    "KMax": ("ArgKMax", True, False, True),
    "ArgKMin": ("ArgKMin", False, True, True),
    "ArgKMax": ("ArgKMax", False, True, True),
    "KMin_ArgKMin": ("ArgKMin", True, True, True),
    "KMax_ArgKMax": ("ArgKMax", True, True, True),
}
TOLERANT = ("Sum", "Mean", "Var", "LogSumExp", "SumSoftMax")  # what a tolerance means something for
KINDS = ("Sum", "LogSumExp", "SumSoftMax", "Prod", "Mean", "Var", "Any", "All", "Count", *_SELECTIONS)
ACCUMULATORS = ("auto", "float16", "float32", "float64")
SCHEMES = ("auto", "block_sum", "direct_sum", "kahan_scheme")

Call = Callable[[Sequence[Tensor], "Ranges | None", str], Any]


class Reducer:
    """y_i = reduction over j of F_ij (axis 1), or y_j = reduction over i of F_ij (axis 0).

    Args:
        kind: one of KINDS.
        expr: the formula F.
        signature: (dimension, category) of each argument, by position.
        axis: 1 reduces over j and keeps the rows i; 0 reduces over i and keeps j.
        weight: second formula of LogSumExp and SumSoftMax.
        k: how many the K-reductions keep.
        correction: Var divides by (count - correction).
        accumulator: dtype of sums, "auto", "float32" or "float64".
        scheme: "auto", "block_sum", "direct_sum" or "kahan_scheme".
        names: names of the arguments, for errors.
        formula: the formula as the user wrote it, for errors.
    """

    def __init__(
        self,
        kind: str,
        expr: Expr,
        signature: Sequence[tuple[int, int]],
        axis: int,
        *,
        weight: Expr | None = None,
        k: int = 1,
        correction: float = 1,
        accumulator: str = "auto",
        scheme: str = "block_sum",
        names: Sequence[str] | None = None,
        formula: str | None = None,
    ) -> None:
        if kind not in KINDS:
            raise ArgumentError(f"unknown reduction {kind!r}; known are {', '.join(KINDS)}")
        if axis not in (0, 1):
            raise ArgumentError(f"axis must be 1 (reduce over j) or 0 (reduce over i); got {axis!r}")
        if accumulator not in ACCUMULATORS:
            raise ArgumentError(f"dtype_acc must be one of {', '.join(ACCUMULATORS)}; got {accumulator!r}")
        if scheme not in SCHEMES:
            raise ArgumentError(f"sum_scheme must be one of {', '.join(SCHEMES)}; got {scheme!r}")
        self.kind, self.expr, self.weight, self.axis = kind, expr, weight, axis
        self.signature = tuple(signature)
        self.names = tuple(names) if names else tuple(f"argument {p}" for p in range(len(self.signature)))
        self.formula = formula or str(expr)
        self.k, self.correction = k, correction
        self._options = (
            "auto" if accumulator == "float16" else accumulator,
            "block_sum" if scheme == "auto" else scheme,
        )
        self._keeps = I if axis == OVER_J else J
        self._known: dict[Any, tuple[tuple[int, ...], int, int]] = {}
        self.programs: list[Program] = []  # what the engine runs
        self._check_formula()
        self._call: Call = self._prepare()

    def __repr__(self) -> str:
        return f"{self.kind} over {'ij'[self.axis]} of {self.formula}"

    def __reduce__(self) -> Any:
        options = {
            "weight": self.weight,
            "k": self.k,
            "correction": self.correction,
            "accumulator": self._options[0],
            "scheme": self._options[1],
            "names": self.names,
            "formula": self.formula,
        }
        return _rebuild, (self.kind, self.expr, self.signature, self.axis, options)

    # Calling ------------------------------------------------------------------------------------------------------

    def __call__(
        self,
        args: Sequence[Any],
        *,
        ranges: Any = None,
        backend: str = "auto",
        out: Any = None,
        tolerance: float | None = None,
    ) -> Any:
        """Reduce. Tensors in, tensors out; arrays in, arrays out.

        Args:
            args: one tensor or array for each argument: (..., M, dim) of category i, (..., N, dim) of j, (..., dim) of
                parameters. Leading axes are batch and broadcast.
            ranges: block-sparse pattern: six integer tensors as in KeOps, or `Ranges`.
            backend: "auto", "llvm" (CPU), "triton" (GPU) or "eager"; KeOps' "CPU" means "auto". See docs/devices.md.
            out: tensor that receives the result.
            tolerance: relative l2 error that is allowed; None: the exact sum.

        Raises: ShapeError, DtypeError, DeviceError, ArgumentError before anything runs.
        """
        arrays = False
        for a in args:
            if type(a) is not Tensor and not isinstance(a, Tensor):
                args, arrays = self._tensors(args)
                break
        if torch.compiler.is_compiling():
            key, found = None, None
        else:
            key = tuple([(a.shape, a.dtype) for a in args])
            found = self._known.get(key)
        if found is None:
            args = self._promoted(args)
            found = self._check(args)
            if key is not None and key == tuple([(a.shape, a.dtype) for a in args]):
                if len(self._known) > 64:
                    self._known.clear()
                self._known[key] = found
        self.check_devices(args)
        if backend != "auto":
            backend = self._backend(backend, args)
        if tolerance is not None:
            self.check_tolerance()
            backend = within(tolerance, backend)
        if ranges is not None:
            if tolerance_of(backend) is not None:
                raise ArgumentError("ranges: a block-sparse pattern is summed exactly; leave the tolerance out")
            ranges = as_ranges(ranges, found[1], found[2])
        y = self._call(args, ranges, backend)
        if out is not None:
            y = self._into(out, y)
        return _to_numpy(y) if arrays else y

    def _tensors(self, args: Sequence[Any]) -> tuple[list[Tensor], bool]:
        arrays = not any(isinstance(a, Tensor) for a in args)
        found = []
        for a in args:
            if isinstance(a, Tensor):
                found.append(a)
            elif isinstance(a, np.ndarray) and arrays:
                found.append(interop.share(a, self.kind) if a.dtype.kind not in "iub" else torch.from_numpy(a.copy()))
            else:
                try:
                    found.append(torch.as_tensor(a))
                except (TypeError, ValueError, RuntimeError):
                    self._raise(DtypeError, f"arguments must be tensors or arrays of numbers; got {type(a).__name__}")
        return found, arrays

    def checked(self, args: Sequence[Any]) -> list[Tensor]:
        """The arguments as the reduction takes them. Raises what a call would."""
        tensors = self._promoted(self._tensors(args)[0])
        self._check(tensors)
        self.check_devices(tensors)
        return tensors

    def check_devices(self, args: Sequence[Tensor]) -> None:
        """Raise DeviceError unless all arguments lie on one device."""
        for a in args[1:]:
            if a.device != args[0].device:
                self._raise(DeviceError, f"{self._where(args, lambda t: str(t.device))}; move them to one device")

    def check_tolerance(self) -> None:
        """Raise ArgumentError for a reduction that adds nothing up."""
        if self.kind not in TOLERANT:
            raise ArgumentError(f"tolerance is for {', '.join(TOLERANT)}; {self.kind} is exact: leave it out")

    def _backend(self, backend: str, args: Sequence[Tensor]) -> str:
        name = {"CPU": "auto", "torch": "eager"}.get(backend, backend)
        if name.startswith("GPU"):
            if not args or args[0].device.type == "cpu":
                raise ArgumentError(f"backend={backend!r} needs tensors on a GPU; these lie on the CPU; use .cuda()")
            return "auto"
        if tolerance_of(name) is not None:
            return name
        if name not in BACKENDS:
            raise ArgumentError(f"backend must be one of {', '.join(BACKENDS)}; got {backend!r}")
        return name

    def _into(self, out: Any, y: Any) -> Any:
        if isinstance(y, tuple):
            raise ArgumentError(f"out= is for reductions with one result; {self.kind} has {len(y)}")
        target = torch.from_numpy(out) if isinstance(out, np.ndarray) else out
        if not isinstance(target, Tensor):
            raise DtypeError(f"out must be a tensor or an array; got {type(out).__name__}")
        if target.shape != y.shape or target.dtype != y.dtype or target.device != y.device:
            raise ShapeError(
                f"out must have shape {tuple(y.shape)}, {y.dtype} on {y.device}; got {tuple(target.shape)}, "
                f"{target.dtype} on {target.device}"
            )
        return target.copy_(y)

    # Checks -------------------------------------------------------------------------------------------------------

    def _raise(self, kind: type[Exception], text: str) -> None:
        raise kind(f"{text}; in the formula {self.formula}") from None

    def _where(self, args: Sequence[Tensor], show: Callable[[Tensor], str]) -> str:
        return "; ".join(f"{name}: {show(a)}" for name, a in zip(self.names, args, strict=True))

    def _check_formula(self) -> None:
        if not self.signature:
            self._raise(ArgumentError, "a reduction needs at least one variable, which says how many rows there are")
        for node in walk(self.expr, *([self.weight] if self.weight is not None else [])):
            if node.op == "Var":
                position, category = node.params
                if position >= len(self.signature) or self.signature[position] != (node.dim, category):
                    raise ArgumentError(
                        f"the formula {self.formula} uses argument {position} as {CATEGORY[category]}({node.dim}), "
                        f"which is not among its {len(self.signature)} arguments"
                    )
        if self.kind in ("LogSumExp", "SumSoftMax") and self.expr.dim != 1:
            raise ShapeError(
                f"{self.kind} expects a scalar formula; got dimension {self.expr.dim} of {self.formula}; for several "
                f"components use a weight (formula2) or one reduction for each"
            )
        if self.kind == "SumSoftMax" and self.weight is None:
            raise ArgumentError("SumSoftMax needs a weight: formula2=... or sumsoftmaxweight(weight)")
        if self.kind in _SELECTIONS and (not isinstance(self.k, int) or self.k < 1):
            raise ArgumentError(f"K must be a positive integer; got {self.k!r}")

    def _promoted(self, args: Sequence[Tensor]) -> list[Tensor]:
        """Integers and booleans take the floating point dtype of the others, or torch's default."""
        floats = {a.dtype for a in args if a.is_floating_point()}
        dtype = next(iter(floats)) if len(floats) == 1 else torch.get_default_dtype()
        return [a if a.is_floating_point() or a.is_complex() else a.to(dtype) for a in args]

    def _check(self, args: Sequence[Tensor]) -> tuple[tuple[int, ...], int, int]:
        """(batch, M, N), or an error that names the argument."""
        if len(args) != len(self.signature):
            self._raise(
                ArgumentError, f"expected {len(self.signature)} arguments ({', '.join(self.names)}); got {len(args)}"
            )
        shown = lambda t: str(tuple(t.shape))  # noqa: E731
        first: dict[int, int] = {}
        for p, (a, (dim, category)) in enumerate(zip(args, self.signature, strict=True)):
            expected = "(..., dim)" if event_rank(category) == 1 else f"(..., {'MN'[category]}, dim)"
            if a.dtype not in _FLOATS:
                self._raise(DtypeError, f"{self.names[p]} must be real and floating point; got {a.dtype}")
            if a.ndim < event_rank(category) or a.shape[-1] != dim:
                self._raise(
                    ShapeError,
                    f"{self.names[p]} is {CATEGORY[category]}({dim}) and expects shape {expected} with dim = {dim}; "
                    f"got {tuple(a.shape)}",
                )
            if category in (I, J):
                q = first.setdefault(category, p)
                if a.shape[-2] != args[q].shape[-2]:
                    self._raise(
                        ShapeError,
                        f"{self.names[q]} and {self.names[p]} are both {CATEGORY[category]}, but have "
                        f"{args[q].shape[-2]} and {a.shape[-2]} rows: shapes {tuple(args[q].shape)} and "
                        f"{tuple(a.shape)}",
                    )
        if len({a.dtype for a in args}) > 1:
            self._raise(DtypeError, f"arguments differ in dtype: {self._where(args, lambda t: str(t.dtype))}")
        for node in walk(self.expr):
            if node.op == "Index" and node.params[0] not in first:
                name = CATEGORY[node.params[0]]
                self._raise(ArgumentError, f"the index {'ij'[node.params[0]]} needs a variable {name} that counts rows")
        try:
            return sizes(self.signature, args)
        except RuntimeError:
            self._raise(ShapeError, f"batch axes do not broadcast: {self._where(args, shown)}")
            raise

    # Composition --------------------------------------------------------------------------------------------------

    def _program(self, kind: str, *exprs: Expr, signature: Sequence[tuple[int, int]] | None = None) -> Program:
        signature = self.signature if signature is None else tuple(signature)
        return Program(
            kind,
            tuple(map(shortened, exprs)),
            (self.axis,),
            signature,
            self.k if kind.startswith("Arg") else 1,
            *self._options,
        )

    def _runner(self, program: Program) -> Call:
        plain = task(program)
        self.programs.append(program)

        def run(args: Sequence[Tensor], ranges: Ranges | None, backend: str) -> Tensor:
            if ranges is None and backend == "auto":
                return maps.call(plain, args)
            return maps.call(task(program, ranges, backend), args)

        return run

    def _prepare(self) -> Call:
        f, g, kind = self.expr, self.weight, self.kind
        if kind in ("Sum", "Prod"):
            return self._runner(self._program(kind, f))
        if kind == "LogSumExp":
            return self._runner(self._program(kind, f) if g is None else self._program(kind, f, g))
        if kind == "SumSoftMax":
            assert g is not None
            both = self._runner(self._program("SoftMax", f, g))
            return lambda args, ranges, backend: both(args, ranges, backend)[..., 1:]
        if kind in ("Any", "All", "Count"):
            test = "Equal" if kind == "All" else "NotEqual"
            total = self._runner(self._program("Sum", builders[test](f, 0.0)))
            finish = {
                "Any": lambda s: s > 0,
                "All": lambda s: s == 0,
                "Count": lambda s: s.round().to(torch.int64),
            }[kind]
            return lambda args, ranges, backend: finish(total(args, ranges, backend))
        if kind in ("Mean", "Var"):
            return self._moments()
        return self._selection(*_SELECTIONS[kind])

    def _moments(self) -> Call:
        """Mean, and the variance around it in a second pass: the one-pass formula cancels."""
        f = self.expr
        total = self._runner(self._program("Sum", f))
        position = len(self.signature)
        mean = variable(position, f.dim, self._keeps)
        spread = self._runner(
            self._program("Sum", builders["Square"](f - mean), signature=(*self.signature, (f.dim, self._keeps)))
        )
        one = self._runner(self._program("Sum", builders["Add"](0.0, 1.0)))

        def run(args: Sequence[Tensor], ranges: Ranges | None, backend: str) -> Tensor:
            _, m, n = sizes(self.signature, args)
            count: Any = (n if self.axis == OVER_J else m) if ranges is None else one(args, ranges, backend)
            average = total(args, ranges, backend) / count
            if self.kind == "Mean":
                return average
            squares = spread([*args, average], ranges, backend)
            rest = count - self.correction
            if ranges is None:
                return squares / (rest if rest > 0 else math.nan)  # as torch: too few for a variance
            return squares / torch.where(rest > 0, rest, math.nan)

        return run

    def _selection(self, kind: str, values: bool, indices: bool, many: bool) -> Call:
        """Indices from the engine; values from the formula at the chosen pairs, so they have every derivative."""
        if not many:
            self.k = 1
        program = self._program(kind, self.expr)
        choose = self._runner(program)
        dim, k = self.expr.dim, self.k
        worst = -math.inf if kind == "ArgKMax" else math.inf

        def shaped(t: Tensor) -> Tensor:
            if not many:
                return t.squeeze(-2)
            return t.squeeze(-1) if dim == 1 else t

        def run(args: Sequence[Tensor], ranges: Ranges | None, backend: str) -> Any:
            with torch.no_grad():
                chosen = choose([a.detach() for a in args], ranges, backend).unflatten(-1, (k, dim))
            found = []
            if values:
                _, m, n = sizes(self.signature, args)
                if (n, m)[self._keeps] == 0:  # nothing to choose from
                    v = args[0].new_empty(chosen.shape)
                else:
                    v = eager.selected(self.expr, args, self.signature, self._keeps, chosen)
                found.append(shaped(torch.where(chosen < 0, worst, v)))
            if indices:
                found.append(shaped(chosen))
            return found[0] if len(found) == 1 else tuple(found)

        return run


def _rebuild(kind: str, expr: Expr, signature: Any, axis: int, options: dict[str, Any]) -> Reducer:
    return Reducer(kind, expr, signature, axis, **options)


def _to_numpy(y: Any) -> Any:
    if isinstance(y, tuple):
        return tuple(map(_to_numpy, y))
    return y.detach().cpu().numpy()
