"""Runs tests against many changes of one file, in forks of a process that has collected them."""

import ast
import gc
import importlib
import inspect
import json
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import NamedTuple, TextIO

import pytest
from copies import limit, outcome

# Numbers of noticed and survived mutants, shared by all processes.
COUNTS = multiprocessing.Array("i", 2)


class Mutant(NamedTuple):
    """A change of a file.

    Attributes:
        told: Its number and the change, as text.
        tree: The code with the change.
        functions: Code of the changed functions, before and after; None if code outside of
            functions changes.
    """

    told: str
    tree: ast.Module
    functions: list[tuple[CodeType, CodeType]] | None

    def take(self) -> None:
        """Replace the code of the changed functions in this process."""
        gc.unfreeze()  # conftest.py has frozen what was loaded
        loaded = [one for one in gc.get_objects() if type(one) is FunctionType]
        for old, new in self.functions or ():
            own = [one for one in loaded if one.__code__ == old]
            own = [one for one in own if one.__code__.co_filename == new.co_filename]
            assert own, f"other code is loaded than that of {self.told}"
            for one in own:
                one.__code__ = new


def differing(one: CodeType, other: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """Return the functions that differ; None if code of modules or classes around them differs."""
    inner = [[c for c in code.co_consts if isinstance(c, CodeType)] for code in (one, other)]
    rest = [
        code.replace(co_consts=tuple(c for c in code.co_consts if not isinstance(c, CodeType)))
        for code in (one, other)
    ]
    if rest[0] != rest[1]:
        return None
    found: list[tuple[CodeType, CodeType]] = []
    for old, new in zip(*inner, strict=True):
        if old.co_flags & inspect.CO_OPTIMIZED:
            found += [(old, new)] if old != new else []
        elif (parts := differing(old, new)) is None:
            return None
        else:
            found += parts
    return found


class Trial:
    """Plugin of pytest: collects tests once, and runs them in one fork of the process per mutant.

    A fork replaces the code of the changed functions, so torch, batchnorm and the tests are not
    imported again. It runs only tests that call these functions in the unchanged code: first the
    tests that noticed most mutants so far, then the quickest.
    """

    def __init__(self, path: Path, tried: Sequence[Mutant], said: Path) -> None:
        self.path, self.tried, self.said = str(path), tried, said
        self.out = os.fdopen(os.dup(1), "w")
        self.item = ""
        self.calls: dict[str, set[str]] = {}
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Record the seconds of a test, and whether it fails."""
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration
        self.failed += [report.nodeid] * report.failed

    def pytest_sessionfinish(self) -> None:
        """Write the results to a file, for the parent process."""
        calls = {item: sorted(names) for item, names in self.calls.items()}
        self.said.write_text(json.dumps([calls, self.seconds, self.failed]))

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Prepare the record of the functions that a test calls, and limit its CPU time."""
        self.item = item.nodeid
        self.calls[self.item] = set()
        limit(10 + 10 * self.seconds.get(self.item, 10))

    def _called(self, frame: FrameType, event: str, value: object) -> None:
        if event == "call" and frame.f_code.co_filename == self.path:
            self.calls[self.item].add(frame.f_code.co_qualname)

    def _run(self, prepare: Callable[[], None]) -> str | None:
        """Fork; return how tests fail in the fork, or None within the fork."""
        if not (process := os.fork()):
            prepare()
            return None
        return outcome(process)

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Try every mutant; return None in a fork, where pytest then runs the tests."""
        importlib.import_module("torch._dynamo")  # takes seconds; here once for all forks
        if (how := self._run(lambda: sys.setprofile(self._called))) is None:
            return None
        if how:
            raise RuntimeError(f"without a change: {how}")
        calls, self.seconds, _ = json.loads(self.said.read_text())
        items, noticed = session.items[:], Counter[str]()
        for mutant in self.tried:
            names = {old.co_qualname for old, _ in mutant.functions or ()}
            session.items[:] = sorted(
                (one for one in items if names & {*calls[one.nodeid]}),
                key=lambda one: (-noticed[one.nodeid], self.seconds.get(one.nodeid, 0.0)),
            )
            if (how := self._run(mutant.take)) is None:
                return None
            if how == "did not run":
                raise RuntimeError(f"{how}: {mutant.told}")
            noticed.update(json.loads(self.said.read_text())[2] if how == "failed" else ())
            tell(how, mutant, self.out)
        return True


def tell(how: str, mutant: Mutant, out: TextIO) -> None:
    COUNTS[not how] += 1
    print(f"  {how or 'SURVIVED'}: {mutant.told}", file=out, flush=True)
