"""Sentences that remember how they were made, so that a report can be translated as a whole."""

from typing import Any


class Said(str):  # noqa: SLOT000 (its attributes are few)
    """A text that was made from a template, as ``str.format`` does; for other code it is a ``str``.

    ``batchnorm.report.chinese`` looks up the template and puts the same values into what it finds.
    Values that are such texts themselves are translated as well, plain ones stay as they are.

    Args:
        template: The English text, with a named field for each value. Without values it is taken
            as it is, braces included.
        values: What goes into the fields.
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
