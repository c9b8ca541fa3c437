"""Every text that a page shows has a Chinese template with the same fields, and none is left out."""

import ast
import copy
import dataclasses
import pickle
import re
import string
from pathlib import Path

import pytest
import torch
from torch import nn

import batchnorm as bn
from batchnorm.calibration.chinese import CHINESE as OF_CALIBRATIONS
from batchnorm.diagnosis.channels import page_of
from batchnorm.diagnosis.chinese import CHINESE as OF_DIAGNOSES
from batchnorm.diagnosis.chinese_rules import REMEDIES, TITLES
from batchnorm.diagnosis.registry import ALL
from batchnorm.errors import OptionError
from batchnorm.observation.chinese import CHINESE as OF_OBSERVATIONS
from batchnorm.report import Report, Section, Table, Text
from batchnorm.report.chinese import COMMON, translated
from batchnorm.report.html import to_html
from batchnorm.report.said import say
from batchnorm.report.terminal import columns_of, to_text
from support import faults, trained
from support.lanes import lanes

SOURCES = Path(bn.__file__).parent
CATALOGUES = {
    "diagnosis": OF_DIAGNOSES, "calibration": OF_CALIBRATIONS, "observation": OF_OBSERVATIONS,
    "report": {},
}  # fmt: skip
# Calls whose text is shown, and which argument it is.
CALLS = {"say": 0, "_CannotError": 0, "why": 2, "_rule": 2}


def templates(package):
    """Return the templates that the files of a package hand on, found in their source."""
    for path in sorted((SOURCES / package).glob("*.py")):
        tree = ast.parse(path.read_text("utf-8"))
        assigned = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                assigned.setdefault(node.targets[0].id, []).append(node.value)
        for node in ast.walk(tree):
            name = getattr(getattr(node, "func", None), "id", "")
            if name in CALLS and len(node.args) > CALLS[name]:
                yield from _texts(node.args[CALLS[name]], assigned)


def _texts(node, assigned):
    if isinstance(node, ast.Constant):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from (*_texts(node.body, assigned), *_texts(node.orelse, assigned))
    elif isinstance(node, ast.Name):
        for one in assigned.get(node.id, ()):
            yield from _texts(one, assigned)


def fields(template):
    return {(name, spec) for _, name, spec, _ in string.Formatter().parse(template) if name}


@pytest.mark.parametrize("package", CATALOGUES)
def test_each_template_of_a_package_has_a_chinese_one_with_the_same_fields(package):
    catalogue = COMMON | CATALOGUES[package]
    found = {one for one in templates(package) if isinstance(one, str)} - {"", "{layer}"}
    assert len(found) > (0 if package == "report" else 5)
    assert not found - catalogue.keys()
    remedies = {rule.remedy for rule in ALL}
    for english, chinese in catalogue.items():
        if english not in remedies:  # which may have braces, and no fields
            assert fields(english) == fields(chinese), english


def test_each_rule_has_a_chinese_title_and_a_remedy():
    assert list(TITLES) == list(REMEDIES) == [rule.id for rule in ALL]


@pytest.mark.parametrize("catalogue", [TITLES, REMEDIES, COMMON, *CATALOGUES.values()])
def test_chinese_texts_have_chinese_punctuation(catalogue):
    halfwidth = re.compile(r"[\u4e00-\u9fff][,;:!?]|[,;:!?][\u4e00-\u9fff]")
    assert not [words for words in catalogue.values() if halfwidth.search(words)]


def texts(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, tuple):
        for one in value:
            yield from texts(one)
    elif dataclasses.is_dataclass(value):
        for one in dataclasses.fields(value):
            if one.name not in ("kind", "severity", "rule", "language", "evidence"):
                yield from texts(getattr(value, one.name))


def english_in(report):
    """Return texts of a report with two English words in a row, calls and messages of torch left out."""
    calls = r"bn\.\S+|batchnorm calibrate [^。；]*|torch\.\S+|DataLoader\S*|optimizer[ .]\S*.*|state dict"
    found = (re.sub(calls, "", words) for words in texts(dataclasses.replace(report, title="")))
    return [words for words in found if re.search(r"\b[a-z]{2,} [a-z]{2,}\b", words)]


RULES = ("BN501", "BN502", "BN508", "BN601", "BN705", "BN706", "BN707", "BN802", "BN901", "BN906")


@pytest.mark.parametrize("rule", lanes(RULES, fast=RULES[::3], slow=RULES))
def test_a_diagnosis_of_a_model_is_in_chinese(rule):
    diagnosis, _ = faults.planted(rule, "dense").found()
    report = page_of(diagnosis, None, "zh")
    assert TITLES[rule] in {section.title.split("：")[-1] for section in report.sections}
    assert not english_in(report)
    assert english_in(diagnosis.report())


def test_diagnoses_of_checkpoints_are_in_chinese():
    said = set()
    for rule, plant in trained.FAULTS.items():
        state = copy.deepcopy(trained.state("dense"))
        plant(state, trained.layers(state)[0])
        report = page_of(bn.inspect(state), None, "zh")
        assert not english_in(report), rule
        said |= {part for words in texts(report) for part in words.split("：")}
    assert said >= {TITLES[rule] for rule in trained.FAULTS}


def test_pages_of_calibrations_and_observations_are_in_chinese():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Sigmoid(), nn.BatchNorm1d(4))
    with bn.observe(model, every=2) as observer:
        empty = observer.report("zh")
        for _ in range(6):
            model(torch.randn(8, 3))
    model[3].track_running_stats, model[3].running_mean, model[3].running_var = False, None, None
    calibration = bn.calibrate(model, [torch.randn(8, 3) for _ in range(4)])
    for report in (empty, observer.report("zh"), calibration.report("zh")):
        assert report.language == "zh"
        assert not english_in(report)
        assert "</html>" in to_html(report)
    assert english_in(observer.report()) and english_in(calibration.report())
    for made in (observer, calibration):
        with pytest.raises(OptionError, match="language of en, zh"):
            made.report("fr")


def test_names_of_layers_stay_as_they_are():
    table = Table("layer", ("layer", "x"), (("layer", say("stored")), ("errors", 1)))
    report = Report("model", (), (Section("Layers", (table, Text("stored"))),))
    (section,) = translated(report, "zh", OF_DIAGNOSES).sections
    assert section.blocks[0].rows == (("layer", "存储值"), ("errors", 1))
    assert section.blocks[0].columns == ("层", "x") and section.blocks[1].words == "存储值"


def test_a_text_with_fields_is_its_english_text_also_in_copies():
    one = say("{a:.1f} of {b}", a=2.0, b=say("all {c}", c=3))
    assert one == "2.0 of all 3" and say("{no} field") == "{no} field"
    for other in (copy.deepcopy(one), pickle.loads(pickle.dumps(one))):
        assert (other, other.template, other.values) == (one, one.template, one.values)


@pytest.mark.parametrize("width", [None, 30])
def test_columns_of_chinese_tables_line_up_in_a_terminal(width):
    rows = (("bn1", "统计量为 NaN 或无穷大，共 12 个通道", 1), ("a", "b", 22))
    _, line, first, *_, last = to_text(Table("", ("层", "发现", "值"), rows), width).splitlines()
    assert columns_of(first) == columns_of(last) == columns_of(line)
    assert columns_of("层 a") == 4
