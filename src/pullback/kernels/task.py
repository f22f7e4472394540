"""Task: a program with its pattern and back end, as a differentiable map of tensors.

The derivative of a program is a program, so pullback and pushforward are again calls of tasks.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Sequence
from functools import lru_cache
from types import TracebackType
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from pullback.core import autograd, maps
from pullback.core.autograd import constant_in_graphs
from pullback.core.errors import ArgumentError, DeviceError, NotDifferentiableError
from pullback.kernels.codegen import eager
from pullback.kernels.fast.run import sums
from pullback.kernels.ir import reductions
from pullback.kernels.ir.expr import I, J
from pullback.kernels.ir.reductions import KEPT, OVER_BOTH, REDUCTIONS, Program
from pullback.kernels.lazy_expr import shelf, shelve
from pullback.kernels.plan.ranges import Ranges
from pullback.kernels.runtime import gpu, launch

BACKENDS = ("auto", "eager", "llvm", "triton")
MISSING = "Triton is not installed"  # what `gpu.why_not` says where it could be
_WITHIN = "within "  # "within 1e-06": the sum within a relative error, see `kernels/fast`


class BackendWarning(UserWarning):
    """A reduction on a device runs tile by tile in torch, for a reason that is told once in a process."""


def within(tolerance: float | None, backend: str | None = None) -> str:
    """The back end that sums within a relative l2 error of `tolerance`; `backend` itself if that is None.

    Raises: ArgumentError unless 0 < tolerance < 1 and the back end is left to the engine.
    """
    if tolerance is None:
        return backend or "auto"
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 < tolerance < 1:
        raise ArgumentError(f"tolerance must be a number between 0 and 1, such as 1e-6, or None; got {tolerance!r}")
    if backend not in (None, "auto", "CPU") and not backend.startswith(_WITHIN):
        raise ArgumentError(f"backend={backend!r} sums exactly; leave it out, or leave tolerance={tolerance!r} out")
    return f"{_WITHIN}{float(tolerance)!r}"


def tolerance_of(backend: str) -> float | None:
    """The tolerance that a back end keeps; None if it sums exactly."""
    return float(backend.removeprefix(_WITHIN)) if backend.startswith(_WITHIN) else None


def event_rank(category: int) -> int:
    """Trailing axes of an argument that are not batch: (rows, dim) or (dim,)."""
    return 2 if category in (I, J) else 1


def sizes(signature: Sequence[tuple[int, int]], tensors: Sequence[Tensor]) -> tuple[tuple[int, ...], int, int]:
    """(batch shape, number of rows, number of columns) of checked arguments."""
    m = n = 1
    batches = []
    for t, (_, category) in zip(tensors, signature, strict=True):
        if category == I:
            m = t.shape[-2]
        elif category == J:
            n = t.shape[-2]
        if t.ndim > event_rank(category):
            batches.append(t.shape[: t.ndim - event_rank(category)])
    if not batches:
        return (), m, n
    return (tuple(batches[0]) if len(batches) == 1 else tuple(torch.broadcast_shapes(*batches))), m, n


class Task(maps.Map):
    """y = program(tensors) over the pairs of a pattern, on a back end; a `core.maps.Map`.

    Args:
        program: what is reduced.
        ranges: block-sparse pattern; None: all pairs.
        backend: "eager", "llvm" (CPU), "triton" (CUDA and ROCm), that of `within`, or "auto": compiled where the device
            has such a back end and it takes the program, else eager. The work is done where the tensors lie.
    """

    def __init__(self, program: Program, ranges: Ranges | None, backend: str) -> None:
        self.program, self.ranges, self.backend = program, ranges, backend
        self.tolerance = tolerance_of(backend)
        self.key = f"kernel:{next(_numbers)}:{str(program)[:200]}"
        self.events = tuple(event_rank(category) for _, category in program.signature)
        self.integer = REDUCTIONS[program.kind].integer
        self.rows = tuple(KEPT[a] for a in program.axes)
        self._compiled: dict[torch.dtype, bool] = {}
        self._reasons: dict[tuple[torch.device, torch.dtype], str] = {}  # why Triton does not run this; "": it does
        maps.register(self)

    def __repr__(self) -> str:
        return f"Task({self.program}, backend={self.backend!r})"

    def event(self) -> tuple[int, ...]:
        """How many trailing axes of each tensor are not batch."""
        return self.events

    def uses_llvm(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether the compiled back end runs this; raises if it was asked for and cannot."""
        if self.backend in ("eager", "triton"):
            return False
        if device.type != "cpu":
            if self.backend == "llvm":
                raise ArgumentError(f"backend='llvm' runs on the CPU; the tensors lie on {device}; use backend='auto'")
            return False
        found = self._compiled.get(dtype)
        if found is None:
            found = self._compiled[dtype] = launch.supports(self.program, dtype)
        if not found and self.backend == "llvm":
            raise ArgumentError(f"backend='llvm' cannot compile {self.program} for {dtype}; use backend='auto'")
        return found

    def uses_triton(self, device: torch.device, dtype: torch.dtype) -> bool:
        """Whether Triton runs this; raises if it was asked for and cannot, says once if "auto" must do without it."""
        asked = self.backend == "triton"
        if asked and device.type == "cpu":
            raise ArgumentError(f"backend='triton' runs on a GPU; the tensors lie on {device}; use backend='auto'")
        if device.type == "cpu" or self.backend in ("eager", "llvm"):
            return False
        reason = self._reasons.get((device, dtype))
        if reason is None:
            there = device.type == "cuda"  # also the name of AMD's devices
            reason = gpu.why_not(self.program, dtype) if there else f"Triton does not run on {device.type}"
            self._reasons[device, dtype] = reason
        if reason and asked:
            raise ArgumentError(f"backend='triton' cannot run {self.program}: {reason}; use backend='auto'")
        if reason:
            _say(device, reason)
        return not reason

    def evaluate(self, tensors: Sequence[Tensor]) -> Tensor:
        """The numbers."""
        batch, m, n = sizes(self.program.signature, tensors)
        like = tensors[0]
        for k, t in enumerate(tensors):
            if t.device != like.device:
                raise DeviceError(
                    f"argument {k} of {self.program} lies on {t.device}, argument 0 on {like.device}; "
                    f"move them to one device"
                )
        if any(t.is_neg() for t in tensors):  # torch's lazy minus sign: numbers in memory are not the values
            tensors = [t.resolve_neg() for t in tensors]
        if self.tolerance is not None and self.ranges is None:
            with autograd.ordinary():  # the old vmap allows no random samples
                y = sums(self.program, tensors, batch, m, n, self.tolerance, exactly)
            if y is not None:
                return y
        if self.uses_llvm(like.device, like.dtype):
            return launch.run(self.program, tensors, batch, m, n, self.ranges)
        if self.uses_triton(like.device, like.dtype):
            try:
                return gpu.run(self.program, tensors, batch, m, n, self.ranges)
            except Exception as error:
                if self.backend == "triton" or not _from_triton(error):
                    raise
                text = (str(error).strip().splitlines() or [""])[0]
                self._reasons[like.device, like.dtype] = f"Triton failed with {type(error).__name__}: {text}"
                self.uses_triton(like.device, like.dtype)  # says it
        return eager.run(self.program, tensors, batch, m, n, self.ranges)

    def fake(self, tensors: Sequence[Tensor]) -> Tensor:
        """An empty tensor of the result's shape and dtype."""
        batch, m, n = sizes(self.program.signature, tensors)
        count = (m, n, 1)
        if len(self.rows) == 1:
            rows = () if self.rows[0] == 2 else (count[self.rows[0]],)
            shape: tuple[int, ...] = (*batch, *rows, self.program.widths[0])
        else:
            shape = (*batch, sum(count[r] * w for r, w in zip(self.rows, self.program.widths, strict=True)))
        return tensors[0].new_empty(shape, dtype=torch.int64 if self.integer else tensors[0].dtype)

    def _pieces(self, program: Program, y: Tensor, m: int, n: int) -> list[Tensor]:
        """The results that stand flat in `y`, each with its own shape."""
        if len(program.axes) == 1:
            return [y]
        pieces, start = [], 0
        for axis, width in zip(program.axes, program.widths, strict=True):
            rows = (m, n, 1)[KEPT[axis]]
            piece = y[..., start : start + rows * width]
            pieces.append(piece if axis == OVER_BOTH else piece.reshape(*piece.shape[:-1], rows, width))
            start += rows * width
        return pieces

    def _extras(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        programs = REDUCTIONS[self.program.kind].extras(self.program)
        return [maps.call(task(p, self.ranges, self.backend), tensors) for p in programs]

    def _saved(self, tensors: Sequence[Tensor], new: Sequence[Tensor], out: Tensor) -> list[Tensor]:
        own = [] if self.program.kind == "Sum" else [out]
        return [*tensors, *new, *own, *self._extras(tensors)]

    def pullback(
        self, tensors: Sequence[Tensor], out: Tensor, g: Tensor, wanted: Sequence[int]
    ) -> Sequence[Tensor | None]:
        """Gradients in the tensors numbered `wanted`, all in one pass over the pairs."""
        self._refuse_integer()
        with autograd.ordinary():  # torch folds the constants of formulas: real numbers, also inside tracers
            program, layout = reductions.pullback(self.program, tuple(wanted))
        grads: dict[int, Tensor] = {}
        if program is not None:
            _, m, n = sizes(self.program.signature, tensors)
            args = self._saved(tensors, self._pieces(self.program, g, m, n), out)
            y = maps.call(task(program, self.ranges, self.backend), args)
            for piece, members in zip(self._pieces(program, y, m, n), layout, strict=True):
                dims = [self.program.signature[i][0] for i in members]
                parts = [piece] if len(dims) == 1 else piece.split(dims, -1)
                for i, part in zip(members, parts, strict=True):
                    grads[i] = part if part.shape == tensors[i].shape else part.sum_to_size(tensors[i].shape)
        return [grads.get(i) for i in wanted]

    def pushforward(self, tensors: Sequence[Tensor], out: Tensor, tangents: Sequence[Tensor | None]) -> Tensor | None:
        """The tangent of the result, in one pass over the pairs."""
        if self.integer:
            return None
        moving = tuple(i for i, t in enumerate(tangents) if t is not None)
        with autograd.ordinary():
            program = reductions.pushforward(self.program, moving)
        if program is None:
            return None
        args = self._saved(tensors, [t for t in tangents if t is not None], out)
        return maps.call(task(program, self.ranges, self.backend), args)

    def _refuse_integer(self) -> None:
        if self.integer:
            raise NotDifferentiableError(f"{self.program.kind} gives indices, which have no gradient")


_numbers = itertools.count()
_said: set[tuple[str, str]] = set()


def _say(device: torch.device, reason: str) -> None:
    """Warn that reductions on the device run tile by tile, once for each reason."""
    if (device.type, reason) in _said:
        return
    _said.add((device.type, reason))
    fix = "pip install 'pullback[gpu]'" if reason == MISSING else "backend='eager' does the same without this warning"
    text = f"reductions on {device.type} run tile by tile in torch, which is slower than compiled code: {reason}; {fix}"
    warnings.warn(BackendWarning(text), stacklevel=2)


def _from_triton(error: BaseException) -> bool:
    """Whether an error arose inside Triton, as when it cannot compile or load a kernel; not if memory ran out."""
    at: TracebackType | None = error.__traceback__
    while at is not None:
        if str(at.tb_frame.f_globals.get("__name__", "")).split(".")[0] == "triton":
            return not isinstance(error, torch.OutOfMemoryError)
        at = at.tb_next
    return False


def exactly(program: Program, tensors: Sequence[Tensor], ranges: Ranges | None = None) -> Tensor:
    """The exact sum, by the back end that "auto" takes."""
    return task(program, ranges).evaluate(tensors)


def task(program: Program, ranges: Ranges | None = None, backend: str = "auto") -> Task:
    """The task, made once, so that its compiled code and its name in graphs are shared."""
    if ranges is None:
        if torch.compiler.is_dynamo_compiling():
            return getattr(shelf, _traced_task(id(program), backend))
        _named[id(program)] = program
        return _task(program, backend)
    found = ranges.tasks.get((program, backend))
    if found is None:
        found = ranges.tasks.setdefault((program, backend), Task(program, ranges, backend))
    return found


_named: WeakValueDictionary[int, Program] = WeakValueDictionary()  # programs that traced functions name, by id


@constant_in_graphs
def _traced_task(number: int, backend: str) -> str:
    return shelve(_task(_named[number], backend))


@lru_cache(maxsize=8192)
def _task(program: Program, backend: str) -> Task:
    return Task(program, None, backend)
