"""`model.generate` as transformers' users call it: their names, their defaults, their streamers and stops."""

from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig, MaxLengthCriteria, StoppingCriteria, TextStreamer

from llada.models.checkpoints import load_model
from llada.models.tokens import load_tokenizer
from modelling_final import LLaDAGenerateOutput
from modelling_final.generation_llada import generate
from modelling_final.remasking_llada import keep_likeliest
from peaked_llada import PROMPTS, peaked_model

IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.fixture(scope="module")
def model():
    return peaked_model()


def test_a_tensor_by_default_and_the_rich_output_on_request(model):
    ids = model.generate(IDS, max_new_tokens=6)
    assert ids.shape == (1, 10) and torch.equal(ids[:, :4], IDS)
    rich = model.generate(input_ids=IDS, max_new_tokens=6, return_dict_in_generate=True)
    assert isinstance(rich, LLaDAGenerateOutput) and torch.equal(rich.sequences, ids)
    config = GenerationConfig(max_new_tokens=6, return_dict_in_generate=True)
    assert torch.equal(model.generate(IDS, config).sequences, ids)
    with pytest.raises(ValueError, match="needs the prompts: give input_ids"):
        model.generate(max_new_tokens=6)


def test_lengths(model):
    assert model.generate(IDS, max_length=10).shape == (1, 10)
    assert model.generate(IDS, GenerationConfig(max_length=9)).shape == (1, 9)
    assert model.generate(IDS, GenerationConfig(max_length=9, max_new_tokens=2)).shape == (1, 6)
    assert model.generate(IDS, GenerationConfig(max_length=9), max_new_tokens=3).shape == (1, 7)
    assert model.generate(IDS, GenerationConfig(max_new_tokens=3), max_length=9).shape == (1, 9)
    with pytest.raises(ValueError, match="max_length 4 leaves no room behind prompts of 4 tokens"):
        model.generate(IDS, max_length=4)


def test_do_sample_decides_whether_tokens_are_drawn(model):
    greedy = model.generate(IDS, max_new_tokens=12)
    for quiet in ({"do_sample": False}, {"do_sample": False, "temperature": 5.0, "top_k": 3, "top_p": 0.9}):
        assert torch.equal(model.generate(IDS, max_new_tokens=12, **quiet), greedy)
    hot = {"do_sample": True, "temperature": 50.0, "max_new_tokens": 12}
    torch.manual_seed(0)
    first, second = model.generate(IDS, **hot), model.generate(IDS, **hot)
    assert not torch.equal(first, second)  # as in transformers: from torch's generator
    torch.manual_seed(0)
    assert torch.equal(model.generate(IDS, **hot), first)
    named = [model.generate(IDS, **hot, seed=3) for _ in range(2)]
    assert torch.equal(*named)
    several = model.generate(IDS, **hot, num_return_sequences=3)
    assert several.shape == (3, 16) and not torch.equal(several[0], several[1])
    assert torch.equal(model.generate(IDS, **hot | {"top_k": 1}), greedy)


def test_the_cut_distribution_is_transformers_own():
    from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 30, generator=torch.Generator().manual_seed(0))
    for top_k, top_p in ((5, 1.0), (0, 0.7), (8, 0.6), (0, 1e-6)):
        warpers = [TopKLogitsWarper(top_k)] if top_k else []
        warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
        expected = LogitsProcessorList(warpers)(None, logits)
        assert torch.equal(keep_likeliest(logits, top_k, top_p), expected), (top_k, top_p)


def test_scores_are_the_logits_each_token_was_decided_from(model):
    settings = {"max_new_tokens": 6, "eos_token_id": None, "return_dict_in_generate": True}
    rich = model.generate(IDS, **settings, output_scores=True)
    assert len(rich.scores) == 6 and rich.scores[0].shape == (1, model.config.embedding_size)
    scores = torch.stack(rich.scores, dim=1)
    scores[..., model.config.mask_token_id] = -torch.inf  # never chosen
    assert torch.equal(scores.argmax(-1), rich.sequences[:, 4:])
    assert model.generate(IDS, **settings).scores is None


def test_named_ids_end_and_pad_an_answer(model):
    answer = model.generate(IDS, max_new_tokens=8, eos_token_id=None)[0, 4:].tolist()
    end = answer[3]
    first = answer.index(end)
    for named in (end, [end]):
        cut = model.generate(IDS, max_new_tokens=8, eos_token_id=named, pad_token_id=38)[0, 4:].tolist()
        assert cut == answer[: first + 1] + [38] * (7 - first)
    config = GenerationConfig(max_new_tokens=8, eos_token_id=end)
    rich = generate(model, IDS, generation_config=config)
    assert rich.completions == [answer[:first]]


class After(StoppingCriteria):
    """Fulfilled behind the n-th answer token."""

    def __init__(self, length):
        self.length, self.asked = length, []

    def __call__(self, input_ids, scores, **_):
        self.asked.append(input_ids.shape[1])
        return torch.tensor([input_ids.shape[1] >= self.length])


def test_stopping_criteria_cut_where_they_are_fulfilled_and_save_the_rest(model):
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": None}
    whole = generate(model, IDS, **settings)
    criterion = After(4 + 6)
    rich = generate(model, IDS, **settings, stopping_criteria=[criterion])
    assert torch.equal(rich.sequences[:, :10], whole.sequences[:, :10])
    assert rich.completions == [whole.completions[0][:6]] and rich.lengths.tolist() == [6]
    assert (rich.sequences[0, 10:] == model.config.pad_token_id).all()
    assert criterion.asked == [5, 6, 7, 8, 9, 10] and rich.forwards < whole.forwards
    batch = generate(model, PROMPTS, **settings, stopping_criteria=[MaxLengthCriteria(8)])
    assert batch.lengths.tolist() == [8 - len(prompt) for prompt in PROMPTS]


class Collect:
    def __init__(self):
        self.values, self.is_done = [], False

    def put(self, value):
        self.values.append(value.flatten().tolist())

    def end(self):
        self.is_done = True


@pytest.mark.parametrize(
    "settings", [{}, {"remdm": "cap", "steps": 24}, {"parallel_decoding": "threshold", "threshold": 0.1}]
)
def test_a_streamer_gets_the_prompt_and_then_the_answer_in_order(model, settings):
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": None, **settings}
    streamer = Collect()
    ids = model.generate(IDS, streamer=streamer, **settings)
    assert streamer.is_done and streamer.values[0] == IDS[0].tolist()
    assert [token for value in streamer.values[1:] for token in value] == ids[0, 4:].tolist()
    answer = ids[0, 4:].tolist()
    streamer = Collect()
    model.generate(IDS, streamer=streamer, **settings | {"eos_token_id": answer[2]})
    assert streamer.values[-1] == [answer[2]]  # the end is shown, and nothing behind it
    with pytest.raises(ValueError, match="a streamer shows one answer, and 3 are asked for"):
        model.generate(PROMPTS, streamer=Collect(), **settings)


def test_hidden_tokens_are_as_if_they_were_not_there(model):
    whole = torch.tensor([[5, 9, 6, 7, 8]])
    mask = torch.tensor([[1, 0, 1, 1, 1]])
    ids = model.generate(whole, attention_mask=mask, max_new_tokens=6)
    assert torch.equal(ids[:, :5], whole)
    assert torch.equal(ids[:, 5:], model.generate(IDS, max_new_tokens=6)[:, 4:])


def test_text_goes_in_and_out(model_dir, capsys):
    model, tokenizer = load_model(str(model_dir)), load_tokenizer(str(model_dir))
    inputs = tokenizer(["12 + 3"], return_tensors="pt", return_token_type_ids=False)
    answer = model.generate(**inputs, max_new_tokens=8, streamer=TextStreamer(tokenizer), eos_token_id=None)
    assert tokenizer.decode(answer[0]).strip() == capsys.readouterr().out.strip()
    text = tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :])
    stop = model.generate(
        **inputs, max_new_tokens=8, stop_strings=text[:3], tokenizer=tokenizer, eos_token_id=None
    )
    kept = stop[0, inputs["input_ids"].shape[1] :].tolist()
    kept = [token for token in kept if token != model.config.pad_token_id]
    assert tokenizer.decode(kept).startswith(text[:3]) and len(kept) < 8


def test_each_row_may_have_its_own_adapter():
    """peft's adapter_names: one for every row, also where some answers end before the others."""
    model, ids = peaked_model(), torch.tensor([[5, 6, 7, 8], [9, 8, 7, 6], [5, 5, 7, 7]])
    adapter = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(**adapter), adapter_name="one").eval()
    adapted.add_adapter("two", LoraConfig(**adapter))
    settings = {"max_new_tokens": 12, "block_length": 4, "eos_token_id": 1, "pad_token_id": 0}
    names = ("__base__", "one", "two")
    mixed = adapted.generate(input_ids=ids, adapter_names=list(names), **settings)
    for row, name in enumerate(names):
        with adapted.disable_adapter() if name == "__base__" else nullcontext():
            adapted.set_adapter("one" if name == "__base__" else name)
            assert torch.equal(adapted.generate(input_ids=ids[row : row + 1], **settings)[0], mixed[row])
    assert len(set((mixed == 0).sum(dim=1).tolist())) > 1
