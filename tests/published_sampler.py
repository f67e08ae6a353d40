"""LLaDA's published sampling algorithm, written down plainly: one sequence, one step, one loop at a time.

The oracle of test_generation_llada.py. It runs the whole canvas through the model at every step, in the
model's own precision (float64 in the tests), and knows nothing of caches, batches or early stops. Three
deviations from the published program, each a defect of it: the mask token is never chosen, guidance needs no
attention mask, and `confidence_eos_eot_inf` works at every temperature. Of equal confidences the first
position wins, where torch.topk leaves it open.

L canvas positions, E head outputs.
"""

import torch


def schedule(num_masked, num_steps):
    """How many tokens each step decides: as equal as can be, the larger shares first."""
    shares = [num_masked // num_steps] * num_steps
    for i in range(num_masked % num_steps):
        shares[i] += 1
    return shares


def gumbel_argmax(logits, temperature, noise):
    """A draw from softmax(logits / temperature): argmax of exp(logits) / (-log u) ** temperature."""
    return (logits.double().exp() / (-noise.log()) ** temperature).argmax(dim=-1)


def sample(
    model,
    prompt,
    *,
    gen_length,
    steps,
    block_length,
    grows=False,
    temperature=0.0,
    cfg_scale=0.0,
    remasking="low_confidence",
    logits_eos_inf=False,
    confidence_eos_eot_inf=False,
    choose=gumbel_argmax,
    order_draw=None,
    pad_to=None,
):
    """The answer to one prompt: a list of gen_length token ids.

    Args:
        grows: the canvas ends with the current block (semi_autoregressive_origin).
        choose: (logits [L, E], temperature, block, step) -> tokens [L], used at temperature > 0.
        order_draw: (block, step) -> uniform numbers of the block's positions, used by random remasking.
        pad_to: left-pad the prompt to this many tokens.
    """
    config = model.config
    mask_id, eos_id, eot_id = config.mask_token_id, config.eos_token_id, config.eot_token_id
    num_padding = max(0, (pad_to or 0) - len(prompt))
    num_prompt = num_padding + len(prompt)
    x = torch.tensor([config.pad_token_id] * num_padding + list(prompt) + [mask_id] * gen_length)
    attends = torch.tensor([0] * num_padding + [1] * (len(prompt) + gen_length))
    num_blocks = gen_length // block_length
    assert num_blocks * block_length == gen_length and steps % num_blocks == 0

    for block in range(num_blocks):
        start = num_prompt + block * block_length
        end = start + block_length
        seen = end if grows else len(x)
        shares = schedule(int((x[start:end] == mask_id).sum()), steps // num_blocks)
        for step, share in enumerate(shares):
            logits = model(x[None, :seen], attention_mask=attends[None, :seen]).logits[0]
            if cfg_scale > 0:
                y = x.clone()
                y[:num_prompt] = mask_id
                without = model(y[None, :seen], attention_mask=attends[None, :seen]).logits[0]
                logits = without + (1 + cfg_scale) * (logits - without)
            if logits_eos_inf:
                logits[:, eos_id] = -torch.inf

            choosable = logits.clone()
            choosable[:, mask_id] = -torch.inf
            if temperature == 0:
                tokens = choosable.argmax(dim=-1)
            else:
                tokens = choose(choosable, temperature, block, step)

            if remasking == "random":
                scores = torch.zeros(seen, dtype=torch.float64)
                scores[start:end] = order_draw(block, step)
            else:
                if confidence_eos_eot_inf:
                    logits[:, eos_id] = -torch.inf
                    logits[:, eot_id] = -torch.inf
                probabilities = logits.softmax(dim=-1)
                scores = torch.stack([probabilities[i, tokens[i]] for i in range(seen)])
                if confidence_eos_eot_inf:
                    scores[(tokens == eos_id) | (tokens == eot_id)] = -1.0
            candidates = [i for i in range(start, end) if x[i] == mask_id]
            candidates.sort(key=lambda i: -float(scores[i]))  # stable: of equals, the first
            for i in candidates[:share]:
                x[i] = tokens[i]
    return x[num_prompt:].tolist()


def until_end(tokens, config):
    """The tokens before the first EOS or EoT."""
    for i, token in enumerate(tokens):
        if token in (config.eos_token_id, config.eot_token_id):
            return tokens[:i]
    return tokens
