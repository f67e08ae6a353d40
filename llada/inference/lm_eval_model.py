"""`llada_dist`: a LLaDA checkpoint as a model of lm_eval; importing this file registers the name."""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Sequence
from functools import partial
from math import fsum
from typing import Any, ClassVar

from jinja2 import TemplateError
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, simple_parse_args_string

from llada.data.final_answer import opens_thought
from llada.diffusion.likelihood import Request
from llada.inference.eval_args import parse_model_args
from llada.inference.eval_worker import EvalRank, Generation
from llada.models.tokens import load_tokenizer

log = logging.getLogger("lm_eval.llada")
ANSWER_AT_ONCE = "<think>\n\n</think>\n\n"
TASK_SETTINGS = {"until", "do_sample", "temperature", "max_gen_toks", "max_length"}
DEFAULT_TOKENS = 256  # lm_eval's own default


@register_model("llada_dist")
class LLaDADist(TemplateLM):
    """A LLaDA checkpoint behind lm_eval's model interface; only rank 0 has an object of this class."""

    # One process for lm_eval, whatever the ranks: its own sharding draws other few-shot examples.
    latest: ClassVar["LLaDADist | None"] = None  # lm_eval builds the model itself and does not hand it out

    def __init__(self, worker: EvalRank) -> None:
        super().__init__()
        self.worker, self.args, self.log = worker, worker.args, worker.log
        self.tokenizer = worker.tokenizer
        self.max_length = worker.args.max_length or worker.model.config.max_sequence_length
        self._num_truncated = 0
        self.errors: dict[str, list[float | None]] = {}  # task -> standard error of each likelihood
        self._errors: list[float | None] = []  # of the latest call
        self._warned: set[str] = set()
        if self.args.add_bos_token and self.tokenizer.bos_token_id is None:
            raise ValueError("--model_args add_bos_token=True: the tokenizer has no BOS token")
        LLaDADist.latest = self

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "LLaDADist":
        """The model from --model_args and lm_eval's own --batch_size and --device."""
        return cls(EvalRank(parse_model_args(with_flags(arg_dict, additional_config or {}))))

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "LLaDADist":
        """As `create_from_arg_obj`, from "name=value,name=value"."""
        return cls.create_from_arg_obj(simple_parse_args_string(arg_string), additional_config)

    # Text and tokens

    @property
    def eot_token_id(self) -> int:
        """EOS, by lm_eval's name for it."""
        return self.worker.ids.eos

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without context: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.worker.ids.eos if bos is None else bos

    @property
    def tokenizer_name(self) -> str:
        """For lm_eval's cache of requests."""
        return self.args.model_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one string, ending where the assistant starts to speak."""
        if self.tokenizer.chat_template is None:
            self.tokenizer = load_tokenizer(self.args.model_path, chat=True, mask_token_id=self.args.mask_id)
        render = partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        if chat_history[0]["role"] == "system":
            try:
                text = render(chat_history)
            except TemplateError:  # "System role not supported"
                text = ""
            if chat_history[0]["content"].strip() in text:
                return text
            self._warn_once("the chat template has no system role: its text goes into the first user turn")
            system, first, *rest = chat_history
            joined = f"{system['content'].strip()}\n\n{first['content']}"
            chat_history = [{**first, "content": joined}, *rest]
        return render(chat_history)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids. By default the tokenizer adds what it always adds, except a second BOS."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        token_ids = self.tokenizer(string, add_special_tokens=add_special_tokens)["input_ids"]
        bos_id = self.tokenizer.bos_token_id
        if self.args.add_bos_token and add_special_tokens and token_ids[:1] != [bos_id]:
            token_ids = [bos_id, *token_ids]
        return token_ids

    def _fit(self, context: Sequence[int], num_new: int) -> tuple[int, ...]:
        """The context without what does not fit before `num_new` tokens; its start is cut, and counted."""
        room = self.max_length - num_new
        if room < 0:
            raise ValueError(
                f"--model_args max_length={self.max_length}: no room for an answer of {num_new} tokens"
            )
        if len(context) <= room:
            return tuple(context)
        self._num_truncated += 1
        return tuple(context[len(context) - room :])

    def _report_truncated(self, num_requests: int) -> None:
        if self._num_truncated:
            log.warning(
                "%d of %d contexts do not fit into max_length=%d and lose their start",
                self._num_truncated,
                num_requests,
                self.max_length,
            )
        self._num_truncated = 0

    # Likelihoods

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """lm_eval's, and what is known of the noise of each task's likelihoods."""
        values = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        for request, error in zip(requests, self._errors, strict=True):
            self.errors.setdefault(request.task_name or "", []).append(error)
        return values

    def describe_errors(self) -> str:
        """The likelihoods' Monte-Carlo standard errors as a Markdown table, or ""."""
        lines = ["|task|likelihoods|standard error in nats, mean|largest|", "|---|---|---|---|"]
        for task, errors in self.errors.items():
            known = [error for error in errors if error is not None]
            mean, largest = (f"{fsum(known) / len(known):.3f}", f"{max(known):.3f}") if known else ("-", "-")
            lines.append(f"|{task}|{len(errors)}|{mean}|{largest}|")
        return "\n".join(lines) if self.errors else ""

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[tuple[str, str], list[int], list[int]]],
        disable_tqdm: bool = False,
    ) -> list[tuple[float, bool]]:
        items = []
        for _, context, answer in requests:
            # Answers to one question share their masks: the difference between two choices is less noisy.
            draw = hashlib.sha256(json.dumps(context).encode()).hexdigest()
            items.append(Request(self._fit(context, len(answer)), tuple(answer), draw))
        self._report_truncated(len(items))
        found = self._compute("likelihood", items)
        values, self._errors = [value for value, _ in found], [error for _, error in found]
        greedy = self._compute("greedy", items) if self.args.is_check_greedy else [False] * len(items)
        return list(zip(values, greedy, strict=True))

    def _compute(self, kind: str, items: Sequence[Any], keys: list[str] | None = None) -> list[Any]:
        """The results of the items; those of one key are computed once."""
        keys = keys or [self.log.key(kind, item) for item in items]
        results = self.worker.compute(kind, dict(zip(keys, items, strict=True)))
        found = dict(zip(dict.fromkeys(keys), results, strict=True))
        return [found[key] for key in keys]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log-likelihood of whole texts, in disjoint windows that follow each other."""
        pieces, owners = [], []
        for owner, (text,) in enumerate(request.args for request in requests):
            # one token of context before each window, as in lm_eval's own models
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
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            totals[owner] += value
        return totals

    # Answers

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The answers, each cut at EOS or EoT and then at its first `until` string."""
        seen: Counter[str] = Counter()
        keys, prompts = [], []
        for request in requests:
            context, task_settings = request.args
            text, hole = context, task_settings.get("hole")
            if not self.args.use_thinking:
                text += "\n</think>\n\n" if opens_thought(context) else ANSWER_AT_ONCE
            token_ids = self.tok_encode(text) or [self.prefix_token_id]
            length, until, settings = self._settings(task_settings, len(token_ids))
            suffix_ids = tuple(self.tok_encode(hole["suffix"], add_special_tokens=False)) if hole else ()
            token_ids = self._fit(token_ids, settings["gen_length"] + len(suffix_ids))
            prompt = Generation(text, token_ids, until, length, settings, suffix_ids)
            base = self.log.key("answer", prompt if suffix_ids else prompt[:-1])
            # repeats of one prompt differ only where tokens are drawn
            repeat = seen[base] if settings["temperature"] > 0 else 0
            seen[base] += 1
            keys.append(self.log.key("answer", [prompt, repeat]))
            prompts.append(prompt)
        self._report_truncated(len(prompts))
        return self._compute("answer", prompts, keys)

    def _settings(
        self, task_settings: dict[str, Any], num_context: int = 0
    ) -> tuple[int, tuple[str, ...], dict[str, Any]]:
        """(tokens of the answer, its stop strings, the sampler's settings): --model_args, then the task."""
        task_settings = dict(task_settings)
        hole = task_settings.pop("hole", None)
        args, asked = self.args, normalize_gen_kwargs(task_settings, DEFAULT_TOKENS)
        if ignored := sorted(set(asked) - TASK_SETTINGS):
            self._warn_once(f"the task's generation_kwargs {', '.join(ignored)} mean nothing to this sampler")
        # of transformers' making: the whole sequence, prompt and all
        whole = asked.get("max_length")
        length = args.gen_length or (asked["max_gen_toks"] if whole is None else whole - num_context)
        if length < 1:
            raise ValueError(
                f"the task's max_length {whole} leaves no room behind {num_context} prompt tokens"
            )
        if hole and args.gen_length is None:  # as many masks as the text that was taken out has tokens
            length = max(1, len(self.tok_encode(hole["text"], add_special_tokens=False)))
        block = args.block_length or length
        canvas = length + -length % block  # whole blocks; what lies behind the answer is cut off again
        steps = min(args.steps or canvas, canvas)
        steps += -steps % (canvas // block)  # as many in every block
        if steps not in (args.steps, canvas):
            self._warn_once(f"steps={args.steps} become {steps} for an answer of {length} tokens")
        temperature = asked.get("temperature", 0.0) if args.temperature is None else args.temperature
        settings = {
            "gen_length": canvas,
            "steps": steps,
            "block_length": block,
            "temperature": float(temperature),
        }
        if hole:  # is filled to its end: what stands behind it follows at once
            length = canvas
            settings |= {"early_stop": False, "logits_eos_inf": True}
        self.worker.sampler(settings).steps_per_block(canvas)  # a mistake is told before any work
        return length, tuple(asked["until"]), settings

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            log.warning("%s", message)


def with_flags(model_args: dict[str, Any], flags: dict[str, Any]) -> dict[str, Any]:
    """--model_args, and what lm_eval's own --batch_size and --device add where they are silent."""
    values = dict(model_args)
    if str(flags.get("batch_size")).isdigit():
        values.setdefault("batch_size", int(flags["batch_size"]))
    # lm_eval's default is cuda:0, on machines without a GPU and for every rank alike
    if flags.get("device") not in (None, "cuda:0", "cuda"):
        values.setdefault("device", flags["device"])
    if values.get("device") == "cuda":
        values["device"] = None
    return values
