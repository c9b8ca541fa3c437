"""Checks a pickle by reading its opcodes, before it is loaded.

``torch.load(weights_only=True)`` runs no code. But it calls constructors whose arguments determine
memory or time: ``bytearray(10**11)``, or ``codecs.encode(text, "punycode")``, whose time grows with
the square of the length. This check allows only the names that a state dict needs.
"""

import io
import pickletools
import re
import warnings
from typing import IO

from batchnorm.errors import CheckpointError
from batchnorm.storage.checkpoint import MOST_DESCRIPTION, first_line

# Maximum number of opcodes: about 28 describe a tensor, which takes at least 280 bytes of a file,
# so a checkpoint has at most one opcode per 10 bytes, plus some for the rest.
FREE, BYTES_PER_OPCODE = 400_000, 8

_REBUILD = (
    "_rebuild_(tensor|tensor_v2|tensor_v3|parameter|parameter_with_state|qtensor|sparse_tensor)"
)
ALLOWED = re.compile(
    r"collections (OrderedDict|Counter)"
    rf"|torch\._utils {_REBUILD}"
    r"|torch\._tensor _rebuild_from_type_v2"
    r"|torch(\.storage|\.cuda)? \w+Storage"
    r"|torch (Size|Tensor|device|per_\w+|bool|long|short|half|double)"
    r"|torch (b?float|complex|u?int|bits)\w+"
    r"|torch\.nn\.parameter Parameter"
    r"|torch\.serialization _get_layout"
    r"|_codecs encode"
    r"|(builtins|__builtin__) (set|complex)"
)
# Opcodes that create an object of a class whose name is not in the opcode itself.
HIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "PERSID"}
SLOW = {"punycode", "idna"}

CODE = """\
{path} was not loaded: it has more than tensors and plain values, and loading it would call \
{name}. If you trust its origin, convert it once:
    state = torch.load("{path}", weights_only=False, map_location="cpu")
    torch.save(state_dict, "weights.pt")
where state_dict is the part of state that maps names to tensors, such as state["state_dict"] or \
state.state_dict()."""


def check(file: IO[bytes], size: int, path: str, pickles: int = 1) -> None:
    """Raise if pickles would do more than put tensors into containers.

    Args:
        file: The file, positioned at the first of the consecutive pickles.
        size: Bytes of the whole checkpoint, which limit the number of opcodes.
        path: The path, for messages.
        pickles: Number of pickles.

    Raises:
        CheckpointError: If a pickle is damaged, too long, or calls anything else; the message has
            the name.
    """
    data = file.read(MOST_DESCRIPTION + 1)
    stream = io.BytesIO(data)
    left = FREE + size // BYTES_PER_OPCODE
    with warnings.catch_warnings():
        # Python warns about unknown escapes in the texts of a damaged pickle.
        warnings.simplefilter("ignore", DeprecationWarning)
        for _ in range(pickles):
            left -= _check_one(stream, left, path, len(data) > MOST_DESCRIPTION)


def _check_one(stream: io.BytesIO, most: int, path: str, cut: bool) -> int:
    count, encodes, slow = 0, False, False
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            count += 1
            if count > most:
                raise _too_long(path)
            name = opcode.name
            if name == "GLOBAL":
                encodes |= argument == "_codecs encode"
                if not ALLOWED.fullmatch(str(argument)):
                    raise CheckpointError(
                        CODE.format(path=path, name=".".join(str(argument).split(" ", 1))[:200])
                    )
            elif name in HIDDEN:
                raise CheckpointError(CODE.format(path=path, name=f"what its opcode {name} names"))
            elif isinstance(argument, str) and len(argument) < 20:
                slow |= "".join(filter(str.isalnum, argument.lower())) in SLOW
    except (ValueError, EOFError, IndexError, OverflowError, MemoryError) as error:
        if isinstance(error, CheckpointError):
            raise
        if cut:
            raise _too_long(path) from error
        raise CheckpointError(
            f"{path} is damaged: its pickle is truncated or invalid ({first_line(error)}); copy or "
            "write the checkpoint again"
        ) from error
    if encodes and slow:
        raise CheckpointError(CODE.format(path=path, name="codecs.encode with a codec for domains"))
    return count


def _too_long(path: str) -> CheckpointError:
    return CheckpointError(
        f"{path} was not loaded: it describes far more objects than its tensors need; save the "
        "state dict alone, torch.save(model.state_dict(), ...)"
    )
