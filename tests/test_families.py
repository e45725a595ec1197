"""Families of models against their own cache-free forward, windows and chat templates included.

The models are tiny and random, with large weights (see test_rollout.py, whose slow twins are used
here). Their windows are shorter than the texts: prompts of 1 to 8 tokens and 12 behind them.
"""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F
from conftest import CHATS, speaker
from test_rollout import (
    PROMPTS,
    ROPE,
    draw,
    gradients,
    plain_logits,
    plain_logp,
    refused,
    same_gradients,
)
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import attention
import data
import rollout as R
from policy import load

MIXED = dict(layer_types=["sliding_attention", "full_attention"], sliding_window=4)
LLAMA3 = dict(rope_type="llama3", rope_theta=1e4, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=16)
LONGROPE = dict(rope_type="longrope", rope_theta=1e4, original_max_position_embeddings=20)
LONGROPE |= dict(short_factor=[1.0, 1.1, 1.3, 1.7], long_factor=[2.0, 3.0, 5.0, 9.0])
PHI3 = dict(ROPE, pad_token_id=0, original_max_position_embeddings=20)
GEMMA3 = dict(ROPE, **MIXED, head_dim=12, query_pre_attn_scalar=20)
BUILD = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**ROPE, tie_word_embeddings=True)),
    "qwen2 windows": lambda: Qwen2ForCausalLM(
        Qwen2Config(**ROPE, **MIXED, use_sliding_window=True)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**ROPE, head_dim=12)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**ROPE, rope_parameters=LLAMA3)),
    "mistral windows": lambda: MistralForCausalLM(MistralConfig(**ROPE, sliding_window=5)),
    "phi3 windows": lambda: Phi3ForCausalLM(Phi3Config(**PHI3, sliding_window=1)),
    "phi3 longrope": lambda: Phi3ForCausalLM(Phi3Config(**PHI3, rope_parameters=LONGROPE)),
    "gemma3 windows": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**GEMMA3)),
}


def build(name):
    torch.manual_seed(1)
    return BUILD[name]().eval()


@pytest.fixture(params=BUILD)
def model(request):
    return build(request.param)


WINDOWS = pytest.mark.parametrize("model", [n for n in BUILD if "windows" in n], indirect=True)

# ----------------------------------------------------------------------- numbers, family by family


def test_greedy_equals_cache_free_decoding_with_several_end_ids(model):
    """A norm, scale, position or window of this family is lost in the cache; a second end id does
    not end a text."""
    free = draw(model, temperature=0, eos_ids=[], group_size=1).tokens[:, 0].tolist()
    for prompt, new in zip(PROMPTS, free, strict=True):
        # each token is the argmax given the ones before it: the same as decoding one by one
        assert plain_logits(model, prompt + new).argmax(-1)[len(prompt) - 1 : -1].tolist() == new
    ends = [free[1][4], free[3][7]]
    out = draw(model, temperature=0, eos_ids=ends, group_size=2)
    for b, want in enumerate(free):
        stop = next((t + 1 for t, token in enumerate(want) if token in ends), 12)
        for g in range(2):
            assert out.tokens[b, g][out.mask[b, g]].tolist() == want[:stop]
            assert out.truncated[b, g] == (want[stop - 1] not in ends)


def test_sampled_logp_equals_training_and_plain(model):
    """Sampling and training disagree about the policy: the ratio is not 1 at the first step."""
    out = draw(model, group_size=2)
    trained = R.token_logp(model, out, [0, 1, 2, 3])
    torch.testing.assert_close(out.logp, trained.detach(), rtol=0, atol=1e-4)
    for b, g, logp in plain_logp(model, out):
        torch.testing.assert_close(trained[b, g, : len(logp)], logp, rtol=0, atol=1e-4)


def test_gradients_equal_one_row_per_sample(model):
    """Packing drops a gradient of this family's own parts, or a replay forgets the windows."""
    out = draw(model, PROMPTS[:2], group_size=2)
    weight = torch.randn(out.tokens.shape, generator=torch.Generator().manual_seed(0))
    rows = plain_logp(model, out)
    want = gradients(model, sum((weight[b, g, : len(x)] * x).sum() for b, g, x in rows))
    same_gradients(gradients(model, (weight * R.token_logp(model, out, [0, 1])).sum()), want, 1e-4)
    attention.recompute(model)
    model.train()
    same_gradients(gradients(model, (weight * R.token_logp(model, out, [0, 1])).sum()), want, 1e-4)


@WINDOWS
def test_the_windows_of_these_models_matter(model):
    """Windows so long that they never act would let the tests above pass without them."""
    ids = PROMPTS[1]
    near, kept = plain_logits(model, ids), model.config.sliding_window
    model.config.sliding_window = 64  # the plain forward's mask comes from here
    assert not torch.allclose(near[-1], plain_logits(model, ids)[-1], atol=1e-2)
    torch.testing.assert_close(near[:kept], plain_logits(model, ids)[:kept])


@WINDOWS
def test_bfloat16_runs_with_windows(model):
    """A float32 mask of a window meets bfloat16 keys."""
    out = draw(model.to(torch.bfloat16), PROMPTS[:2], group_size=2)
    trained = R.token_logp(model, out, [0, 1])
    trained.sum().backward()
    assert trained.isfinite().all() and (trained - out.logp)[out.mask].abs().mean() < 0.3


@pytest.mark.parametrize("window", [None, 1, 3, 7, 8])
@pytest.mark.parametrize("T", [1, 4, 7])
def test_bias_against_a_loop(T, window):
    """The window is one token too long or short, or counted from the wrong end."""
    got = attention.Layout().bias(T, 7, window, torch.ones(1))
    for t in range(T):
        newest = 7 - T + t
        seen = [j for j in range(7) if newest - (window or 99) < j <= newest]
        assert (got[t] == 0).nonzero().flatten().tolist() == seen


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("dtype, near", [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_products_in_place_of_the_kernel(dtype, near, window):
    """Prevents: bf16 on a CPU trains on another function, or on another gradient, than float32."""
    torch.manual_seed(0)
    shapes = (1, 6, 5, 8), (1, 2, 12, 8), (1, 2, 12, 8)  # 5 tokens behind 7, three heads a key head
    qkv = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    q, k, v = (x.detach().double().requires_grad_() for x in qkv)
    layout, pull = attention.Layout(), torch.randn(1, 6, 5, 8)
    out = attention.product_attention(qkv[0] * 0.4, *qkv[1:], layout.bias(5, 12, window, qkv[0]))
    bias = layout.bias(5, 12, window, q)
    true = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=0.4, enable_gqa=True)
    (out * pull).sum().backward()
    (true * pull).sum().backward()
    pairs = [(out, true), *((a.grad, b.grad) for a, b in zip(qkv, (q, k, v), strict=True))]
    assert all((a - b).norm() < near * b.norm() for a, b in pairs)


# ------------------------------------------------------------------- what is refused, and says why


def test_windows_that_a_model_keeps_to_itself_are_refused():
    """Qwen2-MoE masks by its window but does not hand it over: sampled without, silently."""
    moe = dict(ROPE, moe_intermediate_size=16, shared_expert_intermediate_size=16, num_experts=2)
    moe |= dict(num_experts_per_tok=1, use_sliding_window=True, sliding_window=4)
    refused(Qwen2MoeForCausalLM(Qwen2MoeConfig(**moe, **{"layer_types": MIXED["layer_types"]})),
            "window over in 0 of 1 layers")  # fmt: skip


def test_rotary_angles_that_depend_on_the_length_are_refused_beyond_it():
    """Phi-3's longrope turns a whole batch by other angles once one text is long."""
    refused(build("phi3 longrope"), "texts of 21 tokens", max_new_tokens=13)
    nested = {kind: dict(LONGROPE) for kind in MIXED["layer_types"]}
    config = Gemma3TextConfig(**GEMMA3, rope_parameters=nested)
    assert attention.rope_limit(config) == 20
    assert attention.rope_limit(Qwen2Config(**ROPE)) == float("inf")


def test_attention_to_later_tokens_is_refused():
    """Embedding models of the Gemma 3 family read both ways: no text can be sampled from them."""
    both_ways = Gemma3TextConfig(**GEMMA3, use_bidirectional_attention=True)
    torch.manual_seed(1)
    refused(Gemma3ForCausalLM(both_ways), "more than causal softmax")


# ------------------------------------------------------------- conversations: the turn is left open

TURNS = (
    "{% for m in messages %}<s:{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s:assistant>{% endif %}"
)
MERGED = (  # like Gemma 3 and some Mistrals: what the system says opens the user's turn
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}<turn>{{ m.role }}\n"
    "{{ messages[0].content + '\n' if loop.first else '' }}{{ m.content | trim }}<end>\n"
    "{% endfor %}{% if add_generation_prompt %}<turn>model\n{% endif %}"
)
ALTERNATE = (  # like the first Mistrals
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ "
    "raise_exception('Roles must alternate user/assistant/...') }}{% endif %}"
    "[INST] {{ m.content }} [/INST]{% endfor %}"
)
NO_SYSTEM = (  # like Gemma 2
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}" + TURNS
)


@pytest.fixture
def instruct(tiny, tmp_path):
    """instruct(template, **generation) -> the tiny model with another template and end ids."""

    def make(template: str | None, **generation):
        folder = shutil.copytree(tiny, tmp_path / "model")
        (folder / "chat_template.jinja").unlink()
        if template:
            (folder / "chat_template.jinja").write_text(template)
        file = folder / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | generation))
        return str(folder)

    return make


@pytest.mark.parametrize(
    ("template", "opening"), [(TURNS, "<s:assistant>"), (MERGED, "<turn>model\n")]
)
def test_the_assistants_turn_is_left_open(instruct, template, opening):
    """The turn is closed behind `<think>`, the original's fault, or the system's words get lost."""
    policy, row = load(instruct(template), "cpu"), data.load()[0]
    shown = policy.tokenizer.decode(data.prompt(row, policy.tokenizer))
    assert shown.endswith(opening + data.OPENING)
    assert data.SYSTEM in shown and shown.count(data.TASK) == 1


@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        (None, "no chat template; take an instruct model"),
        (ALTERNATE, "chat template refuses the prompt: Roles must alternate"),
        (NO_SYSTEM, "chat template refuses the prompt: System role not supported"),
    ],
)
def test_templates_that_cannot_hold_the_conversation_are_refused(instruct, template, sentence):
    """A base model, or a template without a system turn, ends in a traceback from jinja."""
    with pytest.raises(ValueError, match=sentence) as error:
        load(instruct(template), "cpu")
    assert "\n" not in str(error.value)


def test_every_end_id_of_the_model_ends_an_answer(instruct):
    """Llama 3 and Gemma 3 end a turn with another token than a text: answers never end."""
    policy = load(instruct(TURNS, eos_token_id=[7, 9]), "cpu")
    own = policy.tokenizer.eos_token_id
    assert policy.eos_ids == [own, 7, 9] and policy.pad_id not in (7, 9)
    ids = policy.tokenizer.encode("go on", add_special_tokens=False)
    texts = policy.texts(R.written([[1]], [[[*ids, end] for end in (own, 7, 9)]], 0, "cpu"))
    assert texts == ["go on"] * 3


@pytest.mark.parametrize("family", CHATS)
def test_the_token_that_ends_a_turn_ends_an_answer(tiny, tmp_path, capsys, family):
    """A turn's end that neither tokenizer nor model names: every answer runs on to the limit."""
    folder, tokenizer = shutil.copytree(tiny, tmp_path / "model"), speaker(family)
    tokenizer.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 3}))
    policy = load(str(folder), "cpu")
    _, text, turn = CHATS[family]
    ends = policy.tokenizer.convert_tokens_to_ids([text, turn])
    assert policy.eos_ids == list(dict.fromkeys([ends[0], 3, ends[1]]))
    assert "turn" not in capsys.readouterr().err


def test_a_turn_without_a_token_at_its_end_is_said(instruct, capsys):
    """Answers run on to the limit, form -1, and nothing says why."""
    policy = load(instruct(TURNS), "cpu")
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert (
        "ends no assistant's turn with one special token; answers end with <|im_end|>" in sentence
    )
    assert policy.eos_ids == [policy.tokenizer.eos_token_id]
