"""Who made which tensor: what is known of every tensor that a forward computation has touched."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction

from pullback.core import nodes
from pullback.graphs.model import Value
from pullback.graphs.trace.modules import Path, Stack, common_path
from pullback.graphs.trace.names import structure, value, value_of
from pullback.graphs.trace.numbers import is_finite
from pullback.graphs.trace.saved import storage_of

NOT = "not differentiable"

# How a tensor is known before it is used: it came as an argument, or a module or the function's surroundings hold it.
Known = dict[int, tuple[str, str, Tensor]]  # id -> (name, "argument", "parameter", "buffer" or "outside", tensor)


Key = tuple[Any, int] | Tensor


@dataclass(slots=True)
class Op:
    """A node in the making."""

    label: str
    kind: str
    group: Path = ()
    values: list[Value] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    flags: set[str] = field(default_factory=set)
    source: str = ""
    name: str = ""  # of a custom Function's class: its autograd node is this + "Backward"
    live: bool = False  # some result requires grad
    region: bool = False  # results are numbered when they are first used outside
    held: bool = False  # nothing made it and it is no argument, so it is drawn beside who uses it


@dataclass(slots=True)
class Link:
    """An edge in the making. `key` is the gradient edge of the tensor: (autograd node, result), or the leaf itself."""

    source: int
    output: int
    target: int
    input: int
    reason: str = ""
    needs: bool = False  # the tensor requires grad
    key: Key | None = None


@dataclass(slots=True)
class Entry:
    """A known tensor. Holding it keeps its id from being used again."""

    tensor: Tensor
    op: int
    output: int  # -1: a result of a region that nobody outside has used yet
    version: int
    reason: str = ""
    finite: bool = True


def version_of(t: Tensor) -> int:
    """How often the tensor has been written to; 0 where torch does not count."""
    try:
        return t._version
    except RuntimeError:  # made in inference mode
        return 0


def has_gradient(t: Tensor) -> bool:
    """Whether a gradient may flow to `t`, also through the wrappers of torch.func."""
    while not t.requires_grad:
        inner = nodes.unwrapped(t)
        if inner is t:
            return False
        t = inner
    return True


class Origins:
    """The nodes and edges made so far, and the tensors that came out of them.

    Args:
        known: what is known before the run, see `Known`.
        numbers: look for the first nan or inf.
    """

    def __init__(self, known: Known, numbers: bool) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self.links: list[Link] = []
        self.owner: dict[Any, int] = {}  # autograd node -> op
        self.known = known
        self.stack: Stack | None = None
        self._entries: dict[int, Entry] = {}
        self._memory: dict[Any, Entry] = {}  # storage -> last tensor made on it
        self._written: dict[Any, int] = {}  # storage -> op that wrote to it last
        self._custom: list[int] = []  # custom Functions without a known result
        self._numbers = numbers

    def find(self, t: Tensor, version: int | None = None) -> Entry:
        """The entry of a tensor; a tensor that nobody announced gets one from what torch knows about it.

        `version` is the one that was read, if it has been written to since.
        """
        entry = self._entries.get(id(t))
        version = version_of(t) if version is None else version
        if entry is None:
            entry = self._unannounced(t)
        elif entry.version != version:  # written to, perhaps through a view
            writer = self._written.get(storage_of(t)[0])
            if writer is not None:
                entry = Entry(t, writer, 0, version, finite=entry.finite)
            entry.version = version
            self._entries[id(t)] = entry
        return entry

    def _unannounced(self, t: Tensor) -> Entry:
        inner = nodes.unwrapped(t)
        if inner is not t:
            found = self.find(inner)
            return self._enter(t, found.op, found.output, found.reason)
        known = self.known.get(id(t))
        if known is not None and known[2] is t:
            return self._outside(t, known[0], known[1])
        if t.grad_fn is not None:
            return self._adopt(t)
        shared = self._memory.get(storage_of(t)[0])
        if shared is not None:
            return self._enter(t, shared.op, self.output_of(shared), shared.reason)
        return self._outside(t, "", "outside")

    def _outside(self, t: Tensor, label: str, how: str) -> Entry:
        """A node for a tensor that was there before."""
        parameter = how == "parameter" or isinstance(t, nn.Parameter)
        kind = "parameter" if parameter else "leaf" if t.requires_grad else "input"
        op = Op(label or ("tensor" if kind == "input" else kind), kind, values=[value_of(t)], live=t.requires_grad)
        op.held = how != "argument"
        if how == "buffer":
            op.details["held as"] = "buffer"
        index = self._add(op)
        return self._enter(t, index, 0, finite=self._is_finite(t))

    def _adopt(self, t: Tensor) -> Entry:
        """A tensor made where no torch function was seen (C++, NumPy inside a Function): follow its autograd graph."""
        goal, output = nodes.root(t)
        stack = [goal]
        while stack:
            node = stack[-1]
            if node in self.owner:
                stack.pop()
                continue
            leaf = nodes.variable(node)
            if leaf is not None:
                entry = self.find(leaf)
                self.owner.setdefault(node, entry.op)
                continue
            missing = [n for n, _ in nodes.inputs(node) if n is not None and n not in self.owner]
            if missing:
                stack += missing
                continue
            stack.pop()
            region = next((i for i in reversed(self._custom) if self._is_result_of(self.ops[i], node)), None)
            if region is not None:
                self.ops[region].live = True
                self._custom.remove(region)
                self.owner[node] = region
                continue
            custom = isinstance(node, BackwardCFunction)
            kind = "operator" if nodes.operator(node) is not None else "function" if custom else "operation"
            op = Op(structure(nodes.name(node)), kind, self.stack.path if self.stack else (), live=True)
            op.values = [value(*r) for r in nodes.results(node)]
            index = self._add(op)
            self.owner[node] = index
            for i, (child, k) in enumerate(nodes.inputs(node)):
                if child is not None:
                    source = self.owner[child]
                    which = 0 if k >= len(self.ops[source].values) else k
                    self.links.append(Link(source, which, index, i, needs=True, key=(child, k)))
        index = self.owner[goal]
        if self.ops[index].region:
            return self._enter(t, index, -1)
        return self._enter(t, index, min(output, max(len(self.ops[index].values) - 1, 0)))

    def _is_result_of(self, op: Op, node: Any) -> bool:
        return not op.values and node.name() == f"{op.name}Backward"

    def _made(self, index: int, results: list[Tensor], changed: list[Tensor]) -> bool:
        """Enter the results of an op and its autograd nodes; whether their numbers are finite."""
        op = self.ops[index]
        sound = True
        for i, t in enumerate(results):
            differentiable = t.is_floating_point() or t.is_complex()
            reason = ""
            if op.live and not has_gradient(t):
                reason = NOT if differentiable else "integer"
            finite = self._is_finite(t)
            sound = sound and finite
            self._enter(t, index, i, reason, finite)
            if any(t is c for c in changed):
                self._written[storage_of(t)[0]] = index
            self.claim(t, index)
        return sound

    def claim(self, t: Tensor, index: int) -> None:
        """The autograd nodes behind `t` that nobody owns yet were made by op `index`."""
        while (inner := nodes.unwrapped(t)) is not t:
            t = inner
        stack = [t.grad_fn]
        while stack:
            node = stack.pop()
            if node is not None and node not in self.owner and nodes.variable(node) is None:
                self.owner[node] = index
                stack += [n for n, _ in nodes.inputs(node)]

    def _enter(self, t: Tensor, op: int, output: int, reason: str = "", finite: bool = True) -> Entry:
        entry = self._entries[id(t)] = Entry(t, op, output, version_of(t), reason, finite)
        inner = nodes.unwrapped(t)
        if inner is not t:
            self._enter(inner, op, output, reason, finite)
        else:
            self._memory[storage_of(t)[0]] = entry
        return entry

    def output_of(self, entry: Entry) -> int:
        """Which result of its op an entry is; results of regions get their number here."""
        if entry.output < 0:
            op = self.ops[entry.op]
            entry.output = len(op.values)
            op.values.append(value_of(entry.tensor))
            if has_gradient(entry.tensor):
                op.live = True
                self.claim(entry.tensor, entry.op)
                made_by = entry.tensor.grad_fn
                if made_by is not None and nodes.operator(made_by) is not None:
                    op.details["operator"] = nodes.name(made_by)
        return entry.output

    def _add(self, op: Op) -> int:
        self.ops.append(op)
        return len(self.ops) - 1

    def _is_finite(self, t: Tensor) -> bool:
        if not self._numbers or t.is_meta or not (t.is_floating_point() or t.is_complex()):
            return True
        return is_finite(t) if nodes.unwrapped(t) is t else True


def group_leaves(ops: list[Op], links: list[Link]) -> None:
    """Put what only one module uses, and nothing made, into that module's group."""
    users: dict[int, list[Path]] = {}
    for link in links:
        users.setdefault(link.source, []).append(ops[link.target].group)
    for index, op in enumerate(ops):
        if op.held and index in users:
            op.group = common_path(users[index])
