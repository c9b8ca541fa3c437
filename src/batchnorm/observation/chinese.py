"""The page of an observed training in Chinese: English template -> Chinese one."""

CHINESE = {
    "{kind}, observed while it trained": "{kind}：训练过程的观察",
    "{steps}, {sampled:,} sampled, the last one at step {last:,}; {layers}": (
        "{steps}，采样 {sampled:,} 步，最后一次在第 {last:,} 步；{layers}"
    ),
    "{steps:,} training step": "{steps:,} 个训练步",
    "{steps:,} training steps": "{steps:,} 个训练步",
    "{layers:,} layer": "{layers:,} 层",
    "{layers:,} layers": "{layers:,} 层",
    "{steps}, in which no layer was called with an input to measure": (
        "{steps}，其中没有任何层得到可以测量的输入"
    ),
    "No training step was seen. A step is a call of the observed model, in training mode and "
    "with gradients enabled; observe the module that is called, and torch.compile(model) "
    "rather than a model whose compiled form is called": (
        "没有观察到训练步。训练步指在训练模式下、开启梯度时对被观察模型的一次调用；"
        "请观察实际被调用的模块：如果调用的是 torch.compile(model)，就观察它，而不是原来的模型"
    ),
    "Not seen, for torch.jit compiled them: {names}.": "由 torch.jit 编译、无法观察的层：{names}。",
    "Step {step:,}": "第 {step:,} 步",
    "What enters activations": "激活函数的输入",
    "Over the training": "训练过程中的变化",
    "Channels now": "各通道的当前值",
    "median": "中位数",
    "15th to 85th percentile": "第 15 至第 85 百分位",
    "{low:.3g} to {high:.3g}": "{low:.3g} 至 {high:.3g}",
    "flat, %": "平坦区，%",
    "change of μ": "μ 的变化",
    "change of σ": "σ 的变化",
    "running μ off": "滑动 μ 偏离",
    "running σ² off, %": "滑动 σ² 偏离，%",
    "Percentiles: of what enters the activation. Flat: where its slope is below a fifth of its "
    "greatest. Changes: from the batch before to this one, root mean square over channels; of μ in "
    "deviations, of σ of its logarithm. 1/σ: the median over channels of 1/sqrt(σ² + ε). Running "
    "statistics: off the last batches' (in deviations; relative).": (
        "百分位：激活函数输入的百分位数。平坦区：激活函数的斜率低于其最大斜率五分之一之处。"
        "变化：从上一批次到这一批次，取各通道的均方根；μ 以标准差为单位，σ 取对数之差。"
        "1/σ：1/sqrt(σ² + ε) 在各通道上的中位数。"
        "滑动统计量：相对最近几个批次的统计量的偏离（均值以标准差为单位，方差取相对值）。"
    ),
    "Median from {first:.3g} to {last:.3g}; all channels together.": (
        "中位数从 {first:.3g} 变到 {last:.3g}；所有通道合在一起。"
    ),
    "training step": "训练步",
    "value entering": "输入值",
    "{layers:,} layers.": "共 {layers:,} 层。",
    "{layers:,} layers; drawn are the {most} that differ most over the training.": (
        "共 {layers:,} 层；图中是训练过程中变化最大的 {most} 层。"
    ),
    "Change of μ per step": "μ 每步的变化",
    "Change of ln σ per step": "ln σ 每步的变化",
    "Where activations are flat": "落在激活函数平坦区的值",
    "Running mean off the last batches'": "滑动均值的偏离",
    "Running variance off the last batches'": "滑动方差的偏离",
    "root mean square, in deviations": "均方根，以标准差为单位",
    "root mean square": "均方根",
    "share of values": "占全部值的比例",
    "Euclidean norm": "欧几里得范数",
    "median over channels": "各通道的中位数",
    "in deviations": "以标准差为单位",
    "relative": "相对值",
}
