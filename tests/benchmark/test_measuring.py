"""How speed is measured: memory regimes, processes of their own, pairs, intervals, rows."""

import os
import platform
import sys
from math import comb

import pytest
import torch

from batchnorm.benchmark import processes as served
from batchnorm.benchmark import rows, run
from batchnorm.benchmark.cases import SHAPES, Case, cases, is_in_table
from batchnorm.benchmark.measure import in_turn, interval, page_faults
from batchnorm.benchmark.processes import ChildError, processes
from batchnorm.errors import OptionError
from row_files import read_rows

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="regimes of glibc")


def faults_of_a_step():
    """Page faults of making and dropping two large tensors, once the heap has found its size."""

    def step():
        before = page_faults()
        tensors = [torch.ones(9 << 20) for _ in range(2)]
        del tensors
        return page_faults() - before

    return min(step() for _ in range(10))


def environment():
    """The variables that a regime sets, as a process sees them."""
    return {name: os.environ.get(name) for name in ("LD_PRELOAD", "GLIBC_TUNABLES")}


def threads():
    return torch.get_num_threads()


def fail():
    raise ValueError("a reason")


@glibc
@pytest.mark.slow
def test_allocator_of_the_kept_regime_keeps_freed_pages_also_after_calls_that_failed():
    found = {}
    before = environment()
    for regime in served.REGIMES:
        with processes(regime, 1) as call:
            assert environment() == before, "the caller's own environment is as it was"
            found[regime] = call(faults_of_a_step), call(served.allocator)
            with pytest.raises(ChildError, match="ValueError: a reason"):
                call(fail)
            with pytest.raises(ChildError, match="_exit ended with 3"):
                call(os._exit, 3)
            assert call(threads) == 1
            again = call(faults_of_a_step)  # the last regime is the kept one
    assert found["default"][0] > 16, "72 MiB take so many pages, however large they are"
    assert found["kept"][0] < 8 and again < 8
    assert found["kept"][1] in ("tcmalloc", "glibc that keeps pages")


@pytest.mark.slow
def test_calls_with_several_threads_are_made_in_spawned_processes():
    with processes("default", 2) as call:
        assert call(threads) == 2


@glibc
@pytest.mark.slow
def test_without_tcmalloc_glibc_is_told_to_keep_pages(monkeypatch):
    monkeypatch.setattr("ctypes.util.find_library", lambda name: None)
    with processes("kept", 1) as call:
        assert call(served.allocator) == "glibc that keeps pages"
        assert call(faults_of_a_step) < 8


def test_a_regime_that_is_not_available_is_refused_with_a_remedy(monkeypatch):
    with pytest.raises(OptionError, match="default, kept; got 'fast'"):
        served.variables("fast")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    with pytest.raises(OptionError, match="this is Darwin: measure with regime 'default'"):
        served.variables("kept")
    assert served.variables("default") == {}


def test_contenders_take_turns_in_an_order_that_changes():
    calls = []
    found = in_turn("abc", 20, lambda name: calls.append(name) or len(calls))
    assert [len(some) for some in found.values()] == [20, 20, 20]
    turns = ["".join(calls[i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(turn) == ["a", "b", "c"] for turn in turns)
    assert len(set(turns)) > 2


@pytest.mark.parametrize("n", [6, 7, 20, 30])
def test_interval_is_the_narrowest_pair_of_order_statistics_with_95_percent(n):
    low, high = interval(list(range(n)))
    assert low + high == n - 1

    def coverage(rank):  # of the median, between the rank-th smallest and the rank-th largest
        return 1 - 2 * sum(comb(n, i) for i in range(rank + 1)) / 2**n

    assert coverage(low) >= 0.95
    assert coverage(low + 1) < 0.95


def test_interval_of_few_values_is_all_of_them():
    assert interval([3.0, 1.0, 2.0]) == (1.0, 3.0)


@pytest.mark.slow
def test_rows_of_a_cell_hold_both_regimes_pairs_and_circumstances(tmp_path):
    case = Case("bn+relu", "train", "fp32", (32, 64), False)
    told = []
    options = run.Options(seconds=0.0, pairs=2, regimes=("default",))
    found = list(run.measure([case], options, lambda *said: told.append(said)))
    assert {row.contender for row in found} == {"eager", "ours", "eager in place"}
    for row in found:
        assert (row.regime, row.threads, row.rounds) == ("default", 1, 2)
        assert 0 < row.low <= row.ratio <= row.high
        assert row.code == rows.code_hash()
        assert row.clean in ("True", "False")
    (ours,) = (row for row in found if row.contender == "ours")
    assert ours.ratio == 1.0
    assert ours.saved_bytes > 0
    assert told[0] == ("measuring, memory default", 0, 1)
    rows.write_rows(tmp_path / "rows.csv", found)
    assert read_rows(tmp_path / "rows.csv") == found


def test_cells_of_the_table_are_some_of_all_cells():
    chosen = [case for case in cases() if is_in_table(case)]
    assert 30 <= len(chosen) <= 72
    assert len(chosen) < len(list(cases(SHAPES)))


def test_hash_of_the_code_changes_with_a_kernel(tmp_path, monkeypatch):
    (tmp_path / "native").mkdir()
    kernel = tmp_path / "native" / "kernel.hpp"
    kernel.write_text("1")
    monkeypatch.setattr(rows, "_ROOT", tmp_path)
    first = rows.code_hash()
    kernel.write_text("2")
    assert rows.code_hash() != first
    kernel.write_text("1")
    assert rows.code_hash() == first


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="execve with LD_PRELOAD")
def test_script_that_enters_a_regime_is_started_again_in_it(tmp_path):
    from support import processes as started

    script = tmp_path / "script.py"
    script.write_text(
        "from batchnorm.benchmark.processes import allocator, enter\n"
        "enter('kept')\nprint(allocator())\n"
    )
    done = started.run([sys.executable, str(script)])
    assert done.stdout.strip() in ("tcmalloc", "glibc that keeps pages"), done.stderr
