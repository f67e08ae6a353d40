"""The names that `eval_llada.py --model_args` takes. Nothing slow is imported: see llada/flags.py."""

from dataclasses import dataclass
from typing import Any

from llada.diffusion.settings import ESTIMATORS, EXACT_TOKENS, LIKELIHOODS
from llada.flags.parser import flag, parse
from llada.inference.sampler_flags import SamplerFlags


@dataclass(kw_only=True)
class ModelArgs(SamplerFlags):
    """The names that --model_args takes: the sampler's, and these."""

    model_path: str = flag(help="Checkpoint folder, run folder, LoRA adapter folder or hub name.")
    adapter_path: str | None = flag(None, help="LoRA adapter to put on the model.")
    load_lora: bool | None = flag(None, help="True: adapter_path is required; False: it is ignored.")
    dtype: str = flag("auto", help="Of the weights: float32, bfloat16, float16, or auto (as saved).")
    attn_implementation: str | None = flag(None, help="Attention kernel by transformers' name.")
    device: str | None = flag(None, help="cpu, cuda, cuda:1; default the GPU of this rank, else the CPU.")
    mask_id: int | None = flag(None, help="Mask token id of a checkpoint that names none.")
    max_length: int | None = flag(
        None, help="Longest sequence; default the model's. Contexts lose their start."
    )
    record_dir: str | None = flag(None, help="Folder of finished requests; default OUTPUT_PATH/requests.")
    # likelihood
    batch_size: int | None = flag(None, help="Sequences per forward of likelihoods; default 32.")
    likelihood: str = flag(
        "elbo",
        choices=LIKELIHOODS,
        help="What a log-likelihood means; see llada/diffusion/likelihood.py.",
    )
    mc_num: int = flag(128, help="Masks per answer.")
    estimator: str = flag(
        "stratified",
        choices=ESTIMATORS,
        help="`reference` is the published, slightly biased one.",
    )
    reference_batch: int = flag(8, help="--batch_size of the published run, on which `reference` depends.")
    exact_tokens: int = flag(EXACT_TOKENS, help="Answers up to this length are summed over every mask.")
    is_check_greedy: bool = flag(True, help="Also report whether greedy decoding gives the answer.")
    cfg_scale: float = flag(0.0, help="Classifier-free guidance, of likelihoods and of generation.")
    # generation: what the task decides where nothing is given
    gen_length: int | None = flag(None, help="Answer tokens; default the task's max_gen_toks, else 256.")
    block_length: int | None = flag(None, help="Tokens per block; default gen_length, one block.")
    temperature: float | None = flag(None, help="Default the task's, else 0.")
    generate_batch_size: int | None = flag(
        None, help="Prompts generated together; default batch_size, else 8."
    )
    use_thinking: bool = flag(True, help="False: the answer starts with an empty <think></think>.")


def parse_model_args(values: dict[str, Any]) -> ModelArgs:
    """The checked model arguments. An unknown name is answered with the nearest one, as for flags.

    Raises:
        ValueError: load_lora without an adapter.
    """
    renamed = {"model_path" if name == "pretrained" else name: value for name, value in values.items()}
    argv = [f"--{name}={value}" for name, value in renamed.items() if value is not None]
    args = parse(ModelArgs, argv, description="The names that --model_args takes, as name=value,name=value.")
    if args.load_lora and not args.adapter_path:
        raise ValueError("--model_args load_lora=True needs adapter_path=FOLDER")
    if args.load_lora is False:
        args.adapter_path = None
    return args
