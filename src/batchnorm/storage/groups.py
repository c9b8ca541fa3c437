"""The batch norms of a checkpoint, found by the names of tensors, without a model's code."""

from collections.abc import Iterator
from dataclasses import replace

from batchnorm.storage.checkpoint import Checkpoint, Group

# Names of means and variances in torch, TensorFlow, Paddle and others. The names of the first table
# are unambiguous; those of the second are batch norms only together with a γ or β.
STATISTICS = (
    ("running_mean", "running_var"),
    ("running_mean", "running_variance"),
    ("moving_mean", "moving_variance"),
    ("moving_mean", "moving_var"),
)
PLAIN = (("_mean", "_variance"), ("mean", "variance"), ("mean", "var"))
WEIGHTS = ("weight", "gamma", "scale")
BIASES = ("bias", "beta", "offset")
COUNTER = "num_batches_tracked"
# Names in layers with bn.Grouped: mean of all samples; mean and variance per group.
OF_ALL, OF_GROUPS = "running_mean", ("group_mean", "group_var")
# Each name of the first table with the names that accompany it, and whether it is a mean.
_WORDS = tuple(
    (word, tuple(pair[1 - at] for pair in STATISTICS if pair[at] == word), at == 0)
    for at in (0, 1)
    for word in dict.fromkeys(pair[at] for pair in STATISTICS)
)
_SEPARATORS = (".", "/")
# TensorFlow's names end with the number of an output.
_OUTPUT = ":0"


def batch_norms(checkpoint: Checkpoint) -> tuple[Group, ...]:
    """Return the batch norms of a checkpoint, in the checkpoint's order."""
    return tuple(_found(checkpoint)) if checkpoint.nodes is None else checkpoint.nodes


def _found(checkpoint: Checkpoint) -> Iterator[Group]:
    names = set(checkpoint.names)
    taken: set[str] = set()
    for name in checkpoint.names:
        if name in taken:
            continue
        group = _group(name, names) or _plain(name, names, checkpoint)
        if group is not None and not _is_no_layer(group, checkpoint):
            group = _with_rows(group, names, checkpoint)
            taken.update(part for part in (group.mean, group.var) if part)
            yield group


def _group(name: str, names: set[str]) -> Group | None:
    """Return the group of a mean, or of a variance without a mean."""
    stem, end = _stem(name)
    for word, others, is_mean in _WORDS:
        if stem.endswith(word):
            prefix = stem.removesuffix(word)
            found = (prefix + other + end for other in others)
            partner = next((one for one in found if one in names), None)
            if is_mean:
                return _with_rest(prefix, end, name, partner, names)
            if partner is None:
                return _with_rest(prefix, end, None, name, names)
    return None


def _plain(name: str, names: set[str], checkpoint: Checkpoint) -> Group | None:
    """Return the group of a tensor named "mean", if it is accompanied by a γ or β of its length."""
    stem, end = _stem(name)
    for mean, variance in PLAIN:
        prefix = stem.removesuffix(mean)
        var = prefix + variance + end
        if prefix == stem or var not in names or not prefix.endswith(_SEPARATORS):
            continue
        group = _with_rest(prefix, end, name, var, names)
        length = checkpoint.length(name)
        affine = [part for part in (group.weight, group.bias) if part is not None]
        if affine and length and all(checkpoint.length(part) == length for part in (*affine, var)):
            return group
    return None


def _with_rest(prefix: str, end: str, mean: str | None, var: str | None, names: set[str]) -> Group:
    def first(words: tuple[str, ...]) -> str | None:
        return next((prefix + word + end for word in words if prefix + word + end in names), None)

    layer = prefix.rstrip("./_")
    return Group(layer, mean, var, first(WEIGHTS), first(BIASES), first((COUNTER,)))


def _with_rows(group: Group, names: set[str], checkpoint: Checkpoint) -> Group:
    """Add the statistics per group (``bn.Grouped``); leave out γ and β that have rows."""
    prefix = (group.mean or "").removesuffix(OF_ALL)
    mean, var = (prefix + one for one in OF_GROUPS)
    if group.mean is None or mean not in names or var not in names:
        return group
    shape = checkpoint.shape(mean)
    weight, bias = (
        None if name is None or checkpoint.shape(name) == shape else name
        for name in (group.weight, group.bias)
    )
    return replace(group, weight=weight, bias=bias, rows=(mean, var))


def _is_no_layer(group: Group, checkpoint: Checkpoint) -> bool:
    """Return whether mean and variance have the same shape but are not vectors (an image's)."""
    if group.mean is None or group.var is None:
        return False
    shape = checkpoint.shape(group.mean)
    return (
        shape is not None
        and shape == checkpoint.shape(group.var)
        and checkpoint.length(group.mean) is None
    )


def _stem(name: str) -> tuple[str, str]:
    """Return a name without the output number, and the number."""
    stem = name.removesuffix(_OUTPUT)
    return stem, name[len(stem) :]
