"""Makes and verifies the insertions of one call of ``bn.insert``."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from batchnorm.calibration.calibrate import calibrate
from batchnorm.comparison.same import same
from batchnorm.compat.modules import tables
from batchnorm.errors import SurgeryError
from batchnorm.folding.optimizer import rewire
from batchnorm.insertion.inserted import Inserted, Insertion, preserving, seal, wrap
from batchnorm.insertion.places import Place
from batchnorm.models.change import Edit
from batchnorm.models.examples import Example
from batchnorm.models.preserve import attributes_kept, preserved
from batchnorm.models.stack import Done, record

VERB = "insert"

ASKED = "the model reads {names}, which its Sequential with a normalization does not have"

UNPROVED = """\
bn.insert(init='preserve') would change the model's results in evaluation. Nothing was changed. \
{why}"""

UNCOPIED = """\
bn.insert(init='preserve') compares the model with a copy of it, and it cannot be copied: \
{error}. Nothing was changed"""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode in a block, and restore it."""
    with preserved(model), attributes_kept(model):
        model.eval()
        yield


class Work:
    """The insertions of one call, while they are made and verified."""

    def __init__(
        self,
        model: nn.Module,
        places: list[Place],
        examples: Sequence[Example],
        left: dict[str, str],
    ) -> None:
        self._model, self._examples, self._left = model, examples, left
        self.places = places
        self._kinds = {name: type(model.get_submodule(name)).__name__ for name in left}
        self._kinds |= {place.name: type(place.layer).__name__ for place in places}
        self._made: dict[str, Insertion] = {}

    def run(self, init: str, moments: Mapping[str, Any], optimizer: Optimizer | None) -> None:
        """Change the model, verify it, and record the edits; on any exception restore it."""
        original = self._copied() if init == "preserve" and self.places else None
        restore: Callable[[], None] | None = None
        try:
            for place in self.places:
                self._insert(place, moments[place.name])
            while names := self._asked():
                self._leave(names)
            if init == "normalize" and self._made:
                self._normalize()
            elif self._made:
                self._prove(original)
            for name, change in self._made.items():
                seal(self._model.get_submodule(name), change)
            restore = None if optimizer is None else self._rewire(optimizer)
            record(self._model, self._told(init))
        except BaseException:
            if restore is not None:
                restore()
            self._take_back(list(self._made))
            raise

    def _copied(self) -> nn.Module:
        try:
            with self._settled():
                return copy.deepcopy(self._model)
        except Exception as error:  # a model's tensors and attributes may raise anything
            raise SurgeryError(UNCOPIED.format(error=error)) from error

    @contextmanager
    def _settled(self) -> Iterator[None]:
        """Detach attributes that a pass computes, such as a weight of weight_norm, in a block.

        Tensors with a grad_fn cannot be copied.
        """
        with evaluating(self._model):
            with torch.no_grad():
                self._model(*self._examples[0].args, **self._examples[0].kwargs)
            yield

    def _insert(self, place: Place, moments: Any) -> None:
        norm: Any = place.normalization()
        bias = tables(place.layer)[0].get("bias")
        mean = moments.mean if bias is None else moments.mean - bias.detach().to(moments.mean)
        with torch.no_grad():
            norm.running_mean.copy_(mean)
            norm.running_var.copy_(moments.variance(1))
            gamma, beta = preserving(norm, bias)
            norm.weight.copy_(gamma)
            norm.bias.copy_(beta)
        self._made[place.name] = wrap(place.layer, norm)

    def _take_back(self, names: Sequence[str]) -> None:
        for name in names:
            self._made.pop(name).undo(self._model.get_submodule(name))

    def _asked(self) -> dict[str, set[str]]:
        """Run the model, and return the attributes that it reads of changed layers."""
        wrappers: dict[str, Any] = {name: self._model.get_submodule(name) for name in self._made}
        reads: dict[str, set[str]] = {name: set() for name in wrappers}
        with evaluating(self._model), torch.no_grad():
            for name, wrapper in wrappers.items():
                vars(wrapper)["asked"] = reads[name]
            try:
                for example in self._examples:
                    self._model(*example.args, **example.kwargs)
            except AttributeError:
                if not any(reads.values()):
                    raise
        return {name: names for name, names in reads.items() if names}

    def _leave(self, names: Mapping[str, set[str]]) -> None:
        self._take_back(list(names))
        for name, read in names.items():
            self._left[name] = ASKED.format(names=", ".join(f".{one}" for one in sorted(read)))

    def _normalize(self) -> None:
        """Set γ = 1, β = 0, and the statistics that evaluation then has."""
        norms: dict[str, Any] = {f"{n}.1": self._model.get_submodule(f"{n}.1") for n in self._made}
        with torch.no_grad():
            for norm in norms.values():
                norm.weight.fill_(1)
                norm.bias.zero_()
        calibrate(
            self._model,
            self._examples,
            forward=lambda model, example: model(*example.args, **example.kwargs),
            upstream="population",
            layers=list(norms.values()),
            group=False,
            progress=False,
        )

    def _prove(self, original: nn.Module | None) -> None:
        assert original is not None
        with self._settled():
            result = same(original, self._model, self._examples, names={n: n for n in self._made})
        if not result:
            raise SurgeryError(UNPROVED.format(why=result.first and result.first.message))

    def _rewire(self, optimizer: Optimizer) -> Callable[[], None]:
        kept = set(map(id, self._model.parameters()))
        gone: list[nn.Parameter] = []
        beside: dict[nn.Parameter, nn.Parameter] = {}
        for name, change in self._made.items():
            bias = change.modules[""].attributes["_parameters"].get("bias")
            if bias is not None and id(bias) not in kept:
                gone.append(bias)
            layer, norm = self._model.get_submodule(name).children()
            beside |= dict.fromkeys(norm.parameters(), next(layer.parameters()))
        return rewire(optimizer, gone, beside, [])

    def _told(self, init: str) -> list[Done]:
        done = []
        for name, change in self._made.items():
            old = change.modules[""].attributes["_parameters"]
            had = [key for key, one in old.items() if one is not None]
            keys = {key: "1.bias" if key == "bias" else f"0.{key}" for key in had}
            reason = ", ".join(f"{name}.{key} is {name}.{now}" for key, now in keys.items())
            edit = Edit(
                (name,), VERB, self._kinds[name], f"{Inserted.__name__}({init})", reason, keys=keys
            )
            done.append(Done(edit, change, name))
        for name, why in self._left.items():
            done.append(Done(Edit((name,), VERB, self._kinds[name], None, why)))
        if not self._made:
            reasons = "; ".join(f"{name}: {why}" for name, why in self._left.items())
            logging.getLogger("batchnorm").warning("bn.insert changed nothing: %s", reasons)
        return done
