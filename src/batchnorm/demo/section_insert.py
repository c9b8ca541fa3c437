"""The section of the page about ``bn.insert``."""

from batchnorm.demo.section_race import INSERTED, NAME, WITH, WITH_COLOUR, WITHOUT, WITHOUT_COLOUR
from batchnorm.demo.tour import Tour
from batchnorm.report.model import Formula, Plot, Section, Series, Text

INSERTED_COLOUR = 2


def insert_section(tour: Tour) -> Section:
    """The plain network, the one built with normalization, and the one that got it inserted."""
    found = tour.inserted
    study = next(one for one in tour.studies if one.activation == found.activation)
    plain, normalized = study.fast.plain[0], study.fast.normalized[0]
    curves = (
        Series(WITHOUT, plain.steps, plain.accuracy, colour=WITHOUT_COLOUR),
        Series(WITH, normalized.steps, normalized.accuracy, colour=WITH_COLOUR),
        Series(INSERTED, found.curve.steps, found.curve.accuracy, colour=INSERTED_COLOUR),
    )
    return Section(
        "Into a network that has none · 给没有 BN 的网络加上 BN",
        (
            Text(
                "One call puts a normalization between each layer and its activation. In eval() "
                "the network computes what it did; in training it normalizes by the batch.",
                "一次调用就在每层与其激活函数之间插入归一化。eval() 下网络的输出不变；"
                "训练时则用当前批归一化。",
            ),
            Formula("bn.insert(network, images)"),
            Text(
                f"Here it put in {found.layers} normalizations; the largest change of an output is "
                f"{found.difference:.1e} of the largest output.",
                f"这里插入了 {found.layers} 个归一化层；输出的最大变化为最大输出的 "
                f"{found.difference:.1e}。",
            ),
            Plot(
                f"Accuracy at learning rate {found.rate:g}, {NAME[found.activation]}",
                "lines",
                curves,
                "training step",
                "accuracy, held out",
                f"Ends at {plain.accuracy[-1]:.1%} without BN, {normalized.accuracy[-1]:.1%} built "
                f"with it, and {found.curve.accuracy[-1]:.1%} where it was inserted.",
                (0.0, 1.0),
            ),
        ),
    )
