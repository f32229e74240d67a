"""Weight gradients of all passes of one forward pass, formed once instead of once a pass.

A latent step holds a token a row, so the gradient it gives a weight matrix is the product of two thin matrices: as
large as the weight, and made of next to nothing. n steps would write and add n of them. Here every pass leaves its two
factors, and one product of all of them gives the sum:

    Σ_passes gᵢᵀ xᵢ = [g₁; …; g_n]ᵀ [x₁; …; x_n]

It is formed layer by layer, as soon as the backward pass has left the layer in the first pass, the longest as a rule;
until then the factors of the later passes are kept.

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


# Both from benchmarks/LOG.md. With more rows, parts of a product gain nothing.
FEW_ROWS = 32
# Below this width, weights are so small that what Python does for each product costs more than it saves (128: a tenth
# of a step), and above it less (768: a quarter is saved).
LEAST_WIDTH = 512


class Ledger:
    """A weight's factors, in the order in which the backward pass comes by: what went in (R, I), gradients (R, O)."""

    def __init__(self, transposed: bool):
        self.transposed = transposed
        self.inputs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.backward_pass: int | None = None

    def enter(self) -> None:
        """Forget what another backward pass left, one for some gradients only, which did not come to the weight."""
        if self.backward_pass != current_backward_pass():
            self.inputs, self.gradients = [], []
            self.backward_pass = current_backward_pass()

    def take(self, weight_dtype: torch.dtype) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The gradients of weight and bias; the ledger is empty afterwards."""
        if not self.gradients:
            return None, None
        inputs, gradients = torch.cat(self.inputs), torch.cat(self.gradients)  # (R, I), (R, O)
        self.inputs, self.gradients = [], []
        product = inputs.T @ gradients if self.transposed else gradients.T @ inputs
        return product.to(weight_dtype), gradients.sum(dim=0).to(weight_dtype)


class Share(torch.autograd.Function):
    """A weight and its bias as all passes read them; their gradients come back through here, once."""

    @staticmethod
    def forward(ctx, weight, bias, ledger):
        ctx.set_materialize_grads(False)
        ctx.ledger, ctx.dtype, ctx.has_bias = ledger, weight.dtype, bias is not None
        device, dtype = weight.device.type, weight.dtype
        if torch.is_autocast_enabled(device) and dtype == torch.float32:
            dtype = torch.get_autocast_dtype(device)  # here once, and not in every product
        return tuple(None if part is None else part.view_as(part).to(dtype) for part in (weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_weight, grad_bias):
        ctx.ledger.enter()
        grad_weight, grad_bias = ctx.ledger.take(ctx.dtype)
        return grad_weight, grad_bias if ctx.has_bias else None, None


def product(rows: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """Rows (R, I) times a matrix (I, O); few rows on a CPU in a part a thread, as it would use one thread for all."""
    num_parts = torch.get_num_threads()
    if rows.device.type != "cpu" or rows.shape[0] > FEW_ROWS or matrix.shape[1] % num_parts:
        return rows @ matrix
    parts = matrix.unflatten(1, (num_parts, -1)).transpose(0, 1)  # (parts, I, O / parts)
    return (rows.expand(num_parts, -1, -1) @ parts).transpose(0, 1).flatten(1)  # (R, O)


class Product(torch.autograd.Function):
    """x (…, I) times a shared weight, plus its bias: (…, O)."""

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
    """Return True if a call is a product with a trained parameter at that place, and nothing more."""
    is_plain = len(args) > weight and not kwargs and torch.is_grad_enabled()
    return is_plain and isinstance(args[weight], nn.Parameter) and args[weight].requires_grad


class DeferredWeightGradients(TorchFunctionMode):
    """Within it, `linear` and `addmm` with a parameter that is trained leave its gradient to the end.

    One instance is for one forward pass; each parameter gets one gradient through it.
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
    """Return True if the passes of a training step are to form a thinking decoder's weight gradients once.

    choice: whether they should; None is where it was measured to pay: on a CPU and for wide decoders.
    """
    if choice is None:
        choice = decoder.device.type == "cpu" and decoder.config.hidden_size >= LEAST_WIDTH
    return choice and decoder.training and not is_sharded(decoder)


def context_of_passes(decoder: nn.Module, choice: bool | None):
    """Return the context that every pass of one training step is run in."""
    return DeferredWeightGradients() if defers_gradients(decoder, choice) else nullcontext()


def defer_weight_gradients(model, choice: bool | None = None) -> None:
    """Let the passes of each training step form the decoder's weight gradients once, together.

    choice: True always, False never, None where it was measured to pay.
    """
    decoder = model.get_decoder()
    decoder.around_passes = partial(context_of_passes, decoder, choice)
