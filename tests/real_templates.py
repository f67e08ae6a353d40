"""How the chat templates of public models frame a conversation, told in our own words.

Each is (template, special tokens). What matters is kept: headers, ends of turns, white space, default system
messages, thoughts that are taken apart, dropped or opened by the generation prompt, roles that are refused.
"""

SYSTEM, USER = "{% if m.role == 'system' %}", "{% elif m.role == 'user' %}"
IF_USER, IF_ANSWER = "{% if m.role == 'user' %}", "{% if m.role == 'assistant' %}"
ELSE, END_IF, ANSWER = "{% else %}", "{% endif %}", "{% elif m.role == 'assistant' %}"
CONTENT, TRIMMED, EOS = "{{ m.content }}", "{{ m.content | trim }}", "{{ eos_token }}"
HAS_SYSTEM = "{% if messages[0].role == 'system' %}"
CHATML = ["<|im_start|>", "<|im_end|>"]

# The last answer gets a thought, an empty one if it has none; earlier answers lose theirs.
LAST_THOUGHT = (
    "{% set parts = m.content.split('</think>') %}{% if loop.last %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 }}\n</think>\n\n"
    "{% endif %}{{ parts[-1].lstrip('\n') }}"
)
# The same, but nothing where the last answer has no thought.
OWN_THOUGHT = (
    "{% set parts = m.content.split('</think>') %}{% if loop.last and parts | length > 1 %}"
    "\n<think>\n{{ parts[0].split('<think>')[-1].strip('\n') }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}"
)


def each(*turn: str) -> str:
    """A loop over the messages."""
    return "{% for m in messages %}" + "".join(turn) + "{% endfor %}"


def asked(header: str) -> str:
    """The header of an answer where it is asked for."""
    return "{% if add_generation_prompt %}" + header + END_IF


def chatml(answer: str = CONTENT, *, default: str = "", opening: str | None = "") -> str:
    """Qwen's frame. Without a system message `default` is one; `opening` follows an asked-for header."""
    system = "{% if messages[0].role != 'system' %}<|im_start|>system\n" + default + "<|im_end|>\n" + END_IF
    turn = each("<|im_start|>{{ m.role }}\n", IF_ANSWER, answer, ELSE, CONTENT, END_IF, "<|im_end|>\n")
    header = "" if opening is None else asked("<|im_start|>assistant\n" + opening)
    return (system if default else "") + turn + header


def llama3(header: str) -> str:
    """Llama 3's frame, which LLaDA's follows."""
    return "{{ bos_token }}" + each("<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n", TRIMMED,
                                    "<|eot_id|>") + header  # fmt: skip


LLAMA_HEADER = "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
TEMPLATES: dict[str, tuple[str, list[str]]] = {
    "LLaDA": (llama3(LLAMA_HEADER), []),
    "Llama 3": (llama3(asked(LLAMA_HEADER)), []),
    "Qwen2.5": (chatml(default="You are Qwen."), CHATML),
    "Dream": (chatml(default="You are a helpful assistant."), CHATML),
    "Qwen3": (chatml(LAST_THOUGHT), CHATML),
    "SDAR": (chatml(LAST_THOUGHT), [*CHATML, "<|MASK|>"]),
    "Qwen3-Thinking": (chatml(LAST_THOUGHT, opening="<think>\n"), CHATML),
    "ChatML without generation prompt": (chatml(opening=None), CHATML),
    "R1-Distill": (
        "{{ bos_token }}" + HAS_SYSTEM + "{{ messages[0].content }}" + END_IF
        + each(IF_USER, "<|User|>", CONTENT, ANSWER, "<|Assistant|>{{ m.content.split('</think>')[-1] }}",
               "<|end_of_sentence|>", END_IF)
        + asked("<|Assistant|><think>\n"),
        ["<|User|>", "<|Assistant|>", "<|end_of_sentence|>"],
    ),
    "Mistral": (
        "{{ bos_token }}{% set first = messages[0].content if messages[0].role == 'system' else '' %}"
        + each(IF_USER, "[INST] {{ first if loop.index0 < 2 }}", CONTENT, " [/INST]",
               ANSWER, " ", CONTENT, EOS, END_IF),
        ["[INST]", "[/INST]"],
    ),
    "Llama 2": (
        each(IF_USER, "{{ bos_token }}[INST] {% if loop.index0 == 1 and messages[0].role == 'system' %}"
             "<<SYS>>\n{{ messages[0].content }}\n<</SYS>>\n\n", END_IF, TRIMMED, " [/INST]",
             ANSWER, " ", TRIMMED, " ", EOS, END_IF),
        [],
    ),
    "Gemma": (
        "{{ bos_token }}" + HAS_SYSTEM + "{{ raise_exception('System role not supported') }}" + END_IF
        + each("<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n", TRIMMED,
               "<end_of_turn>\n")
        + asked("<start_of_turn>model\n"),
        ["<start_of_turn>", "<end_of_turn>"],
    ),
    "Vicuna": (
        each(SYSTEM, CONTENT, "\n\n", USER, "USER: ", CONTENT, "\n", ELSE, "ASSISTANT: ", CONTENT, EOS, "\n",
             END_IF) + asked("ASSISTANT:"),
        [],
    ),
    "Zephyr": (
        each("<|{{ m.role }}|>\n", CONTENT, EOS, "\n") + asked("<|assistant|>\n"),
        ["<|system|>", "<|user|>", "<|assistant|>"],
    ),
    "Phi-3": (
        each("<|{{ m.role }}|>\n", CONTENT, "<|end|>\n")
        + "{% if add_generation_prompt %}<|assistant|>\n" + ELSE + EOS + END_IF,
        ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    ),
    "LLaDA2": (
        "<role>SYSTEM</role>" + HAS_SYSTEM + "{{ messages[0].content }}\n" + END_IF
        + "detailed thinking off<|role_end|>"
        + each(IF_USER, "<role>HUMAN</role>", CONTENT, "<|role_end|>",
               ANSWER, "<role>ASSISTANT</role>", OWN_THOUGHT, "<|role_end|>", END_IF)
        + asked("<role>ASSISTANT</role>"),
        ["<role>", "</role>", "<|role_end|>"],
    ),
    "gpt-oss": (
        each("<|start|>{{ m.role }}{{ '<|channel|>final' if m.role == 'assistant' }}<|message|>", CONTENT,
             "{{ '<|return|>' if m.role == 'assistant' and loop.last else '<|end|>' }}")
        + asked("<|start|>assistant"),
        ["<|start|>", "<|end|>", "<|return|>", "<|message|>", "<|channel|>"],
    ),
    "GLM": (
        each("<|{{ m.role }}|>\n", CONTENT) + asked("<|assistant|>"),
        ["<|system|>", "<|user|>", "<|assistant|>"],
    ),
    "Alpaca": (
        each(SYSTEM, CONTENT, "\n\n", USER, "### Instruction:\n", CONTENT, "\n\n",
             ELSE, "### Response:\n", CONTENT, "\n\n", END_IF) + asked("### Response:\n"),
        [],
    ),
    "generation markers": (
        each("<|im_start|>{{ m.role }}\n", IF_ANSWER, "{% generation %}", CONTENT,
             "<|im_end|>{% endgeneration %}\n", ELSE, CONTENT, "<|im_end|>\n", END_IF)
        + asked("<|im_start|>assistant\n"),
        CHATML,
    ),
}  # fmt: skip
