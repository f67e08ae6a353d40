"""Experts in place of a block's MLP: a router in float32 chooses a few for each token.

N tokens, D model width, E experts, k experts a token, F width of an expert.
"""

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import use_experts_implementation

from .configuration_llada import LLaDAConfig


class LLaDARouter(nn.Module):
    """Which experts a token goes to, and with which weights; float32 under autocast too.

    softmax: the k largest of softmax(W x), renormalised to sum 1 where `moe_renormalise` says so.
    sigmoid: scores sigmoid(W x); `expert_bias` is added for the choice only, groups compete by the sum of
    their two best and only the best `moe_groups_per_token` stay, and the weights are the unbiased scores.

    Sources: the published code of LLaDA-MoE, SDAR-30B-A3B and LLaDA2.
    """

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.num_experts, self.num_chosen = config.moe_num_experts, config.moe_experts_per_token
        self.num_groups, self.groups_kept = config.moe_num_groups, config.moe_groups_per_token
        self.renormalise, self.scaling = config.moe_renormalise, config.moe_scaling
        self.weight = nn.Parameter(torch.empty(self.num_experts, config.d_model))
        self.is_sigmoid = config.moe_router == "sigmoid"
        if self.is_sigmoid:
            self.register_buffer("expert_bias", torch.zeros(self.num_experts))
        self.load: Tensor | None = None  # [E] float32, how often each was chosen in training; see take_load

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[N, D] -> experts [N, k] long, weights [N, k] float32."""
        with torch.autocast(x.device.type, enabled=False):
            logits = nn.functional.linear(x.float(), self.weight.float())  # [N, E]
        if self.is_sigmoid:
            scores = logits.sigmoid()
            experts = self._keep_groups(scores + self.expert_bias).topk(self.num_chosen, dim=-1).indices
            weights = scores.gather(1, experts)
        else:
            weights, experts = logits.softmax(dim=-1).topk(self.num_chosen, dim=-1)
        if self.renormalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        if self.training:
            chosen = experts.flatten()
            load = torch.zeros_like(logits[0]) if self.load is None else self.load
            self.load = load.detach().index_add(0, chosen, load.new_ones(len(chosen)))
        return experts, weights * self.scaling

    def _keep_groups(self, choice: Tensor) -> Tensor:
        if self.num_groups == 1:
            return choice
        groups = choice.unflatten(1, (self.num_groups, -1))  # [N, groups, E / groups]
        best = groups.topk(2, dim=-1).values.sum(dim=-1).topk(self.groups_kept, dim=-1).indices
        is_kept = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter_(1, best, True)
        return groups.masked_fill(~is_kept[..., None], -torch.inf).flatten(1)


@use_experts_implementation
class LLaDAExperts(nn.Module):
    """SwiGLU experts as two stacks of matrices; transformers puts a grouped kernel in its place."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.num_experts, width = config.moe_num_experts, config.moe_hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(self.num_experts, 2 * width, config.d_model))
        self.down_proj = nn.Parameter(torch.empty(self.num_experts, config.d_model, width))
        self.act_fn = ACT2FN[config.activation_type]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[N, D] -> [N, D], expert by expert. Argument names are those of transformers' kernels."""
        total = torch.zeros_like(hidden_states)
        for expert in top_k_index.unique().tolist():
            token, place = torch.where(top_k_index == expert)
            gate, up = nn.functional.linear(hidden_states[token], self.gate_up_proj[expert]).chunk(2, dim=-1)
            out = nn.functional.linear(self.act_fn(gate) * up, self.down_proj[expert])
            total.index_add_(0, token, (out * top_k_weights[token, place, None]).to(total.dtype))
        return total


class LLaDASharedExperts(nn.Module):
    """The experts that every token passes: side by side, so one wider MLP."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        width = config.moe_hidden_size * config.moe_num_shared
        self.ff_proj = nn.Linear(config.d_model, width, bias=False)
        self.up_proj = nn.Linear(config.d_model, width, bias=False)
        self.ff_out = nn.Linear(width, config.d_model, bias=False)
        self.activation = ACT2FN[config.activation_type]

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        return self.ff_out(self.activation(self.ff_proj(x)) * self.up_proj(x))


class LLaDAMoE(nn.Module):
    """A block's experts: the chosen ones, and those that every token passes."""

    def __init__(self, config: LLaDAConfig) -> None:
        super().__init__()
        self.router = LLaDARouter(config)
        self.experts = LLaDAExperts(config)
        self.shared = LLaDASharedExperts(config) if config.moe_num_shared else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, L, D] -> [B, L, D]."""
        flat = x.flatten(0, -2)
        experts, weights = self.router(flat)
        # One row for each chosen expert: gathered k times by the kernel, a token's gradient would be added up
        # by the CPU's threads in the order of their arrival.
        rows = flat[:, None].expand(-1, experts.shape[1], -1).flatten(0, 1)  # [N k, D]
        out = self.experts(rows, experts.view(-1, 1), weights.to(x.dtype).view(-1, 1))
        out = out.view(*experts.shape, -1).sum(dim=1).view_as(x)
        return out if self.shared is None else out + self.shared(x)


def draw_weights(module: LLaDARouter | LLaDAExperts) -> None:
    """Matrices from N(0, 1 / fan_in), biases of the choice 0, by transformers' initialization."""
    for weight in module.parameters():
        init.normal_(weight, mean=0.0, std=weight.shape[-1] ** -0.5)
    if hasattr(module, "expert_bias"):
        init.zeros_(module.expert_bias)


def take_load(model: nn.Module) -> Tensor | None:
    """[layers, E] how often each expert was chosen in training since the last call; None: nothing counted."""
    routers = [m for m in model.modules() if isinstance(m, LLaDARouter) and m.load is not None]
    loads = [router.load for router in routers]
    for router in routers:
        router.load = None
    return torch.stack(loads) if loads else None
