"""LLaDAModelLM against transformers' Llama, and each way of choosing rows against the full logits."""

import math

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from tiny_llada import B, L, additive, clone, make_batch, make_model


def llama_like(model):
    """transformers' Llama with this model's weights."""
    config = model.config
    llama = LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=config.embedding_size,
            hidden_size=config.d_model,
            intermediate_size=config.mlp_hidden_size,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            attention_bias=config.include_qkv_bias,
            pad_token_id=None,
        ),
        attn_implementation="eager",
    ).eval()
    names = {"transformer.wte": "embed_tokens", "transformer.ln_f": "norm", "transformer.blocks": "layers"}
    names |= {
        "attn_norm": "input_layernorm",
        "ff_norm": "post_attention_layernorm",
        "attn_out": "self_attn.o_proj",
    }
    names |= {f"{x}_proj": f"self_attn.{x}_proj" for x in "qkv"}
    names |= {"ff_proj": "mlp.gate_proj", "up_proj": "mlp.up_proj", ".ff_out": ".mlp.down_proj"}
    state = {"lm_head.weight": model.state_dict()["model.transformer.ff_out.weight"]}
    for key, value in model.state_dict().items():
        if key != "model.transformer.ff_out.weight":
            for ours, theirs in names.items():
                key = key.replace(ours, theirs)
            state[key] = value
    missing, unexpected = llama.load_state_dict(state, strict=False)
    assert not unexpected and not [key for key in missing if "o_proj.bias" not in key]
    for layer in llama.model.layers:
        if layer.self_attn.o_proj.bias is not None:
            torch.nn.init.zeros_(layer.self_attn.o_proj.bias)
    return llama


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@torch.no_grad()
def test_equals_llama_with_a_bidirectional_mask(kernel, side):
    model = make_model(kernel=kernel, n_kv_heads=2, rope_theta=1e4)
    ids, mask, _ = make_batch(side)
    theirs = llama_like(model)(
        ids,
        attention_mask=additive(mask[:, None, None, :].expand(B, 1, L, L).bool()),
        position_ids=torch.arange(L)[None],
    ).logits
    assert_close(model(ids, attention_mask=mask).logits, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@torch.no_grad()
def test_equals_llama_under_a_causal_mask(kernel):
    model = make_model(kernel=kernel, include_qkv_bias=True)
    for block in model.model.transformer.blocks:
        torch.nn.init.normal_(block.q_proj.bias, generator=torch.Generator().manual_seed(0))
    ids, _, _ = make_batch()
    causal = torch.ones(1, 1, L, L, dtype=torch.bool).tril()
    theirs = llama_like(model)(ids).logits
    for given in (
        {"attention_mask": causal},
        {"attention_bias": causal},
        {"attention_bias": causal.to(torch.int8)},
    ):
        assert_close(model(ids, **given).logits, theirs, atol=1e-5, rtol=0)
    assert_close(model(ids, attention_bias=additive(causal)).logits, theirs, atol=1e-5, rtol=0)
    assert (model(ids).logits - theirs).abs().max() > 0.1


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("changes", [{}, {"n_kv_heads": 2, "logit_shift": True}], ids=["plain", "shifted"])
@torch.no_grad()
def test_query_positions_give_those_rows_and_the_last_block_computes_no_other(kernel, changes):
    model = make_model(kernel=kernel, **changes)
    ids, mask, positions = make_batch("left")
    wanted = torch.tensor([[11, 0, 3], [6, 6, 8], [1, 5, 11]])
    given = {"attention_mask": mask, "position_ids": positions}
    widths = []
    blocks = model.model.transformer.blocks
    for block in (blocks[0], blocks[-1]):
        block.up_proj.register_forward_hook(lambda _, args, __: widths.append(args[0].shape[1]))
    logits = model(ids, query_positions=wanted, **given).logits
    assert widths == ([L, L] if model.config.logit_shift else [L, 3])
    full = model(ids, **given).logits
    assert_close(logits, full[torch.arange(B)[:, None], wanted], atol=1e-5, rtol=0)


@torch.no_grad()
def test_rows_and_logits_to_keep_give_those_logits():
    model = make_model()
    ids, mask, _ = make_batch("right")
    full = model(ids, attention_mask=mask).logits
    rows = torch.tensor([0, 35, 13, 13])
    assert_close(
        model(ids, attention_mask=mask, rows=rows).logits, full.flatten(0, 1)[rows], atol=1e-5, rtol=0
    )
    kept = model(ids, attention_mask=mask, logits_to_keep=2).logits
    assert_close(kept, full[:, -2:], atol=1e-5, rtol=0)
    embedded = model(inputs_embeds=model.get_input_embeddings()(ids), attention_mask=mask).logits
    assert torch.equal(embedded, full)


@pytest.mark.parametrize("changes", [{}, {"weight_tying": True}, {"logit_shift": True}])
def test_scored_rows_have_the_plain_loss_and_gradients(changes):
    model = make_model(**changes).train()
    ids, mask, _ = make_batch("right")
    rows, weights = (
        mask.flatten().nonzero()[::2, 0],
        torch.rand(14, generator=torch.Generator().manual_seed(0)),
    )
    targets = ids.flatten()[rows]

    logits = model(ids, attention_mask=mask).logits.flatten(0, 1)[rows]
    expected_nll = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    expected = (expected_nll * weights).sum()
    expected.backward()
    expected_grads = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    output = model(ids, attention_mask=mask, rows=rows, targets=targets, weights=weights)
    output.loss.backward()
    assert output.logits is None and not output.nll.requires_grad
    assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    assert_close(output.nll, expected_nll.detach(), atol=1e-5, rtol=1e-5)
    for name, p in model.named_parameters():
        assert_close(p.grad, expected_grads[name], atol=1e-5, rtol=1e-4, msg=name)


def test_no_rows_run_a_backward_through_every_parameter():
    model = make_model().train()
    ids, _, _ = make_batch()
    none = torch.empty(0, dtype=torch.long)
    output = model(ids, rows=none, targets=none, weights=torch.empty(0))
    output.loss.backward()
    assert output.loss.item() == 0.0 and output.nll.shape == (0,)
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


class LargestLogits(TorchDispatchMode):
    """Remembers how many rows the largest tensor as wide as the head had."""

    rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        for x in output if isinstance(output, tuple | list) else (output,):
            if isinstance(x, torch.Tensor) and x.dim() and x.shape[-1] == 1000:
                self.rows = max(self.rows, x.numel() // 1000)
        return output


def test_scoring_never_forms_logits_of_all_rows(monkeypatch):
    monkeypatch.setattr("modelling_final.loss_llada.MIN_CHUNK", 5)
    monkeypatch.setattr("modelling_final.loss_llada.MAX_CHUNK", 5)
    # d_model below the chunk, because a transposed head is as wide as logits
    model = make_model(d_model=4, n_heads=1, n_kv_heads=1, vocab_size=1000, embedding_size=1000)
    ids, _, _ = make_batch()
    with LargestLogits() as largest:
        model(ids, rows=torch.arange(30), targets=ids.flatten()[:30]).loss.backward()
    assert largest.rows == 5


@pytest.mark.parametrize("changes", [{}, {"logit_shift": True}])
def test_labels_are_scored_unshifted_as_for_masked_language_models(changes):
    model = make_model(**changes)
    ids, mask, _ = make_batch("right")
    labels = torch.where((torch.arange(L) % 3 == 0) & mask.bool(), ids, -100)
    logits = model(ids, attention_mask=mask).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    output = model(ids, attention_mask=mask, labels=labels)
    assert_close(output.loss, expected, atol=1e-5, rtol=1e-5)
    assert output.logits is None
    assert model(ids, labels=torch.full_like(ids, -100)).loss.item() == 0.0


@torch.no_grad()
def test_logit_shift_moves_rows_one_to_the_right():
    plain = make_model()
    shifted = clone(plain, logit_shift=True)
    ids, _, _ = make_batch()
    logits = plain(ids).logits
    expected = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    assert_close(shifted(ids).logits, expected, atol=1e-6, rtol=0)
    rows = torch.tensor([0, 1, 12, 13, 35])
    assert_close(shifted(ids, rows=rows).logits, expected.flatten(0, 1)[rows], atol=1e-6, rtol=0)


def test_contradicting_arguments_are_refused():
    model = make_model()
    ids, _, _ = make_batch()
    rows = torch.arange(3)
    with pytest.raises(ValueError, match="choose rows; give one of them"):
        model(ids, rows=rows, query_positions=torch.zeros(B, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="choose rows; give one of them"):
        model(ids, labels=ids, logits_to_keep=1)
    with pytest.raises(ValueError, match="targets need rows"):
        model(ids, targets=rows)
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        model(ids, inputs_embeds=torch.zeros(B, L, 32))
    with pytest.raises(ValueError, match=r"position_ids must have shape \(1 or 3, 12\), got \(1, 5\)"):
        model(ids, position_ids=torch.arange(5)[None])
    with pytest.raises(ValueError, match="output_attentions needs attn_implementation='eager'"):
        model(ids, output_attentions=True)
    with pytest.raises(TypeError, match="attention_masks"):
        model(ids, attention_masks=None)


@torch.no_grad()
def test_hidden_states_and_attentions_are_captured_without_new_keys():
    model = make_model(kernel="eager")
    ids, mask, _ = make_batch("right")
    keys = list(model.state_dict())
    output = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert_close(output.attentions[0].sum(-1), torch.ones(B, 4, L))
    assert not output.attentions[2][1, :, :, 7:].any()
    assert_close(model.get_output_embeddings()(output.hidden_states[-1]), output.logits)
    assert list(model.state_dict()) == keys
    logits, hidden_states = model(ids, attention_mask=mask, return_dict=False, output_hidden_states=True)
    assert torch.equal(logits, output.logits) and len(hidden_states) == 4


def test_activation_checkpointing_keeps_loss_and_gradients():
    model = make_model(weight_tying=True).train()
    ids, mask, _ = make_batch("right")
    rows = mask.flatten().nonzero()[:, 0]
    grads = []
    for is_checkpointed in (False, True):
        if is_checkpointed:
            model.activation_checkpointing_enable()
            assert all(block.gradient_checkpointing for block in model.model.transformer.blocks)
        model.zero_grad()
        model(ids, attention_mask=mask, rows=rows, targets=ids.flatten()[rows]).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_bfloat16_and_autocast_stay_close_to_float32():
    model = make_model().train()
    ids, mask, _ = make_batch("left")
    rows = mask.flatten().nonzero()[:, 0]
    given = {"attention_mask": mask, "rows": rows, "targets": ids.flatten()[rows]}
    exact = model(ids, **given)
    exact.loss.backward()
    grad = model.model.transformer.blocks[0].q_proj.weight.grad.clone()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(ids, **given)
    output.loss.backward()
    assert output.loss.dtype == output.nll.dtype == torch.float32
    assert output.loss.item() == pytest.approx(exact.loss.item(), rel=0.01)
    q_grad = model.model.transformer.blocks[0].q_proj.weight.grad
    assert q_grad.dtype == torch.float32 and (q_grad - grad).norm() / grad.norm() < 0.05


def test_mitchell_initialisation():
    model = make_model(d_model=128, n_layers=2, mlp_hidden_size=256, vocab_size=1000, embedding_size=1000)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
            continue
        sigma = p.shape[1] ** -0.5
        if "attn_out" in name or (".ff_out" in name and "blocks" in name):
            sigma /= math.sqrt(2 * (int(name.split(".")[3]) + 1))
        assert p.abs().max() <= 3 * sigma, name
        # std of a normal cut at 3 sigma is 0.9866 sigma; standard error < 0.6 % for n >= 16384
        assert p.std().item() == pytest.approx(0.9866 * sigma, rel=0.03), name
    assert torch.equal(
        make_model().state_dict()["model.transformer.wte.weight"], make_model().get_input_embeddings().weight
    )
    normal = make_model(init_fn="normal", init_std=0.5, d_model=128)
    assert normal.get_input_embeddings().weight.std().item() == pytest.approx(0.5, rel=0.05)


def test_dropouts_act_in_training_only():
    ids, _, _ = make_batch()
    for name in ("attention_dropout", "embedding_dropout", "residual_dropout"):
        model = make_model(**{name: 0.5})
        assert torch.equal(model(ids).logits, make_model()(ids).logits)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            assert not torch.equal(model.train()(ids).logits, model.eval()(ids).logits)
