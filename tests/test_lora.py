"""LoRA and DoRA by hand, by the built matrices and by PEFT. Docstrings name the faults."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import lora
from lora import Adapted, Adapter

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
IDS = torch.arange(14).view(2, 7) * 11 % 40
BOTH = pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])


def qwen(dtype=torch.float32):
    """Tied head, biases on q, k and v."""
    torch.manual_seed(1)
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True)).to(dtype).eval()


def llama():
    """A head of its own, no bias."""
    torch.manual_seed(2)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False)).eval()


def moved(model, adapter, seed=3):
    """The model with adapters as training might leave them: nothing is zero, m is not n."""
    generator = torch.Generator().manual_seed(seed)
    for p in lora.attach(model, adapter, generator):
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS, use_cache=False).logits


def layer(W, A, B, b=None, m=None, **how):
    """One adapted layer of given matrices."""
    base = nn.Linear(len(W[0]), len(W), bias=b is not None)
    base.weight = nn.Parameter(torch.tensor(W), requires_grad=False)
    if b is not None:
        base.bias = nn.Parameter(torch.tensor(b), requires_grad=False)
    made = Adapted(base, Adapter(rank=len(A), dora=m is not None, **how))
    made.lora_A.data, made.lora_B.data = torch.tensor(A), torch.tensor(B)
    if m is not None:
        made.lora_magnitude_vector.data = torch.tensor(m)
    return made


def close(x, *expected):
    torch.testing.assert_close(x.detach().flatten(), torch.tensor(expected, dtype=x.dtype))


# ---- one layer -----------------------------------------------------------------------------------


def test_lora_by_hand():
    """alpha / r forgotten or squared, A and B swapped, or the bias scaled too."""
    # s = 4 / 1 = 4; W x = [1 2 ; 0 1] (3, 1) = (5, 1); A x = (1, -1) . (3, 1) = 2
    made = layer([[1.0, 2.0], [0.0, 1.0]], [[1.0, -1.0]], [[0.5], [2.0]], b=[10.0, 20.0], alpha=4)
    y = made(torch.tensor([[3.0, 1.0]]))
    close(y, 5 + 4 * 0.5 * 2 + 10, 1 + 4 * 2 * 2 + 20)  # (19, 37)
    y.sum().backward()
    close(made.lora_B.grad, 8, 8)  # s g A x = 4 * 1 * 2 for both rows
    close(made.lora_A.grad, 30, 10)  # s (B^T g) x^T = 4 * (0.5 + 2) * (3, 1)


def test_dora_by_hand():
    """n left in the graph, a norm by column in place of rows, m/n on the bias, or W x unscaled."""
    # s = 2 / 1 = 2; s B A = 2 (1, 1)^T (1, 0) = [2 0; 2 0]; W + s B A = [3 4; 2 0]; n = (5, 2)
    made = layer(
        [[1.0, 4.0], [0.0, 0.0]], [[1.0, 0.0]], [[1.0], [1.0]], [7.0, 9.0], [10.0, 1.0], alpha=2
    )
    y = made(torch.tensor([[2.0, 1.0]]))
    # (W + s B A) x = (3*2 + 4*1, 2*2) = (10, 4); m/n = (10/5, 1/2) = (2, 0.5)
    close(y, 2 * 10 + 7, 0.5 * 4 + 9)  # (27, 11)
    y.sum().backward()
    close(made.lora_magnitude_vector.grad, 10 / 5, 4 / 2)  # (W + s B A) x / n
    close(made.lora_B.grad, 2 * 2 * 2, 0.5 * 2 * 2)  # m/n s A x, A x = 2: nothing from n
    close(made.lora_A.grad, 10, 5)  # s (B^T m/n) x^T = 2 * (2 + 0.5) * (2, 1)
    close(made.norm(), 5, 2)


@pytest.mark.parametrize("seed", range(5))
def test_norm_is_that_of_the_built_matrix(seed):
    """A binomial without its 2, s once where s^2 belongs, or the product transposed."""
    g = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(n, generator=g) for n in ((30, 50), (4, 50), (30, 4)))
    made = layer(W.tolist(), A.tolist(), B.tolist(), m=[1.0] * 30, alpha=3)
    built = (W.double() + 3 / 4 * B.double() @ A.double()).norm(dim=1)
    torch.testing.assert_close(made.norm().double(), built, rtol=2e-6, atol=0)


def test_norm_of_a_bf16_base_is_float32():
    """n in bf16, also under autocast: m/n would be rounded to steps of 0.4 %."""
    base = nn.Linear(50, 30, dtype=torch.bfloat16)
    made = Adapted(base, Adapter(rank=4, dora=True))
    nn.init.normal_(made.lora_A)
    nn.init.normal_(made.lora_B)
    W = base.weight.detach().double() + 8 * made.lora_B.double() @ made.lora_A.double()
    with torch.autocast("cpu", torch.bfloat16):
        norm = made.norm()
    torch.testing.assert_close(norm.double(), W.norm(dim=1).detach(), rtol=2e-6, atol=0)


def test_a_small_change_of_m_shows_in_bf16():
    """m/n rounded to bf16 before it meets y: a magnitude that grew by 0.3 % would do nothing."""
    base = nn.Linear(8, 500, bias=False, dtype=torch.bfloat16)
    made = Adapted(base, Adapter(dora=True))
    x = torch.randn(40, 8, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    made.lora_magnitude_vector.data *= 1.003
    growth = made(x).double().norm() / base(x).double().norm()  # roundings average out
    assert 1.0025 < growth < 1.0035


def test_a_row_of_zeros_stays_finite():
    """0 / 0: a pruned row has n = 0 and would make every output NaN."""
    made = layer([[0.0, 0.0]], [[1.0, 1.0]], [[0.0]], m=[0.0])
    y = made(torch.ones(1, 2))
    y.sum().backward()
    close(y, 0)
    assert all(p.grad.isfinite().all() for p in (made.lora_A, made.lora_B))


def test_rslora_scales_by_the_root():
    """alpha / r for a file that was trained with alpha / sqrt(r): half as strong here."""
    assert Adapter(rank=4, alpha=6, rslora=True).scale == 3  # 6 / sqrt 4
    assert Adapter(rank=4, alpha=6).scale == 1.5  # 6 / 4


# ---- a whole model -------------------------------------------------------------------------------


@BOTH
def test_only_the_adapters_train(dora):
    """A base weight that still gets gradients: memory for all, and a reference that moves."""
    model = qwen().train()
    before = {name: p.clone() for name, p in model.named_parameters()}
    trained = lora.attach(model, Adapter(dora=dora))
    assert {id(p) for p in trained} == {id(p) for p in model.parameters() if p.requires_grad}
    assert len(trained) == 2 * 7 * (3 if dora else 2)  # layers, linear layers in each, tensors
    optimizer = torch.optim.SGD(trained, lr=1.0)
    for _ in range(2):  # B is zero, so A has no gradient in the first step
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    assert all(p.grad.abs().sum() > 0 and p.dtype == torch.float32 for p in trained)
    after = dict(model.named_parameters())
    assert all(
        after[name] is not None and torch.equal(after[name], before[name]) for name in before
    )
    assert all(after[name].grad is None for name in before)


@BOTH
def test_fresh_adapters_change_nothing(dora):
    """A B that starts random, or an m that starts elsewhere than n: a jump before step one."""
    model = qwen()
    base = logits(model)
    lora.attach(model, Adapter(dora=dora))
    torch.testing.assert_close(logits(model), base, rtol=0, atol=1e-6)


def test_A_is_drawn_as_in_peft():
    """Another spread of A (a learning rate from elsewhere no longer fits), or an unseeded draw."""
    generator = torch.Generator().manual_seed(7)
    first, again = qwen(), qwen()
    lora.attach(first, Adapter(rank=256), generator)
    lora.attach(again, Adapter(rank=256), torch.Generator().manual_seed(7))
    A = first.model.layers[0].mlp.down_proj.lora_A  # [256, 24]
    # kaiming_uniform_(a=sqrt 5): bound sqrt(6 / ((1 + 5) in)) = 1 / sqrt(in), std bound / sqrt 3
    assert 0.99 / math.sqrt(24) < A.abs().max() <= 1 / math.sqrt(24)
    assert A.std().item() == pytest.approx(1 / math.sqrt(72), rel=0.03)
    assert torch.equal(A, again.model.layers[0].mlp.down_proj.lora_A)
    assert not torch.equal(A, first.model.layers[1].mlp.down_proj.lora_A)


def test_targets():
    """A head that is adapted unasked, half a name that counts as a name, or a target unheard."""
    model = llama()
    lora.attach(model, Adapter())
    assert not isinstance(model.lm_head, Adapted) and len(lora.layers(model)) == 14
    model = llama()
    lora.attach(model, Adapter(targets=("layers.1.self_attn.q_proj", "lm_head")))
    assert set(lora.layers(model)) == {"model.layers.1.self_attn.q_proj", "lm_head"}
    for target, model in (("proj", llama()), ("lm_head", qwen())):  # qwen's is tied
        with pytest.raises(ValueError, match=f"'{target}', choose from down_proj, gate_proj"):
            lora.attach(model, Adapter(targets=("q_proj", target)))


@BOTH
def test_disabled_is_the_base_bit_for_bit(dora):
    """A reference that is off by a rounding, or adapters left off when the block fails."""
    model = qwen()
    base = logits(model)
    moved(model, Adapter(dora=dora))
    on = logits(model)
    with lora.disabled(model):
        assert torch.equal(logits(model), base)
    with pytest.raises(KeyboardInterrupt), lora.disabled(model):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), on) and (on - base).abs().max() > 0.01


@BOTH
@pytest.mark.parametrize("make", [qwen, llama])
def test_merged_equals_attached(make, dora):
    """Sampling from another policy than the one that trains: all ratios off from the start."""
    model = moved(make(), Adapter(rank=3, dora=dora))
    on = logits(model)
    with lora.merged(model):
        torch.testing.assert_close(logits(model), on, rtol=0, atol=1e-6)
    assert torch.equal(logits(model), on)


@BOTH
def test_originals_survive_fifty_merges(dora):
    """Unmerging by subtraction: in bf16 the base drifts by half a percent in 200 rounds."""
    model = moved(qwen(torch.bfloat16), Adapter(dora=dora))
    base = {k: x.clone() for k, x in model.state_dict().items() if "lora" not in k}
    for _ in range(50):
        with lora.merged(model):
            inside = model.state_dict()
            assert all(inside[k].dtype == torch.bfloat16 for k in base)
            assert sum(not torch.equal(inside[k], x) for k, x in base.items()) == 14
        for layer in lora.layers(model).values():  # training goes on in between
            layer.lora_A.data += 0.01
    after = model.state_dict()
    assert all(torch.equal(after[k], x) for k, x in base.items())


def test_originals_come_back_after_a_failure(monkeypatch):
    """A merge that dies half-way (out of memory) or a failing block: W + s B A would stay."""
    model = moved(qwen(), Adapter(dora=True))
    on = logits(model)
    with pytest.raises(KeyboardInterrupt), lora.merged(model):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), on)
    whole, done = Adapted.merge, []

    def dying(self):
        done.append(self)
        if len(done) == 5:
            raise torch.OutOfMemoryError
        return whole(self)

    monkeypatch.setattr(Adapted, "merge", dying)
    with pytest.raises(torch.OutOfMemoryError), lora.merged(model):
        pass
    assert torch.equal(logits(model), on)


@BOTH
def test_swapped_is_the_frozen_copy_bit_for_bit(dora):
    """A reference that moves with the training, adapters left swapped when the block fails, or a
    backward that takes the reference's numbers for its own."""
    model = moved(qwen(), Adapter(dora=dora))
    began, copy = logits(model), lora.frozen(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.data *= 1.5
    on = logits(model)
    plain = torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, trained)
    loss = model(input_ids=IDS, labels=IDS).loss
    with lora.swapped(model, copy):
        assert torch.equal(logits(model), began)
    for a, b in zip(plain, torch.autograd.grad(loss, trained), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(KeyboardInterrupt), lora.swapped(model, copy):
        raise KeyboardInterrupt
    assert torch.equal(logits(model), on) and (on - began).abs().max() > 0.01


def test_contexts_refuse_to_nest():
    """`disabled` inside `merged`: the reference would be the merged weights, silently."""
    model = moved(qwen(), Adapter())
    for outer, inner in ((lora.merged, lora.disabled), (lora.disabled, lora.merged)):
        with outer(model), pytest.raises(ValueError, match="leave one first"), inner(model):
            pass
    with lora.merged(model), pytest.raises(ValueError, match="leave one first"):
        with lora.swapped(model, lora.frozen(model)):
            pass
    bare = qwen()
    with lora.merged(bare):  # sampling code need not know whether there are adapters
        pass
    with pytest.raises(ValueError, match="no adapters"), lora.disabled(bare):
        pass
    with pytest.raises(ValueError, match="adapters already"):
        lora.attach(model, Adapter())


@BOTH
def test_gradient_checkpointing_gives_the_same_gradient(dora):
    """Frozen embeddings end the graph at the first checkpoint: adapters would get no gradient."""
    model = moved(qwen(), Adapter(dora=dora)).train()
    trained = [p for p in model.parameters() if p.requires_grad]

    def gradient():
        torch.manual_seed(8)
        return torch.autograd.grad(model(input_ids=IDS, labels=IDS).loss, trained)

    plain = gradient()
    model.gradient_checkpointing_enable()
    for a, b in zip(plain, gradient(), strict=True):
        torch.testing.assert_close(a, b)


@BOTH
def test_bf16_base(dora):
    """Dtypes that do not meet: a float32 x from a bf16 layer, or gradients rounded to bf16."""
    model = moved(qwen(torch.bfloat16), Adapter(dora=dora))
    exact = moved(qwen(torch.bfloat16), Adapter(dora=dora)).float()
    assert logits(model).dtype == torch.bfloat16
    trained = [p for p in model.parameters() if p.requires_grad]
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert {p.grad.dtype for p in trained} == {torch.float32}
    torch.testing.assert_close(logits(model).float(), logits(exact), rtol=0, atol=0.02)


@BOTH
def test_autocast(dora):
    """Mixed dtypes under autocast with a float32 base: an error, or a float32 product."""
    model = moved(qwen(), Adapter(dora=dora)).train()
    on = logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(input_ids=IDS, labels=IDS)
    rough.loss.backward()
    torch.testing.assert_close(rough.logits.float(), on, rtol=0, atol=0.02)
    for layer in lora.layers(model).values():
        with torch.autocast("cpu", torch.bfloat16):
            inside = layer.merge()
        assert torch.equal(inside, layer.merge())  # in float32 wherever sampling is called


# ---- files ---------------------------------------------------------------------------------------


def files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).glob("adapter_*")}


@BOTH
def test_save_and_load(tmp_path, dora):
    """An adapter that comes back with other numbers, another order for the optimizer, or rank."""
    model = moved(qwen(), Adapter(rank=3, alpha=5, dora=dora, rslora=True))
    lora.save(model, tmp_path / "a")
    again = qwen()
    state = torch.get_rng_state()
    trained = lora.load(again, tmp_path / "a")
    assert torch.equal(torch.get_rng_state(), state)  # an exact resume draws nothing here
    for p, q in zip(trained, (p for p in model.parameters() if p.requires_grad), strict=True):
        assert torch.equal(p, q)
    assert torch.equal(logits(again), logits(model))
    lora.save(again, tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b") and len(files(tmp_path / "a")) == 2


def test_files_have_peft_names_and_shapes(tmp_path):
    """A key with `.weight` too many or a missing field: PEFT would leave its adapter at zero."""
    model = llama()
    lora.attach(model, Adapter(rank=3, alpha=6, dora=True, targets=("up_proj", "q_proj")))
    lora.save(model, tmp_path)
    stem = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    shapes = {
        k: list(x.shape) for k, x in load_file(tmp_path / "adapter_model.safetensors").items()
    }
    found = {k.removeprefix(stem): shape for k, shape in shapes.items() if k.startswith(stem)}
    assert found == {"A.weight": [3, 16], "B.weight": [24, 3], "magnitude_vector": [24]}
    assert len(shapes) == 2 * 2 * 3
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": None,
        "bias": "none",
        "inference_mode": True,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": 3,
        "target_modules": ["q_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
        "use_dora": True,
        "use_rslora": False,
    }


def test_a_config_is_written_back_as_it_was(tmp_path):
    """Fields of PEFT that we do not know, lost on the way, or other defaults than its 8 and 8."""
    model = moved(qwen(), Adapter(rank=8, alpha=8))
    lora.save(model, tmp_path)
    with safe_open(tmp_path / lora.WEIGHTS, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    content = b'{"peft_type": "LORA",\r\n"revision": "main", "megatron_core": "megatron.core"}\n'
    (tmp_path / lora.CONFIG).write_bytes(content)
    again = qwen()
    lora.load(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    lora.save(again, tmp_path / "b")
    assert (tmp_path / "b" / lora.CONFIG).read_bytes() == content


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"peft_type": "LOHA"}, "peft_type 'LOHA'"),
        ({"peft_type": None}, "peft_type None"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa'"),
        ({"use_invention": True}, "use_invention True"),
        ({"r": 5}, r"lora_A.weight is \(4, 24\) there and \(5, 24\) here"),
        ({"r": 0}, "give a rank of 1 or more"),
        ({"r": None}, "does not describe an adapter"),
        ({"use_dora": True}, "magnitude_vector is missing there"),
    ],
)
def test_unsupported_adapters_are_one_sentence(tmp_path, change, sentence):
    """A setting that is skipped in silence: the adapter loads and answers something else."""
    model = qwen()
    lora.attach(model, Adapter(rank=4))
    lora.save(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        lora.load(qwen(), tmp_path)


def test_broken_files_are_one_sentence(tmp_path):
    """A traceback for a wrong folder, half a file, another model's adapter or foreign tensors."""
    with pytest.raises(ValueError, match="adapter_config.json is not there"):
        lora.load(qwen(), tmp_path)
    with pytest.raises(ValueError, match="no adapters to save"):
        lora.save(qwen(), tmp_path)
    lora.save(moved(llama(), Adapter(targets=("lm_head",))), tmp_path)
    with pytest.raises(ValueError, match="lm_head.lora_A.weight is .* there and missing here"):
        lora.load(qwen(), tmp_path)
    save_file({"base_model.model.lm_head.lora_C": torch.ones(1)}, tmp_path / lora.WEIGHTS)
    with pytest.raises(ValueError, match="does not fit this model .* missing there"):
        lora.load(llama(), tmp_path)
    (tmp_path / lora.WEIGHTS).write_bytes(b"half a file")
    with pytest.raises(ValueError, match="safetensors is broken"):
        lora.load(llama(), tmp_path)
    for content in ("{", "[1, 2]", '"text"'):
        (tmp_path / lora.CONFIG).write_text(content)
        with pytest.raises(ValueError, match="does not describe an adapter"):
            lora.load(llama(), tmp_path)


LAYER = "base_model.model.model.layers.1.mlp.up_proj.lora_"


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        (lambda tensors: tensors.clear(), "holds no tensors: save the adapters again"),
        (
            lambda tensors: [tensors.pop(f"{LAYER}{part}.weight") for part in "AB"],
            "its own adapter_config.json: the shape of .*layers.1.mlp.up_proj.* is missing there",
        ),
        (
            lambda tensors: tensors.pop(f"{LAYER}A.weight"),
            "layers.1.*lora_A.weight is missing there",
        ),
        (lambda tensors: tensors[f"{LAYER}B.weight"].fill_(math.nan), "lora_B.*are not finite"),
        (lambda tensors: tensors[f"{LAYER}A.weight"].fill_(math.inf), "lora_A.*are not finite"),
    ],
)
def test_adapters_that_are_not_whole_are_refused(tmp_path, fault, sentence):
    """Prevents: an adapter file without tensors, or without those of a layer, that loads: the base
    is graded in its place, exit 0; or NaN, which the first checkpoint blames on the learning rate.
    """
    lora.save(moved(qwen(), Adapter(rank=4)), tmp_path)
    tensors = load_file(tmp_path / lora.WEIGHTS)
    fault(tensors)
    save_file(tensors, tmp_path / lora.WEIGHTS)
    with pytest.raises(ValueError, match=sentence):
        lora.load(qwen(), tmp_path)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"target_modules": ["q_proj"]}, "down_proj.lora_A.weight is .* there and missing here"),
        ({"target_modules": ["h"]}, "down_proj.lora_A.weight is .* there and missing here"),
        ({"target_modules": "(q_proj"}, "does not describe an adapter: missing"),
        ({"target_modules": 5}, "does not describe an adapter: 'int' object is not iterable"),
    ],
)
def test_a_config_of_other_layers_is_refused(tmp_path, change, sentence):
    """Prevents: tensors that PEFT would leave out, which change the answers here alone."""
    lora.save(moved(qwen(), Adapter(rank=4)), tmp_path)
    file = tmp_path / lora.CONFIG
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=sentence):
        lora.load(qwen(), tmp_path)


@pytest.mark.parametrize("make", [qwen, llama])
def test_save_merged_is_a_plain_checkpoint(tmp_path, make):
    """A checkpoint with stray adapter tensors or unmerged weights; vLLM refuses DoRA itself."""
    model = moved(make(), Adapter(dora=True))
    lora.save_merged(model, tmp_path)
    plain = type(model).from_pretrained(tmp_path).eval()
    assert set(plain.state_dict()) == {k for k in model.state_dict() if "lora" not in k}
    torch.testing.assert_close(logits(plain), logits(model), rtol=0, atol=1e-6)


def test_save_merged_keeps_the_dtype(tmp_path):
    """A bf16 model that doubles when merged."""
    model = moved(qwen(torch.bfloat16), Adapter())
    lora.save_merged(model, tmp_path)
    assert {x.dtype for x in load_file(tmp_path / "model.safetensors").values()} == {torch.bfloat16}
    assert Qwen2ForCausalLM.from_pretrained(tmp_path).dtype == torch.bfloat16


# ---- PEFT, both ways -----------------------------------------------------------------------------


@pytest.fixture
def peft():
    return pytest.importorskip("peft", reason="needs `pip install peft`")


@BOTH
@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("make", [qwen, llama])
def test_peft_loads_ours(peft, tmp_path, make, dora, rslora):
    """Files that only we can read, or that mean something else to PEFT."""
    model = moved(make(), Adapter(rank=3, alpha=4, dora=dora, rslora=rslora))
    lora.save(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "ours").eval()
    torch.testing.assert_close(logits(theirs), logits(model), rtol=0, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    name = "adapter_model.safetensors"
    assert (tmp_path / "theirs" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()


@BOTH
@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], "all-linear", r".*\.1\..*(k|v)_proj"])
@pytest.mark.parametrize("make", [qwen, llama])
def test_ours_loads_peft(peft, tmp_path, make, targets, dora):
    """Adapters of others that load with other numbers, or change when they are written back."""
    how = {"r": 3, "lora_alpha": 5, "lora_dropout": 0.1, "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(**how, target_modules=targets, use_dora=dora)
    theirs = peft.get_peft_model(make(), config).eval()
    torch.manual_seed(4)
    for p in theirs.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path / "theirs")
    model = make()
    lora.load(model, tmp_path / "theirs")
    torch.testing.assert_close(logits(model), logits(theirs), rtol=0, atol=1e-6)
    lora.save(model, tmp_path / "ours")
    assert files(tmp_path / "ours") == files(tmp_path / "theirs")


@pytest.mark.parametrize(
    "how",
    [
        {"target_modules": ["proj", "q_proj", "model.layers.1.mlp.up_proj"]},
        {"target_modules": ["q_proj", "lm_head"]},
        {"target_modules": "ALL-Linear"},
        {"target_modules": "all-linear", "exclude_modules": r".*\.0\..*"},
        {"target_modules": r".*(q|k)_proj", "exclude_modules": ["layers.1.self_attn.q_proj"]},
        {"target_modules": ["q_proj"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
        {"target_modules": ["mlp.up_proj", "v_proj"], "layers_to_transform": [1, 7],
         "layers_pattern": ["h", "layers"]},
        {"target_modules": ["model.layers.0.mlp.up_proj", "v_proj"], "layers_to_transform": [1]},
        {"target_modules": ["v_proj"], "layers_to_transform": []},
    ],
)  # fmt: skip
def test_layers_are_those_of_peft(peft, tmp_path, how):
    """Prevents: a whole adapter that is refused where PEFT's config says by patterns and numbers
    which layers it has; or half a one that is not, where it names all of them."""
    theirs = peft.get_peft_model(llama(), peft.LoraConfig(r=2, task_type="CAUSAL_LM", **how))
    wanted = set(theirs.targeted_module_names)
    theirs.save_pretrained(tmp_path, save_embedding_layers=False)  # adapters alone
    file = tmp_path / lora.CONFIG  # as given: PEFT writes the names that "all-linear" stands for
    file.write_text(json.dumps(json.loads(file.read_text()) | how))
    model = llama()
    lora.load(model, tmp_path)
    assert set(lora.layers(model)) == wanted
    if any(how.get(k) for k in lora.NARROW):  # there the tensors alone say which layers
        return
    tensors = load_file(tmp_path / lora.WEIGHTS)
    lost = min(wanted)
    save_file(
        {k: x for k, x in tensors.items() if f".{lost}.lora" not in k}, tmp_path / lora.WEIGHTS
    )
    with pytest.raises(ValueError, match=f"{lost}.lora_A.* is missing there|holds no tensors"):
        lora.load(llama(), tmp_path)


@BOTH
def test_gradients_are_those_of_peft(peft, tmp_path, dora):
    """A backward that differs where forward agrees: n in the graph, or a scale lost."""
    model = moved(qwen(), Adapter(rank=3, dora=dora))
    lora.save(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(qwen(), tmp_path, is_trainable=True)
    for each in (model, theirs.eval()):
        each(input_ids=IDS, labels=IDS).loss.backward()
    grads = {k.replace(".default", ""): p.grad for k, p in theirs.named_parameters()}
    for k, p in lora.stored(model).items():
        key = k if k in grads else k + ".weight"  # its magnitudes have a module of their own
        torch.testing.assert_close(p.grad, grads[key], rtol=1e-4, atol=1e-6)
