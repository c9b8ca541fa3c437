"""Tests against many changes of one file, in forks of a process that has collected them."""

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

# Noticed and survived, in every process.
COUNTS = multiprocessing.Array("i", 2)


class Mutant(NamedTuple):
    """A changed file.

    Attributes:
        told: Its number, and what was changed.
        tree: The code with the change.
        functions: Code of the functions that have changed, before and after; None if the code
            outside of functions has.
    """

    told: str
    tree: ast.Module
    functions: list[tuple[CodeType, CodeType]] | None

    def take(self) -> None:
        """Change the functions in this process."""
        loaded = [one for one in gc.get_objects() if type(one) is FunctionType]
        for old, new in self.functions or ():
            own = [one for one in loaded if one.__code__ == old]
            own = [one for one in own if one.__code__.co_filename == new.co_filename]
            assert own, f"other code is loaded than that of {self.told}"
            for one in own:
                one.__code__ = new


def differing(one: CodeType, other: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """Return the functions of modules or classes that differ; None if what is around them does."""
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
    """Plugin of pytest: collects tests once, and runs them in a fork of the process per mutant.

    A mutant of functions is their code, which a fork replaces; torch, batchnorm and the tests are
    not imported again. A fork runs the tests that call these functions without a change: first
    those that noticed most mutants before, then the quickest.
    """

    def __init__(self, path: Path, tried: Sequence[Mutant], said: Path) -> None:
        self.path, self.tried, self.said = str(path), tried, said
        self.out = os.fdopen(os.dup(1), "w")
        self.item = ""
        self.calls: dict[str, set[str]] = {}
        self.seconds: dict[str, float] = {}
        self.failed: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep how long a test takes, and whether it fails."""
        if report.when == "call":
            self.seconds[report.nodeid] = report.duration
        self.failed += [report.nodeid] * report.failed

    def pytest_sessionfinish(self) -> None:
        """Tell the process that has forked this one."""
        calls = {item: sorted(names) for item, names in self.calls.items()}
        self.said.write_text(json.dumps([calls, self.seconds, self.failed]))

    def pytest_runtest_protocol(self, item: pytest.Item) -> None:
        """Collect the functions of the file that a test calls; end one that has an endless loop."""
        self.item = item.nodeid
        self.calls[self.item] = set()
        limit(10 + 10 * self.seconds.get(self.item, 10))

    def _called(self, frame: FrameType, event: str, value: object) -> None:
        if event == "call" and frame.f_code.co_filename == self.path:
            self.calls[self.item].add(frame.f_code.co_qualname)

    def _run(self, prepare: Callable[[], None]) -> str | None:
        """Fork; return how tests fail there, or None in the fork."""
        if not (process := os.fork()):
            prepare()
            return None
        return outcome(process)

    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Try every mutant; None in a fork, where pytest goes on to run the tests."""
        importlib.import_module("torch._dynamo")  # seconds, once for all forks
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
