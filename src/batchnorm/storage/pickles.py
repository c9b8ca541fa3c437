"""What a pickle would do, read from its opcodes, before anything of it is carried out.

``torch.load(weights_only=True)`` runs no code. It does call constructors that take memory or time
by an argument: ``bytearray(10**11)``, or ``codecs.encode(text, "punycode")``, whose time grows with
the square of the length. The names that a state dict needs are fewer than those that it allows.
"""

import io
import pickletools
import re
import warnings
from typing import IO

from batchnorm.errors import CheckpointError
from batchnorm.storage.checkpoint import MOST_DESCRIPTION, first_line

# Opcodes of a pickle: some 28 describe a tensor, which takes 280 bytes of a file at least, so that
# a checkpoint has one for 10 bytes at most, and some for what is beside its tensors.
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
# Opcodes that make an object of a class whose name is not in the opcode itself.
HIDDEN = {"STACK_GLOBAL", "INST", "OBJ", "EXT1", "EXT2", "EXT4", "NEWOBJ_EX", "PERSID"}
SLOW = {"punycode", "idna"}

CODE = """\
{path} was not loaded: it holds more than tensors and plain values, and loading it would call \
{name}. Where you trust its origin, convert it once:
    state = torch.load("{path}", weights_only=False, map_location="cpu")
    torch.save(state_dict, "weights.pt")
where state_dict is the part of state that maps names to tensors, such as state["state_dict"] or \
state.state_dict()."""


def check(file: IO[bytes], size: int, path: str, pickles: int = 1) -> None:
    """Refuse pickles that would do more than put tensors into containers.

    Args:
        file: Where they begin, one behind the other.
        size: Bytes of the whole checkpoint, which bound how much there can be to describe.
        path: For messages.
        pickles: How many there are.

    Raises:
        CheckpointError: If one is damaged, too long, or calls something else; it names what.
    """
    data = file.read(MOST_DESCRIPTION + 1)
    stream = io.BytesIO(data)
    left = FREE + size // BYTES_PER_OPCODE
    with warnings.catch_warnings():
        # Python warns of unknown escapes in the texts of a pickle, which damage makes.
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
            f"{path} is damaged: its pickle ends early or is none ({first_line(error)}); copy or "
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
