"""``batchnorm inspect`` as a user meets it: formats, exit status, rules, baselines."""

import copy
import json
from pathlib import Path

import pytest
import torch

import batchnorm as bn
from batchnorm.diagnosis import page
from batchnorm.diagnosis.registry import CHECKPOINT
from support import trained
from support.command import SOURCE, assert_refused, run

HEALTHY = trained.state("dense")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Paths of a healthy checkpoint, one with an error, and one with an info."""
    monkeypatch.chdir(tmp_path)
    for name, rule in (("healthy.pt", None), ("wrong.pt", "BN102"), ("note.pt", "BN304")):
        state = copy.deepcopy(HEALTHY)
        if rule:
            trained.FAULTS[rule](state, "2")
        torch.save(state, name)
    return tmp_path


def inspected(*arguments):
    return run("inspect", *arguments)


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ("healthy.pt", 0),
        ("note.pt", 0),
        ("wrong.pt", 1),
        ("healthy.pt wrong.pt note.pt", 1),
        ("note.pt --fail-on info", 1),
        ("wrong.pt --fail-on never", 0),
        ("wrong.pt --ignore BN1", 0),
        ("wrong.pt --select BN2,BN3 --select BN401", 0),
        ("wrong.pt --ignore bn101,bn103", 1),
        ("gone.pt", 2),
        ("healthy.pt gone.pt wrong.pt", 2),
        ("wrong.pt --select BN9", 2),
        ("wrong.pt --baseline gone.json", 2),
        ("wrong.pt --baseline wrong.pt", 2),
        ("healthy.pt --out gone/x.json", 2),
        ("healthy.pt --out wrong.pt", 2),
        ("healthy.pt --format html", 0),
        ("healthy.pt --format xml", 2),
        ("", 2),
    ],
)
def test_the_exit_status_says_what_was_found(arguments, status, files):
    before = {path.name: path.read_bytes() for path in files.iterdir()}
    done = inspected(*arguments.split())
    assert done.exit_code == status, done.output
    assert {path.name: path.read_bytes() for path in files.iterdir()} == before
    assert bool(done.stderr) is (status == 2)


def test_files_that_can_be_read_are_shown_beside_errors_of_the_others(files):
    (files / "noise.pt").write_bytes(b"noise" * 99)
    done = inspected("noise.pt", "gone.pt", "wrong.pt")
    assert_refused(done, "noise.pt is not a checkpoint that can be read", "gone.pt", code=2)
    assert len(done.stderr.splitlines()) == 2
    assert "The variance of 1 of 24 channels is negative, down to -0.25." in done.stdout


def test_text_groups_findings_by_rule(files):
    text = inspected("wrong.pt").stdout
    assert text.startswith("wrong.pt\n") and str(bn.inspect("wrong.pt")) in text
    for line in (
        "2 batch norms; 1 error",
        "error BN102: A variance is negative",
        "2      The variance of 1 of 24",
        "Remedy: Recompute the statistics",
        "Not checked: BN402 (no averaged copy (ema, teacher, swa, ...) beside a layer).",
    ):
        assert f"\n{line}" in text, line
    assert "\nlayer  channels" not in text
    assert "\nlayer  channels" in inspected("wrong.pt", "--layers").stdout


def test_markdown_has_a_heading_for_each_rule(files):
    done = inspected("wrong.pt", "--format", "markdown")
    assert done.stdout.startswith("# wrong.pt\n")
    assert "## error BN102: A variance is negative" in done.stdout


def test_json_has_what_the_page_says(files):
    done = inspected("wrong.pt", "note.pt", "--format", "json")
    wrong, note = json.loads(done.stdout)
    assert set(wrong) == {
        "version", "subject", "counts", "findings", "not_checked", "known", "layers",
        "measured",
    }  # fmt: skip
    assert (wrong["version"], wrong["subject"]) == (1, "wrong.pt")
    assert wrong["counts"] == {"error": 1, "warning": 0, "info": 0}
    (finding,) = wrong["findings"]
    assert list(finding) == ["rule", "severity", "subject", "message", "remedy", "evidence"]
    assert (finding["rule"], finding["severity"], finding["subject"]) == ("BN102", "error", "2")
    assert finding["evidence"] == {
        "channels": 24,
        "negative": 1,
        "least variance": -0.25,
        "first": "1",
    }
    assert [layer["name"] for layer in wrong["layers"]] == ["2", "5"]
    assert wrong["layers"][0]["statistics"]["negative"] == 1
    assert wrong["not_checked"]["BN403"].startswith("only ONNX files")
    assert note["findings"][0]["rule"] == "BN304"
    assert json.loads(bn.inspect("wrong.pt").to_json()) == wrong


def test_json_has_no_nan(files):
    state = copy.deepcopy(HEALTHY)
    state["2.running_var"].fill_(float("nan"))
    state["2.running_mean"].fill_(float("inf"))
    read = json.loads(bn.inspect(state).to_json(), parse_constant=pytest.fail)
    assert read["layers"][0]["statistics"]["least_var"] is None


def test_a_baseline_leaves_known_findings_out(files):
    written = ("--format", "json", "--out", "known.json")
    assert inspected("wrong.pt", *written).exit_code == 1
    done = inspected("wrong.pt", "--baseline", "known.json")
    assert done.exit_code == 0 and "nothing found" in done.stdout
    assert "1 findings that the baseline has are not shown." in done.stdout
    state = copy.deepcopy(HEALTHY)
    for layer in trained.layers(state):
        trained.FAULTS["BN102"](state, layer)
    torch.save(state, "later.pt")
    assert [one.subject for one in bn.inspect("later.pt", baseline="known.json").findings] == ["5"]
    assert inspected("wrong.pt", *written).exit_code == 2
    assert inspected("later.pt", *written, "--force").exit_code == 1
    assert not bn.inspect("later.pt", baseline="known.json").findings


def test_sarif_is_of_the_schema_and_names_file_and_layer(files):
    done = inspected("wrong.pt", "note.pt", "--format", "sarif", "--ignore", "BN2")
    log = json.loads(done.stdout)
    (one,) = log["runs"]
    assert log["version"] == "2.1.0"
    rules = one["tool"]["driver"]["rules"]
    assert [rule["id"] for rule in rules] == [
        r.id for r in CHECKPOINT if not r.id.startswith("BN2")
    ]
    first, second = one["results"]
    assert (first["ruleId"], first["level"], second["level"]) == ("BN102", "error", "note")
    assert rules[first["ruleIndex"]]["id"] == "BN102"
    place = first["locations"][0]
    assert place["physicalLocation"]["artifactLocation"]["uri"] == "wrong.pt"
    assert place["logicalLocations"] == [{"name": "2", "kind": "member"}]
    sarif = pytest.importorskip("sarif_pydantic")
    assert sarif.Sarif.model_validate(log).runs[0].results[0].rule_id == "BN102"


@pytest.mark.parametrize("rule", CHECKPOINT, ids=lambda rule: rule.id)
def test_every_rule_explains_itself(rule):
    done = inspected("--explain", rule.id.lower())
    assert done.exit_code == 0
    assert done.stdout.startswith(f"{rule.id} ({rule.severity}): {rule.title}\n")
    assert rule.why in done.stdout and f"Remedy: {rule.remedy}" in done.stdout
    assert not rule.title.endswith(".") and rule.why.endswith(".") and rule.remedy.endswith(".")


def test_an_unknown_rule_is_refused_with_the_list_of_known_ones():
    ids = [rule.id for rule in CHECKPOINT]
    assert ids == sorted(set(ids))
    words = "there is no rule 'BN999'; expected one of BN001, BN101"
    assert_refused(inspected("--explain", "BN999"), words, code=2)


def test_the_page_of_the_rules_is_of_these_rules(tmp_path, capsys):
    path = Path(SOURCE).parent / "docs" / "rules.md"
    assert page.main([str(path), "--check"]) == 0
    old = tmp_path / "rules.md"
    assert page.main([str(old), "--check"]) == 1
    assert "python -m batchnorm.diagnosis.page" in capsys.readouterr().err
    assert page.main([str(old)]) == 0
    assert old.read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
