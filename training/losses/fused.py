"""Hidden states × LM head → losses and gradients, chunk by chunk: the logits of all positions never exist at once.

What costs V per position beside the matrix products is in `rest.py`: torch, and Triton kernels on GPUs.

Gradients are computed in the forward pass (as in Liger-Kernel, arXiv 2410.10989): each chunk's logits become, in place,
the gradient of the loss by them, which is multiplied into those of hidden states and head right away. Nothing is
computed twice, and the backward pass only scales what is there.

The head's gradient is summed over chunks in float32 whatever the head's dtype: in bfloat16, as plain autograd sums it,
a sum of many chunks keeps two digits. For a head of half precision that is twice the head's bytes, and three times with
the result: no more than autograd takes (the sum so far, a chunk's part, and the two added), since the sum is held in
blocks of rows. A chunk's part exists for one block at a time, and a block is freed once it is in the result. Two times
would be possible with a sum in half precision and its remainder, for more work per chunk and, in float16, less range.

Shapes: N positions, C of a chunk, D hidden, W student rows, R rows of a block, E entries.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from training.losses.objective import LossSums, Objective, Part, Statistics, loss_sums
from training.losses.rest import rest_of
from training.losses.targets import WeightedTargets

HALF = (torch.bfloat16, torch.float16)

CHUNK_BYTES = {"cpu": 64 * 2**20, "cuda": 1024 * 2**20}
"""Float32 logits of a chunk: at V = 151,936 they are of 110 positions on a CPU, and of 1,766 on a GPU, where a chunk's
hundred small operations take as long to launch as 800 positions to compute, and the head's gradient is read and written
once per chunk. A GPU holds one such buffer; a CPU two at T ≠ 1, and a gradient of half precision beside it."""

BLOCK_BYTES = {"cpu": 16 * 2**20, "cuda": 128 * 2**20}
"""Float32 gradient of a block of the head's rows, where the head is of half precision. 4,096 rows at D = 1,024 on a CPU
(its cache then holds a chunk's part until it is added: forward and backward of the loss take 0.6 to 0.8 of the time
with 64 MiB), and 8,192 rows at D = 4,096 on a GPU, which should fill it (not measured)."""

PREPARED_ENTRIES = 2**22
"""Labels that are prepared at once, in some 80 bytes each while they are sorted: 64,000 positions at k = 64."""

Finish = Callable[[Tensor], Tensor]
"""What a model does to its head's logits [C, W] afterwards: soft-capping, a scale. Returns its argument if nothing."""


def linear_losses(
    hidden_ND: Tensor,
    weight_WD: Tensor,
    bias_W: Tensor | None,
    finish: Finish,
    next_ids_N: Tensor,
    teachers: Sequence[WeightedTargets],
    objective: Objective,
    chunk: int | None = None,
) -> Tensor:
    """Losses of N positions, summed: a tensor [4], for ``LossSums.of``. The first of them, the loss, has gradients by
    hidden states, head and a learned temperature; those of the others are zero, whatever they depend on.

    Plain code: ``logits = finish(linear(hidden, weight, bias).float())[:, :V]``, then `objective.py` over them. Matrix
    products are in the head's dtype, everything else in float32 (in float64 where the head is). ``chunk`` positions
    are worked on at once (`default_chunk` without). Without positions the sums are zeros, with zeros for gradients.
    """
    temperature = objective.temperature if isinstance(objective.temperature, Tensor) else None
    at = objective.temperature if temperature is None else float(temperature.detach())
    work = _Work(finish, next_ids_N, teachers, objective, at, chunk or default_chunk(weight_WD))
    sums_X: Tensor = _LinearLosses.apply(hidden_ND, weight_WD, bias_W, temperature, work, torch.is_grad_enabled())
    return sums_X


def default_chunk(weight_WD: Tensor) -> int:
    """Positions whose float32 logits fit in ``CHUNK_BYTES``; at least one."""
    return _rows_within(CHUNK_BYTES, weight_WD.device, len(weight_WD))


def _rows_within(num_bytes: dict[str, int], device: torch.device, width: int) -> int:
    return max(1, num_bytes.get(device.type, num_bytes["cuda"]) // (4 * width))


class _Work(NamedTuple):
    finish: Finish
    next_ids_N: Tensor
    teachers: Sequence[WeightedTargets]
    objective: Objective
    temperature: float
    chunk: int

    def parts(self, dtype: torch.dtype) -> Iterator[tuple[slice, Part]]:
        """Chunks of positions with their labels, ready in ``dtype``. What does not depend on the student is made for
        many chunks at once: on a GPU small operations cost what their launch costs.
        """
        width = 1 + sum(sum(column.shape[1] for column in targets if column.dim() > 1) for _, targets in self.teachers)
        block = max(1, PREPARED_ENTRIES // (width * self.chunk)) * self.chunk
        for first in range(0, len(self.next_ids_N), block):
            at = slice(first, first + block)
            teachers = [WeightedTargets(weight, targets.part(at)) for weight, targets in self.teachers]
            next_ids_N = self.next_ids_N[at]
            part = Part.of(self.objective, next_ids_N, teachers, dtype)
            for start in range(0, len(next_ids_N), self.chunk):
                within = slice(start, start + self.chunk)
                yield slice(first + start, first + start + self.chunk), part.at(within)


class _LinearLosses(torch.autograd.Function):
    """Sums [4] in the order of LossSums; the gradient of the first alone is used."""

    @staticmethod
    def forward(
        ctx: Any, hidden_ND: Tensor, weight_WD: Tensor, bias_W: Tensor | None, temperature: Tensor | None, work: _Work,
        with_gradients: bool,
    ) -> Tensor:  # fmt: skip
        wide = torch.promote_types(weight_WD.dtype, torch.float32)
        wanted = [with_gradients and needed for needed in ctx.needs_input_grad[:4]]
        # A sum over many chunks is kept wide; a row of hidden_ND is written once.
        gradients = _Gradients(
            torch.zeros_like(hidden_ND) if wanted[0] else None,
            _row_blocks(weight_WD, wide) if wanted[1] else [],
            torch.zeros_like(bias_W, dtype=wide) if wanted[2] and bias_W is not None else None,
            torch.zeros_like(temperature, dtype=wide) if wanted[3] and temperature is not None else None,
        )
        sums = torch.zeros(len(LossSums._fields), dtype=torch.float64, device=hidden_ND.device)
        for at, part in work.parts(wide):
            logits_CW, before_finish = _logits(hidden_ND[at], weight_WD, bias_W, work.finish, any(wanted))
            dtype = weight_WD.dtype if before_finish is None else logits_CW.dtype
            of_chunk, gradient_CW = _chunk(logits_CW, part, work, gradients.temperature, dtype if any(wanted) else None)
            sums += of_chunk
            if gradient_CW is not None:
                if before_finish is not None:
                    gradient_CW = before_finish(gradient_CW).to(weight_WD.dtype)
                del logits_CW, before_finish  # the next products need their room
                _multiply_in(gradient_CW, hidden_ND[at], weight_WD, at, gradients)
                del gradient_CW  # and the next logits this one's
        ctx.save_for_backward(gradients.hidden_ND, gradients.bias_W, gradients.temperature, *gradients.weight_blocks)
        ctx.dtypes = weight_WD.dtype, bias_W is not None and bias_W.dtype, temperature is not None and temperature.dtype
        return sums.to(wide)

    @staticmethod
    def backward(ctx: Any, grad_sums: Tensor) -> tuple[Tensor | None, ...]:
        # In place: a second pass through the same graph is refused by autograd, since what was saved has changed.
        scaled = [g if g is None else g.mul_(grad_sums[0]) for g in ctx.saved_tensors]
        hidden_ND, bias_W, temperature, *weight_blocks = scaled
        of_weight, of_bias, of_temperature = ctx.dtypes
        return (
            hidden_ND,
            _joined(weight_blocks, of_weight) if weight_blocks else None,
            bias_W if bias_W is None else bias_W.to(of_bias),
            temperature if temperature is None else temperature.to(of_temperature),
            None,
            None,
        )


class _Gradients(NamedTuple):
    """Sums so far; None, or no blocks, of what is not wanted."""

    hidden_ND: Tensor | None
    weight_blocks: list[Tensor]
    """[R, D] each; see `_row_blocks`."""
    bias_W: Tensor | None
    temperature: Tensor | None


def _row_blocks(weight_WD: Tensor, wide: torch.dtype) -> list[Tensor]:
    """Zeros for the gradient of a head, in blocks of rows, each with memory of its own.

    A head as wide as the sums has one block, which is the result itself.
    """
    hidden_size = weight_WD.shape[1]
    if weight_WD.dtype == wide:
        return [torch.zeros_like(weight_WD)]
    return [
        torch.zeros(len(rows_RD), hidden_size, dtype=wide, device=weight_WD.device)
        for rows_RD in weight_WD.split(_rows_within(BLOCK_BYTES, weight_WD.device, hidden_size))
    ]


def _joined(blocks: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """The blocks as one tensor [W, D]; those that had to be cast are freed one by one."""
    if blocks[0].dtype == dtype:
        return blocks[0]
    num_rows = sum(map(len, blocks))
    joined_WD = torch.empty(num_rows, blocks[0].shape[1], dtype=dtype, device=blocks[0].device)
    for rows_RD, block_RD in zip(joined_WD.split(len(blocks[0])), blocks, strict=True):
        rows_RD.copy_(block_RD)
        block_RD.untyped_storage().resize_(0)  # autograd still holds the tensor
    return joined_WD


def _logits(
    hidden_CD: Tensor, weight_WD: Tensor, bias_W: Tensor | None, finish: Finish, with_gradients: bool
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Logits of a chunk, to be overwritten, and what carries their gradient back to before ``finish``; None where that
    does nothing.
    """
    plain_CW = wide_linear(hidden_CD, weight_WD, bias_W)
    with torch.set_grad_enabled(with_gradients):
        finished_CW = finish(plain_CW.requires_grad_(with_gradients))
    if finished_CW is plain_CW:
        return plain_CW.detach(), None
    own_CW = finished_CW.detach().clone()
    return own_CW, lambda gradient_CW: torch.autograd.grad(finished_CW, plain_CW, gradient_CW)[0]


def wide_linear(hidden_CD: Tensor, weight_WD: Tensor, bias_W: Tensor | None) -> Tensor:
    """``linear(hidden, weight, bias)`` in the head's dtype, as float32 (float64 where the head is).

    A GPU sums products of half precision in float32 anyway, and can leave them there. Elsewhere they are rounded first.
    """
    if weight_WD.is_cuda and weight_WD.dtype in HALF and hidden_CD.dtype == weight_WD.dtype:
        plain_CW = torch.mm(hidden_CD, weight_WD.T, out_dtype=torch.float32)
        return plain_CW if bias_W is None else plain_CW.add_(bias_W)
    plain_CW = torch.nn.functional.linear(hidden_CD, weight_WD, bias_W)
    return plain_CW.to(torch.promote_types(plain_CW.dtype, torch.float32))


def _chunk(
    logits_CW: Tensor, part: Part, work: _Work, temperature_gradient: Tensor | None, wanted: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Sums [4] of a chunk, float64, and the gradient of the loss by its logits as ``wanted``, or None. The logits are
    overwritten.
    """
    objective, ids_CE = work.objective, part.entries.ids_NE
    logits_CW[:, objective.vocabulary_size :] = -torch.inf
    leaves = {"entries": logits_CW.gather(-1, ids_CE)}
    logits_CW.scatter_(-1, ids_CE, -torch.inf)
    if objective.needs_rest:
        leaves["each of rest"] = logits_CW.clone()
    is_learned = isinstance(objective.temperature, Tensor)
    at_T = bool(part.labels) and (is_learned or work.temperature != 1.0)
    rest = rest_of(logits_CW, work.temperature if at_T else None, at_T and is_learned)
    leaves["rest"] = rest.lse_C
    if rest.lse_at_T_C is not None:
        leaves["rest at T"] = rest.lse_at_T_C
    if isinstance(objective.temperature, Tensor):
        leaves["temperature"] = objective.temperature.detach().to(logits_CW.dtype)
    with torch.set_grad_enabled(wanted is not None):
        sums = _sums(objective, part, {name: leaf.requires_grad_(wanted is not None) for name, leaf in leaves.items()},
                     rest.slope_C)  # fmt: skip
    gradient_CW = None
    if wanted is not None:
        found = torch.autograd.grad(sums.loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
        by_name = dict(zip(leaves, found, strict=True))
        dtype = logits_CW.dtype if objective.needs_rest else wanted
        gradient_CW = rest.gradient(by_name["rest"], by_name.get("rest at T"), dtype)
        if objective.needs_rest:
            gradient_CW = gradient_CW.add_(by_name["each of rest"]).to(wanted)
        # The rest gives nothing at entries, and free ones repeat an id with a gradient of zero: no sum is rounded.
        gradient_CW.scatter_add_(-1, ids_CE, by_name["entries"].to(wanted))
        if temperature_gradient is not None:
            temperature_gradient += by_name["temperature"]
    return torch.stack(list(sums)).detach().double(), gradient_CW


def _sums(objective: Objective, part: Part, leaves: dict[str, Tensor], slope_C: Tensor | None) -> LossSums:
    """The chunk's losses as a function of the leaves; ``slope_C`` is that of the rest at T, where T is learned."""
    temperature = leaves.get("temperature", objective.temperature)
    lse_at_T_C = leaves.get("rest at T", leaves["rest"])
    if slope_C is not None and isinstance(temperature, Tensor):
        lse_at_T_C = lse_at_T_C + slope_C * (temperature - temperature.detach())
    statistics = Statistics(leaves["entries"], leaves["rest"], lse_at_T_C, leaves.get("each of rest"))
    return loss_sums(objective._replace(temperature=temperature), part, statistics)


def _multiply_in(gradient_CW: Tensor, hidden_CD: Tensor, weight_WD: Tensor, at: slice, gradients: _Gradients) -> None:
    """Add a chunk's part to the gradients of hidden states, weight and bias."""
    if gradients.hidden_ND is not None:
        torch.mm(gradient_CW, weight_WD, out=gradients.hidden_ND[at])
    row = 0
    for block_RD in gradients.weight_blocks:
        gradient_RC = gradient_CW[:, row : row + len(block_RD)].T
        if block_RD.dtype == gradient_RC.dtype:
            block_RD.addmm_(gradient_RC, hidden_CD)
        elif block_RD.is_cuda and block_RD.dtype == torch.float32:  # summed without being rounded first
            torch.addmm(block_RD, gradient_RC, hidden_CD, out_dtype=torch.float32, out=block_RD)
        else:
            block_RD += gradient_RC @ hidden_CD
        row += len(block_RD)
    if gradients.bias_W is not None:
        gradients.bias_W.add_(gradient_CW.sum(0, dtype=gradients.bias_W.dtype))
