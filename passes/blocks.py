"""Which parts of a model are the same block again: by what they compute, not by their names."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeAlias

from torch import Tensor, fx, nn

from npas_fx.ir import Repeats
from npas_fx.passes.tandem_repeats import find_tandem_repeats

Block: TypeAlias = tuple[str, tuple[fx.Node, ...]]  # path, nodes
Group: TypeAlias = tuple[str, list[Block]]  # signature, blocks that have it


def find_repeats(
    graph: fx.Graph, skeleton: nn.Module, sites: Collection[str]
) -> tuple[Repeats, ...]:
    """Find the largest parts of a graph that compute the same with weights of the same shapes.

    Candidates are what the first call of each module adds to the graph; and where no such parts
    are repeated, stretches of two weights or more that come several times in a row. Whether two are
    the same is said by ``sign``. Parts within parts that are repeated are not listed again.

    Args:
        graph: in which every weight is read by a ``get_attr`` node.
        skeleton: the model without its values.
        sites: names of the weights that could be generated.
    """
    groups = _repeated_modules(graph, skeleton, sites)
    covered = {node for _, blocks in groups for _, nodes in blocks for node in nodes}
    groups += _repeated_stretches(graph, skeleton, sites, covered)
    place = {node: k for k, node in enumerate(graph.nodes)}
    return tuple(
        Repeats(
            signature=signature,
            paths=tuple(path for path, _ in blocks),
            sites=tuple(_sites(nodes, sites) for _, nodes in blocks),
        )
        for signature, blocks in sorted(groups, key=lambda group: place[group[1][0][1][0]])
    )


def _repeated_modules(graph: fx.Graph, skeleton: nn.Module, sites: Collection[str]) -> list[Group]:
    nodes_of: dict[str, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        for call, (path, _) in node.meta.get("nn_module_stack", {}).items():
            if call == path:  # further calls are `path@1`, ...
                nodes_of[path].append(node)
    # A container of one block adds the same nodes as the block, which comes after it.
    smallest = {tuple(nodes): path for path, nodes in nodes_of.items()}
    groups = _group_same(((path, nodes) for nodes, path in smallest.items()), skeleton, sites)
    found = []
    listed: set[str] = set()
    for signature, blocks in sorted(groups, key=lambda group: -len(group[1][0][1])):
        fresh = [block for block in blocks if listed.isdisjoint(_parents(block[0]))]
        if len(fresh) > 1:
            found.append((signature, fresh))
            listed.update(path for path, _ in fresh)
    return found


def _repeated_stretches(
    graph: fx.Graph, skeleton: nn.Module, sites: Collection[str], covered: Collection[fx.Node]
) -> list[Group]:
    operations = [node for node in graph.nodes if node.op[:4] == "call"]
    labels = [
        # What is covered equals nothing, so that no stretch reaches over it.
        node if node in covered else sign(_with_reads([node]), skeleton)
        for node in operations
    ]
    found = []
    for tandem in find_tandem_repeats(labels):
        starts = range(tandem.start, tandem.stop - tandem.count * tandem.period + 1)
        copies = [
            [
                operations[start + k * tandem.period : start + (k + 1) * tandem.period]
                for k in range(tandem.count)
            ]
            for start in starts
        ]
        best = min(copies, key=lambda copy: _count_crossings(copy[len(copy) // 2]))
        blocks = [_with_reads(nodes) for nodes in best]
        weights = [_sites(nodes, sites) for nodes in blocks]
        is_own = sum(map(len, weights)) == len(set().union(*weights))  # else it is called again
        if (
            is_own
            and len(weights[0]) > 1  # one layer after the other is a stretch, but no block
            and all(_feeds(one, other) for one, other in pairwise(best))
        ):
            named = zip(map(_name_by, weights), map(tuple, blocks), strict=True)
            found += [group for group in _group_same(named, skeleton, sites) if len(group[1]) > 1]
    return found


def _group_same(
    blocks: Iterable[Block], skeleton: nn.Module, sites: Collection[str]
) -> list[Group]:
    groups: dict[str, list[Block]] = defaultdict(list)
    for path, nodes in blocks:
        if sum(node.op != "get_attr" for node in nodes) > 1 and _sites(nodes, sites):
            groups[sign(nodes, skeleton)].append((path, nodes))
    return list(groups.items())


def _with_reads(operations: Sequence[fx.Node]) -> list[fx.Node]:
    """Operations, each after the reads of what the model owns that it is given."""
    return list(
        dict.fromkeys(node for operation in operations for node in (*_reads(operation), operation))
    )


def _reads(node: fx.Node) -> list[fx.Node]:
    return [source for source in node.all_input_nodes if source.op == "get_attr"]


def _count_crossings(operations: Sequence[fx.Node]) -> int:
    """Count the values that go into and out of a stretch: at its best a block has one of each."""
    inside = set(operations)
    given = {source for node in operations for source in node.all_input_nodes} - inside
    left = [node for node in operations if not inside.issuperset(node.users)]
    return len([source for source in given if source.op != "get_attr"]) + len(left)


def _feeds(one: Sequence[fx.Node], other: Collection[fx.Node]) -> bool:
    return any(user in other for node in one for user in node.users)


def _name_by(names: Sequence[str]) -> str:
    """Name a stretch by the modules of its first and last weight."""
    owners = [name.rpartition(".")[0] or name for name in names]
    return " … ".join(dict.fromkeys(owners[:1] + owners[-1:]))


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
        if isinstance(value, nn.Module):  # that an opaque call calls
            return [_describe_module(part) for part in value.modules()]
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
