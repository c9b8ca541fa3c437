"""The third and fourth sections of the page: estimates for evaluation, and the two modes."""

from collections.abc import Callable

from batchnorm.demo.estimates import Estimate
from batchnorm.demo.section_race import NAME
from batchnorm.demo.tour import Study, Tour
from batchnorm.report.model import Cell, Formula, Plot, Section, Series, Table, Text


def estimates_section(tour: Tour) -> Section:
    """Each estimate of mean and variance for evaluation, measured on held-out images."""
    return Section(
        "Which mean and variance to use afterwards · 使用阶段的均值与方差",
        (
            Text(
                "A trained network must answer for a single image, which has no batch to take μ "
                "and σ² from. Fixed values are used instead, and there are several ways to get "
                "them. With batches of m values and the variance σᵢ² of batch i (divided by m), "
                "the last K batches give",
                "训练好的网络要能回答单张图像，"
                "而单张图像没有可供估算 μ 和 σ² 的批。因此改用固定值，"
                "其得法有几种。设每批有 m 个值，第 i 批的方差为 σᵢ²（除以 m），则最后 K 批给出",
            ),
            Formula(
                "μ = (1/K) · Σ μᵢ\nσ² = m/(m−1) · (1/K) · Σ σᵢ²\n"
                "pooled: σ² = 1/(Km−1) · Σ over all Km values of (x − μ)²"
            ),
            Text(
                "and the running average, PyTorch's way, takes one step with every batch:",
                "而 PyTorch 的滑动平均随每一批更新一步：",
            ),
            Formula("μ ← 0.9 μ + 0.1 μᵢ\nσ² ← 0.9 σ² + 0.1 · m/(m−1) · σᵢ²"),
            Text(
                "“Decayed” weighs batches like the running average and also counts the spread "
                "between them; “all batches so far” averages since the first step; “whole training "
                "set” passes all training images once more through the finished network. The "
                "weights are the same in every row.",
                "“decayed”按滑动平均的权重合并各批，并计入批与批之间的差异；"
                "“all batches so far”从第一步起平均；"
                "“whole training set”用训练好的网络把全部训练图像再过一遍。各行的权重都相同。",
            ),
            estimates_table(tour),
            _distance_table(tour),
            *(_loss_plot(study) for study in tour.studies),
        ),
    )


def estimates_table(tour: Tour) -> Table:
    """Held-out accuracy and loss with each estimate."""
    columns = [
        f"{NAME[study.activation]}: {what}"
        for study in tour.studies
        for what in ("accuracy, %", "loss")
    ]
    rows = _rows(tour, lambda estimate: (100 * estimate.score.accuracy, estimate.score.loss))
    return Table(
        "The trained network with each estimate",
        ("μ and σ² from", *columns),
        rows,
        f"{tour.test_count} held-out images: one image is {100 / tour.test_count:.2g} %, and "
        "differences of a few images are chance. The loss is the finer measure.",
    )


def _rows(
    tour: Tour, numbers: Callable[[Estimate], tuple[float, float]]
) -> tuple[tuple[Cell, ...], ...]:
    """One row for each estimate: its name, and two numbers for each study."""
    names = [estimate.name for estimate in tour.studies[0].estimates]
    return tuple(
        (name, *(cell for study in tour.studies for cell in numbers(study.estimates[at])))
        for at, name in enumerate(names)
    )


def _distance_table(tour: Tour) -> Table:
    rows = _rows(tour, lambda estimate: (estimate.mean_off, 100 * estimate.variance_off))
    columns = [
        f"{NAME[study.activation]}: {what}"
        for study in tour.studies
        for what in ("μ off, σ", "σ² off, %")
    ]
    return Table(
        "How far each estimate is from the whole training set",
        ("μ and σ² from", *columns),
        rows[:-1],
        "Means over all channels of all layers.",
    )


def _loss_plot(study: Study) -> Plot:
    ends = {curve.name: curve.loss[-1] for curve in study.estimate_curves}
    best, worst = min(ends, key=ends.__getitem__), max(ends, key=ends.__getitem__)
    return Plot(
        f"Held-out loss while training, by estimate, {NAME[study.activation]}",
        "lines",
        tuple(Series(curve.name, curve.steps, curve.loss) for curve in study.estimate_curves),
        "training step",
        "loss, held out",
        "The same network on every line; only μ and σ² differ. Equal steps upwards multiply by "
        f"equal factors. Ends between {ends[best]:.3f} ({best}) and {ends[worst]:.3f} ({worst}).",
        y_log=True,
    )


def modes_section(tour: Tour) -> Section:
    """What `train()` and `eval()` change."""
    study = tour.studies[0]
    modes = study.modes
    return Section(
        "train() and eval() · 训练状态与评估状态",
        (
            Text(
                "In train() a layer normalizes with the mean and variance of the present batch, "
                "so what the network says of an image depends on the other images of the batch. In "
                "eval() it uses the fixed values, and the other images do not matter.",
                "train() 状态下每层用当前批的均值和方差归一化，"
                "所以网络对一张图像的回答取决于同批的其它图像。"
                "eval() 状态下用固定值，同批图像没有影响。",
            ),
            Text(
                f"Held-out image number {modes.image}, of class {modes.label}, is the one most "
                f"dependent on its batch. In {len(modes.in_batches)} random batches its class "
                f"gets between {min(modes.in_batches):.1%} and {max(modes.in_batches):.1%} in "
                f"train(); in eval() {modes.alone:.1%}, alone and in the same batches.",
                f"第 {modes.image} 张留出图像（类别 {modes.label}）最受同批图像影响。"
                f"在 {len(modes.in_batches)} 个随机批中，train() 给它的类别的概率在 "
                f"{min(modes.in_batches):.1%} 到 {max(modes.in_batches):.1%} 之间；"
                f"eval() 始终为 {modes.alone:.1%}。",
            ),
            _batches_plot(study),
            *(_batch_plot(each) for each in tour.studies),
            _modes_table(tour),
            Text(
                f"A single image is refused by train(), for it has no variance: “{modes.refusal}”",
                "train() 拒绝单张图像，因为它没有方差。",
            ),
        ),
    )


def _batches_plot(study: Study) -> Plot:
    modes = study.modes
    low, high = modes.in_eval
    return Plot(
        f"One image in many batches, {NAME[study.activation]}",
        "histogram",
        (Series("train()", modes.in_batches),),
        f"probability of class {modes.label} in train()",
        f"of {len(modes.in_batches)} batches",
        f"In eval() these batches give between {low:.4f} and {high:.4f}, and the image alone "
        f"{modes.alone:.4f}.",
    )


def _batch_plot(study: Study) -> Plot:
    modes = study.modes
    least, most = modes.train_accuracy[0], modes.train_accuracy[-1]
    sizes = tuple(mode.batch_size for mode in modes.train_accuracy)
    return Plot(
        f"Accuracy by batch size, {NAME[study.activation]}",
        "lines",
        (
            Series("eval()", sizes, tuple(modes.eval_accuracy for _ in sizes)),
            Series("train(), mixed", sizes, tuple(m.mixed for m in modes.train_accuracy)),
            Series(
                "train(), sorted by class", sizes, tuple(m.one_class for m in modes.train_accuracy)
            ),
        ),
        "images per batch",
        "accuracy, held out",
        f"eval(): {modes.eval_accuracy:.1%}. train() with {least.batch_size} images: "
        f"{least.mixed:.1%}; with {most.batch_size}: {most.mixed:.1%}, and {most.one_class:.1%} "
        "where the batches are sorted by class.",
        (0.0, 1.0),
        x_log=True,
    )


def _modes_table(tour: Tour) -> Table:
    modes = [study.modes for study in tour.studies]
    return Table(
        "What changes",
        ("", *(NAME[study.activation] for study in tour.studies)),
        (
            (
                "images whose class depends on the batch in train(), %",
                *(100 * m.fickle for m in modes),
            ),
            ("the same in eval(), %", *(100 * m.fickle_in_eval for m in modes)),
            ("one pass in train() moves a running mean by", *(m.moved_by_train for m in modes)),
            ("one pass in eval() moves a running mean by", *(m.moved_by_eval for m in modes)),
        ),
    )
