"""Every parameter is accounted for once: a site, or kept with the reason."""

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from npas_fx.passes.capture import capture
from two_layers import Model, names, reasons, x


def parameter(*shape, **options):
    return nn.Parameter(torch.randn(shape, **options))


def test_every_parameter_once_with_a_reason(check):
    shared = nn.Linear(4, 4)

    def forward(self, x):
        x = self.shared(self.norm(self.alias(x))) + self.vector * self.scalar
        x = x + self.matrix.sum() + self.frozen.mean() + self.one * 1 + self.empty.sum()
        return self.run(x + F.linear(x, self.shared.weight))

    model = Model(
        forward,
        shared=shared,
        alias=shared,
        norm=nn.LayerNorm(4),
        vector=parameter(4),
        scalar=parameter(),
        matrix=parameter(2, 3),
        frozen=nn.Parameter(torch.randn(2, 2), requires_grad=False),
        one=parameter(1, 1),
        empty=parameter(0, 4),
        unused=parameter(5, 5),
        spectrum=nn.Parameter(torch.randn(2, 2, dtype=torch.complex64)),
        integers=nn.Parameter(torch.ones(2, 2, dtype=torch.int64), requires_grad=False),
    )
    inventory = capture(model).inventory
    listed = [name for item in inventory for name in (item.name, *item.aliases)]
    assert sorted(listed) == sorted(
        name for name, _ in model.named_parameters(remove_duplicate=False)
    )
    assert len(set(listed)) == len(listed)
    assert {item.name: item.reason for item in inventory.kept} == {
        "vector": "vector",
        "scalar": "vector",
        "frozen": "frozen",
        "one": "too small",
        "empty": "too small",
        "unused": "not used in forward",
        "spectrum": "dtype complex64",
        "integers": "frozen",
        "a.bias": "bias",
        "b.bias": "bias",
        "shared.bias": "bias",
        "norm.weight": "norm (LayerNorm)",
        "norm.bias": "norm (LayerNorm)",
    }
    shared_site = next(site for site in inventory.sites if site.name == "shared.weight")
    assert shared_site.aliases == ("alias.weight",)
    assert shared_site.uses == 3
    assert {site.name: site.kind for site in inventory.sites}["matrix"] == "raw"
    check(model, x())


def test_tied_weights_are_one_site_used_everywhere(check):
    def forward(self, ids):
        y = self.b(self.a(self.embedding(ids)))
        return self.head(y)

    model = Model(forward, embedding=nn.Embedding(7, 4), head=nn.Linear(4, 7, bias=False))
    model.head.weight = model.embedding.weight
    (site,) = (s for s in capture(model).inventory.sites if s.aliases)
    assert (site.name, site.aliases, site.uses) == ("embedding.weight", ("head.weight",), 2)
    emitted = check(model, torch.randint(7, (2, 5)))
    assert "head.weight" not in dict(emitted.named_parameters())


def test_a_weight_tied_to_that_of_a_call_is_one_site(check):
    hooked = nn.Linear(4, 6)
    model = Model(lambda self, x: self.run(x) + self.b(self.hooked(x)), hooked=hooked)
    hooked.weight = model.a.weight
    hooked.register_forward_hook(lambda module, args, output: output * 2)
    site = capture(model).inventory.sites[0]
    assert (site.name, site.aliases, site.uses) == ("a.weight", ("hooked.weight",), 2)
    check(model, x())


def test_parameter_lists_and_dicts(check):
    def forward(self, x):
        for weight in self.items:
            x = x @ weight
        return self.run(x @ self.named["k"] + self.single)

    model = Model(
        forward,
        items=nn.ParameterList(parameter(4, 4) for _ in range(3)),
        named=nn.ParameterDict({"k": parameter(4, 4), "unused": parameter(4, 4)}),
        single=parameter(4, 4)[:1].detach(),
    )
    assert set(names(model)) == {
        *(f"items.{k}" for k in range(3)),
        "named.k",
        "a.weight",
        "b.weight",
    }
    check(model, x())


def test_a_parameter_changed_in_place_stays(check):
    def forward(self, x):
        self.a.weight.data.clamp_(-0.1, 0.1)
        self.b.weight.data[0] = 0.5
        return self.run(x)

    model = Model(forward)
    assert reasons(model)["a.weight"] == reasons(model)["b.weight"] == "changed in place"


def test_only_the_device_of_a_parameter_is_no_use_of_it(check):
    def forward(self, x):
        return self.run(x) + torch.zeros(4, device=self.anchor.device, dtype=self.anchor.dtype)

    model = Model(forward, anchor=parameter(3, 3))
    assert reasons(model)["anchor"] == "not used in forward"
    check(model, x())


def test_frozen_modules_and_mixed_dtypes(check):
    model = Model(
        lambda self, x: self.run(x) + self.c(x.double()).float(), c=nn.Linear(4, 4).double()
    )
    model.a.requires_grad_(False)
    assert reasons(model)["a.weight"] == "frozen"
    emitted = check(model, x())
    assert not emitted.a.weight.requires_grad
