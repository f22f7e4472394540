"""The commands and their options."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pullback.cli import demo as demonstration
from pullback.cli import graph as drawing
from pullback.cli.job import Settings, run_job
from pullback.core.errors import ArgumentError
from pullback.imaging.reconstruct import FILTERS, METHODS

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Differentiable operators for inverse problems: reconstruct scans, and draw graphs of computations.",
)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code.

    Raises: ArgumentError for a malformed command line, and whatever a command raises.
    """
    try:
        code = app(list(arguments), prog_name="pullback", standalone_mode=False)
    except Exception as error:
        # typer's own errors of usage, from typer or from click by version, are told apart by what they can do
        text = getattr(error, "format_message", None)
        if text is None:
            raise
        raise ArgumentError(text() or "see pullback --help") from None
    return code if isinstance(code, int) else 0


def _version(value: bool) -> None:
    if value:
        from importlib.metadata import version

        print(f"pullback {version('pullback')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


@app.command()
def reconstruct(
    file: Annotated[Path, typer.Argument(help="Data Exchange HDF5 (.h5 .hdf .hdf5 .nxs), .npz or .npy sinograms.")],
    out: Annotated[Path, typer.Option(help="Folder for the results; an interrupted run resumes in it.")],
    method: Annotated[str, typer.Option(help=" | ".join(METHODS) + " (-tv may be left away)")] = "fista-tv",
    calibrate: Annotated[str, typer.Option(help="What to find from the data: center, angles or center,angles.")] = "",
    slices: Annotated[str, typer.Option(help="Slices a:b (b excluded), a:b:step or one index; all by default.")] = "",
    angles: Annotated[
        str, typer.Option(help="Angles in degrees: start:stop:count (stop excluded), or a text or .npy file.")
    ] = "",
    center: Annotated[
        float | None, typer.Option(help="Rotation axis, or the start of its calibration [detector pixels]; the middle.")
    ] = None,
    det_spacing: Annotated[float, typer.Option(help="Distance of detector pixels [your unit of length].")] = 1.0,
    pixel_size: Annotated[float | None, typer.Option(help="Edge of an image pixel; the detector spacing.")] = None,
    size: Annotated[int | None, typer.Option(help="Pixels along each edge of the image; the detector's width.")] = None,
    maxiter: Annotated[
        int | None, typer.Option(help="Iterations; each method has its default, 100 for fista-tv, 20 for cgls.")
    ] = None,
    weight: Annotated[float | None, typer.Option(help="Weight of the total variation; from the noise.")] = None,
    filter: Annotated[str, typer.Option(help="Of fbp: " + " | ".join(FILTERS))] = "ramp",
    projector: Annotated[str, typer.Option(help="joseph | fourier (faster)")] = "fourier",
    format: Annotated[str, typer.Option(help="Of the volume: tiff | npy, float32.")] = "tiff",
    force: Annotated[bool, typer.Option("--force", help="Replace the results of other settings in --out.")] = False,
) -> None:
    """Reconstruct the slices of a parallel-beam scan, with its geometry calibrated from the data if asked for."""
    settings = Settings(
        file=str(file),
        method=method,
        calibrate=tuple(p for p in calibrate.replace(" ", "").split(",") if p),
        slices=slices,
        angles=angles,
        center=center,
        det_spacing=det_spacing,
        pixel_size=pixel_size,
        size=size,
        maxiter=maxiter,
        weight=weight,
        filter=filter,
        projector=projector,
        format=format,
    )
    _print(run_job(settings, out, force))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the figures and the report.")] = Path("demo-output"),
) -> None:
    """Simulate a low-dose scan of a real CT slice with a wrong rotation centre, and reconstruct it in several ways."""
    _print(demonstration.run_demo(out))


@app.command(name="graph")
def draw_graph(
    target: Annotated[
        str,
        typer.Argument(
            help="module:name or file.py:name of a module, a class, a function, a tensor, or a function that makes one."
        ),
    ],
    input: Annotated[
        list[str] | None,
        typer.Option(help="An example input: 1x3x224x224, 8x16:int64, scalar. Once for each input, in order."),
    ] = None,
    kind: Annotated[str, typer.Option(help="forward | autograd (grouped by module) | joint | fx")] = "",
    out: Annotated[
        Path | None, typer.Option(help="File: .svg .png .pdf .html (interactive) .dot .json; NAME.svg by default.")
    ] = None,
    theme: Annotated[str, typer.Option(help="basic | blue | dark | print")] = "basic",
    collapse: Annotated[
        str, typer.Option(help="Draw modules as one node: their depth (1 ...) or path ('layer4', 'layer?.*').")
    ] = "",
    fold: Annotated[
        list[str] | None, typer.Option(help="PATTERN=LABEL: 'Conv > BatchNorm > Relu=ConvBnRelu'. Repeatable.")
    ] = None,
    prune: Annotated[
        list[str] | None, typer.Option(help="Leave out what matches this pattern, with its edges. Repeatable.")
    ] = None,
    hide: Annotated[
        list[str] | None, typer.Option(help="Leave out what matches this pattern, and join its neighbours. Repeatable.")
    ] = None,
    gradients: Annotated[bool, typer.Option("--gradients", help="Write norms of gradients on the edges.")] = False,
    saved: Annotated[
        bool, typer.Option("--saved", help="Draw tensors that are kept for the derivative (--kind autograd).")
    ] = False,
) -> None:
    """Draw the graph of a computation: autograd's, the forward one, or that of the compiler."""
    request = drawing.Request(
        target=target,
        inputs=input or (),
        kind=kind,
        out=out,
        theme=theme,
        collapse=collapse,
        fold=fold or (),
        prune=prune or (),
        hide=hide or (),
        gradients=gradients,
        saved=saved,
    )
    _print(drawing.draw(request))


def _print(lines: Sequence[Any]) -> None:
    for line in lines:
        print(line)
    sys.stdout.flush()
