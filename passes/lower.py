"""Make weights explicit: calls of modules become functions of weights that are read by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import fx, nn

from npas_fx.passes.op_rules import OP_RULES, Refusal, Rule
from npas_fx.passes.op_rules.rule import own_hooks
from npas_fx.passes.opaque import call_opaque, handed_in

_Read: TypeAlias = Callable[[nn.Parameter], fx.Node]


def lower(
    graph: fx.Graph, root: nn.Module, rules: Mapping[type[nn.Module], Rule] = OP_RULES
) -> tuple[fx.Graph, dict[str, str]]:
    """Replace the calls of modules with weights by reads of these and functions.

    Before ``y = call_module[fc](x)``; after ``w = get_attr[fc.weight]``, ``b = get_attr[fc.bias]``,
    ``y = linear(x, w, b)``. A module without a functional form is handed its weights: before
    ``y = call_module[rnn](x)``; after ``m = get_attr[rnn]``, ``w = get_attr[rnn.weight]``,
    ``y = call_opaque(m, ("weight",), (w,), (x,), {})``. A tied weight is read under the first of
    its names.

    Args:
        graph: of ``root``; it is not changed.
        root: the model; a module is lowered only if its class is exactly that of a rule and it has
            no hooks and no ``forward`` of its own.
        rules: class of module -> its rule.

    Returns:
        The new graph, and for each module that is still called, its path -> why.
    """
    graph = copy.deepcopy(graph)
    name_of = {id(parameter): name for name, parameter in root.named_parameters()}
    stays: dict[str, str] = {}
    for call in list(graph.nodes):
        if call.op != "call_module":
            continue
        module = root.get_submodule(call.target)

        def read(parameter: nn.Parameter, call: fx.Node = call) -> fx.Node:
            node = graph.get_attr(name_of[id(parameter)])
            node.meta = dict(call.meta)
            return node

        with graph.inserting_before(call):
            made = _apply_rule(graph, call, module, rules, read)
            lowered = None if isinstance(made, Refusal) else made
            if isinstance(made, Refusal):
                stays[call.target] = made.reason
                leaf = graph.get_attr(call.target)
                leaf.meta = dict(call.meta)
                lowered = hand_in(graph, module, read, leaf, call.args, call.kwargs)
                if lowered is None:
                    graph.erase_node(leaf)
        if lowered is not None:
            lowered.meta = dict(call.meta)
            call.replace_all_uses_with(lowered)
            graph.erase_node(call)
    graph.lint()
    return graph, stays


def _apply_rule(
    graph: fx.Graph,
    call: fx.Node,
    module: nn.Module,
    rules: Mapping[type[nn.Module], Rule],
    read: _Read,
) -> fx.Node | Refusal:
    rule = rules.get(type(module))
    if rule is None:
        return Refusal(_why_call(module))
    own = "forward of its own" if "forward" in vars(module) else own_hooks(module)
    if own:
        return Refusal(f"{type(module).__name__} with a {own}")

    def read_name(name: str) -> fx.Node | None:
        owner, _, attribute = name.rpartition(".")
        parameter = module.get_submodule(owner)._parameters.get(attribute)
        return None if parameter is None else read(parameter)

    return rule(graph, call, module, read_name)


def hand_in(
    graph: fx.Graph,
    module: nn.Module,
    read: Callable[[nn.Parameter], fx.Node],
    leaf: fx.Node | None,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> fx.Node | None:
    """Write an opaque call of a module; None where it has no weights that could be handed in."""
    names = handed_in(module)
    parameters = [module.get_parameter(name) for name in names]
    nodes = {id(p): read(p) for p in dict.fromkeys(parameters)}
    weights = tuple(nodes[id(parameter)] for parameter in parameters)
    call = (leaf, tuple(names), weights, tuple(args), dict(kwargs))
    return graph.call_function(call_opaque, call) if names else None


def _why_call(module: nn.Module) -> str:
    kind = type(module).__name__
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and all(tensor.dim() <= 1 for tensor in tensors):
        return f"norm ({kind})"
    return f"no op rule for {kind}"
