"""The straight line on a GPU; skipped where there is none."""

import copy

import pytest
import torch
from torch.nn import functional

import npas_fx
from npas_fx.examples.wide_resnet import WideResNet

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def exact_products():
    """Products without TF32, so that the oracle's tolerances hold."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("budget", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.usefixtures("exact_products")
def test_transform_trains_saves_and_materializes_on_a_gpu(budget, tmp_path):
    model = WideResNet(depth=10, width=1).cuda()
    pictures = torch.randn(4, 3, 32, 32, device="cuda")
    shared = npas_fx.transform(model, budget, example_inputs=pictures)
    assert {tensor.device.type for tensor in shared.state_dict().values()} == {"cuda"}
    optimizer = torch.optim.SGD(npas_fx.param_groups(shared, lr=0.1, weight_decay=1e-4), lr=0.1)
    functional.cross_entropy(shared(pictures), torch.arange(4, device="cuda")).backward()
    optimizer.step()
    shared.eval()
    npas_fx.save(shared, tmp_path)
    loaded = npas_fx.load(tmp_path, copy.deepcopy(model)).eval()
    for name, tensor in shared.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    plain = npas_fx.materialize(shared)
    torch.testing.assert_close(plain(pictures), shared(pictures))


def test_generated_weights_keep_their_dtype_under_autocast():
    model = WideResNet(depth=10, width=1).cuda()
    shared = npas_fx.transform(model, 0.5)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert shared(torch.randn(2, 3, 32, 32, device="cuda")).dtype == torch.bfloat16
        for bank in shared.npas_banks.values():
            assert all(weight.dtype == torch.float32 for weight in bank())
