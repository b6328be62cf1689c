"""Which modules of a model are the same block again: by what they compute, not by their names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, fx, nn

from npas_fx.ir import Repeats


def find_repeats(
    graph: fx.Graph, skeleton: nn.Module, sites: Collection[str]
) -> tuple[Repeats, ...]:
    """Find the largest modules that compute the same with weights of the same shapes.

    A block is what the first call of a module adds to the graph, with one weight or more that could
    be generated; its signature is a hash of that, see ``sign``. A module that is called often is
    one block, and blocks within blocks that are repeated are not listed again.

    Args:
        graph: in which every weight is read by a ``get_attr`` node.
        skeleton: the model without its values.
        sites: names of the weights that could be generated.
    """
    nodes_of: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for call, (path, _) in node.meta.get("nn_module_stack", {}).items():
            if call == path:  # further calls are `path@1`, ...
                nodes_of[path].append(node)
    # A container of one block adds the same nodes as the block, which comes after it.
    smallest = {tuple(nodes): path for path, nodes in nodes_of.items()}
    blocks_of: dict[str, list[str]] = defaultdict(list)
    for nodes, path in smallest.items():
        if sum(node.op != "get_attr" for node in nodes) > 1 and _sites(nodes, sites):
            blocks_of[sign(nodes, skeleton)].append(path)
    found: list[Repeats] = []
    covered: set[str] = set()
    for signature, paths in sorted(blocks_of.items(), key=lambda item: -len(nodes_of[item[1][0]])):
        fresh = [path for path in paths if not covered.intersection(_parents(path))]
        if len(fresh) > 1:
            found.append(
                Repeats(
                    signature=signature,
                    paths=tuple(fresh),
                    sites=tuple(_sites(nodes_of[path], sites) for path in fresh),
                )
            )
            covered.update(fresh)
    first = {path: place for place, path in enumerate(nodes_of)}
    return tuple(sorted(found, key=lambda repeats: first[repeats.paths[0]]))


def sign(nodes: Sequence[fx.Node], root: nn.Module) -> str:
    """Hash a part of a graph: equal for parts that differ in names and numbers only.

    What counts are the operations, which results each is given in which place, its integers and
    words (strides, axes), and the shapes of all tensors that it owns. What does not are names,
    values, and numbers that are no integers, such as the probability of a dropout.

    Args:
        nodes: in the order of the graph.
        root: the model whose tensors and modules they name.
    """
    digest_of: dict[fx.Node, str] = {}
    outside: dict[fx.Node, str] = {}

    def refer(source: fx.Node) -> str:
        if source in digest_of:
            return digest_of[source]
        return outside.setdefault(source, f"outside {len(outside)}")

    for node in nodes:
        arguments = fx.node.map_arg((node.args, node.kwargs), refer)
        digest_of[node] = _digest(_describe(node, root), _shape_of(arguments))
    # The digest of a result holds those of what it was made from; that two share one shows only
    # in how often it occurs.
    return _digest(*sorted(digest_of.values()))


def _describe(node: fx.Node, root: nn.Module) -> Any:
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(root.get_submodule(owner), name, None)
        return _describe_tensor(value) if isinstance(value, Tensor) else type(value).__name__
    if node.op == "call_module":
        return [_describe_module(part) for part in root.get_submodule(str(node.target)).modules()]
    return node.op, node.target if isinstance(node.target, str) else _name(node.target)


def _describe_module(module: nn.Module) -> Any:
    tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
    return (
        _name(type(module)),
        [_describe_tensor(tensor) for _, tensor in tensors],
        [_shape_of(value) for name, value in vars(module).items() if name[0] != "_"],
    )


def _describe_tensor(tensor: Tensor) -> Any:
    return tuple(tensor.shape), str(tensor.dtype)


def _shape_of(value: Any) -> Any:
    """Keep what says which operation it is: integers and words, in their structure."""
    if isinstance(value, (tuple, list)):
        return [_shape_of(item) for item in value]
    if isinstance(value, Mapping):
        return {key: _shape_of(item) for key, item in value.items()}
    if isinstance(value, slice):
        return [_shape_of(part) for part in (value.start, value.stop, value.step)]
    if isinstance(value, (int, str, type(None), type(...))):
        return value
    return type(value).__name__


def _name(thing: Any) -> str:
    return f"{getattr(thing, '__module__', '')}.{getattr(thing, '__qualname__', repr(thing))}"


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()


def _sites(nodes: Sequence[fx.Node], sites: Collection[str]) -> tuple[str, ...]:
    reads = (str(node.target) for node in nodes if node.op == "get_attr")
    return tuple(dict.fromkeys(name for name in reads if name in sites))


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path
