"""Python and torch are patched for one trace at a time, in one thread, and as before after it."""

import threading

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

import npas_fx
from npas_fx.passes.capture import capture
from two_layers import net, x


def test_random_numbers_are_fresh_at_each_call():
    model = net(lambda self, x: torch.rand(4) + 0 * self.run(x))
    emitted = npas_fx.transform(model, 1.0, example_inputs=x(), solver="greedy")
    value = x()
    assert not torch.equal(emitted(value), emitted(value))


def test_a_second_capture_in_another_thread_is_refused():
    inside, done = threading.Event(), threading.Event()

    def forward(self, x):
        inside.set()
        done.wait(10)
        return self.run(x)

    model = net(lambda self, x: self.run(x))
    thread = threading.Thread(target=capture, args=(net(forward),))
    thread.start()
    assert inside.wait(10)
    assert model(torch.zeros(3, 4)).shape == (3, 4)  # torch goes on working in this thread
    with pytest.raises(npas_fx.CaptureError, match="another capture is running in this process"):
        capture(model)
    done.set()
    thread.join()
    capture(net(lambda self, x: self.run(x)))  # the lock is free again


def test_a_capture_inside_a_capture_is_refused(refuses):
    other = nn.Linear(2, 2)

    def forward(self, x):
        capture(other)
        return self.run(x)

    refuses(net(forward), x(), match="another capture is running")


def test_patches_are_undone_after_a_capture(check):
    # `check` compares what is patched before and after.
    check(net(lambda self, x: F.dropout(self.run(x), training=self.training)), x())
