"""Diagnoses in Chinese: titles and remedies by rule, other texts by their English template."""

from batchnorm.diagnosis.chinese_rules import REMEDIES, TITLES
from batchnorm.diagnosis.registry import ALL

REASONS = {
    "no batch norm": "没有批归一化层",
    "no batch norm with stored statistics": "没有存储统计量的批归一化层",
    "no batch norm with γ": "没有带 γ 的批归一化层",
    "no layer has a counter (num_batches_tracked)": "没有任何层带计数器（num_batches_tracked）",
    "no averaged copy (ema, teacher, swa, ...) beside a layer": (
        "没有与各层对应的平均副本（ema、teacher、swa 等）"
    ),
    "only ONNX files contain training_mode": "只有 ONNX 文件含有 training_mode",
    "no batch went through the model": "没有任何批次通过模型",
    "fewer than two batches: no standard errors": "不足两个批次，没有标准误差",
    "fewer than four batches of several samples": "含多个样本的批次不足四个",
    "no optimizer was given": "没有给出优化器",
    "no training steps were made": "没有做训练步",
    "a single process, or group= was not given": "只有一个进程，或没有给出 group=",
    "data is not a DataLoader with __len__": "数据不是带 __len__ 的 DataLoader",
    "the model was given in eval mode": "给出的模型处于评估模式",
    "the model could not be run in eval mode": "模型无法在评估模式下运行",
    "no pass in training mode could be made": "无法在训练模式下运行",
    "no pass in eval mode could be made": "无法在评估模式下运行",
    "the flow of data could not be recorded": "无法记录数据流",
    "the model returns no floating tensor": "模型没有返回浮点张量",
    "the batch has no tensor of shape (N, L) whose name contains 'mask'": (
        "批次中没有名字含 mask、形状为 (N, L) 的张量"
    ),
    "the batch cannot be divided into samples": "批次不能拆成样本",
    "outputs are not one for each sample": "输出与样本不是一一对应",
    "forward= calls the model in its own way": "forward= 以自己的方式调用模型",
    "graphs=True was not given": "没有给出 graphs=True",
    "{reason}: {error}": "{reason}：{error}",
}
MESSAGES = {
    # BN0 to BN4
    "No tensor is named as the running mean or variance of a batch norm.": (
        "没有任何张量的名字表明它是批归一化层的滑动均值或滑动方差。"
    ),
    "Mean or variance of {some} of {channels} channels is NaN or infinite.": (
        "{channels} 个通道中有 {some} 个的均值或方差为 NaN 或无穷大。"
    ),
    "The variance of {some} of {channels} channels is negative, down to {least:.3g}.": (
        "{channels} 个通道中有 {some} 个的方差为负，最低为 {least:.3g}。"
    ),
    "γ or β of {some} of {channels} channels is NaN or infinite.": (
        "{channels} 个通道中有 {some} 个的 γ 或 β 为 NaN 或无穷大。"
    ),
    "Every mean and every variance is 0: the buffers were made and never filled.": (
        "均值和方差全部为 0：缓冲区建立后从未写入。"
    ),
    "The statistics are stored as {dtype}, not as floating-point numbers.": (
        "统计量以 {dtype} 存储，不是浮点数。"
    ),
    "Its tensors do not fit together: {problem}.": "该层的张量彼此不符：{problem}。",
    "{name} has the shape {shape}": "{name} 的形状为 {shape}",
    "{name} has the shape {shape} beside {channels} means": (
        "{name} 的形状为 {shape}，而均值有 {channels} 个"
    ),
    "{name} has the shape {shape}, not ()": "{name} 的形状为 {shape}，应为 ()",
    "The mean is stored, but not the variance.": "存储了均值，却没有方差。",
    "The variance is stored, but not the mean.": "存储了方差，却没有均值。",
    "The statistics are stored as {dtype}.": "统计量以 {dtype} 存储。",
    "γ and β are trained, but every mean is 0 and every variance 1: the statistics were never "
    "updated.": "γ 和 β 经过训练，但均值全为 0、方差全为 1：统计量从未更新。",
    "{steps:.0f} steps are counted, but every mean is 0 and every variance 1.": (
        "计数器记了 {steps:.0f} 步，但均值全为 0、方差全为 1。"
    ),
    "Its statistics, γ and β are as in a new layer, beside {others} other layers that were "
    "trained: no training step went through it.": (
        "统计量、γ 和 β 都与新建的层相同，而另外 {others} 层经过训练：训练没有经过该层。"
    ),
    "The only batch norm is as in a new model.": "唯一的批归一化层与新建模型中的相同。",
    "All {layers} batch norms are as in a new model.": (
        "全部 {layers} 个批归一化层都与新建模型中的相同。"
    ),
    "The counter of {some} of {layers} layers is 0, though their statistics have moved.": (
        "{layers} 层中有 {some} 层的计数器为 0，而统计量已经变动。"
    ),
    "Layers have counted {numbers} different numbers of steps, from {least:.0f} to {most:.0f}.": (
        "各层记录的步数有 {numbers} 种，从 {least:.0f} 到 {most:.0f}。"
    ),
    "first layer": "第一个层",
    "layers": "层数",
    "The counter is {value:g}, of dtype {dtype}.": "计数器为 {value:g}，类型为 {dtype}。",
    "The counter stands at {value:.0f}; {dtype} counts no further than {most:.0f}.": (
        "计数器为 {value:.0f}；{dtype} 最多只能数到 {most:.0f}。"
    ),
    "Its statistics are far from those of {layer}, of which it is an average: means by {shift:.3g} "
    "deviations, variances by a factor of {stretch:.3g}.": (
        "该层是 {layer} 的平均副本，统计量却相差很大：均值相差 {shift:.3g} 个标准差，"
        "方差相差 {stretch:.3g} 倍。"
    ),
    "|γ| goes up to {most:.3g}.": "|γ| 最大达到 {most:.3g}。",
    "|γ| / sqrt(σ² + ε) goes up to {gain:.3g} in channels that are not constant.": (
        "在非恒定的通道中，|γ| / sqrt(σ² + ε) 最大达到 {gain:.3g}。"
    ),
    "{constant} of {channels} channels have a variance below {bound:.0e}, {zero} of them exactly "
    "0.": "{channels} 个通道中有 {constant} 个的方差低于 {bound:.0e}，其中 {zero} 个恰为 0。",
    "|γ| of {small} of {channels} channels is below a thousandth of the layer's largest.": (
        "{channels} 个通道中有 {small} 个的 |γ| 低于该层最大值的千分之一。"
    ),
    "Every γ is 0, though the statistics have moved.": "γ 全部为 0，而统计量已经变动。",
    "The largest |μ| is {mean:.3g}, the largest σ² {var:.3g}; float16 ends at {most:.0f}.": (
        "最大的 |μ| 为 {mean:.3g}，最大的 σ² 为 {var:.3g}；float16 的上限为 {most:.0f}。"
    ),
    "The node has training_mode=1.": "该节点的 training_mode=1。",
    # BN5
    "Normalized values are off by {distance:.2g} of their deviation": (
        "归一化后的值偏离 {distance:.2g} 个标准差"
    ),
    "{off}, which moves the output by {effect:.2g} of its deviation": (
        "{off}，使模型输出改变 {effect:.2g} 个标准差"
    ),
    "{off}; its statistics fit the inputs of {other}, and the other way round": (
        "{off}；它的统计量符合 {other} 的输入，反之亦然"
    ),
    "{off}; after {steps:.0f} steps the start still weighs {share:.0%}": (
        "{off}；经过 {steps:.0f} 步，初始值仍占 {share:.0%}"
    ),
    "{sentence}.": "{sentence}。",
    "momentum is {momentum:g}, which is what the last batch alone weighs in the average.": (
        "momentum 为 {momentum:g}，这就是最后一个批次单独在平均值中的权重。"
    ),
    "A batch has {values:.0f} values per channel, as much as {independent:.2g} independent ones.": (
        "每个批次每通道有 {values:.0f} 个值，只相当于 {independent:.2g} 个独立值。"
    ),
    "The means of batches vary {ratio:.3g} times as much as those of batches drawn at random from "
    "the same samples.": "各批次均值的方差是从同样的样本中随机组成批次时的 {ratio:.3g} 倍。",
    # BN6
    "It is called {calls} times in a pass, with inputs that are off by {apart:.2g} deviations from "
    "their common statistics.": (
        "一次前向中它被调用 {calls} 次，各次输入与共同的统计量最多相差 {apart:.2g} 个标准差。"
    ),
    "None of {batches} batches reached it.": "{batches} 个批次都没有到达该层。",
    "{before} adds a bias that the layer subtracts again.": "{before} 加上的偏置又被该层减掉。",
    "{dropout} drops values before it, in training only.": (
        "{dropout} 位于该层之前，只在训练时丢弃值。"
    ),
    "{share:.0%} of its positions repeat the one before in every channel.": (
        "{share:.0%} 的位置在所有通道上都与前一个位置相同。"
    ),
    "{share:.0%} of the pixels are padding by a mask of the batch, which it does not get.": (
        "按批次中的掩码，{share:.0%} 的像素是填充，而该层没有得到掩码。"
    ),
    "It keeps no statistics and normalizes by the batch in eval, too.": (
        "它不保存统计量，在评估模式下也用当前批次归一化。"
    ),
    "{kind} with ε {eps:g} and momentum {momentum} among {count} {other} with {their_eps:g} and "
    "{their_momentum}.": (
        "该层是 {kind}，ε 为 {eps:g}，momentum 为 {momentum}；另外 {count} 层是 {other}，"
        "相应为 {their_eps:g} 和 {their_momentum}。"
    ),
    "With {activation} after it the stored statistics of {follower} fit, and without they do "
    "not.": "在它后面加上 {activation}，{follower} 存储的统计量就符合输入；不加则不符。",
    # BN7
    "γ and β have requires_grad=False, but a pass in training mode moved its statistics.": (
        "γ 和 β 的 requires_grad=False，但训练模式下的一次前向改变了它的统计量。"
    ),
    "It is in eval mode in a model in training mode: the next model.train() puts it in training "
    "mode.": "模型在训练模式，而该层在评估模式：下一次 model.train() 会把它切回训练模式。",
    "A pass after model.eval() moved its statistics.": (
        "model.eval() 之后的一次前向改变了它的统计量。"
    ),
    "It stays in training mode after model.eval().": "model.eval() 之后它仍在训练模式。",
    "It is in training mode and γ or β is trained, but a pass did not move its statistics.": (
        "它在训练模式，γ 或 β 参与训练，但一次前向没有改变它的统计量。"
    ),
    "γ or β has requires_grad=True and is not in the optimizer.": (
        "γ 或 β 的 requires_grad=True，却不在优化器中。"
    ),
    "γ or β of {some} of {layers} layers has weight decay, up to {most:g}.": (
        "{layers} 层中有 {some} 层的 γ 或 β 带权重衰减，最大为 {most:g}。"
    ),
    "The last batch of each epoch has one sample.": "每个 epoch 的最后一个批次只有一个样本。",
    "A batch has one value per channel in some layer.": "某个批次在某一层每通道只有一个值。",
    "Processes have different statistics, up to {apart:.2g} deviations apart.": (
        "各进程的统计量不同，最多相差 {apart:.2g} 个标准差。"
    ),
    # BN8
    "{what}: outputs differ by {difference:.3g}, where rounding explains {allowed:.1g}.": (
        "{what}：输出相差 {difference:.3g}，舍入误差最多只能解释 {allowed:.1g}。"
    ),
    "The same batch twice": "同一批次运行两次",
    "A sample alone and among others": "样本单独运行与同其他样本一起运行",
    "The batch in another order": "批次换一种顺序",
    "The batch in two halves": "批次分成两半",
    "With more padding that the mask leaves out": "增加被掩码排除的填充",
    "By torch.compile and eager": "torch.compile 与 eager 模式对比",
    "By torch.export and eager": "torch.export 与 eager 模式对比",
    # BN9
    "{what} became NaN or infinite in training step {step}.": (
        "第 {step} 个训练步中，{what}变为 NaN 或无穷大。"
    ),
    "The running mean or variance": "滑动均值或方差",
    "The loss": "损失",
    "The gradient of {name}": "{name} 的梯度",
    "The parameter {name}": "参数 {name} ",
    "It is in eval mode beside layers in training mode, and training steps moved its statistics.": (
        "它在评估模式，周围的层在训练模式，而训练步改变了它的统计量。"
    ),
    "A pass in training mode leaves its statistics, and training steps moved them.": (
        "训练模式下的一次前向不改变它的统计量，而训练步改变了它们。"
    ),
    "Training steps called it {calls} times and did not move its statistics, which a pass without "
    "gradients moves.": (
        "训练步调用了它 {calls} 次，却没有改变它的统计量，而不带梯度的一次前向会改变。"
    ),
    "No backward pass reached its γ or β.": "反向传播从未到达它的 γ 或 β。",
    "The gradient of its γ or β was 0 in all {steps} steps.": (
        "在全部 {steps} 个训练步中，它的 γ 或 β 的梯度都为 0。"
    ),
    "No training step called it, though passes without gradients do.": (
        "训练步从未调用它，而不带梯度的前向会调用。"
    ),
    "After {steps} training steps normalized values are off by {distance:.2g} of their deviation; "
    "before them it was {before:.2g}.": (
        "经过 {steps} 个训练步，归一化后的值偏离 {distance:.2g} 个标准差；此前为 {before:.2g} 个。"
    ),
    "The forward passes of the steps called it {calls} times, and its statistics were updated "
    "{updates} times.": "训练步的前向调用了它 {calls} 次，它的统计量却更新了 {updates} 次。",
}
PAGE = {
    "Layers": "各层",
    "Layers by their effect on the output": "各层按对输出的影响排序",
    "Channels": "通道",
    "Not checked": "未检查",
    "What enters each layer": "各层的输入",
    "Values that enter a layer, of all channels, normalized by the stored statistics: where these "
    "fit, the mean is 0 and the deviation 1. Bars: mean ± deviation, by the stored statistics and "
    "as measured; values beyond ±8 are counted at the ends.": (
        "进入各层的值，所有通道合在一起，按存储的统计量归一化：统计量相符时，均值为 0，标准差为 1。"
        "横条：均值 ± 标准差，分别按存储值和测得值；超出 ±8 的值计入两端。"
    ),
    "mean {mean:.2g}, deviation {deviation:.2g}": "均值 {mean:.2g}，标准差 {deviation:.2g}",
    "values, normalized": "归一化后的值",
    "number": "个数",
    "entered": "输入值",
    "found": "发现",
    "dtype": "数据类型",
    "least σ²": "最小 σ²",
    "largest σ²": "最大 σ²",
    "largest |γ|": "最大 |γ|",
    "constant": "恒定",
    "prunable": "可剪枝",
    "effect": "影响",
    "distance": "距离",
    "errors": "标准误差数",
    "gap": "训练与评估之差",
    "values": "每批值数",
    "independent": "独立值数",
    "error": "错误",
    "warning": "警告",
    "info": "提示",
    "{severity} {rule}: {title}": "{severity} {rule}：{title}",
    "Remedy: {remedy}": "处理办法：{remedy}",
    "and {more:,} more; --format json has all": "另有 {more:,} 条；--format json 给出全部",
    "{note} {more:,} more layers: --layers.": "{note}另有 {more:,} 层：--layers。",
    "Not checked: {rules} ({reason}).": "未检查：{rules}（{reason}）。",
    "{known} findings that the baseline has are not shown.": "基线中已有的 {known} 条发现未显示。",
    "{layers}; {found}": "{layers}；{found}",
    "{number:,} batch norm": "{number:,} 个批归一化层",
    "{number:,} batch norms": "{number:,} 个批归一化层",
    "nothing found": "没有发现问题",
    "{count:,} error": "{count:,} 个错误",
    "{count:,} errors": "{count:,} 个错误",
    "{count:,} warning": "{count:,} 个警告",
    "{count:,} warnings": "{count:,} 个警告",
    "{count:,} info": "{count:,} 个提示",
    "steps: num_batches_tracked. constant: channels with σ² below 1e-10. prunable: channels with "
    "|γ| below a thousandth of the layer's largest. A dash: not stored, or not readable as a batch "
    "norm.": (
        "步数：num_batches_tracked。恒定：σ² 低于 1e-10 的通道。"
        "可剪枝：|γ| 低于该层最大值千分之一的通道。"
        "短横：未存储，或不能当作批归一化层读取。"
    ),
    "effect: how far the output moves, in its deviations, when this layer alone gets the true "
    "statistics. distance: how far normalized values are off, in deviations; errors: the same in "
    "standard errors. gap: difference of the layer's output between training and eval. "
    "independent: effective number of independent values in a batch.": (
        "影响：只给这一层换上真实统计量时，模型输出改变多少个标准差。"
        "距离：归一化后的值偏离多少个标准差；标准误差数：同样的偏离以标准误差为单位。"
        "训练与评估之差：该层的输出在两种模式下的差别。"
        "独立值数：一个批次中独立值的有效个数。"
    ),
    "Only the tensors were read. Use bn.calibrate or bn.diagnose with data to check whether the "
    "statistics fit the data.": (
        "只读取了张量。要检查统计量是否符合数据，请用 bn.calibrate 或 bn.diagnose 并给出数据。"
    ),
}
_RULES = {rule.title: TITLES[rule.id] for rule in ALL} | {
    rule.remedy: REMEDIES[rule.id] for rule in ALL
}
CHINESE = PAGE | REASONS | MESSAGES | _RULES
