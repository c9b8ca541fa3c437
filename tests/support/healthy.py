"""Third-party networks after a short training on photographs, with settled statistics."""

import functools

import pytest
import torch
from torch import nn

import batchnorm as bn
from support import networks
from support.faults import Case

MORE = {
    "torchvision": ("shufflenet_v2_x0_5", "mnasnet0_5", "efficientnet_b0", "resnext50_32x4d"),
    "timm": (
        "ghostnet_050", "repvgg_a0", "lcnet_050", "tf_efficientnet_lite0", "mixnet_s",
        "hardcorenas_a", "resnet26d", "densenet121",
    ),
}  # fmt: skip
NETWORKS = {name: build for name, (build, _) in networks.NETWORKS.items()}
NETWORKS |= {
    f"{library} {name}": getattr(networks, f"_{library}")(name)
    for library, names in MORE.items()
    for name in names
}


@functools.cache
def photographs():
    """Return two photographs, (3, 427, 640), with mean 0 and deviation 1."""
    images = pytest.importorskip("sklearn.datasets").load_sample_images().images
    found = torch.stack([torch.tensor(image).movedim(2, 0).float() for image in images])
    return (found - found.mean()) / found.std()


def crops(size, number, batch=8, seed=0):
    """Return batches of crops at random places."""
    generator = torch.Generator().manual_seed(seed)
    images = photographs()

    def crop():
        image = images[torch.randint(2, (), generator=generator)]
        tops = [int(torch.randint(n - size, (), generator=generator)) for n in image.shape[1:]]
        return image[:, tops[0] : tops[0] + size, tops[1] : tops[1] + size]

    return [torch.stack([crop() for _ in range(batch)]) for _ in range(number)]


def case(name, size=64):
    """Return a network after three steps, with the statistics of eight batches after them."""
    size = 32 if name == "mlp" else size
    torch.manual_seed(0)
    model = NETWORKS[name]().train()
    first, *batches = crops(size, 12)
    model(first)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for batch in batches[:3]:
        loss = nn.functional.cross_entropy(model(batch), torch.arange(len(batch)) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    momenta = {found: found.momentum for found in model.modules() if hasattr(found, "momentum")}
    bn.reset_statistics(model)
    for layer in momenta:
        layer.momentum = None
    with torch.no_grad():
        for batch in batches[3:]:
            model(batch)
    for layer, momentum in momenta.items():
        layer.momentum = momentum
        layer.num_batches_tracked.fill_(1000)
    return Case(model, crops(size, 8, seed=1), optimizer)
