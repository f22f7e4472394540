"""Clusters and block-sparse patterns, against brute force."""

import numpy as np
import pytest
import torch

import pullback as pb
from pullback.kernels import cluster
from pullback.kernels.lazy import Vi, Vj


def points(n, dim, seed=0):
    return torch.rand(n, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dim", [1, 2, 3, 5])
def test_grid_cells_partition_the_points(dim):
    x = points(80, dim) * 4 - 2
    labels = cluster.grid_cluster(x, 0.9)
    assert labels.dtype == torch.int32
    cells = [tuple(c) for c in torch.floor(x / 0.9).tolist()]
    assert sorted(set(labels.tolist())) == list(range(len(set(cells))))
    for a in range(80):
        for b in range(a):
            assert (labels[a] == labels[b]) == (cells[a] == cells[b])


def test_known_values():
    x = torch.tensor([[0.0], [0.1], [0.9], [0.05], [0.5]])
    assert cluster.grid_cluster(x, 0.2).tolist() == [0, 0, 2, 0, 1]
    assert cluster.grid_cluster(torch.tensor([[0.5, 0.5], [5.0, 0.5]]), torch.tensor([1.0, 10.0])).tolist() == [0, 1]
    x = torch.tensor([[0.0], [5.0], [0.4], [0.3], [2.0]])
    lab = torch.tensor([0, 2, 0, 0, 1], dtype=torch.int32)
    moved, sorted_labels = cluster.sort_clusters(x, lab)
    torch.testing.assert_close(moved, torch.tensor([[0.0], [0.4], [0.3], [2.0], [5.0]]))
    assert sorted_labels.tolist() == [0, 0, 0, 1, 2]
    both, _ = cluster.sort_clusters((x, x[:, 0]), lab)
    assert isinstance(both, tuple) and torch.equal(both[1], moved[:, 0])
    assert cluster.cluster_ranges(lab).tolist() == [[0, 3], [3, 4], [4, 5]]
    x = torch.tensor([[0.0], [0.5], [1.0], [2.0], [3.0]])
    lab = torch.tensor([0, 0, 1, 1, 1])
    ranges, centres, mass = cluster.cluster_ranges_centroids(x, lab, weights=torch.tensor([1.0, 0.5, 1.0, 1.0, 10.0]))
    assert ranges.tolist() == [[0, 2], [2, 5]] and mass.tolist() == [1.5, 12.0]
    torch.testing.assert_close(centres, torch.tensor([[0.5 / 3], [2.75]]))
    torch.testing.assert_close(cluster.cluster_centroids(x, lab), torch.tensor([[0.25], [2.0]]))


def test_labels_without_points():
    x, lab = points(4, 2), torch.tensor([0, 3, 3, 0])
    ranges, centres, mass = cluster.cluster_ranges_centroids(x, lab)
    assert ranges.tolist() == [[0, 2], [2, 2], [2, 2], [2, 4]] and mass.tolist() == [2, 0, 0, 2]
    torch.testing.assert_close(centres[[0, 3]], torch.stack([x[[0, 3]].mean(0), x[1:3].mean(0)]))
    assert torch.equal(centres[1:3], torch.zeros(2, 2, dtype=torch.float64))
    assert cluster.cluster_ranges(lab, torch.tensor([2, 0, 0, 2, 0])).tolist()[-1] == [4, 4]
    empty = cluster.grid_cluster(points(0, 2), 1.0)
    assert empty.shape == (0,) and cluster.cluster_ranges(empty).shape == (0, 2)


def test_from_matrix_as_in_the_documentation_of_keops():
    r_i, r_j = torch.tensor([[2, 5], [7, 12]]), torch.tensor([[1, 4], [4, 9], [20, 30]])
    keep = torch.tensor([[1, 1, 0], [0, 1, 0]])
    found = cluster.from_matrix(r_i, r_j, keep)
    assert [t.tolist() for t in found] == [
        [[2, 5], [7, 12]],
        [2, 3],
        [[1, 4], [4, 9], [4, 9]],
        [[1, 4], [4, 9], [20, 30]],
        [1, 3, 3],
        [[2, 5], [2, 5], [7, 12]],
    ]
    assert all(t.dtype == torch.int64 for t in found)
    swapped = cluster.swap_axes(found)
    assert all(a is b for a, b in zip(swapped, (*found[3:], *found[:3]), strict=True))
    assert cluster.swap_axes(None) is None


@pytest.mark.parametrize("batch", [(), (2,)])
def test_reduction_over_near_clusters(batch):
    x, y = points(60, 2, 1), points(50, 2, 2)
    x_lab, y_lab = cluster.grid_cluster(x, 0.3), cluster.grid_cluster(y, 0.3)
    x_ranges, x_centres, _ = cluster.cluster_ranges_centroids(x, x_lab)
    y_ranges, y_centres, _ = cluster.cluster_ranges_centroids(y, y_lab)
    (x, x_lab), (y, y_lab) = cluster.sort_clusters(x, x_lab), cluster.sort_clusters(y, y_lab)
    keep = torch.cdist(x_centres, y_centres) < 0.5
    assert 0 < keep.sum() < keep.numel()
    pattern = cluster.from_matrix(x_ranges, y_ranges, keep)
    mask = keep[x_lab.long()][:, y_lab.long()].double()
    b = points(50, 3, 3)
    x = x.expand(*batch, 60, 2).clone().requires_grad_()
    K = (-(Vi(x) - Vj(y)).sqnorm2()).exp()
    K.ranges = pattern
    dense = torch.exp(-(x[..., :, None, :] - y).square().sum(-1)) * mask
    torch.testing.assert_close(K @ b, dense @ b)
    torch.testing.assert_close(K.T @ x.detach(), dense.mT @ x.detach())
    n = len(batch)
    torch.testing.assert_close(K.sum(n), dense.sum(-2)[..., None])
    torch.testing.assert_close(K.mean(n + 1), (dense.sum(-1) / mask.sum(-1))[..., None])
    expected = torch.where(mask == 0, torch.inf, (x[..., :, None, :] - y).square().sum(-1)).argmin(-1)
    assert torch.equal((Vi(x) - Vj(y)).sqnorm2().argmin(n + 1, ranges=pattern)[..., 0], expected)
    g = [torch.autograd.grad(((k @ b) ** 2).sum(), x)[0] for k in (K, dense)]
    torch.testing.assert_close(*g)


def test_arrays():
    x = points(20, 2).numpy()
    lab = cluster.grid_cluster(x, 0.5)
    ranges, centres, mass = cluster.cluster_ranges_centroids(x, lab)
    moved, _ = cluster.sort_clusters([x, x[:, 0]], lab)
    found = cluster.from_matrix(ranges, ranges, np.eye(len(ranges), dtype=bool))
    assert all(isinstance(t, np.ndarray) for t in (lab, ranges, centres, mass, *moved, *found))
    np.testing.assert_allclose((centres * mass[:, None]).sum(0), x.sum(0))
    total = (Vi(moved[0]) - Vj(moved[0])).sqnorm2().sum(1, ranges=found)
    same = np.sort(lab)[:, None] == np.sort(lab)
    np.testing.assert_allclose(total[:, 0], (((moved[0][:, None] - moved[0]) ** 2).sum(-1) * same).sum(1))


@pytest.mark.parametrize(
    ("call", "kind", "text"),
    [
        (lambda: cluster.grid_cluster(points(3, 2)[:, 0], 1.0), pb.ShapeError, r"\(M, D\); got \(3,\)"),
        (lambda: cluster.grid_cluster(points(3, 2), 0.0), pb.ArgumentError, "size must be > 0"),
        (lambda: cluster.grid_cluster(points(3, 2) / 0, 1.0), pb.ArgumentError, "not finite"),
        (lambda: cluster.sort_clusters(points(3, 2), torch.zeros(4, dtype=torch.int32)), pb.ShapeError, "4 labels"),
        (lambda: cluster.cluster_ranges(torch.tensor([-1, 0])), pb.ArgumentError, "labels must be >= 0; got -1"),
        (lambda: cluster.cluster_ranges(torch.tensor([0.5])), pb.ArgumentError, "integer labels"),
        (
            lambda: cluster.from_matrix(torch.zeros(2, 2).long(), torch.zeros(3, 2).long(), torch.ones(3, 2)),
            pb.ShapeError,
            r"keep must have shape \(2, 3\).*got \(3, 2\)",
        ),
    ],
)
def test_errors(call, kind, text):
    with pytest.raises(kind, match=text):
        call()


def test_swap_axes_refuses_what_is_no_pattern():
    for bad in ((1, 2), 3):
        with pytest.raises(pb.ArgumentError, match="swap_axes expects the six tensors"):
            cluster.swap_axes(bad)
