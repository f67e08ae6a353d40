"""What a training step costs, by arithmetic: parameters, bytes per rank by kind, and FLOPs.

Shapes and symbols: B sequences of a micro-batch, L positions, n blocks, D model width, Q width of all
queries, K of keys and of values, F MLP width (of the experts that a token meets, side by side), V head
outputs; P all parameters, T trainable ones; R ranks, S ranks that share one copy of the state (1: replicated,
R: `--shard full`, the ranks of a node: `--shard hybrid`); e bytes of a number in --dtype. Gigabytes are 1e9
bytes.

Memory of a rank, added up as if every part were at its peak at once:
    weights     4 P / S; LoRA: e P / S for the frozen ones, 4 T / S for the adapters; experts' by themselves
    gradients   4 T / S; replicated on several ranks another 4 T for the buckets of the all-reduce; sharded
                with accumulation another 4 T, since they stay whole until a step's last micro-batch (but for
                --reduce_always)
    AdamW       8 T / S
    working     replicated bfloat16: 2 bytes for each block weight that autocast has cast; sharded: two
                gathered blocks and the gathered head, and the largest of these once more in float32 to
                reduce; adapters of experts: the adapted matrices of each block whose backward reads them
    activations B L n a, where a is `block_bytes` (what one block keeps of a token for its backward);
                with --activation_checkpointing full B L (n x + a), x the bytes of a block's input; with
                selective x includes what is kept beside it: k, q, gate, MLP output and attention
    masks       e B L L of padded rows, for each block whose backward reads them
    head        chunk_rows(V) V (4 + 2) for the logits of a chunk, and where the head is trained its gradient
                in float32 and the product of a chunk: V D (4 + e)
FLOPs of a token: 6 for each matrix weight of a block (LoRA: 4, since frozen weights need no gradient), the
same for the head on the masked share of tokens, and 12 n L Q for attention that looks both ways. A
recomputed block costs its forward again, which does not count as useful (MFU) work.

Source: arXiv 2204.02311 appendix B (6 per weight); for LLaDA-8B at 4,096 positions, all rows in the head:
51.4 GFLOP a token, LoRA 36.4, LoRA recomputed 52.5.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn
from transformers import PretrainedConfig

from llada.diffusion.batches import MaskedBatch
from llada.models.flags import EXPERTS, LINEAR_LAYERS
from llada.training.config import TrainConfig
from modelling_final import LLaDAConfig
from modelling_final.loss_llada import chunk_rows

GB = 1e9
FLOAT32 = 4
ADAMW_BYTES = 8  # two float32 moments


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters, and the bytes in which they are held."""

    total: int
    trainable: int
    weight_bytes: int
    blocks: int  # base weights of all blocks, norms included
    experts: int  # of those, in experts of which a token meets a few
    expert_bytes: int
    adapted: frozenset[str]  # linear layers of a block whose input is kept for a weight gradient

    @property
    def is_lora(self) -> bool:
        return self.trainable < self.total


def count_parameters(model: nn.Module) -> Parameters:
    """The parameters of a model prepared for training; a model on the meta device will do."""
    named = list(model.named_parameters())
    trainable = [(name, parameter) for name, parameter in named if parameter.requires_grad]
    experts = [parameter for name, parameter in named if f".{EXPERTS}." in name and "lora_" not in name]
    layers = (*LINEAR_LAYERS, EXPERTS)
    adapted = {layer for layer in layers for name, _ in trainable if f".{layer}." in f".{name}"}
    return Parameters(
        # of an adapted model the base alone: its size is what a reader compares
        total=sum(p.numel() for name, p in named if "lora_" not in name),
        trainable=sum(p.numel() for _, p in trainable),
        weight_bytes=sum(p.numel() * p.element_size() for _, p in named),
        blocks=sum(p.numel() for name, p in named if ".blocks." in name and "lora_" not in name),
        experts=sum(p.numel() for p in experts),
        expert_bytes=sum(p.numel() * p.element_size() for p in experts),
        adapted=frozenset(adapted),
    )


@dataclass(frozen=True)
class Ranks:
    """How many processes there are, and how many of them share one copy of the state."""

    world_size: int
    sharing: int

    @classmethod
    def of(cls, shard: str, world_size: int, local_world_size: int) -> "Ranks":
        """The ranks that `--shard` makes; ValueError where it does not fit them."""
        if shard == "none":
            return cls(world_size, 1)
        if world_size == 1:
            raise ValueError(f"--shard {shard} needs several processes: start the script with torchrun")
        if shard == "hybrid" and world_size % local_world_size:
            raise ValueError(
                f"--shard hybrid: {world_size} ranks are not a multiple of the {local_world_size} of a node"
            )
        return cls(world_size, local_world_size if shard == "hybrid" else world_size)


def block_bytes(shape: LLaDAConfig, config: TrainConfig, parameters: Parameters) -> tuple[int, int]:
    """(bytes that a block keeps of one token for its backward, bytes of the token at the block's input)."""
    e = 2 if config.dtype == "bfloat16" else FLOAT32
    d, f, q = shape.d_model, _width_met(shape), shape.n_heads * shape.head_dim
    k = shape.n_kv_heads * shape.head_dim
    autocast = config.shard == "none" and e == 2
    residual = FLOAT32 if config.shard == "none" and not parameters.is_lora else e
    # A norm squares its input in float32 (kept), and its trainable weight needs the normalised rows.
    norm = FLOAT32 * d + (0 if parameters.is_lora else residual * d)
    attention = e * (2 * q + 2 * k) + FLOAT32 * shape.n_heads
    if shape.query_key_norm:  # what is normed, once as it is and once in float32
        attention += (FLOAT32 + (0 if parameters.is_lora else e)) * (q + k)
    mlp = e * 3 * f  # gate, its activation, and what that is multiplied with
    if shape.moe_num_experts:  # the rows that are sent to experts and those that come back
        mlp += e * shape.moe_experts_per_token * 2 * d

    # Inputs kept for weight gradients: one tensor for all layers that read it, but autocast casts for each.
    inputs = 0
    for layers, width in ((("q_proj", "k_proj", "v_proj"), d), (("ff_proj", "up_proj"), d)):
        readers = len(parameters.adapted.intersection(layers))
        inputs += e * width * (readers if autocast else min(readers, 1))
    # The attention's output is kept anyway; LoRA under autocast casts a copy of its own.
    inputs += e * q if "attn_out" in parameters.adapted and autocast and parameters.is_lora else 0
    inputs += e * f if "ff_out" in parameters.adapted else 0
    return 2 * norm + attention + mlp + inputs, residual * d


def memory(
    shape: PretrainedConfig, config: TrainConfig, parameters: Parameters, ranks: Ranks, *, length: int
) -> dict[str, float]:
    """Bytes of a rank by kind, for micro-batches of `length` positions; the kinds of the module's docstring.

    CUDA's context and the allocator's gaps come on top. Of another model than LLaDA only the state is known.
    """
    trainable, sharing = parameters.trainable, ranks.sharing
    accumulates = config.batch_size > config.micro_batch_size * ranks.world_size
    gradients = FLOAT32 * trainable / sharing
    if sharing == 1 and ranks.world_size > 1:
        gradients += FLOAT32 * trainable
    elif sharing > 1 and accumulates and not config.reduce_always:
        gradients += (2 if config.reduce_dtype == "bfloat16" else FLOAT32) * trainable
    experts = parameters.expert_bytes / sharing
    state = {
        "weights": parameters.weight_bytes / sharing - experts,
        **({"experts": experts} if experts else {}),
        "gradients": gradients,
        "AdamW": ADAMW_BYTES * trainable / sharing,
    }
    if not isinstance(shape, LLaDAConfig):
        return state
    if config.objective == "block_diffusion":
        length *= 2
    tokens = config.micro_batch_size * length
    return state | _work_memory(
        shape, config, parameters, is_sharded=sharing > 1, tokens=tokens, length=length
    )


def _work_memory(
    shape: LLaDAConfig,
    config: TrainConfig,
    parameters: Parameters,
    *,
    is_sharded: bool,
    tokens: int,
    length: int,
) -> dict[str, float]:
    e = 2 if config.dtype == "bfloat16" else FLOAT32
    block = parameters.blocks / shape.n_layers
    head = shape.embedding_size * shape.d_model
    working = 0.0
    if is_sharded:
        largest = parameters.trainable / shape.n_layers if parameters.is_lora else max(block, head)
        working = e * (2 * block + head) + FLOAT32 * largest
    elif e == 2 and not parameters.is_lora:
        working = e * parameters.blocks

    per_block, at_input = block_bytes(shape, config, parameters)
    if config.activation_checkpointing == "selective":
        at_input += e * (shape.d_model + (2 * shape.n_heads + shape.n_kv_heads) * shape.head_dim)
        at_input += e * _width_met(shape)
        at_input += FLOAT32 * shape.n_heads
    num_kept = shape.n_layers if config.activation_checkpointing == "none" else 1
    if parameters.is_lora and EXPERTS in parameters.adapted:
        working += e * parameters.experts * num_kept / shape.n_layers
    activations = tokens * num_kept * per_block
    if config.activation_checkpointing != "none":
        activations += tokens * shape.n_layers * at_input
    # Rows of one micro-batch differ in length: each block keeps what attention makes of their padding.
    has_mask = config.micro_batch_size > 1 and not config.packing
    if config.objective == "block_diffusion":
        has_mask = config.attn_implementation != "flex_attention"
    masks = e * tokens * length * num_kept if has_mask else 0
    head_bytes = chunk_rows(shape.embedding_size) * shape.embedding_size * (FLOAT32 + 2)
    if not parameters.is_lora:
        head_bytes += head * (FLOAT32 + e)
    return {
        "working copies": working,
        "activations": float(activations),
        "masks": float(masks),
        "head": float(head_bytes),
    }


def flops_per_token(
    shape: LLaDAConfig,
    parameters: Parameters,
    *,
    length: int,
    masked_share: float,
    recompute: bool = False,
) -> float:
    """FLOPs that the loss and its gradients need for one token of a row of `length` positions.

    Args:
        masked_share: share of the tokens whose row goes through the head; 0.5 in pretraining.
        recompute: also count the second forward of the blocks that activation checkpointing runs.
    """
    useful = useful_flops(shape, parameters, num_tokens=1, num_scored=masked_share, num_pairs=length)
    width = shape.n_heads * shape.head_dim
    again = 2 * _matrices(shape) + 4 * shape.n_layers * length * width if recompute else 0.0
    return useful + again


def useful_flops(
    shape: LLaDAConfig, parameters: Parameters, *, num_tokens: float, num_scored: float, num_pairs: float
) -> float:
    """FLOPs that the loss and its gradients need.

    Args:
        num_tokens: tokens in the blocks, padding excluded.
        num_scored: rows that go through the head.
        num_pairs: (query, key) pairs in attention: the squared lengths of all documents, added up.
    """
    per_weight = 4 if parameters.is_lora else 6
    head = shape.embedding_size * shape.d_model * num_scored
    attention = 12 * shape.n_layers * shape.n_heads * shape.head_dim * num_pairs
    return per_weight * (_matrices(shape) * num_tokens + head) + attention


def flops_counter(model: nn.Module) -> Callable[[MaskedBatch], float]:
    """`useful_flops` of a micro-batch, for this model; 0 for one of another kind than LLaDA."""
    shape = (model.get_base_model() if hasattr(model, "peft_config") else model).config
    if not isinstance(shape, LLaDAConfig):
        return lambda _: 0.0
    parameters = count_parameters(model)

    def flops_of(batch: MaskedBatch) -> float:
        return useful_flops(
            shape,
            parameters,
            num_tokens=batch.num_tokens,
            num_scored=batch.rows.numel(),
            num_pairs=batch.num_pairs,
        )

    return flops_of


def _matrices(shape: LLaDAConfig) -> int:
    """Matrix weights of all blocks, of experts those that a token meets."""
    d, q, k = shape.d_model, shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    num_moe = sum(map(shape.is_moe, range(shape.n_layers)))
    dense = 3 * d * shape.mlp_hidden_size * (shape.n_layers - num_moe)
    experts = (3 * _width_met(shape) + shape.moe_num_experts) * d * num_moe
    return shape.n_layers * (2 * d * q + 2 * d * k) + dense + experts


def _width_met(shape: LLaDAConfig) -> int:
    """Width of the MLP that a token passes; with experts, of those it meets, side by side."""
    if not shape.moe_num_experts:
        return shape.mlp_hidden_size
    return shape.moe_hidden_size * (shape.moe_experts_per_token + (shape.moe_num_shared or 0))
