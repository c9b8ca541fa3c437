"""Files that would harm a reader are refused by name, in little time and memory, and run no code."""

import os
import re
import time

import pytest
import torch
from safetensors.torch import save_file

from support import hostile

counts_peaks = pytest.mark.skipif(
    not os.path.exists("/proc/self/clear_refs"), reason="Linux counts peaks there"
)
LAYERS = 40


@pytest.fixture(
    scope="module", params=["here", pytest.param("bounded", marks=[pytest.mark.slow, counts_peaks])]
)
def outcomes(request, tmp_path_factory):
    """What became of each file; ``bounded``: of large ones too, in a child with bounds."""
    bounded, folder = request.param == "bounded", tmp_path_factory.mktemp("hostile")
    files = hostile.write_all(folder, LAYERS, large=bounded)
    paths = [path for path, _ in files.values()]
    good = folder / "shard.safetensors"
    results = hostile.judged(paths, good) if bounded else list(map(hostile.judge, paths))
    assert len(results) == len(files) > 60
    return {
        name: (path, words, result)
        for (name, (path, words)), result in zip(files.items(), results, strict=True)
    }


def test_hostile_files_are_read_or_refused_by_name(outcomes):
    wrong = {}
    for name, (path, words, result) in outcomes.items():
        outcome, message = result["outcome"], result["message"]
        expected = "read" if words is None else "refused"
        named = words is None or (re.search(words, message) and str(path) in message)
        if outcome != expected or not named:
            wrong[name] = (expected, words, outcome, message[:300])
    assert not wrong


def test_memory_for_a_hostile_file_is_bounded_by_its_size(outcomes):
    for name, (path, _, result) in outcomes.items():
        size = path.stat().st_size
        assert result.get("grown", 0) <= 2 * size + hostile.SPARE, name


def test_no_hostile_file_takes_ten_seconds(outcomes):
    assert max(result["seconds"] for _, _, result in outcomes.values()) < 10


def test_no_code_in_a_hostile_file_is_run(outcomes):
    path, *_ = outcomes["code.pt"]
    assert path.exists() and not (path.parent / "ran").exists()


def test_control_characters_in_names_are_escaped(outcomes):
    _, _, result = outcomes["escapes.safetensors"]
    assert "\x1b" not in result["message"]
    assert r"\x1b[2J\n" in result["message"]


def test_ten_findings_of_a_rule_are_shown_and_the_others_are_counted(outcomes):
    for ending in ("pt", "safetensors"):
        _, _, result = outcomes[f"many layers.{ending}"]
        assert f"{LAYERS} batch norms; {LAYERS // 2} errors" in result["message"]
        assert f"and {LAYERS // 2 - 10} more" in result["message"]


@counts_peaks
@pytest.mark.audit
def test_ten_thousand_layers_are_judged_in_time(tmp_path):
    state = hostile.many_layers(10_000)
    torch.save(state, tmp_path / "layers.pt")
    save_file(state, tmp_path / "layers.safetensors")
    small = tmp_path / "small.safetensors"
    save_file(hostile.many_layers(3), small)
    paths = [tmp_path / "layers.pt", tmp_path / "layers.safetensors"]
    start = time.process_time()
    torch.load(paths[0], weights_only=True)
    # An inspection takes about twice as long as torch.load alone, which takes 0.1 ms per tensor.
    limits = {".pt": 4 * (time.process_time() - start), ".safetensors": 10}
    for path, result in zip(paths, hostile.judged(paths, small, seconds=60), strict=True):
        assert result["outcome"] == "read", result["message"]
        assert "10,000 batch norms; 5,000 errors" in result["message"]
        assert result["seconds"] < limits[path.suffix]
        # torch.load alone takes more than 2 kB for each of the 50,000 tensors of 4 or 8 bytes.
        objects = 128 << 20 if path.suffix == ".pt" else 0
        assert result["grown"] <= 2 * path.stat().st_size + hostile.SPARE + objects
