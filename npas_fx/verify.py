"""Verify: the emitted module against the original, run with the same generated weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from npas_fx.errors import CaptureError, VerificationError
from npas_fx.passes.emitted import EmittedModule, emission_of
from npas_fx.passes.examples import Example, read_examples
from npas_fx.passes.opaque import without_checkpoints
from npas_fx.passes.rollback import RandomState
from npas_fx.passes.skeleton import copy_with

# Of the largest entry: outputs, gradients.
TOLERANCES = {torch.float64: (1e-10, 1e-10), torch.float32: (1e-4, 1e-3)}
_COARSE = (3e-2, 1e-1)  # half precision
NOISE = 0.1  # its deviation
CONSTANT = 1e-3  # deviation below which a weight has little of its own


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What one example gave in one mode.

    Attributes:
        example: ``the example``, or which of the further ones.
        mode: ``train`` or ``eval``.
        outputs: largest difference of an output, as a share of its largest entry.
        gradients: the same for the gradients of all trainable parameters; 0 where the original has
            no backward in this mode.
        buffers: the same for the buffers after the call.
    """

    example: str
    mode: str
    outputs: float
    gradients: float
    buffers: float


def verify(
    shared: EmittedModule,
    model: nn.Module,
    example_inputs: Any,
    example_kwargs: Mapping[str, Any] | None = None,
    more_examples: Sequence[Any] = (),
    *,
    seed: int = 0,
) -> tuple[Comparison, ...]:
    """Run the rewrite oracle on each example in train and in eval mode.

    The original's own classes are run with the weights that the emitted module generates in the
    place of its parameters, with the same random numbers, and with the same noise on vectors and on
    weights that are constant. Neither module is changed, nor is any global state.

    Args:
        shared: made from ``model``.
        model: the original.
        example_inputs: a tensor, or a tuple of positional arguments.
        example_kwargs: keyword arguments.
        more_examples: further examples, of the same form.
        seed: of the random numbers.

    Raises:
        VerificationError: outputs, gradients or buffers differ by more than the tolerances.
        CaptureError: the model itself fails on an example.
    """
    examples = read_examples(example_inputs, example_kwargs, more_examples)
    return tuple(
        _compare(shared, model, example, mode, seed)
        for example in examples
        for mode in (True, False)
    )


def copy_inputs(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Copy the inputs of an example, which a model may change.

    Autograd also takes the copy of a tensor that was made in inference mode, but not the tensor.
    """
    given = (example.args, dict(example.kwargs))
    memo = {
        id(tensor): tensor.detach().clone().requires_grad_(tensor.requires_grad)
        for tensor in pytree.tree_leaves(given)
        if isinstance(tensor, Tensor)
    }
    args, kwargs = copy.deepcopy(given, memo)
    return args, kwargs


def _compare(
    shared: EmittedModule,
    model: nn.Module,
    example: Example,
    is_training: bool,
    seed: int,
) -> Comparison:
    mode = "train" if is_training else "eval"

    def run_original(noise: float, with_gradients: bool) -> tuple[Any, _Gradients, _Buffers]:
        owner = copy_with_noise(shared, noise, seed)
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        args, kwargs = copy_inputs(example)

        def call() -> Any:
            tensors = {**all_weights(owner, generate(owner)), **buffers}
            skeleton = emission_of(owner).capture.skeleton
            reference = copy_with(skeleton, lambda name, _: tensors[name]).train(is_training)
            with without_checkpoints():  # which would go through the banks more than once
                output = reference(*args, **kwargs)
            # The call may have bound a name to another tensor.
            buffers.clear()
            buffers.update(reference.named_buffers(remove_duplicate=False))
            return output

        return *run(call, owner, seed, with_gradients), buffers

    def try_original(noise: float) -> tuple[Any, _Gradients, _Buffers]:
        try:
            return run_original(noise, True)
        except Exception as err:
            with suppress(Exception):  # perhaps only its backward fails, in eval mode, say
                return run_original(noise, False)
            raise CaptureError(
                f"the model raised {type(err).__name__} on {example.name} in {mode} mode: {err}; "
                "pass an example that runs"
            ) from err

    noise = NOISE
    *expected, buffers = try_original(noise)
    if not _is_finite(expected[0]):  # some parameter must not be moved, in a logarithm, say
        noise = 0.0
        *expected, buffers = try_original(noise)
    emitted = copy_with_noise(shared, noise, seed).train(is_training)
    args, kwargs = copy_inputs(example)
    with_gradients = expected[1] is not None
    output, gradients = run(lambda: emitted(*args, **kwargs), emitted, seed, with_gradients)
    owned = dict(emitted.named_buffers(remove_duplicate=False))
    names = {name for name, _ in model.named_buffers(remove_duplicate=False)}
    updated = {name: owned[name] for name in owned.keys() & (names | buffers.keys())}
    return Comparison(
        example=example.name,
        mode=mode,
        outputs=compare(f"{example.name}: outputs in {mode} mode", output, expected[0], 0),
        gradients=compare(f"{example.name}: gradients in {mode} mode", gradients, expected[1], 1),
        buffers=compare(f"{example.name}: buffers in {mode} mode", updated, buffers, 0),
    )


def copy_with_noise(shared: EmittedModule, noise: float, seed: int) -> EmittedModule:
    """Copy a module, and add noise to vectors, and to weights that are all but constant.

    Layers that start at zero, or nearly so, hide all that stands behind them: the last norm of a
    residual branch, a scale of 1e-6, the head of an MLP-Mixer.
    """
    copied = copy.deepcopy(shared)
    generator = torch.Generator().manual_seed(seed)
    banks = f"{emission_of(shared).banks}."
    with torch.no_grad():
        for name, parameter in copied.named_parameters():
            if not noise or not parameter.is_floating_point() or name.startswith(banks):
                continue
            if parameter.dim() < 2 or parameter.float().std(correction=0) < CONSTANT:
                drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((noise * drawn).to(parameter))
    return copied


def _is_finite(output: Any) -> bool:
    tensors = (leaf for _, leaf in _leaves(output) if isinstance(leaf, Tensor))
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def generate(shared: EmittedModule) -> dict[str, Tensor]:
    """Generate the weights of all shared sites, by name, as the emitted module would."""
    emission = emission_of(shared)
    if not emission.bank_of:
        return {}
    made = {name: bank() for name, bank in shared.get_submodule(emission.banks).named_children()}
    return {site: made[bank][place] for site, (bank, place) in emission.bank_of.items()}


def all_weights(shared: EmittedModule, generated: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every parameter of the original by its first name: generated, or as the module keeps it."""
    kept = dict(shared.named_parameters(remove_duplicate=False))
    skeleton = emission_of(shared).capture.skeleton
    return {
        name: generated[name] if name in generated else kept[name]
        for name, _ in skeleton.named_parameters()
    }


_Buffers: TypeAlias = dict[str, Tensor]
_Gradients: TypeAlias = dict[str, Tensor] | None


def run(
    call: Callable[[], Any], owner: nn.Module, seed: int, with_gradients: bool
) -> tuple[Any, _Gradients]:
    """Output, and gradients of all trainable parameters of the owner where they are wanted."""
    with torch.random.fork_rng(devices=_cuda_devices()), torch.set_grad_enabled(with_gradients):
        random_state = RandomState()
        torch.manual_seed(seed)
        try:
            output = call()
        finally:
            random_state.put_back()
        if not with_gradients:
            return output, None
        total = sum(
            ((leaf.float() if leaf.dtype.itemsize < 4 else leaf) * _weight(leaf)).sum()
            for leaf in (_real(leaf) for _, leaf in _leaves(output) if isinstance(leaf, Tensor))
            if leaf.requires_grad and leaf.is_floating_point()
        )
        parameters = {name: p for name, p in owner.named_parameters() if p.requires_grad}
        gradients: tuple[Tensor | None, ...] = (None,) * len(parameters)
        if isinstance(total, Tensor) and parameters:
            gradients = torch.autograd.grad(total, list(parameters.values()), allow_unused=True)
    return output, {
        name: torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        for (name, parameter), gradient in zip(parameters.items(), gradients, strict=True)
    }


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor


def _weight(output: Tensor) -> Tensor:
    """Fixed weights for the elements of an output, so that no gradient cancels by symmetry."""
    ramp = torch.arange(output.numel(), device=output.device, dtype=torch.float32)
    return torch.cos(ramp).to(output.dtype).view(output.shape)


def _cuda_devices() -> list[int]:
    return list(range(torch.cuda.device_count())) if torch.cuda.is_available() else []


def compare(what: str, got: Any, expected: Any, kind: int) -> float:
    """Compare two structures of tensors.

    Args:
        what: they are, for the message.
        got: of the emitted module.
        expected: of the original.
        kind: 0 for outputs, 1 for gradients, which may differ more.

    Returns:
        The largest difference, as a share of the largest entry.

    Raises:
        VerificationError: they differ by more than the tolerance.
    """
    leaves, expected_leaves = dict(_leaves(got)), dict(_leaves(expected))
    if leaves.keys() != expected_leaves.keys():
        differing = sorted(leaves.keys() ^ expected_leaves.keys())
        raise VerificationError(
            f"{what} differ in structure: {differing[0]} is in one of them only"
        )
    # A gradient that is zero but for rounding is compared with the others' size.
    tensors = [b for b in expected_leaves.values() if isinstance(b, Tensor)]
    floor = 1e-3 * max(map(_largest, tensors), default=0.0) if kind else 0.0
    worst = 0.0
    for path, b in expected_leaves.items():
        a = leaves[path]
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if (a.shape, a.dtype) != (b.shape, b.dtype):
                raise VerificationError(f"{what}{path} differs in shape or dtype")
            worst = max(worst, _compare_tensors(f"{what}{path}", a, b, kind, floor))
        elif type(a) is not type(b) or (isinstance(b, _PLAIN) and a != b):
            raise VerificationError(f"{what}{path} is {a!r}, not {b!r}")
    return worst


_PLAIN = (bool, int, float, complex, str, bytes, type, torch.dtype, torch.device)


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Path -> what is there, for all tensors in a value; for a container, its type."""
    if isinstance(value, Mapping):
        inside = [(f"[{key!r}]", item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        inside = [(f"[{index}]", item) for index, item in enumerate(value)]
    elif is_dataclass(value) and not isinstance(value, type):
        inside = [(f".{each.name}", getattr(value, each.name)) for each in fields(value)]
    else:
        yield path, value
        return
    yield f"type({path})", type(value)
    for step, item in inside:
        yield from _leaves(item, path + step)


def _compare_tensors(what: str, got: Tensor, expected: Tensor, kind: int, floor: float) -> float:
    got, expected = _real(got.detach()), _real(expected.detach())
    if not expected.is_floating_point():
        if not torch.equal(got, expected):
            raise VerificationError(f"{what} differs from the original's")
        return 0.0
    tolerance = TOLERANCES.get(expected.dtype, _COARSE)[kind]
    scale = max(_largest(expected), floor, 1e-30)
    if torch.allclose(got, expected, rtol=0, atol=tolerance * scale, equal_nan=True):
        return _largest(got - expected) / scale
    raise VerificationError(
        f"{what} differs from the original's by {_largest(got - expected):.3g}, where its largest "
        f"entry is {scale:.3g}; please report the model"
    )


def _largest(tensor: Tensor) -> float:
    if not tensor.is_floating_point():
        return 0.0
    finite = tensor.detach().abs().nan_to_num(nan=0.0, posinf=0.0)
    return finite.amax().item() if finite.numel() else 0.0
