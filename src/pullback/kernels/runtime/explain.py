"""A Plan for people: sizes, operations for a pair, LLVM text, assembly of the loop over pairs."""

from __future__ import annotations

import re

from pullback.kernels.codegen.llvm import generate
from pullback.kernels.plan.schedule import Plan
from pullback.kernels.runtime.compile import assembly

_ARITHMETIC = re.compile(
    r"^\s*(v?f?n?m(add|sub)|v?(add|sub|mul|div|sqrt|max|min|scalef)[ps][sd]|f(add|sub|mul|mla|mls))"
)


def explain(plan: Plan) -> str:
    """The report of one plan."""
    counts = operations(plan)
    total = sum(counts.values())
    packed = {name: plan.layout.sides[role].rows for name, role in (("i", 1), ("j", 2), ("parameters", 0))}
    lines = [
        f"target      {plan.target.cpu}: {plan.lanes} lanes of {plan.elem}",
        f"plan        {'ij'[plan.lane]} along the lanes; {plan.u} vectors x {plan.g} rows a group; "
        f"tiles of {plan.tile} x chunks of {plan.chunk}",
        f"packed      numbers for each {', '.join(f'{k}: {n}' for k, n in packed.items())}",
        f"a pair      {total} operations: {', '.join(f'{k} x {n}' for k, n in sorted(counts.items()))}",
        "",
        "LLVM text",
        generate(plan).text,
        "",
        "assembly of the inner loop",
        inner_loop(assembly(plan)),
    ]
    return "\n".join(lines)


def operations(plan: Plan) -> dict[str, int]:
    """How often each operation is done for a pair, adding to the sums included."""
    inside: dict[int, int] = {}
    counts: dict[str, int] = {}
    for v in reversed(plan.layout.pairs):  # readers first
        times = inside.get(id(v), 1)
        size = v.params[0] if v.op == "Loop" else 0
        for a in v.args:
            if a.depth:
                inside[id(a)] = max(inside.get(id(a), 1), size or times)
        if not size:
            counts[v.op] = counts.get(v.op, 0) + times
        else:
            counts["Add"] = counts.get("Add", 0) + size
    width = sum(s.size for group in plan.layout.lowered.segments for s in group)
    counts["into sums"] = width
    return counts


def inner_loop(text: str) -> str:
    """The loop of the assembly with the most arithmetic: from a label to the jump back to it."""
    lines = text.splitlines()
    labels = {line.split(":")[0]: k for k, line in enumerate(lines) if re.match(r"^\.?L\w+:", line)}
    best, found = 0, ""
    for k, line in enumerate(lines):
        jump = re.match(r"^\s+(?:j\w+|b\.?\w*|cbn?z\s+\w+,|tbn?z\s.*,)\s+(\.?L\w+)", line)
        start = labels.get(jump.group(1), k) if jump else k
        body = lines[start : k + 1]
        if start < k and not any(_inner_jump(x, labels, start, start + n) for n, x in enumerate(body[:-1])):
            work = sum(bool(_ARITHMETIC.match(x)) for x in body)
            if work > best:
                best, found = work, "\n".join(body)
    return found


def _inner_jump(line: str, labels: dict[str, int], start: int, here: int) -> bool:
    """Whether the line jumps back to a label after `start`: then the loop holds another one."""
    jump = re.match(r"^\s+(?:j\w+|b\.?\w*)\s+(\.?L\w+)", line)
    return bool(jump) and start <= labels.get(jump.group(1), -1) < here if jump else False
