"""Texts that keep their template and values, so that a report can be translated."""

from typing import Any


class Said(str):  # noqa: SLOT000 (its attributes are few)
    """A ``str`` made by ``str.format`` from a template, which it keeps.

    ``batchnorm.report.chinese`` looks up the template and formats its translation with the same
    values. Values that are ``Said`` are translated as well; plain strings are not.

    Args:
        template: The English text, with a named field for each value. Without values it is used
            unchanged, including braces.
        values: Values of the fields.
    """

    template: str
    values: dict[str, Any]

    def __new__(cls, template: str, /, **values: Any) -> "Said":  # noqa: PYI034 (Python 3.10)
        """Make the English text."""
        found = super().__new__(cls, template.format(**values) if values else template)
        found.template, found.values = template, values
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return _made, (self.template, self.values)


def _made(template: str, values: dict[str, Any]) -> Said:
    return Said(template, **values)


say = Said


def counted(number: int, one: str, several: str) -> str:
    """Return a number with the singular or plural of a word, in English alone."""
    return f"{number:,} {one if number == 1 else several}"
