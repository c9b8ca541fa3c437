"""The sections of the page about the data, and about what the statistics are taken over."""

from batchnorm.demo.section_race import NAME, WITH_COLOUR, WITHOUT_COLOUR
from batchnorm.demo.tour import Study, Tour
from batchnorm.report.model import Formula, Grid, Images, Plot, Section, Series, Text

# Of three neurons or channels, in each of three images; colours that no contender has.
GROUPS = ((3, 4, 5),) * 3


def data_section(tour: Tour) -> Section:
    """The images, and how many there are."""
    return Section(
        "The data · 数据",
        (
            Text(
                f"{tour.train_count:,} images to learn from and {tour.test_count:,} held out; "
                "pixels are shifted and scaled by one mean and one deviation of the training "
                "images.",
                f"{tour.train_count:,} 张训练图像，{tour.test_count:,} 张留出图像；"
                "所有像素用训练图像的同一个均值和标准差做平移和缩放。",
            ),
            Images("Held-out images and their classes", tour.pictures, tour.labels),
        ),
    )


def statistics_section(tour: Tour) -> Section:
    """Per neuron and per channel, drawn; and values before and after a normalization."""
    images = ("image 1", "image 2", "image 3")
    return Section(
        "What is normalized · 对什么做归一化",
        (
            Text(
                "Batch normalization (BN) subtracts the mean of the batch and divides by its "
                "deviation; γ and β, learned like weights, then set a new scale and centre:",
                "批归一化（BN）先减去这一批数据的均值、除以标准差，"
                "再由与权重一起训练的 γ 和 β 给出新的尺度和中心：",
            ),
            Formula("BN(x) = γ · (x − μ) / √(σ² + ε) + β"),
            Text(
                "In a dense layer each neuron has its own μ and σ², taken over the images of the "
                "batch. In a convolution each channel has them, taken over all images and all "
                "pixels of the channel, for neighbouring pixels are related. Squares of one "
                "colour are normalized together.",
                "全连接层中每个神经元有自己的 μ 和 σ²，在一批图像上估算。"
                "卷积层中每个通道有自己的 μ 和 σ²，"
                "在所有图像、该通道的所有像素上估算，因为相邻像素是相关的。同一颜色的方格一起归一化。",
            ),
            Grid(
                "Dense: per neuron · 全连接层：按神经元",
                images,
                ("neuron 1", "neuron 2", "neuron 3"),
                GROUPS,
                "One value per image and neuron; n values for each μ.",
            ),
            Grid(
                "Convolution: per channel · 卷积层：按通道",
                images,
                ("channel 1", "channel 2", "channel 3"),
                GROUPS,
                "h × w values per image and channel; n × h × w values for each μ.",
                pixels=4,
            ),
            *(_histogram(study) for study in tour.studies),
        ),
    )


def _histogram(study: Study) -> Plot:
    before, after = study.unit_before, study.unit_after
    return Plot(
        f"One unit before and after BN, {NAME[study.activation]}",
        "histogram",
        (
            Series("before BN", before, colour=WITHOUT_COLOUR),
            Series("after BN", after, colour=WITH_COLOUR),
        ),
        "value of the unit",
        f"of {len(before)} images",
        f"The trained network's last hidden layer. Before: from {min(before):.2f} to "
        f"{max(before):.2f}; after, at the activation: from {min(after):.2f} to {max(after):.2f}.",
    )
