"""The demo on real digits and on IDX files: it measures what it says, and the same each time."""

import gzip
import itertools
import json
import shutil
import struct

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from batchnorm.demo.data import DataError, load_digits, load_idx
from batchnorm.demo.estimates import WHOLE_SET, kept_estimators
from batchnorm.demo.modes import compare_modes
from batchnorm.demo.networks import WATCHED, build
from batchnorm.demo.repeats import ends
from batchnorm.demo.run import run_demo, to_report
from batchnorm.demo.shift import ShiftProbe, entering
from batchnorm.demo.tour import take_tour
from batchnorm.demo.training import Curve, Options, batch_order, evaluate, one_thread, train
from batchnorm.errors import OptionError
from batchnorm.report.jsontext import to_json
from batchnorm.report.model import Text
from support.oracle import tolerance
from support.twins import unchanged

# Of means and deviations of float32 values of size 1, summed by torch.
SCALED = tolerance("float32", ratio=16).atol
TINY = Options(seed=3, steps=4, batch_size=16, k=2)


def silent(stage, done, total):
    pass


def small(images, count=100):
    """The same images, fewer of them: the tests need no accuracy."""
    return type(images)(
        images.name,
        images.train_images[:count],
        images.train_labels[:count],
        images.test_images[:40],
        images.test_labels[:40],
    )


@pytest.fixture(autouse=True, scope="module")
def quick():
    """On a busy machine two threads wait for each other at every one of thousands of small ops."""
    with one_thread():
        yield


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture(scope="module")
def tour(digits):
    return take_tour(small(digits), TINY, silent)


def normalized(seed=0, activation="sigmoid"):
    return build((8, 8), 10, activation, seed, kept_estimators(2))


def write_idx(folder, shape=(6, 7), zipped=False, kinds=("images", "labels")):
    random = np.random.default_rng(0)
    for prefix, count in (("train", 40), ("t10k", 10)):
        pixels = random.integers(0, 256, (count, *shape), dtype=np.uint8).tobytes()
        marks = (np.arange(count) % 10).astype(np.uint8).tobytes()
        parts = {
            f"{prefix}-images-idx3-ubyte": struct.pack(">4I", 0x803, count, *shape) + pixels,
            f"{prefix}-labels-idx1-ubyte": struct.pack(">2I", 0x801, count) + marks,
        }
        for name, raw in parts.items():
            if any(kind in name for kind in kinds):
                path = folder / (f"{name}.gz" if zipped else name)
                path.write_bytes(gzip.compress(raw) if zipped else raw)


def test_digits_are_split_without_overlap_and_scaled(digits):
    train, test = digits.train_images, digits.test_images
    assert (train.shape, test.shape, digits.classes) == ((1438, 1, 8, 8), (359, 1, 8, 8), 10)
    assert abs(train.mean()) < SCALED and abs(train.std() - 1) < SCALED
    rows, others = ({tuple(row) for row in part.flatten(1).tolist()} for part in (train, test))
    assert not rows & others


@pytest.mark.parametrize("zipped", [False, True])
def test_idx_files_are_read_plain_and_zipped(tmp_path, zipped):
    write_idx(tmp_path, zipped=zipped)
    images = load_idx(tmp_path)
    assert images.name == tmp_path.name
    assert images.train_images.shape == (40, 1, 6, 7)
    assert images.test_labels.tolist() == [at % 10 for at in range(10)]


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def remove_labels(folder):
    (folder / "t10k-labels-idx1-ubyte").unlink()


def exchange(folder):
    (folder / IMAGES).replace(folder / LABELS)
    write_idx(folder, kinds=("images",))


def rewrite(name, change):
    def apply(folder):
        path = folder / name
        path.write_bytes(change(path.read_bytes()))

    return apply


THREE_LABELS = struct.pack(">2I", 0x801, 3) + b"\0\1\2"
# what is said of the folder -> how it was damaged
DAMAGED = {
    "no train-images-idx3-ubyte or .*does not exist": shutil.rmtree,
    "no t10k-labels-idx1-ubyte or t10k-labels-idx1-ubyte.gz": remove_labels,
    "exchanged": exchange,
    "40 x 6 x 7 = 1680 bytes of data, but 1679": rewrite(IMAGES, lambda raw: raw[:-1]),
    "9 bytes, fewer than the 16": rewrite(IMAGES, lambda raw: raw[:9]),
    "not an IDX file": rewrite(IMAGES, lambda raw: b"\x89PNG" + raw[4:]),
    "damaged gzip": rewrite(IMAGES, lambda raw: gzip.compress(raw)[:-20]),
    "40 images and .* 3 labels": rewrite(LABELS, lambda raw: THREE_LABELS),
}


@pytest.mark.parametrize("said", DAMAGED)
def test_damaged_idx_files_say_how(said, tmp_path):
    write_idx(tmp_path)
    DAMAGED[said](tmp_path)
    with pytest.raises(DataError, match=said):
        load_idx(tmp_path)


@pytest.mark.parametrize("activation", ["sigmoid", "relu"])
def test_both_networks_start_from_the_same_weights_whatever_the_random_state(activation):
    before = torch.random.get_rng_state()
    plain, other = (build((8, 8), 10, activation, seed, None).state_dict() for seed in (5, 6))
    with_bn = build((8, 8), 10, activation, 5, kept_estimators(2)).state_dict()
    assert set(plain) < set(with_bn)
    assert all(torch.equal(value, with_bn[name]) for name, value in plain.items())
    assert not torch.equal(plain["conv1.weight"], other["conv1.weight"])
    assert torch.equal(torch.random.get_rng_state(), before)


def test_batches_hold_every_image_once_a_round_and_repeat_by_seed():
    first, again = (
        [batch.tolist() for batch in itertools.islice(batch_order(10, 4, 1), 4)] for _ in range(2)
    )
    assert first == again
    assert len({*first[0], *first[1]}) == 8 and first[:2] != first[2:]
    with pytest.raises(OptionError, match="a batch of 11 needs more than the 10"):
        next(batch_order(10, 11, 1))


def test_options_refuse_what_cannot_train_and_turn_epochs_into_steps():
    for wrong in ({"steps": 0}, {"batch_size": 1}, {"k": 0}, {"seed": -1}, {"epochs": 0}):
        with pytest.raises(OptionError, match=next(iter(wrong))):
            Options(**wrong)
    assert Options(batch_size=64, epochs=2).in_steps(1438).steps == 44
    assert Options(steps=7).in_steps(1438).steps == 7


def test_steps_to_is_the_first_measurement_at_the_level():
    curve = Curve((0, 5, 10), (1.0,) * 3, (1.0,) * 3, (0.1, 0.6, 0.5))
    assert curve.steps_to(0.6) == 5
    assert curve.steps_to(0.7) is None


def test_evaluation_leaves_mode_and_statistics_alone(digits):
    network = normalized().train()
    with unchanged(network):
        evaluate(network, digits.test_images, digits.test_labels, chunk=100)


def test_values_entering_the_activation_are_those_the_layer_receives(digits):
    network, images = build((8, 8), 10, "sigmoid", 0, None), digits.train_images[:32]
    expected = network[: list(dict(network.named_children())).index(WATCHED)](images)
    with unchanged(network):
        assert torch.equal(entering(network, WATCHED, images), expected.double())


def test_shift_probe_moves_no_statistic_and_counts_flat_values(digits):
    network = normalized().train()
    with unchanged(network):
        probe = ShiftProbe(network, WATCHED, "sigmoid", digits.train_images[:64])
        probe.record(0)
        network.dense3_bn.bias.data.fill_(100.0)
        probe.record(1)
        network.dense3_bn.bias.data.zero_()
    shift = probe.result()
    assert shift.steps == (0, 1)
    assert shift.saturated[0] < 0.05 and shift.saturated[1] == 1.0
    assert shift.drift == pytest.approx(50, rel=0.02)
    assert shift.one_unit.middle[1] - shift.one_unit.middle[0] == pytest.approx(100)


def test_estimates_of_the_tour_are_all_named_and_whole_set_is_exact(tour):
    for study in tour.studies:
        assert [one.name for one in study.estimates] == [*kept_estimators(2), WHOLE_SET]
        *kept, whole = study.estimates
        assert (whole.mean_off, whole.variance_off) == (0, 0)
        assert all(estimate.mean_off > 0 for estimate in kept)


def test_weights_of_the_tour_are_those_of_torchs_layers(tour):
    weights = tour.studies[0].normalized.weights
    own = {name.split(".")[1]: value for name, value in weights.items() if "dense3_bn." in name}
    nn.BatchNorm1d(64).load_state_dict(own)


def test_the_summary_begins_with_the_largest_difference_over_all_seeds(tour):
    for study in tour.studies:
        gaps = {trial.rate: trial.normalized.accuracy[-1] - trial.plain.accuracy[-1] for trial in study.trials}  # fmt: skip
        assert gaps[study.fast.rate] == max(gaps.values())
        for repeats in (study.fast, study.best):
            assert repeats.seeds == (3, 4, 5)
            assert len(set(repeats.plain)) == len(set(repeats.normalized)) == 3
        firsts = (study.best.plain[0], study.best.normalized[0])
        assert firsts == (study.plain.curve, study.normalized.curve)
    fast = tour.studies[0].fast
    low, middle, high = sorted(curve.accuracy[-1] for curve in fast.normalized)
    assert ends(fast.normalized) == (middle, low, high)
    first, *_ = to_report(tour, ("w",)).summary
    assert all(word in first for word in (f"{fast.rate:g}", f"{low:.1%}", f"{high:.1%}"))


def test_every_contender_has_one_colour_and_every_paragraph_a_second_language(tour):
    colours = {}
    for section in to_report(tour, ("w",)).sections:
        assert "·" in section.title
        for block in section.blocks:
            if isinstance(block, Text):
                assert block.other and not block.other.isascii(), block.words
            for series in getattr(block, "series", ()):
                colours.setdefault(series.name, set()).add(series.colour)
    assert colours["with BN"] == {0} and colours["without BN"] == {1}


def test_a_unit_after_normalization_is_an_affine_map_of_the_unit_before(tour):
    for study in tour.studies:
        units = torch.tensor([study.unit_before, study.unit_after], dtype=torch.float64)
        assert units.shape == (2, 100)
        # An affine map of one unit.
        assert abs(abs(torch.corrcoef(units)[0, 1]) - 1) < SCALED
    assert tour.inserted.layers == 5 and tour.inserted.difference < SCALED
    assert len(tour.pictures) == len(tour.labels) == 16


def test_other_images_of_the_batch_matter_in_train_mode_only(digits):
    network = normalized(activation="relu")
    train(network, digits, Options(steps=10), 0.1, 10)
    with unchanged(network):
        modes = compare_modes(network, small(digits), 16, seed=0)
    assert max(modes.in_batches) > min(modes.in_batches)
    assert modes.in_eval == pytest.approx((modes.alone, modes.alone), abs=SCALED)
    assert modes.fickle > 0 == modes.fickle_in_eval
    assert modes.moved_by_train > 0 == modes.moved_by_eval
    assert "more than 1 value" in modes.refusal


@pytest.mark.slow
def test_the_same_seed_gives_the_same_numbers(digits, tour):
    again = take_tour(small(digits), TINY, silent)
    assert to_json(to_report(again, ("w",))) == to_json(to_report(tour, ("w",)))
    for first, second in zip(tour.studies, again.studies, strict=True):
        for name, value in first.normalized.weights.items():
            assert torch.equal(value, second.normalized.weights[name])


def test_the_tour_leaves_the_number_of_threads_alone(digits):
    torch.set_num_threads(2)
    with pytest.raises(OptionError):
        take_tour(small(digits), Options(batch_size=1000), silent)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert threads == 2


@pytest.mark.slow
def test_demo_on_idx_files_writes_weights_that_torch_loads(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    write_idx(data, zipped=True)
    tour, files = run_demo(data, tmp_path / "a" / "b", Options(0, 10, 8, 2, epochs=1), silent)
    assert tour.options.steps == 5
    assert [file.name for file in files[:2]] == ["report.html", "report.json"]
    assert "at work on data" in json.loads(files[1].read_text("utf-8"))["title"]
    found, expected = load_file(files[2]), tour.studies[0].normalized.weights
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


@pytest.mark.audit
def test_the_whole_demo_shows_what_the_article_claims(digits, tmp_path):
    tour, files = run_demo(None, tmp_path, Options(), silent)
    sigmoid = tour.studies[0]
    assert sigmoid.normalized.curve.steps_to(0.9) < sigmoid.plain.curve.steps_to(0.9) / 2
    assert sigmoid.normalized.shift.drift < sigmoid.plain.shift.drift / 5
    assert max(sigmoid.normalized.shift.saturated) < max(sigmoid.plain.shift.saturated) / 2
    assert sigmoid.normalized.curve.accuracy[-1] > 0.95
    assert all(file.stat().st_size > 0 for file in files)
