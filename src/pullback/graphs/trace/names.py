"""What every tracer needs: values of tensors, names inside nested results, unique ids, gradient paths."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError
from pullback.graphs.model import Edge, Value

_dtypes: dict[torch.dtype, str] = {}
_devices: dict[torch.device, str] = {}


def value(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Value:
    """A `Value` of torch's own descriptions."""
    name = _dtypes.get(dtype)
    if name is None:
        name = _dtypes[dtype] = str(dtype).removeprefix("torch.")
    where = _devices.get(device)
    if where is None:
        where = _devices[device] = str(device)
    return Value(shape, name, where)


def value_of(tensor: Tensor) -> Value:
    """Shape, dtype and device of a tensor of any kind (sparse, nested, meta)."""
    try:
        shape = tuple(tensor.shape)
    except RuntimeError:  # a nested tensor has no single shape
        shape = (tensor.size(0),)
    return value(shape, tensor.dtype, tensor.device)


def named_tensors(tree: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(name, tensor) for every tensor in nested lists, tuples, dicts, dataclasses, sets and generators.

    Names read as Python: "output[0]", "output.loss", "output['a b']". Anything else is left out.
    """
    if isinstance(tree, Tensor):
        yield name, tree
    elif isinstance(tree, Mapping):
        for key, item in tree.items():
            plain = isinstance(key, str) and key.isidentifier()
            yield from named_tensors(item, f"{name}.{key}" if plain else f"{name}[{key!r}]")
    elif isinstance(tree, tuple) and len(fields := _fields(type(tree))) == len(tree) > 0:
        for key, item in zip(fields, tree, strict=True):
            yield from named_tensors(item, f"{name}.{key}")
    elif dataclasses.is_dataclass(tree) and not isinstance(tree, type):
        for entry in dataclasses.fields(tree):
            yield from named_tensors(getattr(tree, entry.name), f"{name}.{entry.name}")
    elif isinstance(tree, (list, tuple, set, frozenset, Iterator)):
        for i, item in enumerate(tree):
            yield from named_tensors(item, f"{name}[{i}]")


def _fields(kind: type) -> tuple[str, ...]:
    """The names of a named tuple, or of what torch returns for several results (qr: Q, R)."""
    found: tuple[str, ...] = getattr(kind, "_fields", ()) or getattr(kind, "__match_args__", ())
    return found


def arguments(f: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by the names that the function gives them."""
    try:
        bound = inspect.signature(f.forward if isinstance(f, torch.nn.Module) else f).bind(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{f"argument{i}": a for i, a in enumerate(args)}, **kwargs}
    return dict(bound.arguments)


def materialized(tree: Any) -> Any:
    """The same with generators turned into lists, so that it can be read twice."""
    return list(tree) if isinstance(tree, Iterator) else tree


def named_parameters(params: Any) -> list[tuple[str, Tensor]]:
    """(name, tensor) of what a caller may pass as `params`.

    A dict, a module (its parameters and buffers), `named_parameters()`, or a list of pairs.
    """
    if params is None:
        return []
    if isinstance(params, torch.nn.Module):
        return [*params.named_parameters(), *params.named_buffers()]
    pairs: Iterable[Any] = params.items() if isinstance(params, Mapping) else params
    found = []
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[1], Tensor)):
            what = type(pair).__name__
            if isinstance(pair, tuple) and len(pair) == 2:
                what = f"{pair[0]!r}: {type(pair[1]).__name__}"
            raise ArgumentError(
                f"params must be a dict from names to tensors, a module, or pairs (name, tensor); got the item "
                f"{what}; write params=dict(net.named_parameters())"
            )
        found.append((str(pair[0]), pair[1]))
    return found


_FACTS = re.compile(r"\b(?!Var\()([A-Z]\w*)\((?:[^()\[\]A-Z]|\([^()\[\]A-Z]*\))*\)")


def structure(expression: str, limit: int = 36) -> str:
    """An operator's expression; one of more than `limit` letters without sizes: "2 * Smoothing2D.H @ Smoothing2D"."""
    return expression if len(expression) <= limit else _FACTS.sub(r"\1", expression)


class Ids:
    """Unique ids: the wanted text, with .1, .2 ... where it is taken."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._next: dict[str, int] = {}

    def __call__(self, wanted: str) -> str:
        """A new id."""
        name = wanted
        while name in self._taken:
            k = self._next[wanted] = self._next.get(wanted, 0) + 1
            name = f"{wanted}.{k}"
        self._taken.add(name)
        return name


def ranked(edges: list[Edge], paths: Iterable[Any] | None, ids: Mapping[Any, str]) -> list[Edge]:
    """The edges, with `rank` k on those that join consecutive nodes of the k-th path; the best rank wins.

    Args:
        edges: of a graph without ranks.
        paths: each has `.nodes`, whose items have `.key`; in either direction.
        ids: key -> id of its node. Keys that the graph does not have are passed over.

    Of parallel edges (x * x) each path takes one that has no rank yet, so that two paths mark both. What leads from a
    leaf to the first node and from the last to the result belongs to the path as well.
    """
    if paths is None:
        return edges
    between: dict[tuple[str, str], list[int]] = {}
    first: dict[str, list[int]] = {}
    last: dict[str, list[int]] = {}
    for i, edge in enumerate(edges):
        if edge.kind != "saved":
            between.setdefault((edge.source, edge.target), []).append(i)
            first.setdefault(edge.target, []).append(i)
            last.setdefault(edge.source, []).append(i)
    ranks: dict[int, int] = {}

    def mark(candidates: list[int], rank: int) -> None:
        if candidates:
            ranks.setdefault(next((i for i in candidates if i not in ranks), candidates[0]), rank)

    for rank, path in enumerate(paths):
        steps = [ids[item.key] for item in path.nodes if item.key in ids]
        for a, b in pairwise(steps):
            mark(between.get((a, b)) or between.get((b, a)) or [], rank)
        if steps:
            forward = len(steps) < 2 or (steps[0], steps[1]) in between
            start, end = (steps[0], steps[-1]) if forward else (steps[-1], steps[0])
            inward, outward = first.get(start, []), last.get(end, [])
            if len(inward) == 1 and edges[inward[0]].source not in first:
                mark(inward, rank)
            if len(outward) == 1 and edges[outward[0]].target not in last:
                mark(outward, rank)
    return [dataclasses.replace(e, rank=ranks[i]) if i in ranks else e for i, e in enumerate(edges)]
