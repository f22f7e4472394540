"""Passes: a graph in, a simpler one out: `Prune("Constant")(graph)`, `graph.apply(Prune("Constant"), ...)`."""

from pullback.graphs.passes.fold import Collapse as Collapse
from pullback.graphs.passes.fold import Fold as Fold
from pullback.graphs.passes.fold import FoldDuplicates as FoldDuplicates
from pullback.graphs.passes.fold import FoldId as FoldId
from pullback.graphs.passes.language import parse as parse
from pullback.graphs.passes.pattern import matches as matches
from pullback.graphs.passes.rewrite import Pass as Pass
from pullback.graphs.passes.rewrite import verify as verify
from pullback.graphs.passes.simple import CommonNames as CommonNames
from pullback.graphs.passes.simple import Filter as Filter
from pullback.graphs.passes.simple import Hide as Hide
from pullback.graphs.passes.simple import Prune as Prune
from pullback.graphs.passes.simple import PruneBranch as PruneBranch
from pullback.graphs.passes.simple import Rename as Rename
