"""Finds small changes of the code that no test of the fast suite notices.

    python tests/tools/mutants.py                        # every mutant of TARGETS: about an hour
    python tests/tools/mutants.py moments.py nn/tracking.py    # the mutants of these files
    python tests/tools/mutants.py moments.py 3 17              # mutants 3 and 17 of this file

Each mutant changes one operator, comparison or number in a copy of src. mutmut does the same, but with
an installation in which the native module and the finder of an editable install do not work together.
mutants.md lists the survivors, each with its reason.
"""

import ast
import copy
import sys
from collections.abc import Iterator

from copies import copied, fails
from trial import COUNTS, Mutant, Trial, differing, tell

# File -> its tests; a mutant survives if all of them pass. The first failure ends a run.
LAWS = ["laws/test_moments.py", "laws/test_estimators.py", "laws/test_estimators_exact.py"]
ESTIMATORS = [*LAWS[1:], "nn/test_masks.py", "nn/test_state.py", "nn/test_bad_input.py"]
STATES = [*ESTIMATORS, "training/test_accumulation.py", "surgery/test_convert_options.py"]
GRAPHS = ["graph/test_backend.py", "graph/test_regions.py", "graph/test_consumers.py"]
TARGETS = {
    "estimators/base.py": ESTIMATORS,
    "estimators/bank.py": STATES,
    "graph/fuse.py": [*GRAPHS, "graph/test_folding.py"],
    "nn/tracking.py": [
        *STATES,
        "nn/test_layers.py",
        "nn/test_groups.py",
        "nn/test_unusual_state.py",
        "nn/test_masked_unusual_state.py",
    ],
    "estimators/running.py": STATES,
    "estimators/merged.py": ESTIMATORS,
    "moments.py": [*LAWS, "laws/test_selection.py", "calibration/test_collected.py"],
}
SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Div,
    ast.Mod: ast.Mult, ast.And: ast.Or, ast.Or: ast.And, ast.Lt: ast.LtE, ast.LtE: ast.Lt,
    ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip


def expressions(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes of executed code, without annotations, messages and docstrings."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns") or isinstance(node, ast.Raise | ast.JoinedStr):
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield child
                yield from expressions(child)


def changed(node: ast.AST) -> ast.AST | None:
    """Return a mutated copy of a node, or None if no mutation applies to it."""
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


def mutants(source: str, path: str) -> Iterator[Mutant]:
    """Yield every mutant of a file."""
    code, number = compile(source, path, "exec"), 0
    while True:
        tree = ast.parse(source)
        nodes = [node for node in expressions(tree) if changed(node) is not None]
        if number == len(nodes):
            return
        old = nodes[number]
        new = changed(old)
        told = f"{number}, line {old.lineno}: {ast.unparse(old)} -> {ast.unparse(new)}"
        tree = Replace(old, new).visit(tree)
        yield Mutant(told, tree, differing(code, compile(tree, path, "exec")))
        number += 1


def main() -> None:
    numbers = [given for given in sys.argv[1:] if given.isdigit()]
    names = [given for given in sys.argv[1:] if not given.isdigit()] or list(TARGETS)
    with copied() as source:
        for name in names:
            path, tests = source / "batchnorm" / name, [f"tests/{test}" for test in TARGETS[name]]
            text, COUNTS[:] = path.read_text(), [0, 0]
            found = mutants(text, str(path))
            chosen = [one for one in found if not numbers or one.told.split(",")[0] in numbers]
            print(name, flush=True)
            in_functions = [one for one in chosen if one.functions]
            trial = Trial(path, in_functions, source.parent / "said.json")
            if how := fails(source, tests, [trial]):
                raise RuntimeError(f"the trial of {name} {how}")
            for mutant in (one for one in chosen if not one.functions):
                path.write_text(ast.unparse(mutant.tree))
                tell(fails(source, tests), mutant, sys.stdout)
            path.write_text(text)
            print(f"{name}: {COUNTS[0]} noticed, {COUNTS[1]} survived", flush=True)


if __name__ == "__main__":
    main()
