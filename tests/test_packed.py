"""Packed weights: the same products as the plain ones, with adapters beside them, and no trace."""

import pytest
import torch
from torch import nn

import lora
import packed
from policy import load

NEEDS = pytest.mark.skipif(
    not packed.available(nn.Linear(1, 1)), reason="this torch has no oneDNN operators"
)


def layer(adapter: lora.Adapter | None, dtype: torch.dtype, bias: bool) -> nn.Module:
    """A linear layer [5 -> 6] in a model, with adapters that do something."""
    g = torch.Generator().manual_seed(3)
    base = nn.Linear(5, 6, bias=bias)
    for p in base.parameters():
        p.data.normal_(generator=g)
    base.to(dtype)
    if adapter is None:
        return nn.Sequential(base)
    adapted = lora.Adapted(base, adapter)
    for p in (adapted.lora_A, adapted.lora_B):
        p.data.normal_(generator=g)
    if adapter.dora:
        adapted.lora_magnitude_vector.data.mul_(1.5)
    return nn.Sequential(adapted)


@NEEDS
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("adapter", [None, lora.Adapter(2), lora.Adapter(2, dora=True)])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_packed_products_are_the_plain_ones(adapter, dtype, near, bias):
    """Prevents: a lost bias, an adapter that decoding forgets, a DoRA that scales the bias."""
    model = layer(adapter, dtype, bias)
    for rows in (1, 7, 40):
        x = torch.randn(2, rows, 5, generator=torch.Generator().manual_seed(rows)).to(dtype)
        with torch.no_grad():
            plain = model(x)
            with packed.packed(model, dtype):
                assert "forward" in vars(model[0])
                fast = model(x)
        assert fast.dtype == plain.dtype and fast.shape == plain.shape
        assert (fast - plain).abs().max() <= near * plain.abs().max()
        assert "forward" not in vars(model[0])


@NEEDS
@pytest.mark.parametrize("dora", [False, True])
def test_layers_of_one_input_keep_apart(dora):
    """Prevents: q's adapter or bias in k's rows, a product of an earlier input handed out, and one
    that is kept: of a prefill it is half a gigabyte a layer.

    q has an adapter and no bias, k a bias and no adapter, v both: each as it is alone, for one
    input, for two in turn, and where k is asked with another input than q.
    """
    model = nn.Module()
    model.q_proj = layer(lora.Adapter(2, dora=dora), torch.float32, bias=False)[0]
    model.k_proj = layer(None, torch.float32, bias=True)[0]
    model.v_proj = layer(lora.Adapter(3), torch.float32, bias=True)[0]
    parts = [model.q_proj, model.k_proj, model.v_proj]
    a, b = torch.randn(2, 3, 4, 5, generator=torch.Generator().manual_seed(5)).unbind()
    with torch.no_grad():
        inputs = [(a, a, a), (b, b, b), (a, b, a)]
        plain = [part(x) for xs in inputs for part, x in zip(parts, xs, strict=True)]
        with packed.packed(model, torch.float32):
            fast = [part(x) for xs in inputs for part, x in zip(parts, xs, strict=True)]
            assert all(part.forward.func.y is None for part in parts)
    for one, other in zip(fast, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@NEEDS
def test_an_error_inside_leaves_the_plain_layers(tmp_path):
    """Prevents: a run that trains on packed copies, which no step changes, after a Ctrl-C."""
    model = layer(lora.Adapter(2), torch.float32, True)
    with pytest.raises(KeyboardInterrupt), packed.packed(model, torch.float32):
        raise KeyboardInterrupt
    assert "forward" not in vars(model[0])


@NEEDS
@pytest.mark.parametrize("dora", [False, True])
def test_greedy_answers_are_those_of_the_plain_sampler(dora):
    """Prevents: a fast path that answers otherwise, with adapters and without."""
    policy = load("", "cpu")
    prompts = [[5, 6, 7, 8, 9], [10, 11, 12]]
    how = dict(group_size=2, max_new_tokens=12, temperature=0.0)
    assert torch.equal(
        policy.sample(prompts, **how).tokens, policy.sample(prompts, plain=True, **how).tokens
    )
    policy.adapt(lora.Adapter(2, dora=dora), torch.Generator().manual_seed(0))
    for one in lora.layers(policy.model).values():
        one.lora_B.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
    fast, plain = (policy.sample(prompts, plain=plain, **how) for plain in (False, True))
    assert torch.equal(fast.tokens, plain.tokens)
    assert torch.allclose(fast.logp, plain.logp, atol=1e-4)
