"""Compute the weight gradients of all passes of a forward pass once, instead of once per pass.

A latent step holds one token per row, so the gradient of a weight matrix is the product of two thin matrices: as
large as the weight, and of very low rank. n steps would write and add n such products. Here every pass stores its
two factors, and a single product of all factors computes the sum:

    Σ_passes gᵢᵀ xᵢ = [g₁; …; g_n]ᵀ [x₁; …; x_n]

The sum is computed per layer, as soon as the backward pass has left the layer in the first pass, usually the
longest; until then the factors of the later passes are kept in memory.

Shapes: R rows (tokens) of all passes, I and O the width before and after a weight.
"""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

from mmcoconut.compat_mmcoconut import is_sharded
from mmcoconut.kernels.private import current_backward_pass


# Both from benchmarks/LOG.md. With more rows, splitting a product gains nothing.
FEW_ROWS = 32
# Below this width, the Python overhead per product exceeds the saving (128: a tenth of a step lost).
# Above it there is a saving (768: a quarter of a step).
LEAST_WIDTH = 512


class Ledger:
    """The factors of a weight's gradient in backward order: inputs (R, I) and output gradients (R, O)."""

    def __init__(self, transposed: bool):
        self.transposed = transposed
        self.inputs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.backward_pass: int | None = None

    def enter(self) -> None:
        """Discard the factors of an earlier backward pass for some gradients only, which did not reach the weight."""
        if self.backward_pass != current_backward_pass():
            self.inputs, self.gradients = [], []
            self.backward_pass = current_backward_pass()

    def take(self, weight_dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the gradients of weight and bias; the ledger is empty afterwards."""
        if not self.gradients:
            return None, None
        inputs, gradients = torch.cat(self.inputs), torch.cat(self.gradients)  # (R, I), (R, O)
        self.inputs, self.gradients = [], []
        product = inputs.T @ gradients if self.transposed else gradients.T @ inputs
        return product.to(weight_dtype), gradients.sum(dim=0).to(weight_dtype)


class Share(torch.autograd.Function):
    """Shared view of a weight and its bias for all passes; their gradients come back through it once."""

    @staticmethod
    def forward(ctx, weight, bias, ledger):
        ctx.set_materialize_grads(False)
        ctx.ledger, ctx.dtype, ctx.has_bias = ledger, weight.dtype, bias is not None
        device, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(device) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device)  # once here, not in every product
        return tuple(None if part is None else part.view_as(part).to(dtype) for part in (weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight, grad_bias):
        ctx.ledger.enter()
        grad_weight, grad_bias = ctx.ledger.take(ctx.dtype)
        return grad_weight, grad_bias if ctx.has_bias else None, None


def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Multiply rows (R, I) by a matrix (I, O); on a CPU few rows are split by thread, which would use only one."""
    num_parts = torch.get_num_threads()
    if rows.device.type != "cpu" or rows.shape[0] > FEW_ROWS or matrix.shape[1] % num_parts:
        return rows @ matrix
    parts = matrix.unflatten(1, (num_parts, -1)).transpose(0, 1)  # (parts, I, O / parts)
    return (rows.expand(num_parts, -1, -1) @ parts).transpose(0, 1).flatten(1)  # (R, O)


class Product(torch.autograd.Function):
    """Compute x (…, I) times a shared weight plus its bias: (…, O)."""

    @staticmethod
    def forward(ctx, inputs, weight, bias, ledger):
        rows = inputs.flatten(0, -2)  # (R, I)
        if torch.is_autocast_enabled(inputs.device.type):
            rows = rows.to(weight.dtype)
        ctx.ledger, ctx.dtype = ledger, inputs.dtype
        ctx.save_for_backward(rows, weight)
        output = product(rows, weight if ledger.transposed else weight.T)  # (R, O)
        if bias is not None:
            output += bias
        return output.view(*inputs.shape[:-1], output.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        rows, weight = ctx.saved_tensors
        ctx.ledger.enter()
        of_rows = gradient.flatten(0, -2)  # (R, O)
        ctx.ledger.inputs.append(rows)
        ctx.ledger.gradients.append(of_rows)
        grad_inputs = product(of_rows, weight.T if ctx.ledger.transposed else weight)  # (R, I)
        return grad_inputs.view(*gradient.shape[:-1], rows.shape[-1]).to(ctx.dtype), None, None, None


def defers(args: tuple, kwargs: dict, *, weight: int) -> bool:
    """Return True if a call is only a product with a trained parameter at this position."""
    is_plain = len(args) > weight and not kwargs and torch.is_grad_enabled()
    return is_plain and isinstance(args[weight], nn.Parameter) and args[weight].requires_grad


class DeferredWeightGradients(TorchFunctionMode):
    """Context in which `linear` and `addmm` with a trained parameter defer its gradient to the end.

    Use one instance per forward pass; each parameter gets one gradient through it.
    """

    def __init__(self):
        super().__init__()
        self.shared: dict[tuple, tuple] = {}

    def linear(self, inputs, weight, bias, *, transposed: bool) -> torch.Tensor:
        key = (weight, bias, transposed)
        if key not in self.shared:
            ledger = Ledger(transposed)
            self.shared[key] = (*Share.apply(weight, bias, ledger), ledger)
        return Product.apply(inputs, *self.shared[key])

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is nn.functional.linear and defers(args, kwargs, weight=1):
            inputs, weight, *bias = args
            return self.linear(inputs, weight, *bias or [None], transposed=False)
        if func is torch.addmm and defers(args, kwargs, weight=2):  # GPT-2's projections
            bias, inputs, weight = args
            return self.linear(inputs, weight, bias, transposed=True)
        return func(*args, **kwargs)


def defers_gradients(decoder: nn.Module, choice: bool | None) -> bool:
    """Return True if the passes of a training step should compute a thinking decoder's weight gradients once.

    choice: True or False decides; None enables it where it was measured to pay: on a CPU, for wide decoders.
    """
    if choice is None:
        choice = decoder.device.type == "cpu" and decoder.config.hidden_size >= LEAST_WIDTH
    return choice and decoder.training and not is_sharded(decoder)


def context_of_passes(decoder: nn.Module, choice: bool | None):
    """Return the context in which every pass of one training step runs."""
    return DeferredWeightGradients() if defers_gradients(decoder, choice) else nullcontext()


def defer_weight_gradients(model, choice: bool | None = None) -> None:
    """Make the passes of each training step compute the decoder's weight gradients once, together.

    choice: True always, False never, None where it was measured to pay.
    """
    decoder = model.get_decoder()
    decoder.around_passes = partial(context_of_passes, decoder, choice)
