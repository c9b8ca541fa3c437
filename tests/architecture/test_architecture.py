"""Import levels of the package as data, and limits on the size of files and functions."""

import ast
import functools
import graphlib
import re
from pathlib import Path

TESTS = Path(__file__).parents[1]
SOURCE = TESTS.parent / "src" / "batchnorm"

# Lowest first. A file imports files of lower levels or of its own package, none of another package on
# its level, and never a package's __init__.
LEVELS = [
    {"errors", "compat", "progress", "recycling", "version", "_native"},
    {"files", "layout"},
    {"selection"},
    {"moments", "storage"},
    {"ops", "collective"},
    {"blocks"},
    {"estimators"},
    {"sources"},
    {"functional"},
    {"nn"},
    {"models", "environment", "report"},
    {"graph", "memory", "comparison", "scopes", "verification"},
    {"calibration", "surgery"},
    {"folding", "diagnosis", "observation", "porting", "training"},
    {"benchmark", "integrations", "insertion"},
    {"demo"},
    {"cli"},
]
# Other packages import report/__init__; cli and benchmark import inside of functions to start quickly.
PACKAGES_IMPORTED_WHOLE = {"batchnorm.report"}
LAZY = {"cli", "benchmark"}

FILES = sorted(
    path for path in SOURCE.rglob("*.py") if path.name not in ("__init__.py", "__main__.py")
)


def level(room):
    for number, rooms in enumerate(LEVELS):
        if room in rooms:
            return number
    raise AssertionError(f"{room} has no level: add it to LEVELS")


def room_of(path):
    first = path.relative_to(SOURCE).parts[0]
    return first.removesuffix(".py")


@functools.cache
def parsed(path):
    """The statements of a file, outermost first; expressions are skipped: no test reads them."""
    found = [ast.parse(path.read_text())]
    for node in found:  # which grows meanwhile
        parts = ast.iter_child_nodes(node)
        found += [p for p in parts if isinstance(p, ast.stmt | ast.excepthandler | ast.match_case)]
    return found


@functools.cache
def imports(path):
    """Modules of ours that a file imports, as dotted names, and whether inside a function."""
    functions = [node for node in parsed(path) if isinstance(node, ast.FunctionDef)]
    lines = {line for node in functions for line in range(node.lineno, node.end_lineno + 1)}
    found = []
    for node in parsed(path):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno} hides from the table: it is relative"
            names = [_module(node.module, alias.name) for alias in node.names]
        else:
            continue
        found += [
            (name, node.lineno in lines) for name in names if name.split(".")[0] == "batchnorm"
        ]
    return found


def _module(package, name):
    """``package.name`` where that is a module, else ``package``."""
    joined = SOURCE.joinpath(*package.split(".")[1:], name)
    is_module = joined.with_suffix(".py").exists() or joined.is_dir() or name == "_native"
    return f"{package}.{name}" if is_module else package


def test_a_file_imports_lower_levels_or_siblings():
    for path in FILES:
        own = room_of(path)
        for module, lazy in imports(path):
            other = module.split(".")[1] if "." in module else ""
            assert other, f"{path} imports the root package"
            if other != own:
                assert level(other) < level(own), f"{path} ({own}) imports {module}"
            target = SOURCE.joinpath(*module.split(".")[1:])
            if target.is_dir():
                assert module in PACKAGES_IMPORTED_WHOLE, (
                    f"{path} imports the package {module}, not a file of it"
                )
            assert not lazy or own in LAZY, f"{path} imports {module} inside a function"


def test_imports_have_no_circle():
    graph = {}
    for path in FILES:
        name = "batchnorm." + ".".join(path.relative_to(SOURCE).with_suffix("").parts)
        graph[name] = {module for module, _ in imports(path)}
    graphlib.TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_packages_hold_imports_and_nothing_else_the_root_those_of_public_names():
    for path in SOURCE.rglob("__init__.py"):
        for node in ast.parse(path.read_text()).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            assert docstring or isinstance(node, ast.ImportFrom), f"{path}:{node.lineno}"
            if path.parent == SOURCE and not docstring:
                assert all(alias.asname == alias.name for alias in node.names)


def test_files_and_functions_keep_their_size():
    for path in FILES:
        assert len(path.read_text().splitlines()) <= 400, path
        for node in parsed(path):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{node.name} of {path}"


PUBLIC_BY_CUSTOM = {"_BatchNorm"}  # what isinstance asks for, in torch and everywhere else


def test_private_names_of_torch_are_imported_in_compat_alone():
    """Attributes are ruff's SLF001; frames and reference counts are nowhere, compat included."""
    for path in FILES:
        text = path.read_text()
        for word in ("_getframe", "getrefcount", "f_code", "f_locals", "tb_frame", "currentframe"):
            assert word not in text, f"{word} in {path}"
        for node in parsed(path) if room_of(path) != "compat" else ():
            names = []
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
                names = [*node.module.split("."), *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                found = [alias.name.split(".") for alias in node.names]
                names = [part for name in found if name[0] == "torch" for part in name]
            private = {one for one in names if one.startswith("_")} - PUBLIC_BY_CUSTOM
            assert not private, f"{private} in {path}"


def test_tests_keep_their_size_use_no_sum_as_a_loss_and_import_no_other_test():
    loss = ".sum()" + ".backward("
    for path in TESTS.rglob("*.py"):
        text = path.read_text()
        assert len(text.splitlines()) <= 500, path.name
        plain = [line for line in text.splitlines() if loss in line and "square" not in line]
        assert not plain, path.name
        assert not re.search(r"^from (\w+\.)*test_\w+ import", text, re.MULTILINE), path
