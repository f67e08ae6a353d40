"""`import llada`: load, generate, stream; and what the docs page of it prints."""

import subprocess
import sys

import pytest

import llada
from conftest import ROOT

SETTINGS = {"gen_length": 16, "block_length": 4}


@pytest.fixture(scope="module")
def loaded(model_dir):
    return llada.load(str(model_dir))


def test_importing_llada_does_not_load_torch():
    code = "import sys, llada; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_generate_gives_the_text_of_the_models_answers(loaded):
    model, tokenizer = loaded
    messages = [{"role": "user", "content": "two"}]
    texts = llada.generate(model, tokenizer, ["one", messages], **SETTINGS)
    assert llada.generate(model, tokenizer, "one", **SETTINGS) == texts[0]
    assert llada.generate(model, tokenizer, "two", **SETTINGS) == texts[1]
    plain = llada.generate(model, tokenizer, "one", chat=False, **SETTINGS)
    ids = tokenizer("one", add_special_tokens=False).input_ids
    (answer,) = model.generate([ids], return_dict_in_generate=True, **SETTINGS).completions
    assert plain == tokenizer.decode(answer, skip_special_tokens=True)


def test_stream_gives_the_same_text_block_by_block(loaded):
    model, tokenizer = loaded
    pieces = list(llada.stream(model, tokenizer, "one", **SETTINGS))
    assert "".join(pieces) == llada.generate(model, tokenizer, "one", **SETTINGS)
    assert len(pieces) > 1


def test_what_is_wrong_is_said_where_the_stream_is_read(loaded):
    model, tokenizer = loaded
    with pytest.raises(ValueError, match="empty"):
        list(llada.stream(model, tokenizer, "", chat=False, **SETTINGS))
    with pytest.raises(ValueError, match="did you mean 'gen_length'"):
        list(llada.stream(model, tokenizer, "one", gen_lenght=4))
