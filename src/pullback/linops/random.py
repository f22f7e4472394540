"""Random projections whose matrix is never stored: every entry is a function of its place and the seed."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pullback.core.errors import ArgumentError, ShapeError
from pullback.core.operator import LinearOperator
from pullback.core.shapes import Dims, as_dims, size

_CHUNK = 1 << 18  # entries of a Gaussian matrix that exist at a time (2 MB): larger ones leave the cache, 3 x slower
_FACTOR = 6  # a Hadamard transform of 2^k points is made of matrix products with 2^6 x 2^6 matrices
_KINDS = ("gaussian", "sparse", "srht", "countsketch")


def _wrap(value: int) -> int:
    """The low 32 bits of `value` as a signed number, as int32 tensors hold it."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >> 31 else value


_GOLDEN, _ONE, _TWO, _THREE = map(_wrap, (0x9E3779B9, 0xED5AD4BB, 0xAC4C1B51, 0x31848BAB))


def _fold(x: Tensor, shift: int, scratch: Tensor) -> None:
    """Replace x by x ^ (x >> shift), in place, shifting in zeros."""
    torch.bitwise_right_shift(x, shift, out=scratch)
    x.bitwise_xor_(scratch.bitwise_and_((1 << (32 - shift)) - 1))


def _mix(x: Tensor, keys: tuple[Tensor, Tensor], counters: Tensor, scratch: Tensor) -> Tensor:
    """Set x to 32 random bits for each key (rows) and counter (columns), all int32.

    The mixing steps of `triple32` (C. Wellons, hash-prospector, 2018) on the counter, with one half of the key added
    before them and the other in their middle: all operations are int32, so every device gives the same bits.
    """
    torch.add(keys[0][:, None], counters * _GOLDEN, out=x)
    _fold(x, 17, scratch)
    x.mul_(_ONE)
    _fold(x, 11, scratch)
    x.bitwise_xor_(keys[1][:, None]).mul_(_TWO)
    _fold(x, 15, scratch)
    x.mul_(_THREE)
    _fold(x, 14, scratch)
    return x


def _bits(keys: tuple[Tensor, Tensor], counters: Tensor) -> Tensor:
    """32 random bits for each key and counter: shape (n_keys, n_counters)."""
    x = counters.new_empty(len(keys[0]), len(counters))
    return _mix(x, keys, counters, torch.empty_like(x))


class _Normals:
    """Standard normal numbers for each key and counter, in memory that is used again (new pages cost 4 x the time)."""

    def __init__(self, rows: int, columns: int, device: torch.device) -> None:
        self._u, self._v, self._scratch = torch.empty(3, rows * columns, dtype=torch.int32, device=device)
        self._first, self._second = torch.empty(2, rows * columns, dtype=torch.float32, device=device)

    def __call__(self, keys: tuple[Tensor, Tensor], start: int, stop: int, half: int) -> tuple[Tensor, Tensor]:
        """Those of the columns start ... stop - 1 and of the columns half a row further (Box & Muller 1958)."""
        shape = len(keys[0]), stop - start
        count = shape[0] * shape[1]
        u, v, scratch, first, second = (
            t[:count].view(shape) for t in (self._u, self._v, self._scratch, self._first, self._second)
        )
        _mix(u, keys, _range(start, stop, u.device), scratch).bitwise_and_(0xFFFFFF)
        _mix(v, keys, _range(half + start, half + stop, u.device), scratch)
        radius = scratch.view(torch.float32).copy_(u).add_(0.5).mul_(2.0**-24).log_().mul_(-2).sqrt_()
        angle = second.copy_(v).mul_(2 * math.pi * 2.0**-32)
        torch.cos(angle, out=first)
        return first.mul_(radius), angle.sin_().mul_(radius)


def _keys(seed: int, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The two key words of each row (int32)."""
    words = []
    state = seed
    for _ in range(4):  # splitmix64 (Steele, Lea, Flood 2014, doi 10.1145/2660193.2660195)
        state = (state + 0x9E3779B97F4A7C15) & (2**64 - 1)
        z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & (2**64 - 1)
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & (2**64 - 1)
        words.append(torch.full((1,), _wrap((z ^ (z >> 31)) >> 16), dtype=torch.int32, device=rows.device))
    return _bits((words[0], words[1]), rows)[0], _bits((words[2], words[3]), rows)[0]


def _range(start: int, stop: int, device: torch.device) -> Tensor:
    return torch.arange(start, stop, dtype=torch.int32, device=device)


class RandomProjection(LinearOperator):
    """y = A x with a random A of m rows such that E |A x|^2 = |x|^2, drawn anew from its seed wherever it is needed.

    By the lemma of Johnson and Lindenstrauss, distances within a set of p points change by a factor in [1 - e, 1 + e]
    only, once m is about 8 log(p) / e^2, whatever n is: see `distortion` and `projection_dimension`.

    Args:
        n: input shape.
        m: output shape.
        kind: "gaussian": entries from N(0, 1 / m).
            "sparse": `nonzeros` entries +-1 / sqrt(nonzeros) in each column, one in each of as many groups of rows.
            "countsketch": as sparse with one entry.
            "srht": sqrt(1 / m) times m rows (without replacement) of H D, where H is the Hadamard matrix of the next
            power of two and D random signs; needs m <= that power.
        seed: int >= 0; the same seed gives the same operator, on every device (Gaussian entries up to rounding).
        nonzeros: entries in each column of "sparse".
        dtype: what `.dtype` reports.

    Every entry is a function of (seed, row, column), so forward and adjoint see the same numbers in whatever chunks
    they are made, and the adjoint is exact. Entries are made in float32. Nothing is held: any device serves.

    Raises: ArgumentError.
    Cost: gaussian O(m n) for a whole batch, in 3 MB; 1e5 x 1e5 (40 GB as a matrix) takes about 50 s on one core, the
    others milliseconds: sparse O(n nonzeros), srht O(n log n).
    Source: D. Achlioptas 2003, doi 10.1016/S0022-0000(03)00025-4; Kane & Nelson 2014, doi 10.1145/2559902 (sparse);
    Charikar, Chen, Farach-Colton 2004, doi 10.1016/S0304-3975(03)00400-6 (countsketch); J. Tropp 2011,
    doi 10.1142/S1793536911000787 (srht).
    """

    _half = False

    def __init__(
        self, n: Dims, m: Dims, *, kind: str = "gaussian", seed: int = 0, nonzeros: int = 8, dtype: Any = None
    ) -> None:
        super().__init__(as_dims(n, "n", "RandomProjection"), as_dims(m, "m", "RandomProjection"), dtype=dtype)
        rows, columns = self.shape
        if kind not in _KINDS:
            raise ArgumentError(f"RandomProjection: kind must be one of {', '.join(_KINDS)}; got {kind!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ArgumentError(f"RandomProjection: seed must be an int in [0, 2^64); got {seed!r}")
        if max(rows, columns) >= 2**31:
            raise ArgumentError(f"RandomProjection: n and m must be below 2^31; got {columns} and {rows}")
        count = 1 if kind == "countsketch" else nonzeros
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ArgumentError(f"RandomProjection: nonzeros must be an int >= 1; got {nonzeros!r}")
        self.kind, self.seed, self.nonzeros = kind, seed, min(count, rows)
        self._log2 = (columns - 1).bit_length()
        if kind == "srht" and rows > 1 << self._log2:
            raise ArgumentError(
                f"RandomProjection: kind 'srht' needs m <= {1 << self._log2}, the power of two at or above n; "
                f"got n = {columns}, m = {rows}; use kind='gaussian' or 'sparse'"
            )

    def _forward(self, x: Tensor) -> Tensor:
        return self._each_part(x, False)

    def _adjoint(self, y: Tensor) -> Tensor:
        return self._each_part(y, True)

    def _each_part(self, x: Tensor, adjoint: bool) -> Tensor:
        """The real matrix on rows of real numbers; a complex vector is two of them."""
        dims, dimsd = (self.dimsd, self.dims) if adjoint else (self.dims, self.dimsd)
        batch = x.shape[: x.ndim - len(dims)]
        rows = x.reshape(-1, size(dims))
        apply = {"gaussian": self._gaussian, "srht": self._hadamard}.get(self.kind, self._sketch)
        if x.is_complex():
            parts = apply(torch.cat((rows.real, rows.imag)), adjoint)
            y = torch.complex(*parts.chunk(2))
        else:
            y = apply(rows.resolve_neg(), adjoint)
        return y.reshape(*batch, *dimsd)

    def _gaussian(self, x: Tensor, adjoint: bool) -> Tensor:
        m, n = self.shape
        half = (n + 1) // 2
        width = min(half, _CHUNK // 2)
        height = max(1, _CHUNK // (2 * width))
        y = x.new_zeros(len(x), n if adjoint else m)
        normals = _Normals(min(height, m), width, x.device)
        for top in range(0, m, height):
            bottom = min(top + height, m)
            keys = _keys(self.seed, _range(top, bottom, x.device))
            for left in range(0, half, width):
                right = min(left + width, half)
                for a, part in zip((left, half + left), normals(keys, left, right, half), strict=True):
                    part = part[:, : max(0, n - a)].to(x.dtype)  # the last column of an odd n has no partner
                    b = a + part.shape[1]
                    if adjoint:
                        y[:, a:b].addmm_(x[:, top:bottom], part)
                    else:
                        y[:, top:bottom].addmm_(x[:, a:b], part.T)
        return y.mul_(1 / math.sqrt(m))

    def _sketch(self, x: Tensor, adjoint: bool) -> Tensor:
        m, n = self.shape
        y = x.new_zeros(len(x), n if adjoint else m)
        for t in range(self.nonzeros):
            first, last = t * m // self.nonzeros, (t + 1) * m // self.nonzeros
            bits = _bits(_keys(self.seed, _range(t, t + 1, x.device)), _range(0, n, x.device))[0]
            signs = _signs(bits, x.dtype)
            places = bits.bitwise_and_(0x7FFFFFFF).remainder_(last - first).long().add_(first)
            if adjoint:
                y.add_(x[:, places] * signs)
            else:
                y.index_add_(1, places, x * signs)
        return y.mul_(1 / math.sqrt(self.nonzeros))

    def _hadamard(self, x: Tensor, adjoint: bool) -> Tensor:
        m, n = self.shape
        keys = _keys(self.seed, _range(0, 1, x.device))
        signs = _signs(_bits(keys, _range(0, n, x.device))[0], x.dtype)
        rows = _permuted(self.seed, m, self._log2, x.device)
        whole = x.new_zeros(len(x), 1 << self._log2)
        if adjoint:
            whole[:, rows] = x
            return _walsh(whole, self._log2)[:, :n] * (signs / math.sqrt(m))
        torch.mul(x, signs, out=whole[:, :n])
        return _walsh(whole, self._log2)[:, rows] / math.sqrt(m)

    def _norm_bound(self) -> float | None:
        # Rows of H D / sqrt(m) are orthogonal, of length sqrt(n' / m), before the columns beyond n are cut off.
        return math.sqrt((1 << self._log2) / self.shape[0]) if self.kind == "srht" else None

    def extra_repr(self) -> str:
        """Shapes, kind and seed."""
        more = f", nonzeros {self.nonzeros}" if self.kind == "sparse" else ""
        return f"{super().extra_repr()}, {self.kind}, seed {self.seed}{more}"

    @classmethod
    def examples(cls) -> Iterator[LinearOperator]:
        """Every kind, with odd sizes and several axes."""
        yield cls(7, 5)
        yield cls((3, 4), (2, 3), kind="srht", seed=1)
        yield cls(9, 6, kind="sparse", nonzeros=3, seed=2)
        yield cls((2, 5), 4, kind="countsketch", seed=3)


def _signs(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """+-1 from the topmost bit."""
    return (bits >> 31).to(dtype).mul_(2).add_(1)


def _permuted(seed: int, count: int, log2: int, device: torch.device) -> Tensor:
    """The first `count` places of a random permutation of 0 ... 2^log2 - 1.

    Each step (add, multiply by an odd number, xor with the upper half) is a bijection of log2 bits.
    """
    keys = [t.long() for t in _keys(seed, _range(1, 7, device))]
    mask = (1 << log2) - 1
    place = torch.arange(count, device=device)
    for add, multiply in zip(*keys, strict=True):
        place = (place + (add & mask)) * ((multiply & mask) | 1) & mask
        place = place ^ (place >> max(1, log2 // 2))
    return place


def _walsh(x: Tensor, log2: int) -> Tensor:
    """H x for rows of 2^log2 elements and the Hadamard matrix H of +-1, a Kronecker product of small ones."""
    shape, after = x.shape, 1
    while log2:
        step = min(_FACTOR, log2)
        matrix = x.new_ones(1, 1)
        for _ in range(step):
            matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
        blocks = x.reshape(-1, 1 << step, after)
        x = blocks.reshape(-1, 1 << step) @ matrix if after == 1 else torch.matmul(matrix, blocks)
        after <<= step
        log2 -= step
    return x.reshape(shape)


def distortion(A: Any, points: Tensor) -> Tensor:
    """|A (x_i - x_j)| / |x_i - x_j| - 1 for all pairs i < j: how far a projection moves distances.

    Args:
        A: LinearOperator.
        points: tensor of shape (p, *A.dims), p >= 2 distinct points.

    Returns: tensor of shape (p (p - 1) / 2,), without derivatives. Raises: ShapeError, ArgumentError.
    Cost: one application to a batch of p; p^2 distances.
    """
    if not isinstance(A, LinearOperator):
        raise ArgumentError(f"distortion: A must be a pullback.LinearOperator; got {type(A).__name__}")
    if tuple(points.shape[1:]) != A.dims or points.ndim != len(A.dims) + 1 or len(points) < 2:
        raise ShapeError(
            f"distortion: points must have shape (p, {', '.join(map(str, A.dims))}) with p >= 2; got "
            f"{tuple(points.shape)}"
        )
    with torch.no_grad():
        before, after = (_distances(t.flatten(1)) for t in (points, A(points)))
    if not bool((before > 0).all()):
        raise ArgumentError("distortion: points must be distinct; got two that are equal; drop one of them")
    return after / before - 1


def _distances(x: Tensor) -> Tensor:
    return torch.pdist(torch.view_as_real(x.resolve_conj()).flatten(1) if x.is_complex() else x)


def projection_dimension(n_points: int, epsilon: float) -> int:
    """The smallest m >= 4 log(p) / (e^2 / 2 - e^3 / 3): then some projection keeps all p^2 distances within 1 +- e.

    Args:
        n_points: how many points p.
        epsilon: the largest relative change e of a squared distance, in (0, 1).

    Source: Dasgupta & Gupta 2003, doi 10.1002/rsa.10073. Raises: ArgumentError.
    """
    if not n_points >= 2 or not 0 < epsilon < 1:
        raise ArgumentError(
            f"projection_dimension: n_points must be >= 2 and epsilon in (0, 1); got {n_points!r} and {epsilon!r}"
        )
    return math.ceil(4 * math.log(n_points) / (epsilon**2 / 2 - epsilon**3 / 3))
