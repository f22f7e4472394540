"""DnCNN: a convolutional denoiser that predicts the noise, and the trained weights that the scico wheel carries."""

from __future__ import annotations

import itertools
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, FileFormatError, ShapeError

_NAMES = ("6L", "6M", "6H", "6N", "17L", "17M", "17H", "17N")
_EPSILON = 1e-5  # of the batch normalisation in flax
_ARRAY = 1  # the extension type under which flax stores an array


class DnCNN(torch.nn.Module):
    """x - n(x): n is `depth` circular 3 x 3 convolutions with ReLU between them, which predict the noise in x.

    Args:
        depth: convolutions, at least 2.
        features: channels between them.
        noise_level: the network is told the standard deviation of the noise, as a second channel.

    Images have shape (..., n_y, n_x), one channel, grey values in [0, 1]; leading axes are the batch.
    Source: Zhang et al. 2017, doi 10.1109/TIP.2017.2662206. The normalisation is folded into the convolutions.
    """

    def __init__(self, depth: int = 6, features: int = 64, *, noise_level: bool = False) -> None:
        super().__init__()
        if depth < 2 or features < 1:
            raise ArgumentError(f"DnCNN: depth must be >= 2 and features >= 1; got {depth} and {features}")
        ends = 2 if noise_level else 1
        widths = [ends, *[features] * (depth - 1), ends]
        self.noise_level = noise_level
        self.convolutions = torch.nn.ModuleList(
            torch.nn.Conv2d(a, b, 3, padding=1, padding_mode="circular", bias=0 < k < depth - 1)
            for k, (a, b) in enumerate(itertools.pairwise(widths))
        )

    def forward(self, x: Tensor, sigma: Any = None) -> Tensor:
        """The denoised images; sigma is the standard deviation of the noise for networks that are told."""
        if x.ndim < 2:
            raise ShapeError(f"DnCNN: x must have shape (..., n_y, n_x); got {tuple(x.shape)}")
        if self.noise_level != (sigma is not None):
            need = "needs sigma" if self.noise_level else "takes no sigma"
            raise ArgumentError(f"DnCNN: this network {need}; got sigma={sigma!r}")
        v = x.reshape(-1, 1, *x.shape[-2:])
        if sigma is not None:
            level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device)
            level = level.expand(x.shape[:-2]).reshape(-1, 1, 1, 1)
            v = torch.cat((v, level.expand_as(v)), 1)
        first, *inner, last = self.convolutions
        u = first(v).relu()
        for convolution in inner:
            u = convolution(u).relu()
        return (v - last(u))[:, :1].reshape(x.shape)

    @classmethod
    def load(cls, path: str | Path, name: str = "6M") -> DnCNN:
        """A trained network from the scico wheel, the folder it is installed in, or one of its `dncnn*.mpk` files.

        Args:
            path: `scico-*.whl` (`pip download --no-deps scico`), a folder, or a file.
            name: "6L", "6M", "6H", "17L", "17M", "17H": depth, and the noise it was trained for (standard deviation
                0.06, 0.10, 0.20 of the grey range); "6N", "17N" are told the noise.

        Raises: FileFormatError, FileNotFoundError, ModuleNotFoundError without the package msgpack.
        """
        if name not in _NAMES:
            raise ArgumentError(f"DnCNN.load: name must be one of {', '.join(_NAMES)}; got {name!r}")
        tree = _unpack(_read(Path(path), f"dncnn{name}.mpk"), str(path))
        try:
            return cls._of(tree["params"], tree["batch_stats"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise FileFormatError(f"{path}: not the weights of a DnCNN ({type(error).__name__}: {error})") from None

    @classmethod
    def _of(cls, params: dict[str, Any], statistics: dict[str, Any]) -> DnCNN:
        blocks = sorted((k for k in params if k.startswith("ConvBNBlock_")), key=lambda k: int(k.split("_")[1]))
        start = params["conv_start"]["kernel"]
        network = cls(len(blocks) + 2, start.shape[-1], noise_level=start.shape[-2] == 2)
        kernels: list[tuple[Any, Any]] = [(start, None)]
        for name in blocks:
            kernel, norm = params[name]["Conv_0"]["kernel"], params[name]["BatchNorm_0"]
            seen = statistics[name]["BatchNorm_0"]
            factor = norm["scale"] / np.sqrt(seen["var"] + _EPSILON)
            kernels.append((kernel * factor, norm["bias"] - seen["mean"] * factor))
        kernels.append((params["conv_end"]["kernel"], None))
        with torch.no_grad():
            convolution: Any
            for convolution, (kernel, bias) in zip(network.convolutions, kernels, strict=True):
                convolution.weight.copy_(torch.from_numpy(np.ascontiguousarray(kernel)).permute(3, 2, 0, 1))
                if bias is not None:
                    convolution.bias.copy_(torch.from_numpy(np.ascontiguousarray(bias)))
        return network.eval()


def _read(path: Path, file: str) -> bytes:
    if path.is_dir():
        found = sorted(path.rglob(file)) or sorted(path.glob("scico-*.whl"))
        if not found:
            raise FileNotFoundError(f"{path}: neither {file} nor a scico wheel in it")
        path = found[0]
    if path.suffix != ".whl":
        return path.read_bytes()
    with zipfile.ZipFile(path) as wheel:
        for member in wheel.namelist():
            if member.endswith(f"/{file}"):
                return wheel.read(member)
    raise FileNotFoundError(f"{path}: no file {file} in it")


def _unpack(content: bytes, path: str) -> Any:
    try:
        import msgpack
    except ModuleNotFoundError:
        raise ModuleNotFoundError("DnCNN.load needs msgpack: pip install msgpack", name="msgpack") from None

    def array(kind: int, data: bytes) -> Any:
        if kind != _ARRAY:
            raise ValueError(f"unknown extension type {kind}")
        shape, dtype, values = msgpack.unpackb(data, raw=False)
        return np.frombuffer(values, dtype=np.dtype(dtype)).reshape(shape).copy()

    try:
        return msgpack.unpackb(content, raw=False, ext_hook=array, strict_map_key=False)
    except Exception as error:
        raise FileFormatError(f"{path}: not a msgpack file of arrays ({type(error).__name__}: {error})") from None
