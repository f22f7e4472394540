"""Jacobians as operators: against torch.func and by hand, trees, complex numbers, derivatives, refusals."""

import pickle

import pytest
import torch

import pullback as pb
from pullback.autodiff.jacobian import Jacobian, jacobian

D, C = torch.float64, torch.complex128


def randn(*shape, seed=0, dtype=D):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def waves(x):
    return torch.sin(x).cumsum(-1) * x[..., :1] ** 2


def model(p, x):
    y = torch.tanh(p["w"] @ x) * p["n"] + p["b"][0]
    return {"y": y, "extra": [y.sum() * x, 3, None]}


def parameters():
    return {"w": randn(2, 3), "n": 2, "b": [randn(2, seed=1), "text", None]}


def close(a, b, rtol=1e-12):
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol)


# One tensor in, one out ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk_size", [None, 1, 4])
@pytest.mark.parametrize("mode", [None, "forward", "reverse"])
def test_the_dense_matrix_is_that_of_torch(mode, chunk_size):
    x = randn(2, 5)
    J = jacobian(waves, x)
    assert (J.dims, J.dimsd) == ((2, 5), (2, 5))
    want = torch.func.jacrev(waves)(x)
    close(J.todense(mode=mode, chunk_size=chunk_size), want.reshape(10, 10))
    close(J.blocks(mode=mode), want)
    close(J.value, waves(x))


def test_products_batches_and_flat_vectors():
    x, v, w = randn(2, 5), randn(3, 4, 2, 5, seed=1), randn(2, 5, seed=2)
    J = jacobian(waves, x)
    want = torch.func.vmap(torch.func.vmap(lambda v: torch.func.jvp(waves, (x,), (v,))[1]))(v)
    close(J @ v, want)
    close(J(v.reshape(3, 4, 10)), want.reshape(3, 4, 10))
    close(J.H @ w, torch.func.vjp(waves, x)[1](w)[0])
    assert torch.equal(J(torch.zeros(0, 2, 5, dtype=D)), torch.zeros(0, 2, 5, dtype=D))
    assert J.H.H is J


def test_numbers_are_vectors_of_length_one():
    J = jacobian(torch.sin, torch.tensor(0.3, dtype=D))
    assert (J.dims, J.dimsd) == ((1,), (1,))
    close(J @ torch.tensor(2.0, dtype=D), 2 * torch.tensor([0.3], dtype=D).cos())
    close(J.blocks(), torch.tensor(0.3, dtype=D).cos())
    close(J.value, torch.tensor(0.3, dtype=D).sin())


def test_precisions():
    J = jacobian(waves, randn(4))
    for dtype in (torch.float32, torch.bfloat16):
        assert J(torch.ones(4, dtype=dtype)).dtype == dtype
    assert jacobian(waves, randn(4).float()).todense().dtype == torch.float32
    half = jacobian(waves, randn(4).bfloat16())
    assert half(torch.ones(4)).dtype == torch.float32
    close(J.todense(torch.float32), J.todense().float())
    mixed = jacobian(lambda a, b: a.float() @ b, randn(2, 3), torch.ones(3))
    assert mixed.todense().dtype == D
    close(mixed.blocks()[1], randn(2, 3).float().double())


def test_input_that_is_not_contiguous():
    x = randn(5, 4).T[::2]
    close(jacobian(waves, x).todense(), torch.func.jacrev(waves)(x).reshape(10, 10))


def test_the_value_of_the_function_may_be_x_or_a_view():
    x = randn(3)
    for f in (lambda x: x, lambda x: x[1:], lambda x: x.expand(2, 3), lambda x: (x, x)):
        J = jacobian(f, x)
        v = torch.ones(3, dtype=D)
        for out in (J @ v, J.H @ torch.ones(J.dimsd, dtype=D)):
            out.add_(1)
        assert torch.equal(v, torch.ones(3, dtype=D))
        assert torch.equal(J.H.todense(), J.todense().T)


def test_constants_in_part_of_the_value_have_zero_rows():
    J = jacobian(lambda x: (x**2, torch.ones(2, dtype=D)), torch.ones(2, dtype=D))
    close(J.todense(), torch.cat((2 * torch.eye(2, dtype=D), torch.zeros(2, 2, dtype=D))))


# Trees ---------------------------------------------------------------------------------------------------------------


def test_trees_as_trees_and_as_vectors():
    p, x = parameters(), randn(3, seed=2)
    J = jacobian(model, p, x)
    assert (J.dims, J.dimsd) == ((11,), (5,))
    dp, dx = {"w": randn(2, 3, seed=3), "n": 7, "b": [randn(2, seed=4), None, None]}, randn(3, seed=5)
    got = J @ (dp, dx)

    def plain(w, b, x):
        out = model({"w": w, "n": 2, "b": [b]}, x)
        return out["y"], out["extra"][0]

    at, tangents = (p["w"], p["b"][0], x), (dp["w"], dp["b"][0], dx)
    want = torch.func.jvp(plain, at, tangents)[1]
    close(got["y"], want[0])
    close(got["extra"][0], want[1])
    assert got["extra"][1:] == [None, None]
    close(J(dp, dx)["y"], want[0])
    close(J @ J.pack((dp, dx)), torch.cat(want))
    close(J.push((dp, dx))["y"], want[0])
    back, bx = J.H @ got
    pulled = torch.func.vjp(plain, *at)[1](want)
    close(back["w"], pulled[0])
    close(back["b"][0], pulled[1])
    close(bx, pulled[2])
    assert back["n"] is None
    close(J.pull(J.pack_range(got))[1], pulled[2])
    close(J.unpack(J.pack((dp, dx)))[0]["w"], dp["w"])
    close(J.unpack_range(J.pack_range(got))["y"], got["y"])
    assert J.value["extra"][1:] == [3, None]
    close(J.todense(mode="forward"), J.todense(mode="reverse"))
    blocks = J.blocks()
    assert blocks["extra"][0][0]["w"].shape == (3, 2, 3)
    close(blocks["y"][1], torch.func.jacrev(lambda x: model(p, x)["y"])(x))
    batch = J @ ({"w": randn(6, 2, 3), "n": 0, "b": [randn(6, 2), None, None]}, randn(6, 3))
    assert batch["y"].shape == (6, 2)


def test_one_tensor_in_a_tree_keeps_its_shape():
    J = jacobian(lambda d, k: {"out": d["x"] ** k}, {"x": randn(2, 3)}, 2)
    assert (J.dims, J.dimsd) == ((2, 3), (2, 3))
    v = randn(2, 3, seed=1)
    close(J @ v, 2 * randn(2, 3) * v)
    close((J @ ({"x": v}, None))["out"], J @ v)


def test_the_parameters_of_a_network():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 2)).to(D)
    data = randn(3, 4)
    J = jacobian(lambda p: torch.func.functional_call(net, p, (data,)), dict(net.named_parameters()))
    assert J.dimsd == (3, 2)
    want = torch.func.jacrev(lambda p: torch.func.functional_call(net, p, (data,)))(dict(net.named_parameters()))
    for name, block in J.blocks().items():
        close(block, want[name])
    step = pb.lsqr(J, randn(3, 2, seed=1), damp=0.1, maxiter=200, atol=1e-14, btol=1e-14).x
    A = J.todense().detach()
    close(step, torch.linalg.solve(A.T @ A + 0.01 * torch.eye(37, dtype=D), A.T @ randn(3, 2, seed=1).flatten()), 1e-7)


# Which mode ----------------------------------------------------------------------------------------------------------


def test_the_mode_is_chosen_by_the_sizes_and_said():
    f = torch.nn.Linear(1000, 3)
    assert jacobian(f, torch.ones(1000)).mode == "reverse: 3 outputs <= 1000 inputs"
    tall = jacobian(torch.nn.Linear(3, 1000), torch.ones(3))
    assert tall.mode == "forward: 3 inputs < 1000 outputs"
    assert "Jacobian(Linear, forward: 3 inputs < 1000 outputs)" in repr(tall)
    assert jacobian(f, torch.ones(1000), mode="forward").mode == "forward: as given"


def counted(f):
    calls = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            calls.append(tuple(g.shape))
            return g.clone()

    return lambda x: f(Count.apply(x)), calls


def test_chunks_and_modes_do_what_they_say():
    f, calls = counted(lambda x: torch.stack([x.sum(), (x**2).sum()]))
    J = jacobian(f, randn(6))
    J.todense(chunk_size=1)
    assert len(calls) == 2
    del calls[:]
    J.todense()
    assert len(calls) == 1


class Once(torch.autograd.Function):
    """A square without second derivatives, but with forward mode."""

    @staticmethod
    def forward(x):
        return x**2

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g

    @staticmethod
    def jvp(ctx, t):
        return 2 * ctx.saved_tensors[0] * t


def twice(x):
    """One input in, two out, through a Function that has neither forward mode nor a second derivative."""
    return torch.cat((Plain.apply(x), 2 * x))


class Plain(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


def test_operations_without_forward_derivatives():
    x = randn(3)
    J = jacobian(twice, x)
    assert J.mode == "forward: 3 inputs < 6 outputs"
    close(J.todense(), torch.cat((torch.diag(2 * x), 2 * torch.eye(3, dtype=D))))
    assert J.mode == "reverse: 3 inputs < 6 outputs, but an operation has no forward derivative"
    with pytest.raises(pb.NotDifferentiableError, match=r"J\.H and todense\(mode='reverse'\) work"):
        J @ x
    with pytest.raises(
        pb.NotDifferentiableError, match=r"neither a second derivative \(the backward of Plain is marked once"
    ):
        J.todense(mode="forward")


def test_forward_mode_steps_in_where_second_derivatives_are_missing():
    J = jacobian(Once.apply, randn(3))
    close(J @ randn(3, seed=1), 2 * randn(3) * randn(3, seed=1))


def test_what_cannot_be_batched_is_done_row_by_row():
    class ByNumPy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return torch.from_numpy(g.numpy() * 2)

    close(jacobian(ByNumPy.apply, randn(3)).todense(), 2 * torch.eye(3, dtype=D))


# Complex numbers -----------------------------------------------------------------------------------------------------


def holomorphic(z):
    return z**3 + 2j * z.flip(0) * z


def mixed(z):
    return z * z.abs() + 1j * z.conj()


def energy(z):
    return (z.abs() ** 2).sum() + z.real[0]


def test_holomorphic_functions():
    z, v = randn(3, dtype=C), randn(2, 3, seed=1, dtype=C)
    J = jacobian(holomorphic, z, complex="holomorphic")
    want = torch.diag(3 * z**2 + 2j * z.flip(0)) + torch.diag(2j * z).flip(1)
    close(J.todense(), want)
    close(J.todense(mode="forward"), want)
    close(J @ v, v @ want.T)
    close(J.H @ v, v @ want.conj())
    close(J.T.todense(), want.T)


def test_wirtinger_derivatives():
    z, v = randn(3, dtype=C), randn(3, seed=1, dtype=C)
    J = jacobian(mixed, z, complex="wirtinger")
    r = z.abs()
    dz, dzbar = torch.diag(1.5 * r).to(C), torch.diag(z**2 / (2 * r) + 1j)
    close(J.dz.todense(), dz)
    close(J.dzbar.todense(), dzbar)
    close(J.dz.H.todense(), dz.conj().T)
    close(J.dzbar.H.todense(), dzbar.conj().T)
    close(J @ v, dz @ v + dzbar @ v.conj())
    with pytest.raises(pb.ArgumentError, match=r"J\.dz\.todense\(\)"):
        J.todense()
    with pytest.raises(pb.ArgumentError, match="complex='wirtinger'"):
        _ = jacobian(mixed, z, complex="real").dz


def test_the_gradient_of_a_real_loss():
    z = randn(3, dtype=C)
    J = jacobian(energy, z, complex="wirtinger")
    leaf = z.clone().requires_grad_()
    energy(leaf).backward()
    close(J.H @ torch.ones(1, dtype=D), leaf.grad)
    close(J.dzbar.todense(), leaf.grad[None] / 2)
    close(J.dz.todense(), leaf.grad[None].conj() / 2)
    R = jacobian(energy, z, complex="real")
    close(R.H @ torch.ones(1, dtype=D), torch.view_as_real(leaf.grad))


def test_complex_numbers_as_pairs():
    z = randn(3, dtype=C)
    J = jacobian(mixed, z, complex="real")
    assert (J.dims, J.dimsd) == ((3, 2), (3, 2))
    want = torch.func.jacrev(lambda x: torch.view_as_real(mixed(torch.view_as_complex(x))))(torch.view_as_real(z))
    close(J.todense(), want.reshape(6, 6))
    close(J.value, mixed(z))
    close(J.unpack(torch.view_as_real(z)), z)
    both = jacobian(lambda a, z: a.sum() * z, randn(2), z, complex="real")
    assert both.dims == (8,)
    da, dz = both.pull(mixed(z).conj())
    assert (da.dtype, dz.dtype) == (D, C)


def test_real_in_complex_out():
    x = randn(3).abs()
    J = jacobian(lambda x: torch.polar(x, x**2), x)
    want = torch.diag(torch.polar(torch.ones_like(x), x**2) * (1 + 2j * x**2))
    for mode in ("forward", "reverse"):
        close(J.todense(mode=mode), want)
    close(J.H @ randn(3, seed=1, dtype=C), (want.conj().T @ randn(3, seed=1, dtype=C)).real)


def test_complex_refusals():
    z = randn(3, dtype=C)
    with pytest.raises(pb.DtypeError, match=r"complex='holomorphic'.*complex='real'.*complex='wirtinger'"):
        jacobian(mixed, z)
    with pytest.raises(pb.ArgumentError, match=r"f is not holomorphic at x.*use complex='wirtinger'"):
        jacobian(mixed, z, complex="holomorphic")
    with pytest.raises(pb.ArgumentError, match=r"f\(x\) is real, so f is holomorphic only if it is constant"):
        jacobian(energy, z, complex="holomorphic")
    with pytest.raises(pb.ArgumentError, match="complex must be one of 'holomorphic', 'real', 'wirtinger'"):
        jacobian(mixed, z, complex="both")
    with pytest.raises(pb.DtypeError, match="needs every tensor of x to be complex"):
        jacobian(lambda x: x, randn(3), complex="wirtinger")
    with pytest.raises(pb.DtypeError, match="acts on real tensors"):
        jacobian(lambda x: x, randn(3)) @ z


# Derivatives of products ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [False, True])
def test_products_are_differentiable_in_everything(adjoint):
    theta = randn(4, seed=3).requires_grad_()

    def product(v, x, theta):
        J = jacobian(lambda x: torch.sin(theta * x).cumsum(0) * x[0], x)
        return (J.H if adjoint else J) @ v

    at = [randn(4, seed=1).requires_grad_(), randn(4).requires_grad_(), theta]
    assert torch.autograd.gradcheck(product, at, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(product, at)


def test_a_function_that_closes_over_a_parameter():
    theta = randn(4, seed=3).requires_grad_()
    x, v = randn(4), randn(4, seed=1)
    J = jacobian(lambda x: torch.sin(theta * x), x)
    (J @ v).sum().backward()
    (want,) = torch.autograd.grad((theta * (theta * x).cos() * v).sum(), theta)
    close(theta.grad, want)
    with torch.no_grad():
        assert not (J @ v).requires_grad
    assert all(p.grad is None for p in J._recorded().points)


def test_no_graph_where_nothing_requires_grad():
    J = jacobian(waves, randn(4))
    assert not (J @ randn(4)).requires_grad
    assert not J.value.requires_grad
    assert not J.todense().requires_grad
    assert (J @ randn(4).requires_grad_()).requires_grad
    assert jacobian(waves, randn(4).requires_grad_()).value.requires_grad


def test_inside_transforms():
    x, v, w = randn(4), randn(4, seed=1), randn(3, 4, seed=2)

    def loss(x, t):
        return (jacobian(lambda x: waves(t * x), x) @ v).pow(2).sum()

    def plain(x, t):
        return torch.func.jvp(lambda x: waves(t * x), (x,), (v,))[1].pow(2).sum()

    t = torch.tensor(0.7, dtype=D)
    for transform in (
        lambda f: torch.func.grad(f, (0, 1))(x, t),
        lambda f: torch.func.jacrev(torch.func.jacrev(f))(x, t),
        lambda f: torch.func.jvp(f, (x, t), (v, t))[1],
        lambda f: torch.func.vmap(f, (0, None))(w, t),
        lambda f: torch.func.vmap(torch.func.grad(f), (0, None))(w, t),
    ):
        torch.testing.assert_close(transform(loss), transform(plain), rtol=1e-10, atol=1e-10)
    J = jacobian(waves, x)
    close(torch.func.vmap(J)(w), J(w))
    close(torch.func.jacrev(J)(v), J.todense())
    close(torch.func.vmap(lambda x: jacobian(waves, x).todense())(w), torch.func.vmap(torch.func.jacrev(waves))(w))


def test_compiled():
    x, v = randn(4), randn(4, seed=1)
    J = jacobian(waves, x)
    torch._dynamo.reset()
    close(torch.compile(lambda v: J.H(J(v)), fullgraph=True, backend="aot_eager")(v), J.H @ (J @ v))


def test_the_inner_function_may_be_an_operator_or_a_solver():
    A = pb.FirstDerivative(6)
    J = jacobian(lambda x: A(x) ** 2, randn(6))
    close(J.todense(), 2 * A(randn(6))[:, None] * A.todense(D))


# Solvers -------------------------------------------------------------------------------------------------------------


def test_solvers_take_jacobians():
    x, y = randn(4), randn(4, seed=1)
    J = jacobian(lambda x: waves(x) + x, x)
    M = J.todense()
    close(pb.lsqr(J, y, atol=1e-14, btol=1e-14).x, torch.linalg.solve(M, y), 1e-9)
    close(pb.cgls(J, y, damp=0.5, rtol=1e-14).x, torch.linalg.solve(M.T @ M + 0.25 * torch.eye(4), M.T @ y), 1e-9)
    close(pb.svd(J, 4).S, torch.linalg.svdvals(M), 1e-10)
    close(float(J.norm()), float(torch.linalg.matrix_norm(M, 2)), 1e-6)
    close(float(J.trace()), float(M.trace()))


def test_a_linear_solve_is_differentiable_in_the_point():
    def solution(x):
        return pb.cgls(jacobian(lambda x: waves(x) + x, x), torch.ones(4, dtype=D), rtol=1e-13).x

    x = (randn(4) + 2).requires_grad_()
    assert torch.autograd.gradcheck(solution, x, atol=1e-5)


# Where the operator lives --------------------------------------------------------------------------------------------


def test_the_point_is_a_copy():
    x = randn(4)
    J = jacobian(waves, x)
    before = J.todense()
    x.add_(1)
    assert torch.equal(J.todense(), before)
    close(J @ x, before @ x)


def test_changes_of_what_the_function_uses():
    w = randn(4)
    J = jacobian(lambda x: torch.sin(w * x), randn(4))
    w.mul_(2)
    with pytest.raises(pb.ArgumentError, match="changed in place after its derivative was recorded"):
        J @ randn(4)
    layer = torch.nn.Linear(4, 2).to(D)
    J = jacobian(layer, randn(4))
    with torch.no_grad():
        layer.weight.mul_(2)
    close(J.todense(), layer.weight)


def test_inference_mode():
    with torch.inference_mode():
        x = randn(4)
        J = jacobian(waves, x)
        dense = J.todense()
    close(dense.clone(), torch.func.jacrev(waves)(randn(4)))
    close((J @ randn(4)).clone(), dense.clone() @ randn(4))


def test_pickle_and_to():
    J = jacobian(waves, randn(4))
    close(pickle.loads(pickle.dumps(J)).todense(), J.todense())
    single = J.to(torch.float32)
    assert single.todense().dtype == torch.float32
    close(single.todense().double(), J.todense(), 1e-5)


def test_shared_memory_is_freed_with_the_operator():
    import gc
    import weakref

    J = jacobian(waves, randn(4))
    point = weakref.ref(J._recorded().points[0])
    assert isinstance(J, Jacobian)
    del J
    gc.collect()
    assert point() is None


# Refusals ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (
            lambda: jacobian(waves, torch.arange(3)),
            pb.DtypeError,
            r"at least one floating.*got torch.int64; use x.double",
        ),
        (lambda: jacobian(waves, 3), pb.DtypeError, "got int"),
        (lambda: jacobian(waves), pb.ArgumentError, r"write jacobian\(f, x\)"),
        (lambda: jacobian(randn(3), waves), pb.ArgumentError, "f must be a function or a module; got Tensor"),
        (lambda: jacobian(lambda x: 3, randn(3)), pb.DtypeError, r"f\(x\) must hold.*got int"),
        (lambda: jacobian(lambda x: x.detach(), randn(3)), pb.NotDifferentiableError, "without detach"),
        (lambda: jacobian(waves, torch.zeros(0)), pb.ShapeError, "x has no elements"),
        (lambda: jacobian(lambda x: x[:0], randn(3)), pb.ShapeError, r"f\(x\) has no elements"),
        (lambda: jacobian(waves, randn(3), mode="backward"), pb.ArgumentError, "mode must be 'forward', 'reverse'"),
        (lambda: jacobian(waves, randn(3)).todense(mode="x"), pb.ArgumentError, "mode must be"),
        (lambda: jacobian(waves, randn(3)).todense(chunk_size=0), pb.ArgumentError, "chunk_size must be an int >= 1"),
        (lambda: jacobian(waves, randn(3)) @ randn(4), pb.ShapeError, r"expects shape \(..., 3\)"),
        (
            lambda: jacobian(model, parameters(), randn(3)) @ (randn(3),),
            pb.ArgumentError,
            "structure must be that of x",
        ),
        (lambda: jacobian(lambda a: a[0] @ a[1], [randn(3), randn(3)]) @ [randn(3), randn(2)], pb.ShapeError, "leaf 1"),
        (
            lambda: jacobian(lambda a: a[0] @ a[1], [randn(3), randn(3)]) @ [randn(3), 1],
            pb.DtypeError,
            "leaf 1.*got int",
        ),
        (lambda: jacobian(model, parameters(), randn(3)).unpack(randn(4)), pb.ShapeError, r"\(..., 11\)"),
        (lambda: jacobian(lambda a, b: a, randn(3), randn(3).to("meta")), pb.DeviceError, "one device.*cpu.*meta"),
    ],
)
def test_refusals(make, error, match):
    with pytest.raises(error, match=match):
        make()
