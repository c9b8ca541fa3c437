"""The callbacks in the real trainers, and tools that look layers up by exact type."""

import copy
import importlib
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import batchnorm as bn
from batchnorm.errors import MissingExtraError, OptionError, SurgeryError
from support.calibrated import statistics
from support.third_party import timm, torchvision
from support.twins import assert_close

X = torch.randn(60, 5, generator=torch.Generator().manual_seed(0)) * 3 + 1
Y = torch.randint(0, 3, (60,), generator=torch.Generator().manual_seed(1))

# Trainers of other people warn of what is none of our business.
pytestmark = pytest.mark.filterwarnings("ignore")


def net():
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.BatchNorm1d(8), nn.Linear(8, 3))  # fmt: skip


def assert_exact(model, states, batches, **options):
    """The running statistics of a state dict are what bn.calibrate computes for its weights."""
    model = copy.deepcopy(model)
    model.load_state_dict(states)
    bn.calibrate(model, batches, **options)
    for name, value in statistics(model).items():
        assert_close(states[name], value, name, size=16)


@pytest.fixture(autouse=True)
def _whole_torchvision():
    """Both libraries import torchvision, which not every build of torch can."""
    torchvision()


@pytest.fixture
def lightning():
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("pytorch_lightning")


def lightning_module(lightning):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.seen = net(), []

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, index):
            if index == 0:
                assert not self.training
                self.seen.append(copy.deepcopy(self.net.state_dict()))

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    return Module()


def fit(lightning, module, callbacks, tmp_path, **options):
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=1,
        default_root_dir=tmp_path, callbacks=callbacks, **options,
    )  # fmt: skip
    data = TensorDataset(X, Y)
    trainer.fit(module, DataLoader(data, 16, shuffle=True), DataLoader(data, 60))


@pytest.fixture
def callbacks(lightning):
    return importlib.import_module("batchnorm.integrations.lightning")


def test_lightning_validates_with_exact_statistics(lightning, callbacks, tmp_path):
    module = lightning_module(lightning)
    callback = callbacks.CalibrateCallback(upstream="population")
    fit(lightning, module, [callback], tmp_path)
    assert (
        len(module.seen) == 3
    )  # the sanity check, with the statistics before training, and two epochs
    for states in module.seen[1:]:
        assert_exact(module.net, states, X.split(16), upstream="population")
    assert callback.calibration.samples == 60
    assert not any(buffer.is_inference() for buffer in module.buffers())


def test_lightning_calibrates_the_weights_of_a_schedule_free_optimizer(
    lightning, callbacks, tmp_path
):
    schedulefree = pytest.importorskip("schedulefree")
    module = lightning_module(lightning)
    optimizer = schedulefree.AdamWScheduleFree(module.net.parameters(), 0.05, betas=(0.5, 0.99))
    module.configure_optimizers = lambda: optimizer
    module.on_train_epoch_start = module.on_validation_end = optimizer.train
    module.on_validation_start = optimizer.eval  # after the callback's
    callback = callbacks.CalibrateCallback(upstream="population", target_error=0.001)
    fit(lightning, module, [callback], tmp_path)
    for states in module.seen[1:]:
        assert_exact(net(), states, [X], upstream="population")
    assert optimizer.param_groups[0]["train_mode"]


def test_lightning_calibrates_before_a_validation_within_an_epoch(lightning, callbacks, tmp_path):
    module = lightning_module(lightning)
    fit(lightning, module, [callbacks.CalibrateCallback([(X, Y)])], tmp_path, val_check_interval=2)
    assert len(module.seen) == 5
    assert_exact(module.net, module.seen[-1], [X])


def test_lightning_calibrates_no_frozen_layer(lightning, callbacks, tmp_path):
    module, callback = lightning_module(lightning), callbacks.CalibrateCallback()
    module.on_train_batch_start = lambda *_: module.net[3].eval() and None
    fit(lightning, module, [callback], tmp_path, limit_val_batches=0)
    assert list(callback.calibration.layers) == ["net.1"]
    assert callback.calibration.skipped == {"net.3": "not asked for"}
    assert torch.equal(module.net[3].running_mean, torch.zeros(8))


def test_hugging_face_calibrates_before_an_evaluation_within_an_epoch():
    transformers = pytest.importorskip("transformers")
    from batchnorm.integrations.huggingface import CalibrateCallback

    model, callback = net().train(), CalibrateCallback([X])
    control = transformers.TrainerControl(should_evaluate=False)
    callback.on_step_end(None, None, control, model=model)
    assert callback.calibration is None
    control.should_evaluate = True
    callback.on_step_end(None, None, control, model=model)
    assert_exact(model, model.state_dict(), [X])


class Labelled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()

    def forward(self, x, labels=None):
        y = self.net(x)
        return {"loss": nn.functional.cross_entropy(y, labels), "logits": y}


def train_by_hugging_face(transformers, model, callbacks, folder, **options):
    pytest.importorskip("accelerate")
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=16, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, **options,
    )  # fmt: skip
    data = [{"x": x, "labels": y} for x, y in zip(X, Y)]
    given = {"args": args, "train_dataset": data, "eval_dataset": data, "callbacks": callbacks}
    transformers.Trainer(model, **given).train()


@pytest.mark.slow
def test_hugging_face_evaluates_with_exact_statistics(tmp_path):
    transformers = pytest.importorskip("transformers")
    from batchnorm.integrations.huggingface import CalibrateCallback

    seen = []

    class Watch(transformers.TrainerCallback):
        def on_evaluate(self, *_, model, **__):
            seen.append(copy.deepcopy(model.net.state_dict()))

    model, callback = Labelled(), CalibrateCallback(upstream="population", cache_bytes=1 << 24)
    options = {"num_train_epochs": 2, "eval_strategy": "epoch", "learning_rate": 1e-2}
    train_by_hugging_face(transformers, model, [callback, Watch()], tmp_path, **options)
    assert len(seen) == 2 and callback.calibration.samples == 60
    assert_exact(model.net, seen[-1], [X], upstream="population")


@pytest.mark.parametrize("library", ["lightning", "huggingface"])
def test_statistics_are_frozen_at_an_epoch_and_folded_at_the_end(library, lightning, tmp_path):
    transformers = pytest.importorskip("transformers")
    ours = importlib.import_module(f"batchnorm.integrations.{library}")
    seen = []

    class Watch(lightning.Callback if library == "lightning" else transformers.TrainerCallback):
        def on_train_epoch_end(self, trainer, module):
            seen.append(copy.deepcopy(module.net))

        def on_epoch_end(self, *_, **given):
            if "model" in given:
                seen.append(copy.deepcopy(given["model"].net))

    x = (X[:8],) if library == "lightning" else {"x": X[:8], "labels": Y[:8]}
    callback = ours.FreezeCallback(1, x)
    if library == "lightning":
        model = lightning_module(lightning)
        fit(lightning, model, [Watch(), callback], tmp_path)
    else:
        model = Labelled()
        train_by_hugging_face(
            transformers, model, [Watch(), callback], tmp_path, num_train_epochs=2
        )
    first, last = seen
    assert not bn.frozen(first)
    assert torch.equal(first[1].running_var, last[1].running_var)
    assert not torch.equal(first[1].weight, last[1].weight)
    assert not callback.folded.report.left
    assert not any("BatchNorm" in type(layer).__name__ for layer in model.modules())
    assert_close(model.net(X), last.eval()(X), size=16)
    with pytest.raises(OptionError, match="number of the first frozen epoch.*got -1"):
        ours.FreezeCallback(-1)


def test_the_trainers_observe_every_batch_and_leave_no_hook(lightning, tmp_path):
    transformers = pytest.importorskip("transformers")
    from batchnorm.integrations import huggingface
    from batchnorm.integrations import lightning as ours

    module, callback = lightning_module(lightning), ours.ObserveCallback(every=3, batches=2)
    fit(lightning, module, [callback], tmp_path)
    assert callback.observer.steps == 8  # 60 samples in batches of 16, twice; no validation
    seen = {(one.step, one.layer) for one in callback.observer.observations}
    assert seen == {(step, f"net.{at}") for step in (1, 3, 6) for at in (1, 2, 3)}

    model, callback = Labelled(), huggingface.ObserveCallback(every=2)
    train_by_hugging_face(transformers, model, [callback], tmp_path, num_train_epochs=1)
    assert {one.step for one in callback.observer.observations} == {1, 2, 4}
    for one in (module, model):
        assert not any(m._forward_pre_hooks or "forward" in vars(m) for m in one.modules())


@pytest.mark.parametrize("name", ["lightning", "huggingface", "opacus"])
def test_a_missing_library_is_named_in_one_line(name, monkeypatch):
    lightnings = ("lightning", "lightning.pytorch", "pytorch_lightning")
    for module in (*lightnings, "transformers", "opacus", "opacus.validators"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"batchnorm.integrations.{name}", raising=False)
    with pytest.raises(MissingExtraError, match=r"needs .*pip install ('batchnorm\[|opacus)"):
        __import__(f"batchnorm.integrations.{name}")


@pytest.fixture
def opacus(monkeypatch):
    """The registry of opacus, given back as it was."""
    validators = pytest.importorskip("opacus.validators")
    for name in ("VALIDATORS", "FIXERS"):
        registry = getattr(validators.ModuleValidator, name)
        monkeypatch.setattr(validators.ModuleValidator, name, dict(registry))
    return importlib.import_module("batchnorm.integrations.opacus")


class Subclass(bn.BatchNorm2d):
    pass


LAYERS = {
    "1d": bn.BatchNorm1d,
    "2d": bn.BatchNorm2d,
    "3d": bn.BatchNorm3d,
    "any rank": bn.BatchNorm,
    "subclass": Subclass,
    "converted": lambda channels: bn.convert(nn.BatchNorm2d(channels)),
    "converted, synced": lambda channels: bn.convert(nn.SyncBatchNorm(channels)),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_opacus_refuses_and_replaces_a_registered_layer_as_that_of_torch(layer, opacus):
    ours, theirs = nn.Sequential(layer(6)), nn.Sequential(nn.BatchNorm2d(6))
    validator = opacus.ModuleValidator
    assert validator.is_valid(ours) and not validator.is_valid(theirs)
    opacus.register(Subclass)
    found, expected = (validator.validate(model) for model in (ours, theirs))
    assert [str(error) for error in found] == [str(error) for error in expected]
    assert str(validator.fix(ours)) == str(validator.fix(theirs))
    assert validator.is_valid(validator.fix(ours, num_groups=3))
    if ours[0].ranks == (4,):
        fixed = validator.fix(ours, replace_bn_with_in=True)
        assert str(fixed) == str(validator.fix(theirs, replace_bn_with_in=True))
    assert isinstance(ours[0], nn.modules.batchnorm._BatchNorm)


@pytest.mark.parametrize(
    ("layer", "options", "words"),
    [
        (lambda: bn.BatchNorm2d(6, activation="relu"), {}, "without its activation"),
        (lambda: bn.BatchNorm(6, axis=-1), {}, "without its channel axis"),
        (lambda: bn.BatchNorm(6), {"replace_bn_with_in": True}, "without its rank"),
        (lambda: bn.convert(timm().layers.BatchNormAct2d(6)), {}, "without its drop layer"),
    ],
)
def test_opacus_refuses_to_replace_a_layer_with_an_activation_another_axis_or_a_drop_layer(
    layer, options, words, opacus
):
    opacus.register()
    model = nn.Sequential(layer())
    described = str(model)
    assert not opacus.ModuleValidator.is_valid(model)
    with pytest.raises(SurgeryError, match=words):
        opacus.ModuleValidator.fix(model, **options)
    assert str(model) == described


def test_opacus_registers_classes_of_layers_only(opacus):
    before = dict(opacus.ModuleValidator.VALIDATORS)
    for wrong in (nn.BatchNorm2d, bn.BatchNorm2d(3)):
        with pytest.raises(OptionError, match="expected classes"):
            opacus.register(Subclass, wrong)
    assert before == opacus.ModuleValidator.VALIDATORS


def test_fvcore_counts_a_layer_in_eval_as_that_of_torch():
    fvcore = pytest.importorskip("fvcore.nn")
    x = torch.randn(2, 3, 8, 8)
    for ours in (bn.BatchNorm2d(3), bn.convert(nn.BatchNorm2d(3))):
        models = [nn.Sequential(layer).eval() for layer in (ours, nn.BatchNorm2d(3))]
        found, expected = (fvcore.FlopCountAnalysis(model, x).total() for model in models)
        assert found == expected > 0
