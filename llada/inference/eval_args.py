"""The names that `eval_llada.py --model_args` takes. Nothing slow is imported: see llada/flags/parser.py."""

from dataclasses import dataclass
from typing import Any, ClassVar

from llada.diffusion.settings import ESTIMATORS, EXACT_TOKENS, LIKELIHOODS
from llada.flags.parser import flag, parse
from llada.inference.sampler_flags import LoadFlags, SamplerFlags


@dataclass(kw_only=True)
class ModelArgs(LoadFlags, SamplerFlags):
    """The names that --model_args takes: the sampler's, and these."""

    fills_blocks: ClassVar[bool] = True

    model_path: str = flag(
        help="Checkpoint folder, run folder, LoRA adapter folder or hub name.", reads="model"
    )
    load_lora: bool | None = flag(
        None, "True: adapter_path is required; False: it is ignored.", needs="adapter_path"
    )

    device: str | None = flag(None, "cpu, cuda, cuda:1; default the GPU of this rank, else the CPU.")
    mask_id: int | None = flag(None, "Mask token id of a checkpoint that names none.", at_least=0)
    max_length: int | None = flag(
        None, "Longest sequence; default the model's. Contexts lose their start.", at_least=1
    )
    add_bos_token: bool = flag(
        False, "Begin texts with BOS also where the tokenizer does not, as Dream's base model is evaluated."
    )
    record_dir: str | None = flag(
        None, "Folder of finished requests; default OUTPUT_PATH/requests.", writes="folder"
    )
    # likelihood
    batch_size: int | None = flag(
        None, "Sequences a forward of likelihoods; default 32, on a CPU 768 tokens.", at_least=1
    )
    likelihood: str = flag(
        "elbo",
        "What a log-likelihood means; see llada/diffusion/likelihood.py.",
        choices=LIKELIHOODS,
    )
    num_masks: int = flag(128, "Masks per answer.", at_least=1, needs="likelihood=elbo")
    mask_plan: str = flag(
        "stratified",
        "How they are drawn; `reference` is the published, slightly biased way.",
        choices=ESTIMATORS,
        needs="likelihood=elbo",
    )
    reference_batch: int = flag(
        8,
        "--batch_size of the published run, on which `reference` depends.",
        at_least=1,
        needs="mask_plan=reference",
    )
    exact_tokens: int = flag(
        EXACT_TOKENS, "Answers up to this length are summed over every mask.", at_least=0
    )
    is_check_greedy: bool = flag(True, "Also report whether greedy decoding gives the answer.")
    # generation: what the task decides where nothing is given
    gen_length: int | None = flag(None, "Answer tokens; default the task's max_gen_toks, else 256.")
    block_length: int | None = flag(None, "Tokens per block; default gen_length, one block.")
    temperature: float | None = flag(None, "Default the task's, else 0.")
    generate_batch_size: int | None = flag(
        None, "Prompts generated together; default batch_size, else 8.", at_least=1
    )
    use_thinking: bool = flag(True, "False: the answer starts with an empty <think></think>.")

    def check_flags(self) -> None:
        """An adapter that is not asked for."""
        if self.load_lora is False:
            self.adapter_path = None


def parse_model_args(values: dict[str, Any]) -> ModelArgs:
    """The checked model arguments; ValueError as of `parse`."""
    renamed = {"model_path" if name == "pretrained" else name: value for name, value in values.items()}
    argv = [f"--{name}={value}" for name, value in renamed.items() if value is not None]
    return parse(ModelArgs, argv)
