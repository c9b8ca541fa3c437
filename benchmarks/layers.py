"""The tables of single layers: ten rows for the READMEs, and the long one of docs/benchmarks.md."""

from cited import Row, Rows
from tables import REGIMES, allocators, around, both, markdown, ratio, where

MODES = {"train": "forward and backward", "eval": "evaluation"}
FLAT = [("32x64", "N,C"), ("8192x1024", "N,C")]
IMAGES = [(shape, layout) for shape in ("32x1024x14x14",)
          for layout in ("contiguous", "channels-last")]  # fmt: skip
KINDS = [("bn", "fp32"), ("bn+relu", "fp32"), ("bn+add+relu", "fp32"), ("bn+add+relu", "bf16")]
RIVALS = ("eager", "eager in place")

Cell = tuple[str, str, str, str, str]
CELLS: list[Cell] = [
    (mode, op, dtype, *place) for mode in MODES for place in (*FLAT, *IMAGES) for op, dtype in KINDS
]
IMAGE = "32x1024x14x14"
SHORT: list[Cell] = [
    ("train", "bn+relu", "fp32", "32x64", "N,C"),
    ("train", "bn+relu", "fp32", "8192x1024", "N,C"),
    ("train", "bn", "fp32", IMAGE, "contiguous"),
    ("train", "bn+relu", "fp32", IMAGE, "contiguous"),
    ("train", "bn+relu", "fp32", IMAGE, "channels-last"),
    ("train", "bn+add+relu", "fp32", IMAGE, "contiguous"),
    ("train", "bn+add+relu", "fp32", IMAGE, "channels-last"),
    ("train", "bn+add+relu", "bf16", IMAGE, "contiguous"),
    ("eval", "bn+relu", "fp32", "32x64", "N,C"),
    ("eval", "bn+relu", "fp32", IMAGE, "contiguous"),
]
CHINESE = {"train": "前向与反向", "eval": "推理", "N,C": "N,C", "contiguous": "连续",
           "channels-last": "channels-last"}  # fmt: skip


def contender(rows: Rows, cell: Cell, name: str, regime: str) -> Row:
    """Return the row of a contender of a cell."""
    names = ("mode", "op", "dtype", "shape", "layout")
    filters = dict(zip(names, cell, strict=True))
    return rows.one("cpu", {**filters, "contender": name, "regime": regime})


def against(rows: Rows, cell: Cell, rival: str) -> list[str]:
    """Return the ratios of a rival in both regimes; dashes if it is not measured."""
    if rival == "eager in place" and cell[1] == "bn":
        return ["–"] * len(REGIMES)
    return [ratio(contender(rows, cell, rival, regime)) for regime in REGIMES]


def floor(rows: Rows, cell: Cell) -> list[str]:
    """Return our time over the time of the unavoidable copies, in both regimes."""
    found = [contender(rows, cell, "ours", regime) for regime in REGIMES]
    return [
        f"{row.number('median') / (row.number('copy') * row.number('floor_copies')):.2f}"
        for row in found
    ]


def shown(cell: Cell) -> list[str]:
    """Return operation and input of a cell."""
    _, op, dtype, shape, layout = cell
    return [op, f"{shape.replace('x', '×')} {dtype}, {layout}"]


def ours(rows: Rows, cells: list[Cell]) -> list[Row]:
    """Return our rows of cells, from which the caption takes machine and versions."""
    return [contender(rows, cell, "ours", regime) for cell in cells for regime in REGIMES]


def short(rows: Rows) -> str:
    """Return the table of ten cells in README.md."""
    lines = [
        [MODES[cell[0]], *shown(cell), *against(rows, cell, "eager"), *floor(rows, cell)]
        for cell in SHORT
    ]
    head = ["mode", "op", "input", *both("× eager"), *both("× floor")]
    return f"{around(ours(rows, SHORT))}\n\n{markdown(head, 3, lines)}"


def short_chinese(rows: Rows) -> str:
    """Return the table of ten cells in README.zh.md."""
    lines = []
    for cell in SHORT:
        mode, op, dtype, shape, layout = cell
        size = f"{shape.replace('x', '×')} {dtype}，{CHINESE[layout]}"
        ratios = [*against(rows, cell, "eager"), *floor(rows, cell)]
        lines.append([CHINESE[mode], op, size, *ratios])
    head = [
        "模式",
        "运算",
        "输入",
        "× eager，默认",
        "× eager，保留",
        "× 下限，默认",
        "× 下限，保留",
    ]
    found = ours(rows, SHORT)
    place = "{machine}，{threads} 个线程，torch {torch}，Python {python}，提交 {commit}".format(
        **{name: said.replace(", ", "、") for name, said in where(found).items()}
    )
    names = zip(("默认", "保留"), allocators(found), strict=True)
    place += "".join(f"；{name}：{said.partition(': ')[2]}" for name, said in names)
    return f"{place}\n\n{markdown(head, 3, lines)}"


def long(rows: Rows) -> str:
    """Return the tables of all cells with every rival."""
    head = ["op", "input", *both("× eager"), *both("× in place"), *both("× floor")]  # fmt: skip
    parts = [around(ours(rows, CELLS))]
    for mode, title in MODES.items():
        lines = []
        for cell in CELLS:
            if cell[0] == mode:
                ratios = [one for rival in RIVALS for one in against(rows, cell, rival)]
                lines.append([*shown(cell), *ratios, *floor(rows, cell)])
        parts += [f"{title[0].upper()}{title[1:]}:", markdown(head, 2, lines)]
    return "\n\n".join(parts)


BLOCKS = {"layers": short, "layers-zh": short_chinese, "layers-all": long}
