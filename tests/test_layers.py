"""The architecture, read from the imports: each folder imports only from folders below it, without cycles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "pullback"
# From the bottom up; a module may import from its own folder and from those before it.
LAYERS = ["core", "linops", "kernels", "functionals", "solvers", "autodiff", "graphs", "imaging", "io", "cli"]
ALSO = {"graphs": {"core"}, "kernels": {"core", "linops"}}  # narrower than "everything below"
HEAVY = {
    "torch._dynamo",
    "llvmlite",
    "numba",
    "triton",
    "finufft",
    "cufinufft",
    "matplotlib",
    "pygraphviz",
    "h5py",
    "scipy",
    "skimage",
    "pydicom",
    "typer",
    "tifffile",
}
TABLES: set[str] = set()  # files that may be long because they are tables

MODULES = sorted(SRC.rglob("*.py"))


def imports_of(path: Path) -> list[tuple[str, bool]]:
    """(module, at top level) for every import statement; TYPE_CHECKING blocks do not run and are left out."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    top = {id(node) for node in tree.body}
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            found += [(node.module, id(node) in top)]
            found += [(f"{node.module}.{alias.name}", id(node) in top) for alias in node.names]
    return found


def layer_of(module: str) -> str | None:
    parts = module.split(".")
    return parts[1] if parts[0] == "pullback" and len(parts) > 1 and parts[1] in LAYERS else None


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_down(path):
    own = path.relative_to(SRC).parts[0].removesuffix(".py")
    if own not in LAYERS:
        return
    allowed = ALSO.get(own, set(LAYERS[: LAYERS.index(own)])) | {own}
    for module, _ in imports_of(path):
        assert module != "pullback", f"{path.name} imports the package itself"
        layer = layer_of(module)
        assert layer is None or layer in allowed, f"{own}/{path.name} imports {module}, which lies above it"


def test_no_cycles():
    names = {
        ".".join(("pullback", *p.relative_to(SRC).with_suffix("").parts)).removesuffix(".__init__"): p for p in MODULES
    }
    graph = {n: {m for m, _ in imports_of(p) if m in names and m != n} for n, p in names.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for other in graph[name]:
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_importing_the_library_is_light():
    code = f"import sys, pullback; print([m for m in {sorted(HEAVY)} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    bare = "import sys, torch; print([m for m in " + str(sorted(HEAVY)) + " if m in sys.modules])"
    base = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True).stdout
    assert out == base, f"import pullback also imports {out}"


def test_files_are_short():
    long = {str(p.relative_to(SRC)): n for p in MODULES if (n := len(p.read_text().splitlines())) > 600}
    assert set(long) <= TABLES, long


def test_private_torch_api_stays_in_one_file():
    users = [p.name for p in MODULES if "torch._C" in p.read_text() or "_functorch" in p.read_text()]
    assert users == ["autograd.py"], users
