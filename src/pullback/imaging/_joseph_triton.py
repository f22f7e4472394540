"""Joseph's projector and its transpose on a GPU, as Triton kernels; the definition is in `_joseph.py`.

Both gather, so nothing is added atomically and results do not depend on the run. The forward owns a tile of views times
detector pixels and walks over the rows; views are sorted by slope, so that the views of a tile read the same part of a
row. The adjoint owns a tile of image pixels and walks over the views: pixel (i, j) receives from ray k

    max(0, 1 - |u[r, i, k] - j|),

which is the number by which the forward multiplies; the rays with |u - j| < 1 are found by one division.

In single precision the positions u are integers, in units of 2^-32 columns: sums of them are exact in any order, so
both directions see the same ray, and it is off by less than 1e-6 columns at 2048 rows. Otherwise they are float64
numbers, made by the same two fused operations in both directions.

No kernel waits for another, and the host looks at no number: which views run over columns is read by the kernels.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
import threading
import weakref
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from pullback.core.errors import DeviceError

if TYPE_CHECKING:
    import triton.language as tl

_WIDTH = 128  # of a tile: detector pixels of the forward, image columns of the adjoint
_VIEWS = (8, 2)  # views of a tile of the forward, for many and for few results
_ROWS = (16, 4, 2)  # image rows of a tile of the adjoint, likewise, and where positions of 64 bits fill the registers
_MANY = 1 << 20  # results; below this, large tiles would leave processors without work
_WARPS = 4
_SCRATCH = 1 << 28  # bytes of padded copies at a time; a larger batch is treated in parts
_INTS = 8  # numbers in a row of the integer table
_FAR = 1 << 29  # columns: further away is nothing


class Geometry(NamedTuple):
    """The rays of all views, sorted by `swap`, then slope; on the device of the operator.

    steep: number of views that run over rows, int64 (1,).
    ints: (n_views, 8) int64: position of ray `kept` in row 0, columns per row, columns per ray, each in 2^-32 columns;
        kept; swap; the view's number before sorting; the bits of the float32 numbers columns per ray, and one over it.
    lines: (4, n_views) float64: position of ray 0 in row 0, columns per row, columns per ray, rays per column.
    gain: (n_views,) float64: 1, or nan where a ray is not finite or all rays of a view coincide.
    order: (n_views,) int64, the numbers before sorting.
    """

    steep: Tensor
    ints: Tensor
    lines: Tensor
    gain: Tensor
    order: Tensor


class Options(NamedTuple):
    """What a kernel is compiled for."""

    fixed: bool  # positions as integers
    order: int  # 0 interpolates, 1 takes the slope
    row_power: int
    meets: int  # rays that can meet a pixel in one view


# Kernels -------------------------------------------------------------------------------------------------------------


def project_tile(
    rows: tl.tensor,
    columns: tl.tensor,
    steep: tl.tensor,
    ints: tl.tensor,
    lines: tl.tensor,
    gains: tl.tensor,
    out: tl.tensor,
    n_y: tl.tensor,
    n_x: tl.tensor,
    n_k: tl.tensor,
    n_views: tl.tensor,
    n_blocks: tl.tensor,
    FIXED: tl.constexpr,
    ORDER: tl.constexpr,
    VIEWS: tl.constexpr,
    BINS: tl.constexpr,
) -> None:
    """VIEWS views times BINS detector pixels of one image.

    `rows` and `columns` are the image and its transpose; each row has one zero before it and two behind.
    """
    program = tl.program_id(0)
    block = program % n_blocks
    rest = program // n_blocks
    n_tiles = (n_views + VIEWS - 1) // VIEWS + 1
    tile = rest % n_tiles
    member = (rest // n_tiles).to(tl.int64)
    n_steep = tl.load(steep).to(tl.int32)
    steep_tiles = (n_steep + VIEWS - 1) // VIEWS
    flat = tile >= steep_tiles
    first = tl.where(flat, n_steep + (tile - steep_tiles) * VIEWS, tile * VIEWS)
    last = tl.where(flat, n_views, n_steep)
    n_i = tl.where(flat, n_x, n_y)
    n_j = tl.where(flat, n_y, n_x)
    width = n_j + 3

    view = first + tl.arange(0, VIEWS)
    exists = view < last
    k_first = block * BINS
    k = k_first + tl.arange(0, BINS)
    start = tl.load(lines + view, mask=exists, other=-1e9)
    slope = tl.load(lines + n_views + view, mask=exists, other=0.0)
    step = tl.load(lines + 2 * n_views + view, mask=exists, other=0.0)

    # Rows in which a ray of the tile can meet the image, with a column to spare on either side.
    one_end = start + step * k_first
    other_end = start + step * (k_first + BINS - 1)
    lower = tl.minimum(one_end, other_end)
    upper = tl.maximum(one_end, other_end)
    tilt = tl.where(tl.abs(slope) < 1e-9, 1e-9, slope)
    enters = (-2.0 - upper) / tilt
    leaves = (n_j + 1.0 - lower) / tilt
    begin = tl.minimum(tl.maximum(tl.minimum(enters, leaves), 0.0), n_i * 1.0)
    end = tl.minimum(tl.maximum(tl.maximum(enters, leaves) + 1.0, 0.0), n_i * 1.0)
    i_first = tl.min(tl.where(exists, begin, n_i * 1.0).to(tl.int32), 0)
    i_last = tl.max(tl.where(exists, end, 0.0).to(tl.int32), 0)

    beyond = (n_j + 1).to(tl.uint32)
    row = tl.where(flat, columns, rows) + member * n_i * width + i_first.to(tl.int64) * width
    total = tl.zeros((VIEWS, BINS), out.dtype.element_ty)
    if FIXED:
        own = ints + view.to(tl.int64) * 8
        base = tl.load(own, mask=exists, other=-(1 << 61))
        across = tl.load(own + 1, mask=exists, other=0)
        along = tl.load(own + 2, mask=exists, other=0)
        kept = tl.load(own + 3, mask=exists, other=0)
        u = base[:, None] + along[:, None] * (k[None, :] - kept[:, None])
        u += across[:, None] * i_first + (1 << 32)
        for _ in range(i_first, i_last):
            at = tl.minimum((u >> 32).to(tl.uint32), beyond).to(tl.int32)
            here = tl.load(row + at)
            right = tl.load(row + at + 1)
            if ORDER == 0:
                # the upper 23 bits behind the point are the mantissa of 1 + weight
                weight = ((u.to(tl.uint32) >> 9) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
                total += here + weight * (right - here)
            else:
                total += right - here
            u += across[:, None]
            row += width
    else:
        ray = k.to(tl.float64)[None, :] + tl.zeros((VIEWS, BINS), tl.float64)
        spacing = step[:, None] + tl.zeros((VIEWS, BINS), tl.float64)
        for i in range(i_first, i_last):
            u0 = tl.fma(slope, tl.zeros((VIEWS,), tl.float64) + i, start)
            u = tl.fma(spacing, ray, u0[:, None] + tl.zeros((VIEWS, BINS), tl.float64))
            floor = tl.floor(u)
            at = tl.minimum(tl.maximum(floor, -2.0), n_j + 0.0).to(tl.int32) + 1
            at = tl.minimum(at.to(tl.uint32), beyond).to(tl.int32)
            here = tl.load(row + at)
            right = tl.load(row + at + 1)
            if ORDER == 0:
                total += here + (u - floor).to(here.dtype) * (right - here)
            else:
                total += right - here
            row += width

    gain = tl.load(gains + view, mask=exists, other=0.0).to(total.dtype)
    number = tl.load(ints + view.to(tl.int64) * 8 + 5, mask=exists, other=0)
    target = out + (member * n_views + number)[:, None] * n_k + k[None, :]
    tl.store(target, total * gain[:, None], mask=exists[:, None] & (k < n_k)[None, :])


def spread_tile(
    sinogram: tl.tensor,
    ints: tl.tensor,
    lines: tl.tensor,
    out: tl.tensor,
    n_y: tl.tensor,
    n_x: tl.tensor,
    n_k: tl.tensor,
    n_views: tl.tensor,
    n_down: tl.tensor,
    n_across: tl.tensor,
    FIXED: tl.constexpr,
    ORDER: tl.constexpr,
    ROW_POWER: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """ROWS x COLUMNS pixels of one image; each row of the sinogram has COUNT zeros on either side."""
    program = tl.program_id(0)
    x_first = (program % n_across) * COLUMNS
    rest = program // n_across
    y_first = (rest % n_down) * ROWS
    member = (rest // n_down).to(tl.int64)
    lane = tl.arange(0, ROWS)
    x = x_first + tl.arange(0, COLUMNS)
    y = y_first + lane
    width = n_k + 2 * COUNT
    beyond = (n_k + COUNT).to(tl.uint32)
    source = sinogram + member * n_views * width
    total = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
    zero = tl.zeros((ROWS, COLUMNS), tl.float64)

    for r in range(n_views):
        own = ints + r * 8
        kept = tl.load(own + 3).to(tl.int32)
        swap = tl.load(own + 4) != 0
        line = source + tl.load(own + 5) * width
        if ROW_POWER == 0:
            got = total
        else:
            got = tl.zeros((ROWS, COLUMNS), out.dtype.element_ty)
        if FIXED:
            base = tl.load(own)
            slope = tl.load(own + 1)
            step = tl.load(own + 2)
            # u - j = base + down * y + across * x + step * (k - kept)
            down = tl.where(swap, -(1 << 32), slope)
            across = tl.where(swap, slope, -(1 << 32))
            spacing = tl.load(own + 6).to(tl.int32).to(tl.float32, bitcast=True)
            inverse = tl.load(own + 7).to(tl.int32).to(tl.float32, bitcast=True)
        if FIXED and ORDER == 0:
            # The ray that passes closest to the tile's middle row, exactly; from there on single precision is enough,
            # because the distances in a tile are small.
            middle = base + down * (y_first + ROWS // 2) + across * x
            nearest = tl.floor(-(middle.to(tl.float32) * 0.5**32) * inverse + 0.5)
            nearest = tl.minimum(tl.maximum(nearest, -1e9), 1e9).to(tl.int32)
            offset = (middle + step * nearest).to(tl.float32) * 0.5**32
            fall = (down.to(tl.float32) * 0.5**32) * (lane - ROWS // 2).to(tl.float32)
            distance = offset[None, :] + fall[:, None]
            # The first ray with u - j > -1 (or < 1, if rays run to the left). Adding 1.5 * 2^23 rounds.
            shifted = (0.5 - tl.abs(inverse)) - distance * inverse + 12582912.0
            t = distance + (shifted - 12582912.0) * spacing
            at = kept + nearest[None, :] + (shifted.to(tl.int32, bitcast=True) - 0x4B400000)
            at = tl.minimum((at + COUNT).to(tl.uint32), beyond).to(tl.int32)
            for c in tl.range(0, COUNT, loop_unroll_factor=COUNT if COUNT <= 8 else 1):
                got += tl.load(line + at + c) * tl.maximum(1.0 - tl.abs(t), 0.0)
                t += spacing
        elif FIXED:
            place = base + down * y[:, None] + across * x[None, :]
            # a hundredth of a ray more than enough, against rounding
            density = tl.load(lines + 3 * n_views + r)
            ahead = -(place.to(tl.float64) * 0.5**32) * density - tl.abs(density) - 0.01
            first = tl.minimum(tl.maximum(tl.floor(ahead), -1e9), 1e9).to(tl.int32) + 1
            at = tl.minimum((kept + first + COUNT).to(tl.uint32), beyond).to(tl.int32)
            t = place + step * first
            for c in range(COUNT):
                side = tl.where(t >= 0, -1.0, 1.0)
                side = tl.where((t >= -(1 << 32)) & (t < (1 << 32)), side, 0.0)
                got += tl.load(line + at + c) * side.to(got.dtype)
                t += step
        else:
            start = tl.load(lines + r) + zero
            slope = tl.load(lines + n_views + r) + zero
            step = tl.load(lines + 2 * n_views + r) + zero
            density = tl.load(lines + 3 * n_views + r)
            down = y.to(tl.float64)[:, None] + zero
            across = x.to(tl.float64)[None, :] + zero
            u0 = tl.fma(slope, tl.where(swap, across, down), start)
            j = tl.where(swap, down, across)
            ahead = (j - u0) * density - tl.abs(density) - 0.01
            first = tl.minimum(tl.maximum(tl.floor(ahead), -1e9), 1e9) + 1.0
            at = tl.minimum((first.to(tl.int32) + COUNT).to(tl.uint32), beyond).to(tl.int32)
            for c in range(COUNT):
                t = tl.fma(step, first + c, u0) - j
                if ORDER == 0:
                    part = tl.maximum(1.0 - tl.abs(t), 0.0)
                else:
                    part = tl.where((t >= -1.0) & (t < 1.0), tl.where(t >= 0.0, -1.0, 1.0), 0.0)
                got += tl.load(line + at + c) * part.to(got.dtype)
        if ROW_POWER == 0:
            total = got
        else:
            height = tl.where(swap, x[None, :] - (n_x - 1) * 0.5, y[:, None] - (n_y - 1) * 0.5)
            total += got * height.to(got.dtype)

    target = out + (member * n_y + y)[:, None] * n_x + x[None, :]
    tl.store(target, total, mask=(y < n_y)[:, None] & (x < n_x)[None, :])


def require(device: torch.device) -> None:
    """Raise DeviceError where the kernels cannot run."""
    if device.type != "cuda":
        raise DeviceError(
            f"XRayTransform with method='joseph' runs on the CPU and on CUDA devices; got a tensor on {device}; "
            f"move the operator and the tensor with .to('cpu')"
        )
    if importlib.util.find_spec("triton") is None:
        raise DeviceError(
            "XRayTransform with method='joseph' needs Triton on a CUDA device; pip install triton, or move the "
            "operator and the tensor with .to('cpu')"
        )


@functools.cache
def compiled(kernel: Any) -> Any:
    """The kernel as a Triton function. Sizes are values of the run: another size compiles nothing."""
    import triton
    import triton.language

    globals()["tl"] = triton.language
    return triton.jit(kernel, do_not_specialize=[n for n in _names(kernel) if n.startswith("n_")])


def _names(kernel: Any) -> tuple[str, ...]:
    return tuple(kernel.__code__.co_varnames[: kernel.__code__.co_argcount])


# Rays ----------------------------------------------------------------------------------------------------------------

# slope -> {settings: (offset, swap, versions, Geometry)}. Weak, by identity: they leave with the operator's tensors.
_kept: Any = WeakIdKeyDictionary()
_kept_lock = threading.Lock()
_MAX_KEPT = 4


def geometry(slope: Tensor, offset: Tensor, swap: Tensor, dims: tuple[int, ...], n_k: int) -> Geometry:
    """The rays of the views, from the tensors of `_JosephSampler`; kept while these are the same and unchanged.

    Not kept while a CUDA graph is recorded, because then nothing is computed, and for each stream by itself, because
    another stream would not wait.
    """
    held = (slope, offset, swap)
    cuda = slope.device.type == "cuda"
    if any(t.is_inference() for t in held) or (cuda and torch.cuda.is_current_stream_capturing()):
        return _geometry(*held, dims, n_k)
    key = (dims, n_k, torch.cuda.current_stream(slope.device).cuda_stream if cuda else 0)
    versions = tuple(t._version for t in held)
    with _kept_lock:
        known = _kept.setdefault(slope, {})
        entry = known.get(key)
    if entry is not None and entry[0]() is offset and entry[1]() is swap and entry[2] == versions:
        return entry[3]
    made = _geometry(*held, dims, n_k)
    with _kept_lock:
        if len(known) >= _MAX_KEPT:
            known.clear()
        known[key] = (weakref.ref(offset), weakref.ref(swap), versions, made)
    return made


@torch.no_grad()
def _geometry(slope: Tensor, offset: Tensor, swap: Tensor, dims: tuple[int, ...], n_k: int) -> Geometry:
    n_y, n_x = dims
    across, flat = slope[:, 0].double(), swap[:, 0]
    first, last = offset[:, 0].double(), offset[:, -1].double()
    step = (last - first) / (n_k - 1) if n_k > 1 else torch.ones_like(first)
    i_c = torch.where(flat, (n_x - 1) / 2, (n_y - 1) / 2).double()
    j_c = torch.where(flat, (n_y - 1) / 2, (n_x - 1) / 2).double()
    start = j_c + first - across * i_c
    good = across.isfinite() & start.isfinite() & step.isfinite() & (step != 0)
    across, start, step = across.where(good, 0.0), start.where(good, 0.0), step.where(good, 1.0)
    # The ray that passes closest to the middle of the image is the one from which integers count.
    kept = ((j_c - start - across * i_c) / step).round().clamp(0, n_k - 1)
    base = (start + step * kept).clamp(-_FAR, _FAR)
    order = torch.argsort(flat * 4.0 + across, stable=True)
    fixed = [(v * 2.0**32).round().long() for v in (base, across, step.clamp(-_FAR, _FAR))]
    numbers = [*fixed, kept.long(), flat.long()]
    ints = torch.zeros((len(order), _INTS), dtype=torch.int64, device=order.device)
    ints[:, :5] = torch.stack(numbers, 1)[order]
    ints[:, 5] = order
    spacing = step[order].float()
    ints[:, 6] = spacing.view(torch.int32)
    ints[:, 7] = (1 / spacing).view(torch.int32)
    gain = torch.ones_like(start).where(good, math.nan)[order]
    lines = torch.stack((start, across, step, 1 / step))[:, order].contiguous()
    return Geometry((~flat).sum().reshape(1), ints, lines, gain, order)


def options(
    dtype: torch.dtype, dims: tuple[int, ...], n_k: int, least_step: float, order: int, row_power: int
) -> Options:
    """How to compute: integers hold positions in single precision unless rays are very dense, or very far apart.

    A pixel is met by the rays with |u - j| < 1, hence by ceil(2/step) of them; where the end points count too, or the
    first ray is found to 1 % of a ray only, by one more.
    """
    reach = 1.5 * least_step * n_k + max(dims)
    fixed = dtype == torch.float32 and least_step > 2.0**-10 and reach < _FAR
    count = max(1, math.ceil(2 / least_step - 1e-9))
    return Options(fixed, order, row_power, count if fixed and order == 0 else count + 1)


# Launch --------------------------------------------------------------------------------------------------------------


def project(x: Tensor, rays: Geometry, opts: Options, dims: tuple[int, ...], dimsd: tuple[int, ...]) -> Tensor:
    """(b, n_views, n_k) from real images (b, n_y, n_x)."""
    (n_y, n_x), (n_views, n_k) = dims, dimsd
    out = x.new_empty((len(x), *dimsd))
    views = _VIEWS[out.numel() < _MANY]
    n_blocks = -(-n_k // _WIDTH)
    n_tiles = -(-n_views // views) + 1
    for part in _parts(len(x), 2 * x.element_size() * n_y * n_x):
        images = x[part]
        padded = [
            _padded(images.mT if turned else images, dims[1 if turned else 0], opts.row_power) for turned in (0, 1)
        ]
        grid = n_blocks * n_tiles * len(images)
        _launch(
            project_tile, grid, *padded, rays.steep, rays.ints, rays.lines, rays.gain, out[part],
            n_y, n_x, n_k, n_views, n_blocks, FIXED=opts.fixed, ORDER=opts.order, VIEWS=views, BINS=_WIDTH,
        )  # fmt: skip
    return out


def spread(y: Tensor, rays: Geometry, opts: Options, dims: tuple[int, ...], dimsd: tuple[int, ...]) -> Tensor:
    """(b, n_y, n_x) from real sinograms (b, n_views, n_k)."""
    (n_y, n_x), (n_views, n_k) = dims, dimsd
    out = y.new_empty((len(y), *dims))
    rows = _ROWS[out.numel() < _MANY if opts.fixed and not opts.order else 2]
    n_across, n_down = -(-n_x // _WIDTH), -(-n_y // rows)
    gain = torch.empty_like(rays.gain).scatter_(0, rays.order, rays.gain).to(y.dtype)[:, None]
    for part in _parts(len(y), y.element_size() * n_views * n_k):
        sinograms = y[part]
        width = n_k + 2 * opts.meets
        padded = (gain - gain).expand(len(sinograms), n_views, width).contiguous()  # nan for views that are
        torch.mul(sinograms, gain, out=padded[..., opts.meets : opts.meets + n_k])
        grid = n_across * n_down * len(sinograms)
        _launch(
            spread_tile, grid, padded, rays.ints, rays.lines, out[part], n_y, n_x, n_k, n_views, n_down, n_across,
            FIXED=opts.fixed, ORDER=opts.order, ROW_POWER=opts.row_power, COUNT=opts.meets,
            ROWS=rows, COLUMNS=_WIDTH,
        )  # fmt: skip
    return out


def _padded(images: Tensor, n_i: int, row_power: int) -> Tensor:
    """A copy with one zero before and two behind each row, multiplied by the row's height if that is asked for."""
    out = images.new_zeros((*images.shape[:-1], images.shape[-1] + 3))
    inner = out[..., 1:-2]
    if row_power:
        height = torch.arange(n_i, dtype=images.dtype, device=images.device) - (n_i - 1) / 2
        torch.mul(images, height[:, None], out=inner)
    else:
        inner.copy_(images)
    return out


def _parts(n: int, size: int) -> list[slice]:
    """Slices of a batch of n images of `size` bytes."""
    each = max(1, _SCRATCH // size)
    return [slice(first, min(first + each, n)) for first in range(0, n, each)]


def _launch(kernel: Any, grid: int, *args: Any, **constants: Any) -> None:
    tensor = args[0]
    device = torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()
    with device:
        compiled(kernel)[(grid,)](*args, **constants, num_warps=_WARPS)
