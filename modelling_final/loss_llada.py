"""LM head and loss in one pass over chunks of rows; never a logits tensor for all rows at once.

M rows (masked positions of a micro-batch), D model width, V head outputs.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Score = Callable[[Tensor, slice], Tensor]
"""(logits [m, V] float32 of some rows, which of the M rows they are) -> their losses [m], differentiable."""

# On a GPU the float32 logits of a chunk take about this much. Larger chunks gain nothing once the matrix
# product hides the reading of the head (from about 210 rows on, for the 8B head), and this is what bounds
# peak memory. On a CPU products are as fast from 256 rows on, and smaller logits stay nearer to the cores.
CHUNK_BYTES = 2**28
MIN_CHUNK, MAX_CHUNK = 256, 2048


def chunk_rows(vocab_size: int, device_type: str = "cuda") -> int:
    """Rows per chunk: 256 on a CPU; else about 0.25 GB of float32 logits, a multiple of 128 in 256..2048."""
    if device_type == "cpu":
        return MIN_CHUNK
    fitting = CHUNK_BYTES // (4 * vocab_size) // 128 * 128
    return max(MIN_CHUNK, min(MAX_CHUNK, fitting))


def chunked_cross_entropy(
    hidden: Tensor, head_weight: Tensor, targets: Tensor, weights: Tensor, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of the rows' negative log-likelihoods, and those likelihoods, both in nats.

        loss = sum_j weights_j * nll_j,   nll_j = logsumexp(W h_j) - (W h_j)[targets_j]

    The gradients are formed together with the loss, chunk by chunk, so the backward pass recomputes nothing:
    three matrix products in all, two where the head is frozen, one under no_grad. Products run in the
    autocast dtype, or else in the head's; the rest is float32. The graph can be walked once only.

    Args:
        hidden: [M, D] final hidden states of the chosen rows; head_weight: [V, D].
        targets: [M] long; weights: [M] float32, constants.
        chunk_size: rows per chunk; `chunk_rows(V)` if None.

    Returns: loss (scalar float32) and nll ([M] float32, detached). ValueError: shapes that do not go
    together.
    """
    if not hidden.shape[0] == targets.shape[0] == weights.shape[0]:
        raise ValueError(
            f"rows, targets and weights must have one entry per row, got {hidden.shape[0]}, "
            f"{targets.shape[0]} and {weights.shape[0]}"
        )
    weights = weights.float()

    def cross_entropy(logits: Tensor, chunk: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        # In place throughout: a new buffer per operation costs a CPU more time than the arithmetic does.
        target = targets[chunk, None]
        logits -= logits.amax(dim=-1, keepdim=True)
        log_p = logits.gather(1, target)
        normaliser = logits.exp_().sum(dim=-1, keepdim=True)
        nll = (normaliser.log() - log_p)[:, 0]
        if not wants_grad:
            return nll, None
        weight = weights[chunk, None]
        grad = logits.mul_(weight / normaliser)  # d nll / d logits = softmax - onehot
        return nll, grad.scatter_add_(1, target, -weight)

    return _ChunkedLoss.apply(
        hidden, head_weight, cross_entropy, weights, chunk_size, torch.is_grad_enabled()
    )


def chunked_score(
    hidden: Tensor, head_weight: Tensor, score: Score, *, chunk_size: int | None = None
) -> tuple[Tensor, Tensor]:
    """Sum of any loss of the rows' logits, and the rows' own losses; as `chunked_cross_entropy` otherwise.

    `score` is called once a chunk, in the order of the rows; nothing of it is kept but its gradient.
    """

    def losses(logits: Tensor, chunk: slice, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
        logits = logits.detach().requires_grad_(wants_grad)
        with torch.set_grad_enabled(wants_grad):
            found = score(logits, chunk)
        if not found.requires_grad:  # not wanted, or no row of this chunk is scored
            return found, None
        return found.detach(), torch.autograd.grad(found, logits, torch.ones_like(found))[0]

    return _ChunkedLoss.apply(hidden, head_weight, losses, None, chunk_size, torch.is_grad_enabled())


ChunkLoss = Callable[[Tensor, slice, bool], tuple[Tensor, Tensor | None]]
"""(logits [m, V] float32, to be overwritten; which rows; are gradients wanted) -> (losses [m], gradient)."""


def _product_dtype(hidden: Tensor, head_weight: Tensor, differentiable: bool) -> torch.dtype:
    device_type = hidden.device.type
    autocasts = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type) if autocasts else head_weight.dtype
    if differentiable and dtype == torch.float16:
        return torch.float32  # small weights would vanish here, before any loss scaling can reach them
    return dtype


class _ChunkedLoss(torch.autograd.Function):
    """(loss, losses of the rows) with the gradients formed on the way."""

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx,
        hidden: Tensor,
        head_weight: Tensor,
        loss_of: ChunkLoss,
        weights: Tensor | None,
        chunk_size: int | None,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        # `differentiable`: grad mode of the caller; in here it is off, and needs_input_grad ignores it
        wants_hidden, wants_weight = (differentiable and needs for needs in ctx.needs_input_grad[:2])
        num_rows, vocab_size = hidden.shape[0], head_weight.shape[0]
        dtype = _product_dtype(hidden, head_weight, wants_hidden or wants_weight)
        chunk_size = chunk_size or chunk_rows(vocab_size, hidden.device.type)
        # With M = 0 the loss is 0 and still has a graph: every rank of a data-parallel group runs its
        # backward.
        losses = torch.empty(num_rows, dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if wants_hidden else None
        grad_weight = torch.zeros_like(head_weight, dtype=torch.float32) if wants_weight else None
        # Logits, exponentials and gradients of every chunk lie in this one place.
        buffer = losses.new_empty(min(chunk_size, num_rows), vocab_size)

        with torch.autocast(hidden.device.type, enabled=False):  # the dtypes below are chosen by hand
            matrix = head_weight.to(dtype)
            for start in range(0, num_rows, chunk_size):
                chunk = slice(start, min(start + chunk_size, num_rows))
                rows = hidden[chunk].to(dtype)
                logits = _product_into(buffer[: rows.shape[0]], rows, matrix)
                losses[chunk], grad = loss_of(logits, chunk, wants_hidden or wants_weight)
                if grad is None:
                    continue
                grad = grad.to(dtype)
                if wants_hidden:
                    grad_hidden[chunk] = grad @ matrix
                if wants_weight and dtype == torch.float32:
                    grad_weight.addmm_(grad.t(), rows)  # without a second tensor of the head's size
                elif wants_weight:
                    grad_weight += grad.t() @ rows

        ctx.grads = (grad_hidden, grad_weight)
        ctx.weight_dtype = head_weight.dtype
        ctx.mark_non_differentiable(losses)
        ctx.set_materialize_grads(False)
        return (losses if weights is None else losses * weights).sum(), losses

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, grad_loss: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if ctx.grads is None:
            raise RuntimeError("the chunked loss frees its gradients in the first backward pass")
        (grad_hidden, grad_weight), ctx.grads = ctx.grads, None
        if grad_loss is None:
            return (None,) * 6
        # Scaled in place and dropped: for an 8B head a second copy would be 2 GB.
        if grad_hidden is not None:
            grad_hidden.mul_(grad_loss)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None, None, None, None


def _product_into(out: Tensor, rows: Tensor, matrix: Tensor) -> Tensor:
    """rows @ matrix^T, formed in their dtype and written to `out`, which is float32."""
    if rows.dtype == out.dtype:
        return torch.mm(rows, matrix.t(), out=out)
    return out.copy_(F.linear(rows, matrix))


class LLaDAHead(nn.Linear):
    """The LM head. Scoring is a call of the module too, so that the hooks of sharded training see it."""

    def forward(
        self,
        hidden: Tensor,
        targets: Tensor | None = None,
        weights: Tensor | None = None,
        score: Score | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Logits [..., V]; or (loss, losses) of `chunked_cross_entropy` or of `chunked_score`."""
        if score is not None:
            return chunked_score(hidden, self.weight, score)
        if targets is None:
            return super().forward(hidden)
        return chunked_cross_entropy(hidden, self.weight, targets, weights)
