"""``bn.adapt``: evaluation by the merge of the stored statistics and those of the batch."""

import math
from numbers import Real
from typing import Any

from torch import nn

from batchnorm.errors import OptionError
from batchnorm.models.change import Edit, Model
from batchnorm.models.stack import Done, newest, record
from batchnorm.nn.common import policy_of
from batchnorm.surgery import layers, rules
from batchnorm.surgery.exchange import Exchange, exchange
from batchnorm.surgery.options import Filter, Options
from batchnorm.surgery.unfreeze import shown

_VERB = "adapt"

PRIOR = """\
expected prior > 0, the number of samples that the stored statistics count as, got {got!r}; to \
normalize by the batch alone, use training mode"""
NOT_STORED = "it keeps no statistics to merge with (track_running_stats=False)"
FROZEN = "its class normalizes by stored statistics alone; bn.unfreeze(model) first"
FOLDED = "the layer before it computes it by scaled weights; bn.freeze(model, folded=False) first"


def adapt(model: Model, prior: float, *, filter: Filter | None = None) -> Model:
    r"""Normalize in evaluation by the stored statistics and the batch's, in place.

    .. math:: \mu = \frac{N \mu_s + n \mu_b}{N + n}, \qquad
        \sigma^2 = \frac{N \sigma_s^2 + n \sigma_b^2}{N + n}
            + \frac{N n}{(N + n)^2} (\mu_s - \mu_b)^2

    for N = ``prior`` samples with the stored mean and variance and the n samples of the batch:
    these are the merged Moments. Meant for data that differ from the training data. The running
    statistics are not changed, so every batch is merged with the same statistics; a batch of one
    sample is merged too. Gradients flow through the batch's part. ``bn.undo(model, "adapt")``
    reverts it; a second call replaces the prior. Layers of ``torch.nn`` and timm are converted as
    by ``bn.convert``.

    With a mask, a sample counts as the average number of values that count.

    Args:
        model: The model; changed in place.
        prior: N. If it is large, the stored statistics dominate; if N = n, both have weight 1/2.
        filter: ``filter(name, module)`` returns whether a layer is changed; all by default.

    Returns:
        The model.

    Raises:
        OptionError: If the prior is not a number > 0.
        SurgeryError: If there is no batch normalization, or a layer cannot be adapted: it has no
            statistics, a frozen or an unknown class, or is folded by ``bn.freeze``. Nothing is
            changed then.

    Reference:
        Schneider et al. 2020, "Improving robustness against common corruptions by covariate shift
        adaptation", section 2: the same weights, without the last term of the variance (the
        variance between the two means).
    """
    number = isinstance(prior, Real) and not isinstance(prior, bool)
    if not number or not 0 < prior < math.inf:
        raise OptionError(PRIOR.format(got=prior))
    some = layers.chosen(layers.found(model, _VERB), filter)
    plans = [(name, layer, _becomes(name, layer)) for name, layer in some]
    before, stood_on = newest(model, _VERB, Exchange)
    done = []
    for name, layer, becomes in plans:
        known: Any = layer
        entry = before[layer].entry if layer in before and layer not in stood_on else None
        older = entry.change if entry is not None else None
        assert older is None or isinstance(older, Exchange)
        new = {} if becomes is None else Options(None, None).attributes(layer, becomes, {})
        new["policy"] = policy_of(getattr(known, "policy", None), prior=float(prior))
        was = shown(layer)
        change = exchange(layer, new, becomes and becomes.cls, older)
        edit = Edit((name,), _VERB, was, shown(layer), f"prior={prior:g}")
        done.append(Done(edit, change, name, entry))
    record(model, done)
    return model


def _becomes(name: str, layer: nn.Module) -> rules.Becomes | None:
    """Return the conversion of a layer to our class; None if it is of this library already.

    Raises:
        SurgeryError: If the layer cannot be adapted.
    """
    known: Any = layer
    verdict = rules.decide(name, layer)
    reason = layers.without_values(layer)
    if isinstance(verdict, rules.Left) or verdict is None:
        reason = reason or (verdict.reason if verdict else "it is none")
    elif verdict.frozen:
        reason = reason or FROZEN
    elif known.running_mean is None or known.running_var is None:
        reason = reason or NOT_STORED
    elif getattr(known, "frozen", None) is not None and known.frozen.folded:
        reason = reason or FOLDED
    if reason:
        raise layers.refuse(_VERB, name, layer, reason)
    return verdict if isinstance(verdict, rules.Becomes) else None
