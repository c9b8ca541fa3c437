"""Titles and remedies of the rules in Chinese, by their identifiers."""

_CALIBRATE = (
    "用训练数据重新计算统计量：bn.calibrate(model, data)，或 batchnorm calibrate --model "
    "pkg.mod:factory --data pkg.mod:loader --checkpoint IN --out OUT。"
)
_BATCH = (
    "检查 BN606 和 BN703 指出的层，它们在评估模式下用当前批次归一化；"
    "bn.set_options(model, track_running_stats=True) 和 bn.calibrate(model, data) "
    "为它们建立统计量。"
)

TITLES = {
    "BN001": "没有存储统计量的批归一化层",
    "BN101": "统计量为 NaN 或无穷大",
    "BN102": "方差为负",
    "BN103": "γ 或 β 为 NaN 或无穷大",
    "BN104": "统计量全部为 0",
    "BN105": "统计量不是浮点数",
    "BN106": "同一层的张量大小不一",
    "BN107": "缺少均值或方差",
    "BN201": "统计量从未更新",
    "BN202": "训练没有经过的层",
    "BN203": "模型没有训练过",
    "BN204": "计数器为 0，而统计量已经变动",
    "BN205": "计了步数，统计量却从未变动",
    "BN206": "各层的步数不同",
    "BN207": "计数器为负或不是数",
    "BN208": "计数器已到上限",
    "BN301": "γ 非常大",
    "BN302": "γ / σ 非常大",
    "BN303": "至少一半的通道恒定",
    "BN304": "有的通道恒定",
    "BN305": "有的通道可以剪枝",
    "BN306": "训练之后 γ 全部为 0",
    "BN307": "统计量超出 float16 的范围",
    "BN401": "统计量以 16 位存储",
    "BN402": "平均副本的统计量属于另一个时期",
    "BN403": "ONNX 节点用当前批次归一化",
    "BN501": "存储的统计量不是这些数据的统计量",
    "BN502": "步数太少，与动量不相称",
    "BN503": "滑动平均滞后：动量非常小",
    "BN504": "滑动平均几乎只含最后一个批次",
    "BN505": "批次太小",
    "BN506": "输入与训练时相比有缩放或平移",
    "BN507": "批次没有打乱，或各来自一个域",
    "BN508": "两层的统计量互换了",
    "BN601": "同一层处理不同性质的输入",
    "BN602": "有一层没有用到",
    "BN603": "该层之前有偏置",
    "BN604": "该层之前有 dropout",
    "BN605": "填充计入了统计量",
    "BN606": "该层在评估模式下也用当前批次归一化",
    "BN607": "另一个类的层有不同的 ε 或动量",
    "BN608": "丢失了激活函数",
    "BN701": "参数已冻结，统计量仍在变动",
    "BN702": "model.train() 会使冻结的层恢复训练模式",
    "BN703": "统计量在评估模式下变动",
    "BN704": "统计量在训练中不变",
    "BN705": "优化器中没有 γ 或 β",
    "BN706": "γ 或 β 带权重衰减",
    "BN707": "最后一个批次只有一个样本",
    "BN708": "各进程的统计量不一致",
    "BN801": "评估模式下两次运行的结果不同",
    "BN802": "样本的结果取决于同批的其他样本",
    "BN803": "样本的结果取决于它在批次中的位置",
    "BN804": "结果取决于批次大小",
    "BN805": "填充改变了结果",
    "BN806": "编译后的模型计算结果不同",
    "BN807": "导出的模型计算结果不同",
    "BN901": "训练步产生 NaN 或无穷大",
    "BN902": "训练步改变了冻结层的统计量",
    "BN903": "训练步没有改变统计量",
    "BN904": "γ 或 β 得不到梯度",
    "BN905": "训练步没有调用某一层",
    "BN906": "滑动平均跟不上权重的变化",
    "BN907": "一个训练步不止一次更新统计量",
}
REMEDIES = {
    "BN001": "如果本应如此，无需处理。否则请检查文件中张量的名字。",
    "BN101": _CALIBRATE,
    "BN102": _CALIBRATE,
    "BN103": "退回到最近一个没有此问题的检查点。",
    "BN104": _CALIBRATE,
    "BN105": "从模型重新写出检查点。" + _CALIBRATE,
    "BN106": "从模型重新写出检查点；剪枝时，同一层的所有张量要一起剪。",
    "BN107": "从模型重新写出检查点。" + _CALIBRATE,
    "BN201": _CALIBRATE,
    "BN202": (
        "如果用到该层：加载或训练它，然后调用 bn.calibrate(model, data)。如果用不到，删除它。"
    ),
    "BN203": "如果训练才开始，无需处理。否则是存错了模型。",
    "BN204": "以 momentum=None 继续训练之前，把 num_batches_tracked 设为实际的步数。",
    "BN205": _CALIBRATE,
    "BN206": "如果各层本应一起训练，请看哪些层与众不同，然后校准：bn.calibrate(model, data)。",
    "BN207": "把它设为步数：layer.num_batches_tracked.fill_(steps)，类型为 int64。",
    "BN208": "以 int64 存储：state[name] = state[name].long()，并写入真实的步数。",
    "BN301": "降低学习率，或对 γ 使用权重衰减；从较早的检查点查看从何时开始。",
    "BN302": (
        "检查该层的输入：它的标准差远小于 sqrt(ε)，或者 γ 已经发散。"
        "把输入放大，或用更大的 eps 训练。"
    ),
    "BN303": "检查前一层。如果它的输出确实有变化：" + _CALIBRATE,
    "BN304": "这些通道可以删除。如果它们的输入确实有变化：bn.calibrate(model, data)。",
    "BN305": "用剪枝库剪掉这些通道，然后调用 bn.calibrate(model, data)。",
    "BN306": "确认优化器中有 γ：它在 model.parameters() 中，且 requires_grad=True。",
    "BN307": (
        "调用 .half() 时让统计量保持 float32：bn.convert(model)；或使用 bfloat16 或 autocast。"
    ),
    "BN401": (
        "让统计量保持 float32：在 .half() 之前调用 bn.convert(model)，或对批归一化层调用 .float()。"
        "如果曾以 16 位继续训练：" + _CALIBRATE
    ),
    "BN402": "校准平均后的网络本身：bn.calibrate(averaged, data)。",
    "BN403": "在评估模式下导出：先调用 model.eval()，再调用 torch.onnx.export(model, ...)。",
    "BN501": _CALIBRATE,
    "BN502": _CALIBRATE + "或者用 momentum=None 训练，它对所有步取相同的权重。",
    "BN503": _CALIBRATE + "下次训练时：bn.set_options(model, momentum=0.1)。",
    "BN504": "先调用 bn.set_options(model, momentum=0.1)，然后" + _CALIBRATE,
    "BN505": (
        "加大批次；使用所有进程的统计量：bn.convert(model, statistics=bn.Synced())；"
        "或固定统计量：bn.freeze(model)。"
    ),
    "BN506": "与训练时的预处理对照。如果这些数据没有问题：" + _CALIBRATE,
    "BN507": (
        "打乱数据：DataLoader(..., shuffle=True)。"
        "如果各域应有自己的统计量：statistics=bn.Grouped(count, affine)。"
    ),
    "BN508": "在 state dict 中互换这两层；如果 γ 和 β 也来自那里，一并互换。",
    "BN601": (
        "每次调用用一个单独的层，或为每类输入保存统计量：statistics=bn.Grouped(count, affine)。"
    ),
    "BN602": "删除它，或给出会经过这一分支的数据。",
    "BN603": "建立前一层时使用 bias=False。",
    "BN604": (
        "把 dropout 移到最后一个批归一化层之后；或者校准，校准时不带 dropout 测量："
        "bn.calibrate(model, data)。"
    ),
    "BN605": (
        "告诉该层哪些位置有效：对本库的层使用 layer(x, mask=mask) 或 lengths=lengths，"
        "bn.convert(model) 可以换成这样的层。"
    ),
    "BN606": "如果并非有意：bn.set_options(model, track_running_stats=True)，然后校准。",
    "BN607": (
        "从原模型用 bn.convert(model) 转换，它会保留这些设置；或者自行设置："
        "bn.set_options(model, eps=..., momentum=...)。"
    ),
    "BN608": "从原模型用 bn.convert(model) 转换，它会保留激活函数；或者把激活函数加在该层之后。",
    "BN701": "把整个层冻结：bn.freeze(model, filter=...)。",
    "BN702": "bn.freeze(model, filter=...) 在 train() 之后依然有效。",
    "BN703": (
        "检查 train()、设置 training=True 的 forward，以及该层外面不起作用的 train()；"
        "bn.freeze(model) 使统计量在任何模式下都不变。"
    ),
    "BN704": (
        "bn.set_options(model, momentum=0.1)；如果该层应当冻结，就把它整个冻结："
        "bn.freeze(model, filter=...)。"
    ),
    "BN705": '加入优化器：optimizer.add_param_group({"params": [layer.weight, layer.bias]})。',
    "BN706": "optimizer = torch.optim.SGD(bn.no_weight_decay(model), ...)。",
    "BN707": "DataLoader(..., drop_last=True)。",
    "BN708": (
        "使用所有进程的统计量：bn.convert(model, statistics=bn.Synced())；"
        "或在保存之前在所有进程中调用 bn.calibrate(model, data)。"
    ),
    "BN801": "检查 training=True 的 dropout，以及 BN703。",
    "BN802": _BATCH,
    "BN803": "检查没有把批次轴放在最前面的 view 和 reshape。",
    "BN804": _BATCH,
    "BN805": "把掩码交给各层：使用本库的 layer(x, mask=mask)。",
    "BN806": (
        "在最后一次改变模式和缓冲区之后再编译；bn.same(model, compiled, data) 给出输出相差多少。"
    ),
    "BN807": ("在评估模式下导出；bn.prepare_for_export(model, example) 会替换导出工具算错的部分。"),
    "BN901": ("降低学习率、裁剪梯度，或用 bfloat16 代替 float16；并检查这一步的输入。"),
    "BN902": (
        "检查 forward 和钩子中的 train() 以及对缓冲区的写入；"
        "bn.freeze(model, filter=...) 使统计量在任何模式下都不变。"
    ),
    "BN903": (
        "让训练步调用模型本身，或把副本的缓冲区取回来；"
        "训练之后用 bn.calibrate(model, data) 测量统计量。"
    ),
    "BN904": (
        "检查该层之后的 detach() 和 torch.no_grad()，以及损失没有用到的输出；"
        "如果 γ 和 β 应当不变：bn.freeze(model, filter=...)。"
    ),
    "BN905": "检查 torch.is_grad_enabled() 以及随机跳过的层。",
    "BN906": (
        "每次评估之前重新计算统计量：bn.calibrate(model, data)；"
        "或者用更低的学习率、更大的 momentum 训练。"
    ),
    "BN907": "bn.convert(model)：本库的层能识别第二次前向。",
}
