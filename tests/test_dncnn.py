"""DnCNN: shapes, the flax file format (written here by hand), folded normalisation, errors."""

import zipfile

import msgpack
import numpy as np
import pytest
import torch

from pullback.core.errors import ArgumentError, FileFormatError, ShapeError
from pullback.imaging.dncnn import DnCNN

FEATURES = 4


def trained(channels=1, blocks=2):
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (0.3 * rng.standard_normal(shape)).astype(np.float32)

    def norm():
        return {"bias": draw(FEATURES), "scale": 1 + draw(FEATURES)}

    params = {"conv_start": {"kernel": draw(3, 3, channels, FEATURES)}}
    params["conv_end"] = {"kernel": draw(3, 3, FEATURES, channels)}
    statistics = {}
    for k in range(blocks):
        name = f"ConvBNBlock_{k}"
        params[name] = {"Conv_0": {"kernel": draw(3, 3, FEATURES, FEATURES)}, "BatchNorm_0": norm()}
        statistics[name] = {"BatchNorm_0": {"mean": draw(FEATURES), "var": np.abs(draw(FEATURES)) + 0.5}}
    return {"params": params, "batch_stats": statistics}


def packed(tree):
    def default(array):
        inner = msgpack.packb((array.shape, array.dtype.name, array.tobytes()))
        return msgpack.ExtType(1, inner)

    return msgpack.packb(tree, default=default)


def by_hand(tree, x):
    """The network as its authors define it: convolution, batch normalisation, ReLU."""

    def convolve(u, kernel):
        weight = torch.from_numpy(kernel).permute(3, 2, 0, 1)
        return torch.nn.functional.conv2d(torch.nn.functional.pad(u, (1, 1, 1, 1), mode="circular"), weight)

    u = convolve(x[:, None], tree["params"]["conv_start"]["kernel"]).relu()
    for name, seen in tree["batch_stats"].items():
        block, seen = tree["params"][name], seen["BatchNorm_0"]
        mean, var, scale, bias = (
            torch.from_numpy(a)
            for a in (seen["mean"], seen["var"], *(block["BatchNorm_0"][k] for k in ("scale", "bias")))
        )
        u = convolve(u, block["Conv_0"]["kernel"])
        u = torch.nn.functional.batch_norm(u, mean, var, scale, bias, eps=1e-5).relu()
    return x - convolve(u, tree["params"]["conv_end"]["kernel"])[:, 0]


def test_load_gives_the_network_that_was_saved(tmp_path):
    tree = trained()
    (tmp_path / "dncnn6M.mpk").write_bytes(packed(tree))
    with zipfile.ZipFile(tmp_path / "scico.whl", "w") as wheel:
        wheel.write(tmp_path / "dncnn6M.mpk", "scico/data/flax/dncnn6M.mpk")
    x = torch.rand(3, 9, 8, generator=torch.Generator().manual_seed(1))
    for path in (tmp_path, tmp_path / "dncnn6M.mpk", tmp_path / "scico.whl"):
        network = DnCNN.load(path)
        assert len(network.convolutions) == 4
        with torch.no_grad():
            torch.testing.assert_close(network(x), by_hand(tree, x), atol=1e-5, rtol=1e-5)
            assert network(x.reshape(3, 1, 9, 8)).shape == (3, 1, 9, 8)
            assert network(x[0]).shape == (9, 8)


def test_networks_that_are_told_the_noise(tmp_path):
    (tmp_path / "dncnn6N.mpk").write_bytes(packed(trained(channels=2)))
    network = DnCNN.load(tmp_path, "6N")
    x = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        both = network(x, torch.tensor([0.1, 0.3]))
        torch.testing.assert_close(both[0], network(x[0], 0.1))
        assert not torch.allclose(both[1], network(x[1], 0.1))
    with pytest.raises(ArgumentError, match="needs sigma"):
        network(x)
    with pytest.raises(ArgumentError, match="takes no sigma"):
        DnCNN(3, 2)(x, 0.1)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"neither dncnn6M.mpk nor a scico wheel in it"):
        DnCNN.load(tmp_path)
    (tmp_path / "dncnn6M.mpk").write_bytes(b"nothing of the kind")
    with pytest.raises(FileFormatError, match="not a msgpack file of arrays"):
        DnCNN.load(tmp_path)
    (tmp_path / "dncnn6M.mpk").write_bytes(packed({"params": {"conv_start": {}}, "batch_stats": {}}))
    with pytest.raises(FileFormatError, match="not the weights of a DnCNN"):
        DnCNN.load(tmp_path)
    with pytest.raises(ArgumentError, match="name must be one of 6L, 6M, 6H, 6N, 17L"):
        DnCNN.load(tmp_path, "6X")
    with pytest.raises(ShapeError, match=r"must have shape \(..., n_y, n_x\)"):
        DnCNN(3, 2)(torch.ones(5))
    with pytest.raises(ArgumentError, match="depth must be >= 2"):
        DnCNN(1)
