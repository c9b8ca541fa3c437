"""Count Python statements, docstrings left out: a measure of size that line breaks do not change.

    python benchmarks/statements.py                     # of the working tree
    python benchmarks/statements.py --revision 63e29a1  # of a commit

Counted is every ``ast.stmt`` node, nested ones as well: a function of three lines is four.
"""

import argparse
import ast
import io
import subprocess
import tarfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
FOLDERS = ("src", "tests")


def statements(source: str) -> int:
    nodes = list(ast.walk(ast.parse(source)))
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    docstrings = sum(ast.get_docstring(n) is not None for n in nodes if isinstance(n, documented))
    return sum(isinstance(node, ast.stmt) for node in nodes) - docstrings


def files(revision: str | None) -> Iterator[tuple[str, str]]:
    """Yield the path from the root, and the text, of each Python file."""
    if revision is None:
        for path in (p for folder in FOLDERS for p in sorted((ROOT / folder).rglob("*.py"))):
            yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8")
        return
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", revision, *FOLDERS]
    packed = subprocess.run(command, check=True, capture_output=True).stdout  # noqa: S603
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        for member in sorted(tar.getmembers(), key=lambda member: member.name):
            if member.isfile() and member.name.endswith(".py"):
                yield member.name, tar.extractfile(member).read().decode()  # type: ignore[union-attr]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--revision", help="a commit, branch or tag; default the working tree")
    found: Counter[str] = Counter()
    for name, text in files(parser.parse_args().revision):
        folder, *inner = name.removeprefix("src/").split("/")
        package = f"{folder}/{inner[0] if len(inner) > 1 else '(files)'}"
        found[package] += statements(text)
    for folder in ("batchnorm", "tests"):
        parts = {name: number for name, number in found.items() if name.startswith(f"{folder}/")}
        for name, number in sorted(parts.items()):
            print(f"{name:32} {number:6}")
        print(f"{folder + ' in all':32} {sum(parts.values()):6}\n")


if __name__ == "__main__":
    main()
