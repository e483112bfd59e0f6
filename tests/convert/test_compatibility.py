"""A converted transformers model goes on working with what people use on models."""

from __future__ import annotations

import copy
import io
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from sparingly.convert import convert_, restore_
from sparingly.nn.linear import SelectiveLinear
from sparingly.nn.mlp import SelectiveMLP
from sparingly.nn.selective import GRADIENTS, selective_modules
from sparingly.selectors import InputThreshold, Threshold

transformers = pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 33, 2, 17, 40, 8], [7, 7, 1, 50, 21, 3, 60]])


def tiny(family: str = "Llama", **options) -> Any:
    """The same small random model each time, its weights large enough for attention to matter."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        sizes = {"hidden_size": 32, "intermediate_size": 80, "num_attention_heads": 4, "num_hidden_layers": 2}
        config = getattr(transformers, f"{family}Config")(
            vocab_size=64, num_key_value_heads=2, pad_token_id=0, eos_token_id=None, bos_token_id=1, **(sizes | options)
        )
        model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() == 2:
                    parameter.mul_(4)
    return model


def converted(threshold: float = 0.0, **options) -> Any:
    model = tiny(**options)
    convert_(model, {"mlp": Threshold(threshold), "linear": InputThreshold(threshold)})
    return model


def generate(model, **options):
    torch.manual_seed(11)
    return model.generate(IDS[:1], max_new_tokens=8, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": False},
        {"do_sample": True, "top_p": 0.9},
        {"num_beams": 3},
        {"do_sample": False, "use_cache": False},
    ],
    ids=["greedy", "sampling", "beams", "no cache"],
)
def test_generate_gives_the_dense_continuations(options):
    assert torch.equal(generate(converted(), **options), generate(tiny(), **options))


def test_batches_with_left_padding():
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :3], mask[1, :3] = 0, 0
    model, dense = converted(), tiny()
    got, want = (m.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False) for m in (model, dense))
    assert torch.equal(got, want)
    assert all(layer.ran[0] > 0 for layer in selective_modules(model).values())


def test_text_generation_pipeline():
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"w{i}": i for i in range(64)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="w0", unk_token="w0")
    texts = []
    for model in (converted(), tiny()):
        write = transformers.pipeline("text-generation", model=model, tokenizer=tokenizer, device="cpu")
        texts.append(write("w5 w9 w33", max_new_tokens=5, do_sample=False)[0]["generated_text"])
    assert texts[0] == texts[1] and texts[0].startswith("w5 w9 w33") and len(texts[0]) > 20


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
@torch.no_grad()
def test_decoding_equals_prefill_at_real_thresholds(family):
    model = converted(0.2, family=family)
    whole = model(IDS[:1]).logits[:, -1]
    start = model(IDS[:1, :-1], use_cache=True)
    step = model(IDS[:1, -1:], past_key_values=start.past_key_values).logits[:, -1]
    torch.testing.assert_close(step, whole, rtol=1e-4, atol=1e-4)
    assert (whole - tiny(family)(IDS[:1]).logits[:, -1]).abs().max() > 0.01
    for layer in selective_modules(model).values():
        tokens, units = layer.ran[:2].tolist()
        assert tokens == 1 and 0 < units < layer.num_units


@pytest.mark.parametrize("tokens", [1, 7])
@torch.no_grad()
def test_compiles_without_graph_breaks(tokens):
    model = converted(0.2, num_hidden_layers=1)
    want = model(IDS[:1, :tokens], use_cache=False).logits
    before = {name: layer.ran.clone() for name, layer in selective_modules(model).items()}
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(compiled(IDS[:1, :tokens], use_cache=False).logits, want, rtol=1e-5, atol=1e-5)
    if tokens == 1:
        for name, layer in selective_modules(model).items():
            assert layer.ran.tolist() == (2 * before[name]).tolist()


class Net(nn.Module):
    """One MLP block and an output layer."""

    def __init__(self, gated: bool):
        super().__init__()
        self.mlp = Gated() if gated else nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
        self.out = nn.Linear(16, 5)

    def forward(self, x):
        return self.out(x + self.mlp(x))


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.g, self.u, self.d = nn.Linear(16, 64), nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x):
        return self.d(nn.functional.silu(self.g(x)) * self.u(x))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("tokens", [1, 9])
@torch.no_grad()
def test_exports(gated, tokens):
    x = torch.randn(tokens, 16)
    model: Any = Net(gated).eval()
    convert_(model, Threshold(0.2), "mlp")
    program = torch.export.export(model, (x,))
    names = {str(node.target) for node in program.graph.nodes}
    ours = "sparingly.gated_rows" if gated else "sparingly.threshold_accumulate"
    assert any(ours in name for name in names) == (tokens == 1)
    torch.testing.assert_close(program.module()(x), model(x))
    if tokens > 1:
        rows = torch.export.Dim("rows", min=5, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: rows},))
        more = torch.randn(20, 16)
        torch.testing.assert_close(program.module()(more), model(more))


@torch.no_grad()
def test_copies_and_pickles_are_models_of_their_own():
    model = converted(0.2)
    want, alone = model(IDS[:1, :2]).logits, restored(model)
    again = io.BytesIO()
    torch.save(model, again)
    again.seek(0)
    for made in (copy.deepcopy(model), torch.load(again, weights_only=False)):
        for parameter in model.parameters():
            parameter.add_(0)
        assert torch.equal(made(IDS[:1, :2]).logits, want)
        theirs = {id(p) for p in model.parameters()}
        restore_(made)
        assert not theirs & {id(p) for p in made.parameters()}
        assert torch.equal(made(IDS[:1, :2]).logits, alone)
    assert torch.equal(model(IDS[:1, :2]).logits, want)


@torch.no_grad()
def restored(model: Any):
    made = copy.deepcopy(model)
    restore_(made)
    return made(IDS[:1, :2]).logits


@torch.no_grad()
def test_states_go_both_ways():
    dense, model = tiny(), converted(0.2)
    names = set(dense.state_dict())
    assert names <= set(model.state_dict())
    assert {name.split(".selector.")[0] for name in set(model.state_dict()) - names} == set(selective_modules(model))
    # A dense checkpoint, strictly, with memory of its own.
    want = model(IDS).logits
    other = {name: value.clone() for name, value in dense.state_dict().items()}
    for parameter in model.parameters():
        parameter.zero_()
    model.load_state_dict(other, assign=True)
    assert torch.equal(model(IDS).logits, want)
    few = model(IDS[:1, :2]).logits
    # The whole state into another model that was converted, but with other options.
    again = tiny()
    convert_(again, {"mlp": Threshold(), "linear": InputThreshold()})
    for parameter in again.parameters():
        parameter.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(IDS[:1, :2]).logits, few)
    # And back into a dense model, as transformers' save_pretrained and others do.
    result = tiny().load_state_dict(model.state_dict(), strict=False)
    assert not result.missing_keys


@torch.no_grad()
def test_a_checkpoint_of_transformers_can_be_read_by_it(tmp_path):
    model = converted(0.2)
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dense = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(dense(IDS).logits, tiny()(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_other_precisions_equal_dense_at_zero_sparsity(dtype):
    model, dense = converted().to(dtype), tiny().to(dtype)
    tolerance = {torch.bfloat16: 0.15, torch.float16: 0.02}.get(dtype, 1e-9)
    for ids in (IDS, IDS[:1, :2]):
        got, want = model(ids).logits, dense(ids).logits
        assert got.dtype == dtype
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
    restore_(model)
    assert torch.equal(model(IDS).logits, dense(IDS).logits)


@torch.no_grad()
def test_autocast_gives_the_dtype_of_the_dense_model():
    model, dense = converted(), tiny()
    for ids in (IDS, IDS[:1, :2]):
        with torch.autocast("cpu", torch.bfloat16):
            got, want = model(ids).logits, dense(ids).logits
        assert got.dtype == want.dtype
        torch.testing.assert_close(got, want, rtol=0.1, atol=0.15)
    with torch.autocast("cpu", torch.bfloat16):
        assert generate(model, do_sample=False).shape == (1, 15)


def test_a_training_step_is_the_dense_one_at_zero_sparsity():
    after = []
    for model in (converted(), tiny()):
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        for _ in range(2):
            loss = model(IDS[:1, :3], labels=IDS[:1, :3]).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if selective_modules(model):
            assert all(layer.why_dense == {GRADIENTS: 6} for layer in selective_modules(model).values())
            restore_(model)
        after.append({name: value.detach() for name, value in model.state_dict().items()})
    for name, value in after[1].items():
        torch.testing.assert_close(after[0][name], value, rtol=1e-4, atol=1e-5)
        assert after[0][name].is_contiguous()


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointed in (False, True):
        model = converted(0.2).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model(IDS, labels=IDS).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def with_adapter(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    targets = ["q_proj", "up_proj", "down_proj"]
    torch.manual_seed(5)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False))
    return adapted.eval()


@torch.no_grad()
def test_adapters_are_not_passed_by():
    model, dense = with_adapter(converted()), with_adapter(tiny())
    plain = tiny()(IDS).logits
    for ids in (IDS, IDS[:1, :2]):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-4)
    assert (dense(IDS).logits - plain).abs().max() > 0.1
    model.merge_adapter()
    for ids in (IDS, IDS[:1, :2]):
        torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=1e-4, atol=1e-3)
    merged = model.merge_and_unload()
    assert all(type(layer.down_proj) is nn.Linear for layer in selective_modules(merged).values() if _is_mlp(layer))
    restore_(merged)
    torch.testing.assert_close(merged(IDS).logits, dense(IDS).logits, rtol=1e-4, atol=1e-3)


def _is_mlp(layer: nn.Module) -> bool:
    return isinstance(layer, SelectiveMLP)


def test_adapters_can_be_trained_and_the_model_restored_under_them():
    model = with_adapter(converted(0.2)).train()
    before = {name: value.detach().clone() for name, value in model.named_parameters() if "lora" not in name}
    loss = model(IDS, labels=IDS).loss
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert trained and all(parameter.grad is not None for parameter in trained)
    inner = model.get_base_model()
    model.unload()
    restore_(inner)
    assert not selective_modules(inner)
    assert all(
        torch.equal(value, before[f"base_model.model.{name}"])
        for name, value in inner.named_parameters()
        if f"base_model.model.{name}" in before
    )


@torch.no_grad()
def test_hooks_on_layers_inside_run():
    model: Any = Net(gated=True).eval()
    x = torch.randn(1, 16)
    convert_(model, Threshold(0.0), "mlp")
    want = model.mlp(x)
    handle = model.mlp.u.register_forward_hook(lambda module, args, output: output * 2)
    torch.testing.assert_close(model.mlp(x) - model.mlp.d.bias, 2 * (want - model.mlp.d.bias), rtol=1e-4, atol=1e-5)
    handle.remove()
    assert torch.equal(model.mlp(x), want)
    hooks = pytest.importorskip("accelerate.hooks")

    class Twice(hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    hooks.add_hook_to_module(model.mlp.u, Twice())
    torch.testing.assert_close(model.mlp(x) - model.mlp.d.bias, 2 * (want - model.mlp.d.bias), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_hooks_on_a_replaced_module_stay():
    seen: list[str] = []
    model: Any = Net(gated=True).eval()
    handle = model.mlp.register_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    convert_(model, Threshold(0.0), "mlp")
    seen.clear()
    model(torch.randn(1, 16))
    restore_(model)
    model(torch.randn(1, 16))
    handle.remove()
    model(torch.randn(1, 16))
    assert seen == ["SelectiveMLP", "Gated"]


@torch.no_grad()
def test_weights_moved_in_by_accelerate_while_running():
    accelerate = pytest.importorskip("accelerate")
    model = converted(0.2)
    want = model(IDS[:1, :2]).logits
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    torch.testing.assert_close(model(IDS[:1, :2]).logits, want, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_tied_weights_stay_tied():
    model = tiny(tie_word_embeddings=True)
    convert_(model, {"mlp": Threshold(0.0), "linear": InputThreshold(0.0)})
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.to(torch.bfloat16).float()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    copied = copy.deepcopy(model)
    assert copied.lm_head.weight is copied.model.embed_tokens.weight


@torch.no_grad()
def test_a_module_that_stands_twice_is_replaced_twice_by_one():
    block = Gated()
    model: Any = nn.Sequential(block, nn.LayerNorm(16), block).eval()
    x = torch.randn(3, 16)
    want = model(x)
    convert_(model, Threshold(0.0), "mlp", example=x)
    assert model[0] is model[2] and isinstance(model[0], SelectiveMLP)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-5)
    restore_(model)
    assert model[0] is block and model[2] is block and torch.equal(model(x), want)


@torch.no_grad()
def test_layers_that_share_a_weight_keep_sharing_it():
    model: Any = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)).eval()
    model[2].weight = model[0].weight
    x = torch.randn(2, 16)
    want, stride = model(x), model[0].weight.stride()
    convert_(model, InputThreshold(0.0), "linear", example=torch.randn(8, 16))
    assert isinstance(model[0], SelectiveLinear) and model[2].weight is model[0].weight
    torch.testing.assert_close(model(x), want)
    restore_(model)
    assert model[2].weight is model[0].weight and model[0].weight.stride() == stride
    assert torch.equal(model(x), want)


@torch.no_grad()
def test_meta_and_back():
    model = converted(0.2)
    want, state = model(IDS[:1, :2]).logits, copy.deepcopy(model.state_dict())
    model.to("meta")
    assert all(value.is_meta for value in model.state_dict().values())
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    for layer in selective_modules(model).values():
        layer.reset()
    rotary = model.model.rotary_emb
    for name, value in tiny().model.rotary_emb.named_buffers():
        getattr(rotary, name).copy_(value)
    torch.testing.assert_close(model(IDS[:1, :2]).logits, want)
