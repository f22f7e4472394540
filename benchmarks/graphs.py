"""How long it takes to trace and to draw graphs: one table of the times that `pullback.graphs` holds itself to.

    python benchmarks/graphs.py [--only NAME]

resnet18 (11,689,512 parameters, float32, 1 x 3 x 224 x 224) and a chain of 3000 operations, one thread, without a `dot`
program. Every row prints the minimum and the median of several runs, the bar and whether the minimum meets it. The
browser row is left out, with the reason, where playwright or chromium is missing; that of torchviz where it is.
"""

# ruff: noqa: E402  (the number of threads must be set before NumPy and torch are imported)

from __future__ import annotations

import os

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from networks import ResNet18

import pullback as pb


def timed(call: Callable[[], Any], repeats: int) -> list[float]:
    """Seconds of every run."""
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return found


def row(name: str, times: list[float], bar: float) -> str:
    """One line of the table; times and bar in seconds."""
    met = "met" if min(times) <= bar else "NOT MET"
    return f"{name:48}{min(times) * 1e3:10.1f}{statistics.median(times) * 1e3:10.1f}{bar * 1e3:10.1f} ms  {met}"


def chain() -> torch.Tensor:
    """1500 times sin, then a sum: 3000 operations."""
    x = torch.ones(3, requires_grad=True)
    y = x
    for _ in range(1500):
        y = y.sin() + x
    return y


def opening(page: str, repeats: int) -> list[float] | str:
    """Seconds that a browser needs from the request for the page until its graph is drawn, or why nobody knows."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return "playwright is not installed"
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        return "there is no chromium on PATH"
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        path = Path(folder) / "graph.html"
        path.write_text(page, encoding="utf-8")
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        found = []
        for _ in range(repeats):
            tab = browser.new_page()
            tab.goto(path.as_uri())
            tab.wait_for_selector("#graph .nodes", state="attached")
            found.append(tab.evaluate("pullbackGraph.ready") / 1e3)
            tab.close()
        browser.close()
    return found


def beside_torchviz(y: torch.Tensor, drawn: pb.Graph) -> str:
    """Whether every node of torchviz' graph is there."""
    try:
        from torchviz import make_dot
    except ImportError:
        return "torchviz' nodes: not compared, torchviz is not installed"
    theirs = [line for line in make_dot(y).body if "->" not in line and "[" in line]
    return f"torchviz draws {len(theirs)} nodes, this package {len(drawn.nodes)}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="run the rows whose name contains this")
    wanted = parser.parse_args().only.lower()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    net, x = ResNet18(), torch.randn(1, 3, 224, 224)
    y = net(x)
    names = dict(net.named_parameters())
    backward, forward = pb.graph(net, x, kind="autograd"), pb.graph(net, x)
    plain = timed(lambda: net(x), 9)
    page = backward.to_html()
    long = pb.graph(chain())
    rows: list[tuple[str, Callable[[], Any], int, float]] = [
        ("resnet18: autograd trace", lambda: pb.graph(y, params=names), 15, 0.010),
        ("resnet18: forward trace", lambda: pb.graph(net, x), 9, 2 * min(plain) + 0.050),
        ("resnet18: SVG of the autograd graph", lambda: pb.graph(y, params=names).to_svg(), 5, 0.5),
        ("resnet18: SVG of the backward graph by module", backward.to_svg, 5, 0.5),
        ("resnet18: SVG of the forward graph", forward.to_svg, 5, 0.5),
        ("resnet18: HTML written", backward.to_html, 5, 0.5),
        (f"chain of {len(long.nodes)} nodes: SVG", long.to_svg, 2, 10.0),
    ]
    print(f"pullback.graphs, torch {torch.__version__}, {sys.platform}, 1 thread")
    print(f"{'':48}{'min':>10}{'median':>10}{'bar':>10}")
    print(f"{'resnet18: plain forward':48}{min(plain) * 1e3:10.1f}{statistics.median(plain) * 1e3:10.1f}{'':>10} ms")
    for name, call, repeats, bar in rows:
        if wanted in name.lower():
            print(row(name, timed(call, repeats), bar), flush=True)
    name = "resnet18: HTML opened in a browser"
    if wanted in name.lower():
        found = opening(page, 5)
        print(row(name, found, 0.5) if isinstance(found, list) else f"{name:48}not timed: {found}")
    print(f"resnet18: {len(backward.nodes)} nodes and {len(backward.edges)} edges; {beside_torchviz(y, backward)}")


if __name__ == "__main__":
    main()
