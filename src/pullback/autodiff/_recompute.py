"""Saved tensors that are dropped and made again: what checkpointed chains and invertible layers share.

In ordinary autograd each part of a chain runs under `torch.autograd.graph.saved_tensors_hooks`. The graph is the one of
plain evaluation, so closures, parameters and derivatives of every order are those of torch; only the saved tensors are
replaced by handles. When the engine asks for one, the part runs again from its input state, which `States` supplies: by
a schedule of kept states, or by the inverse.

`torch.func.grad` and its relatives forbid such hooks. There a part is a `torch.autograd.Function` (`recomputed`) whose
backward runs the part again under `torch.func.vjp`, which is differentiable in its turn.
"""

from __future__ import annotations

import contextlib
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import get_device_states, set_device_states

from pullback.core import autograd
from pullback.core.errors import NotDifferentiableError


class Unit:
    """One part of a chain: modules that run one after the other, with the tensors that they hold now.

    The tensors are remembered because `torch.func.functional_call` lends a module others for the time of one call only,
    and backward comes later.
    """

    def __init__(self, modules: Sequence[torch.nn.Module], name: str) -> None:
        self.modules, self.name = modules, name
        self.values = [held(m) for m in modules]

    def run(self, x: Any) -> Any:
        """The output for the state x."""
        for module in self.modules:
            x = module(x)
        return x

    def again(self, x: Any) -> Any:
        """The output, with the tensors of the first run."""
        for module, values in zip(self.modules, self.values, strict=True):
            now = held(module)
            same = now.keys() == values.keys() and all(now[k] is v for k, v in values.items())
            x = module(x) if same else call_with(module, values, x)
        return x


class Surroundings:
    """Random numbers and autocast as they were when a part ran for the first time."""

    def __init__(self, leaves: Sequence[Any], previous: Surroundings | None) -> None:
        state = torch.get_rng_state()
        shared = previous is not None and torch.equal(previous.rng, state)
        # 5 kB: one copy for all that draw none
        self.rng: Tensor = previous.rng if previous is not None and shared else state
        self.devices, self.device_rng = get_device_states(*leaves)
        kinds = {"cpu"} | {t.device.type for t in leaves if isinstance(t, Tensor)} - {"meta"}
        self.autocast = [
            (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), torch.is_autocast_cache_enabled())
            for kind in sorted(kinds)
        ]

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """A context in which both are as they were."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng(devices=self.devices))
            torch.set_rng_state(self.rng)
            if self.devices:
                set_device_states(self.devices, self.device_rng)
            for kind, dtype, enabled, cached in self.autocast:
                stack.enter_context(torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=cached))
            yield


class State(NamedTuple):
    """The tensors between two parts, without their graph, the versions that they had, and tangents in forward mode."""

    leaves: list[Any]
    spec: TreeSpec
    versions: list[int | None]
    tangents: list[Tensor | None]

    @classmethod
    def of(cls, value: Any) -> State:
        """The state that `value` (nested tuples, lists, dicts of tensors) is."""
        leaves, spec = tree_flatten(value)
        pairs = [forward_ad.unpack_dual(t) if isinstance(t, Tensor) else (t, None) for t in leaves]
        kept = [t.detach() if isinstance(t, Tensor) else t for t, _ in pairs]
        versions = [t._version if isinstance(t, Tensor) else None for t in kept]
        return cls(kept, spec, versions, [_unattached(d) for _, d in pairs])

    def value(self, requires: Sequence[tuple[bool, bool]] | None = None) -> Any:
        """The state as it was, its tensors detached; tensors and tangents require grad as told."""
        leaves = []
        for k, (t, tangent) in enumerate(zip(self.leaves, self.tangents, strict=True)):
            if isinstance(t, Tensor):
                first, second = requires[k] if requires is not None else (False, False)
                t = t.detach().requires_grad_(first)
                if tangent is not None:
                    t = forward_ad.make_dual(t, tangent.detach().requires_grad_() if second else tangent)
            leaves.append(t)
        return tree_unflatten(leaves, self.spec)

    def check(self, what: str) -> None:
        """Refuse if somebody has written into the tensors."""
        for t, version in zip(self.leaves, self.versions, strict=True):
            if isinstance(t, Tensor) and t._version != version:
                raise NotDifferentiableError(
                    f"{what} was changed in place, so it cannot be used to compute gradients; write y = y * 2 instead "
                    f"of y *= 2, use inplace=False in layers, and change an input only after backward"
                )


def _unattached(tangent: Tensor | None) -> Tensor | None:
    # Only where needed: torch's older vmap, under which gradcheck runs forward mode, cannot detach.
    return tangent.detach() if tangent is not None and tangent.requires_grad else tangent


def requirements(value: Any) -> list[tuple[bool, bool]]:
    """For every leaf, whether the tensor and whether its tangent require grad."""
    found = []
    for t in tree_leaves(value):
        pair = forward_ad.unpack_dual(t) if isinstance(t, Tensor) else (None, None)
        found.append((pair[0] is not None and pair[0].requires_grad, pair[1] is not None and pair[1].requires_grad))
    return found


class States(ABC):
    """Supplies the input state of every part, again and again, in any order (backward asks from the last to the first).

    Args:
        units: the parts.
        owner: the container's name, for messages.
    """

    def __init__(self, units: Sequence[Unit], owner: str) -> None:
        self.units, self.owner = units, owner
        self.around: list[Surroundings] = []
        self.requires: list[list[tuple[bool, bool]]] = []
        self.active: weakref.ref[Tape] | None = None  # the tape that was played last: a cycle would outlive backward

    def enter(self, i: int, state: State, value: Any) -> None:
        """Part i is about to run for the first time, from `state`."""
        self.around.append(Surroundings(state.leaves, self.around[-1] if self.around else None))
        self.requires.append(requirements(value))

    @abstractmethod
    def get(self, i: int) -> State:
        """The input state of part i."""


Fact = tuple[torch.Size, torch.dtype, int | None]


class Tape:
    """The saved tensors of part i: dropped in the forward pass, made again by running the part once more."""

    def __init__(self, states: States, i: int) -> None:
        self.states, self.i = states, i
        self.facts: list[Fact] = []
        self.inputs: set[int] = set()
        self.handles: list[weakref.ref[_Handle]] = []
        self.values: weakref.WeakKeyDictionary[_Handle, Tensor] = weakref.WeakKeyDictionary()

    def run(self, value: Any) -> Any:
        """The part's output, with a graph that has saved nothing."""
        self.inputs = _storages(value)
        with torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack):
            return self.states.units[self.i].run(value)

    def _pack(self, t: Tensor) -> _Handle:
        handle = _Handle(self)
        self.facts.append(_fact(t, self.inputs))
        self.handles.append(weakref.ref(handle))
        return handle

    def _unpack(self, handle: _Handle) -> Tensor:
        if handle not in self.values:
            last = self.states.active() if self.states.active is not None else None
            if last is not None:
                last.values.clear()  # only with retain_graph: otherwise the handles have gone with their nodes
            self._play()
            self.states.active = weakref.ref(self)
        return self.values[handle]

    def _play(self) -> None:
        states, i = self.states, self.i
        count = 0
        value = states.get(i).value(states.requires[i])
        inputs = _storages(value)

        def collect(t: Tensor) -> None:
            nonlocal count
            if count == len(self.facts):
                raise self._changed(count, None)
            if not _fits(self.facts[count], fact := _fact(t, inputs)):
                raise self._changed(count, fact)
            handle = self.handles[count]()
            if handle is not None:
                self.values[handle] = forward_ad.unpack_dual(t.detach()).primal
            count += 1

        with (
            torch.enable_grad(),
            states.around[i].restored(),
            torch.autograd.graph.saved_tensors_hooks(collect, _unused),
        ):
            states.units[i].again(value)
        if count < len(self.facts):
            raise self._changed(count, None)

    def _changed(self, k: int, fact: Fact | None) -> NotDifferentiableError:
        name = f"{self.states.owner}: {self.states.units[self.i].name}"
        if fact is None:
            return NotDifferentiableError(
                f"{name} saved another number of tensors when it was run again for the gradient; it must do the same "
                f"at every call: no counters, no switches that change between forward and backward"
            )
        was = self.facts[k]
        if was[:2] == fact[:2]:
            return NotDifferentiableError(
                f"{name} uses a parameter of shape {tuple(was[0])} that was changed in place between forward and "
                f"backward; call the optimizer after backward"
            )
        return NotDifferentiableError(
            f"{name} gave a tensor of shape {tuple(fact[0])} and {fact[1]} when it was run again for the gradient, "
            f"{tuple(was[0])} and {was[1]} before; it must do the same at every call"
        )


class _Handle:
    """Stands for a saved tensor in the graph."""

    __slots__ = ("__weakref__", "tape")

    def __init__(self, tape: Tape) -> None:
        self.tape = tape


def _storages(value: Any) -> set[int]:
    return {t.untyped_storage()._cdata for t in tree_leaves(value) if isinstance(t, Tensor)}


def _fact(t: Tensor, inputs: set[int]) -> Fact:
    """Shape and dtype of a saved tensor, and its version if it is (a view of) a parameter: `inputs` are storages."""
    base = t if t._base is None else t._base
    fixed = base.is_leaf and base.requires_grad and t.untyped_storage()._cdata not in inputs
    return t.shape, t.dtype, t._version if fixed else None


def _fits(was: Fact, now: Fact) -> bool:
    return was[:2] == now[:2] and (None in (was[2], now[2]) or was[2] == now[2])


def _unused(packed: Any) -> Tensor:
    raise AssertionError("a graph made only to collect its saved tensors was used; please report")


# Under torch.func ---------------------------------------------------------------------------------------------------


class Hidden(Exception):
    """A part uses a tensor under differentiation that is neither its input nor a parameter of a module."""


class _Watch(TorchFunctionMode):
    """Raises `Hidden` where an operation takes a live tensor that is not known."""

    def __init__(self, known: Sequence[Any]) -> None:
        super().__init__()
        self.known = list(known)
        self.seen: weakref.WeakValueDictionary[int, Tensor] = weakref.WeakValueDictionary()
        self._note(known)

    def _note(self, values: Any) -> None:
        for t in tree_leaves(values):
            if isinstance(t, Tensor):
                self.seen[id(t)] = t

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and (t.requires_grad or autograd.is_live(t)) and self.seen.get(id(t)) is not t:
                raise Hidden
        out = func(*args, **(kwargs or {}))
        self._note(out)
        return out


class Part(ABC):
    """A differentiable map of tensors that says how its pullback is made again from what it keeps.

    `evaluate` gives the outputs, `keep` says what is saved, `pullback` makes the gradients from that. `again` gives the
    outputs in ordinary torch, whose parts may be `recomputed` in turn.
    """

    around: Surroundings | None = None

    @abstractmethod
    def evaluate(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs."""

    @abstractmethod
    def again(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The outputs, as a composition that may be differentiated."""

    def keep(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        """What is saved: the inputs."""
        return inputs

    def pullback(self, kept: Sequence[Tensor], gs: Sequence[Tensor], wanted: Sequence[int]) -> Sequence[Tensor]:
        """Gradients in the inputs numbered `wanted`, from what was saved and those in the differentiable outputs."""
        return torch.func.vjp(self.function(kept, wanted), *(kept[i] for i in wanted))[1](tuple(gs))

    def function(self, inputs: Sequence[Tensor], moving: Sequence[int]) -> Callable[..., tuple[Tensor, ...]]:
        """The differentiable outputs as a function of the inputs numbered `moving`."""

        def function(*values: Tensor) -> tuple[Tensor, ...]:
            every = list(inputs)
            for i, v in zip(moving, values, strict=True):
                every[i] = v
            with self.surroundings():
                return tuple(t for t in self.again(every) if differentiable(t))

        return function

    def surroundings(self) -> Any:
        """A context with the random numbers and autocast of the first evaluation."""
        return contextlib.nullcontext() if self.around is None else self.around.restored()


def differentiable(t: Tensor) -> bool:
    """Whether tensors of this dtype have derivatives."""
    return t.is_floating_point() or t.is_complex()


class _Recomputed(torch.autograd.Function):
    """outputs = part(*tensors)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(part: Part, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        part.around = Surroundings(tensors, None)
        with _Watch(tensors):
            # a Function must not return its inputs or views of them
            return tuple(
                t.clone() if t._is_view() or any(t is s for s in tensors) else t for t in part.evaluate(tensors)
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.part, *tensors = inputs
        ctx.mark_non_differentiable(*(t for t in output if not differentiable(t)))
        ctx.wanted = [differentiable(t) for t in output]
        ctx.moving = [differentiable(t) for t in tensors]
        ctx.save_for_backward(*ctx.part.keep(tensors, output))
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        # The pullback of torch.func.vjp runs when its level is over; any operation lets a saved tensor forget it.
        kept = [t.view_as(t) for t in ctx.saved_tensors]
        wanted = [i for i, needed in enumerate(ctx.needs_input_grad[1:]) if needed and ctx.moving[i]]
        pulled = ctx.part.pullback(kept, [g for g, w in zip(gs, ctx.wanted, strict=True) if w], wanted)
        grads: list[Tensor | None] = [None] * len(ctx.moving)
        for i, g in zip(wanted, pulled, strict=True):
            grads[i] = g
        return (None, *grads)

    @staticmethod
    def jvp(ctx: Any, _part: None, *tangents: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        inputs = ctx.saved_tensors
        moving = [i for i, t in enumerate(tangents) if t is not None and differentiable(inputs[i])]
        steps = tuple(t for i in moving if (t := tangents[i]) is not None)
        pushed = iter(torch.func.jvp(ctx.part.function(inputs, moving), tuple(inputs[i] for i in moving), steps)[1])
        return tuple(next(pushed) if w else None for w in ctx.wanted)


def recomputed(part: Part, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """part(*tensors) under torch.func: its pullback runs the part again. Raises `Hidden`."""
    return _Recomputed.apply(part, *tensors)


def held(module: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters and floating point buffers of a module by name."""
    return dict(module.named_parameters()) | {k: b for k, b in module.named_buffers() if differentiable(b)}


def call_with(module: torch.nn.Module, tensors: Mapping[str, Tensor], *args: Any) -> Any:
    """module(*args) with other values for its tensors."""
    return torch.func.functional_call(module, dict(tensors), args) if tensors else module(*args)
