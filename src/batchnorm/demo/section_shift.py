"""The second section of the page: the internal covariate shift."""

from batchnorm.demo.section_race import NAME, WITH, WITH_COLOUR, WITHOUT, WITHOUT_COLOUR
from batchnorm.demo.shift import Band, Shift
from batchnorm.demo.tour import PROBE_IMAGES, Study, Tour
from batchnorm.report.model import Plot, Section, Series, Table, Text

FLAT = {
    "sigmoid": "share within 0.053 of 0 or 1",
    "relu": "share of outputs that are 0",
}


def shift_section(tour: Tour) -> Section:
    """How the values entering the last hidden activation move, without and with normalization."""
    count = min(PROBE_IMAGES, tour.train_count)
    return Section(
        "Internal covariate shift · 内部协变量偏移",
        (
            Text(
                "When the weights of the first layers change, what later layers receive changes "
                "as well, and the more layers lie between, the more it does: the internal "
                "covariate shift. Here the same "
                f"{count} images are passed again and again while the network learns, and the "
                "values that enter the last hidden activation are recorded. All movement comes "
                "from the weights.",
                "前面各层的权重变化时，后面的层收到的输入也随之变化，中间层越多变化越大，"
                f"这就是内部协变量偏移。这里在训练中反复输入同样的 {count} 张图像，"
                "记录进入最后一个隐藏激活函数的值，所以一切变化都来自权重。",
            ),
            Text(
                "The line is the median; the band reaches from the 15th to the 85th percentile. "
                "The single unit is chosen by a rule: the sum of the changes of its median is the "
                "median of these sums over all 64 units.",
                "线为中位数，带为第 15 到第 85 百分位数。单个神经元不是挑选的："
                "它是 64 个神经元中移动程度居中的一个。",
            ),
            *(plot for study in tour.studies for plot in _bands_of(study)),
            *(_flat_plot(study) for study in tour.studies),
            _table(tour),
            Text(
                "BN keeps the distribution by construction: its mean is β and its deviation |γ|. "
                "Whether this is also why the network learns faster is disputed (Santurkar and "
                "others, 2018). The plots here show the first, the previous section shows the "
                "second.",
                "BN 保持分布不变是其算式决定的：均值只能是 β，标准差只能是 |γ|。"
                "这是否就是网络学得更快的原因尚有争议（Santurkar 等，2018）；"
                "这里的图说明前者，上一节说明后者。",
            ),
        ),
    )


def _bands_of(study: Study) -> tuple[Plot, ...]:
    name = NAME[study.activation]
    plain, normalized = study.plain.shift, study.normalized.shift
    units = _common_range(plain.one_unit, normalized.one_unit)
    everything = _common_range(plain.all_units, normalized.all_units)
    return (
        _bands(f"One unit, {name}, {WITHOUT}", plain, plain.one_unit, units, WITHOUT_COLOUR),
        _bands(f"One unit, {name}, {WITH}", normalized, normalized.one_unit, units, WITH_COLOUR),
        _bands(f"All units, {name}, {WITHOUT}", plain, plain.all_units, everything, WITHOUT_COLOUR),
        _bands(
            f"All units, {name}, {WITH}", normalized, normalized.all_units, everything, WITH_COLOUR
        ),
    )


def _flat_plot(study: Study) -> Plot:
    plain, normalized = study.plain.shift, study.normalized.shift
    highest = max(*plain.saturated, *normalized.saturated)
    return Plot(
        f"Where the activation is flat, {NAME[study.activation]}",
        "lines",
        tuple(
            Series(label, shift.steps, shift.saturated, colour=colour)
            for label, shift, colour in (
                (WITHOUT, plain, WITHOUT_COLOUR),
                (WITH, normalized, WITH_COLOUR),
            )
        ),
        "training step",
        FLAT[study.activation],
        f"Greatest share: {max(plain.saturated):.1%} without BN, {max(normalized.saturated):.1%} "
        "with. Where an activation is flat, its unit hardly learns.",
        (0.0, 1.1 * highest or 1.0),
    )


def _bands(title: str, shift: Shift, band: Band, ends: tuple[float, float], colour: int) -> Plot:
    series = Series(
        "15th to 85th percentile", shift.steps, band.middle, band.low, band.high, colour
    )
    return Plot(
        title,
        "bands",
        (series,),
        "training step",
        "value entering the activation",
        f"Median from {band.middle[0]:.2f} at the start to {band.middle[-1]:.2f}, between "
        f"{min(band.middle):.2f} and {max(band.middle):.2f} on the way.",
        ends,
    )


def _common_range(*bands: Band) -> tuple[float, float]:
    """One vertical range for pictures that are to be compared by eye."""
    low = min(min(band.low) for band in bands)
    high = max(max(band.high) for band in bands)
    margin = 0.05 * (high - low) or 1.0
    return low - margin, high + margin


def _table(tour: Tour) -> Table:
    rows = tuple(
        (
            f"{NAME[study.activation]}, {which}",
            shift.drift,
            100 * shift.saturated[0],
            100 * max(shift.saturated),
            100 * shift.saturated[-1],
        )
        for study in tour.studies
        for which, shift in ((WITHOUT, study.plain.shift), (WITH, study.normalized.shift))
    )
    return Table(
        "The shift in numbers",
        ("network", "drift", "flat at the start, %", "flat at most, %", "flat at the end, %"),
        rows,
        "Drift: standard deviation of a unit's mean over the training, in standard deviations of "
        "its values at one time.",
    )
