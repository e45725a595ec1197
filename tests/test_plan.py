"""The plan of memory, by the bytes of all live tensors. Docstrings name the faults."""

import math
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

import evaluate
import lora
import plan
import rollout
from plan import Run

SHAPE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIGS = {
    "llama": lambda V: LlamaConfig(**SHAPE, vocab_size=V),
    "qwen3": lambda V: Qwen3Config(**SHAPE, vocab_size=V, head_dim=24, tie_word_embeddings=True),
}
RUN = Run(prompts=2, group_size=3, prompt=20, max_new_tokens=40, pack_tokens=2 * (20 + 3 * 40))
HOW = {
    "all": {},
    "lora": {"lora": 4},
    "dora": {"dora": 4},
    "dora-bf16": {"dora": 4, "dtype": "bfloat16"},
}


class Live(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there ever were."""

    def __init__(self, *held):
        super().__init__()
        self.sizes, self.now, self.peak = {}, 0, 0
        self.hold(held)

    def hold(self, tree):
        for x in tree_leaves(tree):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in self.sizes:
                storage = x.untyped_storage()
                self.sizes[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage._cdata)
        self.peak = max(self.peak, self.now)

    def drop(self, key):
        self.now -= self.sizes.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.hold(out)
        return out


def test_live_counts_by_hand():
    """A meter that counts views twice, or never sees a tensor go, would prove any plan."""
    with Live() as live:
        x = torch.zeros(100)  # 400 bytes
        y = x.view(10, 10).T  # none
        z = y + 1  # 800
        del z
        y.clone()  # 800 again
    assert (live.peak, live.now) == (800, 400)


class Trainer:
    """A tiny model in the midst of a run: adapters on, AdamW's averages there."""

    def __init__(self, kind, run, V=96):
        torch.manual_seed(0)
        self.run, self.V = run, V
        self.model = AutoModelForCausalLM.from_config(CONFIGS[kind](V)).eval()
        if run.rank:
            self.model.to(getattr(torch, run.dtype))
            targets = lora.targets_of(run.targets)
            adapter = lora.Adapter(run.rank, dora=bool(run.dora), targets=targets)
            lora.attach(self.model, adapter, torch.Generator().manual_seed(1))
        if run.checkpointing:
            self.model.train().gradient_checkpointing_enable()
        weights = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights)
        self.prompts = [[(7 * i + b) % V for i in range(run.prompt)] for b in range(run.prompts)]
        self.pack()
        self.optimizer.step()

    def pack(self):
        """Forward and backward of all groups, as recode.train does."""
        B, G, T = self.run.prompts, self.run.group_size, self.run.max_new_tokens
        answers = [[[(5 * i + g) % self.V for i in range(T)] for g in range(G)]] * B
        written = rollout.written(self.prompts, answers, 0, "cpu")
        with self.precision():
            logp = rollout.token_logp(self.model, written, list(range(B)))
        (-logp.sum()).backward()

    def sample(self):
        """No end token exists, so that every sample has T tokens."""
        how = {name: getattr(self.run, name) for name in ("group_size", "max_new_tokens")}
        with self.precision(), lora.merged(self.model):
            rollout.sample(self.model, self.prompts, eos_ids=[self.V], pad_id=0, **how)

    def precision(self):
        return torch.autocast("cpu", torch.bfloat16, enabled=self.run.dtype == "bfloat16")

    def measured(self, phase):
        """GB at the peak of this phase."""
        if phase != "training":
            self.optimizer.zero_grad()
        weights = [*self.model.parameters(), *self.model.buffers()]
        grads = [w.grad for w in weights]
        states = [list(state.values()) for state in self.optimizer.state.values()]
        with Live([w.data for w in weights], grads, states) as live:
            {"training": self.pack, "sampling": self.sample}[phase]()
        return live.peak / 1e9

    def planned(self, phase):
        return sum(plan.estimate(self.model, self.run)[phase].values())


def run(how, **more):
    return Run(**vars(RUN) | HOW[how] | more)


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_training_is_planned_within_a_tenth(kind, how, checkpointing):
    """A plan that forgets what a layer keeps would let a run start that dies in its first step."""
    trainer = Trainer(kind, run(how, checkpointing=checkpointing))
    assert trainer.planned("training") == pytest.approx(trainer.measured("training"), rel=0.1)


@pytest.mark.parametrize("how", [*HOW, "all-bf16", "lora-qv"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_sampling_is_planned_within_a_tenth(kind, how):
    """A plan without the cache, merged weights or autocast's copies would be too small."""
    more = {"all-bf16": {"dtype": "bfloat16"}, "lora-qv": {"lora": 16, "targets": "q_proj,v_proj"}}
    trainer = Trainer(kind, run("all", **more[how]) if how in more else run(how))
    assert trainer.planned("sampling") == pytest.approx(trainer.measured("sampling"), rel=0.1)


@pytest.mark.parametrize("most", [2**24, 2**15], ids=["one part", "parts"])
@pytest.mark.parametrize("how", ["all", "lora"])
def test_the_head_is_planned_in_parts(how, most, monkeypatch):
    """A plan for all logits at once would refuse every model with a large vocabulary."""
    monkeypatch.setattr(rollout, "LOGITS", most)  # 2**15 / 2000 = 16 of the 240 tokens at a time
    trainer = Trainer("llama", run(how), V=2000)
    assert trainer.planned("training") == pytest.approx(trainer.measured("training"), rel=0.1)


@pytest.mark.parametrize("how", ["all", "dora-bf16"])
def test_long_prompts_are_planned_within_a_tenth(how, monkeypatch):
    """A plan of the decoding alone: with long prompts it is their pass that needs the most."""
    wide = {"hidden_size": 128, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(CONFIGS, "wide", lambda V: Qwen3Config(**SHAPE | wide, vocab_size=V))
    trainer = Trainer("wide", run(how, prompts=4, group_size=4, prompt=120, max_new_tokens=10))
    assert trainer.planned("sampling") == pytest.approx(trainer.measured("sampling"), rel=0.1)


# ---- by hand -------------------------------------------------------------------------------------


def skeleton(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def test_weights_by_hand():
    """Tied embeddings counted twice, or an optimizer for frozen weights, would refuse too much."""
    tied = skeleton(Qwen2Config(**SHAPE, vocab_size=100, tie_word_embeddings=True))
    # a layer: q and o 64 x 64, k and v 32 x 64, three of 160 x 64; biases 64 + 32 + 32; norms 64
    matrices = 4 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64)
    weights = matrices + 4 * (128 + 2 * 64) + 64 + 100 * 64
    found = plan.estimate(tied, Run())["step"]
    assert found == pytest.approx(
        {
            "weights": 4 * weights / 1e9,
            "optimizer": 8 * weights / 1e9,
            "gradients": 4 * weights / 1e9,
        }
    )
    # LoRA of rank 2: A [2, in] and B [out, 2], so 2 (in + out) of each matrix
    low = 4 * 2 * (2 * 128 + 2 * 96 + 3 * 224)
    found = plan.estimate(tied, Run(lora=2, dtype="bfloat16", reference=True))["sampling"]
    assert found["weights"] == pytest.approx(2 * weights / 1e9)
    assert found["adapters"] == pytest.approx(4 * low / 1e9)
    assert found["optimizer"] == pytest.approx(8 * low / 1e9)
    assert "reference" not in found  # the adapters are switched off for it
    few = plan.estimate(tied, Run(lora=2, targets="q_proj,v_proj"))["step"]["adapters"]
    assert few == pytest.approx(4 * (4 * 2 * (128 + 96)) / 1e9)  # q is 64 x 64, v is 32 x 64


def test_shards_by_hand():
    """A plan of whole gradients would refuse what fits, one of shards alone would let it sample."""
    model = skeleton(LlamaConfig(**SHAPE, vocab_size=100))
    # a layer's matrices as above; without biases; embeddings and head
    layer, rest = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 160 * 64, 9 * 64 + 2 * 100 * 64
    W = 4 * 4 * layer + 4 * rest  # bytes of all weights
    found = plan.estimate(model, Run(shards=4))
    for phase, parts in {
        "step": {"weights": W / 4, "gradients": W / 4, "optimizer": W / 2},
        "sampling": {"weights": W / 4, "gathered weights": W, "optimizer": W / 2},
        "training": {"weights": W / 4, "gathered weights": 4 * (2 * rest + 4 * layer)},
    }.items():
        assert {name: found[phase][name] for name in parts} == pytest.approx(
            {name: size / 1e9 for name, size in parts.items()}
        )


@pytest.mark.parametrize("new, room", [(2, 1), (3, 64), (65, 64), (66, 128), (1024, 1024)])
def test_cache_has_the_rooms_of_attention(new, room):
    """A cache planned by the tokens, not by the buffer that doubles, would be half of it."""
    model = skeleton(LlamaConfig(**SHAPE, vocab_size=100))
    found = plan.estimate(model, Run(2, 3, 20, new))["sampling"]["cache"]
    # keys and values, 4 layers, 2 heads of 16, float32; 2 prompts of 20, 6 samples with room
    assert found == pytest.approx(2 * 4 * 2 * 16 * 4 * (2 * 20 + 6 * room) / 1e9)


def test_settings_that_lower_do_lower():
    """Advice that does not help would send a person in circles."""
    model = skeleton(Qwen2Config(**SHAPE, vocab_size=100))
    wide = Run(16, 8, 100, 200, pack_tokens=10000)

    def total(phase, **less):
        return sum(plan.estimate(model, Run(**vars(wide) | less))[phase].values())

    for less in ({"pack_tokens": 2000}, {"checkpointing": True}, {"lora": 2}):
        assert total("training", **less) < total("training")
    for less in ({"prompts": 8}, {"group_size": 4}, {"max_new_tokens": 100}):
        assert total("sampling", **less) < total("sampling")


def test_a_model_that_does_not_fit_is_refused_in_a_sentence():
    """A run that cannot fit would load for minutes and be killed without a word."""
    parts = {"sampling": {"weights": 3.0, "cache": 5.0}, "step": {"weights": 3.0}}
    plan.check(parts, 8.0)
    with pytest.raises(
        ValueError, match=r"sampling would need 8.0 GB and 7.9 GB are free; .*cache"
    ):
        plan.check(parts, 7.9)
    assert plan.table(parts, 7.9).splitlines() == [
        "memory planned: 8.0 GB in sampling, 7.9 GB free",
        "  sampling    8.0 GB  cache 5.0, weights 3.0",
        "  step        3.0 GB  weights 3.0",
    ]


def test_free_memory_is_that_of_machine_and_group(tmp_path):
    """A container's limit unseen, or file pages taken for used, would plan with wrong room."""
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable:     5 kB\n")
    assert plan.machine_memory(tmp_path / "meminfo") == 5 * 1024
    assert plan.machine_memory(tmp_path / "none") == math.inf
    assert plan.group_memory(tmp_path) == math.inf
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 600\ninactive_file 50\n")
    assert plan.group_memory(tmp_path) == 1000 - 700 + 50
    (tmp_path / "memory.max").write_text("max\n")
    assert plan.group_memory(tmp_path) == math.inf
    assert Run().graded == evaluate.ROWS


# ---- one card of 80 GB: planned, not measured ----------------------------------------------------

QWEN = {"num_hidden_layers": 28, "max_position_embeddings": 32768}
LARGE = Qwen2Config(  # Qwen2.5-Coder-7B
    **QWEN, hidden_size=3584, intermediate_size=18944, num_attention_heads=28,
    num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False,
)  # fmt: skip
MIDDLE = Qwen2Config(  # Qwen2.5-Coder-1.5B
    **QWEN, hidden_size=1536, intermediate_size=8960, num_attention_heads=12,
    num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True,
)  # fmt: skip


@pytest.mark.parametrize("config, how", [(LARGE, {"dora": 64}), (MIDDLE, {"reference": True})])
def test_the_goals_for_one_card(config, how):
    """A change that makes the paper's 7B, or all weights of 1.5B, outgrow 40 GB of a card."""
    card = Run(8, 8, 512, 1024, checkpointing=True, dtype="bfloat16", cuda=True, **how)
    phase, most = plan.peak(plan.estimate(skeleton(config), card))
    assert 20 < most <= 40, phase  # with 8 x 8 samples; no GPU has confirmed it
