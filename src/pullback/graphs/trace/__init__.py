"""Tracers: autograd's graph, the forward computation, FX graphs, and objects that describe themselves."""

from pullback.graphs.trace.autograd import autograd_graph as autograd_graph
from pullback.graphs.trace.forward import forward_graph as forward_graph
from pullback.graphs.trace.forward import module_paths as module_paths
from pullback.graphs.trace.fx import fx_graph as fx_graph
from pullback.graphs.trace.joint import joint_graph as joint_graph
from pullback.graphs.trace.protocol import Described as Described
from pullback.graphs.trace.protocol import described_graph as described_graph
