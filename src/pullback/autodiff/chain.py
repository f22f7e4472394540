"""Chains y = f_N(... f_1(x)) that keep few states between forward and backward, and compute the others again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

import pullback.autodiff._recompute as _recompute
from pullback.autodiff._recompute import Part, State, States, Tape, Unit
from pullback.core import autograd
from pullback.core.errors import ArgumentError

SCHEDULES = ("sqrt", "binomial", "none")
_WORKING = 4  # states in work while a stage is recorded: its input, its output and their gradients


# How often, and where: the theory ------------------------------------------------------------------------------------


def _reach(slots: int, repeats: int) -> int:
    """The longest chain whose steps are advanced at most `repeats` times each: C(slots + repeats, slots)."""
    return math.comb(slots + repeats, slots) if repeats >= 0 else 0


def _repeats(length: int, slots: int) -> int:
    r = 0
    while _reach(slots, r) < length:
        r += 1
    return r


def advances(length: int, slots: int) -> int:
    """The least number of steps that are run without recording in order to reverse a chain.

    t = r l - C(s + r, r - 1) for l steps and s kept states (the input among them), where r is the least number with
    l <= C(s + r, s). Each step is run once more with recording.

    Source: Griewank & Walther 2000, doi 10.1145/347837.347846.
    """
    if length < 2:
        return 0
    r = _repeats(length, slots)
    return r * length - math.comb(slots + r, r - 1)


def split(length: int, slots: int) -> int:
    """After how many steps to keep the next state, so that the number of steps run is least; needs slots > 1."""
    r = _repeats(length, slots)
    return min(_reach(slots, r - 1), length - _reach(slots - 1, r - 1))


def positions(length: int, slots: int) -> Iterator[int]:
    """Where states are kept on the way from step 0 to step length - 1, besides state 0."""
    at = 0
    while slots > 1 and length > 1:
        m = split(length, slots)
        at, length, slots = at + m, length - m, slots - 1
        yield at


@dataclass(frozen=True)
class Plan:
    """What a chain costs: `evaluations` of stages in forward and backward, at most `states` kept at a time.

    `groups` are the numbers of stages that are recorded together. A chain without checkpoints evaluates every stage
    once and keeps what all of them save.
    """

    schedule: str
    groups: tuple[int, ...]
    slots: int

    @property
    def stages(self) -> int:
        """The number of stages."""
        return sum(self.groups)

    @property
    def evaluations(self) -> int:
        """How many times a stage is run in one forward and one backward pass."""
        if self.schedule == "none":
            return self.stages
        if self.slots >= len(self.groups):
            return 2 * self.stages - self.groups[-1]
        return self.stages + advances(self.stages, self.slots)  # groups of one stage

    @property
    def states(self) -> int:
        """How many states are kept at most, the input among them."""
        return self.stages if self.schedule == "none" else min(self.slots, len(self.groups))

    def __str__(self) -> str:
        return (
            f"{self.schedule}: {self.stages} stages, {self.evaluations} evaluations "
            f"({self.evaluations / self.stages:.2f} a stage), at most {self.states} states"
        )


def _equal_parts(n: int, parts: int) -> tuple[int, ...]:
    cuts = [round(k * n / parts) for k in range(parts + 1)]
    return tuple(b - a for a, b in itertools.pairwise(cuts))


# Ordinary autograd ---------------------------------------------------------------------------------------------------


class _Kept(States):
    """States kept by the binomial schedule."""

    def __init__(self, units: Sequence[Unit], slots: int) -> None:
        super().__init__(units, "Chain")
        self.slots = slots
        self.kept: dict[int, State] = {}
        self.next = iter(positions(len(units), slots))
        self.due = 0

    def enter(self, i: int, state: State, value: Any) -> None:
        super().enter(i, state, value)
        if i == self.due:
            self.kept[i] = state
            self.due = next(self.next, -1)

    def get(self, i: int) -> State:
        for k in [k for k in self.kept if k > i]:  # backward has passed them
            del self.kept[k]
        start = max(self.kept)
        state = self.kept[start]
        state.check(f"the input of {self.units[start].name}" if start else "the input of the chain")
        free = self.slots - len(self.kept) + 1
        due = {start + p for p in positions(i - start + 1, free)}
        for k in range(start, i):
            with torch.no_grad(), self.around[k].restored():
                state = State.of(self.units[k].again(state.value()))
            if k + 1 in due:
                self.kept[k + 1] = state
        return state


def _run_kept(units: Sequence[Unit], slots: int, x: Any) -> Any:
    """The chain's output; the graph of all units but the last has saved nothing."""
    states = _Kept(units, slots)
    for i, unit in enumerate(units):
        state = State.of(x)
        states.enter(i, state, x)
        last = i == len(units) - 1  # backward begins there: what it saves is needed at once
        x = unit.run(x) if last else Tape(states, i).run(x)
        if not last:
            state.check(f"Chain: the input of {unit.name}")
    return x


# Under torch.func ----------------------------------------------------------------------------------------------------


Bound = tuple[torch.nn.Module, dict[str, Tensor]]  # a stage and the values of its tensors


class _Stretch(Part):
    """Groups of stages as one Function of the input state and of the tensors under differentiation."""

    def __init__(self, groups: Sequence[Sequence[Bound]], slots: int, x: Any) -> None:
        self.groups, self.slots = groups, slots
        self.leaves, self.spec = tree_flatten(x)
        self.moving = [i for i, t in enumerate(self.leaves) if isinstance(t, Tensor)]
        self.live = [
            [[k for k, t in values.items() if t.requires_grad or autograd.is_live(t)] for _, values in group]
            for group in groups
        ]
        self.tensors = [self.leaves[i] for i in self.moving]
        for group, names in zip(groups, self.live, strict=True):
            for (_, values), keys in zip(group, names, strict=True):
                self.tensors += [values[k] for k in keys]
        self.out_spec: Any = None

    def _bind(self, tensors: Sequence[Tensor]) -> tuple[Any, list[list[Bound]]]:
        """The input state and the stages with the given tensors."""
        given = iter(tensors)
        leaves = list(self.leaves)
        for i in self.moving:
            leaves[i] = next(given)
        groups = [
            [(module, values | {k: next(given) for k in keys}) for (module, values), keys in zip(g, n, strict=True)]
            for g, n in zip(self.groups, self.live, strict=True)
        ]
        return tree_unflatten(leaves, self.spec), groups

    def evaluate(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, groups = self._bind(tensors)
        leaves, self.out_spec = tree_flatten(_run_bound(groups, x))
        return tuple(leaves)

    def again(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, groups = self._bind(tensors)
        return tuple(tree_leaves(_run_split(groups, self.slots, x)))


def _run_bound(groups: Iterable[Iterable[Bound]], x: Any) -> Any:
    for module, values in itertools.chain.from_iterable(groups):
        x = _recompute.call_with(module, values, x)
    return x


def _run_split(groups: Sequence[Sequence[Bound]], slots: int, x: Any) -> Any:
    """The output; the last group is recorded, those before it are split as the schedule tells."""
    while len(groups) > 1:
        m = split(len(groups), slots) if slots > 1 else len(groups) - 1
        stretch = _Stretch(groups[:m], slots, x)
        x = tree_unflatten(_recompute.recomputed(stretch, stretch.tensors), stretch.out_spec)
        groups, slots = groups[m:], slots - 1
    return _run_bound(groups, x)


# The container -------------------------------------------------------------------------------------------------------


class _Function(torch.nn.Module):
    """A function as a stage."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Any) -> Any:
        return self.function(x)

    def extra_repr(self) -> str:
        return getattr(self.function, "__qualname__", repr(self.function))


class Chain(torch.nn.Module):
    """y = f_N(... f_2(f_1(x))), keeping only some of the states between the stages for the gradient.

    Backward computes the missing states again. Gradients reach the input, the parameters of stages and whatever tensors
    the stages use, and can be differentiated again.

    Args:
        stages: modules or functions of one argument, or one `torch.nn.Sequential` or list of them. The argument is a
            tensor, or tuples, lists and dicts of tensors: stage i gets what stage i - 1 returned.
        schedule: "sqrt": about sqrt(N) groups of stages; the input of each group is kept, and a group is run once more
            to record it. "binomial": at most `slots` states are kept at a time, with the fewest evaluations that this
            allows. "none": as torch.nn.Sequential. None: "binomial" if slots or memory is given, else "sqrt".
        slots: states kept at a time, the input among them; the default for "binomial" is ceil(log2 N) + 1.
        memory: bytes for the kept states, what one stage saves, and four states in work (a stage's input, output and
            their gradients). The sizes are measured once for each input shape, by one more evaluation; if everything
            fits, nothing is computed twice.

    Random numbers and autocast are the same when a stage runs again; other side effects (BatchNorm's running averages,
    counters) happen again. A stage that writes into its input is refused. The graph is that of plain evaluation.

    Under `torch.func.grad` and the other transforms each stretch is a Function whose derivative runs it again, so
    memory is saved there, too. Plain evaluation instead, correct but without saving: a stage there uses a tensor under
    differentiation that is no parameter or buffer of a module, or forward mode is nested in forward mode. Inside
    `torch.compile` the groups are `torch.utils.checkpoint` regions, each of which keeps its input ("binomial": every
    stage is one), or plain evaluation under a transform; there the compiler decides what it computes again.

    Raises: ArgumentError; NotDifferentiableError in backward where a stage does not do the same again.
    Cost: see `plan`. Keeping a state and random numbers costs about 20 us a stage.
    Source: Griewank & Walther 2000, doi 10.1145/347837.347846 (binomial); Chen et al. 2016, arXiv 1604.06174 (sqrt).
    """

    def __init__(
        self, *stages: Any, schedule: str | None = None, slots: int | None = None, memory: float | None = None
    ) -> None:
        super().__init__()
        if len(stages) == 1 and isinstance(stages[0], (torch.nn.Sequential, torch.nn.ModuleList, list, tuple)):
            stages = tuple(stages[0])
        if not stages:
            raise ArgumentError("Chain: give at least one stage")
        for i, stage in enumerate(stages):
            if not callable(stage):
                raise ArgumentError(f"Chain: stage {i} must be a module or a function; got {type(stage).__name__}")
            self.add_module(str(i), stage if isinstance(stage, torch.nn.Module) else _Function(stage))
        if schedule is None:
            schedule = "sqrt" if slots is None and memory is None else "binomial"
        if schedule not in SCHEDULES:
            raise ArgumentError(f"Chain: schedule must be one of {', '.join(SCHEDULES)}; got {schedule!r}")
        if schedule != "binomial" and (slots is not None or memory is not None):
            raise ArgumentError(f"Chain: slots and memory belong to schedule='binomial'; got schedule={schedule!r}")
        if slots is not None and memory is not None:
            raise ArgumentError("Chain: give slots or memory, not both")
        if slots is not None and (isinstance(slots, bool) or not isinstance(slots, int) or slots < 1):
            raise ArgumentError(f"Chain: slots must be an int >= 1 (the input is one of them); got {slots!r}")
        if memory is not None and not (isinstance(memory, (int, float)) and memory > 0):
            raise ArgumentError(f"Chain: memory must be a positive number of bytes; got {memory!r}")
        self.schedule, self.slots, self.memory = schedule, slots, memory
        self._plans: dict[Any, Plan] = {}
        self._plan: Plan | None = None if memory is not None else self._make_plan()

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, i: int) -> Any:
        return list(self._modules.values())[i]

    def extra_repr(self) -> str:
        """The plan, once it is known."""
        return str(self._plan) if self._plan is not None else f"binomial: {len(self)} stages in {self.memory:g} bytes"

    @property
    def plan(self) -> Plan:
        """What the chain costs; with `memory`, for the input of the last call (or of `measure`)."""
        if self._plan is None:
            raise ArgumentError("Chain: a plan for `memory` needs the sizes of the states; call chain.measure(x) first")
        return self._plan

    def _make_plan(self) -> Plan:
        n = len(self)
        if self.schedule == "none":
            return Plan("none", (1,) * n, n)
        if self.schedule == "sqrt":
            parts = _equal_parts(n, max(1, round(math.sqrt(n))))
            return Plan("sqrt", parts, len(parts))
        return Plan("binomial", (1,) * n, min(n, self.slots or math.ceil(math.log2(n)) + 1))

    def measure(self, x: Any) -> Plan:
        """The plan for inputs like `x`. With `memory` it runs every stage once, on its own, and counts.

        Raises: ArgumentError if not even one state and what one stage saves fit into `memory`.
        """
        if self.memory is None:
            return self.plan
        key = tuple((t.shape, t.dtype) if isinstance(t, Tensor) else t for t in tree_leaves(x))
        if key not in self._plans:
            self._plans[key] = self._fit(x)
        self._plan = self._plans[key]
        return self._plan

    def _fit(self, x: Any) -> Plan:
        states, tapes = [], []
        devices = {t.device for t in tree_leaves(x) if isinstance(t, Tensor) and t.device.type != "cpu"}
        with torch.random.fork_rng(devices=devices):
            for stage in self._modules.values():
                x = State.of(x)
                states.append(sum(t.numel() * t.element_size() for t in x.leaves if isinstance(t, Tensor)))
                requires = [(isinstance(t, Tensor) and _recompute.differentiable(t), False) for t in x.leaves]
                x, saved = _measured(stage, x.value(requires))
                tapes.append(saved)
        n, budget = len(self), self.memory or 0.0
        if sum(tapes) + states[0] <= budget:
            return Plan("none", (1,) * n, n)
        working = max(tapes) + _WORKING * max(states)
        slots = int((budget - working) // max(1, *states))
        if slots < 1:
            raise ArgumentError(
                f"Chain: memory must be at least {working + max(states)} bytes: {max(tapes)} for what one stage saves, "
                f"and {1 + _WORKING} states of {max(states)}; got {budget:g}"
            )
        return Plan("binomial", (1,) * n, min(n, slots))

    def _groups(self, plan: Plan) -> list[list[torch.nn.Module]]:
        stages = iter(self._modules.values())
        return [[next(stages) for _ in range(size)] for size in plan.groups]  # type: ignore[misc]

    def forward(self, x: Any) -> Any:
        """The output for a tensor, or nested tuples, lists and dicts of tensors."""
        if torch.compiler.is_compiling():
            return self._compiled(x)
        if autograd.transforms_active():
            return self._transformed(x)
        if not torch.is_grad_enabled() or self.schedule == "none":
            return self._plainly(x)
        plan = self.measure(x)
        if plan.schedule == "none":
            return self._plainly(x)
        units, first = [], 0
        for group in self._groups(plan):
            units.append(
                Unit(group, f"stage {first}" if len(group) == 1 else f"stage {first} to {first + len(group) - 1}")
            )
            first += len(group)
        return _run_kept(units, plan.slots, x)

    def _plainly(self, x: Any) -> Any:
        for stage in self._modules.values():
            x = stage(x)  # type: ignore[misc]
        return x

    def _transformed(self, x: Any) -> Any:
        if self.schedule == "none" or self._plan is None or autograd.nested_forward_mode():
            return self._plainly(x)
        groups = [[(m, _recompute.held(m)) for m in group] for group in self._groups(self._plan)]
        try:
            return _run_split(groups, self._plan.slots, x)
        except _recompute.Hidden:
            return self._plainly(x)

    def _compiled(self, x: Any) -> Any:
        plan = self._plan
        if plan is None or plan.schedule == "none" or not torch.is_grad_enabled() or autograd.transforms_active():
            return self._plainly(x)
        for group in self._groups(plan):
            x = checkpoint(_in_turn, group, x, use_reentrant=False)
        return x


def _in_turn(stages: Iterable[torch.nn.Module], x: Any) -> Any:
    for stage in stages:
        x = stage(x)
    return x


def _measured(stage: Any, x: Any) -> tuple[Any, int]:
    """The output of a stage and the bytes that it saves besides parameters; its buffers stay as they are."""
    known = {t.untyped_storage().data_ptr() for t in (*stage.parameters(), *stage.buffers())}
    sizes: dict[int, int] = {}

    def count(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            sizes[storage.data_ptr()] = storage.nbytes()
        return t

    copies = {k: b.clone() for k, b in stage.named_buffers()}
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
        y = _recompute.call_with(stage, copies, x)
    return y, sum(sizes.values())
