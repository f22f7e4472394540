"""The pattern of a Jacobian for every x, read from the operations of one run: index sets flow through each of them.

Every storage that depends on x has a family of index sets, one for each number in it; a tensor's sets are looked up
through its strides, so views and writes into views need no rules. Operations have rules by kind: elementwise ones join
the sets of their operands, those that only move numbers are run on numbers of elements instead, sums join along axes,
products with constant matrices follow their entries that are not zero. For an operation without a rule every result
depends on all that its operands depend on, which is never too small.

What can be missed: branches of the function that were not taken in this run (they are listed), and whatever leaves
torch (NumPy, `.data_ptr()`), for which the function must be given as an operator or the pattern by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pullback.autodiff.sparse.probe import Floats, operator_pattern, probe
from pullback.autodiff.sparse.sets import Ints, Sets, concatenate, empty, from_pairs, singletons
from pullback.core import autograd

_NEW = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "randint_like", "new_empty"}
_NEW |= {"new_zeros", "new_ones", "new_full", "new_empty_strided", "bernoulli", "zero", "fill", "normal", "uniform"}
_NEW |= {"random", "exponential", "resize", "set"}
_COPIES = {"copy", "clone", "_to_copy", "contiguous", "lift_fresh", "detach", "alias"}
_MOVES = {"cat", "stack", "constant_pad_nd", "roll", "flip", "rot90", "repeat", "take"}
_MOVES |= {"gather", "index_select", "index", "tril", "triu", "slice_backward", "select_backward", "slice_scatter"}
_MOVES |= {"select_scatter", "diagonal_scatter", "diagonal_backward", "scatter", "index_fill", "unfold_copy"}
_MOVES |= {"im2col", "diag_embed", "_reshape_copy", "view_copy", "masked_select", "index_copy", "_unsafe_index"}
_MOVES |= {"as_strided_scatter", "pixel_shuffle", "pixel_unshuffle", "block_diag", "embedding"}
_SUMS = {"sum", "nansum", "mean", "prod", "amax", "amin", "max", "min", "var", "std", "var_mean", "std_mean", "norm"}
_SUMS |= {"logsumexp", "linalg_vector_norm", "median", "nanmedian", "mode", "aminmax", "trace"}
_ALONG = {"_softmax", "_log_softmax", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "_fft_c2c"}
_ALONG |= {"_softmax_backward_data", "_log_softmax_backward_data"}
_ELEMENTWISE = {"complex", "polar", "mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy"}
_ELEMENTWISE |= {"native_dropout"}
# Linear in their first operand, with the operands that only give them a shape.
_PADS = {f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3)}
_LINEAR = {"avg_pool1d", "avg_pool2d", "avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d"}
_LINEAR |= {f"upsample_{kind}" for kind in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d")}
_LINEAR |= {"upsample_bicubic2d", "upsample_trilinear3d"}
_LINEAR |= {f"{name}_backward" for name in (*_LINEAR, *_PADS, "convolution")} | {"grid_sampler_2d", "grid_sampler_3d"}
_ONLY_SHAPE = {"self", "input"}
_ADDS = {"scatter_add", "index_add", "scatter_reduce", "index_put", "index_reduce", "put"}
_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "allclose", "nonzero_static"}
_LARGEST = 50_000_000  # products of matrices with more pairs than this are not followed entry by entry


class Trace(TorchDispatchMode):
    """Follow index sets while active. `dense` and `branches`: see SparsityPattern."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.n = n
        self.sets: dict[int, Sets] = {}
        self.tainted: set[int] = set()  # storages of integers and Booleans that were computed from x
        self.kept: list[Any] = []  # storages stay alive, so that no address is used twice
        self.dense: dict[str, None] = {}
        self.branches: dict[str, None] = {}

    def watch(self, x: Tensor) -> None:
        """Element i of x depends on i."""
        self.write(x, singletons(self.n))

    def read(self, t: Tensor) -> Sets:
        """The sets of the elements of `t`, in order."""
        found = self.sets.get(_key(t)) if _has_storage(t) else None
        if found is None:
            return empty(t.numel(), self.n)
        places = _places(t)
        return found.take(places) if places.ndim == 1 else found.take(places[:, 0]).union(found.take(places[:, 1]))

    def write(self, t: Tensor, sets: Sets) -> None:
        """Give the elements of `t` their sets."""
        key, places = _key(t), _places(t)
        if key not in self.sets:
            if not len(sets.columns):
                return
            self.kept.append(t.untyped_storage())
            size = t.untyped_storage().nbytes() // _unit(t)
            self.sets[key] = empty(size, self.n)
        for part in places.reshape(len(places), -1).T:
            self.sets[key] = self.sets[key].put(part, sets)

    def depends(self, t: Any) -> bool:
        """Whether some element of `t` depends on x."""
        return isinstance(t, Tensor) and _has_storage(t) and _key(t) in self.sets

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one operation, and the rule for it."""
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        watched = [t for t in leaves if self.depends(t)]
        tainted = any(_has_storage(t) and _key(t) in self.tainted for t in leaves)
        if not watched and not tainted:
            return out
        name = func._schema.name.split("::")[1]
        label = f"{func._schema.name.replace('::', '.')}"
        if name in _READS or (tainted and name.startswith(("index", "masked_select", "gather", "scatter", "take"))):
            self.branches[label] = None
        inputs = {_key(t) for t in leaves if _has_storage(t)}
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor) and _has_storage(t) and _key(t) not in inputs]
        targets = _written(func, args, kwargs) + made
        for t in targets:
            if not (t.is_floating_point() or t.is_complex()):
                self.kept.append(t.untyped_storage())
                self.tainted.add(_key(t))
        targets = [t for t in targets if t.is_floating_point() or t.is_complex()]
        if watched and targets:
            family = name.removesuffix("_")
            # fill_ may be given a number that depends on x, as a tensor.
            if family in _NEW and not any(self.depends(t) for t in args[1:]):
                found: list[Sets] | None = [empty(t.numel(), self.n) for t in targets]
            else:
                found = _rule(family, func)(self, func, args, kwargs, targets)
            if found is None:
                self.dense[label] = None
                found = [self.everything(watched, t) for t in targets]
            for t, sets in zip(targets, found, strict=True):
                self.write(t, sets)
        return out

    def everything(self, watched: Iterable[Tensor], t: Tensor) -> Sets:
        """Each element of `t` depends on all that any element of `watched` depends on."""
        union = np.unique(np.concatenate([self.read(w).columns for w in watched]))
        one = Sets(np.array([0, len(union)]), union, self.n)
        return one.take(np.zeros(t.numel(), np.int64))

    def numbered(self, args: Any, kwargs: Any) -> tuple[Any, Any, Sets]:
        """The arguments with every floating point tensor replaced by the numbers 1, 2, ... of its elements, and sets.

        Elements that do not depend on x, and whatever the operation fills in, are 0.
        """
        parts = [empty(1, self.n)]
        count = 1

        def replace(t: Any) -> Any:
            nonlocal count
            if not isinstance(t, Tensor) or not (t.is_floating_point() or t.is_complex()):
                return t
            if not self.depends(t):
                return torch.zeros(t.shape, dtype=torch.float64)
            parts.append(self.read(t))
            first, count = count, count + t.numel()
            return torch.arange(first, count, dtype=torch.float64).reshape(t.shape)

        args, kwargs = tree_map(replace, (args, kwargs))
        return args, kwargs, concatenate(parts)


Rule = Callable[[Trace, Any, Any, Any, list[Tensor]], list[Sets] | None]


def _pointwise(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """Element k of the result depends on element k of every operand."""
    shape = targets[0].shape
    total = empty(targets[0].numel(), trace.n)
    written = [t for a, t in zip(func._schema.arguments, args, strict=False) if not _overwritten(func, a)]
    for t in tree_leaves((written, {k: v for k, v in kwargs.items() if k != "out"})):
        if trace.depends(t):
            numbers = torch.arange(t.numel()).reshape(t.shape).expand(shape).flatten().numpy()
            total = total.union(trace.read(t).take(numbers))
    return [total] * len(targets)


def _moves(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """The operation itself, run on the numbers of elements, tells where each of them comes from."""
    names = [a.name for a in func._schema.arguments]
    if "reduce" in names:
        return None  # scatter with a reduction
    args = [0 if k == "value" and not isinstance(v, Tensor) else v for k, v in zip(names, args, strict=False)]
    args, kwargs, sets = trace.numbered(args, kwargs)
    out = func(*args, **kwargs)
    return [sets.take(out.flatten().numpy().astype(np.int64))]


def _labels(func: Any, args: Any, kwargs: Any) -> tuple[Tensor, int] | None:
    """For every element of the first operand, the number of the group that the operation joins; and of groups."""
    bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    t, dim = args[0], bound.get("dim")
    if isinstance(dim, str) or not isinstance(t, Tensor):
        return None
    dims = range(t.ndim) if dim is None or (isinstance(dim, (list, tuple)) and not dim) else dim
    dims = {d % max(t.ndim, 1) for d in ([dims] if isinstance(dims, int) else dims)}
    shape = [1 if i in dims else s for i, s in enumerate(t.shape)]
    groups = int(np.prod(shape, dtype=np.int64))
    return torch.arange(groups).reshape(shape).expand(t.shape).flatten(), groups


def _sums(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """Each result depends on everything along the axes that are summed."""
    if "other" in [a.name for a in func._schema.arguments]:
        return _pointwise(trace, func, args, kwargs, targets)  # max(x, y)
    found = _labels(func, args, kwargs)
    if found is None or any(t.numel() != found[1] for t in targets):
        return None
    return [trace.read(args[0]).join(found[0].numpy(), found[1])] * len(targets)


def _along(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """As the sums, but the result has the shape of the operand."""
    found = _labels(func, args, kwargs)
    operands = [t for t in args if trace.depends(t)]
    if found is None or any(t.shape != args[0].shape for t in (*targets, *operands)):
        return None
    label = found[0].numpy()
    total = empty(found[1], trace.n)
    for t in operands:
        total = total.union(trace.read(t).join(label, found[1]))
    return [total.take(label)] * len(targets)


def _adds(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """A tensor, into which another is written or added at some places: both sets together."""
    bound = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
    base = bound["self"]
    source = next((bound[k] for k in ("src", "source", "values") if k in bound), None)
    if not isinstance(source, Tensor):
        return None
    places = torch.arange(base.numel()).reshape(base.shape)
    if func._schema.name.split("::")[1].startswith("index_put"):
        hit = torch.ops.aten.index.Tensor(places, bound["indices"])
    elif "dim" not in bound:
        return None
    elif bound["index"].ndim == base.ndim and "scatter" in func._schema.name:
        source = source[tuple(slice(0, s) for s in bound["index"].shape)]
        hit = torch.gather(places, bound["dim"], bound["index"])
    else:
        hit = torch.index_select(places, bound["dim"], bound["index"])
    numbers = torch.arange(source.numel()).reshape(source.shape).expand(hit.shape).flatten().numpy()
    added = trace.read(source).take(numbers).join(hit.flatten().numpy(), base.numel())
    return [trace.read(base).union(added)]


def _matmul(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """Rows times columns; entries of a constant factor that are zero join nothing."""
    name = func._schema.name.split("::")[1].removesuffix("_")
    base = args[0] if name.startswith(("add", "baddbmm")) else None
    left, right = args[1:3] if base is not None else args[:2]
    total = empty(targets[0].numel(), trace.n)
    if base is not None and trace.depends(base):
        numbers = torch.arange(base.numel()).reshape(base.shape).expand(targets[0].shape).flatten().numpy()
        total = trace.read(base).take(numbers)
    left_entries, left_shape = _entries(left, trace.depends(left), False)
    right_entries, right_shape = _entries(right, trace.depends(right), True)
    batch, rows, inner = left_shape
    columns = right_shape[2]
    if len(left_entries[0]) * columns > _LARGEST:
        return None
    # Every pair of entries (b, i, j), (b, j, k) goes into the element (b, i, k).
    b, i, j = left_entries
    right_rows = from_pairs(right_entries[0] * inner + right_entries[1], right_entries[2], batch * inner, columns)
    met = right_rows.take(b * inner + j)
    counts = met.counts
    out = (np.repeat(b, counts) * rows + np.repeat(i, counts)) * columns + met.columns
    if trace.depends(left):
        member = np.repeat((b * rows + i) * inner + j, counts)
        total = total.union(trace.read(left).gather(out, member, len(total)))
    if trace.depends(right):
        member = (np.repeat(b, counts) * inner + np.repeat(j, counts)) * columns + met.columns
        total = total.union(trace.read(right).gather(out, member, len(total)))
    return [total]


def _entries(t: Tensor, full: bool, is_right: bool) -> tuple[tuple[Ints, Ints, Ints], tuple[int, int, int]]:
    """(batch, row, column) of the entries of a factor that are not zero, or of all; a vector is a row or a column."""
    shape = tuple(t.shape) if t.ndim > 1 else ((t.shape[0], 1) if is_right else (1, t.shape[0]))
    batch, rows, columns = shape if len(shape) == 3 else (1, *shape)
    if t.layout != torch.strided:
        index = t.to_sparse_coo().coalesce().indices()
        index = index if len(index) == 3 else torch.cat([torch.zeros_like(index[:1]), index])
    else:
        dense = t.detach().reshape(batch, rows, columns)
        index = (torch.ones_like(dense, dtype=torch.bool) if full else dense != 0).nonzero().T
    b, i, j = (k.numpy() for k in index)
    return (b, i, j), (batch, rows, columns)


def _convolution(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """Tap by tap: the element under every tap whose weight is not zero."""
    x, weight, bias, stride, padding, dilation, transposed, _, groups = args
    if trace.depends(weight) or trace.depends(bias):
        return None
    if transposed:
        return _linear(trace, func, (x, weight, None, *args[3:]), kwargs, targets)
    pads = [p for size in reversed(padding) for p in (size, size)]
    numbers = torch.nn.functional.pad(torch.arange(1, x.numel() + 1).reshape(x.shape), pads)
    results = torch.arange(targets[0].numel()).reshape(targets[0].shape)
    per_in, per_out = x.shape[1] // groups, weight.shape[0] // groups
    pairs = []
    for place in np.ndindex(*weight.shape[2:]):
        window = tuple(
            slice(p * d, p * d + (size - 1) * s + 1, s)
            for p, d, s, size in zip(place, dilation, stride, targets[0].shape[2:], strict=True)
        )
        under = numbers[(slice(None), slice(None), *window)]
        for o, c in (weight[(..., *place)] != 0).nonzero().tolist():
            pairs.append((results[:, o].flatten(), under[:, o // per_out * per_in + c].flatten()))
    if not pairs:
        return [empty(targets[0].numel(), trace.n)]
    rows, members = (torch.cat(p).numpy() for p in zip(*pairs, strict=True))
    inside = members > 0
    return [trace.read(x).gather(rows[inside], members[inside] - 1, targets[0].numel())]


def _linear(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """An operation that is linear in its first operand, probed."""
    is_backward = func._schema.name.endswith("_backward")
    for argument, t in list(zip(func._schema.arguments, args, strict=False))[1:]:
        if trace.depends(t) and not (is_backward and argument.name in _ONLY_SHAPE):
            return None
    x, m = args[0], targets[0].numel()
    if len(targets) != 1 or x.is_complex():
        return None
    rest, kwargs = tree_map(_precise, (args[1:], kwargs))

    def apply(v: Floats) -> Floats:
        rows = []
        for row in v:
            out = func(torch.from_numpy(row).reshape(x.shape), *rest, **kwargs)
            rows.append(next(t for t in tree_leaves(out) if t is not None).flatten().numpy())
        return np.array(rows)

    pattern = probe(apply, m, x.numel())
    return [trace.read(x).gather(pattern.rows, pattern.columns, m)]


def _precise(t: Any) -> Any:
    return t.double() if isinstance(t, Tensor) and t.is_floating_point() else t


def _elementwise(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """As pointwise operations, unless a reduction is asked for."""
    shape = torch.broadcast_shapes(*(t.shape for t in args if isinstance(t, Tensor)))
    return _pointwise(trace, func, args, kwargs, targets) if targets[0].shape == shape else None


def _operator(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    """A linear operator of the library: its pattern, for every member of the batch."""
    x, handle, adjoint, *tensors = args
    if any(trace.depends(t) for t in tensors if isinstance(t, Tensor)):
        return None
    op = autograd.lookup(handle)
    pattern = operator_pattern(op.H if adjoint else op)
    n_rows, size = len(pattern), pattern.n
    batch = np.arange(x.numel() // size)[:, None]
    rows = (batch * n_rows + pattern.rows).ravel()
    return [trace.read(x).gather(rows, (batch * size + pattern.columns).ravel(), len(batch) * n_rows)]


def _unknown(trace: Trace, func: Any, args: Any, kwargs: Any, targets: list[Tensor]) -> list[Sets] | None:
    return None


_RULES: dict[str, Rule] = (
    dict.fromkeys(_COPIES, _pointwise)
    | dict.fromkeys(_MOVES | _PADS, _moves)
    | dict.fromkeys(_SUMS, _sums)
    | dict.fromkeys(_ALONG, _along)
    | dict.fromkeys(_ADDS, _adds)
    | dict.fromkeys(_LINEAR, _linear)
    | dict.fromkeys(_ELEMENTWISE, _elementwise)
    | dict.fromkeys(["mm", "mv", "bmm", "dot", "vdot", "addmm", "addmv", "_sparse_mm", "baddbmm"], _matmul)
    | {"convolution": _convolution, "apply": _operator}
)


def _rule(family: str, func: Any) -> Rule:
    if family in _RULES and (family != "apply" or func._schema.name.startswith("pullback::")):
        return _RULES[family]
    return _pointwise if torch.Tag.pointwise in func.tags else _unknown


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """The operands that an operation changes."""
    if not func._schema.is_mutable:
        return []
    arguments = func._schema.arguments
    pairs = [*zip(arguments, args, strict=False), *((a, kwargs[a.name]) for a in arguments if a.name in kwargs)]
    changed = [v for a, v in pairs if a.alias_info is not None and a.alias_info.is_write]
    return [t for t in tree_leaves(changed) if isinstance(t, Tensor) and _has_storage(t)]


def _overwritten(func: Any, argument: Any) -> bool:
    """Whether the old value of an argument is lost: copy_ and the like."""
    return argument.name == "out" or (argument.name == "self" and func._schema.name == "aten::copy_")


def _has_storage(t: Tensor) -> bool:
    return t.layout == torch.strided


def _key(t: Tensor) -> int:
    return int(t.untyped_storage()._cdata)


def _unit(t: Tensor) -> int:
    """Bytes of one real number in the storage of `t`."""
    return t.element_size() // (2 if t.is_complex() else 1)


def _places(t: Tensor) -> Ints:
    """Where the elements of `t` lie in its storage, counted in real numbers: (numel,), or (numel, 2) if complex."""
    span = int(t.storage_offset()) + sum((s - 1) * k for s, k in zip(t.shape, t.stride(), strict=True)) + 1
    if t.numel() == 0:
        return np.zeros(0, np.int64)
    places = torch.arange(max(span, 1)).as_strided(t.shape, t.stride(), t.storage_offset()).flatten().numpy()
    return np.stack([2 * places, 2 * places + 1], -1) if t.is_complex() else places


def trace_pattern(f: Callable[[Tensor], Tensor], x: Tensor, needs_grad: bool = False) -> tuple[Sets, Trace, Tensor]:
    """Run f once at x: the pattern of its Jacobian, the trace with its notes, and f(x).

    `needs_grad`: f differentiates its argument itself, as the gradient of a function does.
    """
    with torch.set_grad_enabled(needs_grad):
        value = x.detach().clone(memory_format=torch.contiguous_format).requires_grad_(needs_grad)
        trace = Trace(x.numel())
        trace.watch(value)
        with trace:
            y = f(value)
    if not isinstance(y, Tensor):
        return empty(0, trace.n), trace, y
    return trace.read(y.detach().resolve_conj()), trace, y
