"""Chains of invertible layers that keep only their output for the gradient."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pullback.autodiff._recompute as _recompute
from pullback.autodiff._recompute import Part, State, States, Surroundings, Tape, Unit
from pullback.autodiff.invertible.layer import Invertible
from pullback.autodiff.invertible.transform import OperatorLayer
from pullback.core import autograd
from pullback.core.errors import ArgumentError
from pullback.core.operator import LinearOperator

Values = dict[str, Tensor]


class _Inverse(torch.nn.Module):
    """The inverse of a layer as a module, so that it can be called with other values for its tensors."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, y: Tensor) -> Tensor:
        return self.layer.inverse(y)


def _invert(layer: Any, values: Values, y: Tensor) -> Tensor:
    now = _recompute.held(layer)
    if all(now[k] is v for k, v in values.items()):
        return layer.inverse(y)
    return _recompute.call_with(_Inverse(layer), {f"layer.{k}": v for k, v in values.items()}, y)


class _Inverted(States):
    """States computed from the output by the inverses; those of `kept` are exact."""

    def __init__(self, units: Sequence[Unit], keep_every: int | None) -> None:
        super().__init__(units, "Reversible")
        self.keep_every = keep_every
        self.kept: dict[int, State] = {}
        self.output: State | None = None
        self.current: tuple[int, State] | None = None

    def enter(self, i: int, state: State, value: Any) -> None:
        super().enter(i, state, value)
        if self.keep_every is not None and i and i % self.keep_every == 0:
            self.kept[i] = state

    def get(self, i: int) -> State:
        assert self.output is not None, "backward before the end of forward; please report"
        known = {len(self.units): self.output} | self.kept
        if self.current is not None:
            known[self.current[0]] = self.current[1]
        j = min(k for k in known if k >= i)
        state = known[j]
        state.check("the output of Reversible" if j == len(self.units) else f"the input of {self.units[j].name}")
        for k in range(j - 1, i - 1, -1):
            unit = self.units[k]
            with torch.no_grad(), self.around[k].restored():
                state = State.of(_invert(unit.modules[0], unit.values[0], state.value()))
        self.current = (i, state)
        return state


class _Segment(Part):
    """Layers as one Function, which keeps its output and the tensors under differentiation."""

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = layers
        self.values = [_recompute.held(layer) for layer in layers]
        self.live = [[k for k, t in v.items() if t.requires_grad or autograd.is_live(t)] for v in self.values]
        self.tensors = [v[k] for v, keys in zip(self.values, self.live, strict=True) for k in keys]
        self.rng: list[Surroundings] = []

    def _bind(self, tensors: Sequence[Tensor]) -> list[Values]:
        given = iter(tensors)
        return [v | {k: next(given) for k in keys} for v, keys in zip(self.values, self.live, strict=True)]

    def evaluate(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x, self.rng = tensors[0], []
        for layer, values in zip(self.layers, self._bind(tensors[1:]), strict=True):
            self.rng.append(Surroundings([x], self.rng[-1] if self.rng else None))
            x = _recompute.call_with(layer, values, x)
        return (x,)

    def again(self, tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
        x = tensors[0]
        for layer, values in zip(self.layers, self._bind(tensors[1:]), strict=True):
            x = _recompute.call_with(layer, values, x)
        return (x,)

    def keep(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return [outputs[0], *inputs[1:]]

    def pullback(self, kept: Sequence[Tensor], gs: Sequence[Tensor], wanted: Sequence[int]) -> list[Tensor]:
        y, g = kept[0], gs[0]
        grads: list[list[Tensor]] = []
        every = list(zip(self.layers, self._bind(kept[1:]), self.live, self.rng, strict=True))
        for layer, values, keys, rng in reversed(every):
            with rng.restored():
                y = _invert(layer, values, y)

            def function(
                x: Tensor, *tensors: Tensor, layer: Any = layer, values: Values = values, keys: list[str] = keys
            ) -> Tensor:
                return _recompute.call_with(layer, values | dict(zip(keys, tensors, strict=True)), x)

            with rng.restored():
                g, *rest = torch.func.vjp(function, y, *(values[k] for k in keys))[1](g)
            grads.append(rest)
        found = [g, *itertools.chain.from_iterable(reversed(grads))]
        return [found[i] for i in wanted]


class Reversible(Invertible):
    """y = f_N(... f_1(x)) for invertible layers, keeping only y: memory does not grow with depth.

    Backward computes the input of each layer from its output, and runs the layer once more for the gradient. Gradients
    reach the input, the parameters and whatever tensors the layers use, and can be differentiated again.

    Args:
        layers: `Invertible` modules, other modules with a method `inverse(y)`, linear operators (as `OperatorLayer`),
            or one `torch.nn.Sequential` or list of them.
        keep_every: also keep the input of every k-th layer. The inverse starts anew from these exact states, so that
            its rounding errors do not pile up; None keeps none.

    Random numbers and autocast are the same when a layer runs again; other side effects (BatchNorm's running averages)
    happen again, and the inverse of a layer in training mode must not depend on them. Do not write into the output
    before backward: that is an error. Whether the inverses reconstruct is not checked here: see `check_inverse`.

    Under `torch.func.grad` and the other transforms the layers are one Function whose derivative inverts them, so
    memory is saved there, too. Plain evaluation instead, correct but without saving: a layer there uses a tensor under
    differentiation that is no parameter or buffer of a module, or forward mode is nested in forward mode. Inside
    `torch.compile` the layers are `torch.utils.checkpoint` regions, which keep their inputs.

    Raises: ArgumentError for a layer without an inverse.
    Cost: forward once; backward adds one inverse and one more forward of every layer.
    Source: Gomez et al. 2017, arXiv 1707.04585.
    """

    def __init__(self, *layers: Any, keep_every: int | None = None) -> None:
        super().__init__()
        if len(layers) == 1 and isinstance(layers[0], (torch.nn.Sequential, torch.nn.ModuleList, list, tuple)):
            layers = tuple(layers[0])
        if not layers:
            raise ArgumentError("Reversible: give at least one layer")
        if keep_every is not None and (
            isinstance(keep_every, bool) or not isinstance(keep_every, int) or keep_every < 1
        ):
            raise ArgumentError(f"Reversible: keep_every must be an int >= 1 or None; got {keep_every!r}")
        for i, layer in enumerate(layers):
            if isinstance(layer, LinearOperator):
                layer = OperatorLayer(layer)
            if not isinstance(layer, torch.nn.Module) or not callable(getattr(layer, "inverse", None)):
                raise ArgumentError(
                    f"Reversible: layer {i}, {type(layer).__name__}, has no method inverse(y); put it inside of a "
                    f"coupling, AdditiveCoupling(net), or use Chain, which needs no inverses"
                )
            self.add_module(str(i), layer)
        self.keep_every = keep_every

    def __len__(self) -> int:
        return len(self._modules)

    def __getitem__(self, i: int) -> Any:
        return self._layers()[i]

    def _layers(self) -> list[Any]:
        return list(self._modules.values())

    def inverse(self, y: Tensor) -> Tensor:
        """The x with f(x) = y, in plain differentiable torch."""
        for layer in reversed(self._layers()):
            y = layer.inverse(y)
        return y

    def log_det(self, x: Tensor) -> Tensor:
        """The sum over the layers, in plain differentiable torch (its memory grows with depth)."""
        total = None
        for layer in self._layers():
            term = layer.log_det(x)
            total = term if total is None else total + term
            x = layer(x)
        assert total is not None, "a container without layers; please report"
        return total

    def forward(self, x: Tensor) -> Tensor:
        """The output."""
        layers = self._layers()
        if torch.compiler.is_compiling():
            if not torch.is_grad_enabled() or autograd.transforms_active():
                return _plainly(layers, x)
            for layer in layers:
                x = checkpoint(layer, x, use_reentrant=False)
            return x
        if autograd.transforms_active():
            return self._transformed(layers, x)
        if not torch.is_grad_enabled():
            return _plainly(layers, x)
        units = [Unit([layer], f"layer {i}, {type(layer).__name__}") for i, layer in enumerate(layers)]
        states = _Inverted(units, self.keep_every)
        for i, unit in enumerate(units):
            state = State.of(x)
            states.enter(i, state, x)
            x = Tape(states, i).run(x)
            state.check(f"Reversible: the input of {unit.name}")
        states.output = State.of(x)
        return x

    def _transformed(self, layers: list[Any], x: Tensor) -> Tensor:
        if autograd.nested_forward_mode():
            return _plainly(layers, x)
        start, step = x, self.keep_every or len(layers)
        try:
            for first in range(0, len(layers), step):
                segment = _Segment(layers[first : first + step])
                (x,) = _recompute.recomputed(segment, [x, *segment.tensors])
        except _recompute.Hidden:
            return _plainly(layers, start)
        return x


def _plainly(layers: Sequence[Any], x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x
