"""The batch norms of a checkpoint, found by their tensors and not by a model's code."""

from collections.abc import Iterator
from dataclasses import dataclass

from batchnorm.storage.checkpoint import Checkpoint

# Names of means and variances, of torch, TensorFlow and Paddle among others. Those of the first
# table are used for nothing else; those of the second are batch norms only beside a γ or β.
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
_SEPARATORS = (".", "/")
# TensorFlow's names end in the number of an output.
_OUTPUT = ":0"


@dataclass(frozen=True)
class Group:
    """The tensors of one batch norm; None for those that are not there.

    Attributes:
        layer: The layer's name as the checkpoint has it, prefixes included.
        mean: The names of its tensors, as those that follow.
        eps: ε, where the format says it.
        training: Whether the layer normalizes by the batch in use too, where the format says it.
    """

    layer: str
    mean: str | None
    var: str | None
    weight: str | None = None
    bias: str | None = None
    counter: str | None = None
    eps: float | None = None
    training: bool | None = None


def batch_norms(checkpoint: Checkpoint) -> tuple[Group, ...]:
    """Return the batch norms of a checkpoint, in its own order."""
    if checkpoint.graph:
        return tuple(
            Group(
                node.name,
                node.mean,
                node.var,
                node.weight,
                node.bias,
                eps=node.eps,
                training=node.training,
            )
            for node in checkpoint.nodes
        )
    return tuple(_found(checkpoint))


def _found(checkpoint: Checkpoint) -> Iterator[Group]:
    names = set(checkpoint.names)
    taken: set[str] = set()
    for name in checkpoint.names:
        if name in taken:
            continue
        group = _group(name, names) or _plain(name, names, checkpoint)
        if group is not None and not _is_no_layer(group, checkpoint):
            taken.update(part for part in (group.mean, group.var) if part)
            yield group


def _group(name: str, names: set[str]) -> Group | None:
    """Return the group of a mean, or of a variance without a mean."""
    stem, end = _stem(name)
    means, variances = ({pair[i] for pair in STATISTICS} for i in (0, 1))
    for word in means:
        if stem.endswith(word):
            prefix = stem.removesuffix(word)
            partners = [prefix + var + end for mean, var in STATISTICS if mean == word]
            var = next((one for one in partners if one in names), None)
            return _with_rest(prefix, end, name, var, names)
    for word in variances:
        if stem.endswith(word):
            prefix = stem.removesuffix(word)
            partners = [prefix + mean + end for mean, var in STATISTICS if var == word]
            if not any(one in names for one in partners):
                return _with_rest(prefix, end, None, name, names)
    return None


def _plain(name: str, names: set[str], checkpoint: Checkpoint) -> Group | None:
    """Return the group of a tensor named just "mean", if γ or β of its length is beside it."""
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


def _is_no_layer(group: Group, checkpoint: Checkpoint) -> bool:
    """Return whether mean and variance are of one shape that is no vector, as of an image."""
    if group.mean is None or group.var is None:
        return False
    shape = checkpoint.shape(group.mean)
    return (
        shape is not None
        and shape == checkpoint.shape(group.var)
        and checkpoint.length(group.mean) is None
    )


def _stem(name: str) -> tuple[str, str]:
    """Return a name without the number of an output, and that number."""
    stem = name.removesuffix(_OUTPUT)
    return stem, name[len(stem) :]
