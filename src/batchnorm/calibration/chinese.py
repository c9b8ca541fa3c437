"""The page of a calibration in Chinese: English template -> Chinese one."""

CHINESE = {
    "Calibration": "校准",
    "Layers": "各层",
    "Pictures": "图",
    "Stored and measured, each layer": "逐层对照：存储值与测得值",
    "values per channel": "每通道值数",
    "error": "误差",
    "shift": "平移",
    "stretch": "伸缩",
    "change": "变化",
    "Unchanged": "未改动的层",
    "reason": "原因",
    "not called": "未被调用",
    "no samples of this group": "没有这一组的样本",
    "a single value of this group": "这一组只有一个值",
    "calibrated on {batches} batches": "用 {batches} 个批次校准",
    "{samples:,} samples": "{samples:,} 个样本",
    "upstream={upstream}, {passes} passes": "upstream={upstream}，{passes} 遍",
    "{batches} batches rejected (NaN or infinite)": "舍弃 {batches} 个批次（含 NaN 或无穷大）",
    "target error reached": "已达到目标误差",
    "target error NOT reached": "未达到目标误差",
    "error: largest relative standard error of mean and variance. shift (in deviations) and "
    "stretch (as a share of the variance): how far mean and variance moved, root mean square over "
    "the channels. change: the same in standard errors, the largest of all channels. A dash: "
    "unknown, from a single batch.": (
        "误差：均值和方差的最大相对标准误差。平移（以标准差为单位）和伸缩（占方差的比例）："
        "均值和方差改变了多少，取各通道的均方根。变化：同样的量以标准误差为单位，取各通道中最大的。"
        "短横：只有一个批次，无从得知。"
    ),
    "How far the statistics moved": "统计量改变了多少",
    "deviations; share of the variance": "标准差的倍数；占方差的比例",
    "Root mean square over the channels of each layer.": "每层各通道的均方根。",
    "How far off they may be": "统计量可能有多大误差",
    "relative standard error": "相对标准误差",
    "The largest of the mean's and the variance's, over all channels of each layer.": (
        "每层所有通道的均值和方差中最大的一个。"
    ),
    "keeps no statistics (track_running_stats=False)": "不保存统计量（track_running_stats=False）",
    "not asked for": "未被 layers= 选中",
    "frozen (statistics={source})": "已冻结（statistics={source}）",
    "frozen ({what}); bn.unfreeze(model) first": "已冻结（{what}）；请先调用 bn.unfreeze(model)",
    "frozen (in eval while the model trains)": "已冻结（模型在训练模式，而该层在评估模式）",
    'it mixes its statistics with those of a batch; bn.undo(model, "adapt") first': (
        '它把自身的统计量与批次的统计量混合；请先调用 bn.undo(model, "adapt")'
    ),
}
