"""explain(y, x): the paths along which x acts on y, what each contributes to dy/dx, and their sum.

dy/dx is the sum over all paths from y to x of the product of the derivatives along the path. The number of paths grows
exponentially with depth, so the total comes from one sweep over the graph, the number of paths is counted, and paths
are listed from the largest on, as many as are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pullback.autodiff.explanation import Explanation, Explanations, Path, PathNode, size
from pullback.autodiff.paths import Edge, Paths, log_gain
from pullback.autodiff.scalar import Scalar
from pullback.core import nodes
from pullback.core.errors import ArgumentError

_ALL = 1000  # paths that are listed when `top` is not given
_SOME = 20  # paths that are listed then if there are more
_WORK = 2**26  # elements of gradients that are computed at most to rank all paths of a tensor
_CALL = 2**12  # running a node costs as much as so many elements


def explain(
    y: Any,
    x: Any,
    top: int | None = None,
    *,
    params: Any = None,
    grad_output: Tensor | None = None,
) -> Any:
    """dy/dx = sum over paths from y to x of the product of the derivatives along the path.

    For `Scalar`s, and for tensors with the graph that autograd built. A tensor's contribution is what `backward` would
    add to the gradient of x along this path alone, a tensor of the shape of x, ranked by its norm. The graph is only
    read: nothing is freed, `.grad` stays, hooks are neither run nor left behind. The explanation keeps the graph alive.

    Paths come by decreasing size of their contribution. That order is exact for Scalars, for tensors of one real
    element each, and where it is cheap to compute all paths; for other tensors paths are taken in the order of the
    product of the gains that their edges have in one backward sweep, twice as many as asked for, and those are ranked:
    the printed table then says "heuristic order".

    Args:
        y: a Scalar, or a tensor with a graph; with more than one element it needs `grad_output`.
        x: a Scalar or a tensor that y was computed from, a leaf or not; a sequence or a dict by name for several.
        top: list this many paths; by default all, if there are at most 1000, else 20.
        params: names of tensors, as a dict or as `net.named_parameters()`, to be printed on the paths.
        grad_output: gradient of the result in y, of the shape of y, as in `y.backward(grad_output)`.

    Returns: an `Explanation` with `paths`, `total`, `count`, `complete`; iterating it continues beyond `paths`. An
    `Explanations` (a tuple) if there are several x.

    Raises: ArgumentError if y does not depend on x, or the arguments do not fit; NotDifferentiableError if the graph
    has been freed by `backward()`, or contains a checkpoint with use_reentrant=True.

    Cost: one backward sweep, and one for each path that is listed; paths share the work of their common beginning.
    """
    if top is not None and (isinstance(top, bool) or not isinstance(top, int) or top < 0):
        raise ArgumentError(f"top must be a number of paths, at least 0, or None; got {top!r}")
    if isinstance(x, Mapping):
        return Explanations(_explain(y, one, top, params, grad_output, str(name)) for name, one in x.items())
    if isinstance(x, (list, tuple)):
        return Explanations(_explain(y, one, top, params, grad_output, f"x[{i}]") for i, one in enumerate(x))
    return _explain(y, x, top, params, grad_output, "x")


def _explain(y: Any, x: Any, top: int | None, params: Any, grad_output: Any, name: str) -> Explanation:
    source: _Scalars | _Tensors
    if isinstance(y, Scalar):
        if grad_output is not None:
            raise ArgumentError("grad_output is for tensors; a Scalar acts element by element")
        if not isinstance(x, Scalar):
            raise ArgumentError(f"{name} must be a Scalar like y; got {type(x).__name__}")
        source = _Scalars(y, x, name)
    elif isinstance(y, Tensor):
        if not isinstance(x, Tensor):
            hint = "; for a module give dict(net.named_parameters())" if isinstance(x, torch.nn.Module) else ""
            raise ArgumentError(
                f"{name} must be a tensor like y, or a list or dict of them; got {type(x).__name__}{hint}"
            )
        source = _Tensors(y, x, name, params, grad_output)
    else:
        raise ArgumentError(f"y must be a Scalar or a tensor with a graph; got {type(y).__name__}")
    if not source.paths.count:
        raise ArgumentError(
            f"y does not depend on {source.name}, so there is no path: was it replaced by a new tensor or Scalar, or "
            f"was its use detached?"
        )
    source.sweep()
    number = top if top is not None else source.paths.count if source.paths.count <= _ALL else _SOME
    listed, exact = source.ranked(min(number, source.paths.count))
    return Explanation(source, listed, exact)


class _Source:
    """What explanations need to know of a graph: its paths, the gain of an edge, and what a path contributes."""

    paths: Paths
    name: str  # of x
    title: str  # of y
    total: Any  # dy/dx, from `sweep`
    absolute: float | None = None  # sum of the sizes of all contributions, where it comes for nothing
    numbers = True  # every derivative is a number, so the order by gains is the order of contributions

    def sweep(self) -> None:
        """Find the total and the gains of all edges."""
        raise NotImplementedError

    def gain(self, edge: Edge) -> float:
        """The logarithm of the size of an edge's derivative."""
        raise NotImplementedError

    def follow(self, edges: Sequence[Edge]) -> tuple[list[float], Any]:
        """The factors along a path, and its contribution."""
        raise NotImplementedError

    def node(self, vertex: Any) -> PathNode:
        """A vertex, as it is shown."""
        raise NotImplementedError

    def work(self) -> float:
        """Elements computed to follow all paths."""
        raise NotImplementedError

    def path(self, edges: Sequence[Edge]) -> Path:
        factors, contribution = self.follow(edges)
        vertices = [self.paths.source, *(e.head for e in edges)]
        return Path(tuple(map(self.node, vertices)), tuple(factors), contribution, self.total)

    def ranked(self, number: int) -> tuple[list[Path], bool]:
        """The `number` largest paths, and whether they are known to be."""
        if self.numbers:
            return [self.path(e) for e in islice(self.paths.largest_first(self.gain), number)], True
        exact = number == self.paths.count or self.work() <= _WORK
        candidates: Iterable[list[Edge]] = self.paths.every()
        if not exact:
            found = list(islice(self.paths.largest_first(self.gain), 2 * number + 8))
            candidates = sorted(found, key=lambda edges: [e.slot for e in edges])  # neighbours share their beginning
        sizes = [(size(self.follow(edges)[1]), edges) for edges in candidates]
        sizes.sort(key=lambda pair: -math.inf if math.isnan(pair[0]) else -pair[0])
        return [self.path(edges) for _, edges in sizes[:number]], exact

    def iterate(self) -> Iterator[Path]:
        if self.numbers or self.work() > _WORK:
            for edges in self.paths.largest_first(self.gain):
                yield self.path(edges)
        else:
            yield from self.ranked(self.paths.count)[0]


class _Scalars(_Source):
    def __init__(self, y: Scalar, x: Scalar, name: str) -> None:
        self.y, self.x = y, x
        self.name = x.name if x.operation or x._name else name
        self.title = y.name
        self.paths = Paths(y, x, lambda s: [a if isinstance(a, Scalar) else None for a in s._arguments])

    def sweep(self) -> None:
        self.total = self.y.grad(self.x)
        self.slopes = {v: dict(v._slopes()) for v in self.paths.order if v is not self.x}
        self.numbers = not any(isinstance(self._slope(e), Tensor) for es in self.paths.edges.values() for e in es)
        self.numbers = self.numbers and not isinstance(self.total, Tensor)
        if self.numbers:
            sums: dict[Any, float] = {self.x: 1.0}
            for v in reversed(self.paths.order):
                if v is not self.x:
                    sums[v] = sum(abs(self._slope(e)) * sums[e.head] for e in self.paths.edges[v])
            self.absolute = sums[self.y]

    def _slope(self, edge: Edge) -> Any:
        return self.slopes[edge.tail][edge.slot]

    def gain(self, edge: Edge) -> float:
        return log_gain(_mean_size(self._slope(edge)))

    def follow(self, edges: Sequence[Edge]) -> tuple[list[Any], Any]:
        factors = [self._slope(e) for e in edges]
        product = torch.ones_like(self.total) if isinstance(self.total, Tensor) else 1.0
        for factor in factors:
            product = product * factor
        return factors, product

    def node(self, vertex: Scalar) -> PathNode:
        label = self.name if vertex is self.x else vertex._name or vertex.operation
        return PathNode("-" if label == "neg" else label, vertex, 0)

    def work(self) -> float:
        return min(self.paths.count, 2**60) * len(self.paths.order) * (_CALL + torch.as_tensor(self.total).numel())


class _Tensors(_Source):
    def __init__(self, y: Tensor, x: Tensor, name: str, params: Any, grad_output: Tensor | None) -> None:
        self.start = _start(y, grad_output)
        source, target = nodes.root(y, "y"), nodes.root(x, name)
        self.names = _names(params)
        self.name = self.names.setdefault(target, name)
        self.end = target
        self.title = self.names.get(source, "y")
        self.shapes: dict[Any, nodes.Result] = {}
        self.paths = Paths(source, target, lambda v: [None if c is None else (c, k) for c, k in nodes.inputs(v[0])])
        self.walk: list[tuple[Edge, tuple[Tensor | None, ...]]] = []

    def sweep(self) -> None:
        paths = self.paths
        several: dict[Any, tuple[nodes.Result, ...]] = {}
        for v in paths.order:
            several[v[0]] = several.get(v[0]) or nodes.results(v[0])
            self.shapes[v] = several[v[0]][v[1]]
        self.numbers = all(math.prod(r.shape) == 1 and not r.dtype.is_complex for r in self.shapes.values())
        self.several = {node: len(found) > 1 for node, found in several.items()}
        self.gains: dict[Edge, float] = {}
        self.unit: dict[Any, tuple[Tensor | None, ...]] = {}
        gradients: dict[Any, Tensor] = {paths.source: self.start}
        sums = {paths.source: float(self.start.abs().sum())} if self.numbers else {}
        for v in paths.order:
            if v == self.end:
                break
            here = gradients.pop(v)
            found = self._local(v) if self.numbers else self._run(v, here)
            length = size(here)
            for edge in paths.edges[v]:
                local = self._of(found, edge)
                if self.numbers:
                    factor = float(local)
                    self.gains[edge] = log_gain(abs(factor))
                    sums[edge.head] = sums.get(edge.head, 0.0) + abs(factor) * sums[v]
                    part = here.reshape(()).to(local.dtype) * local
                else:
                    part = local
                    self.gains[edge] = log_gain(size(part) / length) if length else log_gain(0.0)
                gradients[edge.head] = gradients[edge.head] + part if edge.head in gradients else part
        self.total = gradients[self.end]
        self.absolute = sums.get(self.end)

    def _run(self, vertex: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        node, index = vertex
        given: list[Tensor | None] = [None] * len(nodes.results(node))
        given[index] = gradient
        return nodes.vjp(node, given)

    def _local(self, vertex: Any) -> tuple[Tensor | None, ...]:
        """The derivatives of a result of one element."""
        if vertex not in self.unit:
            shape = self.shapes[vertex]
            self.unit[vertex] = self._run(vertex, torch.ones(shape.shape, dtype=shape.dtype, device=shape.device))
        return self.unit[vertex]

    def _of(self, found: Sequence[Tensor | None], edge: Edge) -> Tensor:
        got = found[edge.slot]
        shape = self.shapes[edge.head]
        return torch.zeros(shape.shape, dtype=shape.dtype, device=shape.device) if got is None else got

    def gain(self, edge: Edge) -> float:
        return self.gains[edge]

    def follow(self, edges: Sequence[Edge]) -> tuple[list[float], Any]:
        """The gradient sent down this path alone; what the last path has in common with it is not computed again."""
        factors = []
        gradient = self.start
        for i, edge in enumerate(edges):
            if i < len(self.walk) and self.walk[i][0].tail == edge.tail:
                found = self.walk[i][1]
                if self.walk[i][0] != edge:
                    self.walk[i:] = [(edge, found)]
            else:
                found = self._run(edge.tail, gradient)
                self.walk[i:] = [(edge, found)]
            before, gradient = gradient, self._of(found, edge)
            factors.append(self._factor(edge, before, gradient))
        return factors, gradient.clone()

    def _factor(self, edge: Edge, before: Tensor, after: Tensor) -> float:
        """The derivative where both ends are one real number, else the ratio of norms."""
        ends = (self.shapes[edge.tail], self.shapes[edge.head])
        if all(math.prod(r.shape) == 1 and not r.dtype.is_complex for r in ends):
            return float(self._of(self._local(edge.tail), edge))
        length = size(before)
        return size(after) / length if length else 0.0

    def node(self, vertex: Any) -> PathNode:
        node, index = vertex
        label = self.names.get(vertex)
        if label is None:
            leaf = nodes.variable(node) is not None
            label = "leaf" if leaf else nodes.name(node) + (f"[{index}]" if self.several[node] else "")
        return PathNode(label, node, index)

    def work(self) -> float:
        """Beginnings of paths, times the elements where they stand."""
        ways: dict[Any, int] = {self.paths.source: 1}
        total = 0.0
        for v in self.paths.order:
            total += min(ways[v], 2**60) * (_CALL + math.prod(self.shapes[v].shape))
            for edge in self.paths.edges[v]:
                ways[edge.head] = ways.get(edge.head, 0) + ways[v]
        return total


def _start(y: Tensor, grad_output: Tensor | None) -> Tensor:
    if grad_output is None:
        if y.numel() != 1 or y.is_complex():
            raise ArgumentError(
                f"y must be one real number, or come with grad_output of its shape; got a tensor of shape "
                f"{tuple(y.shape)} and {y.dtype}; explain(y.sum(), x) explains the sum of its elements"
            )
        return torch.ones_like(y).detach()
    if not isinstance(grad_output, Tensor) or grad_output.shape != y.shape:
        got = tuple(grad_output.shape) if isinstance(grad_output, Tensor) else type(grad_output).__name__
        raise ArgumentError(f"grad_output must be a tensor of the shape of y, {tuple(y.shape)}; got {got}")
    return grad_output.detach().to(dtype=y.dtype, device=y.device)


def _names(params: Any) -> dict[Any, str]:
    """(node, index) -> name for tensors with a graph."""
    if params is None:
        return {}
    if isinstance(params, torch.nn.Module):
        params = params.named_parameters()
    pairs = params.items() if isinstance(params, Mapping) else params
    try:
        named = [(str(name), tensor) for name, tensor in pairs]
    except (TypeError, ValueError):
        raise ArgumentError(
            f"params must be a dict of names and tensors, or net.named_parameters(); got {type(params).__name__}"
        ) from None
    return {nodes.root(t): name for name, t in named if isinstance(t, Tensor) and t.requires_grad}


def _mean_size(value: Any) -> float:
    if not isinstance(value, Tensor):
        return abs(value)
    return size(value) / math.sqrt(value.numel()) if value.numel() else 0.0
