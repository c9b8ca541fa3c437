"""Matches the layers of the other library's state with the layers of the torch model."""

import re
from collections.abc import Mapping, Sequence

from batchnorm.errors import SurgeryError
from batchnorm.porting.parts import Part
from batchnorm.porting.places import Place, values

Pairs = list[tuple[Part, Place]]

NO_PART = "names= speaks of {name!r}, and the {source} state has no such layer; it has {known}"
NO_PLACE = "names= speaks of {name!r}, and the model has no such layer; it has {known}"
UNFIT = "bn.port cannot copy {part} to {place}: {why}. Nothing was changed"
AMBIGUOUS = """\
bn.port cannot match {parts} of the {source} state with {places} of the model: they have the same \
shapes. Pass the names: names={{{example}}}. Nothing was changed"""
NOWHERE = """\
bn.port found no layer of the model for {part} of the {source} state{why}. Nothing was changed"""
NOTHING = """\
bn.port found no layer of the {source} state for {place} of the model{why}. Nothing was changed"""


def match(
    parts: Sequence[Part], places: Sequence[Place], source: str, names: Mapping[str, str]
) -> Pairs:
    """Return pairs of layers.

    Layers are matched by ``names``; by equal names; by order, if all kinds and shapes agree one by
    one; by shapes that occur once; and among equal shapes by numbers in names (``Conv_0``,
    ``Conv_1``).

    Raises:
        SurgeryError: If a layer has no match, or several; the message has both sides.
    """
    pairs = _said(parts, places, source, names)
    pairs += _alike(_without(parts, pairs), _without_places(places, pairs))
    parts, places = _without(parts, pairs), _without_places(places, pairs)
    if _has_order(parts, source) and len(parts) == len(places):
        one_by_one = list(zip(parts, places, strict=True))
        if all(_fits(*pair) for pair in one_by_one):
            return pairs + one_by_one
    return pairs + _by_shape(parts, places, source)


def _said(
    parts: Sequence[Part], places: Sequence[Place], source: str, names: Mapping[str, str]
) -> Pairs:
    by_name, by_place = {p.name: p for p in parts}, {p.name: p for p in places}
    pairs = []
    for name, target in names.items():
        if name not in by_name:
            raise SurgeryError(NO_PART.format(name=name, source=source, known=", ".join(by_name)))
        if target not in by_place:
            raise SurgeryError(NO_PLACE.format(name=target, known=", ".join(by_place)))
        part, place = by_name[name], by_place.pop(target)
        if why := _why_not(part, place):
            raise SurgeryError(UNFIT.format(part=part, place=place, why=why))
        pairs.append((part, place))
    return pairs


def _alike(parts: Sequence[Part], places: Sequence[Place]) -> Pairs:
    """Pair layers with equal names: ``layers_0/conv`` is ``layers.0.conv``."""
    named: dict[str, list[Place]] = {}
    for place in places:
        named.setdefault(_plain(place.name), []).append(place)
    pairs = []
    for part in parts:
        same = named.pop(_plain(part.name), [])
        if len(same) == 1 and _fits(part, same[0]):
            pairs.append((part, same[0]))
    return pairs


def _by_shape(parts: Sequence[Part], places: Sequence[Place], source: str) -> Pairs:
    fitting = {p.name: [place for place in places if _fits(p, place)] for p in parts}
    for part in parts:
        if not fitting[part.name]:
            why = _nearest(part, places)
            raise SurgeryError(NOWHERE.format(part=part, source=source, why=why))
    pairs: Pairs = []
    for part in parts:
        equal = [p for p in parts if fitting[p.name] == fitting[part.name]]
        if part is not equal[0]:
            continue
        some = fitting[part.name]
        if len(equal) > len(some):
            told = ", ".join(repr(place.name) for place in some)
            raise SurgeryError(
                NOWHERE.format(part=equal[-1], source=source, why=f" beside those for {told}")
            )
        ordered = _numbered(equal)
        if len(equal) < len(some) or ordered is None:
            raise _ambiguous(equal, some, source)
        pairs += zip(ordered, some, strict=True)
    taken = [place.name for _, place in pairs]
    for place in places:
        if place.name not in taken:
            raise SurgeryError(NOTHING.format(source=source, place=place, why=""))
        if taken.count(place.name) > 1:
            raise _ambiguous([p for p, one in pairs if one is place], [place], source)
    return pairs


def _ambiguous(parts: Sequence[Part], places: Sequence[Place], source: str) -> SurgeryError:
    example = f"{parts[0].name!r}: {places[0].name!r}, ..."
    return SurgeryError(
        AMBIGUOUS.format(
            parts=", ".join(map(str, parts)),
            places=", ".join(map(str, places)),
            source=source,
            example=example,
        )
    )


def _numbered(parts: Sequence[Part]) -> list[Part] | None:
    """Sort layers whose names differ only in numbers; None if they differ otherwise."""
    if len(parts) == 1:
        return list(parts)
    words = {tuple(_pieces(part.name)[::2]) for part in parts}
    numbers = [tuple(map(int, _pieces(part.name)[1::2])) for part in parts]
    if len(words) > 1:
        # Keras omits the number of the first layer: conv2d, conv2d_1.
        bare = [re.sub(r"_\d+$", "", part.name) for part in parts]
        if len(set(bare)) > 1:
            return None
        numbers = [
            (int(part.name[len(stem) + 1 :] or 0),) for part, stem in zip(parts, bare, strict=True)
        ]
    order = sorted(range(len(parts)), key=lambda index: numbers[index])
    return [parts[index] for index in order]


def _pieces(name: str) -> list[str]:
    return re.split(r"(\d+)", name)


def _has_order(parts: Sequence[Part], source: str) -> bool:
    """Return whether layers are in order of creation; JAX sorts the keys of mappings."""
    names = [part.name.split("/") for part in parts]
    return source == "keras" or (names != sorted(names) and names != sorted(names, key=_by_number))


def _by_number(path: list[str]) -> list[tuple[int, str]]:
    """Sort numbers, the keys of lists, by value."""
    return [(int(key), "") if key.isdigit() else (-1, key) for key in path]


def _plain(name: str) -> str:
    return re.sub(r"[/_.]", ".", name).lower()


def _fits(part: Part, place: Place) -> bool:
    return not _why_not(part, place)


def _why_not(part: Part, place: Place) -> str:
    try:
        values(part, place)
    except SurgeryError as error:
        return str(error)
    return ""


def _nearest(part: Part, places: Sequence[Place]) -> str:
    """Return why the most similar layer of the same kind does not fit."""
    reasons = [(place, _why_not(part, place)) for place in places if place.kind == part.kind]
    if not reasons:
        return f"; it has no {part.kind} that is left"
    place, why = min(reasons, key=lambda reason: "shape" in reason[1])
    return f"; {place} does not fit: {why}"


def _without(parts: Sequence[Part], pairs: Pairs) -> list[Part]:
    gone = {part.name for part, _ in pairs}
    return [part for part in parts if part.name not in gone]


def _without_places(places: Sequence[Place], pairs: Pairs) -> list[Place]:
    gone = {place.name for _, place in pairs}
    return [place for place in places if place.name not in gone]
