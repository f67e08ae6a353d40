"""`llada_dist`: a LLaDA checkpoint as a model of lm_eval; eval/eval_llada.py is its command line.

Importing this file registers the name with lm_eval. Requests are sharded over the ranks by lm_eval itself; a
request's masks and samples are keyed by what it asks, so the number of ranks and the batch size change
nothing but rounding.
"""

import dataclasses
import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string
from tqdm import tqdm

from llada.config import flag, parse
from llada.likelihood import KINDS, Request, iter_greedy, iter_scores
from llada.mask_plan import ESTIMATORS, EXACT_TOKENS
from llada.model import load_model, load_tokenizer, resolve_checkpoint, special_ids
from llada.request_log import RequestLog
from llada.runtime import start_run
from modelling_final import LLaDAGenerationConfig

T = TypeVar("T")
log = logging.getLogger("lm_eval.llada")
THINK_END = "</think>"
ANSWER_AT_ONCE = "<think>\n\n</think>\n\n"
# A rank may finish hours before the slowest one; the default timeout of a process group is half an hour.
PATIENCE = timedelta(days=7)
# Arguments that do not change a result: a run may continue with others.
# Arguments that go to the sampler under their own names; the others depend on the task.
SAMPLER_ARGS = (
    *("method", "remasking", "logits_eos_inf", "confidence_eos_eot_inf", "early_stop", "repetition_penalty"),
    *("parallel_decoding", "threshold", "factor", "entropy_bound", "klass_kl", "klass_steps"),
    *("cache", "cache_refresh_interval", "remdm", "remdm_eta"),
)
NO_EFFECT = ("batch_size", "generate_batch_size", "device", "record_dir", "mask_id")


@dataclass
class ModelArgs:
    """The names that --model_args takes."""

    model_path: str = flag(help="Checkpoint folder, run folder, LoRA adapter folder or hub name.")
    adapter_path: str | None = flag(None, help="LoRA adapter to put on the model.")
    load_lora: bool | None = flag(None, help="True: adapter_path is required; False: it is ignored.")
    dtype: str = flag("auto", help="Of the weights: float32, bfloat16, float16, or auto (as saved).")
    attn_implementation: str | None = flag(None, help="Attention kernel by transformers' name.")
    device: str | None = flag(None, help="cpu, cuda, cuda:1; default the GPU of this rank, else the CPU.")
    mask_id: int | None = flag(None, help="Only checked: it must be the model's own mask token.")
    max_length: int | None = flag(
        None, help="Longest sequence; default the model's. Contexts lose their start."
    )
    seed: int = flag(0, help="Of masks and of sampling; every request has its own stream.")
    record_dir: str | None = flag(None, help="Folder of finished requests; default OUTPUT_PATH/requests.")
    # likelihood
    batch_size: int | None = flag(None, help="Sequences per forward of likelihoods; default 32.")
    likelihood: str = flag(
        "elbo", choices=KINDS, help="What a log-likelihood means; see llada/likelihood.py."
    )
    mc_num: int = flag(128, help="Masks per answer.")
    estimator: str = flag(
        "stratified", choices=ESTIMATORS, help="`reference` is the published, slightly biased one."
    )
    reference_batch: int = flag(8, help="--batch_size of the published run, on which `reference` depends.")
    exact_tokens: int = flag(EXACT_TOKENS, help="Answers up to this length are summed over every mask.")
    is_check_greedy: bool = flag(True, help="Also report whether greedy decoding gives the answer.")
    cfg: float = flag(0.0, help="Classifier-free guidance scale, of likelihoods and of generation.")
    # generation
    gen_length: int | None = flag(None, help="Answer tokens; default the task's max_gen_toks, else 256.")
    steps: int | None = flag(None, help="Denoising steps; default gen_length, one token a step.")
    block_length: int | None = flag(None, help="Tokens per block; default gen_length, one block.")
    remasking: str = flag("low_confidence", help="low_confidence or random.")
    temperature: float | None = flag(None, help="Default the task's, else 0.")
    repetition_penalty: float = flag(1.0, help="Above 1: repeated tokens become less likely.")
    logits_eos_inf: bool = flag(False, help="Never produce EOS.")
    confidence_eos_eot_inf: bool = flag(False, help="Reveal EOS and EoT last.")
    early_stop: bool = flag(True, help="Stop when all before a revealed EOS is decided; the same text.")
    generate_batch_size: int | None = flag(
        None, help="Prompts generated together; default batch_size, else 8."
    )
    method: str = flag("semi_autoregressive_padding", help="As in LLaDAGenerationConfig, like all that follow.")
    parallel_decoding: str = flag("none", help="none, or approximate: threshold, factor, entropy, klass.")
    threshold: float = flag(0.9, help="Confidence that threshold and klass ask for.")
    factor: float = flag(1.0, help="Bound of the factor rule.")
    entropy_bound: float = flag(0.1, help="Bound of the entropy rule, in nats.")
    klass_kl: float = flag(0.01, help="Bound of the klass rule, in nats.")
    klass_steps: int = flag(2, help="Steps for which the klass rule asks stability.")
    cache: str = flag("none", help="none, or approximate: prefix, dual.")
    cache_refresh_interval: int = flag(0, help="Steps between recomputations of the cache; 0: once a block.")
    remdm: str = flag("none", help="none, or approximate: cap, rescale, conf.")
    remdm_eta: float = flag(0.04, help="Strength of ReMDM remasking.")
    use_thinking: bool = flag(True, help="False: the answer starts with an empty <think></think>.")


def parse_model_args(values: dict[str, Any]) -> ModelArgs:
    """The checked model arguments; as `llada.config.parse`, so an unknown name is answered with the nearest
    one.

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


def _fingerprint(folder: str) -> list[list[Any]]:
    """What identifies a checkpoint's files: a retrained model under an old path is another model."""
    path = Path(folder)
    if not path.is_dir():
        return [[folder]]
    return [[f.name, f.stat().st_size, f.stat().st_mtime_ns] for f in sorted(path.iterdir()) if f.is_file()]


@register_model("llada_dist")
class LLaDADist(TemplateLM):
    """A LLaDA checkpoint behind lm_eval's model interface; one object per rank."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.run = start_run(args.device)
        self._rank, self._world_size = self.run.rank, self.run.world_size
        # Counts and results travel on the CPU, whatever the device of the model.
        self._group = dist.new_group(backend="gloo", timeout=PATIENCE) if self.run.world_size > 1 else None
        self.tokenizer = load_tokenizer(args.model_path)
        self.model = load_model(
            args.model_path,
            dtype=args.dtype,
            adapter_path=args.adapter_path,
            attn_implementation=args.attn_implementation,
            device=self.run.device,
        ).eval()
        self.ids = special_ids(self.model.config, self.tokenizer)
        if args.mask_id is not None and args.mask_id != self.ids.mask:
            raise ValueError(
                f"--model_args mask_id={args.mask_id}: {args.model_path} has mask_id={self.ids.mask}; "
                "leave it out, it is read from the model"
            )
        self.max_length = args.max_length or self.model.config.max_sequence_length
        self.batch_size = args.batch_size or 32
        self.num_truncated = 0
        self._warned: set[str] = set()
        settings = {k: value for k, value in dataclasses.asdict(args).items() if k not in NO_EFFECT}
        settings["files"] = _fingerprint(resolve_checkpoint(args.model_path))
        if args.adapter_path:
            settings["adapter_files"] = _fingerprint(resolve_checkpoint(args.adapter_path))
        self.log = RequestLog(args.record_dir, settings, self._rank)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LLaDADist":
        """The model from --model_args and lm_eval's own --batch_size and --device, which yield to them."""
        extra = dict(additional_config or {})
        values = dict(arg_dict)
        if isinstance(extra.get("batch_size"), int | str) and str(extra["batch_size"]).isdigit():
            values.setdefault("batch_size", int(extra["batch_size"]))
        # lm_eval's default is cuda:0, on machines without a GPU and for every rank alike
        if extra.get("device") not in (None, "cuda:0", "cuda"):
            values.setdefault("device", extra["device"])
        if values.get("device") == "cuda":
            values["device"] = None
        return cls(parse_model_args(values))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "LLaDADist":
        """As `create_from_arg_obj`, from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # --- between ranks
    # ------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where lm_eval puts the counts that it gathers: the CPU."""
        return torch.device("cpu")

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """[world_size, ...] flattened to one value per rank."""
        if self._group is None:
            return tensor
        parts = [torch.empty_like(tensor.reshape(-1)) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.reshape(-1), group=self._group)
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """The objects of all ranks on `dst`, None elsewhere."""
        if self._group is None:
            return [obj]
        gathered = [None] * self.world_size if self.rank == dst else None
        dist.gather_object(obj, gathered, dst=dst, group=self._group)
        return gathered

    def barrier(self) -> None:
        """Waits for all ranks."""
        if self._group is not None:
            dist.barrier(group=self._group)

    # --- text and tokens
    # ----------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.ids.eos

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.ids.eos if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        return self.args.model_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one string, ending where the assistant starts to speak."""
        if self.tokenizer.chat_template is None:
            self.tokenizer = load_tokenizer(self.args.model_path, chat=True)
        return self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids. By default the tokenizer adds what it always adds, except a second BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        return self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]

    def _fit(self, context: Sequence[int], num_new: int) -> list[int]:
        """The context without what does not fit before `num_new` tokens; its start is cut, and counted."""
        room = self.max_length - num_new
        if room < 0:
            raise ValueError(
                f"--model_args max_length={self.max_length}: no room for an answer of {num_new} tokens"
            )
        if len(context) > room:
            self.num_truncated += 1
            return list(context[len(context) - room :])
        return list(context)

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            log.warning(message)
        self._warned.add(message)

    def _report_truncated(self) -> None:
        if self.num_truncated:
            log.warning(
                "rank %d: %d contexts were longer than max_length=%d and lost their start",
                self.rank,
                self.num_truncated,
                self.max_length,
            )
        self.num_truncated = 0

    # --- likelihoods
    # --------------------------------------------------------------------------------------------

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        args = self.args
        texts, items = [], []
        for text, context, answer in requests:
            # Answers to one question share their masks: the difference between two choices is less noisy.
            draw = hashlib.sha256(json.dumps(context).encode()).hexdigest()
            texts.append(text)
            items.append(Request(tuple(self._fit(context, len(answer))), tuple(answer), draw))
        self._report_truncated()
        keys = [self.log.key("score", [item.context, item.answer, item.key]) for item in items]
        todo = self._unfinished(keys)
        scores = iter_scores(
            self.model,
            [items[i] for i in todo],
            kind=args.likelihood,
            num_samples=args.mc_num,
            estimator=args.estimator,
            exact_tokens=args.exact_tokens,
            reference_batch=min(args.reference_batch, args.mc_num),
            seed=args.seed,
            batch_size=self.batch_size,
            cfg_scale=args.cfg,
        )
        for index, score in self._progress(scores, "likelihoods", len(todo), disable_tqdm):
            self.log.put(keys[todo[index]], score.log_likelihood, text=texts[todo[index]], **score._asdict())
        values = [self.log.get(key) for key in keys]
        if not args.is_check_greedy:
            return [(value, False) for value in values]
        keys = [self.log.key("greedy", [item.context, item.answer]) for item in items]
        todo = self._unfinished(keys)
        found = iter_greedy(
            self.model, [items[i] for i in todo], batch_size=self.batch_size, cfg_scale=args.cfg
        )
        for index, greedy in self._progress(found, "greedy", len(todo), disable_tqdm):
            self.log.put(keys[todo[index]], greedy, text=texts[todo[index]])
        return [(value, self.log.get(key)) for value, key in zip(values, keys, strict=True)]

    def _unfinished(self, keys: list[str]) -> list[int]:
        """Indices of the requests to compute, each key once."""
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        return sorted(index for key, index in first.items() if self.log.get(key) is None)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in disjoint windows that follow each other.

        A window is max_length - 1 tokens after one token of context, as in lm_eval's own models.
        """
        pieces, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length - 1,
                context_len=1,
            )
            for context, answer in map(make_disjoint_window, windows):
                pieces.append((("", text), context, answer))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pieces, disable_tqdm), strict=True):
            totals[owner] += value
        return totals

    # --- generation
    # ---------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers, each cut at EOS or EoT and then at its first `until` string."""
        seen: Counter[str] = Counter()
        keys, todo = [], {}
        for request in requests:
            context, task_kwargs = request.args
            settings = self._generation_settings(task_kwargs)
            base = self.log.key("generate_until", [context, settings])
            # repeats of one prompt differ only where sampling is random
            repeat = seen[base] if settings["temperature"] > 0 else 0
            seen[base] += 1
            keys.append(self.log.key("generate_until", [context, settings, repeat]))
            if self.log.get(keys[-1]) is None:
                todo[keys[-1]] = (context, settings, repeat)
        done = (item for batch in self._generation_batches(todo) for item in self._generate(batch))
        for key, answer, details in self._progress(done, "answers", len(todo), disable_tqdm):
            self.log.put(key, answer, **details)
        self._report_truncated()
        return [self.log.get(key) for key in keys]

    def _generation_settings(self, task_kwargs: dict[str, Any]) -> dict[str, Any]:
        """What one request asks of the sampler: model_args first, then the task, then defaults."""
        args = self.args
        known = {"until", "do_sample", "temperature", "max_gen_toks"}
        if ignored := sorted(set(task_kwargs) - known):
            self._warn_once(f"the task's generation_kwargs {', '.join(ignored)} mean nothing to this sampler")
        until = task_kwargs.get("until") or []
        gen_length = args.gen_length or int(task_kwargs.get("max_gen_toks", 256))
        temperature = args.temperature
        if temperature is None:
            temperature = (
                float(task_kwargs.get("temperature") or 0.0) if task_kwargs.get("do_sample") else 0.0
            )
        return {
            "until": [until] if isinstance(until, str) else list(until),
            "gen_length": gen_length,
            "steps": args.steps or gen_length,
            "block_length": args.block_length or gen_length,
            "temperature": float(temperature),
        }

    def _sampler(self, settings: dict[str, Any]) -> LLaDAGenerationConfig:
        """The sampler of requests with these settings. ValueError for settings that exclude each other."""
        args = dataclasses.asdict(self.args)
        own = {name: args[name] for name in SAMPLER_ARGS}
        asked = {name: value for name, value in settings.items() if name != "until"}
        return LLaDAGenerationConfig(**own, **asked, cfg_scale=self.args.cfg, seed=self.args.seed)

    def _generation_batches(
        self, todo: dict[str, tuple[str, dict[str, Any], int]]
    ) -> Iterator[list[tuple[str, list[int], str, dict[str, Any]]]]:
        """Lists of (key, prompt ids, prompt, settings), longest prompts first, one kind of settings each."""
        size = self.args.generate_batch_size or self.args.batch_size or 8
        groups: dict[str, list[tuple[str, list[int], str, dict[str, Any]]]] = {}
        for key, (context, settings, _) in todo.items():
            text = context if self.args.use_thinking else context + ANSWER_AT_ONCE
            prompt = self._fit(self.tok_encode(text), settings["gen_length"])
            sampler = json.dumps({name: value for name, value in settings.items() if name != "until"})
            groups.setdefault(sampler, []).append((key, prompt, context, settings))
        for members in groups.values():
            members.sort(key=lambda member: -len(member[1]))
            yield from (members[start : start + size] for start in range(0, len(members), size))

    def _generate(
        self, batch: list[tuple[str, list[int], str, dict[str, Any]]]
    ) -> Iterator[tuple[str, str, dict[str, Any]]]:
        """(key, answer, what the record keeps of it) of each prompt of a batch."""
        settings = batch[0][3]
        output = self.model.generate(
            [prompt for _, prompt, _, _ in batch],
            generation_config=self._sampler(settings),
            # the key names the request, so its draws are the same in any batch and on any rank
            record_ids=[int(key[:15], 16) for key, *_ in batch],
        )
        answers = output.sequences[:, -settings["gen_length"] :].tolist()
        ends = {self.ids.eos, self.ids.eot}
        for (key, _, context, wanted), token_ids in zip(batch, answers, strict=True):
            end = next((i for i, token in enumerate(token_ids) if token in ends), len(token_ids))
            text = self.tokenizer.decode(token_ids[:end], skip_special_tokens=True)
            raw = self.tokenizer.decode(token_ids)
            yield key, cut_answer(text, wanted["until"]), {"prompt": context, "raw": raw, "num_tokens": end}

    def _progress(self, items: Iterable[T], what: str, total: int, disable: bool) -> Iterable[T]:
        """The items, with rate and ETA shown on rank 0."""
        return tqdm(items, desc=what, unit="req", total=total, disable=disable or self.rank != 0)


def cut_answer(text: str, until: Sequence[str]) -> str:
    """The text after the model's thinking, up to the first of the stop strings."""
    text = text.rsplit(THINK_END, 1)[-1]
    cuts = [at for stop in until if stop and (at := text.find(stop)) >= 0]
    return text[: min(cuts)] if cuts else text
