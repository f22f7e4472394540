"""Invertible layers: they invert, and gradients from reconstructed inputs are those of plain evaluation."""

import weakref

import pytest
import torch
from torch import nn

import pullback as pb
from pullback.autodiff.invertible import (
    ActNorm,
    AdditiveCoupling,
    AffineCoupling,
    FourierLayer,
    Invertible,
    InvertibleConv1x1,
    OperatorLayer,
    Orthogonal,
    Permutation,
    Reversible,
    Squeeze,
    check_inverse,
)
from pullback.core.errors import ArgumentError, DtypeError, NotDifferentiableError, ShapeError


class Net(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.first, self.second = nn.Conv2d(inputs, 3, 3, padding=1), nn.Conv2d(3, outputs, 1)

    def forward(self, x):
        return self.second(torch.tanh(self.first(x)))


def randomised(layer):
    for p in layer.parameters():
        nn.init.normal_(p, std=0.3)
    return layer


LAYERS = {
    "additive": lambda: AdditiveCoupling(Net(2, 2)),
    "additive, swapped": lambda: AdditiveCoupling(Net(2, 2), swap=True),
    "affine": lambda: AffineCoupling(Net(2, 4)),
    "affine along rows": lambda: AffineCoupling(lambda x: torch.cat((x, x.sin()), -1), axis=-1, swap=True, bound=0.5),
    "orthogonal": lambda: Orthogonal(4),
    "conv1x1": lambda: randomised(InvertibleConv1x1(4)),
    "actnorm": lambda: randomised(ActNorm(4)),
    "permutation": lambda: Permutation([2, 0, 3, 1]),
    "reverse": lambda: Permutation(4, axis=3),
    "fourier": lambda: randomised(FourierLayer((4, 4))),
    "fourier, odd": lambda: randomised(FourierLayer(3)),
    "wavelet": lambda: OperatorLayer(pb.DWT2D((4, 4), wavelet="db2")),
    "biorthogonal": lambda: OperatorLayer(pb.DWT2D((4, 4), wavelet="bior2.2")),
    "scaled": lambda: OperatorLayer(3.0 * pb.Roll((4, 4), axis=0)),
    "squeeze": lambda: Squeeze(2),
}
same = torch.testing.assert_close


class Sloppy(AdditiveCoupling):
    def inverse(self, y):
        return super().inverse(y) + 1e-3


def layers():
    names = ("additive", "affine", "orthogonal", "conv1x1", "additive, swapped", "fourier", "wavelet", "actnorm")
    return [LAYERS[name]().double() for name in names]


def image(n=2, size=4):
    return torch.randn(n, 4, size, size, dtype=torch.float64)


def loss(f):
    return lambda x: f(x).sin().square().sum()


@pytest.mark.parametrize("name", LAYERS)
def test_layer(name):
    layer = LAYERS[name]().double()
    x = torch.randn(2, 4, 4, 3 if "odd" in name else 4, dtype=torch.float64)
    assert check_inverse(layer, x).total < 1e-13
    same(layer(layer.inverse(layer(x))), layer(x))
    if name not in ("wavelet", "biorthogonal", "scaled", "squeeze"):
        assert layer.log_det(x[:0]).shape == (0,) and layer.inverse(layer(x[:0])).shape == x[:0].shape
    one = x[:1, :, :2, :] if name not in ("fourier", "wavelet", "biorthogonal", "scaled") else x[:1, :1]
    if name not in ("biorthogonal",):
        J = torch.func.jacrev(layer)(one).reshape(one.numel(), -1)
        same(layer.log_det(one), torch.linalg.slogdet(J).logabsdet[None])
        assert layer.log_det(x).shape == (2,)
    y, y32 = layer(x), layer.float()(x.float())
    assert y32.dtype == torch.float32
    same(y32.double(), y, rtol=1e-4, atol=1e-5)
    kind = torch.autograd.gradcheck(layer.double().inverse, x[:1].clone().requires_grad_(), fast_mode=True)
    assert kind


@pytest.mark.parametrize("keep_every", [None, 1, 3])
def test_gradients_are_those_of_plain_evaluation(keep_every):
    net = Reversible(layers(), keep_every=keep_every)
    plain = nn.Sequential(*net)
    x = image().requires_grad_()
    wanted = [x, *net.parameters()]

    def orders(f):
        # The leaf x is also used beside the network.
        first = torch.autograd.grad(loss(f)(x) + x.cos().sum(), wanted, create_graph=True)
        return first, torch.autograd.grad(sum(g.sin().sum() for g in first), wanted)

    for ours, theirs in zip(orders(net), orders(plain), strict=True):
        for a, b in zip(ours, theirs, strict=True):
            same(a, b, rtol=1e-9, atol=1e-11)


def test_gradcheck_of_both_orders_and_modes():
    net = Reversible(layers()[:3])
    x = image(1, 2)[:, :, :1].requires_grad_()
    assert torch.autograd.gradcheck(
        net, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert torch.autograd.gradgradcheck(net, x, check_fwd_over_rev=True, check_rev_over_rev=True)


@pytest.mark.parametrize("keep_every", [None, 2])
def test_transforms(keep_every):
    net = Reversible(layers()[:5], keep_every=keep_every)
    plain, x = nn.Sequential(*net), image(1, 2)
    inverses = []
    net[4].inverse = lambda y, known=net[4].inverse: (inverses.append(1), known(y))[1]
    f, f0 = loss(net), loss(plain)
    g = torch.func.grad(f)(x)
    assert len(inverses) == 1  # memory is saved there, too
    same(g, torch.func.grad(f0)(x))
    hessian = torch.func.hessian(f0)(x)
    for outer, inner in (("jacfwd", "jacrev"), ("jacrev", "jacrev"), ("jacfwd", "jacfwd")):
        same(getattr(torch.func, outer)(getattr(torch.func, inner)(f))(x), hessian)
    xs = image(6, 2)[:, None]
    same(torch.func.vmap(torch.func.grad(f))(xs), torch.func.vmap(torch.func.grad(f0))(xs))
    p = {k: v.detach() * 1.1 for k, v in net.named_parameters()}
    ours, theirs = (
        torch.func.grad(lambda p, m=m: torch.func.functional_call(m, p, (x,)).square().sum())(p) for m in (net, plain)
    )
    for k in p:
        same(ours[k], theirs[k])


@pytest.mark.slow
def test_compile():
    net, x = Reversible(layers()[:4]), image(1, 2).requires_grad_()
    plain = nn.Sequential(*net)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    same(torch.autograd.grad(loss(compiled)(x), x), torch.autograd.grad(loss(plain)(x), x))
    g = torch.compile(torch.func.grad(loss(net)), fullgraph=True, backend="aot_eager")(x.detach())
    same(g, torch.func.grad(loss(plain))(x.detach()))


def test_tensors_that_nets_close_over_get_their_gradients():
    w = torch.randn(2, 2, dtype=torch.float64, requires_grad=True)
    net = Reversible(*[AdditiveCoupling(lambda x: torch.tanh(x @ w), swap=k % 2 > 0) for k in range(4)])
    plain, x = nn.Sequential(*net), torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    for a, b in zip(*(torch.autograd.grad(loss(f)(x), (x, w)) for f in (net, plain)), strict=True):
        same(a, b)
    totals = [torch.func.grad(loss(f))(x.detach()).sum() for f in (net, plain)]
    same(*(torch.autograd.grad(t, w) for t in totals))


def test_only_the_output_lives_until_backward():
    made, inverses = [], []

    class Noted(AdditiveCoupling):
        def forward(self, x):
            y = super().forward(x)
            made.append(weakref.ref(y))
            return y

        def inverse(self, y):
            inverses.append(1)
            return super().inverse(y)

    def run(**kwargs):
        made.clear()
        net = Reversible([Noted(torch.tanh) for _ in range(12)], **kwargs)
        y = net(torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
        return y, net

    y, net = run()
    assert sum(r() is not None for r in made) == 1
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        net(torch.randn(3, 4, dtype=torch.float64, requires_grad=True))
    assert not saved  # nothing is left for anybody else to save
    y.sum().backward()
    assert len(inverses) == 12  # each layer is inverted once


def test_keep_every_starts_the_inverse_anew():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    nets = [Sloppy(torch.tanh, swap=k % 2 > 0) for k in range(12)]
    (exact,) = torch.autograd.grad(loss(nn.Sequential(*nets))(x), x)
    errors = []
    for every in (None, 4, 1):
        (g,) = torch.autograd.grad(loss(Reversible(nets, keep_every=every))(x), x)
        errors.append(float((g - exact).abs().max()))
    assert errors[0] > 1.5 * errors[1] > 3 * errors[2] > 0


def test_random_numbers_are_the_same_again():
    nets = [nn.Sequential(nn.Dropout(0.5), nn.Tanh()) for _ in range(6)]  # not linear: the states matter
    net = Reversible(*[AdditiveCoupling(f, swap=k % 2 > 0) for k, f in enumerate(nets)])
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    grads = []
    for f in (net, nn.Sequential(*net)):
        torch.manual_seed(3)
        grads.append(torch.autograd.grad(loss(f)(x), x)[0])
        torch.manual_seed(3)
        grads.append(torch.func.grad(loss(f))(x.detach()))
    for g in grads[1:]:
        same(g, grads[0])
    assert check_inverse(net, x.detach()).total < 1e-14


def test_complex_input():
    op = pb.FFT2D((4, 4))
    net = Reversible(op, FourierLayer((4, 4)).double(), AdditiveCoupling(lambda x: x * x), op.H)
    plain = nn.Sequential(*net)
    x = torch.randn(1, 2, 4, 4, dtype=torch.complex128, requires_grad=True)
    total = lambda f: f(x).abs().square().sum()  # noqa: E731
    same(torch.autograd.grad(total(net), x), torch.autograd.grad(total(plain), x))
    with pytest.raises(DtypeError, match="use FourierLayer"):
        net(x.real.detach())


def test_containers_nest():
    inner = Reversible(layers()[:2])
    net, plain = Reversible(inner, Orthogonal(4).double()), nn.Sequential(*inner, nn.Identity())
    x = image().requires_grad_()
    same(torch.autograd.grad(loss(net)(x), x), torch.autograd.grad(loss(lambda x: net[1](plain(x)))(x), x))
    same(net.inverse(net(x)), x)
    same(net.log_det(x), inner.log_det(x))


def test_what_has_no_inverse_or_changes_is_refused():
    with pytest.raises(ArgumentError, match=r"layer 1, Linear, has no method inverse.*AdditiveCoupling"):
        Reversible(Permutation(4), nn.Linear(4, 4))
    with pytest.raises(ArgumentError, match="at least one layer"):
        Reversible()
    with pytest.raises(ArgumentError, match="keep_every must be"):
        Reversible(Permutation(4), keep_every=0)
    for op in (pb.Gradient((4, 4)), pb.Diagonal(torch.arange(1.0, 5)), pb.DWT(5)):
        with pytest.raises(ArgumentError, match="no inverse is known"):
            OperatorLayer(op)
    net, x = Reversible(layers()), image().requires_grad_()
    y = net(x)
    with torch.no_grad():
        y.mul_(2)
    with pytest.raises(NotDifferentiableError, match="output of Reversible was changed in place"):
        y.sum().backward()
    y = net(x)
    with torch.no_grad():
        net[0].net.first.weight.mul_(2)
    with pytest.raises(NotDifferentiableError, match="optimizer after backward"):
        y.sum().backward()


def test_check_inverse_names_the_layer():
    class Wrong(Permutation):
        def inverse(self, y):
            return y

    x = torch.randn(3, 4, dtype=torch.float64)
    with pytest.raises(ArgumentError, match="layer 1, Wrong reconstructs its input with a relative error"):
        check_inverse(Reversible(Permutation(4), Wrong(4)), x)
    with pytest.raises(ArgumentError, match="relative error of nan"):
        check_inverse(Permutation(4), x / 0 - x / 0)
    report = check_inverse(Permutation(4), x)
    assert "layer 0, Permutation" in str(report) and "together" in str(report) and report.total == 0
    many = Reversible(*[Sloppy(torch.tanh, swap=k % 2 > 0) for k in range(12)])
    with pytest.raises(ArgumentError, match=r"layers together reconstruct .* keep_every"):
        check_inverse(many, x, tolerance=3e-3)


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda x: AdditiveCoupling(3), ArgumentError, "net must be a module or a function"),
        (lambda x: AdditiveCoupling(torch.tanh)(x[:, :1]), ShapeError, "at least 2 channels"),
        (lambda x: AdditiveCoupling(torch.tanh)(x[:, :3]), ShapeError, r"must return shape \(2, 1, 4, 4\)"),
        (lambda x: AdditiveCoupling(torch.tanh)(x[0, 0, 0]), ShapeError, "acts along axis 1"),
        (
            lambda x: AffineCoupling(torch.tanh)(x),
            ShapeError,
            r"a scale and a shift and must return shape \(2, 4, 4, 4\)",
        ),
        (lambda x: AffineCoupling(torch.tanh, bound=0), ArgumentError, "bound must be positive"),
        (lambda x: Orthogonal(0), ArgumentError, "channels must be an int >= 1"),
        (lambda x: InvertibleConv1x1(3)(x), ShapeError, "expects 3 channels along axis 1"),
        (lambda x: ActNorm(4).initialize(x * 0), ArgumentError, "every channel of x must vary"),
        (lambda x: Permutation([0, 0]), ArgumentError, "each once"),
        (lambda x: Squeeze(3)(x), ShapeError, "multiples of 3"),
        (lambda x: Squeeze(2).inverse(x[:, :3]), ShapeError, "Squeeze.inverse expects"),
        (lambda x: Squeeze(0), ArgumentError, "factor must be an int"),
        (lambda x: FourierLayer((3, 3))(x), ShapeError, r"expects shape \(..., 3, 3\)"),
        (lambda x: OperatorLayer(torch.tanh), ArgumentError, "must be a LinearOperator"),
        (lambda x: LAYERS["biorthogonal"]().log_det(x), ArgumentError, "determinant"),
        (lambda x: check_inverse(Permutation(4), x.long()), ArgumentError, "floating point"),
    ],
)
def test_errors(make, error, text):
    with pytest.raises(error, match=text):
        make(image())


def test_actnorm_starts_from_data_and_a_layer_of_ones_own_needs_two_methods():
    x, layer = 3 + 2 * image(5), ActNorm(4).double()
    layer.initialize(x)
    same(layer(x).mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64))
    same(layer(x).std((0, 2, 3), correction=0), torch.ones(4, dtype=torch.float64))

    class Sinh(Invertible):
        def forward(self, x):
            return torch.sinh(x)

        def inverse(self, y):
            return torch.asinh(y)

    net = Reversible(Sinh(), Sinh())
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    same(torch.autograd.grad(net(x).sum(), x)[0], torch.cosh(x) * torch.cosh(torch.sinh(x)))
    with pytest.raises(ArgumentError, match="Sinh does not know the determinant"):
        net.log_det(x)
