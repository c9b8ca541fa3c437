"""Which small changes of the code no test of the fast suite notices.

    python tests/tools/mutants.py                    # every mutant of TARGETS: about an hour
    python tests/tools/mutants.py moments.py 1 10    # of one file, those with number % 10 == 1

An operator, a comparison or a number is changed, one at a time, in a copy of src. mutmut does the
same with an installation of its own, in which the native module and an editable install's finder
do not go together. Survivors are in mutants.md, each with its reason.
"""

import ast
import copy
import sys
from collections.abc import Iterator

from copies import ROOT, copied, fails, passes

# File -> the tests that are about it, the quickest first; a mutant that they miss survives. The first
# test that fails ends a run.
LAWS = ["laws/test_moments.py", "laws/test_estimators.py", "laws/test_estimators_exact.py"]
ESTIMATORS = [*LAWS[1:], "nn/test_masks.py", "nn/test_state.py", "nn/test_bad_input.py"]
TARGETS = {
    "estimators/base.py": ESTIMATORS,
    "estimators/running.py": ESTIMATORS,
    "estimators/merged.py": ESTIMATORS[:-1],
    "estimators/bank.py": [*ESTIMATORS, "surgery/test_convert_options.py"],
    "nn/tracking.py": [*ESTIMATORS, "nn/test_layers.py"],
    "moments.py": [*LAWS, "laws/test_selection.py", "calibration/test_collected.py"],
    "graph/fuse.py": ["graph/test_backend.py", "graph/test_regions.py", "graph/test_consumers.py"],
}
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of code that is computed: no annotation, message or docstring."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or isinstance(node, ast.Raise | ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from expressions(child)


def changed(node: ast.AST) -> ast.AST | None:
    """Return another node in the place of one, or None."""
    new: ast.AST = copy.copy(node)
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in SWAPS:
        new.op = SWAPS[type(node.op)]()
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        new.ops = [SWAPS[type(node.ops[0])](), *node.ops[1:]]
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        new = node.operand
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        new.value = not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        new.value = node.value + 1
    else:
        return None
    return new


class Replace(ast.NodeTransformer):
    def __init__(self, old: ast.AST, new: ast.AST) -> None:
        self.old, self.new = old, new

    def visit(self, node: ast.AST) -> ast.AST:
        return self.new if node is self.old else self.generic_visit(node)


def mutants(source: str) -> Iterator[tuple[str, str]]:
    """Yield what was changed, and the source with the change."""
    number = 0
    while True:
        tree = ast.parse(source)
        nodes = [node for node in expressions(tree) if changed(node) is not None]
        if number == len(nodes):
            return
        old = nodes[number]
        new = changed(old)
        told = f"{old.lineno}: {ast.unparse(old)} -> {ast.unparse(new)}"
        yield told, ast.unparse(Replace(old, new).visit(tree))
        number += 1


def main() -> None:
    only, part, parts = [*sys.argv[1:], *("", "0", "1")[len(sys.argv) - 1 :]]
    with copied() as source:
        for name, targets in TARGETS.items():
            if only not in ("", name):
                continue
            text = (ROOT / "src" / "batchnorm" / name).read_text()
            tests = [f"tests/{test}" for test in targets]
            passes(source, tests)
            counts = {True: 0, False: 0}
            for number, (told, mutant) in enumerate(mutants(text)):
                if number % int(parts) == int(part):
                    (source / "batchnorm" / name).write_text(mutant)
                    how = fails(source, tests)
                    counts[bool(how)] += 1
                    print(f"{'noticed' if how else 'SURVIVED'}: {name}:{told}", flush=True)
            (source / "batchnorm" / name).write_text(text)
            print(f"{name}: {counts[True]} noticed, {counts[False]} survived", flush=True)


if __name__ == "__main__":
    main()
