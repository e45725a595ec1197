"""rollout.py against slow, obvious twins: one row per sample, no cache, no packing.

The models are tiny, random and built from a config, with large weights so that a wrong key, mask or
position moves the numbers by far more than the tolerances.
"""

import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

sys.path.insert(0, str(Path(__file__).parent.parent))
import rollout as R  # noqa: E402
from attention import recompute  # noqa: E402

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
)
PROMPTS = [[5, 9, 2], [7, 1, 1, 8, 30, 4, 22, 3], [11], [6, 6, 31, 2, 15]]
SIZE = dict(vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
ROPE = dict(SIZE, intermediate_size=48, num_key_value_heads=2, max_position_embeddings=64)
ROPE["initializer_range"] = 0.3
BUILD = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**ROPE)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**dict(ROPE, num_key_value_heads=4))),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(n_positions=64, initializer_range=0.3, bos_token_id=0, eos_token_id=0, **SIZE)
    ),
}


def build(name="qwen2", device="cpu"):
    torch.manual_seed(1)
    return BUILD[name]().eval().to(device)


@pytest.fixture(params=BUILD)
def model(request):
    return build(request.param)


def draw(model, prompts=PROMPTS, seed=0, **change):
    how = dict(group_size=4, max_new_tokens=12, eos_ids=[3, 17, 21], pad_id=0) | change
    return R.sample(model, prompts, generator=torch.Generator().manual_seed(seed), **how)


def plain_logits(model, ids):
    """Cache-free, unpacked, unpadded: the model's own forward over one row."""
    return model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits[0]


def plain_greedy(model, prompt, steps, eos=()):
    ids = list(prompt)
    for _ in range(steps):
        ids.append(int(plain_logits(model, ids)[-1].argmax()))
        if ids[-1] in eos:
            break
    return ids[len(prompt) :]


def plain_logp(model, rollout, temperature=1.0):
    """Twin of token_logp: one row per sample, log_softmax over all logits; yields b, g, [n]."""
    for b, prompt in enumerate(rollout.prompts):
        for g in range(rollout.tokens.shape[1]):
            new = rollout.tokens[b, g, : rollout.length[b, g]].tolist()
            logp = (plain_logits(model, prompt + new) / temperature).log_softmax(-1)
            yield b, g, logp[len(prompt) - 1 : -1].gather(-1, logp.new_tensor([new]).long().T)[:, 0]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def same_gradients(a, b, tolerance=1e-5):
    for name in a:
        torch.testing.assert_close(
            a[name], b[name], rtol=tolerance, atol=tolerance * b[name].norm()
        )


# ----------------------------------------------------------------------------------------- sampling


def test_greedy_equals_cache_free_decoding(model):
    """A cache, position or mask fault changes what is sampled while every shape stays right."""
    out = draw(model, temperature=0, eos_ids=[3], group_size=2)
    for b, prompt in enumerate(PROMPTS):
        want = plain_greedy(model, prompt, 12, eos=[3])
        for g in range(2):
            assert out.tokens[b, g][out.mask[b, g]].tolist() == want


def test_greedy_is_the_same_alone_and_in_any_batch(model):
    """Padding of longer neighbours, or the order of rows, leaks into a sample."""
    together = draw(model, temperature=0, eos_ids=[])
    swapped = draw(model, PROMPTS[::-1], temperature=0, eos_ids=[])
    for b, prompt in enumerate(PROMPTS):
        alone = draw(model, [prompt], temperature=0, eos_ids=[], group_size=1)
        assert torch.equal(alone.tokens[0, 0], together.tokens[b, 3])
        assert torch.equal(alone.tokens[0, 0], swapped.tokens[-1 - b, 0])


def test_long_completions_outgrow_the_first_buffer():
    """Doubling the key buffer loses or misplaces the tokens that were in it."""
    torch.manual_seed(1)
    model = Qwen2ForCausalLM(Qwen2Config(**dict(ROPE, max_position_embeddings=128))).eval()
    out = draw(model, PROMPTS[:1], temperature=0, eos_ids=[], group_size=1, max_new_tokens=80)
    ids = PROMPTS[0] + out.tokens[0, 0].tolist()
    want = plain_logits(model, ids).argmax(-1)[len(PROMPTS[0]) - 1 : -1]
    assert torch.equal(out.tokens[0, 0], want)  # each token is the argmax given the ones before it


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_logp_equals_training_and_plain(model, temperature):
    """Sampling and training disagree about the policy: the ratio is not 1 at the first step."""
    out = draw(model, temperature=temperature)
    trained = R.token_logp(model, out, [0, 1, 2, 3], temperature=temperature)
    torch.testing.assert_close(out.logp, trained.detach(), rtol=0, atol=1e-4)
    for b, g, logp in plain_logp(model, out, temperature):
        torch.testing.assert_close(trained[b, g, : len(logp)], logp, rtol=0, atol=1e-4)
    assert (trained[~out.mask] == 0).all() and (out.logp[~out.mask] == 0).all()


def test_draws_follow_the_distribution():
    """The cumulative sum is off by one, or the temperature is applied twice or not at all."""
    n, logits = 40_000, torch.tensor([2.0, -torch.inf, 0.0, 1.0, -1.0, -torch.inf])
    uniform = torch.rand(n, 1, generator=torch.Generator().manual_seed(0))
    for temperature in (0.5, 1.0, 2.0):
        token, logp = R.draw(logits.expand(n, 1, 6), uniform, temperature, 1.0)
        want = (logits / temperature).softmax(-1)
        count = token.flatten().bincount(minlength=6)
        ok = want > 0
        chi2 = ((count - n * want)[ok] ** 2 / (n * want[ok])).sum()
        assert chi2 < 16.3 and count[~ok].sum() == 0  # 3 degrees of freedom, p = 0.001
        torch.testing.assert_close(logp, want.log()[token])


def test_extreme_uniforms_hit_possible_tokens():
    """u = 0 picks a leading token of probability 0, or u near 1 runs past the end."""
    logits = torch.tensor([-torch.inf, 0.0, -200.0, 1.0, -torch.inf]).expand(2, 1, 5)
    token, _ = R.draw(logits, torch.tensor([[0.0], [1 - 2**-24]]), 1.0, 1.0)
    assert token.flatten().tolist() == [1, 3]
    assert R.draw(logits, torch.tensor([[0.0], [1.0]]), 1.0, 1.0)[0][1].item() == 3


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9, 0.999])
def test_nucleus_against_a_loop(top_p):
    """The token that crosses top_p is dropped, or the likeliest one is when it alone exceeds it."""
    prob = (3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0))).softmax(-1)
    kept = R.nucleus(prob, top_p)
    for row, got in zip(prob.tolist(), kept, strict=True):
        want, mass = set(), 0.0
        for token in sorted(range(30), key=lambda i: -row[i]):
            if mass < top_p:
                want.add(token)
                mass += row[token]
        assert set(got.nonzero().flatten().tolist()) == want
    assert torch.equal(kept[kept > 0], prob[kept > 0])


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.7, 0.95, 0.999])
@pytest.mark.parametrize("spread", [0.0, 1.0, 5.0, 20.0])
def test_nucleus_is_that_of_a_whole_sort(spread, top_p):
    """Prevents: a token of a large vocabulary that is left out of the ranking, or ties, which all
    tokens are at spread 0, broken otherwise."""
    logits = spread * torch.randn(3, 4, 5000, generator=torch.Generator().manual_seed(0))
    prob = logits.softmax(-1)
    ranked, order = prob.sort(dim=-1, descending=True, stable=True)
    before = ranked.cumsum(-1) - ranked
    whole = torch.zeros_like(prob).scatter(-1, order, ranked.where(before < top_p, 0.0))
    assert torch.equal(R.nucleus(prob, top_p), whole)


def test_top_p_only_cuts_the_draw():
    """Evaluation with top_p leaves the nucleus, or reports renormalised log-probabilities."""
    model = build()
    out = draw(model, top_p=0.3, eos_ids=[])
    for b, g, logp in plain_logp(model, out):
        torch.testing.assert_close(out.logp[b, g], logp, rtol=0, atol=1e-4)
    ids = PROMPTS[0] + out.tokens[0, 0].tolist()
    prob = plain_logits(model, ids).softmax(-1)[len(PROMPTS[0]) - 1 : -1]
    assert (R.nucleus(prob, 0.3).gather(-1, out.tokens[0, 0][:, None]) > 0).all()


def test_end_tokens_are_kept_and_masked_true_even_if_pad_is_one():
    """pad == eos masked by id: stopping is never trained (TRL#6357)."""
    out = draw(build(), pad_id=17)  # 17 is an end id as well
    ended = 0
    for tokens, mask, n, cut in zip(
        *(x.flatten(0, 1) for x in (out.tokens, out.mask)),
        out.length.flatten(),
        out.truncated.flatten(),
        strict=True,
    ):
        assert mask.tolist() == [t < n for t in range(len(mask))]
        inside = torch.isin(tokens[:n], torch.tensor([3, 17, 21]))
        assert not inside[:-1].any() and (tokens[n:] == 17).all()
        assert bool(inside[-1]) != bool(cut) and (not cut or n == 12)
        ended += not cut
    assert 0 < ended < 16 and out.tokens.shape[2] == out.length.max()  # both kinds were seen


def test_an_end_token_in_the_last_place_is_no_truncation():
    """A sample that ends exactly at max_new_tokens is punished as overlong."""
    model = build()
    first = plain_greedy(model, PROMPTS[0], 1)[0]
    out = draw(model, PROMPTS[:1], temperature=0, eos_ids=[first], max_new_tokens=1)
    assert not out.truncated.any() and out.length.tolist() == [[1] * 4]


def test_finished_rows_stop_costing_compute():
    """Finished rows are decoded until the longest ends (what padded generate does)."""
    model, rows = build(), []
    model.model.layers[0].register_forward_hook(lambda m, args, out: rows.append(out.shape[:2]))
    R.check_model(model, 20)
    rows.clear()
    out = draw(model, eos_ids=[3, 17, 21, 5, 9], max_new_tokens=40)
    tokens = [b * g for b, g in rows[1:]]  # decode steps; [0] is the prefill
    assert rows[0] == (4, 8) and len(tokens) == out.length.max() - 1
    assert tokens == sorted(tokens, reverse=True) and tokens[-1] < 16
    for step, (b, g) in enumerate(rows[1:], start=1):
        running = out.length > step  # [B, G] still to draw a token after this step
        need = int(running.any(1).sum()) * int(running.sum(1).max())
        assert need <= b * g <= need / 0.8  # trimmed unless that saves less than an eighth


def test_the_same_seed_gives_the_same_rollout():
    """A resumed or repeated run differs because another source of randomness slipped in."""
    a, b, c = (draw(build(), seed=seed) for seed in (7, 7, 8))
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.logp, b.logp)
    assert a.tokens.shape != c.tokens.shape or not torch.equal(a.tokens, c.tokens)


# ------------------------------------------------------------------------------------------ scoring


def test_gradients_equal_one_row_per_sample(model):
    """Packing drops or doubles a gradient (a prompt's must gather those of all its samples)."""
    out = draw(model)
    weight = torch.randn(out.tokens.shape, generator=torch.Generator().manual_seed(0))
    packed = gradients(model, (weight * R.token_logp(model, out, [0, 1, 2, 3])).sum())
    rows = plain_logp(model, out)
    same_gradients(
        packed, gradients(model, sum((weight[b, g, : len(x)] * x).sum() for b, g, x in rows))
    )


def test_any_subset_of_groups_gives_the_same():
    """Micro-batches of other sizes, or in another order, change the log-probabilities."""
    model, out = build(), draw(build())
    full = R.token_logp(model, out, [0, 1, 2, 3])
    for groups in ([2], [3, 1], [0, 2, 1]):
        part = R.token_logp(model, out, groups)
        torch.testing.assert_close(part, full[groups], rtol=0, atol=1e-5)


def test_siblings_are_invisible():
    """A sample sees its siblings in the packed row: its log-probability is not its own."""
    model, out = build(), draw(build(), eos_ids=[])
    before = R.token_logp(model, out, [1])
    out.tokens[1, 2] = (out.tokens[1, 2] + 1) % 40
    after = R.token_logp(model, out, [1])
    others = [0, 1, 3]
    torch.testing.assert_close(after[0, others], before[0, others], rtol=0, atol=0)
    assert not torch.allclose(after[0, 2], before[0, 2], atol=1e-2)


def test_activations_are_made_again_in_train_mode(model):
    """The replay in backward uses the model's own attention: gradients are silently wrong."""
    out = draw(model)
    want = gradients(model, R.token_logp(model, out, [0, 1, 2]).sum())
    recompute(model)
    for p in model.modules():  # dropout of GPT-2 off, so that both are the same function
        p.p = 0.0 if isinstance(p, torch.nn.Dropout) else getattr(p, "p", None)
    model.train()
    same_gradients(gradients(model, R.token_logp(model, out, [0, 1, 2]).sum()), want, 1e-6)
    again = draw(model)
    assert torch.equal(again.tokens, out.tokens) and model.training


def test_checkpointing_of_transformers_is_refused_in_training_alone():
    """Its replay in backward uses the model's own attention: gradients are silently wrong. In
    sampling it made garbage elsewhere, in train()."""
    model, out = build(), draw(build())
    model.gradient_checkpointing_enable()
    model.train()
    with pytest.raises(ValueError, match="attention.recompute"):
        R.token_logp(model, out, [0])
    assert torch.equal(draw(model).tokens, out.tokens)


def test_the_head_in_parts_gives_the_same_numbers(monkeypatch):
    """Splitting the logits loses a row, or its gradient."""
    model, out = build(), draw(build())
    logp = R.token_logp(model, out, [0, 1])
    want = gradients(model, logp.sum())
    monkeypatch.setattr(R, "LOGITS", 5 * 40)  # five rows at a time
    parts = R.token_logp(model, out, [0, 1])
    torch.testing.assert_close(parts, logp)
    same_gradients(gradients(model, parts.sum()), want)


def test_rollout_tensors_can_be_used_in_autograd():
    """Inference tensors leak out of sampling and fail in the loss."""
    model, out = build(), draw(build())
    ratio = (R.token_logp(model, out, [0, 1, 2, 3]) - out.logp).exp()
    ratio[out.mask].sum().backward()
    assert model.lm_head.weight.grad.abs().sum() > 0


# ---------------------------------------------------------------------- the model is left as it was


def test_mode_and_attention_come_back(model):
    """Sampling leaves the model in eval() or on our attention; a frozen part is set to train."""
    model.train()
    frozen = model.get_decoder().get_input_embeddings().eval()
    own = model.config._attn_implementation
    out = draw(model)
    R.token_logp(model, out, [0]).sum().backward()
    assert model.training and not frozen.training and model.config._attn_implementation == own


def test_mode_and_attention_come_back_after_an_exception():
    """An interrupted rollout leaves a model whose next plain forward is wrong."""
    model = build().train()
    layer, own = model.model.layers[1], model.config._attn_implementation
    out = draw(model)

    def fail(*_):
        raise KeyboardInterrupt

    hook = layer.register_forward_hook(fail)
    for call in (lambda: draw(model), lambda: R.token_logp(model, out, [0])):
        with pytest.raises(KeyboardInterrupt):
            call()
        assert model.training and model.config._attn_implementation == own
    hook.remove()


def test_the_prompts_are_not_changed():
    """Padding in place grows the caller's prompts."""
    prompts = [list(p) for p in PROMPTS]
    draw(build(), prompts)
    assert prompts == PROMPTS


# ----------------------------------------------------------------------------------------- refusals


def refused(model, words, **change):
    with pytest.raises(ValueError, match=words) as error:
        draw(model, **change)
    assert str(error.value).endswith(".") and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(prompts=[]), "at least one prompt"),
        (dict(prompts=[[1], []]), "at least one token"),
        (dict(group_size=0), "group_size"),
        (dict(max_new_tokens=0), "max_new_tokens"),
        (dict(max_new_tokens=57), "64 positions"),
        (dict(top_p=0.0), "top_p"),
        (dict(top_p=1.1), "top_p"),
        (dict(temperature=-0.1), "temperature"),
        (dict(temperature=float("nan")), "temperature"),
    ],
)
def test_wrong_requests_are_refused_in_one_sentence(change, words):
    """A bad value fails deep inside with a shape error, or samples something silently."""
    refused(build(), words, **change)


def test_models_that_are_not_supported_are_refused():
    """ALiBi, encoders, soft-caps run under our attention and are silently wrong."""
    bloom = BloomForCausalLM(BloomConfig(vocab_size=40, hidden_size=32, n_layer=2, n_head=4))
    t5 = T5Config(vocab_size=40, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    refused(bloom, "ALiBi")
    refused(T5ForConditionalGeneration(t5), "encoder-decoder")
    refused(Gemma2ForCausalLM(Gemma2Config(**ROPE, head_dim=8)), "soft-capped")


def test_a_window_longer_than_the_text_is_fine():
    """Mistral is refused although its window never acts."""
    torch.manual_seed(1)
    model = MistralForCausalLM(MistralConfig(**dict(ROPE, sliding_window=32))).eval()
    out = draw(model, temperature=0, eos_ids=[], group_size=1)
    assert out.tokens[0, 0].tolist() == plain_greedy(model, PROMPTS[0], 12)


def test_a_model_that_does_something_else_is_refused_by_its_numbers():
    """A layer that mixes neighbouring tokens (a convolution, a state) passes every named check."""
    model = build()
    mix = lambda module, args, out: out + out.roll(1, dims=1)  # noqa: E731
    model.model.layers[0].mlp.register_forward_hook(mix)
    refused(model, "more than causal softmax")


def test_a_layer_that_skips_our_attention_is_refused():
    """Hybrid models: a layer without softmax attention keeps a state we would not carry."""
    model = build()
    model.config.num_hidden_layers = 3  # it promises three layers and runs two
    refused(model, "2 of its 3 layers")


# ------------------------------------------------------------------------------- dtypes and devices


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_bfloat16_runs(device):
    """A float32 mask or buffer meets bfloat16 keys."""
    torch.manual_seed(1)
    model = build(device=device).to(torch.bfloat16)
    out = draw(model)
    trained = R.token_logp(model, out, [0, 1, 2, 3])
    trained.sum().backward()
    assert trained.dtype == out.logp.dtype == torch.float32 and trained.isfinite().all()
    assert (trained - out.logp)[out.mask].abs().mean() < 0.3


@pytest.mark.parametrize("device", [CUDA])
def test_cuda_gives_the_cpu_tokens(device):
    """The GPU path (looks every 16 steps, repeated key heads) samples something else."""
    want, out = (
        draw(build(device=d), temperature=0, max_new_tokens=40, eos_ids=[3])
        for d in ("cpu", device)
    )
    assert torch.equal(out.tokens.cpu(), want.tokens)
    torch.testing.assert_close(out.logp.cpu(), want.logp, rtol=0, atol=1e-3)
    trained = R.token_logp(build(device=device), out, [0, 1, 2, 3])
    torch.testing.assert_close(trained.detach(), out.logp, rtol=0, atol=1e-4)


@pytest.mark.parametrize("every", [4, 16])
def test_looking_less_often_changes_nothing(monkeypatch, every):
    """Rows that finished between two looks are written to after their end (the GPU's way)."""
    want = draw(build())
    monkeypatch.setattr(R, "sync_every", lambda device: every)
    out = draw(build())
    for a, b in zip(vars(out).values(), vars(want).values(), strict=True):
        assert a == b if isinstance(a, list) else torch.equal(a, b) or torch.allclose(a, b)


def test_packs_keep_order_and_budget():
    """A group lost or trained on twice; or one larger than the budget that never comes."""
    lengths = [[3, 4], [1, 1], [20, 9], [2, 2], [5, 5]]  # with prompts: 8, 11, 30, 9, 11 tokens
    prompts = [[1], [1] * 9, [1], [1] * 5, [1]]
    rollout = R.written(prompts, [[[7] * n for n in g] for g in lengths], pad_id=0, device="cpu")
    assert R.packs(rollout, 20) == [[0, 1], [2], [3, 4]]  # 19, 30 alone, 20
    assert R.packs(rollout, 19) == [[0, 1], [2], [3], [4]]
    assert R.packs(rollout, 1000) == [[0, 1, 2, 3, 4]]
