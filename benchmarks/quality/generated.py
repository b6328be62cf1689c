"""A network whose weights a second module makes; what baselines other than plans are built on."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call


class Generated(nn.Module):
    """Call a network with some of its weights replaced by what a module makes.

    Args:
        model: is copied; the parameters of these names are taken out of the copy.
        weights: called without arguments, gives name -> weight in the shape that it has in
            ``model``.
        names: of the weights that it makes.
    """

    def __init__(self, model: nn.Module, weights: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model = copy.deepcopy(model)
        self.weights = weights
        for name in names:
            path, _, leaf = name.rpartition(".")
            # An empty slot, so that the weight is no parameter; functional_call fills it.
            self.model.get_submodule(path)._parameters[leaf] = None

    def forward(self, *inputs: Any) -> Any:
        """Make the weights, then call the network."""
        made: Mapping[str, Tensor] = self.weights()
        return functional_call(self.model, dict(made), inputs)


class LowRank(nn.Module):
    """``W_i = U_i V_i`` for each weight, a matrix of rank ``r_i``.

    A weight of shape ``(o, …)`` is taken as a matrix with ``o`` rows. The factors start as those of
    the best approximation of the given weight, with its standard deviation.

    Args:
        weights: name -> the weight that a factorized one replaces.
        ranks: name -> rank.

    Source: the start is the spectral initialization of Khodak et al., Initialization and
    Regularization of Factorized Neural Layers, ICLR 2021, section 3; the rescaling is ours.
    """

    def __init__(self, weights: Mapping[str, Tensor], ranks: Mapping[str, int]) -> None:
        super().__init__()
        self.shapes = {name: weights[name].shape for name in ranks}
        self.left = nn.ParameterList()
        self.right = nn.ParameterList()
        for name, rank in ranks.items():
            weight = weights[name].detach()
            u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            root = s[:rank].sqrt()
            left, right = u[:, :rank] * root, root[:, None] * v[:rank]
            kept = (left @ right).std()
            scale = torch.sqrt(weight.std() / kept) if kept > 0 else torch.ones(())
            self.left.append(nn.Parameter(left * scale))
            self.right.append(nn.Parameter(right * scale))

    def forward(self) -> dict[str, Tensor]:
        """Multiply the factors."""
        pairs = zip(self.shapes.items(), self.left, self.right, strict=True)
        return {name: (u @ v).view(shape) for (name, shape), u, v in pairs}


class Overparameterized(nn.Module):
    """``W_i = sum_k a_ik T_ik``: each weight mixed from templates of its own; nothing is shared.

    Rows of coefficients start with norm 1, templates as normal noise with the standard deviation
    of the weight that they replace, so the sum has it too.

    Args:
        weights: name -> the weight that a sum replaces.
        num_templates: name -> how many templates, at least 2.
        random: draws templates and coefficients.
    """

    def __init__(
        self,
        weights: Mapping[str, Tensor],
        num_templates: Mapping[str, int],
        random: torch.Generator,
    ) -> None:
        super().__init__()
        self.names = tuple(num_templates)
        self.templates = nn.ParameterList()
        self.coefficients = nn.ParameterList()
        for name, count in num_templates.items():
            weight = weights[name].detach()
            # A number, since what is drawn is on the CPU and the weight may be elsewhere.
            drawn = torch.randn(count, *weight.shape, generator=random) * weight.std().item()
            row = nn.functional.normalize(torch.randn(count, generator=random), dim=0)
            self.templates.append(nn.Parameter(drawn))
            self.coefficients.append(nn.Parameter(row))

    def forward(self) -> dict[str, Tensor]:
        """Mix."""
        pairs = zip(self.names, self.coefficients, self.templates, strict=True)
        return {name: torch.tensordot(row, own, dims=1) for name, row, own in pairs}


class Rescaled(nn.Module):
    """What another module makes, each weight multiplied by a constant.

    Args:
        weights: called without arguments, gives name -> weight.
        targets: name -> a weight whose standard deviation the made one should start with.
    """

    def __init__(self, weights: nn.Module, targets: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.weights = weights
        with torch.no_grad():
            made = weights()
            self.scale = {
                name: w.std().item() / made[name].std().item() for name, w in targets.items()
            }

    def forward(self) -> dict[str, Tensor]:
        """Make and multiply."""
        return {name: weight * self.scale[name] for name, weight in self.weights().items()}
