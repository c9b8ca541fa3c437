"""The same values in other memory orders and with channels on other axes."""

import torch

# Layouts that ``of_rows`` gives to rows (n, C); n is a multiple of 8.
LAYOUTS = ["(N,C)", "(N,C,L)", "NCHW", "channels-last", "axis=-1", "axis=0", "strided"]


def arrange(t, layout):
    """Return a tensor of the same shape in the memory order of a named layout."""
    if layout == "channels_last":
        return t.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last_3d":
        return t.contiguous(memory_format=torch.channels_last_3d)
    if layout == "strided":
        return torch.stack([t, t + 1], -1)[..., 0]
    if layout == "swapped":
        return t.transpose(0, 2).contiguous().transpose(0, 2)
    if layout == "swapped_channels":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "offset":
        return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return t


def of_rows(rows, layout):
    """Return rows (n, C) as a tensor of a layout, and its channel axis."""
    n, channels = rows.shape
    if layout == "(N,C)":
        return rows.contiguous(), 1
    if layout == "(N,C,L)":
        return rows.reshape(n // 8, 8, channels).transpose(1, 2).contiguous(), 1
    if layout == "axis=0":
        return rows.reshape(4, n // 4, channels).permute(2, 0, 1).contiguous(), 0
    if layout == "axis=-1":
        return rows.reshape(4, n // 4, channels).contiguous(), 2
    image = rows.reshape(n // 8, 2, 4, channels).permute(0, 3, 1, 2)
    if layout == "NCHW":
        return image.contiguous(), 1
    if layout == "strided":
        return torch.stack([image, -image], -1)[..., 0], 1
    return image.contiguous(memory_format=torch.channels_last), 1
