"""Make weights explicit: calls of modules with a functional form become reads and functions."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import fx, nn

from npas_fx.passes.op_rules import OP_RULES, Refusal, Rule
from npas_fx.passes.op_rules.rule import own_hooks


def lower(
    graph: fx.Graph, root: nn.Module, rules: Mapping[type[nn.Module], Rule] = OP_RULES
) -> tuple[fx.Graph, dict[str, str]]:
    """Replace the calls of modules with a functional form by reads of their weights and functions.

    Before ``y = call_module[fc](x)``; after ``w = get_attr[fc.weight]``, ``b = get_attr[fc.bias]``,
    ``y = linear(x, w, b)``. A tied weight is read under the first of its names.

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
        rule = rules.get(type(module))
        if rule is None:
            stays[call.target] = _why_call(module)
            continue
        own = "forward of its own" if "forward" in vars(module) else own_hooks(module)
        if own:
            stays[call.target] = f"{type(module).__name__} with a {own}"
            continue

        def read(name: str, call: fx.Node = call, module: nn.Module = module) -> fx.Node | None:
            parameter = module._parameters.get(name)
            if parameter is None:
                return None
            node = graph.get_attr(name_of[id(parameter)])
            node.meta = dict(call.meta)
            return node

        with graph.inserting_before(call):
            lowered = rule(graph, call, module, read)
        if isinstance(lowered, Refusal):
            stays[call.target] = lowered.reason
            continue
        lowered.meta = dict(call.meta)
        call.replace_all_uses_with(lowered)
        graph.erase_node(call)
    graph.lint()
    return graph, stays


def _why_call(module: nn.Module) -> str:
    kind = type(module).__name__
    if isinstance(module, nn.RNNBase):
        return f"recurrent ({kind})"
    tensors = [*module.parameters(), *module.buffers()]
    if tensors and all(tensor.dim() <= 1 for tensor in tensors):
        return f"norm ({kind})"
    return f"no op rule for {kind}"
