"""Answers of a flow about networks of torchvision, against graphs that torch.fx traces of them."""

from collections import Counter

import pytest
import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.models.following import flow
from support.lanes import lanes
from support.third_party import torchvision
from support.twins import unchanged

NETWORKS = {
    "resnet18": {"num_classes": 4},
    "densenet121": {"num_classes": 4},
    "mobilenet_v3_small": {"num_classes": 4},
    "googlenet": {"num_classes": 4, "aux_logits": False, "init_weights": False},
    "shufflenet_v2_x0_5": {"num_classes": 4},
}
FAST = {"resnet18", "mobilenet_v3_small"}
# In shufflenet, halves of one tensor go two ways; a flow counts what lies in one memory together.
HALVES = {"shufflenet_v2_x0_5"}
VIEWS = {"flatten", "view", "chunk", "transpose", "contiguous", "size", "getattr", "getitem"}


@pytest.fixture(
    scope="module", params=lanes(NETWORKS, fast=FAST, slow=NETWORKS.keys() - FAST - {"googlenet"})
)
def network(request):
    """Name, model, traced graph, and a pass in evaluation and in training."""
    torch.manual_seed(1)
    model = torchvision().models.get_model(request.param, weights=None, **NETWORKS[request.param])
    x = torch.randn(2, 3, 64, 64)
    found = []
    for training in (False, True):
        model.train(training)
        numbers = torch.get_rng_state()
        with unchanged(model):
            found.append(flow(model, x))
        assert torch.equal(numbers, torch.get_rng_state())
        assert all(p.grad is None for p in model.parameters())
    return request.param, model, fx.Tracer().trace(model.eval()), *found


def name_of(node):
    return node.target if isinstance(node.target, str) else node.target.__name__


def is_transparent(model, node):
    if node.op == "call_module":
        return isinstance(model.get_submodule(node.target), nn.Identity | nn.Dropout)
    return name_of(node) in VIEWS


def consumers(model, node):
    """Modules by name, functions as "" and the output as "output", through views."""
    found = Counter()
    for user in node.users:
        if is_transparent(model, user):
            found += consumers(model, user)
        else:
            kinds = {"call_module": user.target, "output": "output"}
            found[kinds.get(user.op, "")] += 1
    return found


def layers(graph, model):
    kinds = (_BatchNorm, nn.Conv2d)
    nodes = [node for node in graph.nodes if node.op == "call_module"]
    return [node for node in nodes if isinstance(model.get_submodule(node.target), kinds)]


def test_consumers_are_those_of_the_traced_graph(network):
    name, model, graph, found, _ = network
    nodes = layers(graph, model)
    assert [n.target for n in nodes] == [
        c.name for c in found.calls if c.name in {n.target for n in nodes}
    ]
    for node in nodes:
        (result,) = found.calls_of(node.target)[0].outputs
        seen = Counter(c.name if c.module else "" for c in found.consumers(result))
        expected = consumers(model, node)
        returned = expected.pop("output", 0)
        assert found.leaves(result) == bool(returned)
        if name in HALVES:
            assert seen >= expected, node
            continue
        assert seen == expected, node
        sole = found.sole_consumer(result)
        assert (sole is not None) == (expected.total() == 1 and not returned), node


def test_dependencies_are_the_ancestors_in_the_traced_graph(network):
    (_, _, graph, _, found), ancestors = network, {}
    for node in graph.nodes:
        above = [ancestors[one] | {one} for one in node.all_input_nodes]
        ancestors[node] = frozenset().union(*above)
    every = found.dependencies(found.normalizations)
    count = 0
    for node, above in ancestors.items():
        if node.op == "call_module" and node.target in found.normalizations:
            expected = {n.target for n in above} & found.normalizations
            assert every[node.target] == expected, node
            count += 1
    assert count == len(found.normalizations)


def test_nothing_of_a_network_is_kept_unseen_or_read(network):
    for found in network[3:]:
        assert not found.kept and not found.unseen and not found.reads
