"""Turn an autoregressive Llama-style checkpoint into a LLaDA folder: same weights, a mask token added.

Run:
    python scripts/convert_ar.py --model_name_or_path checkpoints/qwen2.5-0.5b --output_dir checkpoints/start
    python scripts/convert_ar.py --model_name_or_path folder --gguf_file model.Q4_1.gguf --output_dir out
    python scripts/convert_ar.py --model_name_or_path checkpoints/llama --drafter causal --num_layers 4 \\
        --output_dir drafter

Reads a folder or hub name of type llama, mistral, qwen2, qwen3, qwen3_moe or olmoe, or a GGUF of those,
dequantised. What has no place here is refused with the reason. The result loads in every stage, but still
thinks autoregressively: train it before sampling. `--logit_shift` declares that position i of the network
predicts token i+1, as in the source (Dream's way to adapt); without it training moves the prediction (LLaDA's
way). `--drafter causal` keeps the causal mask too: a parallel drafter (PARD), see docs/speculative.md. With
`--attention_block_size N` a token sees its own block of N and those before, instead of the whole text.

The mask token takes the first row after the tokenizer's own; the embedding grows, to a multiple of 64 rows,
where it has no spare one, by rows that are the mean of the others. EOS, padding and chat template stay.
Memory: about one copy of the weights; a GGUF's dequantised tensors come on top while it is read.
"""

from dataclasses import dataclass
from functools import partial
from pathlib import Path

from llada.flags.parser import check_command_line, flag, parse, run_main


@dataclass
class Config:
    """Flags of this script."""

    model_name_or_path: str = flag(help="folder or hub name of the autoregressive checkpoint", reads="model")
    output_dir: str = flag(help="new folder for the LLaDA checkpoint", writes="new folder")
    gguf_file: str | None = flag(
        None, help="name of a GGUF file inside that folder, read instead of safetensors"
    )
    dtype: str = flag(
        "auto",
        help="dtype of the written weights; auto: as in the source",
        choices=["auto", "float32", "bfloat16", "float16"],
    )
    num_layers: int | None = flag(
        None, help="keep only the first N layers (a drafter); default all", at_least=1
    )
    drafter: str | None = flag(
        None,
        help="causal: keep the source's causal form, as a parallel drafter that engines can run beside it",
        choices=["causal"],
    )
    attention_block_size: int | None = flag(
        None,
        help="attention by blocks of so many tokens (block diffusion): a block sees itself and those before",
        at_least=2,
        needs="drafter=None",
    )
    mask_token: str | None = flag(None, help="token of the source that becomes the mask; default a new one")
    logit_shift: bool = flag(False, help="declare that position i of the network predicts token i+1")
    check_tokens: int = flag(
        32, help="after converting, compare logits with the source on this many tokens; 0: no", at_least=0
    )


if __name__ == "__main__":
    check_command_line(Config, __doc__)

import torch
from transformers import PreTrainedModel

from llada.autoregressive.causal_lm import load_causal_lm
from llada.models.causal_layout import convert, refuse_what_llada_lacks
from llada.models.saving import Origin, save_model
from modelling_final import LLaDAModelLM


def main(argv: list[str] | None = None) -> None:
    """Converts, compares with the source, saves."""
    config = parse(Config, argv, description=__doc__)
    output_dir = Path(config.output_dir)
    source, tokenizer = load_causal_lm(
        config.model_name_or_path,
        flag="--model_name_or_path",
        gguf_file=config.gguf_file,
        gguf_flag="--gguf_file",
        dtype=config.dtype,
        check=partial(refuse_what_llada_lacks, num_layers=config.num_layers),
    )
    if config.num_layers is not None:
        source.model.layers = source.model.layers[: config.num_layers]
        source.config.num_hidden_layers = config.num_layers
    model = convert(
        source,
        tokenizer,
        logit_shift=config.logit_shift,
        block_size=1 if config.drafter == "causal" else config.attention_block_size,
        mask_token=config.mask_token,
    )
    if config.check_tokens:
        gap, scale = causal_gap(source, model, num_tokens=config.check_tokens)
        print(
            f"largest logit difference from the source under a causal mask: {gap:.2e} "
            f"of logits up to {scale:.1f} ({model.dtype})"
        )
        # in bfloat16 the two round differently (rotation is float32 here), each about as far from the truth
        allowed = 1e-3 if model.dtype == torch.float32 else 0.1 * scale
        assert gap <= allowed, "the conversion changed the function"
    del source
    origin = Origin("convert_ar.py", config.model_name_or_path)
    save_model(model, tokenizer, output_dir, origin=origin)
    settled = model.config
    print(
        f"{output_dir}: {settled.n_layers} layers, {model.num_parameters() / 1e6:.1f} M parameters, "
        f"{settled.embedding_size} embedding rows; ids: mask {settled.mask_token_id}, "
        f"eos {settled.eos_token_id}, eot {settled.eot_token_id}, pad {settled.pad_token_id}"
    )


@torch.no_grad()
def causal_gap(source: PreTrainedModel, model: LLaDAModelLM, *, num_tokens: int) -> tuple[float, float]:
    """Largest |logit difference| on random tokens, ours under a causal 4-D mask; and the largest |logit|."""
    num_rows = min(source.get_input_embeddings().num_embeddings, model.config.mask_token_id)
    drawn = torch.Generator().manual_seed(0)
    input_ids = torch.randint(num_rows, (1, num_tokens), generator=drawn)  # [B, L]
    # [B, 1, L, L]: ours looks both ways, the source does not
    is_visible = torch.ones(1, 1, num_tokens, num_tokens, dtype=torch.bool).tril()
    theirs = source(input_ids, use_cache=False).logits[..., :num_rows]
    ours = model(input_ids, attention_mask=is_visible).logits[..., :num_rows]
    if model.config.logit_shift:
        theirs, ours = theirs[:, :-1], ours[:, 1:]
    return float((ours.float() - theirs.float()).abs().max()), float(theirs.abs().max())


if __name__ == "__main__":
    run_main(main)
