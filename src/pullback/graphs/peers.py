"""The functions of torchviz and hiddenlayer, with their arguments: users of those change an import."""

from __future__ import annotations

import tempfile
import webbrowser
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pullback.core.errors import ArgumentError
from pullback.graphs.front import graph
from pullback.graphs.graph import OPTIONS, Graph, Look, Styles
from pullback.graphs.model import GraphData
from pullback.graphs.passes import CommonNames, Fold, FoldDuplicates, Prune
from pullback.graphs.trace import autograd_graph

Passes = Iterable[Callable[[GraphData], GraphData]]

# build_graph's defaults: what belongs to the framework goes, then layers that are used together become one.
FRAMEWORK_TRANSFORMS: tuple[Callable[[GraphData], GraphData], ...] = (
    Prune(lambda node: node.kind in ("parameter", "constant") or (node.kind == "input" and bool(node.group))),
    CommonNames(),
)
SIMPLICITY_TRANSFORMS: tuple[Callable[[GraphData], GraphData], ...] = (
    Fold("Conv > Conv > BatchNormalization > Relu", "ConvConvBnRelu"),
    Fold("Conv > BatchNormalization > Relu", "ConvBnRelu"),
    Fold("Conv > BatchNormalization", "ConvBn"),
    Fold("Conv > Relu", "ConvRelu"),
    Fold("Linear > Relu", "LinearRelu"),
    Fold("ConvBnRelu > MaxPool", "ConvBnReluMaxpool"),
    Fold("ConvRelu > MaxPool", "ConvReluMaxpool"),
    FoldDuplicates(),
)


class Dot(Graph):
    """A graph with the attributes and methods of `graphviz.Digraph`; it needs no `dot` program.

    Attributes:
        format: what `render` and `pipe` write by default: "pdf", "svg", "png" or "dot".
        graph_attr, node_attr, edge_attr: attributes of Graphviz, set on top of the theme's.
        details: letters of each further fact on a node; 0 for none.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.format = "pdf"
        self.details = 0
        self.graph_attr: dict[str, str] = {}
        self.node_attr: dict[str, str] = {}
        self.edge_attr: dict[str, str] = {}

    @classmethod
    def of(cls, data: GraphData, theme: Look = "basic", styles: Styles | None = None) -> Self:
        """A graph of this class; attributes of another `Dot` are taken over."""
        new = super().of(data, theme, styles)
        if isinstance(data, Dot):
            new.format, new.details = data.format, data.details
            for name in ("graph_attr", "node_attr", "edge_attr"):
                setattr(new, name, dict(getattr(data, name)))
        return new

    def attr(self, kw: str = "graph", **attributes: Any) -> None:
        """Set attributes of Graphviz for "graph", "node" or "edge": `attr(rankdir="LR")`.

        Raises: ArgumentError for another `kw`.
        """
        if kw not in ("graph", "node", "edge"):
            raise ArgumentError(f"attr: kw must be 'graph', 'node' or 'edge'; got {kw!r}")
        getattr(self, f"{kw}_attr").update({name: str(value) for name, value in attributes.items()})

    def encoded(self, format: str, theme: Look | None = None, styles: Styles | None = None, **options: Any) -> bytes:
        """As `Graph.encoded`, with the attributes of this object."""
        own = {"graph": self.graph_attr, "node": self.node_attr, "edge": self.edge_attr}
        if "attributes" in OPTIONS.get(format, ()):
            more: Mapping[str, Mapping[str, str]] = options.get("attributes") or {}
            options["attributes"] = {key: row | dict(more.get(key, {})) for key, row in own.items()}
            options.setdefault("details", self.details)
        return super().encoded(format, theme, styles, **options)

    @property
    def source(self) -> str:
        """The DOT text."""
        return self.to_dot()

    def pipe(self, format: str | None = None, encoding: str | None = None) -> bytes | str:
        """The picture: bytes, or text if an encoding is given."""
        data = self.encoded(format or self.format)
        return data if encoding is None else data.decode(encoding)

    def render(
        self,
        filename: str | Path | None = None,
        directory: str | Path | None = None,
        view: bool = False,
        cleanup: bool = False,
        format: str | None = None,
    ) -> str:
        """Write the DOT text to `filename` and the picture to `filename.format`.

        Args:
            filename: without the format; "Digraph.gv" by default.
            directory: where; made if it does not exist.
            view: open the picture.
            cleanup: leave the DOT text out.
            format: "pdf", "svg", "png", "html", "json" or "dot".

        Returns: the name of the picture's file.
        """
        source = Path(directory or "") / (filename or "Digraph.gv")
        source.parent.mkdir(parents=True, exist_ok=True)
        picture = super().save(source.with_name(f"{source.name}.{format or self.format}"))
        if not cleanup:
            source.write_bytes(self.encoded("dot"))
        if view:
            webbrowser.open(picture.absolute().as_uri())
        return str(picture)

    def save(
        self,
        path: str | Path = "Digraph.gv",
        theme: Look | None = None,
        *,
        styles: Styles | None = None,
        **options: Any,
    ) -> Path:
        """As `Graph.save`; a name without ending gets the DOT text, as in graphviz."""
        if not Path(path).suffix:
            target = Path(path)
            target.write_bytes(self.encoded("dot", theme, styles, **options))
            return target
        return super().save(path, theme, styles=styles, **options)

    def view(self) -> Path:
        """Draw into a temporary folder and open it."""
        return Path(self.render(directory=tempfile.mkdtemp(prefix="pullback-"), view=True))


class Layers(Graph):
    """A graph with the methods of hiddenlayer's: `theme` may be assigned, `save` takes a format, `build_dot` exists."""

    def build_dot(self) -> Dot:
        """The graph as an object like `graphviz.Digraph`."""
        return Dot.of(self, self.theme, self.styles)

    def save(
        self,
        path: str | Path,
        theme: Look | None = None,
        *,
        format: str | None = None,
        styles: Styles | None = None,
        **options: Any,
    ) -> Path:
        """As `Graph.save`; `format` is the ending of a name that has none, "pdf" by default."""
        path = Path(path)
        if path.suffix.lower().removeprefix(".") not in OPTIONS or format not in (None, path.suffix[1:].lower()):
            path = path.with_name(f"{path.name}.{format or 'pdf'}")
        return super().save(path, theme, styles=styles, **options)


def make_dot(
    var: Any,
    params: Any = None,
    show_attrs: bool = False,
    show_saved: bool = False,
    max_attr_chars: int = 50,
) -> Dot:
    """Torchviz' `make_dot`: the autograd graph behind `var`, without the `dot` program and for graphs of any depth.

    Args:
        var: a tensor, or a list, tuple or dict of tensors.
        params: names of leaves: a dict, `named_parameters()` or a module.
        show_attrs: write what each operation keeps besides tensors on its node.
        show_saved: draw the tensors that are kept for the derivative; also after `backward()`.
        max_attr_chars: letters of each attribute.

    Returns: a graph with `.render(filename, format=)`, `.save`, `.source`, `.pipe(format=)`, `.attr`, `.format`.
    Raises: ArgumentError if nothing in `var` requires grad.
    """
    if max_attr_chars < 3:
        raise ArgumentError(f"make_dot: max_attr_chars must be at least 3; got {max_attr_chars}")
    dot = Dot.of(autograd_graph(var, params, saved=show_saved))
    dot.details = max_attr_chars if show_attrs else 0
    return dot


def build_graph(
    model: Any,
    args: Any = None,
    input_names: Sequence[str] | None = None,
    transforms: Passes | str | None = "default",
    framework_transforms: Passes | str | None = "default",
) -> Layers:
    """Hiddenlayer's `build_graph`: the layers of a model, with those that are used together folded into one.

    Args:
        model: a module or function.
        args: one example input, or a tuple of them.
        input_names: labels of the inputs, in order.
        transforms: passes; by default those of `SIMPLICITY_TRANSFORMS`; None or [] for none.
        framework_transforms: passes before them; by default parameters, buffers and constants are left out, and
            operations get common names ("Conv", "BatchNormalization", "Relu", "Linear").

    Returns: a graph with `.theme`, `.save(path, format=)`, `.build_dot()`.
    Raises: ArgumentError without example inputs.
    """
    if args is None:
        raise ArgumentError("build_graph: give example inputs: build_graph(model, torch.zeros(1, 3, 224, 224))")
    data: GraphData = graph(model, *(args if isinstance(args, (tuple, list)) else (args,)))
    if input_names is not None:
        names = iter([input_names] if isinstance(input_names, str) else input_names)
        sources = {e.target for e in data.edges}
        inputs = [n.id for n in data.nodes if n.kind in ("input", "leaf") and n.id not in sources and n.values]
        labels = dict(zip(inputs, names, strict=False))
        data = data.replaced([replace(n, label=labels.get(n.id, n.label)) for n in data.nodes], data.edges)
    for passes, default in ((framework_transforms, FRAMEWORK_TRANSFORMS), (transforms, SIMPLICITY_TRANSFORMS)):
        if isinstance(passes, str) and passes != "default":
            raise ArgumentError(f"build_graph: transforms are a list of passes, or 'default'; got {passes!r}")
        for one in default if isinstance(passes, str) else passes or ():
            data = one(data)
    return Layers.of(data)
